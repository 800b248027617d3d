"""train_step and simulate: auxiliary outputs, model state, donation, skipped steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from tests import problem

N = problem.WORKERS


def steps(loss_fn, tx, **kwargs):
    """The real step and its twin, each with what makes its first state."""
    mesh = gc.make_mesh(N)
    return (
        (gc.train_step(loss_fn, tx, mesh, **kwargs), mesh),
        (gc.train_step(loss_fn, tx, mesh, check_vma=False, **kwargs), mesh),
        (gc.simulate(loss_fn, tx, N, **kwargs), N),
    )


def with_everything(params, stats, batch):
    prediction = problem.predict(params, batch["x"])
    loss = jnp.mean((prediction - batch["y"]) ** 2)
    stats = {"mean": 0.5 * stats["mean"] + 0.5 * jnp.mean(batch["x"], 0), "count": stats["count"] + 1}
    return loss, (stats, {"loss": loss, "positive": jnp.sum(batch["y"] > 0), "half": loss.astype(jnp.bfloat16)})


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["checked", "unchecked", "simulated"])
def test_aux_and_model_state_are_averaged(kind):
    tx = problem.optimizer(gc.powersgd(2))
    step, where = steps(with_everything, tx, has_aux=True, has_state=True)[kind]
    params = problem.params()
    stats = {"mean": jnp.zeros(20), "count": jnp.int32(0)}
    (batch,) = problem.batches(1)
    _, _, stats, loss, aux = step(params, gc.init(tx, params, where), stats, batch)
    np.testing.assert_allclose(stats["mean"], 0.5 * np.mean(batch["x"], 0), atol=1e-6)
    assert stats["count"] == 1
    assert stats["count"].dtype == jnp.int32
    np.testing.assert_allclose(aux["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(aux["positive"], np.sum(batch["y"] > 0) / N)
    assert aux["half"].dtype == jnp.float32


@pytest.mark.parametrize("kind", [0, 2], ids=["checked", "simulated"])
def test_donation_frees_what_was_passed(kind):
    tx = problem.optimizer(gc.powersgd(2))
    step, where = steps(problem.loss_fn, tx, donate=True)[kind]
    params = jax.tree.map(jnp.copy, problem.params())
    first = gc.init(tx, params, where)
    for batch in problem.batches(3):
        old = params
        params, first, _ = step(params, first, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    kept, where = steps(problem.loss_fn, tx)[kind]
    params = problem.params()
    (batch,) = problem.batches(1)
    kept(params, gc.init(tx, params, where), batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["checked", "unchecked", "simulated"])
@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2)])
@jax.numpy_dtype_promotion("standard")  # which optax needs
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(kind, optimizer):
    tx = optax.chain(gc.powersgd(2), optimizer)
    step, where = steps(with_everything, tx, has_aux=True, has_state=True)[kind]
    params = problem.params()
    stats = {"mean": jnp.zeros(20), "count": jnp.int32(0)}
    state = gc.init(tx, params, where)
    good, other = problem.batches(2)
    params, state, stats, _, _ = step(params, state, stats, good)
    bad = {**other, "x": other["x"].at[3, 4].set(jnp.nan)}
    params2, state2, stats2, loss, _ = step(params, state, stats, bad)
    assert np.isnan(loss)
    codec, codec2 = state[0], state2[0]
    chex.assert_trees_all_equal(
        jax.device_get((params, stats, state[1:], codec.codec, codec.residual)),
        jax.device_get((params2, stats2, state2[1:], codec2.codec, codec2.residual)),
    )
    assert codec2.skipped == codec.skipped + 1 == 1
    bits, bits2 = gc.wire_bits(state), gc.wire_bits(state2)
    assert bits2 == (bits.last, 2 * bits.last)


def test_state_is_sharded_over_the_workers():
    tx = problem.optimizer(gc.powersgd(2))
    mesh = gc.make_mesh(N)
    params = problem.params()
    state = gc.init(tx, params, mesh)
    residual = state[0].residual.value["layer1/kernel"]
    assert residual.shape == (N, 20, 16)
    assert residual.sharding.shard_shape(residual.shape) == (1, 20, 16)
    assert state[0].codec.q["layer1/kernel"].is_fully_replicated
    (batch,) = problem.batches(1)
    _, after, _ = gc.train_step(problem.loss_fn, tx, mesh)(params, state, batch)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, state)


def test_a_parameter_without_a_gradient():
    """Zeros that autodiff makes for an unused parameter pass the checks."""
    tx = problem.optimizer(gc.none())
    params = {**problem.params(), "unused": jnp.ones((4, 4))}
    step, where = steps(problem.loss_fn, tx)[0]
    (batch,) = problem.batches(1)
    new, _, _ = step(params, gc.init(tx, params, where), batch)
    np.testing.assert_array_equal(new["unused"], params["unused"])


def test_bf16_parameters():
    tx = problem.optimizer(gc.powersgd(2))
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    params = cast(problem.params())
    for step, where in steps(problem.loss_fn, tx):
        (batch,) = problem.batches(1)
        new, state, _ = step(params, gc.init(tx, params, where), cast(batch))
        assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves(state[0].residual)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("kind", [0, 2], ids=["checked", "simulated"])
def test_a_skipped_step_stops_every_codec(kind):
    """The codec that saw nothing wrong keeps its residual too, as what it sent was not applied."""
    labels = {"layer1": {"kernel": "matrix", "bias": "rest"}, "layer2": {"kernel": "matrix", "bias": "rest"}}
    tx = optax.chain(optax.partition({"matrix": gc.powersgd(2), "rest": gc.none()}, labels), optax.sgd(0.1))

    def loss_fn(params, batch):
        return problem.loss_fn(params, batch) + jnp.sum(params["layer2"]["bias"]) * batch["poison"][0]

    step, where = steps(loss_fn, tx)[kind]
    params = problem.params()
    state = gc.init(tx, params, where)
    (batch,) = problem.batches(1)
    after = step(params, state, {**batch, "poison": jnp.full(32, jnp.nan)})[:2]
    chex.assert_trees_all_equal(jax.device_get(after[0]), jax.device_get(params))
    before, after = (tree[0].inner_states["matrix"].inner_state for tree in (state, after[1]))
    chex.assert_trees_all_equal(jax.device_get(before[:2]), jax.device_get(after[:2]))
    assert gc.wire_bits(after).total > 0


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["checked", "unchecked", "simulated"])
def test_frozen_leaves(kind):
    freeze = optax.stateless(lambda u, p: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), u))
    labels = {"layer1": "frozen", "layer2": "trained"}
    tx = optax.partition({"trained": problem.optimizer(gc.powersgd(2)), "frozen": freeze}, labels)
    step, where = steps(problem.loss_fn, tx)[kind]
    params = problem.params()
    (batch,) = problem.batches(1)
    new, _, _ = step(params, gc.init(tx, params, where), batch)
    chex.assert_trees_all_equal(new["layer1"], params["layer1"])
    assert (new["layer2"]["kernel"] != params["layer2"]["kernel"]).any()


def test_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((N,), ("data",), devices=jax.devices()[:N])
    tx = problem.optimizer(gc.powersgd(2))
    params = problem.params()
    (batch,) = problem.batches(1)
    new, _, _ = gc.train_step(problem.loss_fn, tx, mesh)(params, gc.init(tx, params, mesh), batch)
    step, where = steps(problem.loss_fn, tx)[0]
    chex.assert_trees_all_equal(jax.device_get(new), jax.device_get(step(params, gc.init(tx, params, where), batch)[0]))


def test_complex_model_state():
    def loss_fn(params, state, batch):
        return problem.loss_fn(params, batch), state * 1j

    tx = problem.optimizer(gc.none())
    step, where = steps(loss_fn, tx, has_state=True)[0]
    params = problem.params()
    (batch,) = problem.batches(1)
    _, _, state, _ = step(params, gc.init(tx, params, where), jnp.complex64(1 + 2j), batch)
    assert state == -2 + 1j
