"""One of the processes that `test_elastic.py` starts: trains, and suffers what befalls it.

python -m tests.elastic_worker FOLDER RANK PROCESSES PORT FAULTS DEVICES

FAULTS is a list such as slow:1@2,kill:3@4,stop:2@6: before step 2 process 1 sleeps longer than collectives wait, before
step 4 process 3 is killed, before step 6 process 2 is stopped. Each process writes what it had before and after each
try of a step to the file FOLDER/RANK.
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
from gradcomp_jax.lifeline import STALL
from tests import problem
from tests.process_worker import ended

STEPS, TIMEOUT, ROWS = 9, 20, 8


def optimizer():
    return problem.optimizer(gc.topk(fraction=0.25, min_size=0))


def rows_of(step, part, parts):
    """A process's rows of a step's batch; the first parts are the same for any number of processes."""
    batch = list(problem.batches(STEPS, 64))[step]
    return jax.tree.map(lambda x: np.asarray(x)[part * ROWS : (part + 1) * ROWS], batch)


def own(x):
    """What this process has of an array, [devices, ...]."""
    return np.stack([shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.device.id)])


def strike(kind):
    """Does to this process what a fault says."""
    if kind == "slow":
        time.sleep(STALL + 1)
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


def main(folder, rank, processes, port, faults, devices):
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_num_cpu_devices", int(devices))
    folder, rank = pathlib.Path(folder), int(rank)
    mine = {
        int(at): kind
        for kind, who, at in (x.replace("@", ":").split(":") for x in faults.split(","))
        if who == str(rank)
    }
    lifeline = gc.initialize_elastic(f"localhost:{port}", int(processes), rank, timeout=TIMEOUT)
    mesh = gc.make_mesh()
    params = gc.place(problem.params(), mesh)
    state = {"params": params, "opt_state": gc.init(optimizer(), params, mesh), "step": 0}
    out = (folder / str(rank)).open("wb", buffering=0)

    def make(mesh):
        train = gc.train_step(problem.loss_fn, optimizer(), mesh)
        order = [device.process_index for device in mesh.devices.flat]

        def run(state, step):
            pickle.dump({"before": step, "order": order, "state": on_host(state)}, out)
            if kind := mine.pop(step, None):
                strike(kind)
            batch = gc.shard_batch(rows_of(step, *gc.share_of(mesh)), mesh)
            params, opt_state, loss = train(state["params"], state["opt_state"], batch)
            return {"params": params, "opt_state": opt_state, "step": step + 1}, loss

        return run

    for step, now, _ in gc.elastic(lifeline, make, state, range(STEPS), checkpoint=folder / "parts"):
        pickle.dump({"after": step, "members": lifeline.members, "state": on_host(now)}, out)


def on_host(state):
    return jax.tree.map(lambda x: own(x) if isinstance(x, jax.Array) else x, state)


if __name__ == "__main__":
    ended(lambda: main(*sys.argv[1:]))
