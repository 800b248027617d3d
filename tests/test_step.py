"""train_step and simulate: auxiliary outputs, model state, donation, skipped steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.compressor import is_compressor_state
from tests import problem
from tests.table import BY_ID, EACH

N = problem.WORKERS
each_codec = pytest.mark.parametrize("row", EACH, ids=lambda row: row.id)


def steps(loss_fn, tx, **kwargs):
    """The real step and its twin, each with what makes its first state."""
    mesh = gc.make_mesh(N)
    return (
        (gc.train_step(loss_fn, tx, mesh, **kwargs), mesh),
        (gc.train_step(loss_fn, tx, mesh, check_vma=False, **kwargs), mesh),
        (gc.simulate(loss_fn, tx, N, **kwargs), N),
    )


def on_all(tree, where):
    """The tree on all devices of the step, or its second call compiles anew."""
    return tree if where == N else jax.device_put(tree, NamedSharding(where, P()))


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
    stats = {"mean": jnp.zeros(64), "count": jnp.int32(0)}
    (batch,) = problem.batches(1)
    _, _, stats, loss, aux = step(params, gc.init(tx, params, where), stats, batch)
    np.testing.assert_allclose(stats["mean"], 0.5 * np.mean(batch["x"], 0), atol=1e-6)
    assert stats["count"] == 1
    assert stats["count"].dtype == jnp.int32
    np.testing.assert_allclose(aux["loss"], loss, rtol=1e-6)
    assert aux["positive"] == np.sum(batch["y"] > 0)
    assert aux["half"].dtype == jnp.float32


@pytest.mark.parametrize(("kind", "first"), [(0, 1), (1, 2), (2, 2)], ids=["checked", "unchecked", "simulated"])
def test_the_transformation_is_traced_once_for_each_program(kind, first):
    """Where types tell nothing, once more by itself, for the first of them."""
    codec, traced = gc.powersgd(2), []

    def update(*args, **kwargs):
        traced.append(None)
        return codec.update(*args, **kwargs)

    tx = problem.optimizer(optax.GradientTransformationExtraArgs(codec.init, update))
    step, where = steps(problem.loss_fn, tx)[kind]
    params = problem.params()
    state = gc.init(tx, params, where)
    for size, count in ((32, first), (16, first + 1)):
        step.lower(params, state, next(problem.batches(1, size)))
        assert len(traced) == count


@pytest.mark.parametrize("error", [KeyError, ValueError, TypeError], ids=lambda error: error.__name__)
def test_an_error_of_the_transformations_own_stays_what_it_is(error):
    def update(updates, state, params=None):
        raise error("of its own")

    tx = optax.chain(gc.powersgd(2), optax.GradientTransformation(optax.init_empty_state, update))
    params, (batch,) = problem.params(), problem.batches(1)
    for step, where in steps(problem.loss_fn, tx):
        with pytest.raises(error, match="of its own") as caught:
            step.lower(params, gc.init(tx, params, where), batch)
        assert caught.type is error


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


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-3)], ids=["momentum", "adam"])
def test_a_donated_state_is_overwritten_where_it_lies(optimizer):
    """A skipped step keeps it, by a select; that reads it, but needs no copy of it."""
    tx, mesh = optax.chain(gc.none(), optimizer), gc.make_mesh(1)
    params = {"w": jnp.ones((128, 256))}
    step = gc.train_step(lambda p, x: jnp.mean((x @ p["w"]) ** 2), tx, mesh, donate=True)
    with jax.numpy_dtype_promotion("standard"):  # as adam needs it
        compiled = step.lower(params, gc.init(tx, params, mesh), jnp.ones((8, 128))).compile().as_text()
    copied = [line for line in compiled.splitlines() if " copy(" in line and "= f32[128,256]" in line]
    assert not copied


def convolved(params, x):
    y = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean((y - 1) ** 2)


def test_a_kernels_gradient_is_read_as_it_was_computed():
    """XLA's CPU backend computes it with the input channels first; PowerSGD's products need no turned copy of it."""
    codec, mesh = gc.powersgd(rank=2), gc.make_mesh(2)
    told = optax.chain(codec, optax.sgd(0.1))
    untold = codec._replace(update=lambda *args, **extra: codec.update(*args, **extra | {"fresh": False}))
    params = {"k": jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 16, 32)), jnp.float32)}
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 8, 8, 16)), jnp.float32)
    accessed, ends = [], []
    for tx in (told, optax.chain(untold, optax.sgd(0.1))):
        step, state = gc.train_step(convolved, tx, mesh), (params, gc.init(tx, params, mesh))
        compiled = step.lower(*state, x).compile()
        for _ in range(3):
            *state, _ = compiled(*state, x)
        accessed.append(compiled.cost_analysis()["bytes accessed"])
        ends.append(state[0])
    # A copy for each of two products, written and read, less the thin factors that are turned instead.
    assert accessed[1] - accessed[0] >= 3 * params["k"].nbytes
    chex.assert_trees_all_close(*ends, atol=1e-6)


def without_counters(opt_state):
    """All of the optimiser's state but the counts of skipped steps and of bits."""

    def strip(x):
        return x._replace(wire=None, skipped=None) if is_compressor_state(x) else x

    return jax.tree.map(strip, jax.device_get(opt_state), is_leaf=is_compressor_state)


