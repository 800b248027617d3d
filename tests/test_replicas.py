"""check_replicas: copies that differ are found in one bit, named, and repaired to the first worker's bits."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from tests import problem
from tests.test_refusals import refuses

N, EVERYWHERE = problem.WORKERS, P()
FIRST = {
    "float32": np.float32([[0.0, 1.5], [-2.0, np.nan]]),
    "bfloat16": np.array([0.0, 3.0, 7.0], jnp.bfloat16),
    "float16": np.float16([1.0]),
    "float8_e4m3fn": np.array([1.0, 2.0], jnp.float8_e4m3fn),
    "int32": np.int32(5),
    "int8": np.int8([-1, 2]),
    "int4": np.array([-3, 2], jnp.int4),
    "bool": np.array([True, False]),
    "complex64": np.complex64([1 + 2j]),
    "key": jax.random.key_data(jax.random.key(3)),
}


def copies(mesh, values, spec=EVERYWHERE):
    """An array whose copy on each device is a value of its own."""
    sharding = NamedSharding(mesh, spec)
    parts = [jax.device_put(x, device) for x, device in zip(values, mesh.devices.flat, strict=True)]
    counts = [1 if entry is None else mesh.shape[entry] for entry in (*spec, *[None] * parts[0].ndim)]
    shape = tuple(size * count for size, count in zip(parts[0].shape, counts, strict=False))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def with_last_bit_changed(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def on_worker(x, worker):
    return np.asarray(x.addressable_data(worker))


@pytest.mark.parametrize("name", FIRST)
def test_one_bit_of_one_copy_is_found_and_repaired(name, caplog):
    mesh, first = gc.make_mesh(N), FIRST[name]
    other = np.frombuffer(with_last_bit_changed(first.tobytes()), first.dtype).reshape(first.shape)
    same = copies(mesh, [first] * N)
    bad = copies(mesh, [first, first, other, first])
    if name == "key":
        same, bad = jax.random.wrap_key_data(same), jax.random.wrap_key_data(bad)
    tree = {"a": gc.place(jnp.ones(3), mesh), "b": same, "step": 3}
    checked = gc.check_replicas(tree, mesh)
    assert checked["b"] is same
    with refuses("the copies of leaf \"['b']\" differ: worker 2 has not what the first worker has", "repair=True"):
        gc.check_replicas(tree | {"b": bad}, mesh)
    with caplog.at_level(logging.WARNING, "gradcomp_jax"):
        repaired = gc.check_replicas(tree | {"b": bad}, mesh, repair=True)
    assert "the copies of leaf \"['b']\" differ" in caplog.text
    assert repaired["a"] is tree["a"]
    got = jax.random.key_data(repaired["b"]) if name == "key" else repaired["b"]
    assert got.dtype == first.dtype
    for worker in range(N):
        assert on_worker(got, worker).tobytes() == first.tobytes()


@pytest.mark.parametrize("other", [[2.0, 1.0, 3.0], [-0.0, 2.0, 3.0], [1.0, 2.0, np.nan]], ids=["order", "sign", "nan"])
def test_values_that_sum_or_compare_alike_are_told_apart(other):
    mesh = gc.make_mesh(2)
    first = [0.0 if np.signbit(other[0]) else 1.0, 2.0, 3.0]
    with refuses("worker 1 has not"):
        gc.check_replicas(copies(mesh, [np.float32(first), np.float32(other)]), mesh)


def test_the_first_of_several_leaves_and_all_workers_are_named():
    mesh = gc.make_mesh(N)
    bad = copies(mesh, [np.float32([x]) for x in (1, 2, 1, 3)])
    with refuses("leaf \"['b']\" differ, and so do 1 more leaves: workers 1, 3 have not what"):
        gc.check_replicas({"a": gc.place(jnp.ones(3), mesh), "b": bad, "c": bad}, mesh)


def test_shards_are_compared_with_their_own_copies():
    mesh = gc.make_mesh({"node": 2, "local": 2})
    rows = [np.float32([x]) for x in (1, 2, 1, 2)]
    good = copies(mesh, rows, P("local"))
    gc.check_replicas(good, mesh)
    bad = copies(mesh, [*rows[:3], np.float32([7])], P("local"))
    with refuses("worker 3 has not what"):
        gc.check_replicas(bad, mesh)
    chex.assert_trees_all_equal(np.asarray(gc.check_replicas(bad, mesh, repair=True)), np.float32([1, 2]))
    assert on_worker(gc.check_replicas(bad, mesh, repair=True), 3) == 2


def test_the_state_of_training_passes_and_what_workers_owe_has_no_copy():
    tx, mesh = problem.optimizer(gc.powersgd(rank=2)), gc.make_mesh(N)
    params, state = gc.place(problem.params(), mesh), gc.init(tx, problem.params(), mesh)
    step = gc.train_step(problem.loss_fn, tx, mesh)
    for batch in problem.batches(2):
        params, state, _ = step(params, state, batch)
    owed = np.asarray(jax.tree.leaves(state[0].residual)[0])
    assert (owed[0] != owed[1]).any()
    checked = gc.check_replicas((params, state), mesh)
    chex.assert_trees_all_equal(checked, (params, state))


def test_what_does_not_lie_on_the_mesh_is_refused():
    with refuses("leaf \"['w']\" does not lie on the mesh", "place(tree, mesh)"):
        gc.check_replicas({"w": np.ones(3)}, gc.make_mesh(N))
