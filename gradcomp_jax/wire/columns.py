"""Sparse columns: the entries of a matrix that are sent, and for each column the two values that they stand for.

This is the format of adaptive quantisation (Dryden, Moon, Jacobs, Van Essen, MLHPC 2016), with the word format of the
authors' LBANN library. For n rows and m columns, little-endian:

    3 m words of 32 bits    for each column: where its entries start, recon+, recon-
    1 word of 32 bits       where the last column's entries end: the length of all
    then, column by column  row << 1 | side for each entry; side 1 stands for recon+, 0 for recon-

Entries are words of 16 bits up to 32767 rows, else of 32 bits. Starts and length are counted in words of an
entry's size, from the first byte of the header.

Arrays inside jit have a fixed size, so the buffer has room for `capacity` entries. Unused entries are zero, and no
column claims them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.select import bit_words, set_bits
from gradcomp_jax.wire.packing import from_bytes, to_bytes


def encoded_bytes(shape: tuple[int, int], capacity: int) -> int:
    """The size in bytes of the result of `encode` for a matrix of this shape."""
    return 4 * (3 * shape[1] + 1) + capacity * _entry_bytes(shape)


def sent_bits(data: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The length of the format without unused room, in bits as a pair, from the header of `encode`'s bytes."""
    end = 4 * (3 * shape[1] + 1)
    total = from_bytes(data[end - 4 : end], (), jnp.uint32)
    shift = {2: 4, 4: 5}[_entry_bytes(shape)]
    return jnp.stack([total >> (32 - shift), total << shift])


def values(data: jax.Array, columns: int) -> jax.Array:
    """The values recon+ and recon- of each column, float32 [m, 2], from `encode`'s bytes."""
    header = from_bytes(data[: 12 * columns], (columns, 3), jnp.uint32)
    return lax.bitcast_convert_type(header[:, 1:], jnp.float32)


def keep_first(selected: jax.Array, capacity: int) -> jax.Array:
    """The part of a selection that `encode` sends: its first `capacity` entries, column by column.

    Args:
      selected: bool [n, m].
      capacity: the number of entries, at least 0.

    Returns:
      bool [n, m]. Entries that are selected and not kept belong in the residual.
    """
    n, m = selected.shape
    words = _column_words(selected)
    index, bit = set_bits(words.reshape(-1), jnp.int32(capacity))  # the first entry that is dropped
    column, row = _split(index, bit, words.shape[1])
    rows, columns = lax.broadcasted_iota(jnp.int32, (n, m), 0), lax.broadcasted_iota(jnp.int32, (n, m), 1)
    return selected & ((columns < column) | ((columns == column) & (rows < row)))


def encode(selected: jax.Array, positive: jax.Array, plus: jax.Array, minus: jax.Array, capacity: int) -> jax.Array:
    """A selection, its sides and its values as bytes.

    Args:
      selected: bool [n, m]; beyond `capacity`, entries are dropped from the last column backwards, see
        `keep_first`.
      positive: bool [n, m], whether an entry stands for recon+ of its column; read where selected.
      plus: recon+, float32 [m].
      minus: recon-, float32 [m]. If the matrix has a value that is not finite, one of these must not be finite either:
        `decode` then shows it to every worker.
      capacity: the number of entries that the buffer has room for.

    Returns:
      uint8 [encoded_bytes((n, m), capacity)].

    Raises:
      ValueError: 2^31 elements or more.
    """
    m = selected.shape[1]
    head, dtype = _layout(selected.shape)
    words = _column_words(selected)
    ends = head + jnp.minimum(jnp.cumsum(_column_counts(words), dtype=jnp.int32), capacity).astype(jnp.uint32)
    starts = jnp.concatenate([jnp.full(1, head, jnp.uint32), ends])
    values = (lax.bitcast_convert_type(value, jnp.uint32) for value in (plus, minus))
    header = jnp.concatenate([jnp.stack([starts[:-1], *values], axis=1).reshape(-1), starts[-1:]])

    index, bit = set_bits(words.reshape(-1), lax.iota(jnp.int32, capacity))
    column, row = _split(index, bit, words.shape[1])
    used = column < m
    side = positive.at[row, column].get(mode="fill", fill_value=False)
    entries = jnp.where(used, row << 1 | side.astype(jnp.int32), 0).astype(dtype)
    return jnp.concatenate([to_bytes(header), to_bytes(entries)])


