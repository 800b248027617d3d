"""Streaming DiLoCo's floating numbers of four bits."""

import numpy as np
import pytest

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.exchanges import declared, exchanged

LEVELS = np.array([0, *(2.0 ** np.arange(-6, 1))])


def became(x, **settings):
    """What the codec makes of a vector, as the only worker."""
    return exchanged(gc.float4(aggregate="gather", **settings), {"w": x[None]}).own["w"][0]


def test_bytes():
    """Two values to a byte, and four bytes a bucket."""
    assert declared(gc.float4(aggregate="gather"), {"w": (512 * 3,)}, 2) == 8 * 3 * (256 + 4)
    assert declared(gc.float4(aggregate="gather", bucket_size=64), {"w": (100, 3), "b": (40,)}, 2) == 8 * 6 * 36


def test_a_sign_and_an_exponent_are_exact():
    x = np.float32(3) * np.concatenate([LEVELS, -LEVELS]).astype(np.float32)
    np.testing.assert_array_equal(became(x, bucket_size=16), x)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rounds_to_the_nearest_level_of_a_bucket(scale):
    x = np.random.default_rng(0).standard_normal((40, 64)) * np.exp(
        3 * np.random.default_rng(1).standard_normal((40, 64))
    )
    x = (scale * x).astype(np.float32)
    largest = np.abs(x).max(1, keepdims=True).astype(np.float64)
    nearest = LEVELS[np.abs(np.abs(x)[..., None] - largest[..., None] * LEVELS).argmin(-1)] * largest
    np.testing.assert_allclose(became(x.reshape(-1), bucket_size=64).reshape(x.shape), np.sign(x) * nearest, rtol=1e-6)


def test_halfway_is_the_larger_level():
    edges = np.array([1, 2.0**-7, *(1.5 * LEVELS[1:-1])], np.float32)
    np.testing.assert_array_equal(became(edges, bucket_size=8)[:7], [1, *LEVELS[1:7]])


def test_without_residual_by_default():
    grads = trees.zeros({"w": (64, 64), "tiny": (3,)})
    assert not gc.float4().init(grads).residual.value
    assert gc.float4(error_feedback=True).init(grads).residual.value.keys() == {"w"}
