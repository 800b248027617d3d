"""The laws that every codec obeys, over the table of codecs."""

import ast
import collections
import dataclasses
import functools
import itertools
import math
import pathlib
from typing import Any, ClassVar, NamedTuple

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradcomp_jax as gc
from gradcomp_jax.coder import Coding
from gradcomp_jax.compressor import compressor
from gradcomp_jax.contract import Codec, Result, Say, total
from gradcomp_jax.exchange.plan import Settings, flatten, plan
from gradcomp_jax.exchange.ways import APART
from gradcomp_jax.testing import contexts, trees
from gradcomp_jax.testing.contexts import CONTEXTS, run
from gradcomp_jax.testing.exchanges import first_state, marked, recorded, steps_of
from gradcomp_jax.testing.laws import (
    at,
    conserves,
    possible,
    require_conserved,
    require_skipped_or_right,
    step_differs,
)
from gradcomp_jax.testing.recorder import sent
from tests import networks
from tests.marks import every_context
from tests.table import BY_ID, EACH, ROWS

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
each_codec = pytest.mark.parametrize("row", EACH, ids=lambda row: row.id)
STEPS, WORKERS = 8, 4
# Compressors are compared by identity in the cache of compiled programs, so each row is made once.
TX = {row.id: row.make() for row in ROWS}
GRADS = trees.noise(trees.MIXED, 1, (STEPS, WORKERS))
TWO = {"a": (40, 24), "b": (72, 16)}
RIDING = 3  # floats that ride beside those, as dense leaves do


every_phase = pytest.mark.parametrize(
    ("row", "step"), [pytest.param(row, step, id=f"{row.id}-{step}") for row in ROWS for step in row.phases]
)


@functools.cache
def run_once(id, context):
    """What most laws look at."""
    return run(TX[id], GRADS, context)


def last(tree):
    return at(tree, -1)


class TestConservation:
    """Law 1."""

    @every_phase
    def test_own_averages_to_mean(self, row, step):
        got = exchanges(row.id)[step]
        own = jax.tree.map(lambda x: x.astype(np.float64).mean(0), got.own)
        chex.assert_trees_all_close(own, at(got.mean, 0), atol=1e-5, rtol=0)

    @every_context
    @every_row
    def test_applied_and_residuals_hold_all_gradients(self, row, context):
        if conserves(TX[row.id]):
            require_conserved(TX[row.id], GRADS, run_once(row.id, context), 2e-5 * STEPS)

    @hypothesis.given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1.0, 1e6]))
    @each_codec
    def test_whatever_the_values(self, row, seed, scale):
        grads = jax.tree.map(lambda x: np.float32(scale) * x, trees.noise(trees.MIXED, seed, (STEPS, WORKERS)))
        got = run(TX[row.id], grads, "vmap")
        if conserves(TX[row.id]):
            require_conserved(TX[row.id], grads, got, 5e-5 * STEPS * scale)

    @pytest.mark.parametrize(
        "id", [row.id for row in EACH if "ef" in row.id or "powersgd" in row.id] + ["powersgd-2-ef21"]
    )
    def test_rounding_to_16_bits_is_owed_too(self, id):
        dtypes = {"a": jnp.bfloat16, "b": jnp.float16}
        grads = jax.tree.map(np.asarray, trees.noise(trees.MATRICES, 11, (100, 2)), dtypes)
        got = run(TX[id], grads, "checked")
        assert {path: x.dtype for path, x in got.updates.items()} == dtypes
        require_conserved(TX[id], grads, got, 1e-3)

    def test_float16_saturates_and_owes_the_rest(self):
        grads = {"w": np.full((40, 2, 40, 24), 20_000, np.float16)}
        grads["w"][:, :, ::2] *= -1
        got = run(TX["powersgd-1"], grads, "vmap")
        assert np.isfinite(got.updates["w"]).all()
        np.testing.assert_array_equal(got.states.skipped, 0)
        require_conserved(TX["powersgd-1"], grads, got, 2.0)


