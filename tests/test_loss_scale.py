"""Dynamic loss scaling, and what else of a skipped step goes on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from tests import problem
from tests.test_refusals import refuses

N = 2
PARAMS = {"w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
BATCH = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
KINDS = ("sharded", "simulated")


def half(params, x):
    """A loss whose gradient is computed in float16."""
    return jnp.mean(jnp.square((x.astype(jnp.float16) @ params["w"].astype(jnp.float16)).astype(jnp.float32)))


def whole(params, x):
    return jnp.mean(jnp.square(x @ params["w"]))


def stepper(loss_fn, tx, kind, **kwargs):
    where = N if kind == "simulated" else gc.make_mesh(N)
    make = gc.simulate if kind == "simulated" else gc.train_step
    return make(loss_fn, tx, where, **kwargs), gc.init(tx, PARAMS, where)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_falls_until_nothing_overflows_and_rises_again(kind):
    tx = gc.loss_scaled(optax.chain(gc.powersgd(1), optax.sgd(0.0)), initial=2.0**30, factor=4, period=3)
    step, state = stepper(half, tx, kind)
    scales, skips = [], []
    for _ in range(24):
        _, state, loss = step(PARAMS, state, BATCH)
        scales.append(float(gc.loss_scale(state)))
        skips.append(gc.skipped(state))
        np.testing.assert_allclose(loss, whole(PARAMS, BATCH), rtol=1e-2)  # as loss_fn returned it
    before = [2.0**30, *scales[:-1]]
    skipped = np.diff([0, *skips]) == 1
    assert skipped[0]
    assert 3 < skipped.sum() < 20
    good = 0
    for was, now, overflowed in zip(before, scales, skipped, strict=True):
        good = 0 if overflowed else good + 1
        assert now == (was / 4 if overflowed else was * 4 if good == 3 else was)
        good %= 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_applied_and_owed_does_not_depend_on_the_scale(kind):
    """Powers of two: exactly. So a residual stays right when the scale changes between its step and the next."""
    ends = []
    for initial in (None, 1.0, 2.0**20):
        tx = optax.chain(gc.topk(0.1), optax.sgd(0.1, momentum=0.9))
        tx = tx if initial is None else gc.loss_scaled(tx, initial=initial, period=2)
        step, state = stepper(whole, tx, kind)
        params = PARAMS
        for _ in range(5):
            params, state, _ = step(params, state, BATCH)
        ends.append(jax.device_get((params, state if initial is None else state.inner)))
    chex.assert_trees_all_equal(*ends)


def test_small_gradients_survive_float16():
    """Below 2^-24 nothing is left of them without a scale."""
    tiny = lambda params, x: half(params, x) * jnp.float32(2.0**-16) * jnp.float32(2.0**-16)  # noqa: E731
    moved = []
    for tx in (optax.sgd(1e6), gc.loss_scaled):
        chain = optax.chain(gc.none(), optax.sgd(1e6))
        step, state = stepper(
            tiny, gc.loss_scaled(chain, initial=2.0**24) if tx is gc.loss_scaled else chain, "simulated"
        )
        moved.append(np.mean(np.asarray(step(PARAMS, state, BATCH)[0]["w"]) != PARAMS["w"]))
    assert moved[0] < 0.5 < 0.99 < moved[1]


def test_in_a_step_of_ones_own():
    tx = gc.loss_scaled(optax.chain(gc.powersgd(1), optax.sgd(0.1)), initial=2.0**8)
    mesh = gc.make_mesh(N)
    specs = gc.state_specs(tx, PARAMS)

    def worker(params, state, x):
        state = gc.local_state(state)
        scale = gc.loss_scale(state)
        grads = jax.grad(lambda p: whole(p, x) * scale)(gc.vary(params, "data"))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)))
    params, got = step(PARAMS, gc.init(tx, PARAMS, mesh), BATCH)
    same, state = stepper(whole, tx, "sharded")
    expected, state, _ = same(PARAMS, state, BATCH)
    pairs = (params, got.inner[0].residual, got.steps), (expected, state.inner[0].residual, state.steps)
    chex.assert_trees_all_close(*jax.device_get(pairs), atol=1e-6)


@pytest.mark.parametrize("around", [lambda c: c, gc.delayed], ids=["at once", "delayed"])
def test_flush_and_resize_pass_through(around):
    tx = gc.loss_scaled(optax.chain(around(gc.topk(0.1)), optax.sgd(0.5)), initial=2.0**8)
    step, state = stepper(whole, tx, "simulated")
    params, state, _ = step(PARAMS, state, BATCH)
    state = gc.resize_workers(state, 1)
    owed = sum(np.asarray(x)[0] for x in jax.tree.leaves(state.inner[0]) if x.shape == (1, 16, 8))
    flushed, after = gc.flush(tx, params, state, 1)
    np.testing.assert_allclose(params["w"] - flushed["w"], 0.5 * owed, atol=1e-5)
    assert gc.loss_scale(after) == 2.0**8


def test_refusals():
    chain = optax.chain(gc.powersgd(1), optax.sgd(0.1))
    for settings, words in (
        ({"initial": 0.5}, "initial=0.5"),
        ({"factor": 1}, "factor=1"),
        ({"initial": float("inf")}, "initial=inf"),
        ({"period": 0}, "period=0"),
    ):
        with refuses(words):
            gc.loss_scaled(chain, **settings)
    with refuses("loss_scaled goes around the whole optimiser", "unscale too late"):
        optax.chain(gc.powersgd(1), gc.loss_scaled(optax.sgd(0.1))).init(PARAMS)
    with refuses("parameter ['w'] is in float16", "cast them in loss_fn"):
        gc.loss_scaled(chain).init({"w": jnp.ones((16, 8), jnp.float16)})


def test_it_stops_rising_where_the_scale_would_be_infinite():
    tx = gc.loss_scaled(optax.chain(gc.none(), optax.sgd(0.1)), initial=2.0**126, factor=4, period=1)
    step, state = stepper(lambda p, x: whole(p, x) * 1e-30, tx, "simulated")
    for _ in range(3):
        _, state, _ = step(PARAMS, state, BATCH)
    assert gc.loss_scale(state) == 2.0**126
    assert gc.skipped(state) == 0


def test_a_scale_around_a_part_is_refused():
    """The loss would be multiplied for all, and divided by that part alone."""
    some, other = (optax.chain(gc.none(), optax.sgd(0.1)) for _ in range(2))
    params = {"a": PARAMS["w"], "b": PARAMS["w"]}
    loss_fn = lambda p, x: whole({"w": p["a"]}, x) + whole({"w": p["b"]}, x)  # noqa: E731
    for parts in ({"a": gc.loss_scaled(some), "b": other}, {"a": gc.loss_scaled(some), "b": gc.loss_scaled(other)}):
        tx = optax.partition(parts, {"a": "a", "b": "b"})
        with refuses("around a part of the optimiser", "loss_scaled(optax.partition(...))"):
            gc.simulate(loss_fn, tx, N)(params, gc.init(tx, params, N), BATCH)
    with refuses("loss_scaled is inside loss_scaled"):
        gc.loss_scaled(gc.loss_scaled(some)).init(params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_ones_own_in_the_model_state_falls(kind):
    """With a count of bad batches and a key, which would repeat; what is not finite itself stays as it was."""

    def loss_fn(params, state, x):
        scale = state["scale"]
        big = (x.astype(jnp.float16) @ params["w"].astype(jnp.float16)) * scale.astype(jnp.float16)
        bad = ~jnp.all(jnp.isfinite(big))
        loss = jnp.mean((big.astype(jnp.float32) / scale) ** 2)
        average = 0.5 * state["average"] + 0.5 * loss
        return loss, {
            "scale": jnp.where(bad, scale / 2, scale),
            "bad": state["bad"] + bad.astype(jnp.int32),
            "key": jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(state["key"]), 1)),
            "average": average,
        }

    tx = optax.chain(gc.powersgd(1), optax.sgd(0.1))
    step, opt = stepper(loss_fn, tx, kind, has_state=True)
    params, keys = PARAMS, set()
    state = {
        "scale": jnp.float32(2**15),
        "bad": jnp.int32(0),
        "key": jax.random.key_data(jax.random.key(0)),
        "average": 0.0,
    }
    for _ in range(12):
        before = params, float(state["average"])
        params, opt, state, _ = step(params, opt, state, BATCH)
        keys.add(tuple(map(int, state["key"])))
        if gc.skipped(opt) == state["bad"] and not np.any(params["w"] != before[0]["w"]):
            assert state["average"] == before[1]
    assert 0 < gc.skipped(opt) < 6
    assert state["bad"] == gc.skipped(opt)
    assert state["scale"] == 2.0 ** (15 - gc.skipped(opt))
    assert len(keys) == 12
    assert np.isfinite(state["average"])
    assert np.any(params["w"] != PARAMS["w"])


def test_a_model_state_of_another_structure_is_refused():
    step, opt = stepper(
        lambda p, s, x: (whole(p, x), {**s, "more": 1.0}), problem.optimizer(gc.none()), "simulated", has_state=True
    )
    with refuses("returns one of another structure"):
        step(PARAMS, opt, {"n": 0.0}, BATCH)


@pytest.mark.parametrize("new", [jnp.zeros(3), jnp.int32(0)], ids=["shape", "type"])
def test_a_model_state_of_another_shape_is_refused(new):
    step, opt = stepper(
        lambda p, s, x: (whole(p, x), {"n": new}), problem.optimizer(gc.none()), "simulated", has_state=True
    )
    with refuses("leaf ['n'] of the model state is given as float32[]", f"returns it as {new.dtype}{list(new.shape)}"):
        step(PARAMS, opt, {"n": jnp.float32(0)}, BATCH)
