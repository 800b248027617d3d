"""per_layer: which codec a leaf has, that it does what it does alone, and in how many messages."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax.compressor import compressor_states
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import program, run
from gradcomp_jax.testing.laws import at, require_conserved
from tests import problem, slices
from tests.test_across_state import assert_nothing_lost, trained
from tests.test_refusals import refuses

SHAPES = {"a": (64, 24), "b": (40, 32), "bias": (18,), "conv": (3, 3, 8, 16)}
GRADS = trees.noise(SHAPES, 0, (6, 4))


def every_leaf(path, leaf):
    return leaf.ndim > 1


qsgd = functools.partial(gc.qsgd, min_size=0, bucket_size=32, aggregate="gather")
gradiveq = functools.partial(
    gc.gradiveq, 24, train_steps=3, compress_steps=4, warmup_steps=0, error_feedback=True, compress=every_leaf
)
# Two strengths of a codec; whether it draws random numbers, which are other ones beside another leaf.
STRENGTHS = {
    "powersgd": (gc.powersgd(1), gc.powersgd(3), False),
    "topk": (gc.topk(0.3, aggregate="gather"), gc.topk(0.1, aggregate="gather"), False),
    "topk-shuffle": (gc.topk(0.3, aggregate="shuffle"), gc.topk(0.1, aggregate="shuffle"), False),
    "randomk": (gc.randomk(0.2), gc.randomk(0.05), False),
    "adaptive": (gc.adaptive(8, sample=False), gc.adaptive(16, sample=False), False),
    "gradiveq": (gradiveq(ratio=12), gradiveq(ratio=24), False),
    "qsgd": (qsgd(8), qsgd(2), True),
    "qsgd-ring": (qsgd(8, aggregate="ring"), qsgd(2, aggregate="ring"), True),
}


def sent(got):
    return [gc.wire_bits(at(got.states, t)).last for t in range(len(got.updates["a"]))]


def part(*paths):
    return {path: GRADS[path] for path in paths}


@pytest.mark.parametrize("id", STRENGTHS)
class TestOneCodec:
    """Two strengths of it, and leaves that are sent dense."""

    def test_each_leaf_is_as_by_the_codec_alone(self, id):
        one, other, draws = STRENGTHS[id]
        tx = gc.per_layer({"^b$": other, "bias": gc.none(), "": one})
        assert isinstance(tx, gc.Compressor)
        got = run(tx, GRADS, "checked")
        alone = run(one, part("a", "conv"), "checked"), run(other, part("b"), "checked")
        for path, there in (("a", alone[0]), ("conv", alone[0]), ("b", alone[1])):
            if not draws:
                np.testing.assert_allclose(got.updates[path], there.updates[path], atol=1e-5)
                assert got.states.residual.value.keys() == {"a", "b", "conv"}
        np.testing.assert_allclose(got.updates["bias"][:, 0], GRADS["bias"].mean(1), atol=1e-6)
        if one.settings.error_feedback:
            require_conserved(tx, GRADS, got, 1e-4)

    def test_bits_and_messages_are_those_of_one_codec(self, id):
        one, other, _ = STRENGTHS[id]
        tx = gc.per_layer({"^b$": other, "": one})
        grads = part("a", "b", "conv")
        compiled, _ = program(tx, grads, "checked")
        collectives = gc.collective_bytes(compiled)
        got = run(tx, grads, "checked")
        messages = gc.collective_bytes(program(one, grads, "checked")[0])
        assert [(c.kind, c.branch) for c in collectives] == [(c.kind, c.branch) for c in messages]
        if id != "gradiveq":  # whose conditionals have several
            assert set(sent(got)) == {8 * sum(c.ring_bytes for c in collectives)}
        if one.settings.aggregate != "shuffle" and "ring" not in id:  # where what is filled up is another
            apart = [run(tx, x, "checked") for tx, x in ((one, part("a", "conv")), (other, part("b")))]
            by_parts = [[gc.wire_bits(at(x.states, t)).last for t in range(6)] for x in apart]
            assert sent(got) == [sum(each) for each in zip(*by_parts, strict=True)]


class TestFamilies:
    def test_none_rides_with_what_is_summed(self):
        by_path = {"^a": gc.topk(0.1), "bias": gc.none(), "": gc.powersgd(2)}
        tx, params = gc.per_layer(by_path), trees.zeros(SHAPES)
        assert not isinstance(tx, gc.Compressor)
        states = compressor_states(tx.init(params))
        assert [list(state.residual.value) for state in states] == [["a"], ["b", "conv"]]
        # As without the bias: numbers that are summed take it along.
        got, want = (run(tx, x, "checked") for tx, x in ((tx, GRADS), (gc.powersgd(2), part("b", "bias", "conv"))))
        for path in ("b", "bias", "conv"):
            np.testing.assert_allclose(got.updates[path], want.updates[path], atol=1e-5)
        kinds = sorted(c.kind for c in gc.collective_bytes(program(tx, GRADS, "checked")[0]))
        assert kinds == ["all-gather", "all-reduce", "all-reduce", "all-to-all"]

    @pytest.mark.parametrize(
        "dense", [gc.none(dense_dtype="bfloat16"), gc.none(aggregate="ring"), gc.none(error_feedback=True)]
    )
    def test_none_of_other_settings_goes_by_itself(self, dense):
        tx = gc.per_layer({"bias": dense, "": gc.powersgd(2)})
        assert len(compressor_states(tx.init(trees.zeros(SHAPES)))) == 2

    def test_other_settings_make_another_family(self):
        tx = gc.per_layer({"^a": gc.powersgd(2, error_feedback=False), "bias": gc.none(), "": gc.powersgd(2)})
        states = compressor_states(tx.init(trees.zeros(SHAPES)))
        assert [list(state.residual.value) for state in states] == [[], ["b", "conv"]]

    def test_codecs_own_choices_hold(self):
        tx = gc.per_layer({"a": gc.powersgd(2, min_size=1100), "": gc.powersgd(3, min_size=1100)})
        assert list(tx.init(trees.zeros(SHAPES)).residual.value) == ["a", "b", "conv"]
        tx = gc.per_layer({"a|bias": gc.topk(0.1, compress=every_leaf), "": gc.topk(0.2, compress=every_leaf)})
        assert list(tx.init(trees.zeros(SHAPES)).residual.value) == ["a", "b", "conv"]
        assert list(gc.per_layer({"": gc.powersgd(2)}).init(trees.zeros(SHAPES)).residual.value) == ["a", "b", "conv"]
        assert gc.per_layer({"": gc.none()}).init(trees.zeros(SHAPES)).residual.value == {}

    def test_codecs_of_one_strength(self):
        tx = gc.per_layer({"^b$": gc.none(), "": gc.onebit()})
        assert list(tx.init(trees.zeros(SHAPES)).residual.value) == ["a", "conv"]
        require_conserved(tx, GRADS, run(tx, GRADS, "vmap"), 1e-4)

    def test_as_values(self):
        by_path = {"a": gc.topk(0.3), "bias": gc.none(), "": gc.topk(0.1)}
        assert gc.per_layer(by_path) == gc.per_layer(dict(by_path))
        assert gc.per_layer(by_path) != gc.per_layer({**by_path, "": gc.topk(0.2)})
        assert pickle.loads(pickle.dumps(gc.per_layer(by_path))) == gc.per_layer(by_path)


ONE = {"layer2/k": gc.powersgd(3), "bias": gc.none(), "": gc.powersgd(1)}
TWO = {"layer2/k": gc.topk(0.1), "bias": gc.none(), "": gc.scheduled([gc.powersgd(1), gc.powersgd(2)], lambda n: n)}


class TestTraining:
    """In a chain, by every function that takes an optimiser."""

    @pytest.mark.parametrize("by_path", [ONE, TWO], ids=["one", "two"])
    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def test_steps_state_and_flush(self, by_path):
        tx, params, mesh = optax.chain(gc.per_layer(by_path), optax.sgd(1e-3)), problem.params(), gc.make_mesh(4)
        simulated, state = (params, gc.init(tx, params, 4)), gc.init(tx, params, mesh)
        chex.assert_trees_all_equal_structs(gc.state_specs(tx, params), state)
        step, twin = gc.train_step(problem.loss_fn, tx, mesh), gc.simulate(problem.loss_fn, tx, 4)
        for batch in problem.batches(3):
            params, state, _ = step(params, state, batch)
            simulated = twin(*simulated, batch)[:2]
        chex.assert_trees_all_close(*jax.device_get(((params, state), simulated)), atol=1e-5)
        halved = gc.resize_workers(state, 2)
        flushed, after = gc.flush(tx, *jax.device_get((params, halved)), 2)
        assert not any(jnp.any(x != 0) for one in compressor_states(after) for x in jax.tree.leaves(one.residual))
        for one in compressor_states(state):
            for path, owed in one.residual.value.items():
                layer, name = path.split("/")
                moved = np.asarray(params[layer][name]) - np.asarray(flushed[layer][name])
                np.testing.assert_allclose(moved, 1e-3 * np.asarray(owed).mean(0), atol=1e-6)

    def test_a_step_that_is_not_finite_in_one_family_is_none_at_all(self):
        tx, params, mesh = optax.chain(gc.per_layer(TWO), optax.sgd(0.1)), problem.params(), gc.make_mesh(2)
        (batch,) = problem.batches(1)
        loss_fn = lambda p, b: problem.loss_fn(p, b) + jnp.sum(p["layer2"]["kernel"]) * jnp.sum(b["poison"])  # noqa: E731
        state = gc.init(tx, params, mesh)
        poisoned = {**batch, "poison": np.where(np.arange(32) == 20, np.inf, 0).astype(np.float32)}
        after, kept, _ = gc.train_step(loss_fn, tx, mesh)(params, state, poisoned)
        chex.assert_trees_all_equal(*jax.device_get((after, params)))
        residuals = [[one.residual for one in compressor_states(x)] for x in (state, kept)]
        chex.assert_trees_all_equal(*jax.device_get(residuals))
        assert gc.skipped(kept) == 1

    def test_one_family_is_delayed_and_goes_across_slices(self):
        tx = gc.per_layer({"small": gc.topk(0.3), "gain|bias": gc.none(), "": gc.topk(0.1)})
        around = {"small": gc.topk(0.3), "gain|bias": gc.none(axis_name="node"), "": gc.topk(0.1)}
        around = {pattern: gc.across(codec) for pattern, codec in around.items()}
        assert gc.across(tx) == gc.per_layer(around)
        late = optax.chain(gc.delayed(gc.across(tx)), optax.sgd(1.0))
        assert_nothing_lost(*trained(late, slices.mesh_of(), 3), 2)

    def test_gradiveq_across_slices(self):
        tx = gc.per_layer({"small": gradiveq(ratio=12), "": gradiveq(ratio=8, train_steps=4)})
        assert len(compressor_states(tx.init(trees.zeros({"small": (24, 24), "w": (24, 24)})))) == 2
        tx = gc.across(gc.per_layer({"small": gradiveq(ratio=12), "": gradiveq(ratio=24)}))
        assert_nothing_lost(*trained(optax.chain(tx, optax.sgd(1.0)), slices.mesh_of(), 5), 5)


REFUSED = {
    "no dict": (gc.powersgd(2), "must be a dict of patterns and codecs"),
    "empty": ({}, "codecs={} must be a dict of patterns and codecs"),
    "no string": ({3: gc.none()}, "pattern 3 must be a string"),
    "no expression": ({"(": gc.none()}, "pattern '(' is no regular expression: missing ), unterminated"),
    "no codec": ({"": optax.sgd(0.1)}, "the value of pattern '' is GradientTransformation"),
    "uncalled": ({"a": gc.topk}, "the value of pattern 'a' is <function topk"),
}
UNMATCHED = {
    "no pattern": ({"^a": gc.powersgd(2), "b": gc.none()}, ["no pattern matches leaf 'conv', there are '^a', 'b'"]),
    "no leaf": ({"embed": gc.none(), "": gc.powersgd(2)}, ["pattern 'embed' decides about no leaf", "in no path"]),
    "behind": (
        {"b": gc.none(), "bias": gc.none(axis_name="x"), "": gc.powersgd(2)},
        ["pattern 'bias' decides about no leaf", "for leaf 'bias' the earlier 'b' does: put 'bias' before that"],
    ),
    "of two families": ({"a": gc.topk(), "b": gc.powersgd(2)}, ["no pattern matches leaf 'conv'", "or '' as the last"]),
    "no leaf of two": ({"a": gc.topk(), "x": gc.none(), "": gc.powersgd(2)}, ["pattern 'x' decides about no leaf"]),
}


@pytest.mark.parametrize("id", REFUSED)
def test_what_is_no_dict_of_codecs_is_refused(id):
    codecs, words = REFUSED[id]
    with refuses(words):
        gc.per_layer(codecs)


@pytest.mark.parametrize("id", UNMATCHED)
def test_leaves_and_patterns_without_each_other_are_refused(id):
    codecs, words = UNMATCHED[id]
    with refuses(*words):
        gc.per_layer(codecs).init(trees.zeros(SHAPES))


def test_the_rest_may_be_nothing():
    tx = gc.per_layer({"a|b|conv": gc.powersgd(2), "": gc.none()})
    tx.init(trees.zeros(SHAPES))
    assert tx.init({}).residual.value == {}
    gc.per_layer({"a": gc.topk(), "": gc.powersgd(2)}).init({})
