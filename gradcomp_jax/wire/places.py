"""Elias-Fano codes of places: whole numbers in rising order, in a fixed number of bytes.

Elias, "Efficient Storage and Retrieval by Content and Address of Static Files", Journal of the ACM 1974; Fano, "On the
Number of Bits Required to Implement an Associative Memory", MIT 1971. Of k places below n, the l = floor(log2(n / k))
low bits travel as they are. The high parts do not fall, so a row of bits holds them: for place number i, from 0 on, the
bit at i + its high part is set. The row has k + ceil(n / 2^l) bits. All together takes at most 2 + log2(n / k) bits a
place, and no fixed code of such sets can save more than about half a bit of these.

The place n itself is legal too, several times. It stands for no place at all.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.select import set_bits
from gradcomp_jax.views import filled
from gradcomp_jax.wire.packing import fields_bytes, pack_fields, unpack_fields


def low_bits(k: int, n: int) -> int:
    """l, the number of bits of each of k places below n that travel as they are."""
    return (n // k).bit_length() - 1


def row_bits(k: int, n: int) -> int:
    """The number of bits in the row that holds the high parts."""
    return k + -(-n >> low_bits(k, n))


def places_bytes(k: int, n: int) -> int:
    """The bytes of k places below n: the low bits and the row each fill up whole bytes."""
    return fields_bytes(k, low_bits(k, n)) + -(-row_bits(k, n) // 8)


def _ranks(shape: tuple[int, ...]) -> jax.Array:
    """0, 1, 2, ... along the last axis, int32 of this shape."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def pack_places(places: jax.Array, n: int) -> jax.Array:
    """Packs places.

    Args:
      places: int32 [rows, k], in each row different ones from 0 to n - 1 in rising order, and then perhaps some n.
      n: the number of places that there are, at least k.

    Returns:
      uint8 [rows, places_bytes(k, n)].
    """
    k = places.shape[-1]
    low, bits = low_bits(k, n), row_bits(k, n)
    at = (places >> low) + _ranks(places.shape)
    one = jnp.uint32(1) << (at & 31).astype(jnp.uint32)
    # By comparison with each word: a scatter of single bits takes far longer. The sum of different bits joins them.
    in_word = (at >> 5)[..., None] == _ranks((*(1,) * at.ndim, -(-bits // 32)))
    words = jnp.sum(jnp.where(in_word, one[..., None], 0), axis=-2, dtype=jnp.uint32)
    row = lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)[..., : -(-bits // 8)]
    fields = (places & (1 << low) - 1).astype(jnp.uint8 if low <= 8 else jnp.uint32)
    return jnp.concatenate([pack_fields(fields, low), row], axis=-1)


def unpack_places(data: jax.Array, k: int, n: int) -> jax.Array:
    """The inverse of `pack_places`: uint8 [rows, places_bytes(k, n)] to int32 [rows, k].

    Bytes that `pack_places` did not make give numbers that may be above n, but none below 0.
    """
    low, count = low_bits(k, n), -(-row_bits(k, n) // 32)
    begin = fields_bytes(k, low)
    row = filled(data[..., begin:], 4 * count)
    words = lax.bitcast_convert_type(row.reshape(*row.shape[:-1], count, 4), jnp.uint32)
    index, bit = jax.vmap(set_bits, (0, None))(words, lax.iota(jnp.int32, k))
    high = jnp.maximum(32 * index + bit - _ranks(index.shape), 0)
    return high << low | unpack_fields(data[..., :begin], k, low).astype(jnp.int32)
