"""Each example runs as its docstring says, and trains."""

import ast
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
LINES = 100


def run(name, *arguments):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    environment |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]


@pytest.mark.parametrize("name", ["nnx_module", "equinox_model", "haiku_model", "two_processes", "two_slices"])
def test_it_trains(name):
    output = run(f"{name}.py")
    seen = losses(output)
    assert len(seen) == 6
    assert seen[-1] < 0.3 * seen[0]
    assert re.search(r"\d+\.\d+ kB", output)


def test_the_transformer_goes_on_where_it_was(tmp_path):
    first = run("transformer.py", f"--dir={tmp_path}", "--steps=52")
    assert losses(first)[-1] < 0.6 * losses(first)[0]
    assert [int(step) for step in re.findall(r"step (\d+)", first)] == [0, 20, 40]
    again = run("transformer.py", f"--dir={tmp_path}", "--steps=61")
    assert [int(step) for step in re.findall(r"step (\d+)", again)] == [60]  # the last checkpoint is of step 50
    assert losses(again)[0] < losses(first)[-1] + 0.3


def test_fewer_workers_go_on():
    output = run("fewer_workers.py")
    assert "the run of four workers ended by signal 9" in output
    assert "goes on at step 31 with 2 workers" in output
    seen = losses(output)
    assert len(seen) == 6
    assert all(after < before for before, after in itertools.pairwise(seen))


def test_the_others_go_on_without_a_lost_worker():
    output = run("lost_worker.py")
    assert "the processes ended with [0, 0, -9]" in output
    assert re.findall(r"(\d) workers", output) == ["3", "3", "3", "2", "2", "2"]
    seen = losses(output)
    assert seen[-1] < 0.5 * seen[0]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_it_is_short_and_says_how_it_is_run(file):
    text = file.read_text()
    assert text.count("\n") <= LINES
    assert f"python examples/{file.name}" in ast.get_docstring(ast.parse(text))
