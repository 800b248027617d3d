"""Accordion: when it switches, what stays the same when it does, and what is sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.exchange.rounds import Exchange
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import map_state, run
from gradcomp_jax.testing.exchanges import whole
from tests import problem

LOW, HIGH = 0, 1
# Norms at the checks, and what they decide: changes by 0.4, 1.14, 0 and 1; then there is none to compare with.
SCRIPT, DECIDED = [1, 1.4, 3, 3, 0, 5, 5], [LOW, HIGH, LOW, HIGH, LOW, LOW, HIGH]


def blocks(**kwargs):
    """An accordion of a codec that compiles fast: half of a leaf at the low level, a quarter at the high one."""
    return gc.accordion(gc.randomblock(1 / 2), gc.randomblock(1 / 4), **kwargs)


def scripted(norms, interval, window, shape=(8, 6)):
    """Gradients [steps, workers, *shape] whose sums over the windows have norms [checks, workers]; noise between."""
    norms = np.asarray(norms, float)
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((*norms.shape, interval, *shape))
    inside = grads[:, :, :window]
    inside -= inside.mean(2, keepdims=True)  # so that the sum is what is added now
    unit = rng.standard_normal((*norms.shape, *shape))
    unit *= (norms / np.linalg.norm(unit.reshape(*norms.shape, -1), axis=2))[..., None, None]
    inside += unit[:, :, None] / window
    return grads.swapaxes(1, 2).reshape(-1, norms.shape[1], *shape).astype(np.float32)


def by_steps(decided, interval, window):
    """The level of the step after each, from what each check decides."""
    levels = [LOW] * (window - 1) + [level for level in decided for _ in range(interval)]
    return np.array(levels[: len(decided) * interval])


def levels(got, path="w"):
    return got.states.codec.level[path][:, 0]


def bits(got):
    return np.array([gc.wire_bits(jax.tree.map(lambda x, t=t: x[t], got.states)).last for t in range(len(levels(got)))])


class TestRule:
    """Agarwal et al., MLSys 2021, Algorithm 1."""

    @pytest.mark.parametrize(("interval", "window"), [(1, None), (3, 2)])
    def test_scripted_norms(self, interval, window):
        """Of each worker's own sums, by the mean of their norms; sums outside the window do not count."""
        tx = blocks(interval=interval, window=window)
        window = window or interval
        grads = scripted(np.outer(SCRIPT, [0.5, 1.5]), interval, window)
        got = run(tx, {"w": grads}, "vmap")
        expected = by_steps(DECIDED, interval, window)
        np.testing.assert_array_equal(levels(got), expected)
        np.testing.assert_allclose(got.states.codec.norm["w"][window - 1 :: interval, 0], SCRIPT, atol=1e-5)
        # A half of 48 floats, or a quarter, and the norm.
        in_use = np.append(LOW, expected[:-1])
        np.testing.assert_array_equal(bits(got), 32 * (np.where(in_use == LOW, 24, 12) + 1))

    @pytest.mark.parametrize(
        ("source", "decided"), [("mean", [LOW, LOW, HIGH, LOW]), ("first_worker", [LOW, HIGH, HIGH, HIGH])]
    )
    def test_whose_norms_decide(self, source, decided):
        norms = [[1, 1], [1, 3], [1, 3], [1, 0]]
        got = run(blocks(interval=1, norm_source=source), {"w": scripted(norms, 1, 1)}, "vmap")
        np.testing.assert_array_equal(levels(got), decided)

    @pytest.mark.parametrize("per_layer", [True, False])
    def test_each_layer_or_all_together(self, per_layer):
        """Together sqrt(2), sqrt(10), sqrt(10), and sqrt(13): changes by 1.2, 0, 0.14."""
        norms = {"a": [1, 1, 1, 2], "b": [1, 3, 3, 3]}
        tx = blocks(interval=1, per_layer=per_layer)
        got = run(tx, {path: scripted(np.outer(x, [1, 1]), 1, 1) for path, x in norms.items()}, "vmap")
        together = [LOW, LOW, HIGH, HIGH]
        apart = {"a": [LOW, HIGH, HIGH, LOW], "b": together}
        for path in norms:
            np.testing.assert_array_equal(levels(got, path), apart[path] if per_layer else together)

    def test_the_threshold_is_critical_itself(self):
        got = run(blocks(interval=1, threshold=0.25), {"w": np.ones((5, 1, 8, 8), np.float32) * RAMP}, "vmap")
        np.testing.assert_array_equal(levels(got), [LOW, LOW, HIGH, LOW, HIGH])

    @pytest.mark.parametrize("given", ["schedule", "argument"])
    def test_a_fall_of_the_learning_rate(self, given):
        """In step 4, of a high interval: all is low at once, until the check of step 5; a rise has no effect."""
        rates = jnp.array([0.1, 0.1, 0.2, 0.2, 0.02, 0.02, 0.02, 0.02])
        schedule = (lambda step: rates[step]) if given == "schedule" else None
        tx = blocks(interval=2, window=2, learning_rate=schedule)
        grads = scripted(np.ones((4, 2)), 2, 2)

        def worker(grads):
            def step(state, x):
                extra = {"learning_rate": x[1]} if given == "argument" else {}
                updates, state = tx.update({"w": x[0]}, state, **extra)
                return state, (updates, state)

            return jax.lax.scan(step, tx.init({"w": grads[0]}), (grads, rates))[1]

        _, states = jax.device_get(jax.jit(jax.vmap(worker, 1, 1, axis_name="data"))(grads))
        np.testing.assert_array_equal(states.codec.level["w"][:, 0], [0, 0, 0, 1, 0, 1, 1, 1])
        sent = [gc.wire_bits(jax.tree.map(lambda x, t=t: x[t], states)).last // 32 for t in range(8)]
        assert sent == [25] * 6 + [13] * 2
        line = gc.accordion_log(jax.tree.map(lambda x: x[4], states))
        assert line == ["w: low from step 4 on, as the learning rate fell to 0.02"]

    def test_log(self):
        got = run(blocks(interval=1), {"w": scripted(np.outer(SCRIPT, [1, 1]), 1, 1)}, "vmap")
        log = [gc.accordion_log(jax.tree.map(lambda x, t=t: x[t], got.states)) for t in range(6)]
        assert log == [
            ["w: low, as there is no norm before the last check to compare with"],
            ["w: high from step 2 on, as the norm changed from 1 to 1.4, by 0.40"],
            ["w: low from step 3 on, as the norm changed from 1.4 to 3, by 1.14"],
            ["w: high from step 4 on, as the norm changed from 3 to 3, by 0.00"],
            ["w: low from step 5 on, as the norm changed from 3 to 0, by 1.00"],
            ["w: low, as there is no norm before the last check to compare with"],
        ]
        first = gc.init(blocks(interval=1), {"w": jnp.zeros((8, 6))}, 2)
        assert gc.accordion_log(first) == ["w: low, as there is no norm before the next check to compare with"]
        assert gc.accordion_log(gc.powersgd().init({"w": jnp.zeros((8, 6))})) == []


# Exact in binary, as is the norm of 64 ones: changes by 1/4, by 1/5, by 1/2, by 0.
RAMP = np.array([1, 1.25, 1.5, 0.75, 0.75], np.float32).reshape(5, 1, 1, 1)


def every_leaf(path, leaf):
    return True


def gradiveq(ratio):
    settings = {"train_steps": 7, "compress_steps": 20, "warmup_steps": 0, "error_feedback": True}
    return gc.gradiveq(24, ratio=ratio, compress=every_leaf, **settings)


def first_columns(state, high):
    """PowerSGD's state with the Q of a rank, GradiVeQ's with the basis of a ratio."""
    if isinstance(state, gc.PowerSGDState):
        return state._replace(q={path: x[..., : high.codec.strength.value, :] for path, x in state.q.items()})
    if isinstance(state, gc.GradiVeQState):
        d = int(24 / high.codec.strength.value)
        basis, projected = ({path: x[..., :d] for path, x in tree.items()} for tree in (state.basis, state.projected))
        return state._replace(basis=basis, projected=projected)
    return state


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (gc.powersgd(4), gc.powersgd(1)),
        (gc.randomblock(1 / 4), gc.randomblock(1 / 16)),
        (gradiveq(4), gradiveq(12)),
    ],
    ids=lambda tx: tx.codec.name,
)
def test_each_step_is_the_codecs_own_at_its_level(low, high):
    """From the same state, residual and warm start: so both survive the switches, low to high to low, of each leaf."""
    steps, shapes = 14, {"a": (24, 18), "b": (15, 24)}
    tx = gc.accordion(low, high, interval=1, threshold=0.5)
    grads = trees.noise(shapes, 1, (steps, 2))
    for path, large in (("a", [8, 9]), ("b", [10])):
        grads[path][large] *= 4
    got = run(tx, grads, "vmap")

    def step(codec, gradients, before):
        exchange = Exchange(codec, low.settings.aggregate, Wire("data"), feedback=True)

        def worker(gradients, residual):
            owed = {path: x + residual[path] for path, x in gradients.items()}
            return exchange([whole(owed)], before.codec.codec).mean

        return jax.vmap(worker, axis_name="data")(gradients, before.residual.value)

    before = jax.tree.map(lambda x: x[:-1], got.states)
    before = before._replace(codec=jax.tree.map(lambda x: x[:, 0], before.codec))
    alone = {}
    for level, plain in ((LOW, low), (HIGH, high)):
        state = before
        if level == HIGH:
            state = before._replace(codec=before.codec._replace(codec=first_columns(before.codec.codec, high)))
        follow = jax.jit(lambda x, codec=plain.codec: jax.lax.map(lambda now: step(codec, *now), x))
        alone[level] = jax.device_get(follow(({path: x[1:] for path, x in grads.items()}, state)))
    pairs = set()
    for t in range(steps - 1):
        level = {path: int(x[t]) for path, x in before.codec.level.items()}
        pairs.add((level["a"], level["b"]))
        for path in shapes:
            np.testing.assert_allclose(got.updates[path][t + 1], alone[level[path]][path][t], atol=2e-5)
    assert pairs == {(LOW, LOW), (LOW, HIGH), (HIGH, LOW), (HIGH, HIGH)}

    for path in shapes:
        owed = got.states.residual.value[path][-1].mean(0)
        given = grads[path].astype(np.float64).mean(1).sum(0)
        np.testing.assert_allclose(got.updates[path][:, 0].sum(0) + owed, given, atol=2e-4)

    # The bytes follow the levels, in the steps that compress; a leaf at each lie between.
    sent = bits_by_levels(got, before.codec.level, 8)
    assert sent[HIGH, HIGH] < min(sent[LOW, HIGH], sent[HIGH, LOW]) <= max(sent[LOW, HIGH], sent[HIGH, LOW])
    assert max(sent[LOW, HIGH], sent[HIGH, LOW]) < sent[LOW, LOW]


