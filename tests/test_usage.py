"""The four ways to use a codec give the same parameters, and the same as each other's twin."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from tests import problem

STEPS = 5
CODECS = {
    "none": gc.none(),
    "powersgd": gc.powersgd(2),
    "qsgd": gc.qsgd(bits=4, bucket_size=64, min_size=0),
    "qsgd-ef": gc.qsgd(bits=4, bucket_size=64, min_size=0, error_feedback=True),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def by_train_step(tx, **kwargs):
    mesh = gc.make_mesh(problem.WORKERS)
    params = problem.params()
    opt_state = gc.init(tx, params, mesh)
    step = gc.train_step(problem.loss_fn, tx, mesh, **kwargs)
    for batch in problem.batches(STEPS):
        params, opt_state, loss = step(params, opt_state, batch)
    return params, opt_state, loss


def by_simulate(tx):
    params = problem.params()
    opt_state = gc.init(tx, params, problem.WORKERS)
    step = gc.simulate(problem.loss_fn, tx, problem.WORKERS)
    for batch in problem.batches(STEPS):
        params, opt_state, loss = step(params, opt_state, batch)
    return params, opt_state, loss


def by_shard_map(tx, check_vma=True):
    mesh = gc.make_mesh(problem.WORKERS)
    params = problem.params()
    specs = gc.state_specs(tx, params)

    def worker(params, opt_state, batch):
        opt_state = gc.local_state(opt_state)
        grads = jax.grad(problem.loss_fn)(gc.vary(params, "data"), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), gc.global_state(opt_state)

    step = jax.jit(
        jax.shard_map(worker, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs), check_vma=check_vma)
    )
    opt_state = gc.init(tx, params, mesh)
    for batch in problem.batches(STEPS):
        params, opt_state = step(params, opt_state, batch)
    return params, opt_state


def by_pmap(tx):
    n = problem.WORKERS

    def replicate(tree):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), tree)

    def worker(params, opt_state, batch):
        grads = jax.grad(problem.loss_fn)(gc.vary(params, "data"), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.pmap(worker, axis_name="data", devices=jax.devices()[:n])
    params = problem.params()
    params, opt_state = replicate(params), replicate(tx.init(params))
    for batch in problem.batches(STEPS):
        split = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        params, opt_state = step(params, opt_state, split)
    return jax.tree.map(lambda x: x[0], params), opt_state


@every_codec
def test_all_ways_agree(codec):
    tx = problem.optimizer(codec)
    params, opt_state, loss = by_train_step(tx)
    twin, twin_state, twin_loss = by_simulate(tx)
    chex.assert_trees_all_close((params, loss), (twin, twin_loss), atol=1e-5, rtol=0)
    # Columns of Q that carry nothing but rounding may differ in all but their size.
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, twin_state)
    # The step's loss rides along: in a sum 2 * 3 / 4 floats, by "shuffle" one to each other worker in both stages.
    loss = 2 * 3 * 32 // (1 if codec.codec.coder else 4)
    for other, other_state, rides in (
        (*by_train_step(tx, check_vma=False)[:2], 0),
        (*by_shard_map(tx), loss),
        (*by_shard_map(tx, check_vma=False), loss),
        (*by_pmap(tx), loss),
    ):
        chex.assert_trees_all_close(params, other, atol=1e-5, rtol=0)
        (last, total), sent = gc.wire_bits(opt_state), gc.wire_bits(other_state)
        assert sent == (last - rides, total - STEPS * rides)
    assert gc.wire_bits(opt_state) == gc.wire_bits(twin_state)


def test_uncompressed_is_plain_training_on_the_whole_batch():
    params, _, _ = by_train_step(problem.optimizer(gc.none()))
    chex.assert_trees_all_close(params, problem.dense_training(STEPS), atol=1e-6, rtol=0)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="layer2")(jnp.tanh(nn.Dense(64, name="layer1")(x)))


@every_codec
def test_linen_train_state(codec):
    """A TrainState holds the local form under vmap, and the global one across shard_map."""
    tx = problem.optimizer(codec)
    mesh = gc.make_mesh(problem.WORKERS)
    state = TrainState.create(apply_fn=LinenModel().apply, params=problem.params(), tx=tx)
    state = state.replace(opt_state=gc.init(tx, state.params, mesh))
    specs = state.replace(
        step=P(), params=jax.tree.map(lambda _: P(), state.params), opt_state=gc.state_specs(tx, state.params)
    )

    def worker(state, batch):
        def loss_fn(params):
            return jnp.mean((state.apply_fn({"params": params}, batch["x"]) - batch["y"]) ** 2)

        grads = jax.grad(loss_fn)(gc.vary(state.params, "data"))
        state = state.replace(opt_state=gc.local_state(state.opt_state)).apply_gradients(grads=grads)
        return state.replace(opt_state=gc.global_state(state.opt_state))

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(specs, P("data")), out_specs=specs))
    for batch in problem.batches(STEPS):
        state = step(state, batch)
    chex.assert_trees_all_close(state.params, by_train_step(tx)[0], atol=1e-5, rtol=0)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.layer1 = nnx.Linear(64, 64, rngs=rngs)
        self.layer2 = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.layer2(jnp.tanh(self.layer1(x)))


@every_codec
def test_nnx_optimizer(codec):
    """An nnx.Optimizer on each worker, by pmap over its split state."""
    n = problem.WORKERS
    tx = problem.optimizer(codec)
    model = NNXModel(nnx.Rngs(0))
    nnx.update(model, nnx.State(problem.params()))
    graph, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    def worker(state, batch):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        optimizer.update(model, nnx.grad(loss_fn)(model))
        return nnx.split((model, optimizer))[1]

    step = jax.pmap(worker, axis_name="data", devices=jax.devices()[:n])
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), state)
    for batch in problem.batches(STEPS):
        state = step(state, jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch))
    model, _ = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(got, by_pmap(tx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "make", [lambda **kw: gc.powersgd(2, **kw), lambda **kw: gc.qsgd(8, min_size=0, error_feedback=True, **kw)]
)
def test_workers_along_two_axes(make):
    mesh = gc.make_mesh({"node": 2, "local": 2})
    tx = problem.optimizer(make(axis_name=("node", "local")))
    params = problem.params()
    opt_state = gc.init(tx, params, mesh)
    step = gc.train_step(problem.loss_fn, tx, mesh)
    for batch in problem.batches(STEPS):
        params, opt_state, _ = step(params, opt_state, batch)
    chex.assert_trees_all_close(params, by_train_step(problem.optimizer(make()))[0], atol=1e-5, rtol=0)


def test_names_of_leaves():
    """A Variable's "value" is no name; a module's own attribute of that name is."""

    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.Linear(16, 16, rngs=rngs)
            self.value = nnx.Linear(16, 16, rngs=rngs)

    state = gc.powersgd(1).init(nnx.state(Attention(nnx.Rngs(0)), nnx.Param))
    assert list(state.codec.q) == ["query/kernel", "value/kernel"]

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Raw:
        query: jax.Array
        value: jax.Array

    state = gc.powersgd(1).init({"attention": Raw(jnp.ones((16, 16)), jnp.ones((16, 16)))})
    assert list(state.codec.q) == ["attention/query", "attention/value"]
