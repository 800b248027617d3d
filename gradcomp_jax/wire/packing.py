"""Codes of less than a byte, packed to bytes inside jit.

Code j of a row shares its byte with codes j + c, j + 2c, ..., where c is the number of bytes in a row: whole
slices are shifted and joined, and nothing is interleaved. The lowest bits hold the first slice.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes [..., c * 8 / bits], each below 2^bits, to bytes [..., c]; bits is 1, 2, 4 or 8."""
    slices = jnp.split(codes, 8 // bits, axis=-1)
    packed = slices[0]
    for i, codes_i in enumerate(slices[1:], 1):
        packed = packed | codes_i << (i * bits)
    return packed


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: bytes [..., c] to uint8 codes [..., c * 8 / bits]."""
    mask = (1 << bits) - 1
    return jnp.concatenate([packed >> shift & mask for shift in range(0, 8, bits)], axis=-1)


def to_bytes(x: jax.Array) -> jax.Array:
    """The bytes of `x`, flat uint8 [x.size * itemsize]."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)


def from_bytes(data: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """The inverse of `to_bytes`, for types of more than a byte."""
    return jax.lax.bitcast_convert_type(data.reshape(*shape, -1), dtype)
