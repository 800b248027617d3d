"""What payloads say, read in numpy by the papers' formats: the law that only the wire speaks stands on these.

A decoder takes one payload, the shapes of the tensors by path, and among how many workers they are cut into shards (1:
not at all), and gives that shard of each tensor: its elements, or [rows, columns] where tensors are cut by columns.
"""

import jax
import numpy as np

from gradcomp_jax.wire import elias
from tests import elias_reference


class Reader:
    """Takes a payload apart."""

    def __init__(self, payload):
        self.rest = payload

    def take(self, count, dtype=np.uint8):
        size = count * np.dtype(dtype).itemsize
        part, self.rest = self.rest[:size], self.rest[size:]
        return part.copy().view(dtype)

    def fields(self, k, width):
        """k numbers of `width` bits, which travel as whole bytes, then 4, 2 and 1 bits."""
        values, shift = np.zeros(k, np.int64), 0
        for bits in (8, 8, 8, 8, 4, 2, 1):
            if shift + bits <= width:
                values |= unpacked(self.take(-(-k * bits // 8)), bits)[:k].astype(np.int64) << shift
                shift += bits
        return values


def unpacked(data, bits):
    """Codes of `bits` bits from bytes [..., c]: code j is in byte j mod c."""
    return np.concatenate([data >> (bits * i) & (2**bits - 1) for i in range(8 // bits)], axis=-1)


def elements(shape):
    return int(np.prod(shape))


def matrix(shape):
    return elements(shape[:-1]), shape[-1]


def qsgd(bits, bucket, gain=1.0, code="packed"):
    """All tensors as buckets, one below the other: the rows of a shard, under one name."""
    levels = 2 ** (bits - 1) - 1

    def decode(payload, shapes, shards):
        rows = -(-sum(-(-elements(shape) // bucket) for shape in shapes.values()) // shards)
        reader = Reader(payload)
        if code == "packed":
            codes = unpacked(reader.take(rows * bucket * bits // 8).reshape(rows, -1), bits)
            signed = codes.astype(np.float64) - levels
            scale = reader.take(rows, np.float32)
        else:
            scale = reader.take(rows, np.float32)
            lengths = reader.fields(rows, (bucket * bits).bit_length())
            form = elias.shorter_form(bucket, levels)
            signed = elias_reference.decode(reader.rest, lengths, bucket, levels, form, False)
            assert signed is not None
        return {"": (np.asarray(signed, np.float64) * (scale.astype(np.float64) / levels * gain)[:, None]).reshape(-1)}

    return decode


def of_buckets(bucket, flat, shapes):
    """Tensors from the elements of all their buckets."""
    tensors, start = {}, 0
    for path in sorted(shapes):
        size = elements(shapes[path])
        tensors[path] = flat[start : start + size].reshape(shapes[path])
        start += -(-size // bucket) * bucket
    return tensors


def onebit(payload, shapes, shards):
    """A bit an element, and two values a column."""
    reader, shard = Reader(payload), {}
    for path in sorted(shapes):
        rows, columns = matrix(shapes[path])
        columns = -(-columns // shards)
        bits = unpacked(reader.take(-(-rows // 8) * columns).reshape(-1, columns).T, 1).T[:rows]
        high, low = reader.take(columns, np.float32), reader.take(columns, np.float32)
        shard[path] = np.where(bits == 1, high, low).astype(np.float64)
    return shard


def signnorm(payload, shapes, shards):
    """A norm a tensor, and a bit an element."""
    reader, shard = Reader(payload), {}
    norms, signs = reader.take(len(shapes), np.float32), unpacked(reader.rest, 1)
    for path, norm in zip(sorted(shapes), norms, strict=True):
        size = -(-elements(shapes[path]) // shards)
        shard[path], signs = (2.0 * signs[:size] - 1) * norm, signs[size:]
    return shard


def count_topk(shape, fraction, shards):
    """n, k and the bits of an index, in a shard."""
    n = -(-elements(shape) // shards)
    return n, max(1, int(fraction * n)), max(0, n - 1).bit_length()


def topk(fraction):
    """Indices and values of a shard's largest elements."""

    def decode(payload, shapes, shards):
        reader, shard = Reader(payload), {}
        for path in sorted(shapes):
            n, k, width = count_topk(shapes[path], fraction, shards)
            indices, values = reader.fields(k, width), reader.take(k, np.float32)
            assert len(set(indices)) == k
            shard[path] = np.zeros(n)
            shard[path][indices] = values
        return shard

    return decode


def adaptive(capacity):
    """Sparse columns: starts and two values a column, then row << 1 | side for each element; (n, m) -> capacity."""

    def decode(payload, shapes, shards):
        reader, shard = Reader(payload), {}
        for path in sorted(shapes):
            n, m = matrix(shapes[path])
            m = -(-m // shards)
            columns = reader.take(3 * m, np.uint32).reshape(m, 3)
            starts = np.append(columns[:, 0], reader.take(1, np.uint32)).astype(int) - 2 * (3 * m + 1)
            values, entries = columns[:, 1:].copy().view(np.float32), reader.take(capacity(n, m), np.uint16)
            shard[path] = np.zeros((n, m))
            for column in range(m):
                for entry in entries[starts[column] : starts[column + 1]]:
                    shard[path][entry >> 1, column] = values[column, 1 - (entry & 1)]
        return shard

    return decode


def joined(shards, shape):
    """A tensor from its shards."""
    if shards[0].ndim == 1:
        return np.concatenate(shards)[: elements(shape)].reshape(shape)
    return np.concatenate(shards, axis=1)[:, : shape[-1]].reshape(shape)


def mean(decode, aggregate, payloads, shapes):
    """The mean of tensors, from what each worker sent last: all of its own, or its shard of the mean or of the sum."""
    workers = len(payloads)
    parts = [decode(payload, shapes, 1 if aggregate == "gather" else workers) for payload in payloads]
    if aggregate == "gather":
        return {path: [sum(part[path] for part in parts) / workers] for path in parts[0]}
    if aggregate == "ring":  # worker w ends with shard w + 1, of the sum
        parts = [{path: x / workers for path, x in parts[place - 1].items()} for place in range(workers)]
    return {path: [part[path] for part in parts] for path in parts[0]}


def reduced(recorded, aggregate="psum"):
    """The mean that each all-reduce gave, flat; of a ring, whose parts are filled up, with more at its end."""
    if aggregate == "ring":  # what passed, then what each worker ended with: part w + 1 of the sum
        return [np.roll(ends, 1, axis=0).reshape(-1) / len(ends) for ends in recorded[1::2]]
    leaves = [jax.tree.leaves(operand) for operand in recorded]
    return [np.concatenate([x.astype(np.float64).mean(0).reshape(-1) for x in operand]) for operand in leaves]


def split(flat, shapes):
    """Tensors by path from their elements, one after another."""
    tensors, start = {}, 0
    for path in sorted(shapes):
        size = elements(shapes[path])
        tensors[path] = flat[start : start + size].reshape(shapes[path])
        start += size
    return tensors
