"""What of optax may stand before a codec, after it and around it, what that means, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import gradcomp_jax as gc
from gradcomp_jax.compressor import compressor_states
from tests import problem
from tests.test_refusals import refuses

N, STEPS = problem.WORKERS, 4
KINDS = ("checked", "unchecked", "simulated")
KERNELS = {"layer1": {"kernel": True, "bias": False}, "layer2": {"kernel": True, "bias": False}}
BIASES = jax.tree.map(lambda kernel: not kernel, KERNELS)
LABELS = jax.tree.map(lambda kernel: "kernel" if kernel else "bias", KERNELS)
SGD = optax.sgd(0.05, momentum=0.9)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        yield


def decaying(step):
    return 0.1 / (1 + step)


def two_of_three(step):
    return step % 3 != 1


def make_step(tx, kind, loss_fn=problem.loss_fn):
    """The step, and what makes its first state."""
    if kind == "simulated":
        return gc.simulate(loss_fn, tx, N), N
    mesh = gc.make_mesh(N)
    return gc.train_step(loss_fn, tx, mesh, check_vma=kind == "checked"), mesh


def trained(tx, kind="checked", params=None, loss_fn=problem.loss_fn):
    """The parameters and the state after a few steps."""
    step, where = make_step(tx, kind, loss_fn)
    params = problem.params() if params is None else params
    if kind != "simulated":  # or the second step compiles anew
        params = jax.device_put(params, NamedSharding(where, P()))
    state = gc.init(tx, params, where)
    for batch in problem.batches(STEPS):
        params, state, _ = step(params, state, batch)
    return jax.device_get((params, state))


def by_hand(before, after):
    """The parameters when each worker's gradient goes through `before`, and their mean through `after`."""

    def step(params, states, batch):
        parts = jax.tree.map(lambda x: x.reshape(N, -1, *x.shape[1:]), batch)
        grads = jax.vmap(jax.grad(problem.loss_fn), (None, 0))(params, parts)
        grads, first = jax.vmap(before.update, (0, None, None), (0, None))(grads, states[0], params)
        updates, second = after.update(jax.tree.map(lambda x: x.mean(0), grads), states[1], params)
        return optax.apply_updates(params, updates), (first, second)

    step = jax.jit(step)
    params = problem.params()
    states = before.init(params), after.init(params)
    for batch in problem.batches(STEPS):
        params, states = step(params, states, batch)
    return params


def assert_same(got, expected):
    chex.assert_trees_all_close(got, jax.device_get(expected), atol=2e-6, rtol=0)


def apart(first, second):
    return max(np.max(np.abs(a - b)) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


AFTER = {
    "clip": optax.chain(optax.clip(0.01), SGD),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.1), SGD),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.01), SGD),
    "add_decayed_weights": optax.chain(optax.add_decayed_weights(0.1), SGD),
    "sgd": SGD,
    "adamw": optax.adamw(0.01),
    "trace and ema": optax.chain(optax.trace(0.9), optax.ema(0.5), optax.scale(-0.05)),
    "scale_by_schedule": optax.chain(optax.scale_by_schedule(decaying), optax.scale(-1)),
    "MultiSteps": optax.MultiSteps(SGD, 2),
    "MultiSteps that skips": optax.MultiSteps(SGD, 2, should_skip_update_fn=optax.skip_not_finite),
    "apply_every": optax.chain(optax.apply_every(2), SGD),
    "apply_if_finite": optax.apply_if_finite(SGD, 3),
    "conditionally_transform": optax.chain(optax.conditionally_transform(optax.clip(0.01), two_of_three), SGD),
    "conditionally_mask": optax.conditionally_mask(SGD, two_of_three),
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd)(learning_rate=decaying, momentum=0.9),
    "partition": optax.partition({"kernel": SGD, "bias": optax.adam(0.01)}, LABELS),
    "set_to_zero in partition": optax.partition({"kernel": SGD, "bias": optax.set_to_zero()}, LABELS),
    "masked": optax.chain(optax.masked(optax.add_decayed_weights(0.1), KERNELS), SGD),
    "freeze": optax.chain(optax.freeze(BIASES), SGD),
    "schedule_free_sgd": contrib.schedule_free_sgd(0.05),
    "muon": contrib.muon(0.01),
    "sam": contrib.sam(SGD, optax.chain(contrib.normalize(), optax.sgd(0.05))),
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER.keys())
def test_after_a_codec_all_is_as_on_the_mean_gradient(after):
    got, _ = trained(optax.chain(gc.none(), after))
    assert_same(got, by_hand(optax.identity(), after))


