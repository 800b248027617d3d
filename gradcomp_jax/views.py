"""Tensors in the forms that the algorithms use: wide enough to sum, as matrices, as buckets."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

# XLA's CPU backend sums up to so many numbers as written.
STEP = 32
# With fewer elements, copying a parameter's optimiser state takes less time than compiling what saves the copy.
LARGE = 2**15
# The types of 16 bits in which gradients may travel and be summed.
HALVES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def dtype_of(given: Any) -> Any:
    """The type for a name, or for a type of jax or numpy; None if there is no such type."""
    try:
        return None if given is None else jnp.dtype(given)
    except TypeError:
        return None


def wide(dtype: Any) -> Any:
    """The type for computations with numbers of type `dtype`: float64 and complex types stay, others become float32."""
    keep = dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(dtype if keep else jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """`x` in a type that is wide enough to sum it, because sums of 16-bit floats lose much."""
    return jnp.asarray(x, wide(jnp.result_type(x)))


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in a floating `dtype`, clipped to its largest magnitude: a finite value stays finite."""
    if x.dtype == dtype:
        return x
    most = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x).astype(dtype)


def halved(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in a type of 16 bits, in which it will travel; clipped to the type's largest magnitude.

    A compiler may drop a conversion to a narrow type and back, which would hide the loss. A barrier prevents that.
    """
    return x if x.dtype == dtype else lax.optimization_barrier(narrow(widen(x), dtype))


def share(n: int, fraction: float) -> int:
    """Fraction * n rounded down, but at least 1; 0.29 of 100 is 29, though the product of the floats is less."""
    return max(1, math.floor(fraction * n + 1e-9))


def columns(x: jax.Array, axis: int) -> jax.Array:
    """`x` as a matrix whose columns lie along `axis`, [x.size / columns, columns]; a vector is one column."""
    return x.reshape(-1, 1) if x.ndim < 2 else jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])


def from_columns(matrix: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The inverse of `columns`; it drops columns of the matrix beyond those of the shape."""
    if len(shape) < 2:
        return matrix[:, 0].reshape(shape)
    others = [size for place, size in enumerate(shape) if place != axis % len(shape)]
    return jnp.moveaxis(matrix[:, : shape[axis]].reshape(*others, shape[axis]), -1, axis)


def buckets(x: jax.Array, size: int) -> jax.Array:
    """`x` in C order as rows of `size` elements, [ceil(x.size / size), size], padded with zeros."""
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)


