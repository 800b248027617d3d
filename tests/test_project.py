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
import gradcomp_jax as gc

ROOT = pathlib.Path(__file__).parent.parent


def requirements(lines):
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def test_requirements_are_those_of_the_package_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: part for name, part in project["optional-dependencies"].items() if name != "certify"}  # large
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


@pytest.mark.parametrize("page", ["README.md", "WORKSPACE.md"])
@jax.numpy_dtype_promotion("standard")  # jax's default, as a reader has it
def test_the_code_on_the_pages_runs(page):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", ["README.md", "WORKSPACE.md"])
def test_the_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"\b(?:gradcomp_jax|experiments|tests)/[\w/.\-]*[\w/]", text))
    named |= set(re.findall(r"\]\(([\w./\-]+)\)", text))
    assert not [name for name in named if not (ROOT / name).exists()]


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
    for name in gc.__all__:
        assert getattr(gc, name).__doc__, name


def test_readme_names_everything_public_but_the_state_types():
    text = (ROOT / "README.md").read_text()
    names = [name for name in gc.__all__ if name[0].islower()]
    assert not [name for name in names if f"`{name}" not in text and f"{name}(" not in text]
