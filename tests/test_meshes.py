"""Meshes of more than one axis: nodes of several workers, and parameters sharded over a model axis."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.testing.contexts import map_state
from tests import problem
from tests.table import BY_ID, EACH
from tests.test_refusals import refuses

# Enough for each phase of each codec of the table.
STEPS = 8
# What a gradient below 1 that rounds to the neighbour, as another last bit may, changes at the learning rate.
STEP_OF_FLOAT16 = problem.LEARNING_RATE * 2**-11
# As Megatron has it: the first layer's outputs are split over the model axis, and the second's inputs.
SPLIT = {"layer1": {"kernel": P(None, "model"), "bias": P("model")}, "layer2": {"kernel": P("model"), "bias": P()}}


def is_spec(x):
    return isinstance(x, P)


def keeps_residuals(row):
    return bool(row.make().init(problem.params()).residual.value)


def shardings(specs, mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


@functools.cache
def simulated(id, workers):
    """(parameters, state) of the codec of that row, without a mesh, by a step that sends gradients alone."""
    tx, params = problem.optimizer(BY_ID[id].make()), problem.params()
    state = gc.init(tx, params, workers)
    axes = map_state(lambda _: 0, lambda _: None, state)

    def worker(params, state, batch):
        updates, state = tx.update(jax.grad(problem.loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    workers_step = jax.vmap(worker, in_axes=(None, axes, 0), out_axes=(None, axes), axis_name="data")

    def step(params, state, batch):
        return workers_step(params, state, jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), batch))

    return problem.history(jax.jit(step), params, state, STEPS)


def assert_same(id, workers, step, lies, codec=lambda state: state[0]):
    """Each step as that of `simulated` from the same parameters and state, which `lies` lays on the mesh.

    In parameters, residuals and bits; `codec` finds the codec's part of a state.
    """
    for (params, state), (expected, other) in problem.again(step, simulated(id, workers), lies):
        chex.assert_trees_all_close(params, expected, atol=STEP_OF_FLOAT16 if id == "cast-f16" else 1e-6, rtol=0)
        mine = codec(state)
        chex.assert_trees_all_close(mine.residual.value, other[0].residual.value, atol=1e-5, rtol=0)
        assert gc.wire_bits(mine) == gc.wire_bits(other)
    (first, _), (last, _) = simulated(id, workers)[0], simulated(id, workers)[-1]
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True))


@pytest.mark.parametrize("row", [*EACH, BY_ID["randomblock"]], ids=lambda row: row.id)
def test_nodes_of_workers_are_as_one_worker_each(row):
    """Exact inside a node, compressed between nodes."""
    mesh = gc.make_mesh({"node": 2, "local": 4})
    tx = optax.chain(gc.average("local"), problem.optimizer(row.make(axis_name="node")))
    params = jax.device_put(problem.params(), NamedSharding(mesh, P()))
    step = gc.train_step(problem.loss_fn, tx, mesh)
    assert_same(row.id, 2, step, (params, gc.init(tx, params, mesh)), lambda state: state[1][0])


def start(tx, mesh):
    """Parameters that are split over the model axis, and the first state as `init` makes it."""
    params = jax.device_put(problem.params(), shardings(SPLIT, mesh))
    return params, gc.init(tx, params, mesh)


def gathered(grads):
    """Whole gradients on all devices of the model axis, as codecs that cut them into buckets or slices like them."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), grads)


def by_shard_map(tx, mesh, start, check_vma=True, prepare=lambda grads: grads):
    """A step of one's own, of which shard_map leaves the model axis to the compiler."""
    workers = tuple(name for name in mesh.axis_names if name != "model")
    specs = gc.state_specs(tx, start[0])

    def worker(params, state, batch):
        grads = jax.grad(problem.loss_fn)(gc.vary(params, workers), batch)
        updates, state = tx.update(prepare(grads), gc.local_state(state), params)
        return optax.apply_updates(params, updates), gc.global_state(state)

    step = jax.shard_map(
        worker,
        mesh=mesh,
        in_specs=(P(), specs, P(workers)),
        out_specs=(P(), specs),
        axis_names=set(workers),
        check_vma=check_vma,
    )
    # What comes out lies as what went in, or the second step compiles anew.
    return jax.jit(step, out_shardings=jax.tree.map(lambda x: x.sharding, start))


# With residuals split as the parameters are: below.
@pytest.mark.parametrize(
    "row", [row for row in EACH if not keeps_residuals(row) or row.id == "powersgd-4"], ids=lambda row: row.id
)
def test_parameters_split_over_a_model_axis_are_as_whole_ones(row):
    tx, mesh = problem.optimizer(row.make()), gc.make_mesh({"data": 4, "model": 2})
    lies = start(tx, mesh)
    assert_same(row.id, 4, by_shard_map(tx, mesh, lies), lies)