# Before a codec each worker does it to its own gradient: of the linear ones that changes nothing.
LINEAR = {
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "scale_by_schedule": optax.scale_by_schedule(decaying),
    "centralize": optax.centralize(),
    "freeze": optax.freeze(BIASES),
    "add_noise": optax.add_noise(0.01, 0.5, 0),
}
LOCAL = {
    "clip": optax.clip(0.01),
    "clip_by_global_norm": optax.clip_by_global_norm(0.1),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "scale_by_sign": optax.scale_by_sign(),
}


@pytest.mark.parametrize("before", LINEAR.values(), ids=LINEAR.keys())
def test_what_is_linear_may_stand_before_a_codec_or_after_it(before):
    got, _ = trained(optax.chain(before, gc.none(), SGD))
    assert_same(got, by_hand(optax.identity(), optax.chain(before, SGD)))


@pytest.mark.parametrize("before", LOCAL.values(), ids=LOCAL.keys())
def test_what_is_not_linear_before_a_codec_is_done_to_each_workers_own_gradient(before):
    got, _ = trained(optax.chain(before, gc.none(), SGD))
    assert_same(got, by_hand(before, SGD))
    assert apart(got, by_hand(optax.identity(), optax.chain(before, SGD))) > 1e-4


def by_layer(**codecs):
    """What optax.partition by layer does, without optax."""

    def update(grads, states, params=None):
        outs = {layer: codecs[layer].update({layer: grads[layer]}, states[layer]) for layer in grads}
        return {layer: out[0][layer] for layer, out in outs.items()}, {layer: out[1] for layer, out in outs.items()}

    return optax.GradientTransformation(lambda p: {layer: codecs[layer].init({layer: p[layer]}) for layer in p}, update)


CODEC = gc.powersgd(2)
COARSE = gc.qsgd(bits=4, bucket_size=64, min_size=0, error_feedback=True)
PLAIN = optax.chain(CODEC, SGD)
AROUND = {
    "named_chain": (optax.named_chain(("codec", CODEC), ("sgd", SGD)), PLAIN),
    "with_extra_args_support": (optax.with_extra_args_support(PLAIN), PLAIN),
    "inject_hyperparams of the chain": (
        optax.inject_hyperparams(lambda lr: optax.chain(CODEC, optax.sgd(lr, momentum=0.9)))(lr=decaying),
        optax.chain(CODEC, optax.sgd(decaying, momentum=0.9)),
    ),
    "inject_hyperparams of the codec": (
        optax.chain(
            optax.inject_hyperparams(
                gc.powersgd, static_args=("rank", "min_rate", "stacked", "seed", "min_size", "compress")
            )(rank=2),
            SGD,
        ),
        PLAIN,
    ),
    "schedule_free": (
        contrib.schedule_free(optax.chain(CODEC, optax.sgd(0.05)), 0.05),
        optax.chain(CODEC, contrib.schedule_free(optax.sgd(0.05), 0.05)),
    ),
    # Dense leaves of a codec travel as those of none() do.
    "partition": (optax.chain(optax.partition({"kernel": CODEC, "bias": gc.none()}, LABELS), SGD), PLAIN),
    "partition of chains": (optax.partition({"kernel": PLAIN, "bias": optax.chain(gc.none(), SGD)}, LABELS), PLAIN),
    "partition of two codecs": (
        optax.chain(optax.partition({1: CODEC, 2: COARSE}, {"layer1": 1, "layer2": 2}), SGD),
        optax.chain(by_layer(layer1=CODEC, layer2=COARSE), SGD),
    ),
    "masked for all leaves": (
        optax.chain(optax.masked(CODEC, KERNELS), optax.masked(gc.none(), BIASES), SGD),
        PLAIN,
    ),
}


def of_gradients(state):
    """The bits without those of the loss, which rides in the messages of a codec that is the only one."""
    loss = 2 * (N - 1) * 32 // N if len(compressor_states(state)) == 1 else 0
    last, total = gc.wire_bits(state)
    return last - loss, total - STEPS * loss


trained_once = functools.cache(trained)


@pytest.mark.parametrize(("tx", "plain"), AROUND.values(), ids=AROUND.keys())
def test_around_a_codec_all_is_as_in_the_plain_chain(tx, plain):
    expected, expected_state = trained_once(plain)
    for kind in ("checked", "simulated"):
        got, state = trained(tx, kind)
        assert_same(got, expected)
        assert of_gradients(state) == of_gradients(expected_state)