class TestAgreement:
    """Law 2."""

    @every_context
    @every_row
    def test_all_workers_apply_the_same_bits(self, row, context):
        got = run_once(row.id, context)
        replicated = contexts.map_state(lambda _: None, lambda x: x, got.states)
        for leaf in jax.tree.leaves((got.updates, replicated)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1], leaf.shape))

    @every_row
    def test_residuals_differ(self, row):
        for leaf in jax.tree.leaves(run_once(row.id, "checked").states.residual):
            assert row.id == "none" or np.abs(leaf[-1, 0] - leaf[-1, 1]).max() > 1e-3

    def test_qsgd_rounds_by_each_workers_own_numbers(self):
        same = jax.tree.map(lambda x: np.broadcast_to(x[:, :1], x.shape), GRADS)
        got = run(TX["qsgd-4-ef"], same, "checked")
        for leaf in jax.tree.leaves(got.states.residual):
            assert np.abs(leaf[-1, 0] - leaf[-1, 1]).max() > 1e-3

    def test_qsgd_rounds_by_other_numbers_in_every_step(self):
        same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), GRADS)
        updates = run(TX["qsgd-4"], same, "vmap").updates["conv"]
        assert all((updates[i] != updates[j]).any() for i in range(STEPS) for j in range(i))


class TestLinearity:
    """Law 3."""

    @pytest.mark.parametrize("row", [row for row in ROWS if row.linear], ids=lambda row: row.id)
    def test_many_workers_equal_one_with_the_mean(self, row):
        with jax.enable_x64(True):
            tx = row.make()
            grads = trees.noise(trees.MATRICES, 2, (12, WORKERS), np.float64)
            mean = jax.tree.map(lambda x: x.mean(1, keepdims=True), grads)
            many, one = run(tx, grads, "vmap"), run(tx, mean, "vmap")
            assert jax.tree.leaves(many.updates)[0].dtype == np.float64
            first = jax.tree.map(lambda x: x[:, :1], many.updates)
            chex.assert_trees_all_close(first, one.updates, atol=1e-12, rtol=0)


