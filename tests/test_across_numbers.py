"""Between slices: the numbers of a codec run by hand on shards, and those of whole matrices where these stay whole."""

import functools
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.testing import contexts, trees
from tests import slices
from tests.slices import CHIPS, SLICES
from tests.table import BY_ID

STEPS = 8
# Rows that divide, that are filled up, and that are cut as a vector; two that travel dense.
MATRICES = {"conv": (3, 3, 8, 16), "filled": (33, 24), "flat": (5, 64)}
TREE = MATRICES | {"bias": (24,), "gain": ()}
# Of which sums are exact, in whatever order.
GRADS = jax.tree.map(lambda x: np.round(16 * x) / np.float32(16), trees.noise(TREE, 1, (STEPS, SLICES, CHIPS)))


def laid(path, x, by_columns):
    """A leaf, and the axis along which it is cut into four: 36 rows for 33; a vector of 320 where 5 would be 8."""
    matrix = x.reshape(-1, x.shape[-1])
    if by_columns:
        return matrix, 1
    return {"conv": matrix, "filled": jnp.pad(matrix, ((0, 3), (0, 0))), "flat": x.reshape(-1)}[path], 0


def by_hand(tx, by_columns):
    """The unchanged codec over the slices, on shards of the means of their chips: updates, and residuals at the end."""

    def shards(grads):
        mine = {path: lax.pmean(x, "local") for path, x in grads.items()}
        for path in MATRICES:
            x, axis = laid(path, grads[path], by_columns)
            mine[path] = lax.psum_scatter(x, "local", scatter_dimension=axis, tiled=True) / CHIPS
        return mine

    def step(state, grads):
        updates, state = tx.update(shards(grads), state)
        for path in MATRICES:
            axis = laid(path, grads[path], by_columns)[1]
            x = lax.all_gather(updates[path], "local", axis=axis, tiled=True)
            updates[path] = x.reshape(-1)[: grads[path].size].reshape(grads[path].shape)
        return state, updates

    def steps(grads):
        grads = jax.tree.map(lambda x: x[:, 0, 0], grads)
        state, updates = lax.scan(step, tx.init(jax.tree.map(jnp.zeros_like, shards(slices.at(grads, 0)))), grads)
        return jax.tree.map(lambda x: x[:, None, None], updates), jax.tree.map(lambda x: x[None, None], state.residual)

    each = P(None, "node", "local")
    run = jax.shard_map(
        steps, mesh=slices.mesh_of(), in_specs=each, out_specs=(each, P("node", "local")), check_vma=False
    )
    return jax.device_get(jax.jit(run)(GRADS))


@pytest.mark.parametrize(
    "id",
    [
        *("none-ring", "cast-e4m3", "topk", "topk-shuffle", "signnorm-vote", "onebit-mean", "adaptive"),
        *("qsgd-4-ef", "qsgd-2-ef-shuffle", "qsgd-4-ring", "qsgd-shared"),
        *("topk-chunks", "topk-chunks-shuffle", "float4-ef"),
    ],
)
def test_of_the_codec_run_by_hand_on_shards(id, monkeypatch):
    make = functools.partial(BY_ID[id].make, compress=lambda path, leaf: path in MATRICES)
    got = slices.run(gc.across(make()), GRADS)
    own_key = Wire.own_key
    by_chip = lambda wire, key: jax.random.fold_in(own_key(wire, key), lax.axis_index("local"))  # noqa: E731
    monkeypatch.setattr(Wire, "own_key", by_chip)
    updates, residual = by_hand(make(axis_name="node"), id.startswith(("onebit", "adaptive")))
    chex.assert_trees_all_equal(got.updates, updates)
    for path, x in residual.value.items():
        np.testing.assert_array_equal(got.states.residual.value[path][-1].reshape(x.shape), x)


class TestDraws:
    """What is drawn at random, each chip draws by itself: here all shards of a leaf are the same."""

    GRADS: ClassVar = {"w": np.tile(trees.noise((2, 1, 1, 8, 32), 2), (1, SLICES, CHIPS, CHIPS, 1))}

    def shards(self, tx):
        """Updates of two steps, [steps, chips, ...]."""
        return slices.run(gc.across(tx), self.GRADS).updates["w"][:, 0, 0].reshape(2, CHIPS, -1)

    @pytest.mark.parametrize("make", [gc.randomk, gc.randomblock])
    def test_places(self, make):
        sent = self.shards(make(0.1)) != 0
        assert (sent.sum(2) == 25).all()
        assert all((sent[:, i] != sent[:, j]).any(1).all() for i in range(CHIPS) for j in range(i))

    def test_rounding(self):
        mean, got = self.GRADS["w"][:, 0, 0, :8].reshape(2, -1), self.shards(gc.qsgd(2, min_size=0))
        assert all((got[:, i] != got[:, j]).any(1).all() for i in range(CHIPS) for j in range(i))
        assert np.abs(got.mean(1) - mean).mean() < 0.7 * np.abs(got[:, 0] - mean).mean()


