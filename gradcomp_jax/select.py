"""Places in large vectors: where a mask is true, and where the largest magnitudes are.

Both work on bits. One pass packs a mask into 32-bit words, in order. The place of its r-th set bit is then a binary
search in the running count of bits, and five halvings of a word. There is no scatter, and no sort as long as the
vector.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.wire.packing import pack

# `largest` looks at every 61st element before it reads all. 61 is prime: widths of layers share no factor with it.
STRIDE = 61
SIGMAS = 6

# Up to this size a sort costs less than to compile anything better.
SMALL = 2**16
NONE = -1  # below every magnitude


def bit_words(mask: jax.Array, axis: int = -1) -> jax.Array:
    """A mask with 32 elements a word: bool, n along `axis`, to uint32, ceil(n / 32) along the last axis.

    Element 32 w + b is bit b of word w. The axes other than `axis` come first, in their order.
    """
    axis %= mask.ndim
    before, n, after = mask.shape[:axis], mask.shape[axis], mask.shape[axis + 1 :]
    fill = [(0, -n % 32) if i == axis else (0, 0) for i in range(mask.ndim)]
    eights = jnp.pad(mask, fill).astype(jnp.uint8).reshape(*before, -1, 8, *after)
    octets = jnp.moveaxis(pack(eights, 1, axis=axis + 1).squeeze(axis + 1), axis, -1)
    return lax.bitcast_convert_type(octets.reshape(*before, *after, -1, 4), jnp.uint32)


@jax.jit  # so that arrays of one shape are traced once
def set_bits(words: jax.Array, ranks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The places of set bits in a row of words.

    Args:
      words: uint32 [w], with fewer than 2^31 set bits.
      ranks: int32 [...]: 0 for the first set bit, 1 for the second.

    Returns:
      For each rank the index of the word, and of the bit in it, 0 for the lowest; int32 [...]. If fewer bits are set,
      the index of the word is w, and that of the bit has no meaning.
    """
    if not words.size:
        return jnp.zeros_like(ranks), jnp.zeros_like(ranks)
    ends = jnp.cumsum(lax.population_count(words), dtype=jnp.int32)
    index = _count_reached(ends, ranks)
    word = _at(words, jnp.minimum(index, words.size - 1))
    rank = ranks - jnp.where(index > 0, _at(ends, jnp.maximum(index - 1, 0)), 0)

    def halve(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rank, word, bit = found
        half = jnp.int32(16) >> i
        low = word & ((jnp.uint32(1) << half.astype(jnp.uint32)) - 1)
        count = lax.population_count(low).astype(jnp.int32)
        beyond = rank >= count
        high = word >> half.astype(jnp.uint32)
        return jnp.where(beyond, rank - count, rank), jnp.where(beyond, high, low), jnp.where(beyond, bit + half, bit)

    return index, lax.fori_loop(0, 5, halve, (rank, word, 0 * rank))[2]


def _count_reached(ends: jax.Array, ranks: jax.Array) -> jax.Array:
    """The count of the rising numbers `ends` that each rank reaches, found by bisection.

    This is jnp.searchsorted(ends, ranks, side="right"), which jax 0.10 cannot trace in a shard_map that leaves a
    further axis to the compiler.
    """
    bits = ends.size.bit_length()

    # A loop: if it were unrolled, XLA would copy the earlier steps into each.
    def step(i: jax.Array, count: jax.Array) -> jax.Array:
        further = count + (jnp.int32(1) << (bits - 1 - i))
        reached = _at(ends, jnp.minimum(further, ends.size) - 1) <= ranks
        return jnp.where((further <= ends.size) & reached, further, count)

    return lax.fori_loop(0, bits, step, 0 * (ranks + ends[0]))  # zeros whose type varies like both


def _at(x: jax.Array, places: jax.Array) -> jax.Array:
    """x[places] for places inside x, without the operations that give other places a meaning."""
    return x.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def positions(mask: jax.Array, size: int) -> jax.Array:
    """The first `size` places where a mask is true, in order, filled up with n: bool [n] -> int32 [size]."""
    index, bit = set_bits(bit_words(mask), lax.iota(jnp.int32, size))
    return jnp.where(index < -(-mask.size // 32), 32 * index + bit, mask.size)


@functools.partial(jax.jit, static_argnames="k")  # so that leaves of one shape are traced once
def largest(x: jax.Array, k: int) -> jax.Array:
    """The places of the k largest magnitudes, exactly; among equal ones the first count.

    A NaN counts as infinity. In large vectors a sample of every 61st element gives a threshold that between k and a
    little over k elements pass, with room for six standard deviations on either side. One pass over `x` lists the
    elements that pass, and the k largest are found among them. Elements are ordered by magnitude and then by place, so
    that many equal ones, such as zeros, do not mislead the sample. If the sample does mislead (elements of one kind,
    61 apart), all elements are sorted. If it would not pay (k near n), the threshold is searched bit by bit over all of
    `x`, in 31 passes.

    Under vmap the list and the sort are both computed, like both branches of every `lax.cond`.

    Args:
      x: float32 [n], n below 2^31.
      k: the number of places, 0 to n.

    Returns:
      int32 [k], in no particular order.

    Raises:
      ValueError: `k` is out of range.
    """
    n = x.size
    if not 0 <= k <= n:
        raise ValueError(f"k={k} must be from 0 to {n}, the size of x")
    magnitude = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    if n <= SMALL:
        return lax.top_k(magnitude, k)[1]
    rank, capacity = _bracket(k)
    if 4 * capacity > n:
        return _search(magnitude, k)
    reached, place = (found[-1] for found in lax.top_k(magnitude[::STRIDE], rank))
    candidates = positions(_passes(magnitude, reached, STRIDE * place), capacity + 1)

    def among_candidates() -> jax.Array:
        there = candidates < n
        found = jnp.where(there, _at(magnitude, jnp.where(there, candidates, 0)), NONE)
        return _at(candidates, lax.top_k(found, k)[1])

    enough = (candidates[k - 1] < n) & (candidates[capacity] == n)
    return lax.cond(enough, among_candidates, lambda: lax.top_k(magnitude, k)[1])


def _bracket(k: int) -> tuple[int, int]:
    """The rank in the sample that at least k elements reach, and the most elements that reach it.

    Each has room for six standard deviations.
    """
    rank = k / STRIDE
    rank = math.ceil(rank + SIGMAS * math.sqrt(rank) + SIGMAS)
    return rank, math.ceil(STRIDE * (rank + SIGMAS * math.sqrt(rank) + SIGMAS))


def _passes(magnitude: jax.Array, reached: jax.Array, place: jax.Array) -> jax.Array:
    """Whether each element comes no later than (reached, place), in the order of falling magnitude and then place."""
    return (magnitude > reached) | ((magnitude == reached) & (lax.iota(jnp.int32, magnitude.size) <= place))


def _search(magnitude: jax.Array, k: int) -> jax.Array:
    """The places of the k largest, in rising order, from a search for the bits of the k-th."""
    # Floats that are not negative have the order of their bits.
    keys = lax.bitcast_convert_type(magnitude, jnp.int32)
    rows = jnp.pad(keys, (0, -keys.size % 1024), constant_values=NONE).reshape(-1, 32)

    def count(mask: jax.Array) -> jax.Array:
        # Step by step: XLA's CPU backend adds up a long row of integers ten times slower.
        few = jnp.sum(mask, axis=1, dtype=jnp.uint8).reshape(-1, 32)
        return jnp.sum(jnp.sum(few.astype(jnp.int32), axis=1, dtype=jnp.int32), dtype=jnp.int32)

    def refine(i: jax.Array, key: jax.Array) -> jax.Array:
        trial = key | jnp.int32(1) << (30 - i)
        return jnp.where(count(rows >= trial) >= k, trial, key)

    # Zero, with a type that varies over the mesh like the keys.
    key = lax.fori_loop(0, 31, refine, keys[0] & 0)
    index, bit = set_bits(bit_words(keys == key), k - 1 - count(rows > key))
    return positions(_passes(keys, key, 32 * index + bit), k)
