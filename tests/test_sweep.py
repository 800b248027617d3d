"""Sweeps: which runs a grid stands for, and that a failure, an interruption or a repetition loses none of them."""

import contextlib
import json
import pathlib
import re
import signal
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cifar, display, lm, sweep

assert {cifar, lm}  # whose flags the runs have
FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parent.parent
GRID = """
[[grid]]
presets = ["PRESET"]
codecs = ["none", "qsgd --qsgd_bits=8"]
seeds = [0, 1]
"""
# Instead of an experiment: leaves records behind, and what it was told; fails where the file FAIL is there.
EXPERIMENT = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / "calls").open("a") as calls:
    calls.write("called\\n")
if (folder.parent / "FAIL").exists() and "qsgd" in folder.name:
    sys.exit("no luck [/at:0]")
if (folder.parent / "SLOW").exists():
    (folder.parent / "STARTED").touch()
    time.sleep(60)
at = {"step": 3, "bytes": 8, "dense_bytes": 16}
lines = [{"kind": "run", "steps": 3}, {"kind": "test", **at, "loss": 1.0, "accuracy": 0.5}, {"kind": "end", **at}]
(folder / "run.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


COMMAND = sweep.Cell.command


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    def command(cell, out_dir):
        return [sys.executable, "-c", EXPERIMENT, str(out_dir / cell.name)]

    monkeypatch.setattr(sweep.Cell, "command", command)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)


@pytest.fixture
def grid(tmp_path):
    preset = tmp_path / "small.flags"
    preset.write_text("# a comment\n--epochs=1\n")
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace("PRESET", str(preset)))
    return path


def run(grid, jobs=1):
    return sweep.sweep(grid, grid.parent / "out", display.console(), jobs)


def calls(tmp_path):
    """How often each run was started."""
    folders = sorted((tmp_path / "out").iterdir())
    return {f.name: (f / "calls").read_text().count("called") for f in folders if (f / "calls").exists()}


EVERY = ["small-none-seed0", "small-none-seed1", "small-qsgd_qsgd_bits=8-seed0", "small-qsgd_qsgd_bits=8-seed1"]


def test_a_sweep_runs_every_combination_once(grid, tmp_path, capsys):
    run(grid)
    assert calls(tmp_path) == dict.fromkeys(EVERY, 1)
    shown = capsys.readouterr().out
    assert "4 runs, 0 of them done before" in shown
    assert re.search(r"4/4 small-qsgd_qsgd_bits=8-seed1: test loss 1.0000, test accuracy 50.00%; 0:00:00 left", shown)
    run(grid)
    assert calls(tmp_path) == dict.fromkeys(EVERY, 1)
    assert "4 runs, 4 of them done before" in capsys.readouterr().out


def test_a_failure_is_told_and_keeps_no_other_run_from_its_end(grid, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "FAIL").touch()
    failures = run(grid)
    assert [failure.split(": ")[0] for failure in failures] == EVERY[2:]
    assert re.fullmatch(r".*seed0: exit code 1, 'no luck \[/at:0\]'; see .*log.txt", failures[0])
    (tmp_path / "out" / "FAIL").unlink()
    run(grid)
    assert calls(tmp_path) == dict(zip(EVERY, [1, 1, 2, 2], strict=True))


def test_runs_at_a_time_are_each_run_once(grid, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "FAIL").touch()
    assert [failure.split(": ")[0] for failure in run(grid, jobs=3)] == EVERY[2:]
    (tmp_path / "out" / "FAIL").unlink()
    assert not run(grid, jobs=3)
    assert calls(tmp_path) == dict(zip(EVERY, [1, 1, 2, 2], strict=True))


def test_an_interruption_reaches_the_run_and_ends_the_sweep(grid, tmp_path, monkeypatch, request):
    (tmp_path / "out").mkdir()
    slow = tmp_path / "out" / "SLOW"
    slow.touch()
    # A run takes after this process, which a shell in whose background it is has told to ignore interruptions.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    @contextlib.contextmanager
    def interruptible():
        yield (tmp_path / "out" / "STARTED").exists

    monkeypatch.setattr(sweep, "interruptible", interruptible)
    with pytest.raises(KeyboardInterrupt):
        run(grid)
    assert calls(tmp_path) == {EVERY[0]: 1}
    slow.unlink()
    (tmp_path / "out" / "STARTED").unlink()
    run(grid)
    assert calls(tmp_path) == dict(zip(EVERY, [2, 1, 1, 1], strict=True))


def test_a_sweep_can_be_moved_and_what_a_run_prints_is_no_markup(grid, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "FAIL").touch()
    failures = run(grid)
    assert len(failures) == 2
    assert "no luck [/at:0]" in failures[0]
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "FAIL").unlink()
    assert not sweep.sweep(grid, tmp_path / "elsewhere", display.console())