def decode(data: jax.Array, shape: tuple[int, int], capacity: int) -> jax.Array:
    """The matrix that bytes of `encode` stand for.

    Any bytes give some matrix: entries that no column claims, and entries of rows that do not exist, are left out.

    Args:
      data: uint8 [encoded_bytes(shape, capacity)].
      shape: n, m.
      capacity: the capacity given to `encode`.

    Returns:
      float32 [n, m]: recon+ or recon- at the entries, zero elsewhere; all NaN if one of the sent values is not finite.
      An entry that is NaN passes no threshold, because every comparison is false, and would go unseen.

    Raises:
      ValueError: 2^31 elements or more.
    """
    n, m = shape
    head, dtype = _layout(shape)
    end = 4 * (3 * m + 1)
    header = from_bytes(data[:end], (3 * m + 1,), jnp.uint32)
    starts, total = header[:-1].reshape(m, 3)[:, 0], header[-1]
    recon = lax.bitcast_convert_type(header[:-1].reshape(m, 3)[:, 1:], jnp.float32)
    entries = from_bytes(data[end:], (capacity,), dtype).astype(jnp.uint32)

    # The column of an entry: the number of starts that are not beyond it, minus one. Starts before the header's end
    # wrap round to places beyond the buffer. These are dropped, like all starts beyond the buffer.
    begun = jnp.zeros(capacity, jnp.int32).at[starts - head].add(1, mode="drop")
    column = jnp.cumsum(begun, dtype=jnp.int32) - 1
    claimed = (column >= 0) & (lax.iota(jnp.uint32, capacity) + head < total)
    column = jnp.where(claimed, column, m)
    row = (entries >> 1).astype(jnp.int32)
    value = recon.reshape(-1).at[2 * column + 1 - (entries & 1).astype(jnp.int32)].get(mode="fill", fill_value=0)
    poison = jnp.sum(0 * recon)
    # In a vector: on TPUs a matrix's places would become arrays of whole tiles, with columns laid as rows.
    place = jnp.where(claimed & (row < n), row * m + column, n * m)
    return jnp.full(n * m, poison).at[place].set(value + poison, mode="drop").reshape(n, m)


def _entry_bytes(shape: tuple[int, ...]) -> int:
    return 2 if shape[0] <= 32767 else 4


def _layout(shape: tuple[int, ...]) -> tuple[int, type]:
    """The header's length in words of an entry's size, and the type of an entry."""
    n, m = shape
    if n * m >= 2**31:
        raise ValueError(f"a matrix of {n} x {m} has 2^31 elements or more: split it")
    return {2: (2 * (3 * m + 1), jnp.uint16), 4: (3 * m + 1, jnp.uint32)}[_entry_bytes(shape)]


def _column_words(selected: jax.Array) -> jax.Array:
    """Bool [n, m] to the words of each column, uint32 [m, ceil(n / 32)]."""
    return bit_words(selected, axis=0)


def _column_counts(words: jax.Array) -> jax.Array:
    return jnp.sum(lax.population_count(words).astype(jnp.int32), axis=1, dtype=jnp.int32)


def _split(index: jax.Array, bit: jax.Array, words: int) -> tuple[jax.Array, jax.Array]:
    """The column and row of a bit, in columns of so many words; the column is m for a bit that does not exist."""
    return lax.div(index, jnp.int32(words)), lax.rem(index, jnp.int32(words)) * 32 + bit