def test_a_long_chain_is_the_same_in_every_kind_of_step():
    tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        COARSE,
        optax.add_decayed_weights(0.1),
        optax.apply_if_finite(optax.MultiSteps(optax.adam(0.01), 2), 3),
    )
    expected, expected_state = trained(tx)
    for kind in ("unchecked", "simulated"):
        got, state = trained(tx, kind)
        chex.assert_trees_all_close((got, state[2:]), (expected, expected_state[2:]), atol=1e-6)


def lookahead(fast):
    """optax.lookahead takes the gradients of the fast parameters alone; a step has those of both."""
    tx = optax.lookahead(fast, sync_period=2, slow_step_size=0.5)
    return optax.GradientTransformation(tx.init, lambda grads, state, params: tx.update(grads.fast, state, params))


@pytest.mark.parametrize("kind", ["checked", "simulated"])
def test_lookahead_around_the_chain_of_the_fast_parameters(kind):
    def loss_fn(params, batch):
        return problem.loss_fn(params.fast, batch)

    params = optax.LookaheadParams.init_synced(problem.params())
    got, _ = trained(lookahead(optax.chain(gc.none(), SGD)), kind, params, loss_fn)

    fast = slow = problem.params()
    state = SGD.init(fast)
    for i, batch in enumerate(problem.batches(STEPS)):
        updates, state = SGD.update(jax.grad(problem.loss_fn)(fast, batch), state, fast)
        fast = optax.apply_updates(fast, updates)
        if i % 2:
            fast = slow = jax.tree.map(lambda f, s: s + 0.5 * (f - s), fast, slow)
    assert_same(got.fast, fast)
    assert_same(got.slow, slow)


@pytest.mark.parametrize("tx", [optax.lookahead(PLAIN, 2, 0.5), optax.chain(CODEC, optax.lookahead(SGD, 2, 0.5))])
def test_lookahead_as_it_is_takes_no_gradients_of_a_step(tx):
    params = optax.LookaheadParams.init_synced(problem.params())
    step, where = make_step(tx, "simulated", lambda params, batch: problem.loss_fn(params.fast, batch))
    with pytest.raises(ValueError, match=r"state of codec|structure"):
        step(params, gc.init(tx, params, where), next(problem.batches(1)))


UPDATES = ("updates of tx still differ between the workers along ('data',)", "put a codec, none() or average() first")
STATE = ("state of tx would differ between the workers along ('data',)", "must come after the codec")
WRAPPED = ("a wrapper around the codec", "Put the wrapper after the codec", "let loss_fn average")
SECOND = ("the same on all workers", "a second codec behind it")
DENSE = optax.chain(gc.none(), SGD)
REFUSED = {
    "MultiSteps around the chain": (optax.MultiSteps(DENSE, 2), WRAPPED),
    "MultiSteps around the codec": (
        optax.chain(optax.MultiSteps(gc.none(), 2).gradient_transformation(), SGD),
        WRAPPED,
    ),
    "apply_if_finite around the chain": (optax.apply_if_finite(DENSE, 3), WRAPPED),
    "apply_if_finite around the codec": (optax.chain(optax.apply_if_finite(gc.none(), 3), SGD), WRAPPED),
    "conditionally_transform": (optax.conditionally_transform(DENSE, two_of_three), WRAPPED),
    "conditionally_mask": (optax.conditionally_mask(DENSE, two_of_three), WRAPPED),
    "two codecs": (optax.chain(CODEC, DENSE), SECOND),
    "momentum before": (optax.chain(optax.trace(0.9), DENSE), (STATE[0], "'0/trace/layer1/bias'", STATE[1])),
    "adam before": (optax.chain(optax.scale_by_adam(), DENSE), (STATE[0], "'0/mu/layer1/bias'", STATE[1])),
    "apply_every before": (optax.chain(optax.apply_every(2), DENSE), STATE),
    "zero_nans before": (optax.chain(optax.zero_nans(), DENSE), STATE),
    "masked": (optax.chain(optax.masked(CODEC, KERNELS), SGD), (UPDATES[0], "'layer1/bias'", "optax.masked", "none()")),
    "a label without a codec": (
        optax.partition({"kernel": PLAIN, "bias": SGD}, LABELS),
        (UPDATES[0], "'layer1/bias'", "optax.partition", "none()"),
    ),
    "a frozen label": (
        optax.partition({"kernel": PLAIN, "bias": optax.set_to_zero()}, LABELS),
        (UPDATES[0], "'layer1/bias'", "optax.set_to_zero", "optax.freeze(mask)"),
    ),
    "selective_transform": (
        optax.selective_transform(PLAIN, freeze_mask=BIASES),
        (UPDATES[0], "'layer1/bias'", "optax.selective_transform", "optax.freeze(mask)"),
    ),
    "no codec": (SGD, UPDATES),
}