class TestContextsAgree:
    """Law 4, in one process."""

    @every_row
    def test_numbers_do_not_depend_on_the_context(self, row):
        reference = run_once(row.id, "vmap")
        for context in CONTEXTS[1:]:
            got = run_once(row.id, context)
            chex.assert_trees_all_equal(got.states.wire, reference.states.wire)
            if rounds_sums(TX[row.id].codec):
                apart = [step_differs(TX[row.id], GRADS, context, reference, t) for t in range(STEPS)]
                assert np.count_nonzero(apart) <= 1  # for one code that was rounded the other way, of thousands
                assert max(apart) < 0.05
            else:
                # Some columns of PowerSGD's Q exceed 2, hence the relative part.
                chex.assert_trees_all_close(got, reference, atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize(("workers", "context"), [(1, "vmap"), (2, "checked"), (3, "pmap"), (8, "checked")])
    @every_row
    def test_any_number_of_workers(self, row, workers, context):
        grads = noise_of(workers)
        got = run(TX[row.id], grads, context)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
        if workers == 1:
            assert gc.wire_bits(last(got.states)) == (0, 0)
        if conserves(TX[row.id]):
            require_conserved(TX[row.id], grads, got, 1e-4)


def rounds_sums(codec):
    """Whether it rounds sums at random: one whose last bits differ, between two contexts, may go the other way."""
    codec = getattr(codec, "inner", codec)  # of accordion
    computed = not isinstance(codec, Coding) or codec.transform is not None
    return computed and codec.coder is not None and codec.coder.draws


def noise_of(workers):
    return trees.noise(trees.SMALL, 3, (STEPS, workers))


NETWORKS = {
    "resnet18": networks.resnet18,
    "resnet18-shapes": networks.resnet18_shapes_once,
    "transformer": functools.partial(networks.transformer, 2),
    "gpt2": networks.transformer,
}


class TestBitsAreTrue:
    """Law 5."""

    @pytest.mark.parametrize("workers", [2, WORKERS, 8])
    @every_row
    def test_declared_bits_are_those_of_the_compiled_collectives(self, row, workers):
        grads = GRADS if workers == WORKERS else noise_of(workers)  # two matrices, or one
        compiled, _ = contexts.program(TX[row.id], grads, "checked")
        collectives = gc.collective_bytes(compiled)
        bits = {8 * sent for sent in possible(collectives, lambda c: c.ring_bytes, 0)}
        states = run(TX[row.id], grads, "checked").states.wire
        declared = [gc.wire_bits(at(states, t)) for t in range(STEPS)]
        assert {bits.last for bits in declared} <= bits
        assert [bits.total for bits in declared] == list(itertools.accumulate(bits.last for bits in declared))
        # In each phase the branch taken is another.
        assert len({declared[step].last for step in row.phases}) == len({bits.last for bits in declared})
        assert len({bits.last for bits in declared}) == row.amounts
        # And messages: in each round one, of one operand.
        assert all(c.operands == (workers if c.kind == "all-to-all" else 1) for c in collectives)
        kinds = {tuple(sorted(kinds)) for kinds in possible(collectives, lambda c: (c.kind,), ())}
        name = "mixed" if workers == WORKERS else "small"
        expected = {tuple(sorted(row.kinds(step, name, workers))) for step in row.phases}
        assert expected <= kinds
        assert max(map(len, kinds)) == max(map(len, expected))

    @pytest.mark.parametrize("workers", [2, WORKERS, 8])
    @every_row
    def test_described_bits_are_those_declared(self, row, workers):
        """Those of each kind of step, without any; of leaves and the rest."""
        grads = GRADS if workers == WORKERS else noise_of(workers)
        told = gc.describe(TX[row.id], at(at(grads, 0), 0), workers)
        (part,) = told.parts
        described = {8 * sent for sent in part.kinds.values()}
        states = run(TX[row.id], grads, "checked").states.wire
        declared = {gc.wire_bits(at(states, t)).last: t for t in range(STEPS)}
        if "codes fit" in part.kinds:
            assert declared.keys() < described
        elif "compressed, by the fewest numbers" in part.kinds:  # of each leaf as many as its basis needs
            between = declared.keys() - described
            assert all(min(described) < bits < max(described) for bits in between)
            assert len(between) < len(declared) == 3
        else:
            assert declared.keys() == described
        assert told.totals.sent == part.sent == part.kinds[part.kind]
        assert math.isclose(sum(leaf.sent for leaf in told.rows) + part.flags + part.packing, part.sent)
        # All but what fills up shards: of codes a unit each, and of what rides a float.
        assert abs(part.packing) <= (2 * (workers - 1) * (8 * 8 + 4 + 4) if part.way in ("shuffle", "ring") else 1)
        if 8 * part.sent in declared:
            tree = "mixed" if workers == WORKERS else "small"
            phase = max(step for step in row.phases if step <= declared[8 * part.sent])
            kinds = collections.Counter(row.kinds(phase, tree, workers))
            kinds["collective-permute"] *= workers - 1
            assert told.totals.messages == +kinds

    @pytest.mark.parametrize("network", ["resnet18", "transformer"])
    @every_phase
    def test_a_round_is_one_message(self, row, step, network):
        """Whatever the number of leaves; all-to-all counts as one."""
        # All of ResNet-18 for each algorithm: to trace a codec on it takes some seconds.
        network = network if row in EACH or network == "transformer" else "resnet18-shapes"
        given, shapes = given_on(row.id, network)
        messages = in_step(row, step, given)
        assert tuple(message.kind for message in messages) == row.kinds(step, network)
        large = sum(4 * math.prod(shape) > APART for shape in shapes) if step in row.whole else 0
        assert len(jax.tree.leaves(messages)) == len(messages) + large

    @pytest.mark.parametrize("id", ["powersgd-4", "gradiveq-ring", "qsgd-4-shuffle"])
    def test_a_round_of_148_leaves_is_one_message(self, id):
        given, shapes = given_on(id, "gpt2")
        assert len(shapes) == 148
        for step in BY_ID[id].phases:
            messages = in_step(BY_ID[id], step, given)
            assert tuple(message.kind for message in messages) == BY_ID[id].kinds(step, "gpt2")
            assert len(jax.tree.leaves(messages)) == len(messages)

    @every_row
    def test_totals_add_up(self, row):
        counts = run_once(row.id, "vmap").states.wire
        bits = [gc.wire_bits(at(counts, t)) for t in range(STEPS)]
        assert [b.total for b in bits] == list(itertools.accumulate(b.last for b in bits))


class TestStateIsStable:
    """Law 6."""

    @every_row
    def test_types_shapes_and_structure_do_not_change(self, row):
        params = trees.zeros(trees.SMALL)
        state = gc.init(TX[row.id], params, 1)
        after = last(run(TX[row.id], noise_of(1), "vmap").states)
        chex.assert_trees_all_equal_structs(state, after)
        local = jax.eval_shape(TX[row.id].init, params)
        one = jax.tree.map(lambda x: x[0], after)
        chex.assert_trees_all_equal_shapes_and_dtypes(local, one)

    @every_row
    def test_checked_types_pass_through_scan(self, row):
        """What it computes there is that of a step: `run` scans where types are unchecked."""
        grads = jax.tree.map(lambda x: x[0], GRADS)
        state = contexts.first_state(TX[row.id], grads)
        scan, _, _ = contexts.sharded(TX[row.id], GRADS, state, check_vma=True, scan=True)
        jax.eval_shape(scan, GRADS, state)

    @every_row
    def test_types_are_those_of_64_bits_too(self, row):
        """With jax_enable_x64, whole numbers and zeros that nobody gave a type would have 64 bits."""
        with jax.enable_x64(True):
            grads = trees.noise(trees.SMALL, 13, (WORKERS,), np.float64)
            state = contexts.first_state(TX[row.id], grads)
            axes = contexts.worker_axes(state)
            update = jax.vmap(TX[row.id].update, in_axes=(0, axes), out_axes=(0, axes), axis_name="data")
            updates, after = jax.eval_shape(update, grads, state)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (grads, state))

    @pytest.mark.parametrize("id", ["randomblock", "powersgd-4", "accordion-randomblock"])
    def test_a_bare_array(self, id):
        """Whose path is no name."""
        tx = {
            "accordion-randomblock": gc.accordion(gc.randomblock(0.5), gc.randomblock(0.25), interval=2),
            **TX,
        }[id]
        grads = trees.noise((16, 24), 14, (4, 2))
        require_conserved(tx, grads, run(tx, grads, "vmap"), 1e-5)

    @each_codec
    def test_an_empty_tree(self, row):
        tx = TX[row.id]
        for tree in ({}, {"nothing": None, "more": []}):
            worker = jax.vmap(lambda _, tree=tree: tx.update(tree, tx.init(tree)), axis_name="data")
            updates, state = jax.jit(worker)(np.zeros(3))
            chex.assert_trees_all_equal_structs(updates, tree)
            assert gc.wire_bits(state) == (0, 0)

    @each_codec
    def test_leaves_without_elements(self, row):
        """Several, so that they travel as pieces of a buffer that has none."""
        grads = trees.noise({"w": (64, 32), "a": (0,), "b": (0, 3)}, 15, (WORKERS,))
        state = contexts.first_state(TX[row.id], grads)
        axes = contexts.worker_axes(state)
        update = jax.vmap(TX[row.id].update, in_axes=(0, axes), out_axes=(0, axes), axis_name="data")
        updates, after = jax.eval_shape(update, grads, state)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (grads, state))

    # Donation and Orbax: test_checkpoint.py, for each codec.


