"""Elias' recursive code of whole numbers, and QSGD's two codes of buckets of signed levels, inside jit.

Elias, "Universal codeword sets and representations of the integers", IEEE Trans. Inf. Theory 1975: omega(k) of
k >= 1 starts as "0". While k > 1, bin(k) is put before it, and k becomes the length of bin(k) minus one. Small
numbers take few bits: 1 takes 1, 2 and 3 take 3, 4 to 7 take 6, 8 to 15 take 7.

Alistarh et al., "QSGD", NeurIPS 2017, section 3.2, code a bucket of d levels in two ways. We read them so (the appendix
that defines them was not at hand):

- "sparse", Code_s: for each nonzero, omega(its distance from the one before), a sign bit, omega(|level|). The first
  distance counts from just before the bucket, so it is the position, from 1.
- "dense", Code'_s: for each level, omega(|level| + 1), then a sign bit. The sign of a zero has no meaning and is left
  out here. With `sign_for_zeros`, which we take for the paper's form, it is there, and is 0.

A sign bit of 1 is a minus. The codes of many buckets follow each other without a gap in one buffer of bytes, with the
first bit highest. The length of each bucket's code, in bits, travels beside the buffer. The lengths tell where each
bucket begins, so that all buckets are decoded at once. They also tell where it ends, so that the sparse code needs no
count of nonzeros (the paper does not say how this code ends). A count would take as many bits, and a decoder would have
to decode each bucket to find the next.

Buckets are coded side by side, each from nonzero to nonzero. A scatter of all codes at their prefix sums contends for
words on a CPU; this way takes a fourth to a half of its time. The number of steps is the number of nonzeros in the
fullest bucket, so many short buckets are fast and a single long one is slow.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FORMS = ("sparse", "dense")
LARGEST = 2**20 - 1  # its omega takes 31 bits, so that two such codes and a sign fit two words
MOST_BYTES = 2**28 - 1  # the bytes of the largest buffer whose bits an int32 can count
BLOCK = 32  # coordinates; one bit for each, zero or not, fills a word


def omega(k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Elias' code of each number, uint32 1..LARGEST [...]: (code in the lowest bits, its bits), both uint32 [...]."""
    code, length = jnp.zeros_like(k), jnp.ones_like(k)
    for _ in range(4):  # LARGEST has four groups
        more, log2 = k > 1, 31 - lax.clz(k)
        code = jnp.where(more, code | k << length, code)
        length = jnp.where(more, length + log2 + 1, length)
        k = jnp.where(more, log2, 1)
    return code, length


