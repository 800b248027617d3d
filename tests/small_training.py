"""A training of twelve steps by the loop of the experiments, and what it leaves behind."""

import os
import signal

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import display, loop, records, training
from tests import problem

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
    "onebit": ["--onebit_second_residual"],
    "signnorm": [],
    "topk": ["--topk_fraction=0.1"],
    "adaptive": ["--adaptive_proportion=8"],
    "randomk": ["--randomk_fraction=0.1"],
    "randomblock": ["--randomblock_fraction=0.1"],
    # Checks after steps 2, 4, ...: some fall between a checkpoint and the end.
    "accordion": ["--accordion_interval=0.5"],
}


@pytest.fixture(autouse=True)
def default_flags():
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    # A training that goes on compiles what the one before it did.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with flagsaver.flagsaver():
        yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


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
        loss = problem.loss_fn(with_kernel(params, (64, 64)), batch)
        return loss, ({name: seen + 1 for name, seen in state.items()}, loss)

    def batches(done):
        for number, batch in enumerate(problem.batches(100)):
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            if number >= done:
                yield batch

    def evaluate(params, state):
        return {"loss": float(sum(jnp.sum(x**2) for x in jax.tree.leaves(params))), "accuracy": 0.5}

    params, state = with_kernel(problem.params(), (2, 2, 16, 64)), {"seen": jnp.zeros((), jnp.int32)}
    state = state if FLAGS.every == ["1"] else {}  # outer steps have none
    return loop.Task("regression", {}, params, state, loss_fn, batches, 32 * STEPS_PER_EPOCH, evaluate)


def train(task=None, said=None):
    """Trains as the flags say."""
    (name,), (every,) = FLAGS.codec, map(int, FLAGS.every)
    screen = display.Console(file=said, width=1000) if said else display.console()
    mesh = training.worker_mesh(FLAGS.workers)
    task = task or regression()
    plan = training.plan(name, training.codec(name, task, every), task, mesh, every)
    return loop.train(plan, task, screen)


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