def from_buckets(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `buckets`: drops the padding."""
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def others_are_automatic() -> bool:
    """Whether the current mesh has a further axis over which the compiler shards arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and AxisType.Auto in mesh.axis_types


def platform() -> str:
    """The platform of the traced program, "cpu", "gpu" or "tpu": the current mesh's, or without one jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_cpus() -> bool:
    """Whether the traced program is for CPUs."""
    return platform() == "cpu"


def always(results: Any) -> jax.Array:
    """True; XLA knows it only once it has a value of each array of `results`, of which at least one is not empty."""
    first = [jnp.ravel(x)[0].astype(jnp.float32) for x in jax.tree.leaves(results) if jnp.size(x)]
    bits = [lax.bitcast_convert_type(x, jnp.int32) for x in first]
    return (functools.reduce(jnp.bitwise_or, bits) & 1) < 2


def once_stored(kept: jax.Array, params: Any) -> jax.Array:
    """`kept`; on CPUs it is known only once the new parameters exist.

    The new parameters are computed from the optimiser's state before the step. The selection by this flag overwrites
    that state. Without this order XLA's CPU backend begins each step with a copy of the state. Small parameters do not
    get the order, so their state may be copied.
    """
    large = [x for x in jax.tree.leaves(params) if x.size >= LARGE]
    if not large or not on_cpus() or others_are_automatic():
        return kept
    return lax.cond(kept, always, lambda _: kept, large)


def split(x: jax.Array, sizes: Sequence[int], axis: int = -1) -> list[jax.Array]:
    """`x` in pieces of these sizes along an axis, from the front on; the rest of `x` is left out.

    On CPUs the places are known only at run time. XLA's CPU backend compiles equal operations once, however many there
    are, but operations on slices at two constant places are not equal.
    """
    if len(sizes) < 2 or not x.size or not on_cpus():
        return cut_as_written(x, sizes, axis)
    places = known_late(list(itertools.accumulate(sizes[:-1], initial=0)), x)
    cut = functools.partial(lax.dynamic_slice_in_dim, x, axis=axis, allow_negative_indices=False)
    return [cut(place, size) for place, size in zip(places, sizes, strict=True)]


def late_zeros(like: Any, x: jax.Array) -> jax.Array:
    """Zeros in the shape and type of `like`, which XLA knows only once it has `x`.

    It writes known zeros as large first, and keeps them and a copy of them until they are needed.
    """
    return jnp.broadcast_to(jnp.where(always(x), jnp.zeros((), like.dtype), 1), like.shape)


def joined(parts: Sequence[jax.Array], length: int) -> jax.Array:
    """Vectors of one type, one after another, filled up with zeros to `length`; the inverse of `split`.

    On CPUs each is written where it belongs. XLA's CPU backend would first write all vectors, and then copy them.
    """
    parts = [part for part in parts if part.size]
    if not on_cpus() or len(parts) < 2:
        return filled(jnp.concatenate(parts) if len(parts) > 1 else parts[0], length)
    whole = late_zeros(jax.ShapeDtypeStruct((length,), parts[0].dtype), parts[0])
    starts = list(itertools.accumulate((part.size for part in parts[:-1]), initial=0))
    for part, start in zip(parts, known_late(starts, parts[0]), strict=True):
        whole = lax.dynamic_update_slice(whole, part, (start,), allow_negative_indices=False)
    return whole


def known_late(numbers: Sequence[int], x: jax.Array) -> list[jax.Array]:
    """int32 numbers that XLA's CPU backend knows only once it has `x`, so that operations on them are equal."""
    if not on_cpus():
        return [jnp.int32(number) for number in numbers]
    # From a sort of numbers that are in order: a sort does not fuse.
    key = jnp.broadcast_to(always(x), 2)
    return [number[0] for number in lax.sort((key, *(jnp.full(2, n, jnp.int32) for n in numbers)))[1:]]


def cut_as_written(x: jax.Array, sizes: Sequence[int], axis: int = -1) -> list[jax.Array]:
    """Like `split`, at places that the compiler knows."""
    starts = itertools.accumulate(sizes, initial=0)
    return [lax.slice_in_dim(x, start, start + size, axis=axis) for start, size in zip(starts, sizes, strict=False)]


def sum_of(part: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> jax.Array:
    """The sum of `part` of the elements along an axis.

    `part` gives all elements one sign, and does not change elements that have it. The sum takes one pass. XLA's CPU
    backend gives plain sums to a library, and makes long sums in steps, so it would first write the summands. If the
    compiler shards an axis of the mesh, backends have only plain sums.
    """
    if others_are_automatic():
        return jnp.sum(part(x), axis=axis)
    axis, zero = axis % x.ndim, jnp.zeros((), x.dtype)
    if x.shape[axis] == 1:
        return part(jnp.squeeze(x, axis))  # XLA takes a reduction of one element for that element, without its part
    if x.shape[axis] > STEP and x.shape[axis] % STEP == 0:  # in partial sums: one long sum of float32 loses more
        steps = x.reshape(*x.shape[:axis], -1, STEP, *x.shape[axis + 1 :])
        return jnp.sum(sum_of(part, steps, axis + 1), axis=axis)
    return lax.reduce(x, zero, lambda total, one: total + part(one), (axis,))


def column_sums(parts: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The sum of each of several parts of a matrix, [rows, columns], down its columns.

    All sums take one pass. Separate sums would each compute their inputs again.
    """
    rows, zeros = parts[0].shape[0], tuple(jnp.zeros((), x.dtype) for x in parts)
    if others_are_automatic():
        return [jnp.sum(x, axis=0) for x in parts]

    def add(totals: tuple[jax.Array, ...], one: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(total + x for total, x in zip(totals, one, strict=True))

    if rows > STEP and rows % STEP == 0:  # in partial sums, like in `sum_of`
        steps = tuple(x.reshape(-1, STEP, x.shape[1]) for x in parts)
        return [jnp.sum(x, axis=0) for x in lax.reduce(steps, zeros, add, (1,))]
    return list(lax.reduce(parts, zeros, add, (0,)))


def l1_norm(x: jax.Array) -> jax.Array:
    """The sum of the magnitudes of a vector."""
    return sum_of(jnp.abs, x, 0)


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of matrices."""
    # HIGHEST: with the less exact products that are the default on TPUs and GPUs, own and mean would differ. The large
    # products have few columns, and take only as long as reading the gradient.
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


def max_norm(v: jax.Array) -> jax.Array:
    """The largest magnitude of each row, [rows, d] -> [rows, 1]; not finite if any element is not."""
    # Non-negative floats have the order of their bits, with NaN above all; jnp.max may drop a NaN.
    largest = jnp.max(jax.lax.bitcast_convert_type(jnp.abs(v), jnp.int32), axis=1, keepdims=True)
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def inverse_power(largest: jax.Array) -> jax.Array:
    """The power of two that scales magnitudes, which are not negative, to [1, 2), and those from 2^127 on to [2, 4).

    A product with it is exact, its square neither overflows nor vanishes, and zeros stay zeros. A division may not be
    exact: compilers multiply by the reciprocal, and above 2^126 float32 has no reciprocal.
    """
    info = jnp.finfo(largest.dtype)
    bits = lax.bitcast_convert_type(largest, jnp.int64 if info.bits == 64 else jnp.int32)
    most = 2 * (info.maxexp - 1)  # the sum of the exponents of a number and its inverse, as they are stored
    return lax.bitcast_convert_type(jnp.clip(most - (bits >> info.nmant), 1, most) << info.nmant, largest.dtype)


def l2_norm(v: jax.Array) -> jax.Array:
    """The 2-norm of each row, [rows, d] -> [rows, 1]; not finite if any element is not."""
    down = inverse_power(max_norm(v))
    unit = v * down
    return jnp.sqrt(jnp.sum(unit * unit, axis=1, keepdims=True)) / down


def add_window(y: jax.Array, window: jax.Array, start: jax.Array) -> jax.Array:
    """`y` [..., length] plus `window` [..., w] from place `start` of the last axis on; any part may lie outside `y`."""
    length, wide = y.shape[-1], window.shape[-1]
    if not on_cpus():  # on other devices gathers may be slow, but slices are not
        padded = jnp.pad(window, [(0, 0)] * (window.ndim - 1) + [(length, length)])
        at = jnp.clip(length - start, 0, length + wide)
        return y + lax.dynamic_slice_in_dim(padded, at, length, axis=-1)
    # By places, which fuse into the next operation. They are unsigned: none before the window counts from its end.
    places = lax.iota(jnp.uint32, y.shape[-1]) - start.astype(jnp.uint32)
    last = window.shape[-1] - 1
    return y + jnp.where(places <= last, window.at[..., jnp.minimum(places, last)].get(mode="promise_in_bounds"), 0)


def filled(x: jax.Array, length: int) -> jax.Array:
    """`x` [..., n] with zeros up to `length` along its last axis."""
    missing = length - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pack_front(pieces: Sequence[jax.Array], lengths: Sequence[jax.Array]) -> jax.Array:
    """The first lengths[i] elements of each piece, one after another from the front of one buffer.

    Args:
      pieces: vectors.
      lengths: whole numbers, known only at run time; at most each piece's size.

    Returns:
      A vector of the size of all pieces together. Elements after the packed ones have no meaning.
    """
    buffer = jnp.zeros(sum(x.size for x in pieces), pieces[0].dtype)
    start = jnp.int32(0)
    for piece, length in zip(pieces, lengths, strict=True):
        # Each piece overwrites the tail of the one before.
        buffer = lax.dynamic_update_slice(buffer, piece, (start,), allow_negative_indices=False)
        start = start + length
    return buffer


def unpack_front(buffer: jax.Array, lengths: Sequence[jax.Array], sizes: Sequence[int]) -> list[jax.Array]:
    """The inverse of `pack_front`: vectors of these sizes; only the first lengths[i] elements have a meaning."""
    pieces, start = [], jnp.int32(0)
    for length, size in zip(lengths, sizes, strict=True):
        pieces.append(lax.dynamic_slice(buffer, (start,), (size,), allow_negative_indices=False))
        start = start + length
    return pieces