def poisoned(params, stats, batch):
    loss, rest = with_everything(params, stats, batch)
    return loss + jnp.sum(params["layer1"]["kernel"]) * jnp.sum(batch["poison"]), rest


# What is added to the gradients, of the first worker or of all; each is met in the first step or later.
POISONS = [jnp.zeros(32).at[: 1 if one else 32].set(value) for value in (np.nan, np.inf) for one in (True, False)]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        *(pytest.param(row, 0, id=f"{row.id}-checked") for row in EACH),
        *(pytest.param(BY_ID[id], 1, id=f"{id}-unchecked") for id in ("powersgd-4", "gradiveq-ef")),
        *(pytest.param(BY_ID[id], 2, id=f"{id}-simulated") for id in ("powersgd-4", "gradiveq-ef")),
    ],
)
@jax.numpy_dtype_promotion("standard")  # which optax needs
def test_steps_that_are_not_finite_change_nothing_but_the_counts(row, kind):
    """Among them all of momentum's, accumulation's and Adam's state; the others go on as if they had not been.

    The model state is finite in all of them, and goes on.
    """
    tx = optax.chain(row.make(), optax.trace(0.9), optax.MultiSteps(optax.adam(0.1), 2))
    step, where = steps(poisoned, tx, has_aux=True, has_state=True)[kind]
    params, stats = on_all((problem.params(), {"mean": jnp.zeros(64), "count": jnp.int32(0)}), where)
    now = undisturbed = params, gc.init(tx, params, where), stats
    for i, batch in enumerate(problem.batches(8)):
        *after, loss, _ = step(*now, {**batch, "poison": POISONS[i % 4]})
        assert not np.isfinite(loss)
        (kept_params, state, kept_stats), (old_params, old, old_stats) = after, now
        chex.assert_trees_all_equal(*jax.device_get((kept_params, old_params)))
        assert kept_stats["count"] == old_stats["count"] + 1
        np.testing.assert_allclose(
            kept_stats["mean"], 0.5 * old_stats["mean"] + 0.5 * np.mean(batch["x"], 0), atol=1e-6
        )
        chex.assert_trees_all_equal(without_counters(state), without_counters(old))
        assert gc.skipped(state) == gc.skipped(old) + 1 == i + 1

        good = {**batch, "poison": jnp.zeros(32)}
        now = step(kept_params, state, old_stats, good)[:3]
        undisturbed = step(*undisturbed, good)[:3]
        # What was skipped travelled: the same step is sent again.
        assert gc.wire_bits(state).last == gc.wire_bits(now[1]).last
        assert gc.wire_bits(state).total == gc.wire_bits(old).total + gc.wire_bits(state).last
    (params, state, stats), (other_params, other, other_stats) = now, undisturbed
    chex.assert_trees_all_equal(*jax.device_get(((params, stats), (other_params, other_stats))))
    chex.assert_trees_all_equal(without_counters(state), without_counters(other))
    assert gc.skipped(other) == 0
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(problem.params()), strict=True))


@each_codec
@jax.numpy_dtype_promotion("standard")
def test_in_a_bare_chain_the_zeros_of_a_skipped_step_reach_what_follows(row):
    """Momentum decays and Adam counts a step; the codec is as it was."""
    tx = optax.chain(row.make(), optax.trace(0.9), optax.scale_by_adam())
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 16)), jnp.float32)}
    mesh, specs = gc.make_mesh(2), gc.state_specs(tx, params)

    def worker(grads, state):
        updates, state = tx.update({"w": grads["w"][0]}, gc.local_state(state))
        return updates, gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P(), specs)))
    grads = {"w": jnp.stack([params["w"], 2 * params["w"]])}
    _, before = step(grads, gc.init(tx, params, mesh))
    for poison in (np.nan, np.inf):
        updates, after = step({"w": grads["w"].at[1, 2, 3].set(poison)}, before)
        chex.assert_trees_all_equal(without_counters(after[0]), without_counters(before[0]))
        np.testing.assert_array_equal(after[1].trace["w"], np.float32(0.9) * before[1].trace["w"])
        assert after[2].count == before[2].count + 1 == 2
        assert np.all(np.isfinite(updates["w"]))
        assert np.any(updates["w"] != 0)


def test_state_is_sharded_over_the_workers():
    tx = problem.optimizer(gc.powersgd(2))
    mesh = gc.make_mesh(N)
    params = problem.params()
    state = gc.init(tx, params, mesh)
    residual = state[0].residual.value["layer1/kernel"]
    assert residual.shape == (N, 64, 64)
    assert residual.sharding.shard_shape(residual.shape) == (1, 64, 64)
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