@pytest.mark.parametrize("id", ["qsgd-4", "gradiveq"])
def test_gradients_may_be_gathered_over_the_model_axis_first(id):
    tx, mesh = problem.optimizer(BY_ID[id].make()), gc.make_mesh({"data": 4, "model": 2})
    lies = start(tx, mesh)
    assert_same(id, 4, by_shard_map(tx, mesh, lies, prepare=gathered), lies)


@pytest.mark.parametrize(
    ("row", "check_vma"),
    [
        *((row, True) for row in (*EACH, BY_ID["onebit-shuffle"]) if keeps_residuals(row)),
        (BY_ID["powersgd-4"], False),
    ],
    ids=lambda x: getattr(x, "id", "checked" if x else "unchecked"),
)
def test_residuals_may_be_split_as_the_parameters_are(row, check_vma):
    tx, mesh = problem.optimizer(row.make()), gc.make_mesh({"data": 4, "model": 2})
    params, (codec, momentum) = start(tx, mesh)
    whole = codec.residual.value
    split = {path: P("data", *SPLIT[path.split("/")[0]][path.split("/")[1]]) for path in whole}
    residual = codec.residual._replace(value=jax.device_put(whole, shardings(split, mesh)))
    lies = params, (codec._replace(residual=residual), momentum)
    step = by_shard_map(tx, mesh, lies, check_vma)
    assert_same(row.id, 4, step, lies)
    (batch,) = problem.batches(1)
    _, (codec, _) = step(*lies, batch)
    for path, x in codec.residual.value.items():
        assert x.sharding.shard_shape(x.shape) == NamedSharding(mesh, split[path]).shard_shape(x.shape), path


@pytest.mark.parametrize(("tx", "most"), [(gc.none(), 0), (gc.powersgd(4), 24 * 1024)], ids=["none", "powersgd"])
def test_what_moves_over_the_model_axis(tx, most):
    """Nothing for a mean; of PowerSGD a sum or half a factor for each of two factors a leaf; beside them some flags
    and factors' largest magnitudes."""
    mesh = gc.make_mesh({"data": 4, "model": 2})
    split = {"wq": P(None, "model"), "wo": P("model"), "w1": P(None, "model"), "w2": P("model")}
    params = jax.device_put(dict.fromkeys(split, jnp.zeros((256, 256))), shardings(split, mesh))
    state = gc.init(tx, params, mesh)
    per_worker = shardings({path: P("data", *spec) for path, spec in split.items()}, mesh)
    residual = jax.device_put(state.residual.value, {path: per_worker[path] for path in state.residual.value})
    state = state._replace(residual=state.residual._replace(value=residual))
    specs = gc.state_specs(tx, params)

    def worker(grads, state):
        updates, state = tx.update(jax.tree.map(lambda x: x[0], grads), gc.local_state(state))
        return updates, gc.global_state(state)

    step = jax.shard_map(worker, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P(), specs), axis_names={"data"})
    step = jax.jit(step, out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)))
    like = {path: jax.ShapeDtypeStruct((4, 256, 256), jnp.float32, sharding=per_worker[path]) for path in split}
    moved = [c for c in gc.collective_bytes(step.lower(like, state).compile()) if c.workers != 4]
    assert all(c.workers == 2 for c in moved)
    flags = [c for c in moved if c.operand_bytes <= 32]
    assert sum(c.ring_bytes for c in flags) <= 64
    assert sum(c.ring_bytes for c in moved if c not in flags) <= most


def test_nodes_and_a_model_axis():
    mesh = gc.make_mesh({"node": 2, "local": 2, "model": 2})
    row = next(row for row in EACH if row.id.startswith("powersgd"))
    tx = optax.chain(gc.average("local"), problem.optimizer(row.make(axis_name="node")))
    lies = start(tx, mesh)
    assert_same(row.id, 2, by_shard_map(tx, mesh, lies), lies, lambda state: state[1][0])


def test_a_model_axis_that_is_not_the_compilers_is_refused():
    """By a shard_map over all axes, and by train_step, to which all axes are of workers."""
    mesh, tx = gc.make_mesh({"data": 4, "model": 2}), problem.optimizer(gc.powersgd(2))
    params, state = start(tx, mesh)
    words = "differs along mesh axis 'model' too", "leave it to the compiler, with shard_map's axis_names="
    (batch,) = problem.batches(1)
    with refuses(*words):
        gc.train_step(problem.loss_fn, tx, mesh).lower(params, state, batch)

    def worker(grads):
        return tx.update(grads, tx.init(grads))[0]

    step = jax.shard_map(worker, mesh=mesh, in_specs=P("data", "model"), out_specs=P(None, "model"))
    with refuses(*words):
        jax.eval_shape(step, {"w": jnp.ones((96, 32))})