@pytest.mark.parametrize(("tx", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_let_workers_part_is_refused_alike_in_every_kind_of_step(tx, words):
    params, (batch,) = problem.params(), problem.batches(1)
    state = gc.init(tx, params, N)
    for kind in KINDS:
        step, _ = make_step(tx, kind)
        with refuses(*words):
            step.lower(params, state, batch)


def halved_in_a_loop(start):
    """Gradients, halved in a loop whose carry begins with `start` of zeros."""

    def halve(x):
        zeros = start(jnp.zeros(x.shape, x.dtype))
        return jax.lax.fori_loop(0, 2, lambda i, total: total + x / 4, zeros)

    return optax.stateless(lambda updates, params: jax.tree.map(halve, updates))


def test_a_loop_before_the_codec_starts_from_what_varies():
    params, (batch,) = problem.params(), problem.batches(1)
    state = gc.init(optax.chain(halved_in_a_loop(jnp.copy), DENSE), params, N)
    for kind in KINDS:
        step, _ = make_step(optax.chain(halved_in_a_loop(jnp.copy), DENSE), kind)
        with refuses("before the codec", "control flow", "vary(zeros, axis)"):
            step.lower(params, state, batch)
    got, _ = trained(optax.chain(halved_in_a_loop(lambda zeros: gc.vary(zeros, "data")), DENSE))
    assert_same(got, by_hand(optax.scale(0.5), SGD))


@pytest.mark.parametrize("context", ["simulated within", "checked within"])
def test_refusals_do_not_depend_on_the_mesh_in_use(context):
    """The check has a mesh of its own, whatever mesh is set around it."""
    tx, words = REFUSED["apply_if_finite around the chain"]
    params, (batch,) = problem.params(), problem.batches(1)
    step, where = make_step(tx, context.split()[0])
    good, _ = make_step(DENSE, context.split()[0])
    other = gc.make_mesh(N) if context == "checked within" else gc.make_mesh({"a": 2, "b": 2})
    with jax.set_mesh(other):
        with refuses(*words):
            step.lower(params, gc.init(tx, params, where), batch)
        good.lower(params, gc.init(DENSE, params, where), batch)


@pytest.mark.parametrize("name", ["MultiSteps around the chain", "apply_if_finite around the codec", "masked"])
def test_a_checked_shard_map_of_ones_own_refuses_in_jaxs_words(name):
    tx, _ = REFUSED[name]
    params, mesh, (batch,) = problem.params(), gc.make_mesh(N), problem.batches(1)
    specs = gc.state_specs(tx, params)

    def worker(params, state, batch):
        grads = jax.grad(problem.loss_fn)(gc.vary(params, "data"), batch)
        updates, state = tx.update(grads, gc.local_state(state), params)
        return optax.apply_updates(params, updates), gc.global_state(state)

    step = jax.shard_map(worker, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs))
    with pytest.raises((TypeError, ValueError), match=r"cond branches must have equal|already reduced|out_specs"):
        jax.eval_shape(step, params, gc.init(tx, params, mesh), batch)


def test_a_codecs_settings_are_not_injected():
    tx = optax.chain(optax.inject_hyperparams(gc.powersgd)(rank=2), SGD)
    with refuses("rank is an array of jax", "static_args"):
        gc.init(tx, problem.params(), N)


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_search_is_refused(kind):
    tx = optax.chain(DENSE, optax.scale_by_zoom_linesearch(4))
    step, where = make_step(tx, kind)
    params = problem.params()
    with refuses("asks for", "line searches", "reduce_on_plateau"):
        step.lower(params, gc.init(tx, params, where), next(problem.batches(1)))


@pytest.mark.parametrize(("clip", "skips"), [(optax.clip(0.01), 0), (optax.clip_by_global_norm(0.1), 1)])
def test_clipping_by_value_before_a_codec_hides_infinity_from_it(clip, skips):
    """Clipping by the norm makes it NaN, which the codec sees."""
    tx = optax.chain(clip, DENSE)
    step, where = make_step(tx, "simulated", lambda params, batch: params["layer1"]["kernel"].sum() * batch[0])
    params = problem.params()
    new, state, _ = step(params, gc.init(tx, params, where), jnp.array([1.0, jnp.inf, 1.0, 1.0]))
    assert gc.skipped(state) == skips
    assert (apart(new, params) > 0) == (skips == 0)
