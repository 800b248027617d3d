"""The wire's formats and random numbers against plain references."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from gradcomp_jax import views
from gradcomp_jax.random import threefry2x32, uniform16
from gradcomp_jax.wire.packing import from_bytes, pack, to_bytes, unpack


@hypothesis.given(
    bits=st.sampled_from([1, 2, 4, 8]), rows=st.integers(1, 5), width=st.integers(1, 9), seed=st.integers(0, 999)
)
def test_packing_round_trips_and_is_dense(bits, rows, width, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, width * 8 // bits), dtype=np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (rows, width)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    # Code j lies in byte j mod width, at bit (j div width) * bits.
    for j in range(codes.shape[1]):
        np.testing.assert_array_equal(
            np.asarray(packed)[:, j % width] >> (j // width * bits) & (2**bits - 1), codes[:, j]
        )


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int32])
def test_bytes_are_little_endian_and_round_trip(dtype):
    x = np.arange(12, dtype=dtype).reshape(3, 4)
    np.testing.assert_array_equal(to_bytes(jnp.asarray(x)), np.frombuffer(x.tobytes(), np.uint8))
    np.testing.assert_array_equal(from_bytes(to_bytes(jnp.asarray(x)), (3, 4), dtype), x)


@hypothesis.given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), size=st.integers(1, 20))
def test_buckets_round_trip(shape, size):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    rows = views.buckets(jnp.asarray(x), size)
    assert rows.shape == (-(-x.size // size), size)
    assert np.count_nonzero(rows) == x.size
    np.testing.assert_array_equal(views.from_buckets(rows, x.shape), x)


def test_threefry_is_jaxs():
    key = jax.random.key_data(jax.random.key(7))
    counts = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    ours = jnp.concatenate(threefry2x32(key, jnp.asarray(counts[:1000]), jnp.asarray(counts[1000:])))
    np.testing.assert_array_equal(ours, jax.extend.random.threefry_2x32(key, jnp.asarray(counts)))


def test_uniform_numbers():
    u = np.asarray(uniform16(jax.random.key(1), 500, 512), np.float64)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    n = u.size
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * n)
    counts = np.histogram(u, 256, (0, 1))[0]
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 4 * np.sqrt(2 * 255)
    # Numbers that share a block of the generator do not go together.
    quarters = u.reshape(500, 4, 128)
    for i in range(4):
        for j in range(i):
            assert abs(np.corrcoef(quarters[:, i].ravel(), quarters[:, j].ravel())[0, 1]) < 4 / np.sqrt(n / 4)
    assert len(np.unique(uniform16(jax.random.key(2), 8, 512))) > 3900
