"""One of the processes that `test_processes.py` starts: trains, counts what its sockets send, hands back both.

python -m tests.process_worker FILE RANK PROCESSES PORT
"""

import os
import pickle
import socket
import stat
import struct
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from tests import networks, problem
from tests.table import AMONG_PROCESSES

# What is summed in 16 bits, or is not on CPUs.
NARROW = {
    "none-f16": gc.none(dense_dtype="float16"),
    "none-bf16": gc.none(dense_dtype="bfloat16"),
    "cast-bf16": gc.cast("bfloat16"),
    "qsgd-f16": gc.qsgd(dense_dtype="float16"),
}

# Enough for a codec whose steps differ to go through all their kinds.
STEPS = 10
# Two megabytes, and a vector that travels dense.
TRAFFIC = {"kernel": (2**16, 8), "bias": (2**10,)}
# Of 2.9 million parameters, small leaves and all; and the local steps of a period.
TRANSFORMER, EVERY = networks.transformer(layers=4, width=208), 2
# Where Linux's struct tcp_info has the counts of bytes: given but not sent yet, sent, of that sent again.
NOT_SENT, SENT, SENT_AGAIN = 144, 200, 208


def kernels():
    """The regression's parameters that codecs compress; its biases, which travel dense, stay at zero."""
    return {layer: {"kernel": leaves["kernel"]} for layer, leaves in problem.params().items()}


def loss_fn(params, batch):
    biases = {layer: {"bias": jnp.zeros(leaves["kernel"].shape[1])} for layer, leaves in params.items()}
    return problem.loss_fn({layer: {**leaves, **biases[layer]} for layer, leaves in params.items()}, batch)


def train(tx, mesh, rank):
    """(parameters, state, loss), as this worker has them, after each step."""
    params = gc.place(kernels(), mesh)
    opt_state = gc.init(tx, params, mesh)
    step = gc.train_step(loss_fn, tx, mesh)
    history = []
    for batch in problem.batches(STEPS):
        rows = jax.tree.map(lambda x: np.split(np.asarray(x), mesh.size)[rank], batch)
        params, opt_state, loss = step(params, opt_state, gc.shard_batch(rows, mesh))
        history.append(jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), (params, opt_state, loss)))
    return history


def traffic(tx, mesh, rank, coordinator):
    """For each step of the transformation alone, the bits it declares and the bytes that this process sent."""
    params = {path: jnp.zeros(shape) for path, shape in TRAFFIC.items()}
    specs = gc.state_specs(tx, params)

    def worker(grads, state):
        updates, state = tx.update(jax.tree.map(lambda x: x[0], grads), gc.local_state(state))
        return updates, gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P(), specs)))
    rng = np.random.default_rng(rank)
    grads = {path: rng.standard_normal((1, *shape), np.float32) for path, shape in TRAFFIC.items()}
    grads = gc.shard_batch(grads, mesh)
    state = gc.init(tx, params, mesh)
    declared, sent = [], []
    for _ in range(STEPS):
        before = bytes_written(coordinator)
        _, state = jax.block_until_ready(step(grads, state))
        sent.append(bytes_written(coordinator) - before)
        declared.append(gc.wire_bits(state).last)
    return {"declared": declared, "total": gc.wire_bits(state).total, "sent": sent}


def periods(mesh, coordinator):
    """For each step of two periods of SparseLoCo, all bits declared so far and the bytes that this process sent."""
    tx = gc.sparseloco(optax.sgd(0.1), every=EVERY)

    def loss(params, rows):
        waves = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in jax.tree.leaves(params))
        return jnp.mean(rows) * sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(params), waves, strict=True))

    params = gc.place(trees.zeros(TRANSFORMER), mesh)
    step, state = gc.train_step(loss, tx, mesh), gc.init(tx, params, mesh)
    rows = gc.shard_batch(np.float32([1 + jax.process_index()]), mesh)
    declared, sent = [], []
    for _ in range(2 * EVERY):
        before = bytes_written(coordinator)
        params, state, _ = jax.block_until_ready(step(params, state, rows))
        sent.append(bytes_written(coordinator) - before)
        declared.append(gc.wire_bits(state).total)
    return {"declared": declared, "sent": sent}


def bytes_written(coordinator):
    """Bytes this process has written to its TCP connections, except those of the coordinator's port."""
    return sum(written(connection) for connection in connections() if coordinator not in ports(connection))


def connections():
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode):
                continue
            duplicate = socket.socket(fileno=os.dup(int(descriptor)))
        except OSError:  # closed meanwhile
            continue
        with duplicate:
            if duplicate.family in (socket.AF_INET, socket.AF_INET6) and ports(duplicate):
                yield duplicate


def ports(connection):
    """The two ports of a connection; none where it is not connected."""
    try:
        return connection.getsockname()[1], connection.getpeername()[1]
    except OSError:
        return ()


def written(connection):
    """Bytes written to a TCP connection, each once, as Linux counts them."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    sent, sent_again = (struct.unpack_from("Q", info, at)[0] for at in (SENT, SENT_AGAIN))
    return struct.unpack_from("I", info, NOT_SENT)[0] + sent - sent_again


def kernel_counts_bytes():
    """Whether `written` works here."""
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(bytes(1000))
        try:
            return written(client) == 1000 and os.path.isdir("/proc/self/fd")
        except (AttributeError, OSError, struct.error):
            return False


def main(file, rank, processes, port):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(rank), initialization_timeout=120)
    mesh = gc.make_mesh()
    assert mesh.size == int(processes)
    results = {}
    for row in AMONG_PROCESSES:
        results[row.id] = {"steps": train(problem.optimizer(row.make()), mesh, int(rank))}
        if mesh.size > 2 and kernel_counts_bytes():
            results[row.id].update(traffic(row.make(), mesh, int(rank), int(port)))
    if mesh.size > 2 and kernel_counts_bytes():
        results |= {id: traffic(tx, mesh, int(rank), int(port)) for id, tx in NARROW.items()}
        results["sparseloco"] = periods(mesh, int(port))
    with open(file, "wb") as out:
        pickle.dump(results, out)


def ended(run):
    """Runs it, and ends the process at once where that fails."""
    try:
        run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # jax would first wait for the other processes, and they for this one


if __name__ == "__main__":
    ended(lambda: main(*sys.argv[1:]))
