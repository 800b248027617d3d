"""The training loop: what is recorded, checkpoints, and that a stopped training ends as one that was not."""

import errno
import io
import os
import pathlib
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from absl.testing import flagsaver
from tensorboardX.proto import event_pb2

from experiments import checkpoints, codecs, display, records, training
from gradcomp_jax import resize_workers
from tests import problem

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = flags.FLAGS
STEPS_PER_EPOCH = 4
# Its phase of compression is steps 7 to 12.
GRADIVEQ = ["--gradiveq_k=10", "--gradiveq_ratio=5", "--gradiveq_warmup_steps=1", "--gradiveq_train_steps=4"]
GRADIVEQ += ["--gradiveq_compress_steps=6", "--gradiveq_min_size=0", "--gradiveq_error_feedback"]
SETTINGS = {
    "none": [],
    "gradiveq": GRADIVEQ,
    "powersgd": ["--powersgd_min_size=0"],
    "qsgd": ["--qsgd_min_size=0", "--qsgd_error_feedback"],
}


@pytest.fixture(autouse=True)
def default_flags():
    with flagsaver.flagsaver():
        yield


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        yield


def given(tmp_path, *args, codec="none"):
    """Sets the flags: 12 steps on four workers."""
    folders = [f"--out_dir={tmp_path}/out", f"--checkpoint_dir={tmp_path}/checkpoints"]
    every = ["--checkpoint_every=5", "--eval_every=6", "--log_every=2"]
    FLAGS(
        [
            "test",
            "--epochs=3",
            "--batch_size=32",
            "--lr=0.05",
            f"--codec={codec}",
            *SETTINGS[codec],
            *folders,
            *every,
            *args,
        ]
    )


def with_kernel(params, shape):
    """The first layer's kernel in another shape: GradiVeQ compresses those of convolutions only."""
    return params | {"layer1": params["layer1"] | {"kernel": params["layer1"]["kernel"].reshape(shape)}}


def regression(stop_at=None):
    """A task; with `stop_at` the user presses Ctrl-C while batch number `stop_at` is made."""

    def loss_fn(params, state, batch):
        loss = problem.loss_fn(with_kernel(params, (20, 16)), batch)
        return loss, ({"seen": state["seen"] + 1}, loss)

    def batches(done):
        for number, batch in enumerate(problem.batches(100)):
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            if number >= done:
                yield batch

    def evaluate(params, state):
        return {"loss": float(sum(jnp.sum(x**2) for x in jax.tree.leaves(params))), "accuracy": 0.5}

    params, state = with_kernel(problem.params(), (2, 2, 5, 16)), {"seen": jnp.zeros((), jnp.int32)}
    return training.Task("regression", {}, params, state, loss_fn, batches, 32 * STEPS_PER_EPOCH, evaluate)


def train(task=None, said=None):
    """Trains as the flags say."""
    (name,) = FLAGS.codec
    screen = display.Console(file=said, width=1000) if said else display.console()
    mesh = training.worker_mesh(FLAGS.workers)
    return training.train(name, codecs.from_flags(name, FLAGS.seed), task or regression(), mesh, screen)


def only_run(folder):
    """The directory of the checkpoints of the only run."""
    (run,) = (folder / "checkpoints").iterdir()
    return run


def newest(folder, step=None):
    """The step and the arrays of the newest checkpoint, or of that step, read without this library."""
    step = step or max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return step, ocp.StandardCheckpointer().restore(folder / str(step) / "state")


def figures(path):
    """The records but for what tells of time, and of having been stopped."""
    run = records.read(path)
    lines = [run.header, *run.train, *run.test, run.end]
    return [{key: value for key, value in line.items() if key not in ("ms", "seconds")} for line in lines]


