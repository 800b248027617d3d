"""Trains without reading a result, on many emulated devices: a loop that starts steps as fast as Python can.

    python -m experiments.unread
    python -m experiments.unread --steps=200 --codecs=gradiveq,accordion-powersgd

Each codec in turn trains a small regression on a CPU that emulates `--devices` devices. The loop reads no step's result
before the last. In such a loop programs pile up on devices that share few cores. `train_step` orders collectives, and
waits for the step before; without that the loop aborts, hangs, or goes on with wrong numbers. A codec that hangs is
ended after `--timeout` seconds. The exit status is the number of codecs that failed.

GradiVeQ's cycle is short here, so that all its phases come up. Accordion checks every tenth step.
"""

import concurrent.futures
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from absl import flags
from rich.table import Table

from experiments import command, display
from gradcomp_jax import (
    Compressor,
    accordion,
    adaptive,
    gradiveq,
    init,
    make_mesh,
    none,
    onebit,
    place,
    powersgd,
    qsgd,
    randomblock,
    randomk,
    shard_batch,
    signnorm,
    topk,
    train_step,
)

FLAGS = flags.FLAGS

WIDTH = 64
CODECS: dict[str, Callable[[], Compressor]] = {
    "none": none,
    "powersgd": lambda: powersgd(rank=2),
    "gradiveq": lambda: gradiveq(
        k=64, ratio=4, train_steps=20, compress_steps=30, warmup_steps=3, compress=lambda path, leaf: leaf.ndim == 2
    ),
    "qsgd": lambda: qsgd(bits=4, min_size=0),
    "qsgd-ring": lambda: qsgd(bits=4, min_size=0, aggregate="ring"),
    "qsgd-elias": lambda: qsgd(bits=4, min_size=0, norm="l2", code="elias"),
    "signnorm": signnorm,
    "onebit": onebit,
    "randomk": randomk,
    "randomblock": randomblock,
    "topk": topk,
    "adaptive": adaptive,
    "accordion-powersgd": lambda: accordion(powersgd(rank=4), powersgd(rank=1), interval=10),
    "accordion-topk": lambda: accordion(topk(fraction=0.1), topk(fraction=0.01), interval=10),
}


def train(name: str, steps: int, devices: int) -> tuple[float, float]:
    """The seconds of the steps after the first, and the last loss; call it in a process of its own."""
    # The flags of the caller's process are not needed here.
    os.environ.pop("XLA_FLAGS", None)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    mesh, tx = make_mesh(), optax.chain(CODECS[name](), optax.sgd(0.05, momentum=0.9))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (WIDTH, WIDTH)) * 0.1, "bias": jnp.zeros(WIDTH)}
    batch = jax.random.normal(keys[1], (4 * devices, WIDTH)), jax.random.normal(keys[2], (4 * devices, WIDTH))

    def loss_fn(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean((jnp.tanh(batch[0] @ params["kernel"] + params["bias"]) - batch[1]) ** 2)

    params, batch = place(params, mesh), shard_batch(batch, mesh)
    state, step = init(tx, params, mesh), train_step(loss_fn, tx, mesh)
    params, state, loss = jax.block_until_ready(step(params, state, batch))
    began = time.perf_counter()
    for _ in range(steps - 1):
        params, state, loss = step(params, state, batch)
    last = float(loss)
    return time.perf_counter() - began, last


def outcome(name: str, steps: int, devices: int, timeout: float) -> tuple[bool, str]:
    """Whether a codec's training came to its end, and a sentence about it."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = pool.submit(train, name, steps, devices)
        try:
            seconds, loss = running.result(timeout)
        except concurrent.futures.TimeoutError:
            for process in multiprocessing.active_children():
                process.kill()
            return False, f"no end after {timeout:.0f} s"
        except concurrent.futures.BrokenExecutor:
            return False, "aborted"
    return math.isfinite(loss), f"{1e3 * seconds / max(1, steps - 1):.2f} ms a step, last loss {loss:.4f}"


def main() -> None:
    """Trains with each codec, and shows the outcomes."""
    screen, failed = display.console(), 0
    table = Table("codec", "", "outcome")
    table.title = f"{FLAGS.steps} steps on {FLAGS.devices} devices of {os.cpu_count()} cores, none of them read"
    with display.progress(screen) as progress:
        bar = progress.add_task("unread", total=len(FLAGS.codecs), status="")
        for name in FLAGS.codecs:
            progress.update(bar, status=name)
            well, words = outcome(name, FLAGS.steps, FLAGS.devices, FLAGS.timeout)
            failed += not well
            table.add_row(name, "ok" if well else "FAILED", words)
            progress.advance(bar)
    screen.print(table)
    sys.exit(failed)


def define_flags() -> None:
    """Defines the flags of the command."""
    known = ", ".join(CODECS)
    flags.DEFINE_list("codecs", [*CODECS], f"Codecs to train with, of: {known}.")
    flags.register_validator("codecs", lambda got: got and set(got) <= CODECS.keys(), f"must be of {known}")
    flags.DEFINE_integer("steps", 2000, "Steps of each codec.", lower_bound=1)
    flags.DEFINE_integer("devices", 8, "CPU devices to emulate.", lower_bound=2)
    flags.DEFINE_float("timeout", 600, "Seconds after which a codec is taken to hang.", lower_bound=1)


if __name__ == "__main__":
    # Not at import: a test of another experiment may define flags with these names.
    define_flags()
    command.run(main)
