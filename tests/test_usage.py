"""The four ways to use a codec give the same parameters, and the same as each other's twin."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.testing.contexts import map_state
from tests import problem

N, STEPS = problem.WORKERS, 5
CODECS = {
    "none": gc.none(),
    "powersgd": gc.powersgd(2),
    "qsgd": gc.qsgd(bits=4, bucket_size=64, min_size=0),
    "qsgd-ef": gc.qsgd(bits=4, bucket_size=64, min_size=0, error_feedback=True),
}
optimizer = functools.cache(problem.optimizer)  # so that what it trained is found again
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def first(tx, mesh):
    """Parameters and state on all workers of a mesh."""
    params = jax.device_put(problem.params(), NamedSharding(mesh, P()))
    return params, gc.init(tx, params, mesh)


@functools.cache
def trained(tx):
    """(parameters, state) after each step of `train_step`."""
    mesh = gc.make_mesh(N)
    return problem.history(gc.train_step(problem.loss_fn, tx, mesh), *first(tx, mesh), STEPS)


def by_shard_map(tx, check_vma=True):
    mesh = gc.make_mesh(N)
    specs = gc.state_specs(tx, problem.params())

    def worker(params, opt_state, batch):
        opt_state = gc.local_state(opt_state)
        grads = jax.grad(problem.loss_fn)(gc.vary(params, "data"), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), gc.global_state(opt_state)

    return jax.jit(
        jax.shard_map(worker, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs), check_vma=check_vma)
    )


def by_pmap(tx):
    """With the local form of the state on each device, and all that is replicated there too."""

    def worker(params, opt_state, batch):
        grads = jax.grad(problem.loss_fn)(gc.vary(params, "data"), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.pmap(worker, axis_name="data", devices=jax.devices()[:N])

    def on_globals(params, state, batch):
        split = jax.tree.map(lambda x: x.reshape(N, -1, *x.shape[1:]), batch)
        state = map_state(np.asarray, replicated, state)
        params, state = step(jax.tree.map(replicated, params), state, split)
        return jax.tree.map(lambda x: x[0], params), map_state(lambda x: x, lambda x: x[0], state)

    return on_globals


def replicated(x):
    return np.broadcast_to(x, (N, *np.shape(x)))


@every_codec
def test_all_ways_agree(codec):
    """In parameters, residuals and bits, from the same beginning of each step."""
    tx, mesh = optimizer(codec), gc.make_mesh(N)
    # The step's loss rides along: in a sum 2 * 3 / 4 floats, by "shuffle" one to each other worker in both stages.
    loss = 2 * 3 * 32 // (1 if codec.codec.coder else 4)
    on_host = problem.params(), gc.init(tx, problem.params(), N)
    for step, lies, rides in (
        (gc.simulate(problem.loss_fn, tx, N), on_host, 0),
        (gc.train_step(problem.loss_fn, tx, mesh, check_vma=False), first(tx, mesh), 0),
        (by_shard_map(tx), first(tx, mesh), loss),
        (by_shard_map(tx, check_vma=False), first(tx, mesh), loss),
        (by_pmap(tx), on_host, loss),
    ):
        for t, ((params, state), (expected, other)) in enumerate(problem.again(step, trained(tx), lies)):
            chex.assert_trees_all_close(params, expected, atol=1e-6, rtol=0)
            chex.assert_trees_all_close(state[0].residual, other[0].residual, atol=1e-5, rtol=0)
            # Columns of Q that carry nothing but rounding may differ in all but their size.
            chex.assert_trees_all_equal_shapes_and_dtypes(state, other)
            (last, total), sent = gc.wire_bits(other), gc.wire_bits(state)
            assert sent == (last - rides, total - rides)
            assert total == (t + 1) * last


def test_uncompressed_is_plain_training_on_the_whole_batch():
    params, _ = trained(optimizer(CODECS["none"]))[-1]
    chex.assert_trees_all_close(params, problem.dense_training(STEPS), atol=1e-6, rtol=0)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="layer2")(jnp.tanh(nn.Dense(64, name="layer1")(x)))


@every_codec
def test_linen_train_state(codec):
    """A TrainState holds the local form under vmap, and the global one across shard_map."""
    tx = optimizer(codec)
    mesh = gc.make_mesh(N)
    params, opt_state = first(tx, mesh)
    first_state = TrainState.create(apply_fn=LinenModel().apply, params=params, tx=tx).replace(opt_state=opt_state)
    specs = first_state.replace(
        step=P(), params=jax.tree.map(lambda _: P(), params), opt_state=gc.state_specs(tx, params)
    )

    def worker(state, batch):
        def loss_fn(params):
            return jnp.mean((state.apply_fn({"params": params}, batch["x"]) - batch["y"]) ** 2)

        grads = jax.grad(loss_fn)(gc.vary(state.params, "data"))
        state = state.replace(opt_state=gc.local_state(state.opt_state)).apply_gradients(grads=grads)
        return state.replace(opt_state=gc.global_state(state.opt_state))

    on_mesh = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(specs, P("data")), out_specs=specs))

    def step(params, opt_state, batch):
        state = on_mesh(first_state.replace(params=params, opt_state=opt_state), batch)
        return state.params, state.opt_state

    for (got, _), (expected, _) in problem.again(step, trained(tx), (params, opt_state)):
        chex.assert_trees_all_close(got, expected, atol=1e-6, rtol=0)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.layer1 = nnx.Linear(64, 64, rngs=rngs)
        self.layer2 = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.layer2(jnp.tanh(self.layer1(x)))


@every_codec
def test_nnx_optimizer(codec):
    """An nnx.Optimizer on each worker, by pmap over its split state."""
    n = N
    tx = optimizer(codec)
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
    by_hand = problem.history(by_pmap(tx), problem.params(), gc.init(tx, problem.params(), n), STEPS)
    chex.assert_trees_all_close(got, by_hand[-1][0], atol=1e-5, rtol=0)


class Noisy(nnx.Module):
    """With batch statistics, and a random key."""

    def __init__(self, rngs):
        self.layer1 = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layer2 = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.layer2(self.drop(jnp.tanh(self.norm(self.layer1(x)))))


def of_module(model, batch):
    loss = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
    return loss, {"positive": jnp.sum(batch["y"] > 0)}


@jax.numpy_dtype_promotion("standard")  # of flax's normalisation
@pytest.mark.parametrize("simulated", [False, True])
def test_nnx_modules_in_and_out_of_train_step(simulated):
    """The parameters are those of the functional step; other state is averaged, and keys stay."""
    tx = optimizer(CODECS["powersgd"])
    make = (lambda loss, **kw: gc.simulate(loss, tx, N, **kw)) if simulated else functools.partial(gc.train_step, tx=tx)
    mesh = gc.make_mesh(N)
    make = make if simulated else functools.partial(make, mesh=mesh)
    model = NNXModel(nnx.Rngs(0))
    nnx.update(model, nnx.State(problem.params()))
    optim = nnx.Optimizer(model, tx, wrt=nnx.Param)
    of_params = lambda params, batch: (problem.loss_fn(params, batch), {"positive": jnp.sum(batch["y"] > 0)})  # noqa: E731
    step, functional = make(of_module, has_aux=True), make(of_params, has_aux=True)
    params, state = problem.params(), gc.init(tx, problem.params(), N if simulated else mesh)
    for k, batch in enumerate(problem.batches(2)):
        loss, aux = step(model, optim, batch)
        params, state, expected, _ = functional(params, state, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert aux["positive"] == np.sum(batch["y"] > 0)
        assert optim.step[...] == k + 1
        chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, atol=1e-6)
    assert gc.wire_bits(optim.opt_state) == gc.wire_bits(state)

    noisy = Noisy(nnx.Rngs(0))
    optim = nnx.Optimizer(noisy, tx, wrt=nnx.Param)
    key = noisy.drop.rngs.key[...]
    for batch in problem.batches(2):
        before, kernel = noisy.norm.mean[...], noisy.layer1.kernel[...]
        seen = np.mean(batch["x"] @ kernel + noisy.layer1.bias[...], 0)
        step(noisy, optim, batch)
        np.testing.assert_allclose(noisy.norm.mean[...], 0.5 * before + 0.5 * seen, atol=1e-5)
    assert noisy.drop.rngs.count[...] == 2
    assert noisy.drop.rngs.key[...] == key


def test_nnx_modules_where_they_do_not_go():
    tx = optimizer(CODECS["powersgd"])
    model = NNXModel(nnx.Rngs(0))
    (batch,) = problem.batches(1)
    with pytest.raises(ValueError, match=r"the step takes its nnx\.Optimizer, got a tuple"):
        gc.simulate(of_module, tx, N, has_aux=True)(model, (), batch)
    with pytest.raises(ValueError, match="a module holds its own"):
        gc.simulate(lambda model, state, batch: (0, state), tx, N, has_state=True)(model, (), batch)
    with pytest.raises(ValueError, match="changed in place: use train_step"):
        gc.data_parallel(lambda model, batch: model, mesh=gc.make_mesh(N))(model, batch)


@pytest.mark.parametrize(
    "make", [lambda **kw: gc.powersgd(2, **kw), lambda **kw: gc.qsgd(8, min_size=0, error_feedback=True, **kw)]
)
def test_workers_along_two_axes(make):
    mesh = gc.make_mesh({"node": 2, "local": 2})
    tx, along_one = (optimizer(make(axis_name=axis)) for axis in (("node", "local"), "data"))
    step = gc.train_step(problem.loss_fn, tx, mesh)
    for (params, state), (expected, other) in problem.again(step, trained(along_one), first(tx, mesh)):
        chex.assert_trees_all_close(params, expected, atol=1e-6, rtol=0)
        assert gc.wire_bits(state) == gc.wire_bits(other)


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
