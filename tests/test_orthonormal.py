"""Orthonormal bases without a library: Cholesky QR, of whole matrices and of shards, and PowerSGD by it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradcomp_jax as gc
from gradcomp_jax import orthonormal
from gradcomp_jax.contract import Context, Heard, OverShards, Say, Together
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run


def told(talks: Sequence[Any]) -> list[Any]:
    """What talks on the shards of one leaf return, of one worker."""
    answers, results = [None] * len(talks), []
    while not results:
        asked = []
        for talk, answer in zip(talks, answers, strict=True):
            try:
                asked.append(talk.send(answer))
            except StopIteration as end:
                results.append(end.value)
        if asked and isinstance(asked[0], OverShards):
            join = jnp.maximum if asked[0].largest else jnp.add
            answers = [functools.reduce(join, [ask.x for ask in asked])] * len(talks)
        elif asked and isinstance(asked[0], Together):
            answers = asked[0].function([ask.x for ask in asked])
        else:
            assert all(isinstance(ask, Say) for ask in asked)
            said = [ask.x for ask in asked]
            if asked and asked[0].partial:
                said = [functools.reduce(jnp.add, said)] * len(talks)
            answers = [Heard(x, x) for x in said]
    return results


@functools.partial(jax.jit, static_argnums=1)
def basis(p, shards):
    """Of P^T [layers, r, n], by Cholesky QR."""
    largest = jnp.max(jnp.abs(p), axis=-1, keepdims=True)
    parts = jnp.split(p, shards, axis=-1)
    return jnp.concatenate(told([orthonormal.orthonormal(part, largest, shards) for part in parts]), axis=-1)


@pytest.fixture
def _no_library(monkeypatch):
    monkeypatch.setattr(orthonormal, "by_library", lambda shards: False)


def of_condition(condition, layers, r, n, seed=0):
    """P^T [layers, r, n], float64, of singular values from 1 to 1 / condition."""
    rng = np.random.default_rng(seed)
    tall, small = (np.linalg.qr(rng.standard_normal((layers, size, r)))[0] for size in (n, r))
    return (tall * np.logspace(0, -np.log10(condition), r) @ small).swapaxes(1, 2)


def projected(onto, x):
    """P P^T x of rows x, float64."""
    return x @ onto.swapaxes(-1, -2) @ onto


@pytest.mark.usefixtures("_no_library")
class TestCholeskyQR:
    @pytest.mark.parametrize("n", [8, 1001, 60_000])
    @pytest.mark.parametrize("r", [1, 2, 4, 8])
    def test_orthonormal_of_the_same_span(self, r, n):
        """As far as QR comes: what float32 keeps of a column is its condition times its rounding."""
        for condition in (1, 1e3, 1e6):
            p = of_condition(condition, 3, r, n)
            got = np.asarray(basis(p.astype(np.float32), 1), np.float64)
            np.testing.assert_allclose(got @ got.swapaxes(1, 2), np.broadcast_to(np.eye(r), (3, r, r)), atol=2e-6)
            np.testing.assert_allclose(projected(got, p), p, atol=2e-6)
            exact = np.linalg.qr(p.swapaxes(1, 2))[0].swapaxes(1, 2)
            assert np.abs(projected(got, exact) - exact).max() < 1e-6 + 2e-7 * condition

    def test_shards(self):
        p = of_condition(1e6, 2, 4, 4000).astype(np.float32)
        got = np.asarray(basis(p, 5), np.float64)
        np.testing.assert_allclose(got @ got.swapaxes(1, 2), np.broadcast_to(np.eye(4), (2, 4, 4)), atol=2e-6)
        np.testing.assert_allclose(projected(got, p), p, atol=2e-6)

    def test_float64(self):
        with jax.enable_x64(True):
            got = np.asarray(basis(of_condition(1e13, 1, 4, 500), 1))
        np.testing.assert_allclose(got[0] @ got[0].T, np.eye(4), atol=1e-14)

    @pytest.mark.parametrize("size", [1e-35, 1e-20, 1, 1e20, 1e37])
    def test_magnitudes(self, size):
        """Of all columns, and of one."""
        p = of_condition(10, 1, 4, 96)
        for matrix in (p * size, p * np.array([1, 1, 1, size])[:, None]):
            matrix = matrix.astype(np.float32)
            got = np.asarray(basis(matrix, 1), np.float64)
            np.testing.assert_allclose(got[0] @ got[0].T, np.eye(4), atol=2e-6)

    @pytest.mark.parametrize("n", [8, 1000])
    @pytest.mark.parametrize("matrix", ["equal", "ones", "integers", "half", "zero", "one is zero"])
    def test_columns_that_depend_on_others(self, matrix, n):
        """They become zero, or noise that is orthonormal too: a projector either way, on what there is."""
        rng = np.random.default_rng(1)
        p = {
            "equal": np.broadcast_to(rng.standard_normal(n), (6, n)),
            "ones": np.ones((6, n)),
            "integers": rng.integers(-2, 3, (6, 2)) @ rng.integers(-2, 3, (2, n)),
            "half": rng.standard_normal((6, 3)) @ rng.standard_normal((3, n)),
            "zero": np.zeros((6, n)),
            "one is zero": np.array([1, 1, 0, 1, 1, 1])[:, None] * rng.standard_normal((6, n)),
        }[matrix].astype(np.float32)[None]
        got = np.asarray(basis(p, 1), np.float64)
        values = np.linalg.eigvalsh(got[0] @ got[0].T)
        np.testing.assert_allclose(values, values.round(), atol=1e-5)
        assert set(values.round()) <= {0, 1}
        np.testing.assert_allclose(projected(got, p.astype(np.float64)), p, atol=2e-5)

    def test_leaves_of_several_ranks_and_types_at_once(self):
        """Each as by itself, though they are padded to the largest."""
        with jax.enable_x64(True):
            rng = np.random.default_rng(2)
            asked = []
            for layers, r, dtype, shift in ((1, 2, "float32", 1e-6), (3, 5, "float32", 0.0), (2, 3, "float64", 1e-3)):
                p = rng.standard_normal((layers, r, 20)).astype(dtype)
                asked.append((jnp.asarray(p @ p.swapaxes(1, 2)), shift))
            for (gram, shift), got in zip(asked, orthonormal.inverse_factors(asked), strict=True):
                assert (got.shape, got.dtype) == (gram.shape, gram.dtype)
                gram = np.asarray(gram, np.float64)
                diagonal = gram * np.eye(gram.shape[-1])
                exact = np.linalg.inv(np.linalg.cholesky(gram + shift * diagonal))
                np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


TREE = {"w": (40, 30), "low": (24, 16), "layers": (3, 20, 12), "narrow": (40, 3)}


def stacked(path, leaf):
    return path == "layers"


class TestPowerSGD:
    @pytest.fixture
    def grads(self):
        """Zeros at first; one of a lower rank, one of rows that stay zero."""
        grads = trees.noise(TREE, 3, (6, 2))
        rng = np.random.default_rng(4)
        grads["low"] = (rng.standard_normal((6, 2, 24, 1)) @ rng.standard_normal((16, 1)).T).astype(np.float32)
        for x in grads.values():
            x[0] = 0
        grads["w"][:, :, 20:] = 0
        return grads

    def test_steps_are_those_by_qr(self, grads, monkeypatch):
        """Means and residuals, over several steps of error feedback.

        Of a lower rank columns of P are noise, and what single workers owe is of it, which cancels in the mean.
        """
        make = functools.partial(gc.powersgd, 4, stacked=stacked, min_rate=0.5)
        library = run(make(), grads, "checked")
        monkeypatch.setattr(orthonormal, "by_library", lambda shards: False)
        ours = run(make(seed=0, min_size=1), grads, "checked")  # a codec that has not been compiled
        for path in TREE:
            scale = max(1, np.abs(library.updates[path]).max())
            np.testing.assert_allclose(ours.updates[path], library.updates[path], atol=2e-5 * scale, err_msg=path)
            if path != "low":
                got, expected = (x.states.residual.value[path] for x in (ours, library))
                np.testing.assert_allclose(got, expected, atol=2e-5 * scale, err_msg=path)
            np.testing.assert_array_equal(ours.updates[path][:, 0], ours.updates[path][:, 1])

    def test_no_library_is_called(self, grads, monkeypatch):
        """Nor anything else that is not compiled; and four loops, for all leaves together."""
        monkeypatch.setattr(orthonormal, "by_library", lambda shards: False)
        tx = gc.powersgd(4, stacked=stacked, min_rate=0.5)
        step = jax.vmap(tx.update, axis_name="data")
        state = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init({path: x[0, 0] for path, x in grads.items()}))
        text = jax.jit(step).lower({path: x[0] for path, x in grads.items()}, state).as_text()
        assert "custom_call" not in text
        assert text.count("stablehlo.while") == orthonormal.SHIFTED + orthonormal.PLAIN

    @pytest.mark.parametrize(("path", "axis"), [("w", 0), ("layers", 1)])
    def test_a_leaf_in_shards(self, path, axis):
        """A talk for each shard of its rows: together they say and give what one says and gives of the whole."""
        x = trees.noise(TREE, 5)[path]
        codec = gc.powersgd(3, stacked=stacked).codec
        leaf = codec.start({path: codec.init(path, x, 7)})
        leaf = codec.leaf(leaf, path)
        whole = Context(jnp.int32(3), 7, True, whole=x.shape)
        (expected,) = told([codec.talk(0, (x,), leaf, whole)])
        shards = [(part,) for part in np.split(x, 4, axis)]
        contexts = [whole._replace(shards=4, shard=jnp.int32(place)) for place in range(4)]
        got = told([codec.talk(0, part, leaf, ctx) for part, ctx in zip(shards, contexts, strict=True)])
        for name in ("mean", "own"):
            joined = np.concatenate([getattr(part, name) for part in got], axis)
            np.testing.assert_allclose(joined, getattr(expected, name), atol=1e-5)
        flip = np.sign(np.sum(np.asarray(got[0].news["q"] * expected.news["q"]), axis=-1, keepdims=True))
        for part in got:
            np.testing.assert_allclose(part.news["q"] * flip, expected.news["q"], atol=1e-5)