def bits_by_levels(got, level, first):
    """What is sent in the steps from `first` on, by the levels of the leaves: always the same."""
    sent = {}
    for t in range(first - 1, len(level["a"])):
        last = gc.wire_bits(jax.tree.map(lambda x, t=t: x[t + 1], got.states)).last
        assert sent.setdefault((int(level["a"][t]), int(level["b"][t])), last) == last
    return sent


@pytest.mark.parametrize("reset", [False, True])
def test_reset_on_switch_draws_q_anew(reset):
    """The step after a switch then depends on the Q before it no more."""
    tx = gc.accordion(gc.powersgd(3), gc.powersgd(1), interval=1, reset_on_switch=reset)
    grads = trees.noise({"w": (24, 18)}, 2, (6, 2))
    grads["w"][3] *= 4
    got = run(tx, grads, "vmap")
    np.testing.assert_array_equal(levels(got), [LOW, HIGH, HIGH, LOW, LOW, HIGH])
    for t, switched in ((2, True), (3, False), (4, True), (5, False)):
        state = jax.tree.map(lambda x, t=t: x[t - 1], got.states)
        state = map_state(lambda x: x, lambda x: x[0], state)
        other = {path: x[..., ::-1] for path, x in state.codec.codec.q.items()}
        state = state._replace(codec=state.codec._replace(codec=state.codec.codec._replace(q=other)))
        again = run(tx, {"w": grads["w"][t : t + 1]}, "vmap", state)
        assert np.array_equal(again.updates["w"][0], got.updates["w"][t]) == (reset and switched)


