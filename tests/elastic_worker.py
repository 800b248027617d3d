"""One of the processes that `test_elastic.py` starts: trains, and keeps what it has when a worker is lost.

python -m tests.elastic_worker FILE RANK PROCESSES PORT FAULT DEVICES

The fault strikes at step DIES: "kill:K" kills process K before its step, "stop:K" stops it by SIGSTOP.
Times are in seconds since the fault; every step is written down in FILE.steps.
"""

import logging
import os
import pathlib
import pickle
import signal
import sys
import time

import jax
import numpy as np

import gradcomp_jax as gc
from tests import problem
from tests.process_worker import ended

STEPS, DIES, TIMEOUT = 8, 3, 11


def optimizer():
    return problem.optimizer(gc.topk(fraction=0.25, min_size=0))


def rows_of(step, share, devices):
    """A process's rows of the step's batch: the batch is the same whatever the number of workers, but for its end."""
    batch = list(problem.batches(STEPS, 64))[step]
    each = 8 * devices
    return jax.tree.map(lambda x: np.asarray(x)[share.part * each : (share.part + 1) * each], batch)


def own(x):
    """What this process has of an array, [devices, ...]."""
    return np.stack([shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.device.id)])


def make(mesh, devices, fault, rank, seen):
    step, share = gc.train_step(problem.loss_fn, optimizer(), mesh), gc.share_of(mesh)
    kind, who = fault.split(":")

    def run(state, number):
        if number == DIES and share.parts > 2 and rank == int(who):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        if share.parts == 2:
            seen.setdefault(number, jax.tree.map(own, state))
        params, opt_state, loss = step(*state, gc.shard_batch(rows_of(number, share, devices), mesh))
        return (params, opt_state), loss

    return run


def main(file, rank, processes, port, fault, devices):
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_num_cpu_devices", int(devices))
    rank, folder = int(rank), pathlib.Path(file).parent
    lifeline = gc.initialize_elastic(f"localhost:{port}", int(processes), rank, timeout=TIMEOUT)
    mesh = gc.make_mesh()
    params = gc.place(problem.params(), mesh)
    state, seen = (params, gc.init(optimizer(), params, mesh)), {}
    made = lambda mesh: make(mesh, int(devices), fault, rank, seen)  # noqa: E731
    history = []
    for number, now, _ in gc.elastic(lifeline, made, state, range(STEPS), mesh, checkpoint=folder / "parts"):
        history.append((number, time.monotonic(), jax.tree.map(own, now)))
    pathlib.Path(file).write_bytes(pickle.dumps({"history": history, "seen": seen, "members": lifeline.members}))


if __name__ == "__main__":
    ended(lambda: main(*sys.argv[1:]))
