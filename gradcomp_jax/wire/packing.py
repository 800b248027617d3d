"""Codes packed to whole bytes inside jit.

Code j of an axis shares its byte with codes j + c, j + 2c, ..., where c is the number of bytes along it: whole
slices are shifted and joined, and nothing is interleaved. The lowest bits hold the first slice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """uint8 codes, c * 8 / bits of them along `axis`, each below 2^bits, to c bytes; bits is 1, 2, 4 or 8."""
    slices = jnp.split(codes, 8 // bits, axis=axis)
    packed = slices[0]
    for i, codes_i in enumerate(slices[1:], 1):
        packed = packed | codes_i << (i * bits)
    return packed


def unpack(packed: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """The inverse of `pack`: c bytes along `axis` to c * 8 / bits uint8 codes."""
    mask = (1 << bits) - 1
    return jnp.concatenate([packed >> shift & mask for shift in range(0, 8, bits)], axis=axis)


def fields_bytes(k: int, width: int) -> int:
    """The bytes of `pack_fields`: ceil(k * width / 8) and at most two more; ValueError as there."""
    return sum(-(-k * bits // 8) for _, bits in _parts(width))


@functools.partial(jax.jit, static_argnames="width")  # so that leaves of one shape are traced once
def pack_fields(values: jax.Array, width: int) -> jax.Array:
    """Whole numbers of any width, such as the ceil(log2 n) bits of an index below n, to bytes.

    A width is split into whole bytes and then 4, 2 and 1 bits, lowest bits first: 21 = 8 + 8 + 4 + 1. Each
    part of all values follows the part before it, packed as by `pack` and filled up to a whole byte.

    Args:
      values: uint32 [..., k]; bits beyond `width` are left out.
      width: bits a value, 0 to 32.

    Returns:
      uint8 [..., fields_bytes(k, width)].

    Raises:
      ValueError: `width` out of range.
    """
    k = values.shape[-1]
    planes = [jnp.zeros((*values.shape[:-1], 0), jnp.uint8)]
    for shift, bits in _parts(width):
        codes = (values >> shift & (1 << bits) - 1).astype(jnp.uint8)
        fill = [(0, 0)] * (values.ndim - 1) + [(0, -k % (8 // bits))]
        planes.append(pack(jnp.pad(codes, fill), bits))
    return jnp.concatenate(planes, axis=-1)


@functools.partial(jax.jit, static_argnames=("k", "width"))
def unpack_fields(data: jax.Array, k: int, width: int) -> jax.Array:
    """The inverse of `pack_fields`: uint8 [..., fields_bytes(k, width)] to uint32 [..., k], each below 2^width."""
    values = jnp.zeros((*data.shape[:-1], k), jnp.uint32)
    start = 0
    for shift, bits in _parts(width):
        end = start + -(-k * bits // 8)
        values = values | unpack(data[..., start:end], bits)[..., :k].astype(jnp.uint32) << shift
        start = end
    return values


def _parts(width: int) -> list[tuple[int, int]]:
    """(shift, bits) of each part of a field of `width` bits."""
    if not 0 <= width <= 32:
        raise ValueError(f"width={width} must be from 0 to 32 bits")
    parts, shift = [], 0
    for bits in (8, 8, 8, 8, 4, 2, 1):
        if shift + bits <= width:
            parts.append((shift, bits))
            shift += bits
    return parts


def to_bytes(x: jax.Array) -> jax.Array:
    """The bytes of `x`, flat uint8 [x.size * itemsize]."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)


def from_bytes(data: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """The inverse of `to_bytes`."""
    size = jnp.dtype(dtype).itemsize
    bytes_each = () if size == 1 else (size,)  # a cast from one byte to one keeps the axes
    return jax.lax.bitcast_convert_type(data.reshape(*shape, *bytes_each), dtype)


def pack_arrays(tree: Any, lead: int = 0) -> jax.Array:
    """The bytes of a tree's arrays, one after another, uint8 [..., p]; their first `lead` axes are kept."""
    leaves = jax.tree.leaves(tree)
    parts = [to_bytes(x).reshape(*x.shape[:lead], -1) for x in leaves]
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def unpack_arrays(data: jax.Array, like: Any) -> Any:
    """The inverse of `pack_arrays`: uint8 [..., p] to arrays [..., *shape] of the shapes and types of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    lead, parts, start = data.shape[:-1], [], 0
    for leaf in leaves:
        size = leaf.size * leaf.dtype.itemsize
        parts.append(from_bytes(data[..., start : start + size], (*lead, *leaf.shape), leaf.dtype))
        start += size
    return jax.tree.unflatten(treedef, parts)