# The first step, and one of every phase of every codec.
BAD = [
    (value, step, worker)
    for value, step in ((np.nan, 0), (np.inf, 2), (np.nan, 3), (-np.inf, 4), (np.nan, 5))
    for worker in (1, slice(None))
]
GOOD = trees.noise(trees.MIXED, 6, (STEPS, WORKERS))


@functools.cache
def without(id, step):
    """A run in which one step is left out."""
    return run(TX[id], jax.tree.map(lambda x: np.delete(x, step, 0), GOOD), "vmap")


class TestNothingPoisons:
    """Law 7."""

    @pytest.mark.parametrize("leaf", ["kernel", "bias"])
    @every_row
    def test_a_step_that_is_not_finite_never_happened(self, row, leaf):
        """The updates are zero, and all that follows is as if the step were not there."""

        def all_but_counts(got, steps):
            seen = got.updates, got.states._replace(wire=None, skipped=None)
            return jax.tree.map(lambda x: x[steps], seen)

        for value, step, who in BAD:
            bad = jax.tree.map(np.copy, GOOD)
            bad["dense"][leaf][step, who].reshape(-1, 24)[..., 7] = value
            with_bad = run(TX[row.id], bad, "vmap")
            assert not any(x[step].any() for x in jax.tree.leaves(with_bad.updates))
            np.testing.assert_array_equal(with_bad.states.skipped[-1], 1)
            rest, one_less = np.delete(np.arange(STEPS), step), without(row.id, step)
            chex.assert_trees_all_equal(all_but_counts(with_bad, rest), all_but_counts(one_less, slice(None)))

    @every_context
    @each_codec
    def test_in_every_context(self, row, context):
        bad = jax.tree.map(np.copy, GRADS)
        bad["conv"][3, 2, 1, 1, 3, 5] = np.nan
        got = run(TX[row.id], bad, context)
        np.testing.assert_array_equal(got.states.skipped, [[i >= 3] * WORKERS for i in range(STEPS)])
        assert not any(x[3].any() for x in jax.tree.leaves(got.updates))
        before, after = (at(got.states, t) for t in (2, 3))
        chex.assert_trees_all_equal(after._replace(skipped=None, wire=None), before._replace(skipped=None, wire=None))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        sent = [gc.wire_bits(at(got.states, t)) for t in range(4)]
        assert sent[3].total == sum(bits.last for bits in sent)  # what was skipped was sent
        assert sent[3].last > 0

    @every_row
    def test_zero_gradients(self, row):
        grads = jax.tree.map(np.copy, GRADS)
        for leaf in jax.tree.leaves(grads):
            leaf[:2] = 0
        got = run(TX[row.id], grads, "vmap")
        assert not any(x[:2].any() for x in jax.tree.leaves(got.updates))
        assert all(np.isfinite(x).all() and x[2:].any() for x in jax.tree.leaves(got.updates))
        np.testing.assert_array_equal(got.states.skipped, 0)

    @each_codec
    def test_tiny_leaves(self, row):
        tx = row.make(allow_dense=True)
        grads = trees.noise({"scalar": (), "one": (1,), "dot": (1, 1), "row": (1, 5), "column": (5, 1)}, 7, (2, 3))
        got = run(tx, grads, "vmap")
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        if conserves(tx):
            require_conserved(tx, grads, got, 1e-5)
        one = jax.tree.map(lambda x: x[0, 0], grads)
        dense = [
            path for path, x in one.items() if not (tx.codec.default(path, x) and tx.codec.shrinks(path, x, x.nbytes))
        ]
        # In a stream they have no bytes of their own.
        assert row.id in ("none", "topk-chunks") or {"scalar", "one", "dot"} <= {*dense}
        for path in dense:
            np.testing.assert_allclose(got.updates[path][:, 0], grads[path].mean(1), atol=1e-6)

    @pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30])
    @each_codec
    def test_extreme_magnitudes(self, row, magnitude):
        got = run(TX[row.id], jax.tree.map(lambda x: x * np.float32(magnitude), GRADS), "vmap")
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))

    @pytest.mark.parametrize("power", [2.0**-104, 2.0**90])
    @every_row
    def test_scaled_gradients_are_answered_by_scaled_means(self, row, power):
        """Where nothing comes near the ends of the range: a threshold of some magnitude would be seen."""

        def compressed(got):
            means = {
                path: x for path, x in flatten(got.updates)[0].items() if path.startswith(("conv", "dense/kernel"))
            }
            return means, got.states.residual

        got = run(TX[row.id], jax.tree.map(lambda x: x * np.float32(power), GRADS), "vmap")
        back = 1 if row.id == "signnorm-vote" else 1 / power  # whose mean has no magnitude
        got = jax.tree.map(lambda x: x * np.float32(back), compressed(got))
        chex.assert_trees_all_close(got, compressed(run_once(row.id, "vmap")), atol=1e-5, rtol=1e-6)

    @every_row
    def test_at_the_edge_of_the_range(self, row):
        for magnitude, who in itertools.product([1e20, 1e30, 4e37, 9e37, 1.6e38, 3e38], [slice(None), 1]):
            grads = jax.tree.map(np.copy, GRADS)
            for leaf in jax.tree.leaves(grads):
                leaf[2, who] = np.copysign(np.float32(magnitude), leaf[2, 0])
            assert_skipped_or_right(row, grads)

    @every_row
    def test_a_few_at_the_edge_of_the_range(self, row):
        """An element, or a column, of one worker or of all; among others and among smaller ones."""
        most = np.finfo(np.float32).max
        for magnitude, who, rows in itertools.product([1e25, 1e37, 1.6e38, most], [slice(None), 1], [5, slice(None)]):
            for others in (1, 1e-30):
                grads = jax.tree.map(np.copy, GRADS)
                for leaf in (grads["dense"]["kernel"], grads["conv"].reshape(STEPS, WORKERS, -1, 16)):
                    leaf[2] *= np.float32(others)
                    leaf[2, who, rows, 7] = np.copysign(magnitude, leaf[2, who, rows, 7])
                assert_skipped_or_right(row, grads)

    @every_row
    def test_all_magnitudes_at_once(self, row):
        rng = np.random.default_rng(9)
        for largest in (30, 37, 38.4):
            grads = jax.tree.map(np.copy, GRADS)
            for leaf in jax.tree.leaves(grads):
                leaf[2] = np.copysign(10 ** rng.uniform(-35, largest, leaf[2].shape), leaf[2])
            assert_skipped_or_right(row, grads)

    @pytest.mark.parametrize("workers", [1, 3])
    @each_codec
    def test_at_the_edge_of_the_range_among_few(self, row, workers):
        for magnitude in (1e30, 1e37, 3e38):
            grads = jax.tree.map(np.copy, noise_of(workers))
            for leaf in jax.tree.leaves(grads):
                leaf[2] = np.copysign(np.float32(magnitude), leaf[2])
            assert_skipped_or_right(row, grads)

    @each_codec
    def test_at_the_edges_of_16_bits(self, row):
        """The largest and the smallest numbers there are, of a bfloat16 and a float16 leaf."""
        types = {"a": jnp.bfloat16, "b": jnp.float16}
        for end in ("max", "tiny", "smallest_subnormal"):
            grads = trees.noise(trees.MATRICES, 12, (STEPS, WORKERS))
            ends = {path: float(getattr(jnp.finfo(dtype), end)) for path, dtype in types.items()}
            ends["a"] = max(ends["a"], 1e-30)  # others of bfloat16 are the smallest of float32 too
            for path, leaf in grads.items():
                leaf[2] = np.copysign(ends[path], leaf[2])
                if end != "max":
                    leaf[:] = np.copysign(ends[path], leaf)
            assert_skipped_or_right(row, {path: x.astype(types[path]) for path, x in grads.items()})

    def test_what_is_owed_does_not_leave_the_range(self):
        """Not by what the second stage loses, for all workers, of the largest gradients that are answered."""
        state = contexts.first_state(TX["signnorm-shuffle"], at(GRADS, 0))
        owed = jax.tree.map(np.array, state.residual)
        owed.value["dense/kernel"][:, 5, 7] = 2.0**120
        got = run(TX["signnorm-shuffle"], GRADS, "vmap", state._replace(residual=owed))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))

    @pytest.mark.parametrize("shared_scale", [False, True])
    def test_means_grow_beyond_what_was_heard(self, shared_scale):
        """By n / k of values that a quantizer brought, and that the range has room for, but not for so much more."""
        tx = gc.randomk(0.01, quantizer=gc.qsgd(8, bucket_size=16, shared_scale=shared_scale), error_feedback=False)
        for magnitude in (1e35, 1e37):
            grads = jax.tree.map(lambda x, m=magnitude: np.copysign(np.float32(m), x), at(GRADS, slice(1)))
            got = run(tx, grads, "vmap")
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
            assert got.states.skipped[0, 0] == (magnitude > 1e36)