def test_the_command_of_a_run_is_one_of_the_experiment(tmp_path):
    cell = sweep.Cell(str(ROOT / "experiments/presets/digits.flags"), "qsgd --qsgd_bits=8 --noqsgd_error_feedback", 3)
    python, dash_m, module, *args = COMMAND(cell, tmp_path)
    assert (python, dash_m, module) == (sys.executable, "-m", "experiments.cifar")
    with flagsaver.flagsaver():
        assert FLAGS(["test", *args]) == ["test"]
        assert (FLAGS.codec, FLAGS.qsgd_bits, FLAGS.seed, FLAGS.epochs) == (["qsgd"], 8, 3, 40)
        assert FLAGS.out_dir == str(tmp_path / cell.name)
        assert FLAGS.checkpoint_dir == str(tmp_path / cell.name / "checkpoints")


def test_the_command_of_a_method_is_one_of_the_language_model(tmp_path):
    preset = str(ROOT / "experiments/presets/lm.flags")
    cell = sweep.Cell(preset, "sparseloco --every=30", 2, "methods")
    python, dash_m, module, *args = COMMAND(cell, tmp_path)
    assert (python, dash_m, module) == (sys.executable, "-m", "experiments.lm")
    with flagsaver.flagsaver():
        assert FLAGS(["test", *args]) == ["test"]
        assert (FLAGS.method, FLAGS.every, FLAGS.seed, FLAGS.workers) == (["sparseloco"], ["30"], 2, 8)


def test_runs_of_other_settings_are_not_taken_for_these(grid, tmp_path):
    run(grid)
    preset = tmp_path / "small.flags"
    preset.write_text("# another comment\n\n--epochs=1\n")
    run(grid)
    preset.write_text("--epochs=2\n")
    with pytest.raises(sweep.GridError, match=r"small-none-seed0 is of a run with other settings: move it away"):
        run(grid)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[[grid]]", "[[grid", "cannot read"),
        ("[[grid]]", "[[grids]]", r"expected \[\[grid\]\] and nothing else at the top, got grids"),
        ("seeds", "seed", "a \\[\\[grid\\]\\] has presets, codecs, seeds, got presets, codecs, seed"),
        ("[0, 1]", '["0"]', r"seeds must be a list of int, got \['0'\]"),
        ("[0, 1]", "[]", r"seeds must be a list of int, got \[\]"),
        ("[0, 1]", "[0, 0]", "there are 2 runs of the name small-none-seed0"),
        ("small.flags", "large.flags", "there is no preset .*large.flags"),
        ("--qsgd_bits=8", "--seed=3", "'qsgd --seed=3' is not a codec with its own settings"),
        ("--qsgd_bits=8", "'x", "is not a codec with its own settings"),
        ('["PRESET"', '["PRESET", "PRESET/../small.flags"', "there are 2 runs of the name small-none-seed0"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(before, after, message, grid, tmp_path):
    preset = str(tmp_path / "small.flags")
    before, after = (text.replace("PRESET/..", str(tmp_path)).replace("PRESET", preset) for text in (before, after))
    assert before in grid.read_text()
    grid.write_text(grid.read_text().replace(before, after))
    with pytest.raises(sweep.GridError, match=message):
        run(grid)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("codec", "accepted"),
    [
        ("powersgd --powersgd_quantizer_bits=8 --delayed", True),
        ("accordion --accordion_codec=topk --accordion_low=0.1 --topk_aggregate=gather", True),
        ("powersgd --qsgd_bits=8", False),
        ("accordion --batch_size=8", False),
    ],
)
def test_a_codec_has_flags_of_its_own_and_accordion_those_of_what_it_switches(codec, accepted):
    assert sweep.is_codec(codec) == accepted


@pytest.mark.parametrize(
    ("method", "accepted"),
    [
        ("diloco --every=30", True),
        ("streaming_diloco --every=30 --streaming_delay=5", True),
        ("powersgd --powersgd_rank=2", True),
        ("muloco --every=30 --adamw_lr=4e-3 --muon_lr=0.01", True),
        ("dense --delayed", False),
        ("dense --adamw_b2=0.99", False),
        ("diloco --streaming_delay=5", False),
    ],
)
def test_a_method_has_flags_of_its_own_and_every(method, accepted):
    assert sweep.is_codec(method, "methods") == accepted


def test_the_grid_of_the_results_is_one():
    cells = sweep.read(ROOT / "experiments" / "sweeps" / "cifar10.toml")
    assert len(cells) == 11
    assert len(sweep.read(ROOT / "experiments" / "sweeps" / "lm.toml")) == 13
    assert json.dumps(cells[-1].name) == '"cifar10-gradiveq_gradiveq_error_feedback-seed0"'
