"""Checkpoints by Orbax: what is restored goes on to the same bits, and is readable without this library."""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from tests import problem
from tests.table import BY_ID, EACH

# Saved in the middle of GradiVeQ's training steps; the steps after that fit its bases and compress.
SAVED, STEPS = 3, 8
OPTIMIZERS = {"adam": lambda: optax.adam(0.01), "momentum": lambda: optax.sgd(0.05, momentum=0.9)}
# Every codec on four workers; and on other numbers of them one that sums and one that gathers, with residuals.
RUNS = [(row, 4, "adam") for row in EACH]
RUNS += [(BY_ID[id], workers, "momentum") for id, workers in (("powersgd-4", 8), ("qsgd-4-ef", 2), ("powersgd-4", 1))]


def chain(row, optimizer):
    return optax.chain(row.make(), OPTIMIZERS[optimizer]())


def beginning(tx, mesh, params):
    """The whole state of a training, as a new process makes it."""
    params = jax.device_put(params, NamedSharding(mesh, P()))
    return {"params": params, "opt_state": gc.init(tx, params, mesh), "step": 0}


def train(step, state, batches):
    params, opt_state, done = state["params"], state["opt_state"], state["step"]
    for batch in batches[done:]:
        params, opt_state, _ = step(params, opt_state, batch)
        done += 1
    return {"params": params, "opt_state": opt_state, "step": done}


def save_and_train_on(folder, step, state, batches):
    """The end of the training, which goes on while the state is written."""
    with ocp.CheckpointManager(folder) as manager:
        assert manager.save(state["step"], args=ocp.args.StandardSave(state))
        return train(step, state, batches)


def restore(folder, like):
    """The state as it was saved, with types, shapes and shardings like those of `like`."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target))


def assert_sharded_alike(got, expected):
    arrays = ([x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)] for tree in (got, expected))
    for a, b in zip(*arrays, strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


@pytest.mark.parametrize(("row", "workers", "optimizer"), RUNS, ids=lambda value: getattr(value, "id", None))
@jax.numpy_dtype_promotion("standard")  # which optax needs
def test_restored_training_goes_on_to_the_same_bits(row, workers, optimizer, tmp_path):
    """From a save that runs while the steps after it reuse the memory of what is saved."""
    tx, mesh = chain(row, optimizer), gc.make_mesh(workers)
    step = gc.train_step(problem.loss_fn, tx, mesh, donate=True)
    batches = list(problem.batches(STEPS))
    saved = train(step, beginning(tx, mesh, problem.params()), batches[:SAVED])
    end = save_and_train_on(tmp_path, step, saved, batches)

    restored = restore(tmp_path, beginning(tx, mesh, problem.params()))
    assert restored["step"] == saved["step"] == SAVED
    assert_sharded_alike(restored, saved)
    chex.assert_trees_all_equal(jax.device_get(train(step, restored, batches)), jax.device_get(end))


def test_large_state_is_saved_as_it_was_while_steps_reuse_its_memory(tmp_path):
    """Writing 24 MB takes longer than the steps."""
    mesh = gc.make_mesh(4)
    tx = chain(BY_ID["powersgd-4"], "momentum")
    rng = np.random.default_rng(0)
    batches = list(rng.standard_normal((6, 4, 2048, 512), np.float32))

    def loss_fn(params, batch):
        return jnp.mean((params["w"][None] - batch) ** 2)

    step = gc.train_step(loss_fn, tx, mesh, donate=True)
    first = train(step, beginning(tx, mesh, {"w": jnp.zeros((2048, 512))}), batches[:2])
    # On the host, and so that no reference is left which would keep the arrays from being donated.
    expected = jax.tree.map(np.array, jax.tree.map(jnp.copy, first))
    save_and_train_on(tmp_path, step, first, batches)
    restored = restore(tmp_path, beginning(tx, mesh, {"w": jnp.zeros((2048, 512))}))
    chex.assert_trees_all_equal(jax.device_get(restored), expected)
    assert first["params"]["w"].is_deleted()


def test_restored_on_another_number_of_workers(tmp_path):
    """Read to the host as the state of four workers, then resized: as if there had been no checkpoint between."""
    tx, mesh, params = chain(BY_ID["qsgd-4-ef"], "momentum"), gc.make_mesh(4), problem.params()
    step = gc.train_step(problem.loss_fn, tx, mesh)
    saved = train(step, beginning(tx, mesh, params), list(problem.batches(SAVED)))
    save_and_train_on(tmp_path, step, saved, [])
    restored = restore(tmp_path, jax.device_get({"params": params, "opt_state": gc.init(tx, params, 4), "step": 0}))
    for workers in (8, 2):
        mesh = gc.make_mesh(workers)
        resized, expected = (gc.resize_workers(state["opt_state"], mesh) for state in (restored, saved))
        chex.assert_trees_all_equal(jax.device_get((restored["params"], resized)), (saved["params"], expected))
        assert_sharded_alike(resized, gc.init(tx, params, mesh))


READER = """
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

folder, out = sys.argv[1:]
reader = ocp.PyTreeCheckpointer()
as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree)
checkpoint = reader.restore(folder, restore_args=as_numpy)
assert not [name for name in sys.modules if name.startswith("gradcomp_jax")]
leaves, _ = jax.tree_util.tree_flatten_with_path(checkpoint)
np.savez(out, **{jax.tree_util.keystr(path, simple=True, separator=" "): leaf for path, leaf in leaves})
"""


def read_without_the_library(folder, tmp_path):
    """The leaves by path, as a process with one device reads them, which has not imported this library."""
    out = tmp_path / "leaves.npz"
    command = [sys.executable, "-c", READER, str(folder), str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


def test_the_layout_is_readable_without_the_library(tmp_path):
    """By the paths, shapes and types that the README states."""
    mesh, tx = gc.make_mesh(4), chain(BY_ID["powersgd-4"], "momentum")
    step = gc.train_step(problem.loss_fn, tx, mesh)
    state = train(step, beginning(tx, mesh, problem.params()), list(problem.batches(SAVED)))
    save_and_train_on(tmp_path / "checkpoints", step, state, [])
    leaves = read_without_the_library(tmp_path / "checkpoints" / str(SAVED) / "default", tmp_path)

    codec = jax.device_get(state["opt_state"][0])
    expected = {"opt_state 0 codec step": codec.codec.step, "opt_state 0 skipped": codec.skipped, "step": SAVED}
    for layer in ("layer1", "layer2"):
        path = f"{layer}/kernel"
        expected[f"opt_state 0 residual value {path}"] = codec.residual.value[path]
        expected[f"opt_state 0 codec q {path}"] = codec.codec.q[path]
        for leaf in ("kernel", "bias"):
            expected[f"params {layer} {leaf}"] = state["params"][layer][leaf]
            expected[f"opt_state 1 0 trace {layer} {leaf}"] = state["opt_state"][1][0].trace[layer][leaf]
    counts = {name: leaves.pop(f"opt_state 0 wire {name}") for name in ("last", "total")}
    chex.assert_trees_all_equal(leaves, jax.device_get(expected))
    assert leaves["opt_state 0 residual value layer1/kernel"].shape == (4, 64, 64)
    assert leaves["opt_state 0 residual value layer1/kernel"].dtype == np.float32
    for name, (high, low) in counts.items():
        assert int(high) << 32 | int(low) == getattr(gc.wire_bits(state["opt_state"]), name) > 0
