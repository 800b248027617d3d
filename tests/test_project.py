"""The project's own files agree with each other and with the code."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest

import experiments
import gradcomp_jax as gcj

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", "WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
# What fences on pages may begin with: "python" runs here, "sh" is for a shell, "text" is neither.
FENCES = {"python", "sh", "text", "diff"}
# These bring compilers, a web site's generator or PyTorch, which the other parts do without.
APART = {"certify", "docs", "torch"}
every_page = pytest.mark.parametrize("page", PAGES)


def requirements(lines):
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def test_requirements_are_those_of_the_package_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: part for name, part in project["optional-dependencies"].items() if name not in APART}
    parts = [project["dependencies"], *extras.values()]
    assert requirements((ROOT / "requirements.txt").read_text().splitlines()) == {
        line for part in parts for line in part
    }


def test_experiments_ask_for_the_packages_of_their_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["experiments"]]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in asked) == sorted(experiments.PACKAGES)


def begun(module, *missing):
    """A module run as a program where some modules are not installed."""
    code = (
        f"import sys, runpy; sys.modules |= dict.fromkeys({missing}); runpy.run_module({module!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("missing", [("rich", "orbax"), ("orbax.checkpoint", "rich")])
def test_a_missing_extra_is_named_with_what_installs_it(missing):
    done = begun("experiments.cifar", *missing)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the experiments need orbax-checkpoint, rich, which ")
    assert "pip install -e '.[experiments]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_experiments_list_their_programs():
    done = begun("experiments")
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "experiments").glob("[!_]*.py"):
        assert (f"python -m experiments.{path.stem} " in done.stdout) == ("    command.run(main" in path.read_text()), (
            path
        )


@every_page
@jax.numpy_dtype_promotion("standard")  # jax's default, as a reader has it
def test_the_code_on_the_pages_runs(page):
    """As printed; the blocks of a page run in order and share their names, as a reader types them."""
    text, names = (ROOT / page).read_text(), {}
    assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) <= FENCES
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page, "exec"), names)


@every_page
def test_the_pages_name_files_and_headings_that_exist(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    named = {ROOT / name for name in re.findall(r"\b(?:gradcomp_jax|experiments|examples|tests)/[\w/.\-]*[\w/]", text)}
    links = re.findall(r"\]\(([\w./\-]+)(?:#([^)]+))?\)", text)
    named |= {folder / name for name, _ in links}
    assert not [name for name in named if not name.exists()]
    parts = [(folder / name, part) for name, part in links if part and "api/" not in name]  # those are made from code
    assert not [(name, part) for name, part in parts if part not in headings(name)]


def headings(page):
    """As they are named in links, by GitHub and mkdocs alike."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in found}


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def functions(node, above=0):
    """Each function below a node, with how many functions it lies in."""
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef)
        if inside:
            yield child, above
        yield from functions(child, above + inside)


@pytest.mark.parametrize("file", sorted((ROOT / "gradcomp_jax").rglob("*.py")), ids=lambda file: file.name)
def test_no_function_is_long_or_deep(file):
    for function, above in functions(ast.parse(file.read_text())):
        first = function.body[ast.get_docstring(function) is not None :][:1] or function.body
        assert function.end_lineno - first[0].lineno < 60, f"{function.name} is too long"
        assert above < 2, f"{function.name} is nested too deep"


def test_every_public_name_is_documented():
    for name in gcj.__all__:
        assert getattr(gcj, name).__doc__, name


def test_the_api_pages_document_every_public_name():
    """Once. Where a module has the name of its function, mkdocstrings finds the function inside the module."""
    pages = (path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    found = [name for text in pages for name in re.findall(r"^::: gradcomp_jax\.(\w+)(?:\.\1)?$", text, re.MULTILINE)]
    assert not set(gcj.__all__) - set(found)
    assert len(found) == len(set(found))
