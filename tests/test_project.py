"""The project's own files agree with each other and with the code."""

import ast
import pathlib
import re
import tomllib

import jax
import pytest

import gradcomp_jax as gc

ROOT = pathlib.Path(__file__).parent.parent


def requirements(lines):
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def test_requirements_are_those_of_the_package_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = [project["dependencies"], *project["optional-dependencies"].values()]
    assert requirements((ROOT / "requirements.txt").read_text().splitlines()) == {
        line for part in parts for line in part
    }


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
