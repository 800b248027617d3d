"""What payloads say, read in numpy by the papers' formats: the law that only the wire speaks stands on these.

A decoder takes one payload, the shapes of the tensors by path, and among how many workers they are cut into shards (1:
not at all), and gives that shard of each tensor: its elements, or [rows, columns] where tensors are cut by columns.
"""

import jax.numpy as jnp
import numpy as np

from gradcomp_jax.wire import elias
from gradcomp_jax.wire.packing import fields_bytes
from tests import elias_reference


class Reader:
    """Takes a payload apart."""

    def __init__(self, payload):
        self.rest = payload

    def take(self, count, dtype=np.uint8):
        size = count * np.dtype(dtype).itemsize
        part, self.rest = self.rest[:size], self.rest[size:]
        return part.copy().view(dtype)

    def read(self, shard):
        """`shard`, from all there was to read."""
        assert not len(self.rest)
        return shard

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
            assert not len(reader.rest)
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
    """Two values a column, then a bit an element."""
    reader, shard, each = Reader(payload), {}, {}
    for path in sorted(shapes):
        rows, columns = matrix(shapes[path])
        columns = -(-columns // shards)
        each[path] = (rows, columns), reader.take(columns, np.float32), reader.take(columns, np.float32)
    bits = reader.fields(sum(elements(shape) for shape, _, _ in each.values()), 1)
    for path, (shape, high, low) in each.items():
        mine, bits = bits[: elements(shape)].reshape(shape), bits[elements(shape) :]
        shard[path] = np.where(mine == 1, high, low).astype(np.float64)
    return reader.read(shard)


def signnorm(payload, shapes, shards):
    """A norm a tensor, and a bit an element."""
    reader, shard = Reader(payload), {}
    sizes = {path: -(-elements(shapes[path]) // shards) for path in sorted(shapes)}
    norms, signs = reader.take(len(shapes), np.float32), reader.fields(sum(sizes.values()), 1)
    for (path, size), norm in zip(sizes.items(), norms, strict=True):
        shard[path], signs = (2.0 * signs[:size] - 1) * norm, signs[size:]
    return reader.read(shard)


def cast(dtype):
    """The largest magnitude of each shard, then its values, divided by a power of two."""
    top = {"bfloat16": 14, "float16": 14, "float8_e4m3fn": 7, "float8_e5m2": 14}[dtype]

    def decode(payload, shapes, shards):
        reader, shard = Reader(payload), {}
        sizes = {path: -(-elements(shapes[path]) // shards) for path in sorted(shapes)}
        scales = reader.take(len(shapes), np.float32)
        for (path, size), scale in zip(sizes.items(), scales, strict=True):
            power = np.floor(np.log2(scale.astype(np.float64)))
            shard[path] = reader.take(size, jnp.dtype(dtype)).astype(np.float64) * 2.0 ** (power - top)
        return reader.read(shard)

    return decode


def count_topk(shape, fraction, shards):
    """n, k and the bits of an index, in a shard."""
    n = -(-elements(shape) // shards)
    return n, max(1, int(fraction * n)), max(0, n - 1).bit_length()


def topk(fraction):
    """Values of a shard's largest elements, then indices: those of fewer bits first."""

    def decode(payload, shapes, shards):
        reader = Reader(payload)
        counts = {path: count_topk(shapes[path], fraction, shards) for path in sorted(shapes)}
        values = {path: reader.take(k, np.float32) for path, (_, k, _) in counts.items()}
        shard = {path: np.zeros(n) for path, (n, _, _) in counts.items()}
        for width in sorted({width for _, _, width in counts.values()}):
            of_width = {path: k for path, (_, k, w) in counts.items() if w == width}
            indices = reader.fields(sum(of_width.values()), width)
            for path, k in of_width.items():
                mine, indices = indices[:k], indices[k:]
                assert len(set(mine)) == k
                shard[path][mine] = values[path]
        return reader.read(shard)

    return decode


def places_of(reader, rows, k, chunk):
    """Places of k elements in each of `rows` chunks, by Elias-Fano: low bits, and where bits of a row are set."""
    low = int(np.floor(np.log2(chunk / k)))
    bits = k + int(np.ceil(chunk / 2**low))
    payload = reader.take(rows * bytes_of_places(k, chunk)).reshape(rows, -1)
    places = np.empty((rows, k), np.int64)
    for place, chunk_bytes in enumerate(payload):
        of_chunk = Reader(chunk_bytes)
        fields = of_chunk.fields(k, low)
        row = np.unpackbits(of_chunk.take(-(-bits // 8)), bitorder="little")
        places[place] = (np.flatnonzero(row) - np.arange(k)) * 2**low + fields
        of_chunk.read(None)
    return places


def bytes_of_places(k, chunk):
    """The bytes of k places in a chunk."""
    low = int(np.floor(np.log2(chunk / k)))
    return fields_bytes(k, low) + -(-(k + int(np.ceil(chunk / 2**low))) // 8)


def values_of_chunks(reader, rows, k, bits, levels):
    """The kept values of each chunk, [rows, k], from a function that is called once the places are read."""
    if bits is None:
        return lambda: reader.take(rows * k, np.float32).reshape(rows, k).astype(np.float64)
    data = reader.take(rows * (-(-k // 4) + (levels == "chunk"))).reshape(rows, -1)
    codes = unpacked(data[:, : -(-k // 4)], 2)[:, :k]

    def values():
        if levels == "sigma":
            return reader.take(4, np.float32).astype(np.float64)[codes]
        upper = (reader.take(rows, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)[:, None]
        return np.where(codes >= 2, upper, upper * data[:, -1:] / 255) * (1.0 - 2 * (codes % 2))

    return values


def chunks(chunk, k, bits=2, levels="chunk"):
    """All tensors in one stream, of whose chunks a shard has some: values, under one name."""

    def decode(payload, shapes, shards):
        whole = -(-sum(map(elements, shapes.values())) // chunk)
        rows = -(-whole // shards)
        reader = Reader(payload)
        values = values_of_chunks(reader, rows, k, bits, levels)
        places = places_of(reader, rows, k, chunk) if k < chunk else np.tile(np.arange(k), (rows, 1))
        # One more element, for values that are not sent.
        shard = np.zeros((rows, chunk + 1))
        np.put_along_axis(shard, places, values(), axis=1)
        return reader.read({"": shard[:, :chunk].reshape(-1)})

    return decode


def of_stream(chunk, flat, shapes):
    """Tensors from their stream: first the whole blocks of all matrices, and then all that is left over."""
    side = int(np.sqrt(chunk))
    tensors = {path: np.full(matrix(shapes[path]) if shapes[path] else (1, 1), np.nan) for path in sorted(shapes)}
    edges = {path: (n - n % side, m - m % side) for path, (n, m) in ((p, x.shape) for p, x in tensors.items())}
    edges = {path: edge if side**2 == chunk and 0 not in edge else (0, 0) for path, edge in edges.items()}
    reader = Flat(flat)
    for path, x in tensors.items():
        for row in range(0, edges[path][0], side):
            for column in range(0, edges[path][1], side):
                x[row : row + side, column : column + side] = reader.take((side, side))
    for path, x in tensors.items():
        high, wide = edges[path]
        for part in (x[:high, wide:], x[high:]):
            part[:] = reader.take(part.shape)
    assert not reader.rest.any()
    return {path: x.reshape(shapes[path]) for path, x in tensors.items()}


def float4(bucket):
    """All tensors as buckets, like `qsgd`'s: a sign and an exponent each."""

    def decode(payload, shapes, shards):
        rows = -(-sum(-(-elements(shape) // bucket) for shape in shapes.values()) // shards)
        reader = Reader(payload)
        codes = unpacked(reader.take(rows * bucket // 2).reshape(rows, -1), 4).astype(int)
        levels = np.array([0, *(2.0 ** np.arange(-6, 1))])
        values = levels[codes % 8] * np.where(codes >= 8, -1, 1)
        return reader.read({"": (values * reader.take(rows, np.float32).astype(np.float64)[:, None]).reshape(-1)})

    return decode


def statistical(payload, shapes, shards):
    """A table of four values a tensor, and two bits an element that say which."""
    reader, shard = Reader(payload), {}
    sizes = {path: -(-elements(shapes[path]) // shards) for path in sorted(shapes)}
    tables = reader.take(4 * len(shapes), np.float32).reshape(-1, 4)
    codes = reader.fields(sum(sizes.values()), 2)
    for (path, size), table in zip(sizes.items(), tables, strict=True):
        shard[path], codes = table.astype(np.float64)[codes[:size]], codes[size:]
    return reader.read(shard)


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
        return reader.read(shard)

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


def alone(recorded, count, aggregate, place=-1, first=False):
    """Codes without the `count` floats that rode with them, and the mean of those.

    Args:
      recorded: what the workers handed to each collective, [workers, ...].
      count: how many floats rode: in an all-reduce before the codes, or beside them.
      aggregate: how the codes travelled; by "shuffle" each worker sends on a shard of the mean.
      place: the message with which they rode.
      first: whether they are before the codes in it.
    """
    if not count or recorded[0].dtype == np.float32:
        return (recorded[1:], reduced(recorded[:1])[0]) if count else (recorded, np.zeros(0))
    data = recorded[place]
    size = 4 * (-(-count // len(data)) if aggregate == "shuffle" else count)
    riders, codes = (data[:, :size], data[:, size:]) if first else (data[:, -size:], data[:, :-size])
    riders = riders.copy().view(np.float32).astype(np.float64)
    riders = riders.reshape(-1)[:count] if aggregate == "shuffle" else riders.mean(0)
    recorded = list(recorded)
    recorded[place] = codes
    return recorded, riders


def sums_of_words(words, bound, workers):
    """The sums of whole numbers within -bound..bound, from the sum of the workers' words, of rows [rows, words]."""
    each = max(each for each in (1, 2, 4) if 2 * bound * workers < 2 ** (32 // each))
    width = 32 // each
    fields = [words >> np.uint32(width * i) & np.uint32(2**width - 1) for i in range(each)]
    return np.concatenate(fields, axis=1).astype(int) - bound * workers


def reduced(recorded, aggregate="psum"):
    """The mean that each all-reduce gave, flat; of a ring, whose parts are filled up, with more at its end."""
    if aggregate == "ring":  # what passed, then what each worker ended with: part w + 1 of the sum
        return [np.roll(ends, 1, axis=0).reshape(-1) / len(ends) for ends in recorded[1::2]]
    return [x.astype(np.float64).mean(0).reshape(-1) for x in recorded]


class Flat:
    """Takes a mean apart, element by element."""

    def __init__(self, flat):
        self.rest = flat

    def take(self, shape):
        size = elements(shape)
        part, self.rest = self.rest[:size], self.rest[size:]
        assert len(part) == size
        return part.reshape(shape)