def assert_skipped_or_right(row, grads):
    """What step 2 makes of gradients that are finite: it is as exact as the codec is, or skipped, but nothing is lost.

    Those that follow happen, however large the gradient was.
    """
    require_skipped_or_right(TX[row.id], grads, run(TX[row.id], grads, "vmap"), 2)


class TestBounded:
    """Law 8."""

    @pytest.mark.parametrize(
        "row", [row for row in ROWS if TX[row.id].init(trees.zeros(trees.ONE)).residual.value], ids=lambda row: row.id
    )
    def test_residual_stays_bounded(self, row):
        grads = trees.noise(trees.ONE, 8, (400, 2))
        (residual,) = jax.tree.leaves(run(TX[row.id], grads, "vmap").states.residual)
        norms = np.linalg.norm(residual.reshape(400, -1), axis=1)
        require_conserved(TX[row.id], grads, run(TX[row.id], grads, "vmap"), 1e-3)
        early, late = norms[100:200].mean(), norms[300:].mean()
        assert late < 1.1 * early + 1e-6, (early, late)
        assert norms.max() < 12 * np.linalg.norm(grads["only"][0])


RIDERS = trees.noise((RIDING,), 2, (STEPS, WORKERS))


@functools.cache
def exchanges(id):
    """Some steps of a codec alone, on TWO."""
    return steps_of(TX[id], trees.noise(TWO, 1, (STEPS, WORKERS)), RIDERS)


