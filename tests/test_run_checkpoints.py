"""Checkpoints of a run that cannot be used, or written: each is told, and nothing is lost."""

import errno
import io
import re
import resource
import shutil
import types

import chex
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from experiments import checkpoints, records
from tests.small_training import (  # noqa: F401, used by every test here
    assert_same_end,
    default_flags,
    given,
    newest,
    only_run,
    regression,
    standard_promotion,
    train,
)


def test_two_processes_do_not_train_the_same_run(tmp_path):
    given(tmp_path)
    train()
    refused = pytest.raises(checkpoints.CheckpointError, match=r"another process is at this run, .*--checkpoint_dir")
    with checkpoints.owned(only_run(tmp_path)), refused:
        train()
    train()


def test_a_directory_for_checkpoints_that_cannot_be_made_is_told_before_the_training(tmp_path):
    given(tmp_path)
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(checkpoints.CheckpointError, match=r"no checkpoints can be kept in .*: Not a directory"):
        train(regression(stop_at=0))


FIGURES = {
    "another figure": ('"dense_bits": ', '"dense_bits": 1'),
    "another setting": ('"lr": 0.05', '"lr": 0.15'),
    "no workers": ('"workers": 4', '"workers": 0'),
}


def damage(folder, kind):
    """Damages a checkpoint."""
    files = sorted((path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    if kind == "truncated":
        files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size // 2])
    elif kind == "missing":
        files[-1].unlink()
    elif kind == "zeros":
        files[-1].write_bytes(bytes(files[-1].stat().st_size))
    elif kind == "no figures":
        (folder / "run" / "metadata").write_text('{"workers": 4, "sett')
    elif kind in FIGURES:
        path = folder / "run" / "metadata"
        text = path.read_text()
        path.write_text(text.replace(*FIGURES[kind]))
        assert path.read_text() != text
    else:  # an array, whole and of the right shape, with one value that is not the saved one
        state = ocp.StandardCheckpointer().restore(folder / "state")
        state["params"]["layer2"]["kernel"][0, 0] += 1
        shutil.rmtree(folder / "state")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "state", state)


@pytest.mark.parametrize("kind", ["truncated", "missing", "zeros", "no figures", *FIGURES, "another value"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(kind, tmp_path):
    given(tmp_path / "whole")
    train()
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    given(tmp_path / "damaged")
    folder = only_run(tmp_path / "damaged")
    damage(folder / "12", kind)
    said = io.StringIO()
    run = train(said=said)
    assert "The checkpoint of step 12 is damaged" in said.getvalue()
    assert f"it is now {folder / '12.damaged'}, and not used" in said.getvalue()
    assert [line["step"] for line in run.resumed] == [10]
    assert_same_end(tmp_path / "damaged", tmp_path / "whole")


def test_where_no_checkpoint_is_whole_the_training_does_not_start_anew(tmp_path):
    given(tmp_path)
    train()
    folder = only_run(tmp_path)
    for step in ("10", "12"):
        damage(folder / step, "missing")
    for _ in range(2):
        with pytest.raises(checkpoints.CheckpointError, match=r"no checkpoint in .* is whole .*remove that directory"):
            train()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr=0.06"], r"lr=0.05, not 0.06"),
        (["--epochs=4", "--seed=0"], r"epochs=3, not 4"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(args, message, tmp_path):
    given(tmp_path)
    train()
    before = newest(only_run(tmp_path))
    given(tmp_path, *args)
    with pytest.raises(checkpoints.CheckpointError, match=message + ".*or another --checkpoint_dir"):
        train()
    chex.assert_trees_all_equal(newest(only_run(tmp_path)), before)


def test_a_checkpoint_of_another_structure_is_refused_and_stays(tmp_path):
    """As after an update of a library that adds to its state."""
    given(tmp_path)
    train()
    task = regression()
    task = task._replace(params=task.params | {"more": jnp.zeros(3)})
    with pytest.raises(checkpoints.CheckpointError, match=r"of another structure.* here; go on with the versions"):
        train(task)
    assert {path.name for path in only_run(tmp_path).iterdir()} == {"10", "12", "lock"}


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    given(tmp_path)
    train()

    def too_many_files(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(checkpoints, "_read", too_many_files)
    with pytest.raises(checkpoints.CheckpointError, match=r"step 12 in .* cannot be read: .*Too many open files"):
        train()
    assert {path.name for path in only_run(tmp_path).iterdir()} == {"10", "12", "lock"}


def test_the_records_of_another_run_are_not_lost(tmp_path):
    given(tmp_path)
    before = train()
    given(tmp_path, "--lr=0.06", f"--checkpoint_dir={tmp_path}/others")
    with pytest.raises(records.RecordsError, match=r"of a run with lr=0.05, not 0.06: give another --out_dir"):
        train()
    (path,) = (tmp_path / "out").glob("*.jsonl")
    assert records.read(path) == before


def test_a_full_disk_loses_no_earlier_checkpoint_and_says_so(tmp_path, monkeypatch):
    """The kernel refuses files of more than a few bytes, as a full disk does, from the second checkpoint on."""
    given(tmp_path / "whole")
    train()
    given(tmp_path / "full")
    save, before = checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(folder, step, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if step > 5 else before[0], before[1]))
        try:
            save(folder, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(checkpoints, "save", limited)
    said = io.StringIO()
    train(said=said)
    for step in (10, 12):
        assert re.search(
            rf"The checkpoint of step {step} cannot be written.*earlier ones are as they were", said.getvalue()
        )
    assert newest(only_run(tmp_path / "full"))[0] == 5
    monkeypatch.undo()
    assert [line["step"] for line in train().resumed] == [5]
    assert_same_end(tmp_path / "full", tmp_path / "whole")


def test_a_disk_with_too_little_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    given(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    said = io.StringIO()
    train(said=said)
    assert re.search(
        r"The checkpoint of step 12 cannot be .*: it takes up to 0.0 MB, of which the disk has 0.0", said.getvalue()
    )
    assert [path.name for path in only_run(tmp_path).iterdir()] == ["lock"]