def assert_same_end(folder, expected):
    """To the bit: all arrays of the newest checkpoints, and all figures."""
    names = sorted(path.name for path in (expected / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (folder / "checkpoints").iterdir())
    for name in names:
        (step, arrays), (expected_step, expected_arrays) = (
            newest(x / "checkpoints" / name) for x in (folder, expected)
        )
        assert step == expected_step
        chex.assert_trees_all_equal(arrays, expected_arrays)
        assert figures(folder / "out" / f"{name}.jsonl") == figures(expected / "out" / f"{name}.jsonl")


# Stopped and resumed


@pytest.mark.parametrize(
    ("codec", "args"),
    [
        ("none", ["--optimizer=adam"]),
        ("gradiveq", []),
        ("powersgd", ["--optimizer=ef_momentum", "--schedule=step", "--lr_scale=4", "--decay_epochs=2"]),
        ("qsgd", []),
    ],
)
def test_an_interrupted_training_ends_as_one_that_was_not(codec, args, tmp_path):
    """Stopped between two lines of the records and two checkpoints, and while GradiVeQ compresses."""
    given(tmp_path / "whole", *args, codec=codec)
    train()
    given(tmp_path / "stopped", *args, codec=codec)
    with pytest.raises(
        training.InterruptedRunError, match=r"at step 9 of 12; the same command goes on from .*checkpoints"
    ):
        train(regression(stop_at=8))
    assert [line["step"] for line in train().resumed] == [9]
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_a_training_that_is_done_is_not_done_again(tmp_path):
    given(tmp_path)
    first = train()
    assert train(regression(stop_at=0)) == first


def test_without_a_directory_for_checkpoints_there_are_none(tmp_path):
    given(tmp_path)
    FLAGS.checkpoint_dir = None
    with pytest.raises(training.InterruptedRunError, match="nothing is kept without --checkpoint_dir"):
        train(regression(stop_at=2))
    assert train().train[0]["step"] == 2
    assert not (tmp_path / "checkpoints").exists()


def test_on_another_number_of_workers_it_goes_on_and_says_what_was_carried_over(tmp_path, monkeypatch):
    given(tmp_path, "--checkpoint_every=100", codec="qsgd")
    with pytest.raises(training.InterruptedRunError):
        train(regression(stop_at=5))
    resized = []

    def resize(*args):
        state = resize_workers(*args)
        resized.append(jax.device_get(state))  # the next step consumes it
        return state

    monkeypatch.setattr(training, "resize_workers", resize)
    FLAGS.workers = 2
    said = io.StringIO()
    task = regression()
    run = train(task, said)
    assert "The checkpoint is of 4 workers, now there are 2. Carried over as they were: parameters" in said.getvalue()
    assert "Of the residuals: their mean over the workers" in said.getvalue()
    _, saved = newest(only_run(tmp_path), 6)
    (state,) = resized
    assert state[0].residual.value
    for path, residual in state[0].residual.value.items():
        old = saved["opt_state"][0]["residual"]["value"][path]
        np.testing.assert_array_equal(residual, old.reshape(2, 2, *old.shape[1:]).mean(1))
    assert [(line["step"], line["workers"]) for line in run.resumed] == [(6, 2)]
    assert run.end["step"] == 12
    # What dense all-reduces would have sent: 2 x 3/4 of the parameters on four workers, 2 x 1/2 on two.
    dense = 4 * sum(x.size for x in jax.tree.leaves(task.params))
    assert run.end["dense_bytes"] == dense * (6 * 1.5 + 6 * 1.0)


def events(path):
    """Each has its length before it, in 8 bytes, and checksums of 4 bytes around it."""
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def scalars(folder):
    """What TensorBoard would show: (tag, step) -> value; a file that starts anew hides later steps of those before."""
    shown = {}
    for path in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        for event in events(path):
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = {(tag, step): value for (tag, step), value in shown.items() if step < event.step}
            shown |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return shown


def test_tensorboard_shows_the_records_of_a_run_that_was_stopped(tmp_path):
    given(tmp_path, f"--tensorboard_dir={tmp_path / 'board'}")
    with pytest.raises(training.InterruptedRunError):
        train(regression(stop_at=8))
    run = train()
    shown = scalars(tmp_path / "board")
    for line in (*run.train, *run.test, run.end):
        for key in line.keys() - {"kind", "step", "seconds"}:
            assert shown[f"{line['kind']}/{key}", line["step"]] == pytest.approx(line[key], rel=1e-6), (key, line)


# Checkpoints that cannot be used, or written


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
        files[-1].write_bytes(files[-1].read_bytes()[:-10])
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


# Killed


def command(folder):
    """44 steps on the digits; GradiVeQ compresses from step 17 to 31."""
    codec = ["--codec=gradiveq", "--gradiveq_error_feedback", "--gradiveq_k_max=64", "--gradiveq_warmup_steps=5"]
    phases = ["--gradiveq_train_steps=10", "--gradiveq_compress_steps=15"]
    every = ["--checkpoint_every=4", "--log_every=1", "--eval_every=44"]
    folders = [f"--out_dir={folder}/out", f"--checkpoint_dir={folder}/checkpoints"]
    training = ["--workers=2", "--batch_size=32", "--epochs=1", "--warmup_epochs=0", "--augment"]
    return [sys.executable, "-m", "experiments.cifar", *codec, *phases, *every, *folders, *training]


def start(folder):
    """The command in a process of its own; what was compiled before is not compiled again."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    log = open(folder.parent / "log", "a")  # noqa: SIM115
    return subprocess.Popen(command(folder), cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log)


def stop_when(folder, reached, number):
    """Starts the command, sends it a signal as soon as `reached(folder)`, and returns the newest checkpoint's step."""
    process = start(folder)
    while not reached(folder):
        assert process.poll() is None, (folder.parent / "log").read_text()
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait() == (130 if number == signal.SIGINT else -number)
    return max((int(path.name) for path in folder.glob("checkpoints/*/*") if path.name.isdigit()), default=0)


def has_recorded(step):
    return lambda folder: any(f'"train", "step": {step},' in path.read_text() for path in folder.glob("out/*.jsonl"))


def is_writing(step):
    return lambda folder: any(folder.glob(f"checkpoints/*/{step}.orbax-checkpoint-tmp*"))


def test_a_killed_training_ends_as_one_that_was_not(tmp_path):
    """Killed before there is a checkpoint, while one is written, and while GradiVeQ compresses; then interrupted."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    kept = [
        stop_when(killed, has_recorded(2), signal.SIGKILL),
        stop_when(killed, is_writing(12), signal.SIGKILL),
        stop_when(killed, has_recorded(23), signal.SIGKILL),
        stop_when(killed, has_recorded(37), signal.SIGINT),
    ]
    assert kept[0] == 0
    assert kept[1] in (8, 12)  # it may have been complete when the signal came
    assert 20 <= kept[2] < 32
    assert kept[3] >= 37
    assert start(killed).wait() == 0
    assert_same_end(killed, whole)
    (path,) = (killed / "out").glob("*.jsonl")
    assert [line["step"] for line in records.read(path).resumed] == kept[1:]
    assert f"was interrupted at step {kept[3]} of 44; the same command goes on from" in (tmp_path / "log").read_text()
