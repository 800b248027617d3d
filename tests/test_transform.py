"""Transforms before a coder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradcomp_jax as gc
from gradcomp_jax.testing.exchanges import exchanged
from gradcomp_jax.transform import Transform

TRANSFORMS = [("hadamard", 2), ("hadamard", 64), ("hadamard", 512), ("dct", 3), ("dct", 64)]


def lost(tx, x):
    """What of x, on one worker, is not sent, relative to it."""
    own = exchanged(tx, {"w": x[None]}).own["w"][0]
    return np.linalg.norm(x - own) / np.linalg.norm(x)


@pytest.mark.parametrize(("kind", "block"), TRANSFORMS)
@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 9))
def test_it_is_orthonormal(kind, block, size, seed):
    turn = Transform(kind, block, seed)
    x = jax.random.normal(jax.random.key(seed), (size,))
    y = turn(x)
    assert y.shape == (-(-size // block) * block,)
    np.testing.assert_allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5)
    np.testing.assert_allclose(turn.inverse(y, x.shape), x, atol=5e-6)


def test_the_dct_is_the_one_of_type_2():
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    expected = jax.scipy.fft.dct(x, norm="ortho")
    np.testing.assert_allclose(Transform("dct", 16, 0)(x).reshape(5, 16), expected, atol=2e-6)


def test_after_hadamard_the_largest_does_not_set_the_scale():
    """Few large elements among small ones: nearly all that QSGD loses is what surrounds them."""
    rng = np.random.default_rng(0)
    spiky = (rng.normal(size=(64, 64)) * np.where(rng.random((64, 64)) < 1 / 64, 100, 1)).astype(np.float32)
    codec = gc.qsgd(4, bucket_size=64, min_size=0)
    assert lost(gc.transformed(codec, "hadamard", 64), spiky) < 0.5 * lost(codec, spiky)
    assert lost(gc.transformed(gc.signnorm(), "hadamard", 4096), spiky) < 0.75 * lost(gc.signnorm(), spiky)


def test_of_what_varies_slowly_the_dct_needs_few():
    smooth = np.sin(np.linspace(0, 30, 4096)).reshape(64, 64).astype(np.float32)
    codec = gc.topk(0.05)
    assert lost(gc.transformed(codec, "dct"), smooth) < 0.1 < 0.9 < lost(codec, smooth)


def test_accordion_switches_what_is_transformed():
    low, high = (gc.transformed(gc.topk(fraction), "dct", 16) for fraction in (0.3, 0.1))
    tx = gc.accordion(low, high, interval=2)
    assert tx.codec.inner.transform == low.codec.transform
    with pytest.raises(ValueError, match="low has transform=None, high has transform=Transform"):
        gc.accordion(gc.topk(0.3), high, interval=2)


@pytest.mark.parametrize(
    "tx",
    [gc.powersgd(2), gc.onebit(), gc.adaptive(), gc.signnorm(majority=True), gc.transformed(gc.topk(), "dct"), None],
)
def test_what_is_no_code_of_flat_tensors_is_refused(tx):
    with pytest.raises(ValueError, match="must be a qsgd without shared_scale, a topk or a signnorm without"):
        gc.transformed(tx, "dct")


def test_a_quantizer_with_a_transform_is_refused():
    """Else the transform would be left out without a word."""
    with pytest.raises(ValueError, match="quantizer of codec 'powersgd' has a transform"):
        gc.powersgd(2, quantizer=gc.transformed(gc.qsgd(8), "hadamard"))


@pytest.mark.parametrize(
    ("kind", "block", "message"),
    [
        ("fourier", 64, "kind='fourier' must be one of 'hadamard', 'dct'"),
        ("dct", 1, "block=1 must be a whole number of at least 2"),
        ("hadamard", 48, "block=48 must be a power of two for kind='hadamard'"),
    ],
)
def test_arguments_out_of_range(kind, block, message):
    with pytest.raises(ValueError, match=message):
        gc.transformed(gc.topk(), kind, block)
