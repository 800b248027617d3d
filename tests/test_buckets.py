"""`buckets`: the exchange in parts, each with messages of its own."""

import functools
import re
from typing import ClassVar

import chex
import jax
import numpy as np
import pytest

import gradcomp_jax as gc
from gradcomp_jax.exchange.plan import in_buckets
from gradcomp_jax.testing import contexts, trees
from gradcomp_jax.testing.contexts import run
from gradcomp_jax.testing.laws import require_conserved
from tests import slices
from tests.table import BY_ID

STEPS, WORKERS = 6, 4
TREE = {"a": (32, 16), "b": {"kernel": (4, 4, 8, 16), "bias": (16,)}, "gain": ()}
GRADS = trees.noise(TREE, 1, (STEPS, WORKERS))


@functools.cache
def make(id, buckets):
    """A row's codec, of which each leaf of two axes is compressed."""
    return BY_ID[id].make(compress=lambda path, leaf: leaf.ndim > 1, buckets=buckets)


class TestOrder:
    SIZES: ClassVar = {f"layer_{i}": 10 for i in (1, 2, 9, 10, 11, 20)}

    def test_the_last_layer_is_sent_first_by_its_number(self):
        assert in_buckets(self.SIZES, 3) == (("layer_11", "layer_20"), ("layer_9", "layer_10"), ("layer_1", "layer_2"))
        assert in_buckets(self.SIZES, 100) == tuple((f"layer_{i}",) for i in (20, 11, 10, 9, 2, 1))

    def test_of_about_one_size(self):
        sizes = {"a": 100, "b": 1, "c": 1, "d": 98}
        assert in_buckets(sizes, 2) == (("b", "c", "d"), ("a",))
        assert in_buckets(sizes, 1) == (("a", "b", "c", "d"),)
        assert in_buckets({}, 3) == ((),)

    def test_by_a_function(self):
        got = in_buckets({"a": 1, "b": 1, "c": 1}, {"a": np.int64(5), "b": -1, "c": 5}.get)
        assert got == (("b",), ("a", "c"))

    @pytest.mark.parametrize("given", [0, -1, 1.5, True, "2"], ids=str)
    def test_what_is_no_number_of_buckets(self, given):
        with pytest.raises(ValueError, match="buckets="):
            gc.topk(buckets=given)

    @pytest.mark.parametrize("given", [1.0, None, True, "first"], ids=str)
    def test_a_function_that_gives_none(self, given):
        with pytest.raises(ValueError, match=r"buckets= returned .* for leaf 'a', it must return a whole number"):
            gc.topk(0.1, buckets=lambda path: given).init(trees.zeros({"a": (8, 8)}))


EXACT = ["none", "cast-e4m3", "powersgd-4", "gradiveq-ef", "onebit-mean", "adaptive", "topk-shuffle", "accordion-topk"]
# What draws, and what joins the leaves of a bucket to one stream.
OTHERS = ["qsgd-4-ef", "qsgd-elias-shuffle", "randomk", "powersgd-2-qsgd", "topk-chunks-shuffle", "float4-ef"]


@functools.cache
def seen(id, buckets):
    return run(make(id, buckets), GRADS, "vmap")


def bits(got):
    return np.array([gc.wire_bits(slices.at(got.states, t)).last for t in range(STEPS)])


class TestNumbers:
    @pytest.mark.parametrize("id", EXACT)
    def test_what_draws_nothing_gives_the_same_bits(self, id):
        got, want = seen(id, 3), seen(id, 1)
        slices.assert_same(id, (got.updates, got.states.residual), (want.updates, want.states.residual))

    @pytest.mark.parametrize("id", OTHERS)
    def test_what_gives_others_conserves(self, id):
        require_conserved(make(id, 3), GRADS, seen(id, 3), 1e-4)

    @pytest.mark.parametrize("id", [*EXACT, *OTHERS])
    def test_as_much_is_sent(self, id):
        """But for what fills shards up, and is asked beforehand."""
        np.testing.assert_allclose(bits(seen(id, 3)), bits(seen(id, 1)), rtol=0.02, atol=2 * 2 * 48)

    @pytest.mark.parametrize("id", ["qsgd-4-ef", "powersgd-2-qsgd"])
    def test_it_goes_on_with_the_same_numbers(self, id):
        tx, want = make(id, 3), seen(id, 3)
        begun = slices.at(want.states, 2)
        begun = contexts.map_state(lambda x: x, lambda x: x[0], begun)
        got = run(tx, jax.tree.map(lambda x: x[3:], GRADS), "vmap", begun)
        chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x[3:], want))

    def test_buckets_draw_numbers_of_their_own(self):
        grads = dict.fromkeys(("a", "b"), GRADS["a"])
        for codec in (gc.qsgd, gc.randomk):
            got = run(codec(min_size=0, buckets=2), grads, "vmap").updates
            assert (got["a"] != got["b"]).any()

    @pytest.mark.parametrize("id", [*EXACT, *OTHERS])
    def test_what_is_not_finite_in_one_skips_all(self, id):
        for path, value in (("a", np.nan), ("gain", np.inf)):
            grads = jax.tree.map(np.copy, GRADS)
            grads[path][2, 1] = value
            got = run(make(id, 3), grads, "vmap")
            assert not any(x[2].any() for x in jax.tree.leaves(got.updates))
            np.testing.assert_array_equal(got.states.skipped[:, 0], [0, 0, 1, 1, 1, 1])
            before, after = (slices.at(got.states._replace(wire=None, skipped=None), t) for t in (1, 2))
            chex.assert_trees_all_equal(after, before)


class TestLengths:
    def code_bits(self, id, buckets):
        states = seen(id, buckets).states
        return [gc.code_bits(slices.at(states, t)) for t in range(STEPS)]

    def test_of_codes_add_up(self):
        assert self.code_bits("adaptive", 3) == self.code_bits("adaptive", 1)

    def test_of_what_rounds_at_random_nearly(self):
        np.testing.assert_allclose(*(self.code_bits("qsgd-elias-shuffle", n) for n in (3, 1)), rtol=0.1)


class TestMessages:
    @pytest.mark.parametrize("id", ["powersgd-4", "qsgd-4"])
    def test_each_bucket_has_its_own(self, id):
        """Of four leaves each by itself; those that are dense need one round. As they are given to the compiler."""

        def messages(buckets):
            grads = slices.at(GRADS, 0)
            state = contexts.first_state(make(id, buckets), grads)
            step, _, _ = contexts.sharded(make(id, buckets), grads, state, check_vma=True)
            return len(re.findall(r"stablehlo\.all_(?:reduce|gather)", jax.jit(step).lower(grads, state).as_text()))

        assert (messages(1), messages(100)) == ((2, 6) if id == "powersgd-4" else (2, 4))


class TestAcross:
    @pytest.mark.parametrize("id", ["powersgd-4", "topk-shuffle", "gradiveq-ef"])
    def test_slices(self, id):
        grads = jax.tree.map(lambda x: x.reshape(STEPS, 2, 2, *x.shape[2:]), GRADS)
        got, want = (slices.run(gc.across(make(id, buckets)), grads) for buckets in (3, 1))
        chex.assert_trees_all_close(got.updates, want.updates, atol=1e-5)
        means = jax.tree.map(lambda x: x.mean(2), grads)
        require_conserved(make(id, 3), means, slices.of_slices(make(id, 3), got, grads), 1e-4)
