"""Between slices: the laws of every codec hold on shards, and of each link the bits are told."""

import functools

import jax
import numpy as np
import pytest

import gradcomp_jax as gc
from tests import slices, trees
from tests.slices import CHIPS, SLICES
from tests.table import ROWS
from tests.test_laws import assert_conserved, conserves, possible

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
STEPS = 8
# Rows that divide, that are filled up, and that are cut as a vector; two that travel dense, one shorter than a slice.
TREE = {"conv": (3, 3, 8, 16), "filled": (33, 24), "flat": (5, 64), "bias": (24,), "gain": ()}
TX = {row.id: gc.across(row.make()) for row in ROWS}
GRADS = trees.noise(TREE, 1, (STEPS, SLICES, CHIPS))


@functools.cache
def seen(id, check_vma=True):
    return slices.run(TX[id], GRADS, check_vma)


def of_slices(grads):
    return jax.tree.map(lambda x: x.astype(np.float64).mean(2), grads)


class TestLaws:
    @every_row
    def test_applied_and_residuals_hold_all_gradients(self, row):
        if conserves(TX[row.id]):
            got = slices.of_slices(TX[row.id], seen(row.id), GRADS)
            assert_conserved(TX[row.id], of_slices(GRADS), got, 2e-5 * STEPS)

    @every_row
    def test_all_chips_apply_the_same_bits(self, row):
        for leaf in jax.tree.leaves(seen(row.id).updates):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1, :1], leaf.shape))

    @every_row
    def test_types_change_no_bit(self, row):
        got, expected = seen(row.id, check_vma=False), seen(row.id)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
