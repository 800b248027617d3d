"""Randomness that is the same in every context: under vmap, pmap, shard_map, and in one process or many.

Every draw comes from `fold_in(key(seed), step)`; the worker's index is folded in only where workers must
differ (stochastic rounding), and not where they must agree (a random start). Keys are threefry whatever
jax's default, as other generators draw other numbers under vmap.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.collectives import AxisName, worker_index

# Of `distinct`. With three of them tiny n give some pairs too often; see the tests.
DOUBLE_ROUNDS = 6


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of a step, the same on all workers."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def worker_key(seed: int, step: jax.Array, axis_name: AxisName) -> jax.Array:
    """The key of a step that is this worker's own."""
    return jax.random.fold_in(step_key(seed, step), worker_index(axis_name))


def uniform16(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Uniform numbers on the grid (j + 1/2) / 2^16, float32 [rows, columns]; columns a multiple of 4.

    The midpoints make the mean of floor(y + u) differ from y by at most 2^-17. One threefry block serves
    four numbers, and unrolled it fuses into its consumer: on a CPU a quarter of the time of
    `jax.random.bits`.
    """
    quarter = columns // 4
    counter = jax.lax.iota(jnp.uint32, rows * quarter).reshape(rows, quarter)
    words = threefry2x32(jax.random.key_data(key), counter, jnp.zeros_like(counter))
    halves = [half.astype(jnp.uint16) for word in words for half in (word, word >> 16)]
    return (jnp.concatenate(halves, axis=1).astype(jnp.float32) + 0.5) * 2.0**-16


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


@functools.partial(jax.jit, static_argnames=("n", "k"))  # so that leaves of one shape are traced once
def distinct(key: jax.Array, n: int, k: int) -> jax.Array:
    """Whole numbers below n, k different ones, drawn without shuffling n of them.

    The places 0 to k - 1 under a permutation of [0, n) that the key determines: a Feistel network on pairs
    (x div b, x mod b), each half moved in turn by a random function of the other, after Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. As a b exceeds n by less than sqrt(n) + 1, what falls
    outside is rare, and goes through again until it falls inside.

    Args:
      key: a key; the same numbers for the same key in every context.
      n: 1 to 2^31 - 1.
      k: 0 to n.

    Returns:
      int32 [k], in random order.

    Raises:
      ValueError: `n` or `k` out of range.
    """
    if not 1 <= n < 2**31:
        raise ValueError(f"n={n} must be from 1 to 2^31 - 1")
    if not 0 <= k <= n:
        raise ValueError(f"k={k} must be from 0 to n={n}")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    words = jax.random.key_data(key)

    def double_round(i: jax.Array, halves: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, right = halves
        count = lax.convert_element_type(2 * i, jnp.uint32)
        left = (left + threefry2x32(words, right, count)[0] % a) % a
        right = (right + threefry2x32(words, left, count + 1)[0] % b) % b
        return left, right

    def go_on(turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        i, x = turn
        return (i == 0) | jnp.any(x >= n)

    def permute(turn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, x = turn
        left, right = lax.fori_loop(0, DOUBLE_ROUNDS, double_round, (x // b, x % b))
        return i + 1, jnp.where((i == 0) | (x >= n), left * b + right, x)

    # words[0] & 0 is zero, of a type that varies over the mesh where the key does.
    start = lax.iota(jnp.uint32, k) + (words[0] & 0)
    return lax.while_loop(go_on, permute, (jnp.int32(0), start))[1].astype(jnp.int32)
