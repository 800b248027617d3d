"""Randomness that is the same in every context: under vmap, pmap, shard_map, and in one process or many.

Every draw comes from `fold_in(key(seed), step)`. The worker's index is folded in only where workers must differ
(stochastic rounding), and not where they must agree (a random start). Keys are threefry whatever jax's default,
because other generators draw other numbers under vmap.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.views import split

IMPL = "threefry2x32"
# For `distinct`. With three double rounds a tiny n gives some pairs too often; see the tests.
DOUBLE_ROUNDS = 6


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of a step, the same on all workers; all 64 bits of the seed count, even if jax has no 64-bit types."""
    words = jnp.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], jnp.uint32)
    return jax.random.fold_in(key_of(words), step)


def key_of(words: jax.Array) -> jax.Array:
    """The key, or keys, whose data these words are, uint32 [..., 2]."""
    return jax.random.wrap_key_data(words, impl=IMPL)


def scattered(shape: tuple[int, ...], dtype: Any, *seeds: Any) -> jax.Array:
    """Numbers in (-1, 1) without a pattern, [shape], from a hash of each place; the same seeds give the same numbers.

    MurmurHash3's finaliser makes them, so their quality is below a generator's. But they take a few operations, which
    fuse into the next ones, while `jax.random` compiles for a tenth of a second.

    Args:
      shape: a shape of fewer than 2^32 elements.
      dtype: a floating type.
      *seeds: whole numbers: Python's, of up to 64 bits, or int32.
    """
    state: Any = jnp.uint32(0x9E3779B9)
    for seed in itertools.chain.from_iterable(map(_words, seeds)):
        state = mixed(state ^ lax.convert_element_type(seed, jnp.uint32)) + jnp.uint32(0x9E3779B9)
    bits = mixed(lax.iota(jnp.uint32, math.prod(shape)) ^ state).reshape(shape)
    return ((bits >> 8).astype(dtype) + jnp.asarray(0.5, dtype)) * jnp.asarray(2.0**-23, dtype) - 1


def uniform23(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Uniform numbers on the grid (j + 1/2) / 2^23, float32 [rows, columns], from a hash of their places and the key.

    Two rounds of MurmurHash3's finaliser are good enough for random rounding. They fuse into the next operation, and
    take a tenth of the operations of threefry.
    """
    words = jax.random.key_data(key)
    bits = mixed(mixed(lax.iota(jnp.uint32, rows * columns) ^ words[0]) ^ words[1]).reshape(rows, columns)
    return ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)  # with one more bit, 1 could be drawn


def _words(seed: Any) -> tuple[Any, ...]:
    """A seed as words of 32 bits; most seeds are one word."""
    if not isinstance(seed, int):
        return (seed,)
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return (low, high & 0xFFFFFFFF) if high else (low,)


def mixed(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser, a bijection of uint32."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16


def threefry2x32(key: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011): jax's own block function, unrolled.

    Args:
      key: uint32 [2].
      x0: first words of the counters, uint32 [...].
      x1: second words, uint32 [...].

    Returns:
      The two words of each block, uint32 [...].
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation | x1 >> (32 - rotation)) ^ x0
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def distinct(words: jax.Array, sizes: Sequence[int], counts: Sequence[int]) -> list[jax.Array]:
    """For each of some n and k, k different whole numbers below n, without a shuffle of all n.

    They are the images of 0 to k - 1 under a permutation of [0, n) that a key determines. The permutation is a Feistel
    network on pairs (x div b, x mod b), in which a random function of each half moves the other in turn, after Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. a b exceeds n by less than sqrt(n) + 1, so a
    number rarely falls outside; then it goes through again until it falls inside. One loop computes all numbers side
    by side.

    Args:
      words: the data of a key for each n, uint32 [., 2]; the same key gives the same numbers in every context.
      sizes: each n, 1 to 2^31 - 1.
      counts: each k, 0 to n.

    Returns:
      int32 [k] for each n, in random order.

    Raises:
      ValueError: a size or count is out of range.
    """
    for size, count in zip(sizes, counts, strict=True):
        if not 1 <= size < 2**31:
            raise ValueError(f"n={size} must be from 1 to 2^31 - 1")
        if not 0 <= count <= size:
            raise ValueError(f"k={count} must be from 0 to n={size}")
    roots = [math.isqrt(n - 1) + 1 for n in sizes]

    others = [-(-size // root) for size, root in zip(sizes, roots, strict=True)]
    starts = jnp.array([0, *itertools.accumulate(counts)][:-1], jnp.int32)
    # The index of the n that owns each number: the count of those that begin up to there, minus one.
    owner = jnp.cumsum(jnp.zeros(sum(counts), jnp.int32).at[starts].add(1, mode="drop")) - 1
    n, a, b = (jnp.take(jnp.array(each, jnp.uint32), owner, mode="clip") for each in (sizes, roots, others))
    key = jnp.take(words.T, owner, axis=1, mode="clip")

    def double_round(i: jax.Array, halves: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, right = halves
        count = lax.convert_element_type(2 * i, jnp.uint32)
        left = (left + threefry2x32(key, right, count)[0] % a) % a
        right = (right + threefry2x32(key, left, count + 1)[0] % b) % b
        return left, right

    def go_on(turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        i, x = turn
        return (i == 0) | jnp.any(x >= n)

    def permute(turn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, x = turn
        left, right = lax.fori_loop(0, DOUBLE_ROUNDS, double_round, (x // b, x % b))
        return i + 1, jnp.where((i == 0) | (x >= n), left * b + right, x)

    places = lax.iota(jnp.uint32, sum(counts)) - jnp.take(starts, owner, mode="clip").astype(jnp.uint32)
    # key & 0 is zero, with a type that varies over the mesh like the keys.
    drawn = lax.while_loop(go_on, permute, (jnp.int32(0), places + (key[0] & 0)))[1].astype(jnp.int32)
    return split(drawn, counts)
