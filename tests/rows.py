"""What the table's rows are made of: each codec's payload by its paper, and its mean rebuilt in numpy."""

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax import (
    Compressor,
    accordion,
    adaptive,
    cast,
    float4,
    none,
    onebit,
    powersgd,
    qsgd,
    randomk,
    scheduled,
    topk,
    transformed,
)
from gradcomp_jax.codecs.randomk import Draw, block, scattered
from gradcomp_jax.exchange.plan import salt
from gradcomp_jax.random import scattered as hashed
from gradcomp_jax.random import step_key
from gradcomp_jax.transform import Transform
from gradcomp_jax.wire.packing import fields_bytes
from tests import decoders
from tests.decoders import Flat, elements, matrix

REDUCE, GATHER, PASS = "all-reduce", "all-gather", "collective-permute"
SUM, RING, SHUFFLE = (REDUCE,), (PASS, GATHER), ("all-to-all", GATHER)
# Trees of small leaves, in whose gathers vectors would not go unnoticed.
TINY = ("mixed", "small", "transformer")
ALWAYS = types.MappingProxyType({0: ()})


class Row(NamedTuple):
    """A codec in one setting.

    Attributes:
      id: its name in test reports.
      make: keywords of the factory -> Compressor.
      linear: whether law 3 holds.
      payload: (shapes of the compressed leaves, step) -> bytes one worker hands to its collectives, by the paper.
      rebuild: (what each worker handed to the collectives, in order, each [workers, ...]; the state before; shapes by
        path; how many floats travel dense) -> the mean by path, and the dense ones' flat, in numpy.
      messages: step -> the kinds of the collectives in that step, or in any; of one operand, if no leaf is large.
      phases: where what is sent depends on the step, one step of each kind, and which branches its conditionals
        that hold collectives take, but for those that choose a size.
      amounts: how many different numbers of bytes the phases send.
      way: how codes travel, beside which what is dense rides, or sums, "psum" or "ring".
      fills: steps in which the largest size is sent, where there are several, instead of the smallest.
      whole: steps in which compressed leaves travel as they are; large ones are operands of their own then.
      beside: the trees, or (tree, step), whose dense leaves are an all-reduce beside codes that are gathered by more
        than two workers, as in the same message they would add more than 1 % to what is sent.
    """

    id: str
    make: Callable[..., Compressor]
    linear: bool
    payload: Callable[[list[tuple[int, ...]], int], int]
    rebuild: Callable[..., tuple[dict[str, np.ndarray], np.ndarray]]
    messages: Mapping[int, tuple[str, ...]] | tuple[str, ...]
    phases: Mapping[int, tuple[int, ...]] = ALWAYS
    amounts: int = 1
    way: str = "psum"
    fills: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    beside: tuple[str | tuple[str, int], ...] = ()

    def dense(self, floats: int) -> int:
        """Bytes of so many floats that ride, among four workers."""
        return 4 * (5 * -(-floats // 4) if self.way == "shuffle" else floats)

    def kinds(self, step: int, tree: str, workers: int = 4) -> tuple[str, ...]:
        """The messages of one step."""
        kinds = self.messages if isinstance(self.messages, tuple) else self.messages[step]
        gathered = workers > 2 and GATHER in kinds and bool({tree, (tree, step)} & {*self.beside})
        beside = self.way in ("ring", "shared") or gathered
        return (REDUCE, *kinds) if beside else kinds


def none_row(id: str, aggregate: str = "psum") -> Row:
    def make(**kwargs: Any) -> Compressor:
        return none(aggregate=aggregate, **kwargs)

    slack = 16 if aggregate == "ring" else 0  # a ring fills up its parts
    messages = RING if slack else SUM
    row = Row(id, make, True, lambda *args: payload_dense(*args) + slack, rebuild_none(aggregate), messages)
    return row if slack else row._replace(whole=(0,))


def rebuild_none(aggregate="psum"):
    def rebuild(recorded, state, shapes, riding):
        del state
        flat = Flat(decoders.reduced(recorded, aggregate)[0])
        return {path: flat.take(shapes[path]) for path in sorted(shapes)}, flat.take((riding,))

    return rebuild


def payload_dense(shapes, step):
    del step
    return sum(4 * elements(shape) for shape in shapes)


def payload_powersgd(rank):
    return lambda shapes, step: sum(4 * min(n, m, rank) * (n + m) for n, m in map(matrix, shapes))


def factored(shapes, factors):
    """P^ Q^T, with numpy's own QR, from P^T and Q^T by path."""
    # A basis is known up to signs, which each column of Q shares: take them from LAPACK's convention, the one that
    # both sides use.
    return {path: (np.linalg.qr(p.T)[0] @ q).reshape(shapes[path]) for path, (p, q) in factors.items()}


def rebuild_powersgd(rank, flats):
    """Flat P and flat Q -> P^ Q^T; flats: what was recorded -> the means of P and of Q, flat, and of what rode."""

    def rebuild(recorded, state, shapes, riding):
        *means, rode = flats(recorded, shapes, riding)
        p, q = map(Flat, means)
        sides = {path: matrix(shapes[path]) for path in sorted(shapes)}
        factors = {path: (p.take((rank, n)), q.take((rank, m))) for path, (n, m) in sides.items()}
        return factored(shapes, factors), p.take((riding,)) if rode is None else rode

    return rebuild


def payload_coded(size, aggregate):
    """Of a codec that is not linear, among four workers; size: (shapes, shards) -> bytes of a shard's payload."""

    def payload(shapes, step):
        del step
        # By "shuffle" a shard for each worker and one of the mean; in a ring one at each hop, and one of the sum.
        return {"gather": 1, "shuffle": 5, "ring": 4}[aggregate] * size(shapes, 1 if aggregate == "gather" else 4)

    return payload


def messages_coded(aggregate):
    return {"gather": (GATHER,), "shuffle": SHUFFLE, "ring": RING}[aggregate]


def rebuild_coded(decode, aggregate):
    def rebuild(recorded, state, shapes, riding):
        del state
        recorded, rode = decoders.alone(recorded, riding, aggregate)
        shards = decoders.mean(decode, aggregate, recorded[-1], shapes)
        return {path: decoders.joined(shards[path], shape) for path, shape in shapes.items()}, rode

    return rebuild


def size_qsgd(bits, bucket):
    def size(shapes, shards):
        rows = -(-sum(-(-elements(shape) // bucket) for shape in shapes) // shards)
        return rows * (bucket * bits // 8 + 4)

    return size


def rebuild_qsgd(decode, bucket, aggregate):
    def rebuild(recorded, state, shapes, riding):
        del state
        recorded, rode = decoders.alone(recorded, riding, aggregate)
        rows = decoders.mean(decode, aggregate, recorded[-1], shapes)[""]
        return decoders.of_buckets(bucket, np.concatenate(rows), shapes), rode

    return rebuild


def contraction(bits, values):
    """What QSGD scales by under error feedback: 1 / (1 + omega), of a bucket of so many values."""
    s = 2 ** (bits - 1) - 1
    return 1 / (1 + min(values / s**2, values**0.5 / s))


def qsgd_row(id: str, bits: int, bucket: int, aggregate: str = "gather", error_feedback: Any = False, **kwargs) -> Row:
    gain = contraction(bits, bucket) if error_feedback else 1.0
    settings = {"min_size": 0, "error_feedback": error_feedback, "aggregate": aggregate, "code": "packed", **kwargs}

    def make(**kwargs: Any) -> Compressor:
        return qsgd(bits, bucket_size=bucket, **{**settings, **kwargs})

    # Elias' code, where it fits, is what a conditional chooses in both stages; each asks first, by 4 bytes.
    elias, fits = settings["code"] == "elias", settings.get("capacity", 9) > 1
    messages = messages_coded(aggregate)
    if elias:
        messages = tuple(kind for carrying in messages for kind in (REDUCE, carrying))
    phases = {0: (int(fits),) * (2 if aggregate == "shuffle" else 1)} if elias else ALWAYS
    size = size_qsgd(bits, bucket)
    decode = decoders.qsgd(bits, bucket, gain, "elias" if elias and fits else "packed")
    payload = payload_coded(lambda shapes, shards: size(shapes, shards) + 4 * elias, aggregate)
    rebuild = rebuild_qsgd(decode, bucket, aggregate)
    beside = TINY if aggregate == "gather" else ()
    return Row(id, make, False, payload, rebuild, messages, phases, way=aggregate, beside=beside)


def shared_row(id: str, bits: int, bucket: int, aggregate: str, error_feedback: bool = False) -> Row:
    """QSGD of one scale: the largest of the workers', and the sum of integers of a byte, four to a word."""
    s = 2 ** (bits - 1) - 1

    def make(**kwargs: Any) -> Compressor:
        settings = {"min_size": 0, "error_feedback": error_feedback, "aggregate": aggregate, **kwargs}
        return qsgd(bits, bucket_size=bucket, shared_scale=True, **settings)

    def payload(shapes, step):
        del step
        rows = sum(-(-elements(shape) // bucket) for shape in shapes)
        return rows * (bucket + 4) + (16 if aggregate == "ring" else 0)  # a ring fills up its parts

    def rebuild(recorded, state, shapes, riding):
        del state
        (scale, *_, numbers), rode = decoders.alone(recorded, riding, aggregate)
        scale = scale.max(0).view(np.float32).astype(np.float64).reshape(-1, 1)
        n = len(numbers)
        gain = contraction(bits, n * bucket) if error_feedback else 1.0
        words = np.roll(numbers, 1, axis=0) if aggregate == "ring" else numbers.sum(0, dtype=np.uint32)
        words = words.reshape(-1)[: scale.size * bucket // 4].reshape(scale.size, -1)
        rows = decoders.sums_of_words(words, s, n) * (scale / s * gain / n)
        return decoders.of_buckets(bucket, rows.reshape(-1), shapes), rode

    messages = (REDUCE, *(RING if aggregate == "ring" else SUM))
    return Row(id, make, False, payload, rebuild, messages, way="shared")


def powersgd_row(id: str, rank: int, aggregate: str = "psum", **settings: Any) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return powersgd(rank, aggregate=aggregate, **{**settings, **kwargs})

    def flats(recorded, shapes, riding):
        return *decoders.reduced(recorded, aggregate), None

    # In a ring of four, three parts and the sum's, each filled up.
    slack, messages = (2 * 4 * 4, RING) if aggregate == "ring" else (0, SUM)

    def payload(shapes, step):
        return payload_powersgd(rank)(shapes, step) + slack

    return Row(id, make, True, payload, rebuild_powersgd(rank, flats), 2 * messages)


def quantized_powersgd_row(id: str, rank: int, bits: int, bucket: int) -> Row:
    """P and Q through QSGD, scaled for error feedback, by "gather"."""
    decode = decoders.qsgd(bits, bucket, contraction(bits, bucket))

    def make(**kwargs: Any) -> Compressor:
        return powersgd(rank, quantizer=qsgd(bits, bucket_size=bucket, aggregate="gather"), **kwargs)

    def sides(shapes, place):
        return {path: (min(*matrix(shape), rank) * matrix(shape)[place],) for path, shape in shapes.items()}

    def payload(shapes, step):
        del step
        named = dict(enumerate(shapes))
        return sum(size_qsgd(bits, bucket)(list(sides(named, place).values()), 1) for place in (0, 1))

    def flats(recorded, shapes, riding):
        recorded, rode = decoders.alone(recorded, riding, "gather", place=0)
        for place, sent in enumerate(recorded):
            rows = decoders.mean(decode, "gather", sent, sides(shapes, place))[""][0]
            by_leaf = decoders.of_buckets(bucket, rows, sides(shapes, place))
            yield np.concatenate([by_leaf[path] for path in sorted(shapes)])
        yield rode

    # The first message is half of what is sent.
    beside = ("two", "resnet18-shapes", *TINY)
    return Row(id, make, False, payload, rebuild_powersgd(rank, flats), 2 * (GATHER,), way="gather", beside=beside)


def size_onebit(shapes, shards):
    cut = [(n, -(-m // shards)) for n, m in map(matrix, shapes)]
    return sum(8 * m for _, m in cut) + -(-sum(n * m for n, m in cut) // 8)


def onebit_row(id: str, aggregate: str, **settings: Any) -> Row:
    row = coded_row(id, onebit, decoders.onebit, size_onebit, aggregate, **settings)

    def payload(shapes, step):
        short = [shape for shape in shapes if matrix(shape)[0] < 64]  # dense
        long = [shape for shape in shapes if shape not in short]
        return row.payload(long, step) + row.dense(sum(map(elements, short)))

    return row._replace(payload=payload)


def size_signnorm(shapes, shards):
    return 4 * len(shapes) + -(-sum(-(-elements(shape) // shards) for shape in shapes) // 8)


def size_statistical(shapes, shards):
    return sum(16 + -(-2 * -(-elements(shape) // shards) // 8) for shape in shapes)


def size_cast(dtype):
    def size(shapes, shards):
        return sum(4 + jnp.dtype(dtype).itemsize * -(-elements(shape) // shards) for shape in shapes)

    return size


def cast_row(id: str, dtype: str, aggregate: str, error_feedback: bool = False) -> Row:
    if aggregate != "psum":
        settings = {"dtype": dtype, "error_feedback": error_feedback}
        row = coded_row(id, cast, decoders.cast(dtype), size_cast(dtype), aggregate, **settings)
        return row._replace(beside=())

    def make(**kwargs: Any) -> Compressor:
        return cast(dtype, aggregate=aggregate, **{"error_feedback": error_feedback, **kwargs})

    return none_row(id)._replace(make=make, linear=False)  # which CPUs sum in float32


def size_topk(fraction):
    def size(shapes, shards):
        counts = [decoders.count_topk(shape, fraction, shards) for shape in shapes]
        return sum(4 * k + fields_bytes(k, width) for _, k, width in counts)

    return size


def size_chunks(chunk, k, bits=2, levels="chunk"):
    values = 4 * k if bits is None else -(-k // 4) + 3 * (levels == "chunk")
    each = values + (decoders.bytes_of_places(k, chunk) if k < chunk else 0)

    def size(shapes, shards):
        chunks = -(-sum(map(elements, shapes)) // chunk)
        return -(-chunks // shards) * each + 16 * (levels == "sigma")

    return size


def chunks_row(id: str, aggregate: str, chunk: int, k: int, *rule: Any, **settings: Any) -> Row:
    """Top-k of chunks of a stream of all leaves; rule: `bits` and `levels`, or nothing."""
    more = dict(zip(("bits", "levels"), rule, strict=False)) | settings

    def make(**kwargs: Any) -> Compressor:
        return topk(chunk=chunk, k=k, aggregate=aggregate, **{**more, **kwargs})

    decode = decoders.chunks(chunk, k, *rule)

    def rebuild(recorded, state, shapes, riding):
        del state
        recorded, rode = decoders.alone(recorded, riding, aggregate)
        parts = decoders.mean(decode, aggregate, recorded[-1], shapes)[""]
        return decoders.of_stream(chunk, np.concatenate(parts), shapes), rode

    payload = payload_coded(size_chunks(chunk, k, *rule), aggregate)
    # No leaf of a network is dense.
    beside = ("two",) if aggregate == "gather" and rule != (None,) else ()
    return Row(id, make, False, payload, rebuild, messages_coded(aggregate), way=aggregate, beside=beside)


def float4_row(id: str, bucket: int, aggregate: str, **settings: Any) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return float4(bucket_size=bucket, aggregate=aggregate, **{**settings, **kwargs})

    size = size_qsgd(4, bucket)
    row = coded_row(id, float4, decoders.float4(bucket), size, aggregate)
    return row._replace(make=make, rebuild=rebuild_qsgd(decoders.float4(bucket), bucket, aggregate), beside=())


def room_adaptive(proportion, multiple, scope="matrix"):
    """How many elements of an n x m matrix there is room for."""
    return lambda n, m: min(n * m, math.ceil(multiple * (n * m / proportion + (2 * m if scope == "column" else 0))))


def size_adaptive(room):
    def size(shapes, shards):
        cut = [(n, -(-m // shards)) for n, m in map(matrix, shapes)]
        return sum(4 * (3 * m + 1) + 2 * room(n, m) for n, m in cut)

    return size


def coded_row(id: str, factory, decode, size, aggregate: str, **settings: Any) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return factory(aggregate=aggregate, **{**settings, **kwargs})

    payload, rebuild = payload_coded(size, aggregate), rebuild_coded(decode, aggregate)
    beside = TINY if aggregate == "gather" else ()
    return Row(id, make, False, payload, rebuild, messages_coded(aggregate), way=aggregate, beside=beside)


def adaptive_row(id: str, aggregate: str, **settings: Any) -> Row:
    room = room_adaptive(8, 2 if settings.get("sample") else 1, settings.get("threshold_scope", "matrix"))
    settings = {"proportion": 8, "sample": False, **settings}
    return coded_row(id, adaptive, decoders.adaptive(room), size_adaptive(room), aggregate, **settings)


def count_subset(fraction, shape):
    return max(1, int(fraction * elements(shape)))


def placed(factory, fraction, values, state, shapes, gain):
    """Tensors by path that have values [k], by path, at the places that all workers draw."""
    draw, mean = scattered if factory is randomk else block, {}
    for path, shape in shapes.items():
        size, k = elements(shape), count_subset(fraction, shape)
        (indices,) = draw([Draw(step_key(0, state.step), salt(path), size, k)])
        mean[path] = np.zeros(size)
        # Without error feedback the rows scale what they have.
        mean[path][np.asarray(indices)] = values[path] * (size / k if gain else 1)
        mean[path] = mean[path].reshape(shape)
    return mean


def subset_row(id: str, factory, fraction: float, aggregate: str = "psum", error_feedback: bool = True) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return factory(fraction, aggregate=aggregate, **{"error_feedback": error_feedback, **kwargs})

    def payload(shapes, step):
        del step
        return 4 * sum(count_subset(fraction, shape) for shape in shapes) + 16 * (aggregate == "ring")

    def rebuild(recorded, state, shapes, riding):
        flat = Flat(decoders.reduced(recorded, aggregate)[0])
        values = {path: flat.take((count_subset(fraction, shapes[path]),)) for path in sorted(shapes)}
        return placed(factory, fraction, values, state, shapes, not error_feedback), flat.take((riding,))

    return Row(id, make, True, payload, rebuild, RING if aggregate == "ring" else SUM)


def quantized_subset_row(id: str, factory, fraction: float, bits: int, bucket: int) -> Row:
    """The values through QSGD, scaled for error feedback, by "shuffle"."""
    decode = decoders.qsgd(bits, bucket, contraction(bits, bucket))

    def make(**kwargs: Any) -> Compressor:
        return factory(fraction, quantizer=qsgd(bits, bucket_size=bucket, aggregate="shuffle"), **kwargs)

    def payload(shapes, step):
        counts = [(count_subset(fraction, shape),) for shape in shapes]
        return payload_coded(size_qsgd(bits, bucket), "shuffle")(counts, step)

    def rebuild(recorded, state, shapes, riding):
        counts = {path: (count_subset(fraction, shape),) for path, shape in shapes.items()}
        values, rode = rebuild_qsgd(decode, bucket, "shuffle")(recorded, state, counts, riding)
        return placed(factory, fraction, values, state, shapes, False), rode

    return Row(id, make, False, payload, rebuild, SHUFFLE, way="shuffle")


# Gradients of noise have sums of like norms, so the second check, in step 3, takes all to high.
NOISE = {0: (), 1: (), 4: (), 5: ()}
LOW = (0, 1)


def with_norms(row: Row) -> Row:
    """With a norm a leaf, which rides in every step; of ResNet-18's 41 vectors too."""

    def payload(shapes, step):
        return row.payload(shapes, step) + row.dense(len(shapes) + 41)

    return row._replace(payload=payload)


class Switch(NamedTuple):
    """What switches between two strengths of a codec: from the first, in the steps `LOW`, to the second.

    Attributes:
      around: two codecs -> the codec that switches between them.
      place: (the state before a step, a path) -> which of them is in use.
      norms: how many floats a leaf ride beside it.
    """

    around: Callable[..., Compressor]
    place: Callable[[Any, str], int]
    norms: int

    def row(self, row: Row) -> Row:
        """With the norms."""
        return with_norms(row) if self.norms else row


def grows(step):
    """A schedule of ranks: between 1 and 4 in the first two steps, and then above."""
    return jnp.where(step < len(LOW), 3, 5)


def falls(step):
    """A schedule of fractions."""
    return jnp.where(step < len(LOW), jnp.float32(0.3), jnp.float32(0.1))


def by_schedule(schedule):
    return Switch(lambda *codecs: scheduled(codecs, schedule), lambda state, path: int(state.step >= len(LOW)), 0)


ACCORDION = Switch(functools.partial(accordion, interval=2), lambda state, path: int(state.level[path]), 1)


def switched_powersgd_row(id: str, ranks: tuple[int, int], switch: Switch) -> Row:
    """Between two ranks; in the steps `LOW` of the first."""

    def make(**kwargs: Any) -> Compressor:
        return switch.around(*(powersgd(rank, **kwargs) for rank in ranks))

    def rebuild(recorded, state, shapes, riding):
        p, q = map(Flat, decoders.reduced(recorded))
        rode, factors = p.take((riding,)), {}
        for path in sorted(shapes):
            (n, m), r = matrix(shapes[path]), ranks[switch.place(state, path)]
            factors[path] = p.take((r, n)), q.take((r, m))
            p.take((switch.norms,))
        return factored(shapes, factors), rode

    def payload(shapes, step):
        return payload_powersgd(ranks[step not in LOW])(shapes, step)

    fills = LOW if ranks[0] > ranks[1] else tuple({*NOISE} - {*LOW})
    return switch.row(Row(id, make, False, payload, rebuild, (REDUCE, REDUCE), NOISE, 2, fills=fills))


def switched_coded_row(
    id: str, make_level, levels, decode, size, aggregate: str, switch: Switch, bucket: int | None = None
) -> Row:
    """Of a codec that encodes: each leaf's payload at its own level, one after another."""

    def make(**kwargs: Any) -> Compressor:
        return switch.around(*(make_level(level, aggregate=aggregate, **kwargs) for level in levels))

    def rebuild(recorded, state, shapes, riding):
        floats = switch.norms * len(shapes)
        recorded, rode = decoders.alone(recorded, floats + riding, aggregate, first=True)
        payloads = recorded[-1]
        shards, mean = 1 if aggregate == "gather" else len(payloads), {}
        for path in sorted(shapes):
            level, one = levels[switch.place(state, path)], {path: shapes[path]}
            length = size(level)([shapes[path]], shards)
            pieces, payloads = payloads[:, :length], payloads[:, length:]
            parts = decoders.mean(decode(level), aggregate, pieces, one)
            if bucket:
                mean |= decoders.of_buckets(bucket, np.concatenate(parts[""]), one)
            else:
                mean[path] = decoders.joined(parts[path], shapes[path])
        return mean, rode[floats:]

    def payload(shapes, step):
        of_leaves = lambda shapes, shards: sum(size(levels[step not in LOW])([x], shards) for x in shapes)  # noqa: E731
        return payload_coded(of_leaves, aggregate)(shapes, step)

    messages, beside = messages_coded(aggregate), TINY if aggregate == "gather" else ()
    return switch.row(Row(id, make, False, payload, rebuild, messages, NOISE, 2, aggregate, LOW, beside=beside))


def transformed_row(row: Row, kind: str, block: int) -> Row:
    """The same behind a transform, of tensors that are whole blocks."""
    matrix = Transform(kind, block, 0)

    def whole(shape):
        return (-(-elements(shape) // block) * block,)

    def make(**kwargs: Any) -> Compressor:
        return transformed(row.make(**kwargs), kind, block)

    def payload(shapes, step):
        return row.payload([whole(shape) for shape in shapes], step)

    def rebuild(recorded, state, shapes, riding):
        mean, rode = row.rebuild(recorded, state, {path: whole(shape) for path, shape in shapes.items()}, riding)
        return {path: turned_back(matrix, mean[path], shapes[path]) for path in shapes}, rode

    return row._replace(make=make, payload=payload, rebuild=rebuild)


def turned_back(matrix: Transform, flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of a transform, by its matrix in numpy."""
    eye = np.eye(matrix.block)
    if matrix.kind == "dct":
        rows = flat.reshape(-1, matrix.block) @ np.asarray(jax.scipy.fft.dct(eye, norm="ortho", axis=0))
    else:
        hadamard = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * (matrix.block.bit_length() - 1))
        rows = flat.reshape(-1, matrix.block) @ hadamard / matrix.block**0.5
        rows = rows * np.where(np.asarray(hashed(rows.shape, np.float32, matrix.seed)) < 0, -1, 1)
    return rows.reshape(-1)[: elements(shape)].reshape(shape)


def level_of_qsgd(bits: int, **kwargs: Any) -> Compressor:
    return qsgd(bits, bucket_size=32, **{"min_size": 0, "error_feedback": True, **kwargs})


def gained(bits: int):
    """QSGD's decoder under error feedback, buckets of 32."""
    return decoders.qsgd(bits, 32, contraction(bits, 32))