@functools.cache
def given_on(id, name):
    """Shapes of what collectives are given for the leaves of a network, dense ones included, and its leaves."""
    tx, tree = TX[id], trees.zeros(NETWORKS[name]())
    leaves, the = flatten(tree)[0], plan(tx.codec, tx.settings, tree)
    tensors, riders = {path: leaves[path] for path in the.compressed}, [leaves[path] for path in the.dense]
    state = jax.eval_shape(lambda: marked(tx, first_state(tx, tensors)))
    # Each worker has gradients of its own: what all share, vmap would not batch, and jax's all_to_all then miscounts.
    axes = contexts.worker_axes(state)
    of_four = lambda x: jax.ShapeDtypeStruct((WORKERS, *x.shape), x.dtype)  # noqa: E731
    state = contexts.map_state(of_four, lambda x: x, state)
    worker = jax.vmap(recorded(tx), in_axes=(0, 0, axes), axis_name="data")
    step = jax.eval_shape(worker, *jax.tree.map(of_four, (tensors, riders)), state)
    return step.given, [x.shape for x in leaves.values()]


def in_step(row, step, given):
    """The messages of a step, whose branches the row tells."""
    taken = iter(row.phases[step])

    def choose(branches):
        if branches.sizes:
            return -1 if step in row.fills else 0
        branch = next(taken, None)
        assert branch is not None, "the row's phases do not say which branch of a conditional sends"
        return branch

    messages = list(sent(given, choose))
    assert next(taken, None) is None
    return messages


