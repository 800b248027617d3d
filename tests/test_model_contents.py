"""What models contain: each trains in train_step as in simulate, though shard_map's types do not take it."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax import notes
from tests.test_refusals import refuses

PARAMS = {"w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32) * np.float32(0.1)}
BATCH = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)


def lstm(params, x):
    layer = nn.RNN(nn.OptimizedLSTMCell(8))
    fixed = layer.init(jax.random.key(0), jnp.zeros((1, 5, 8)))
    return jnp.mean(layer.apply(fixed, jnp.stack([x @ params["w"]] * 5, axis=1)) ** 2)


def ctc(params, x):
    n = x.shape[0]
    logits = jnp.stack([x @ params["w"]] * 6, axis=1)
    return jnp.mean(optax.ctc_loss(logits, jnp.zeros((n, 6)), jnp.ones((n, 2), jnp.int32), jnp.zeros((n, 2))))


def constant_branch(params, x):
    loss = jnp.mean((x @ params["w"]) ** 2)
    return jax.lax.cond(loss > 1e9, lambda: jnp.float32(0), lambda: loss)


def fori(params, x):
    start = jnp.zeros((x.shape[0], 8))
    return jnp.mean(jax.lax.fori_loop(0, 3, lambda i, total: total + jnp.tanh(x @ params["w"]), start) ** 2)


@jax.custom_vjp
def scaled(x, scale):
    return x * scale


scaled.defvjp(lambda x, s: (x * s, s), lambda s, g: (g * s, jnp.zeros(())))


def zero_cotangent(params, x):
    return jnp.mean(scaled(x @ params["w"], jnp.mean(x)) ** 2)


def sampler(params, x):
    drawn = jax.random.gamma(jax.random.key(0), 2.0 + jnp.abs(jax.lax.stop_gradient(x[:, :8])))
    return jnp.mean((x @ params["w"] * drawn) ** 2)


def micro_batches(params, x):
    """The average over micro-batches, to which the refusal of MultiSteps leads."""

    def one(total, part):
        return total + jnp.mean((part @ params["w"] - 1) ** 2), None

    return jax.lax.scan(one, jnp.float32(0), x.reshape(2, -1, x.shape[-1]))[0] / 2


def checkpointed_scan(params, x):
    body = jax.checkpoint(lambda carry, _: (jnp.tanh(carry + x @ params["w"]), None))
    return jnp.mean(jax.lax.scan(body, jnp.zeros((x.shape[0], 8)), None, length=3)[0] ** 2)


def while_of_searching(params, x):
    """Newton's steps to a root, whose count depends on the data, as in an implicit layer."""
    target = jax.lax.stop_gradient(jnp.mean(jnp.abs(x)) + 1)
    root = jax.lax.while_loop(lambda s: jnp.abs(s * s - target) > 1e-4, lambda s: (s + target / s) / 2, jnp.float32(1))
    return jnp.mean((x @ params["w"]) ** 2) * root


CONTENTS = [
    lstm, ctc, constant_branch, fori, zero_cotangent, sampler, micro_batches, checkpointed_scan, while_of_searching
]  # fmt: skip


@functools.cache
def stepped(loss_fn, kind):
    tx = optax.chain(gc.none(), optax.sgd(1.0))
    where = 2 if kind == "simulated" else gc.make_mesh(2)
    step = gc.simulate(loss_fn, tx, 2) if kind == "simulated" else gc.train_step(loss_fn, tx, where)
    params, _, loss = step(PARAMS, gc.init(tx, PARAMS, where), BATCH)
    return np.asarray(params["w"]), float(loss)


@pytest.mark.parametrize("loss_fn", CONTENTS, ids=lambda f: f.__name__)
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_it_trains_as_on_one_device(loss_fn):
    params, loss = stepped(loss_fn, "sharded")
    expected, value = stepped(loss_fn, "simulated")
    np.testing.assert_allclose(params, expected, atol=1e-6)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    grads = [jax.grad(loss_fn)(PARAMS, x)["w"] for x in np.split(BATCH, 2)]
    np.testing.assert_allclose(params, PARAMS["w"] - (grads[0] + grads[1]) / 2, atol=1e-6)


