"""One of two processes that `test_process_faults.py` starts: what goes wrong between processes, and what it says.

python -m tests.process_faults FILE RANK PROCESSES PORT
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradcomp_jax as gc
from tests import problem
from tests.process_worker import bytes_written, ended, kernel_counts_bytes

ROWS = {0: [1, 2, 4, 8], 1: [16, 32, 64, 128]}


def said(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def linear(params, batch):
    return jnp.mean(params["w"] * batch["x"])


def batches(mesh, rank):
    """What becomes of each process's own rows: as numpy's, and as a batch over the mesh."""
    tx, params = optax.chain(gc.none(), optax.sgd(1.0)), {"w": jnp.float32(0)}
    rows = {"x": np.array(ROWS[rank], np.float32)}
    step, state = gc.train_step(linear, tx, mesh), gc.init(tx, params, mesh)
    refused = said(lambda: step(params, state, rows))
    moved, *_ = step(params, state, gc.shard_batch(rows, mesh))
    return {"refused": refused, "gradient": -float(moved["w"])}


def read_outs(mesh):
    tx = problem.optimizer(gc.adaptive(allow_dense=True))
    params, state = gc.place(problem.params(), mesh), gc.init(tx, problem.params(), mesh)
    step = gc.train_step(problem.loss_fn, tx, mesh)
    mine = slice(16 * jax.process_index(), 16 * (jax.process_index() + 1))
    for batch in problem.batches(2):
        rows = jax.tree.map(lambda x: np.asarray(x)[mine], batch)
        params, state, _ = step(params, state, gc.shard_batch(rows, mesh))
    before = gc.code_bits(state), gc.wire_bits(state), gc.skipped(state)
    flushed, after = gc.flush(tx, params, state, mesh, learning_rate=0.05)
    same = gc.resize_workers(state, mesh)
    change = jax.tree.map(lambda a, b: float(jnp.sum(jnp.abs(a - b))), params, flushed)
    return {"read": before, "moved": change, "left": gc.wire_bits(after).last, "bits": gc.wire_bits(same).total}


def placed(mesh, coordinator):
    """The bytes that this process sends to place a tree of numpy's, and to make a state from it."""
    tree = {"kernel": np.ones((512, 512), np.float32), "bias": np.ones(512, np.float32)}
    gc.init(gc.topk(0.1), gc.place(tree, mesh), mesh)  # compiles, and makes the connections
    before = bytes_written(coordinator)
    gc.init(gc.topk(0.1), gc.place(tree, mesh), mesh)
    gc.init(gc.topk(0.1), tree, mesh)
    return bytes_written(coordinator) - before


def parted(mesh, rank):
    """What is said of parameters whose copies differ, and the copy after their repair."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    own = jax.device_put(np.float32([rank, 1]), mesh.local_devices[0])
    params = {"w": jax.make_array_from_single_device_arrays((2,), sharding, [own])}
    repaired = gc.check_replicas(params, mesh, repair=True)["w"]
    return {"said": said(lambda: gc.check_replicas(params, mesh)), "repaired": repaired.addressable_data(0).tolist()}


def main(file, rank, processes, port):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(rank), initialization_timeout=120)
    mesh, rank = gc.make_mesh(), int(rank)
    different = {"w": jnp.full((8, 8), float(rank))}
    results = {
        "batches": batches(mesh, rank),
        "different": said(lambda: gc.init(gc.none(), different, mesh)),
        "read_outs": read_outs(mesh),
        "parted": parted(mesh, rank),
        "placed": placed(mesh, int(port)) if kernel_counts_bytes() else None,
    }
    with open(file, "w") as out:
        json.dump(results, out)


if __name__ == "__main__":
    ended(lambda: main(*sys.argv[1:]))
