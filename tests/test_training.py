"""The training loop: one that is stopped or killed ends as one that was not, records and all."""

import io
import itertools
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import loop, records
from gradcomp_jax import resize_workers
from tests.small_training import (  # noqa: F401, used by every test here
    FLAGS,
    assert_same_end,
    default_flags,
    given,
    newest,
    only_run,
    regression,
    standard_promotion,
    train,
)

ROOT = pathlib.Path(__file__).parent.parent

# Stopped and resumed


@pytest.mark.parametrize(
    ("codec", "args"),
    [
        ("none", ["--optimizer=adam"]),
        ("gradiveq", []),
        ("powersgd", ["--optimizer=ef_momentum", "--schedule=step", "--lr_scale=4", "--decay_epochs=2"]),
        ("qsgd", ["--qsgd_norm=l2", "--qsgd_code=elias", "--qsgd_bucket_size=64"]),
        ("onebit", ["--optimizer=adagrad"]),
        ("adaptive", ["--delayed"]),
        ("accordion", ["--ef21"]),
        ("topk", ["--every=5", "--optimizer=adam"]),
    ],
)
def test_an_interrupted_training_ends_as_one_that_was_not(codec, args, tmp_path):
    """Stopped between two lines of the records and two checkpoints, and while GradiVeQ compresses."""
    given(tmp_path / "whole", *args, codec=codec)
    train()
    given(tmp_path / "stopped", *args, codec=codec)
    with pytest.raises(loop.InterruptedRunError, match=r"at step 9 of 12; the same command goes on from .*checkpoints"):
        train(regression(stop_at=8))
    assert [line["step"] for line in train().resumed] == [9]
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("codec", ["signnorm", "topk", "randomk", "randomblock"])
def test_the_other_codecs_train_too(codec, tmp_path):
    given(tmp_path, "--epochs=1", "--warmup_epochs=0", "--checkpoint_every=100", codec=codec)
    run = train()
    assert run.end["compressed_steps"] == 4
    assert run.train[-1]["loss"] < run.train[0]["loss"]


def test_records_tell_true_code_lengths_and_what_accordion_decided(tmp_path):
    given(tmp_path / "adaptive", codec="adaptive")
    run = train()
    assert all(line["code_bits"] > 0 for line in run.train)
    assert not run.levels
    given(tmp_path / "accordion", "--ef21", codec="accordion")
    said = io.StringIO()
    run = train(said=said)
    assert "code_bits" not in run.train[0]
    decisions = [line["decisions"] for line in run.levels]
    assert all(before != after for before, after in itertools.pairwise(decisions))
    assert re.fullmatch(r"layer1/kernel: (low|high) from step 12 on, as the norm changed .*", decisions[-1][0])
    low = sum(": low" in decision for decision in decisions[-1])
    assert f"step 12, {low} of {len(decisions[-1])} leaves at low compression" in said.getvalue()


def test_records_tell_what_codecs_lose(tmp_path):
    given(tmp_path / "topk", f"--tensorboard_dir={tmp_path / 'board'}", codec="topk")
    run, shown = train(), scalars(tmp_path / "board")
    assert all(0 < line["error"] < 1 and line["residual"] > 0 for line in run.train)
    assert [line["step"] for line in run.leaves] == [line["step"] for line in run.test]
    for line in run.leaves:
        assert (
            {*line["error"]}
            == {*line["residual"]}
            == {f"layer{n}/{name}" for n in (1, 2) for name in ("bias", "kernel")}
        )
        assert shown["leaves/error/layer1/kernel", line["step"]] == pytest.approx(line["error"]["layer1/kernel"])
    given(tmp_path / "plain", "--nomeasured", codec="topk")
    plain = train()
    assert "error" not in plain.train[0]
    assert not plain.leaves
    assert [line["loss"] for line in plain.train] == [line["loss"] for line in run.train]
    assert plain.end["bytes"] == run.end["bytes"]


def test_a_training_that_is_done_is_not_done_again(tmp_path):
    given(tmp_path)
    first = train()
    assert train(regression(stop_at=0)) == first


def test_without_a_directory_for_checkpoints_there_are_none(tmp_path):
    given(tmp_path)
    FLAGS.checkpoint_dir = None
    with pytest.raises(loop.InterruptedRunError, match="nothing is kept without --checkpoint_dir"):
        train(regression(stop_at=2))
    assert train().train[0]["step"] == 2
    assert not (tmp_path / "checkpoints").exists()


def test_on_another_number_of_workers_it_goes_on_and_says_what_was_carried_over(tmp_path, monkeypatch):
    given(tmp_path, "--checkpoint_every=100", codec="qsgd")
    with pytest.raises(loop.InterruptedRunError):
        train(regression(stop_at=5))
    resized = []

    def resize(*args):
        state = resize_workers(*args)
        resized.append(jax.device_get(state))  # the next step consumes it
        return state

    monkeypatch.setattr(loop, "resize_workers", resize)
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
    # What dense all-reduces would have sent: 2 x 3/4 of the parameters on four workers, 2 x 1/2 on two; and of the loss
    # and the accuracy.
    dense = 4 * (sum(x.size for x in jax.tree.leaves(task.params)) + 2)
    assert run.end["dense_bytes"] == dense * (6 * 1.5 + 6 * 1.0)


def test_what_dense_would_send_is_in_the_gradients_own_type():
    task = regression()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), task.params)
    size = sum(x.size for x in jax.tree.leaves(params))
    assert loop.bits_of_pmean(task._replace(params=params), 4) == 8 * 1.5 * (2 * size + 4 * 2)


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
    with pytest.raises(loop.InterruptedRunError):
        train(regression(stop_at=8))
    run = train()
    # By the second alone, the names of the two could be one.
    assert sorted(path.suffix for path in (tmp_path / "board").rglob("events.out.tfevents.*")) == [".1", ".10"]
    shown = scalars(tmp_path / "board")
    for line in (*run.train, *run.test, run.end):
        for key in line.keys() - {"kind", "step", "seconds"}:
            assert shown[f"{line['kind']}/{key}", line["step"]] == pytest.approx(line[key], rel=1e-6), (key, line)


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