def decaying(shapes, lead, ratio=4.0):
    """Gradients whose singular values fall, so that rounding does not grow from step to step; like ones each time."""
    rng = np.random.default_rng(3)

    def leaf(path, shape):
        *layers, n, m = shape if path == "layers" else (int(np.prod(shape[:-1])), shape[-1])
        u, v = (np.linalg.qr(rng.standard_normal((*layers, side, 6)))[0] for side in (n, m))
        base = (u * ratio ** -np.arange(6.0)) @ v.swapaxes(-1, -2)
        x = base.reshape(shape) * (1 + 0.3 * rng.standard_normal((*lead, *(1,) * len(shape))))
        return (8 * x + 1e-3 * rng.standard_normal((*lead, *shape))).astype(np.float32)

    return {path: leaf(path, shape) for path, shape in shapes.items()}


def assert_as_whole(make, grads, tolerance=1e-5):
    """Means and what is owed are those of the codec between workers that have the means of the slices."""
    tx = gc.across(make())
    got = slices.of_slices(tx, slices.run(tx, grads), grads)
    want = contexts.run(make(), jax.tree.map(lambda x: x.mean(2), grads), "vmap")
    size = max(np.abs(x).max() for x in jax.tree.leaves(want.updates))
    for one, other in zip(jax.tree.leaves(got.updates), jax.tree.leaves(want.updates), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * size)
    for one, other in zip(*(jax.tree.leaves(x.states.residual) for x in (got, want)), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * size)


def stacked(path, leaf):
    return path == "layers"


def split(path, leaf):
    return {"conv": 3, "split": 2}.get(path, 1)


def matrices(path, leaf):
    return leaf.ndim > 1


class TestWholeMatrices:
    # Rows, and columns, that do not divide among four; layers; rows of several axes.
    SHAPES: ClassVar = {"conv": (3, 3, 7, 18), "odd": (33, 30), "layers": (3, 22, 19), "split": (6, 5, 40)}

    @functools.cached_property
    def grads(self):
        grads = decaying(self.SHAPES, (STEPS, SLICES, CHIPS)) | trees.noise({"bias": (6,)}, 4, (STEPS, SLICES, CHIPS))
        grads["odd"][:2] = 0  # a leaf that is dead at first
        return grads

    @pytest.mark.parametrize(
        ("kwargs", "steps"),
        # EF21 is soon given the small rest, whose singular values are close to each other.
        [({}, STEPS), ({"aggregate": "ring", "refresh": 3}, STEPS), ({"error_feedback": gc.EF21()}, 4)],
        ids=["plain", "ring-refresh", "ef21"],
    )
    def test_powersgd(self, kwargs, steps):
        make = functools.partial(gc.powersgd, 2, stacked=stacked, split=split, **kwargs)
        assert_as_whole(make, {path: x[:steps] for path, x in self.grads.items()})

    def test_accordion(self):
        low, high = (gc.powersgd(rank, stacked=stacked, split=split) for rank in (2, 1))
        assert_as_whole(functools.partial(gc.accordion, low, high, interval=2, window=1), self.grads)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"ratio": 4},
            {"ratio": 4, "reuse": 3, "error_feedback": True},
            {"select": "energy", "max_loss": 0.4, "warmup_steps": 1},
        ],
        ids=["ratio", "reuse-ef", "energy"],
    )
    def test_gradiveq(self, kwargs):
        settings = {"train_steps": 4, "compress_steps": 2, "warmup_steps": 0, "compress": matrices}
        make = functools.partial(gc.gradiveq, 12, **{**settings, **kwargs})
        assert_as_whole(make, {path: self.grads[path] for path in ("odd", "split", "bias")})

    @pytest.mark.parametrize("make", [gc.none, gc.onebit], ids=["none", "onebit"])
    def test_of_columns_and_sums(self, make):
        assert_as_whole(make, trees.noise({"tall": (5, 14, 18), "bias": (6,)}, 5, (STEPS, SLICES, CHIPS)))
