"""Where things lie: place, shard_batch, and meshes with explicit axes, whatever mesh the caller has set."""

import copy
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from tests import problem
from tests.table import EACH
from tests.test_refusals import refuses

N = problem.WORKERS


def explicit(workers=N):
    return jax.make_mesh((workers,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:workers])


def test_what_was_restored_to_one_device_takes_a_step():
    tx, mesh = problem.optimizer(gc.topk(0.1)), gc.make_mesh(N)
    on_one = jax.device_put(problem.params(), jax.devices()[1])
    state = jax.device_put(jax.device_get(gc.init(tx, problem.params(), N)), jax.devices()[0])
    (batch,) = problem.batches(1)
    step = gc.train_step(problem.loss_fn, tx, mesh)
    with refuses("committed to other devices", "place(opt_state, mesh)"):
        gc.train_step(problem.loss_fn, tx, mesh)(on_one, state, batch)
    params, state = gc.place((on_one, state), mesh)
    assert state[0].residual.value["layer1/kernel"].sharding.spec == P("data")
    for _ in range(2):
        params, state, _ = step(params, state, batch)
    assert step._cache_size() == 1


def test_new_parameters_compile_once():
    tx, mesh = problem.optimizer(gc.none()), gc.make_mesh(N)
    step = gc.train_step(lambda p, s, b: (problem.loss_fn(p, b), s), tx, mesh, has_state=True)
    params, state, stats = jax.device_get(problem.params()), gc.init(tx, problem.params(), mesh), {"n": 0.0}
    assert copy.copy(step).lower is not None
    for batch in problem.batches(2):
        params, state, stats, _ = step(params, state, stats, batch)
    assert step._cache_size() == 1


def test_place_leaves_alone_what_lies_there_and_what_is_no_array():
    mesh = gc.make_mesh(N)
    tree = gc.place({"params": problem.params(), "step": 3, "none": None}, mesh)
    again = gc.place(tree, mesh)
    assert again["step"] == 3
    old, new = (x["params"]["layer1"]["kernel"].addressable_data(2).unsafe_buffer_pointer() for x in (tree, again))
    assert old == new


def test_place_refuses_a_state_of_other_workers():
    tx = problem.optimizer(gc.topk(0.1))
    with refuses("opt_state is of [(2,)] workers along 'data'", "resize_workers"):
        gc.place(gc.init(tx, problem.params(), 2), gc.make_mesh(N))


def test_shard_batch():
    rows = {"x": np.arange(24.0).reshape(8, 3), "n": np.arange(8)}
    got = gc.shard_batch(rows, gc.make_mesh({"node": 2, "local": 2}))
    chex.assert_trees_all_equal(jax.device_get(got), jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), rows))
    assert got["x"].sharding.shard_shape(got["x"].shape) == (2, 3)
    keys = jax.random.split(jax.random.key(0), 8)
    sharded = gc.shard_batch({"keys": keys}, gc.make_mesh(N))["keys"]
    assert (jax.random.key_data(sharded) == jax.random.key_data(keys)).all()
    assert len(sharded.sharding.device_set) == N
    for f in (gc.shard_batch, gc.place):
        with refuses("mesh=4 must be a mesh"):
            f(rows, 4)
    with refuses("batch leaf \"['x']\" of shape (6, 3) does not divide among the 4 devices of this process"):
        gc.shard_batch({"x": np.ones((6, 3))}, gc.make_mesh(N))
    with refuses("batch leaf '' of shape ()"):
        gc.shard_batch(np.float32(1), gc.make_mesh(N))


@pytest.mark.parametrize("row", EACH, ids=lambda row: row.id)
def test_every_codec_under_a_mesh_with_explicit_axes(row):
    """Set by the caller, who gives arrays of that mesh and gets such."""
    tx, mesh = optax.chain(row.make(), optax.sgd(0.1, momentum=0.9)), explicit()
    (batch,) = problem.batches(1)
    plain = gc.make_mesh(N)
    expected = gc.train_step(problem.loss_fn, tx, plain)(
        gc.place(problem.params(), plain), gc.init(tx, problem.params(), plain), batch
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(problem.params(), NamedSharding(mesh, P()))
        state, batch = gc.init(tx, params, mesh), gc.shard_batch(jax.device_get(batch), mesh)
        got = gc.train_step(problem.loss_fn, tx, mesh)(params, state, batch)
        assert jnp.isfinite(got[2] + 1)  # the results are of the caller's types
    chex.assert_trees_all_equal(*jax.device_get((got, expected)))


def test_all_entries_under_a_mesh_with_explicit_axes():
    tx = optax.chain(gc.topk(0.1), optax.sgd(0.1))
    mesh = explicit()
    with jax.set_mesh(mesh):
        params, (batch,) = problem.params(), problem.batches(1)
        step = gc.train_step(problem.loss_fn, tx, mesh)
        shapes = jax.eval_shape(lambda p: gc.init(tx, p, mesh), params)
        step.lower(params, shapes, batch)
        params, state, _ = step(params, gc.init(tx, params, mesh), batch)
        params, state = gc.flush(tx, params, state, mesh)
        assert gc.wire_bits(state).total > 0
        assert gc.skipped(state) == 0
        state = gc.resize_workers(gc.resize_workers(state, 2), mesh)
        params, state = gc.place((params, state), mesh)
        params, state, _ = step(params, state, batch)
        simulated = gc.simulate(problem.loss_fn, tx, N)
        first = simulated(problem.params(), gc.init(tx, problem.params(), N), batch)
        gc.flush(tx, *first[:2], N)
        simulated(params, gc.resize_workers(state, N), batch)
    with jax.set_mesh(jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])):  # of other axes
        step(problem.params(), gc.init(tx, problem.params(), mesh), problem.batches(1).__next__())


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int


def test_slices_lie_one_after_another_in_a_mesh(monkeypatch):
    """jax.make_mesh refuses them, as it does GPU hosts, which have indices too."""
    chips = [Chip(id, slice_index=id % 2) for id in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(jax, "device_count", lambda: len(chips))
    assert [[chip.id for chip in row] for row in gc.make_mesh({"slice": 2, "chip": 2}).devices] == [[0, 2], [1, 3]]
    assert [chip.id for chip in gc.make_mesh().devices] == [0, 2, 1, 3]
