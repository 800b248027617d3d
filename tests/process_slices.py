"""One of two processes, each a slice of four chips, that `test_process_slices.py` starts.

python -m tests.process_slices FILE RANK PROCESSES PORT

It trains with each codec, and keeps checkpoints. The first time the second process is killed amid the last codec's
training; started again, both go on from there.
"""

import os
import pathlib
import pickle
import signal
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

import gradcomp_jax as gc
from tests import problem, slices
from tests.process_worker import ended

CODECS = {"qsgd": gc.qsgd(4, min_size=0, error_feedback=True), "powersgd": gc.powersgd(2)}
STEPS, DIES_AT = 4, 2


def optimizer(id):
    """The optimiser of a training."""
    return problem.optimizer(gc.across(CODECS[id]))


def train(id, folder, rank):
    """(parameters, state, loss) after each step, as this process has them."""
    tx, mesh = optimizer(id), slices.mesh_of()
    params, step = gc.place(problem.params(), mesh), gc.train_step(problem.loss_fn, tx, mesh)
    state, history = gc.init(tx, params, mesh), []
    with ocp.CheckpointManager(folder / id) as manager:
        done = manager.latest_step()
        if done is not None:
            read = gc.restore(folder / id, {"params": params, "state": state}, mesh)
            params, state = read["params"], read["state"]
        for now, batch in enumerate(problem.batches(STEPS)):
            if done is not None and now < done:
                continue
            rows = jax.tree.map(lambda x: np.split(np.asarray(x), 2)[rank], batch)
            params, state, loss = step(params, state, gc.shard_batch(rows, mesh))
            history.append(jax.tree.map(own, (params, state, loss)))
            if done is None and id == "powersgd" and now == DIES_AT and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            manager.save(now + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
            manager.wait_until_finished()
    return history


def own(x):
    """What this process has of an array, [devices, ...]."""
    return np.stack([shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.device.id)])


def main(file, rank, processes, port):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(rank), initialization_timeout=120)
    folder = pathlib.Path(file).parent
    for id in CODECS:
        done = folder / f"{id}-{rank}"
        if not done.exists():
            history = train(id, folder, int(rank))
            done.write_bytes(pickle.dumps(history))
    pathlib.Path(file).write_bytes(b"")


if __name__ == "__main__":
    ended(lambda: main(*sys.argv[1:]))