def read_omega(window: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `omega`: reads a code from the highest bit of each word on.

    Args:
      window: uint32 [...].

    Returns:
      (the number, 0 if it is above LARGEST; the bits of its code), both uint32 [...].
    """
    k, length = jnp.ones_like(window), jnp.zeros_like(window)
    for _ in range(4):
        rest = window << length
        more = (rest >> 31 == 1) & (k < 20)  # a group of more than 20 bits is larger than LARGEST
        length, k = jnp.where(more, length + k + 1, length), jnp.where(more, rest >> 31 - jnp.minimum(k, 31), k)
    ends = window << length >> 31 == 0
    return jnp.where(ends, k, 0), length + 1


def lengths(levels: jax.Array, form: str, *, sign_for_zeros: bool = False) -> jax.Array:
    """The bits that the code of each bucket takes.

    Args:
      levels: integers [rows, d], of magnitude at most LARGEST, in the dense form LARGEST - 1; d at most LARGEST.
      form: "sparse" or "dense".
      sign_for_zeros: dense only: a sign bit for zeros too, as in the paper.

    Returns:
      int32 [rows].

    Raises:
      ValueError: there is no such form, or d is too large.
    """
    zero_bits = _zero_bits(form, sign_for_zeros)
    _require_dimension(levels.shape[1])
    if form == "dense":
        magnitude = jnp.abs(levels.astype(jnp.int32)).astype(jnp.uint32)
        _, bits = omega(magnitude + 1)
        return jnp.sum(jnp.where(magnitude > 0, bits.astype(jnp.int32) + 1, zero_bits), axis=1, dtype=jnp.int32)

    def add(total: jax.Array, found: jax.Array, zeros: jax.Array, level: jax.Array) -> jax.Array:
        _, bits, skipped = _code(zeros, level, zero_bits)
        return total + jnp.where(found, skipped + bits, 0)

    # Not jnp.zeros: the loop's carry must have the type of the sum, which under shard_map varies like the levels.
    none = jnp.sum(levels.astype(jnp.int32) * 0, axis=1, dtype=jnp.int32)
    return _walk(levels, none, add, none)


def encode(levels: jax.Array, capacity: int, form: str, *, sign_for_zeros: bool = False) -> tuple[jax.Array, jax.Array]:
    """The codes of all buckets, one after another.

    All fit if sum(lengths) <= 8 * capacity. If not, the first bucket that does not fit and all after it are left out.
    Their lengths are not left out, so that the receiver sees it.

    Args:
      levels: the levels, like in `lengths`.
      capacity: the bytes of the buffer, 1 to 2^28 - 1.
      form: "sparse" or "dense".
      sign_for_zeros: like in `lengths`.

    Returns:
      (uint8 [capacity], zeros after the last code; `lengths`, int32 [rows]).

    Raises:
      ValueError: in the cases of `lengths`; or the capacity is out of range.
    """
    zero_bits = _zero_bits(form, sign_for_zeros)
    _require_capacity(capacity)
    size = lengths(levels, form, sign_for_zeros=sign_for_zeros)
    # Up to the first sum that is too large, none has wrapped.
    end = jnp.cumsum(size.astype(jnp.uint32), dtype=jnp.uint32)
    fits = lax.cummin((end <= 8 * capacity).astype(jnp.int32)) == 1

    def write(state: Any, found: jax.Array, zeros: jax.Array, level: jax.Array) -> Any:
        words, offset = state
        code, bits, skipped = _code(zeros, level, zero_bits)
        offset = jnp.where(found, offset + skipped, offset)
        shift = (offset & 31).astype(jnp.uint32)
        # A word of the code leaves at most 31 bits to the next word of the buffer.
        shares = [word >> shift for word in code] + [jnp.zeros_like(shift)]
        for i, word in enumerate(code, 1):
            shares[i] = shares[i] | word << 31 - shift << 1
        for i, share in enumerate(shares):
            # No two codes share a bit: to add is to join.
            words = words.at[(offset >> 5) + i].add(jnp.where(found, share, 0), mode="drop")
        return words, jnp.where(found, offset + bits, offset)

    words = jnp.zeros(-(-capacity // 4), jnp.uint32) + jnp.sum(end * 0, dtype=jnp.uint32)
    first = jnp.where(fits, 0, levels.shape[1])
    words, _ = _walk(levels, first, write, (words, end.astype(jnp.int32) - size))
    return lax.bitcast_convert_type(words, jnp.uint8)[:, ::-1].reshape(-1)[:capacity], size


def decode(
    data: jax.Array, lengths: jax.Array, d: int, most: int, form: str, *, sign_for_zeros: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `encode`, for bytes and lengths that may be anything.

    They are accepted if they are a result of `encode` for some levels within -most..most that all fit. That is: no
    length is negative, their sum is at most the bits of `data`, and each bucket's bits are exactly the code of d such
    levels. (So each codeword ends within its bucket, no number is larger than d or `most` allow, and the sign of a
    zero, if the form has one, is 0.) Bits after the last code have no meaning.

    Args:
      data: uint8 [capacity], at most 2^28 - 1.
      lengths: the bits of each bucket, int32 [rows].
      d: the size of a bucket, at most LARGEST.
      most: the largest magnitude of a level, at most LARGEST, in the dense form LARGEST - 1.
      form: "sparse" or "dense".
      sign_for_zeros: like in `lengths`.

    Returns:
      (levels, int32 [rows, d], within -most..most even if not accepted; whether accepted, bool []).

    Raises:
      ValueError: an argument is out of range.
    """
    zero_bits = _zero_bits(form, sign_for_zeros)
    _require_dimension(d)
    _require_capacity(data.size)
    if not 1 <= most <= LARGEST - (form == "dense"):
        raise ValueError(f"most={most} must be 1 to {LARGEST - (form == 'dense')}")
    rows, bits = len(lengths), 8 * data.size
    end = jnp.cumsum(lengths.astype(jnp.uint32), dtype=jnp.uint32)
    # Up to the first sum that is too large, none has wrapped.
    legal = jnp.all((lengths >= 0) & (lengths <= bits) & (end <= bits))
    end = jnp.where(legal, end.astype(jnp.int32), 0)
    start = jnp.where(legal, end - lengths, 0)
    words = lax.bitcast_convert_type(jnp.pad(data, (0, -data.size % 4)).reshape(-1, 4)[:, ::-1], jnp.uint32)
    row = lax.iota(jnp.int32, rows) * d

    def step(state: Any) -> Any:
        offset, done, good, levels = state
        # 64 bits from the offset on. Bits beyond the buffer's end are beyond the bucket's end, so they are refused.
        shift = (offset & 31).astype(jnp.uint32)
        a, b, c = (words.at[(offset >> 5) + i].get(mode="clip") for i in range(3))
        high, low = a << shift | b >> 1 >> 31 - shift, b << shift | c >> 1 >> 31 - shift
        left = end - offset
        if zero_bits:
            # A whole run of zeros, which may end with the bucket or with the word.
            zeros = jnp.minimum(lax.clz(high).astype(jnp.int32), left) // zero_bits
            skipped = zeros * zero_bits
            some = (skipped < left) & (skipped < 32)
        else:
            distance, used = read_omega(high)
            zeros, skipped = distance.astype(jnp.int32) - 1, used.astype(jnp.int32)
            some = jnp.ones_like(good)
        shift = jnp.minimum(skipped, 31).astype(jnp.uint32)
        high = high << shift | low >> 1 >> 31 - shift
        k, used = read_omega(high if zero_bits else high << 1)
        sign = high << (used if zero_bits else 0) >> 31
        magnitude = k.astype(jnp.int32) - (1 if zero_bits else 0)

        active, at = left > 0, done + zeros
        skipped = skipped + jnp.where(some, used.astype(jnp.int32) + 1, 0)
        done = at + some.astype(jnp.int32)
        fine = (zeros >= 0) & (done <= d) & (skipped <= left)
        fine = fine & (~some | (magnitude >= 1) & (magnitude <= most))
        index = jnp.where(active & fine & some, row + at, rows * d)
        levels = levels.at[index].set(jnp.where(sign == 1, -magnitude, magnitude), mode="drop")
        # Each step moves a bucket on by at least one coordinate, or ends it: there are at most d + 1 steps.
        offset = jnp.where(active & fine, offset + skipped, end)
        return offset, jnp.where(active, done, state[1]), good & (fine | ~active), levels

    none = start * 0  # has the type that the loop gives it, like in `lengths`
    levels = jnp.zeros(rows * d, jnp.int32) + jnp.sum(none, dtype=jnp.int32)
    state = (start, none, none == 0, levels)
    _, done, good, levels = lax.while_loop(lambda state: jnp.any(state[0] < end), step, state)
    whole = jnp.all(good & (done == d)) if zero_bits else jnp.all(good)
    return levels.reshape(rows, d), legal & whole


def _zero_bits(form: str, sign_for_zeros: bool) -> int:
    """The bits that a zero takes."""
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(map(repr, FORMS))}")
    if sign_for_zeros and form == "sparse":
        raise ValueError("sign_for_zeros: zeros are not in the sparse code; use form='dense'")
    return 0 if form == "sparse" else 2 if sign_for_zeros else 1