@jax.numpy_dtype_promotion("standard")  # which optax needs
def test_training_switches_without_compiling_anew():
    """In a chain, by the optimiser's schedule: high from the second check on, low when the rate falls."""
    schedule = optax.piecewise_constant_schedule(0.05, {5: 0.1})
    codec = gc.accordion(gc.powersgd(3), gc.powersgd(1), interval=2, threshold=5, learning_rate=schedule)
    tx = optax.chain(codec, optax.sgd(schedule, momentum=0.9))
    step, params = gc.simulate(problem.loss_fn, tx, 4), problem.params()
    state, seen = gc.init(tx, params, 4), []
    for batch in problem.batches(8):
        params, state, _ = step(params, state, batch)
        seen.append((int(state[0].codec.level["layer1/kernel"]), gc.wire_bits(state).last))
    assert step._cache_size() == 1
    assert [level for level, _ in seen] == [LOW, LOW, LOW, HIGH, HIGH, LOW, LOW, HIGH]
    sent = [bits for _, bits in seen]
    assert sent[4] < sent[2] == sent[0]
    # The rate falls in step 5, whose check is overruled by that.
    assert sent[7] == sent[5] == sent[3] == sent[1]
    assert sent[6] == sent[2]


def test_all_settings_come_from_the_codecs():
    low, high = (gc.topk(fraction, axis_name="node", min_size=50) for fraction in (0.5, 0.1))
    tx = gc.accordion(low, high, interval=1)
    assert tx.settings.axis_name == "node"
    compressed = tx.init({"large": jnp.zeros((8, 8)), "small": jnp.zeros((7, 7))}).residual.value
    assert list(compressed) == ["large"]
