"""Between slices: the laws of every codec hold on shards, and of each link the bits are told."""

import functools
import itertools
import math

import chex
import jax
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax.testing import contexts, trees
from gradcomp_jax.testing.laws import conserves, possible, require_conserved
from tests import slices
from tests.slices import CHIPS, SLICES, at
from tests.table import EACH, ROWS
from tests.test_state import loss_of_gradients

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
# Of which some compile for long.
SOME = [row for row in EACH if row.id not in ("adaptive-shuffle", "qsgd-elias-shuffle")]
each_codec = pytest.mark.parametrize("row", SOME, ids=lambda row: row.id)
STEPS = 8
LINKS = ("between", "inside")
# Rows that divide, that are filled up, and that are cut as a vector; two that travel dense, one shorter than a slice.
TREE = {"conv": (3, 3, 8, 16), "filled": (33, 24), "flat": (5, 64), "bias": (24,), "gain": ()}
TX = {row.id: gc.across(row.make()) for row in ROWS}
DIVIDING = {"a": (64, 64), "conv": (3, 3, 16, 32), "bias": (64,)}
# What is added even there, as a share: groups of slices do not tile the shards, and each shard has a table of its own.
PADDING = {"gradiveq-ef": 0.1, "statistical-shuffle": 0.05}
GRADS = trees.noise(TREE, 1, (STEPS, SLICES, CHIPS))


@functools.cache
def seen(id, check_vma=True):
    return slices.run(TX[id], GRADS, check_vma)


def means(grads):
    """Those of the slices, over their chips."""
    return jax.tree.map(lambda x: x.astype(np.float64).mean(2), grads)


class TestLaws:
    @every_row
    def test_applied_and_residuals_hold_all_gradients(self, row):
        if conserves(TX[row.id]):
            got = slices.of_slices(TX[row.id], seen(row.id), GRADS)
            require_conserved(TX[row.id], means(GRADS), got, 2e-5 * STEPS)

    @every_row
    def test_all_chips_apply_the_same_bits(self, row):
        for leaf in jax.tree.leaves(seen(row.id).updates):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1, :1], leaf.shape))

    @each_codec
    def test_types_change_no_bit(self, row):
        slices.assert_same(row.id, seen(row.id, check_vma=False)[:2], seen(row.id)[:2])

    @every_row
    def test_what_is_not_finite_on_one_chip_is_skipped_on_all(self, row):
        grads = jax.tree.map(np.copy, GRADS)
        grads["conv"][2, 1, 2, 0, 0, 0, 0] = np.nan
        grads["flat"][4, 0, 3, 4, 60] = np.inf
        grads["bias"][5, 1, 0, 3] = -np.inf
        got = slices.run(TX[row.id], grads)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got[:2]))
        skipped = np.array([0, 0, 1, 1, 2, 3, 3, 3])
        np.testing.assert_array_equal(got.states.skipped, np.broadcast_to(skipped[:, None, None], (STEPS, 2, 4)))
        kept = got.states._replace(wire=None, skipped=None)
        for t in (2, 4, 5):
            assert not any(x[t].any() for x in jax.tree.leaves(got.updates))
            chex.assert_trees_all_equal(at(kept, t), at(kept, t - 1))


class TestBits:
    @every_row
    def test_of_each_link_they_are_those_of_the_compiled_collectives(self, row):
        collectives = gc.collective_bytes(slices.program_of(TX[row.id], GRADS))
        # By the sizes of their groups; only slices, of which there are two, pass anything on.
        between = [c for c in collectives if c.workers == SLICES or c.kind == "collective-permute"]
        inside = [c for c in collectives if c.workers == CHIPS]
        assert len(between) + len(inside) == len(collectives)
        for link, those in (("between", between), ("inside", inside)):
            bits = {8 * sent for sent in possible(those, lambda c: c.ring_bytes, 0)}
            declared = [gc.wire_bits(at(seen(row.id).states, t), link) for t in range(STEPS)]
            assert {count.last for count in declared} <= bits
            assert [count.total for count in declared] == list(itertools.accumulate(count.last for count in declared))

    @every_row
    def test_of_each_link_they_are_described(self, row):
        """Without any step; see test_laws.py."""
        told = gc.describe(TX[row.id], at(jax.tree.map(lambda x: x[:, 0, 0], GRADS), 0), {"node": 2, "local": 4})
        (part,) = told.parts
        declared = [[gc.wire_bits(at(seen(row.id).states, t), link) for link in LINKS] for t in range(STEPS)]
        pairs = {tuple(count.last / 8 for count in counts) for counts in declared}
        if row.id == "qsgd-elias-full" or part.kind == "compressed, by the fewest numbers":
            assert {between for between, _ in pairs} & set(part.kinds.values())
        else:
            assert (part.sent, part.inside) in pairs
            assert {between for between, _ in pairs} <= set(part.kinds.values())
        assert math.isclose(sum(leaf.sent for leaf in told.rows) + part.flags + part.packing, part.sent)
        assert abs(part.packing) <= (2 * (8 * 8 + 4 + 4) if part.way in ("shuffle", "ring") else 4)
        local = jax.tree.map(lambda x: x[0, 0, 0], seen(row.id).states)
        assert part.residual == sum(x.nbytes for x in jax.tree.leaves(local.residual))
        assert part.residual + part.state == sum(x.nbytes for x in jax.tree.leaves(local))

    @each_codec
    def test_each_chip_sends_its_share(self, row):
        """Of what the codec sends by itself, of leaves that divide."""
        grads = trees.noise(DIVIDING, 1, (STEPS, SLICES, CHIPS))
        whole, shard = (
            contexts.run(row.make(), jax.tree.map(lambda x: x[:, :, 0], grads), "vmap"),
            slices.run(TX[row.id], grads),
        )
        for t in range(STEPS):
            alone, across = (gc.wire_bits(at(got.states, t)).last / 8 for got in (whole, shard))
            filled = PADDING.get(row.id, 0) * alone / CHIPS
            assert across <= 1.05 * alone / CHIPS + filled + 4


class TestSteps:
    @each_codec
    def test_it_trains_as_by_hand(self, row):
        """In each step parameters move by what the transformation gives in a shard_map of one's own."""
        tx, mesh = optax.chain(TX[row.id], optax.sgd(1.0)), slices.mesh_of()
        params = {**trees.zeros(TREE), "empty": ()}
        step, state = gc.train_step(loss_of_gradients, tx, mesh), gc.init(tx, params, mesh)
        for t in range(4):
            batch = {path: x[t].reshape(SLICES * CHIPS, *x.shape[3:]) for path, x in GRADS.items()}
            params, state, _ = step(params, state, {**batch, "empty": ()})
        moved = jax.tree.map(lambda x: -x[:4, 0, 0].sum(0), seen(row.id).updates)
        chex.assert_trees_all_close(jax.device_get(params), {**moved, "empty": ()}, atol=1e-4)