def test_that_types_were_given_up_is_logged(caplog):
    notes._once.cache_clear()
    with caplog.at_level(logging.INFO, "gradcomp_jax"):
        tx, mesh = optax.chain(gc.none(), optax.sgd(1.0)), gc.make_mesh(2)
        gc.train_step(fori, tx, mesh).lower(PARAMS, gc.init(tx, PARAMS, mesh), BATCH)
    assert "without shard_map's types" in caplog.text


def test_a_transformation_is_still_checked():
    """Though the step itself is not: momentum before the codec would let the workers part."""
    tx = optax.chain(optax.trace(0.9), gc.none(), optax.sgd(1.0))
    mesh = gc.make_mesh(2)
    with refuses("would differ between the workers"):
        gc.train_step(fori, tx, mesh)(PARAMS, gc.init(tx, PARAMS, mesh), BATCH)


def test_an_error_of_the_models_own_stays_what_it_is():
    def broken(params, x):
        raise KeyError("of its own")

    tx, mesh = optax.chain(gc.none(), optax.sgd(1.0)), gc.make_mesh(2)
    with pytest.raises(KeyError, match="of its own"):
        gc.train_step(broken, tx, mesh)(PARAMS, gc.init(tx, PARAMS, mesh), BATCH)


def constrained(sharding):
    def loss_fn(params, x):
        return jnp.mean(jax.lax.with_sharding_constraint(x @ params["w"], sharding) ** 2)

    return loss_fn


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("sharding", ["named", "one device"])
def test_a_sharding_constraint_over_the_workers_is_refused(sharding, check_vma):
    tx, mesh = optax.chain(gc.none(), optax.sgd(1.0)), gc.make_mesh(2)
    sharding = NamedSharding(mesh, P("data")) if sharding == "named" else SingleDeviceSharding(jax.devices()[0])
    with refuses("loss_fn constrains the sharding of an array", "leave that axis to the compiler"):
        step = gc.train_step(constrained(sharding), tx, mesh, check_vma=check_vma)
        step(PARAMS, gc.init(tx, PARAMS, mesh), BATCH)


def test_a_constraint_by_name_alone_is_refused():
    tx, mesh = optax.chain(gc.none(), optax.sgd(1.0)), gc.make_mesh(2)
    with jax.set_mesh(mesh), refuses("loss_fn constrains the sharding of an array"):
        gc.train_step(constrained(P("data")), tx, mesh)(PARAMS, gc.init(tx, PARAMS, mesh), BATCH)


def test_a_constraint_to_nothing_works():
    mesh = gc.make_mesh(2)
    loss_fn = constrained(NamedSharding(mesh, P()))
    np.testing.assert_allclose(stepped(loss_fn, "sharded")[0], stepped(loss_fn, "simulated")[0], atol=1e-6)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("kind", ["sharded", "unchecked", "simulated"])
def test_a_transformation_that_asks_for_the_loss_gets_its_mean(kind):
    tx = optax.chain(gc.topk(0.1), optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1, rtol=0.9, cooldown=0))
    where = 2 if kind == "simulated" else gc.make_mesh(2)
    loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)  # noqa: E731
    if kind == "simulated":
        step = gc.simulate(loss_fn, tx, 2)
    else:
        step = gc.train_step(loss_fn, tx, where, check_vma=kind == "sharded")
    params, state = PARAMS, gc.init(tx, PARAMS, where)
    losses = []
    for _ in range(3):
        params, state, loss = step(params, state, BATCH)
        losses.append(float(loss))
    np.testing.assert_allclose(state[-1].best_value, losses[0], rtol=1e-6)  # what followed was not ten times less
    assert state[-1].scale < 1


@pytest.mark.parametrize(
    "make", [optax.lbfgs, lambda: optax.scale_by_backtracking_linesearch(5)], ids=["lbfgs", "armijo"]
)
@jax.numpy_dtype_promotion("standard")
def test_line_searches_are_refused(make):
    tx = optax.chain(gc.none(), make())
    with refuses("line searches", "reduce_on_plateau"):
        gc.simulate(fori, tx, 2)(PARAMS, gc.init(tx, PARAMS, 2), BATCH)
