"""Codes packed to whole bytes inside jit.

Code j of an axis shares its byte with codes j + c, j + 2c, ..., where c is the number of bytes along the axis. So whole
slices are shifted and joined, and nothing is interleaved. The lowest bits hold the first slice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.views import split


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Packs c * 8 / bits uint8 codes along `axis`, each below 2^bits, into c bytes; bits is 1, 2, 4 or 8."""
    axis %= codes.ndim
    shifts = _shifts(bits, axis, codes.ndim)
    slices = codes.reshape(*codes.shape[:axis], 8 // bits, codes.shape[axis] * bits // 8, *codes.shape[axis + 1 :])
    # The sum of whole numbers without a common bit joins them.
    return jnp.sum(slices << shifts, axis=axis, dtype=jnp.uint8)


def unpack(packed: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """The inverse of `pack`: c bytes along `axis` to c * 8 / bits uint8 codes."""
    axis %= packed.ndim
    # One operation that fuses; a concatenation of slices would first write them all.
    shifts = _shifts(bits, axis, packed.ndim)
    codes = jnp.expand_dims(packed, axis) >> shifts & ((1 << bits) - 1)
    return codes.reshape(*packed.shape[:axis], packed.shape[axis] * 8 // bits, *packed.shape[axis + 1 :])


def _shifts(bits: int, axis: int, ndim: int) -> jax.Array:
    """The shift of each slice of a byte's codes, along a new axis before `axis`, for arrays of `ndim` axes."""
    return jnp.expand_dims(jnp.arange(0, 8, bits, dtype=jnp.uint8), [i for i in range(ndim + 1) if i != axis])


def fields_bytes(k: int, width: int) -> int:
    """The bytes of `pack_fields`: ceil(k * width / 8) and at most two more; raises the same ValueError."""
    return sum(-(-k * bits // 8) for _, bits in _parts(width))


@functools.partial(jax.jit, static_argnames="width")  # so that leaves of one shape are traced once
def pack_fields(values: jax.Array, width: int) -> jax.Array:
    """Packs whole numbers of any width, such as the ceil(log2 n) bits of an index below n, into bytes.

    A width is split into whole bytes and then 4, 2 and 1 bits, lowest bits first: 21 = 8 + 8 + 4 + 1. Each part of all
    values follows the part before it. `pack` packs it, filled up to a whole byte.

    Args:
      values: uint32 [..., k], or uint8 for a width of at most 8; bits beyond `width` are left out.
      width: the bits of each value, 0 to 32.

    Returns:
      uint8 [..., fields_bytes(k, width)].

    Raises:
      ValueError: `width` is out of range.
    """
    k = values.shape[-1]
    planes = [jnp.zeros((*values.shape[:-1], 0), jnp.uint8)]
    for shift, bits in _parts(width):
        codes = values.astype(jnp.uint8) if width == 8 else (values >> shift & (1 << bits) - 1).astype(jnp.uint8)
        fill = [(0, 0)] * (values.ndim - 1) + [(0, -k % (8 // bits))]
        planes.append(pack(jnp.pad(codes, fill), bits))
    return jnp.concatenate(planes, axis=-1)


@functools.partial(jax.jit, static_argnames=("k", "width"))
def unpack_fields(data: jax.Array, k: int, width: int) -> jax.Array:
    """The inverse of `pack_fields`: uint8 [..., fields_bytes(k, width)] to [..., k], each below 2^width.

    The type is uint8 for a width of at most 8, else uint32.
    """
    dtype = jnp.uint8 if width <= 8 else jnp.uint32
    values = jnp.zeros((*data.shape[:-1], k), dtype)
    start = 0
    for shift, bits in _parts(width):
        end = start + -(-k * bits // 8)
        values = values | unpack(data[..., start:end], bits)[..., :k].astype(dtype) << shift
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


def terms_a_word(bound: int, terms: int) -> int:
    """The number of values within -bound..bound that share a word of `pack_terms`: 4, 2 or 1."""
    return next(each for each in (4, 2, 1) if 2 * bound * terms < 2 ** (32 // each))


def pack_terms(x: jax.Array, bound: int, terms: int) -> jax.Array:
    """Packs whole numbers within -bound..bound into words; the sum of `terms` such words holds the sum of each number.

    `bound` is added to each number, so that none is negative. Each has a field of a word that can hold the sum, so that
    no sum runs over into the next field. A sum of narrow integers would not do: compilers for GPUs widen those of 16
    bits to 32. Nor would three fields of 10 bits, or five of 6: their rows would have to be filled up, and CPUs would
    take twice as long to quantise.

    Args:
      x: integers [..., k], int8 or wider, k a multiple of 4.
      bound: the bound of their magnitude.
      terms: the number of words that are added up; bound * terms is below 2^31.

    Returns:
      uint32 [..., k / terms_a_word(bound, terms)].
    """
    each = terms_a_word(bound, terms)
    slices = x.reshape(*x.shape[:-1], each, -1).astype(jnp.int32) + bound
    return jnp.sum(slices.astype(jnp.uint32) << _fields(each, x.ndim), axis=-2, dtype=jnp.uint32)


def unpack_sum(words: jax.Array, bound: int, terms: int) -> jax.Array:
    """The sums, int32 [..., k], from the sum of words that `pack_terms` made."""
    each = terms_a_word(bound, terms)
    slices = words[..., None, :] >> _fields(each, words.ndim) & jnp.uint32(2 ** (32 // each) - 1)
    return slices.astype(jnp.int32).reshape(*words.shape[:-1], -1) - bound * terms


def _fields(each: int, ndim: int) -> jax.Array:
    """The places in a word where its `each` fields begin, along a new axis before the last of `ndim` axes."""
    return (jnp.arange(each, dtype=jnp.uint32) * (32 // each)).reshape(*(1,) * (ndim - 1), each, 1)


def to_bytes(x: jax.Array) -> jax.Array:
    """The bytes of `x`, flat uint8 [x.size * itemsize]."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)


def from_bytes(data: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """The inverse of `to_bytes`."""
    size = jnp.dtype(dtype).itemsize
    bytes_each = () if size == 1 else (size,)  # a cast from one byte to one keeps the axes
    return jax.lax.bitcast_convert_type(data.reshape(*shape, *bytes_each), dtype)


# An array with fewer values is packed together with others of its kind.
LARGE = 2**14


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["width"])
@dataclasses.dataclass(frozen=True)
class Field:
    """Whole numbers that travel in fewer bits than their type has.

    Attributes:
      values: the numbers, below 2^width; uint8 if width is at most 8, else uint32.
      width: the bits of each number.
    """

    values: jax.Array
    width: int


class _Packed(NamedTuple):
    """Arrays of one kind that are packed together.

    Attributes:
      places: their places among the leaves of the tree.
      dtype: the type of their values.
      width: the bits of each value, for fields; -1 for arrays.
    """

    places: list[int]
    dtype: Any
    width: int

    def pack(self, values: jax.Array) -> jax.Array:
        """The bytes of the joined values [..., k]."""
        if self.width >= 0:
            return pack_fields(values, self.width)
        return jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(*values.shape[:-1], -1)

    def unpack(self, data: jax.Array, k: int) -> jax.Array:
        """The inverse of `pack`."""
        if self.width >= 0:
            return unpack_fields(data, k, self.width)
        return from_bytes(data, (*data.shape[:-1], k), self.dtype)

    def size(self, k: int) -> int:
        """The bytes of k values."""
        return fields_bytes(k, self.width) if self.width >= 0 else k * jnp.dtype(self.dtype).itemsize


def _is_field(x: Any) -> bool:
    return isinstance(x, Field)


def _values(x: Any) -> Any:
    return x.values if _is_field(x) else x


def _together(leaves: list[Any], lead: int = 0) -> list[_Packed]:
    """A tree's leaves in the groups that are packed together: arrays, and then fields by width."""
    kinds: dict[Any, _Packed] = {}
    for place, x in enumerate(leaves):
        width, dtype = x.width if _is_field(x) else -1, _values(x).dtype
        large = math.prod(_values(x).shape[lead:]) >= LARGE
        kinds.setdefault((width, dtype, place if large else -1), _Packed([], dtype, width)).places.append(place)
    return sorted(kinds.values(), key=lambda packed: packed.width)


def pack_arrays(tree: Any, lead: int = 0) -> jax.Array:
    """The bytes of a tree's arrays, uint8 [..., p]; the first `lead` axes of the arrays are kept.

    The bytes of arrays come first, then those of fields, from `pack_fields`. A large array or field is packed by
    itself, and small ones of one type or width together. So a tree of many compiles to little more than a tree of few.
    """
    leaves = jax.tree.leaves(tree, is_leaf=_is_field)
    parts = []
    for group in _together(leaves, lead):
        values = [_values(leaves[i]) for i in group.places]
        parts.append(group.pack(_joined([x.reshape(*x.shape[:lead], -1) for x in values])))
    return _joined(parts)


def _joined(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def unpack_arrays(data: jax.Array, like: Any, split: Callable[..., list[jax.Array]] = split) -> Any:
    """The inverse of `pack_arrays`: uint8 [..., p] to arrays [..., *shape] of the shapes and types of `like`.

    `split` is the function that cuts vectors in pieces: `cut_as_written` if there are few pieces, and in a vmap.
    """
    leaves, treedef = jax.tree.flatten(like, is_leaf=_is_field)
    lead, parts, groups = data.shape[:-1], [*leaves], _together(leaves)
    totals = [sum(_values(leaves[i]).size for i in group.places) for group in groups]
    pieces = split(data, [group.size(total) for group, total in zip(groups, totals, strict=True)])
    for group, piece, total in zip(groups, pieces, totals, strict=True):
        shapes = [_values(leaves[i]).shape for i in group.places]
        values = split(group.unpack(piece, total), [math.prod(shape) for shape in shapes])
        for i, x, shape in zip(group.places, values, shapes, strict=True):
            x = x.reshape(*lead, *shape)
            parts[i] = Field(x, group.width) if group.width >= 0 else x
    return jax.tree.unflatten(treedef, parts)