def _require_dimension(d: int) -> None:
    if not 1 <= d <= LARGEST:
        raise ValueError(f"buckets of d={d} levels: d must be 1 to {LARGEST}")


def _require_capacity(capacity: int) -> None:
    if not 1 <= capacity <= MOST_BYTES:
        raise ValueError(f"a buffer of {capacity} bytes: it must be of 1 to {MOST_BYTES}, whose bits an int32 counts")


def _code(zeros: jax.Array, level: jax.Array, zero_bits: int) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The code of a nonzero after so many zeros.

    Args:
      zeros: int32 [rows].
      level: int32 [rows].
      zero_bits: the bits that a zero takes; 0 is the sparse form.

    Returns:
      (uint32 words [rows] that begin with the code's highest bit, the code's bits, the zero bits before it).
    """
    magnitude, sign = jnp.abs(level).astype(jnp.uint32), (level < 0).astype(jnp.uint32)
    if zero_bits:
        code, length = omega(magnitude + 1)
        length = length + 1
        return [(code << 1 | sign) << 32 - length], length.astype(jnp.int32), zeros * zero_bits
    distance, first = omega(zeros.astype(jnp.uint32) + 1)
    code, length = omega(jnp.maximum(magnitude, 1))
    rest = (sign << length | code) << 31 - length
    words = [distance << 32 - first | rest >> first, rest << 32 - first]
    return words, (first + length + 1).astype(jnp.int32), jnp.zeros_like(zeros)


def _walk(levels: jax.Array, first: jax.Array, visit: Callable[..., Any], state: Any) -> Any:
    """Visits the nonzeros of each bucket in order, and all buckets side by side.

    Args:
      levels: integers [rows, d].
      first: where to begin in each bucket, int32 [rows].
      visit: (state, found, zeros, level) -> state; zeros, int32 [rows], is the number of zeros between this level and
        the last. It must not change buckets without a nonzero in this step, where found is false.
      state: the first state.

    Returns:
      The last state.
    """
    rows, d = levels.shape
    blocks = jnp.pad(levels, ((0, 0), (0, -d % BLOCK))).reshape(rows, -(-d // BLOCK), BLOCK)
    bit = jnp.uint32(1) << lax.iota(jnp.uint32, BLOCK)
    nonzero = jnp.sum(jnp.where(blocks != 0, bit, 0), axis=2, dtype=jnp.uint32)
    row = lax.iota(jnp.int32, rows)

    def step(carry: Any) -> Any:
        at, after, state = carry
        block = nonzero.at[row, at >> 5].get(mode="clip") >> (at & 31).astype(jnp.uint32)
        found = (block != 0) & (at < d)
        lowest = lax.population_count((block & -block) - 1).astype(jnp.int32)
        at = jnp.where(found, at + lowest, (at | 31) + 1)  # or to the next block
        level = levels.at[row, at].get(mode="clip").astype(jnp.int32)
        state = visit(state, found, at - after, level)
        return jnp.where(found, at + 1, at), jnp.where(found, at + 1, after), state

    return lax.while_loop(lambda carry: jnp.any(carry[0] < d), step, (first, first, state))[2]


# What to expect, on the host


@functools.cache
def expected_bits(d: int, s: int, form: str, *, sign_for_zeros: bool = False) -> float:
    """The expected bits a coordinate of the code of normal values.

    The values of a bucket are independent and normal, divided by their 2-norm and rounded at random to s levels, like
    in QSGD with norm="l2". Apart from their common norm, coordinates are taken as independent.

    Args:
      d: the size of a bucket, at most LARGEST.
      s: the number of levels, at least 1.
      form: "sparse" or "dense".
      sign_for_zeros: like in `lengths`.

    Returns:
      The bits of the code over d; the norm and the length of the code do not count.

    Raises:
      ValueError: an argument is out of range.
    """
    zero_bits = _zero_bits(form, sign_for_zeros)
    _require_dimension(d)
    if s < 1:
        raise ValueError(f"s={s} levels: it must be at least 1")
    # The angle between a coordinate's axis and the hyperplane across it has the density cos^(d - 2).
    middle = (np.arange(2**13) + 0.5) / 2**13
    angle = middle * min(math.pi / 2, 9 / math.sqrt(d)) if d > 1 else np.array([math.pi / 2])
    weight = np.cos(angle) ** (d - 2)
    weight /= weight.sum()
    y = s * np.sin(angle)
    below = np.floor(y)
    up = y - below

    def mean(f: Callable[[np.ndarray], np.ndarray]) -> float:
        """The mean of f(|level|)."""
        return float(weight @ ((1 - up) * f(below) + up * f(below + 1)))

    if zero_bits:
        return mean(lambda k: np.where(k > 0, _omega_bits(k + 1) + 1, zero_bits))
    density = mean(lambda k: np.minimum(k, 1))
    bits = mean(lambda k: np.where(k > 0, _omega_bits(np.maximum(k, 1)) + 1, 0))
    distance = np.arange(1, min(d, math.ceil(40 / density)) + 1)
    first = density * (1 - density) ** (distance - 1)
    return bits + float((first * (1 + (d - distance) * density)) @ _omega_bits(distance)) / d


def shorter_form(d: int, s: int) -> str:
    """The form with fewer `expected_bits`: sparse while s is below about 3.3 sqrt(d)."""
    return min(FORMS, key=lambda form: expected_bits(d, s, form))


def _omega_bits(k: np.ndarray) -> np.ndarray:
    """The bits of omega(k), for whole k >= 1."""
    length = np.ones(k.shape)
    while (k > 1).any():
        log2 = np.frexp(k)[1] - 1
        length += np.where(k > 1, log2 + 1, 0)
        k = np.maximum(log2, 1)
    return length