# What jax.lax has of them.
COLLECTIVES = {
    *("psum", "pmean", "pmax", "pmin", "psum_scatter", "ppermute", "pshuffle", "pswapaxes", "psend", "precv"),
    *("all_gather", "all_to_all", "ragged_all_to_all", "axis_index", "axis_size", "pbroadcast", "pcast", "pvary"),
}
PACKAGE = pathlib.Path(gc.__file__).parent


def names(file):
    """All names, attributes and imports of a file of the package."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name):
                yield name
            case ast.ImportFrom(module=module, names=aliases):
                yield from (f"{module}.{alias.name}" for alias in aliases)
                yield from (alias.name for alias in aliases)
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)


@dataclasses.dataclass(frozen=True)
class Cheat(Codec):
    """Makes of what was heard, and of what was not, the mean and a part of the state."""

    mean: Any = lambda d, heard: heard.mean
    news: Any = lambda d, heard: heard.mean

    name: ClassVar[str] = "cheat"
    by_leaf: ClassVar[tuple[str, ...]] = ("last",)

    def shrinks(self, path, leaf, uncompressed):
        return True

    def init(self, path, leaf, salt):
        return {"last": jnp.zeros(leaf.shape, leaf.dtype)}

    def start(self, leaves):
        return CheatState({path: x["last"] for path, x in leaves.items()})

    def talk(self, phase, d, leaf, ctx):
        heard = yield Say(total(d))
        return Result(self.mean(total(d), heard), heard.own, {"last": self.news(total(d), heard)})


class CheatState(NamedTuple):
    last: dict[str, Any]


def traced(codec):
    """A step of a codec, where types tell what differs between the workers."""
    tx = compressor(codec, Settings("data", None, 0, None, False, "psum"))
    grads = at(trees.noise(TWO, 1, (1, WORKERS)), 0)
    state = contexts.first_state(tx, grads)
    step, _, _ = contexts.sharded(tx, grads, state, check_vma=True)
    return jax.eval_shape(step, grads, state)


class TestOnlyTheWireSpeaks:
    """Law 9."""

    def test_only_one_file_names_the_collectives(self):
        files = [str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")]
        assert [file for file in files if COLLECTIVES & {*names(file)}] == ["exchange/collectives.py"]

    def test_what_a_codec_is_made_of_knows_no_wire(self):
        """Beside the settings of the plan, which factories fill in; `average` is no codec."""
        allowed = {f"gradcomp_jax.exchange.plan.{name}" for name in ("Settings", "require_aggregate")}
        codecs = [f"codecs/{file.name}" for file in (PACKAGE / "codecs").glob("*.py") if file.stem != "none"]
        for file in [*codecs, "coder.py", "contract.py", "feedback.py"]:
            of_package = {name for name in names(file) if name.startswith("gradcomp_jax.exchange")}
            assert of_package - {"gradcomp_jax.exchange.plan"} <= allowed, file

    @pytest.mark.parametrize(
        "mean",
        [lambda d, heard: d, lambda d, heard: heard.mean + 0 * d, lambda d, heard: heard.own],
        ids=["gradient", "both", "own"],
    )
    def test_a_mean_of_what_was_not_received_is_refused(self, mean):
        traced(Cheat())
        with pytest.raises(TypeError, match="made the mean of leaf 'a' of more than heard numbers"):
            traced(Cheat(mean))

    def test_nor_does_it_reach_the_state(self):
        with pytest.raises(ValueError, match="out_specs"):
            traced(Cheat(news=lambda d, heard: heard.own))

    @every_phase
    def test_mean_is_rebuilt_from_the_wire_alone(self, row, step):
        got = exchanges(row.id)[step]
        taken = []

        def choose(branches):
            index = int(branches.index[0])
            if not branches.sizes:
                taken.append(index)
            return index

        messages = list(sent(got.given, choose))
        assert tuple(taken) == row.phases[step]
        assert tuple(message.kind for message in messages) == row.kinds(step, "two")
        operands = [x for message in messages for x in jax.tree.leaves(message.operands)]
        assert len(operands) == len(messages)
        mean, rode = row.rebuild(operands, got.state, TWO, RIDING)
        chex.assert_trees_all_close(at(got.mean, 0), mean, atol=2e-5, rtol=0)
        np.testing.assert_allclose(got.rode[0], rode, atol=1e-6)
        np.testing.assert_allclose(got.rode[0], RIDERS[step].mean(0), atol=1e-6)

    @every_phase
    def test_no_more_than_the_papers_formula_on_resnet18(self, row, step):
        given, shapes = given_on(row.id, "resnet18" if row in EACH else "resnet18-shapes")
        vectors = [shape for shape in shapes if len(shape) < 2]
        matrices = [shape for shape in shapes if len(shape) >= 2]
        operands = jax.tree.leaves(in_step(row, step, given))
        bytes_sent = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in operands)
        assert 0 < bytes_sent <= row.payload(matrices, step) + row.dense(sum(shape[0] for shape in vectors))
