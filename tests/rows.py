"""What the table's rows are made of: each codec's payload by its paper, and its mean rebuilt in numpy."""

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gradcomp_jax import (
    Compressor,
    accordion,
    adaptive,
    none,
    onebit,
    powersgd,
    qsgd,
    randomk,
)
from gradcomp_jax.codecs import randomblock as randomblock_module
from gradcomp_jax.random import distinct, step_key
from gradcomp_jax.wire.packing import fields_bytes
from tests import decoders
from tests.decoders import elements, matrix


class Row(NamedTuple):
    """A codec in one setting.

    Attributes:
      id: its name in test reports.
      make: keywords of the factory -> Compressor.
      linear: whether law 3 holds.
      payload: (shapes of the compressed leaves, step) -> bytes one worker hands to its collectives, by the paper.
      rebuild: (what each worker handed to the collectives, in order, each [workers, ...]; the state before;
        shapes by path) -> the mean by path, in numpy.
      phases: where what is sent depends on the step, one step of each kind, and which branches its conditionals
        that hold collectives take.
      amounts: how many different numbers of bytes the phases send.
    """

    id: str
    make: Callable[..., Compressor]
    linear: bool
    payload: Callable[[list[tuple[int, ...]], int], int]
    rebuild: Callable[..., dict[str, np.ndarray]]
    phases: Mapping[int, tuple[bool, ...]] = types.MappingProxyType({0: ()})
    amounts: int = 1


def rebuild_none(aggregate="psum"):
    def rebuild(recorded, state, shapes):
        del state
        return decoders.split(decoders.reduced(recorded, aggregate)[0], shapes)

    return rebuild


def payload_dense(shapes, step):
    del step
    return sum(4 * elements(shape) for shape in shapes)


def payload_powersgd(rank):
    return lambda shapes, step: sum(4 * min(n, m, rank) * (n + m) for n, m in map(matrix, shapes))


def rebuild_powersgd(ranks, flats):
    """Flat P and flat Q -> P^ Q^T, with numpy's own QR.

    Args:
      ranks: of each level.
      flats: what was recorded -> the means of P and of Q, flat.
    """

    def rebuild(recorded, state, shapes):
        p_flat, q_flat = flats(recorded, state, shapes)[:2]
        mean = {}
        for path in sorted(shapes):
            (n, m), r = matrix(shapes[path]), ranks[int(state.level[path]) if len(ranks) > 1 else 0]
            p, p_flat = p_flat[: r * n].reshape(r, n), p_flat[r * n :]
            q, q_flat = q_flat[: r * m].reshape(r, m), q_flat[r * m :]
            basis = np.linalg.qr(p.T)[0]
            # A basis is known up to signs, which each column of Q shares: take them from LAPACK's convention,
            # the one that both sides use.
            mean[path] = (basis @ q).reshape(shapes[path])
        return mean

    return rebuild


def ignoring(flats, **kwargs):
    """`decoders.reduced` for those who are given the state and the shapes too."""
    return lambda recorded, state, shapes: flats(recorded, **kwargs)


def payload_coded(size, aggregate):
    """Of a codec that is not linear, among four workers; size: (shapes, shards) -> bytes of a shard's payload."""

    def payload(shapes, step):
        del step
        # By "shuffle" a shard for each worker and one of the mean; in a ring one at each hop, and one of the sum.
        return {"gather": 1, "shuffle": 5, "ring": 4}[aggregate] * size(shapes, 1 if aggregate == "gather" else 4)

    return payload


def rebuild_coded(decode, aggregate):
    def rebuild(recorded, state, shapes):
        del state
        shards = decoders.mean(decode, aggregate, recorded[-1], shapes)
        return {path: decoders.joined(shards[path], shape) for path, shape in shapes.items()}

    return rebuild


def size_qsgd(bits, bucket):
    def size(shapes, shards):
        rows = -(-sum(-(-elements(shape) // bucket) for shape in shapes) // shards)
        return rows * (bucket * bits // 8 + 4)

    return size


def rebuild_qsgd(decode, bucket, aggregate):
    def rebuild(recorded, state, shapes):
        del state
        rows = decoders.mean(decode, aggregate, recorded[-1], shapes)[""]
        return decoders.of_buckets(bucket, np.concatenate(rows), shapes)

    return rebuild


def qsgd_row(id: str, bits: int, bucket: int, aggregate: str = "gather", error_feedback: bool = False, **kwargs) -> Row:
    s = 2 ** (bits - 1) - 1
    gain = 1 / (1 + min(bucket / s**2, bucket**0.5 / s)) if error_feedback else 1.0
    settings = {"min_size": 0, "error_feedback": error_feedback, "aggregate": aggregate, "code": "packed", **kwargs}

    def make(**kwargs: Any) -> Compressor:
        return qsgd(bits, bucket_size=bucket, **{**settings, **kwargs})

    # Elias' code, where it fits, is what a conditional chooses in both stages; each asks first, by 4 bytes.
    fits = settings["code"] == "elias" and settings.get("capacity", 9) > 1
    stages = 2 if aggregate == "shuffle" else 1
    phases = {0: (fits,) * stages} if settings["code"] == "elias" else {0: ()}
    size = size_qsgd(bits, bucket)
    decode = decoders.qsgd(bits, bucket, gain, "elias" if fits else "packed")
    payload = payload_coded(lambda shapes, shards: size(shapes, shards) + 4 * bool(phases[0]), aggregate)
    return Row(id, make, False, payload, rebuild_qsgd(decode, bucket, aggregate), phases)


def shared_row(id: str, bits: int, bucket: int, aggregate: str, error_feedback: bool = False) -> Row:
    """QSGD of one scale: the largest of the workers', and the sum of integers of a byte."""
    s = 2 ** (bits - 1) - 1

    def make(**kwargs: Any) -> Compressor:
        settings = {"min_size": 0, "error_feedback": error_feedback, "aggregate": aggregate, **kwargs}
        return qsgd(bits, bucket_size=bucket, shared_scale=True, **settings)

    def payload(shapes, step):
        del step
        rows = sum(-(-elements(shape) // bucket) for shape in shapes)
        return rows * (bucket + 4) + 4  # a ring fills up its parts

    def rebuild(recorded, state, shapes):
        del state
        scale = recorded[0].max(0).view(np.float32).astype(np.float64)
        n = len(recorded[0])
        values = n * bucket
        gain = 1 / (1 + min(values / s**2, values**0.5 / s)) if error_feedback else 1.0
        if aggregate == "ring":
            total = np.roll(recorded[-1], 1, axis=0).reshape(-1)[: scale.size * bucket]
        else:
            total = recorded[-1].astype(int).sum(0)
        rows = total.reshape(-1, bucket) * (scale / s * gain / n)
        return decoders.of_buckets(bucket, rows.reshape(-1), shapes)

    return Row(id, make, False, payload, rebuild)


def powersgd_row(id: str, rank: int, aggregate: str = "psum", **settings: Any) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return powersgd(rank, aggregate=aggregate, **{**settings, **kwargs})

    rebuild = rebuild_powersgd([rank], ignoring(decoders.reduced, aggregate=aggregate))
    # In a ring of four, three parts and the sum's, each filled up.
    slack = 2 * 4 * 4 if aggregate == "ring" else 0
    return Row(id, make, True, lambda *args: payload_powersgd(rank)(*args) + slack, rebuild)


def quantized_powersgd_row(id: str, rank: int, bits: int, bucket: int) -> Row:
    """P and Q through QSGD, scaled for error feedback, by "gather"."""
    s = 2 ** (bits - 1) - 1
    decode = decoders.qsgd(bits, bucket, 1 / (1 + min(bucket / s**2, bucket**0.5 / s)))

    def make(**kwargs: Any) -> Compressor:
        return powersgd(rank, quantizer=qsgd(bits, bucket_size=bucket, aggregate="gather"), **kwargs)

    def payload(shapes, step):
        del step
        sides = [sum(min(*matrix(shape), rank) * matrix(shape)[i] for shape in shapes) for i in (0, 1)]
        return sum(size_qsgd(bits, bucket)([(side,)], 1) for side in sides)

    def flats(recorded, state, shapes):
        sides = [sum(rank * matrix(shape)[i] for shape in shapes.values()) for i in (0, 1)]
        pairs = zip(recorded, sides, strict=True)
        return [decoders.mean(decode, "gather", sent, {"": (side,)})[""][0][:side] for sent, side in pairs]

    return Row(id, make, False, payload, rebuild_powersgd([rank], flats))


def size_onebit(shapes, shards):
    return sum(-(-m // shards) * (-(-n // 8) + 8) for n, m in map(matrix, shapes))


def onebit_row(id: str, aggregate: str, **settings: Any) -> Row:
    row = coded_row(id, onebit, decoders.onebit, size_onebit, aggregate, **settings)

    def payload(shapes, step):
        short = [shape for shape in shapes if matrix(shape)[0] < 64]  # dense
        return row.payload([shape for shape in shapes if shape not in short], step) + payload_dense(short, step)

    return row._replace(payload=payload)


def size_signnorm(shapes, shards):
    return 4 * len(shapes) + -(-sum(-(-elements(shape) // shards) for shape in shapes) // 8)


def size_topk(fraction):
    def size(shapes, shards):
        counts = [decoders.count_topk(shape, fraction, shards) for shape in shapes]
        return sum(4 * k + fields_bytes(k, width) for _, k, width in counts)

    return size


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

    return Row(id, make, False, payload_coded(size, aggregate), rebuild_coded(decode, aggregate))


def adaptive_row(id: str, aggregate: str, **settings: Any) -> Row:
    room = room_adaptive(8, 2 if settings.get("sample") else 1, settings.get("threshold_scope", "matrix"))
    settings = {"proportion": 8, "sample": False, **settings}
    return coded_row(id, adaptive, decoders.adaptive(room), size_adaptive(room), aggregate, **settings)


def subset_row(id: str, factory, fraction: float, aggregate: str = "psum", error_feedback: bool = True) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return factory(fraction, aggregate=aggregate, **{"error_feedback": error_feedback, **kwargs})

    def payload(shapes, step):
        del step
        return 4 * sum(max(1, int(fraction * elements(shape))) for shape in shapes) + 4 + 16 * (aggregate == "ring")

    def rebuild(recorded, state, shapes):
        flat = decoders.reduced(recorded, aggregate)[0]
        draw = distinct if factory is randomk else randomblock_module.block
        mean, key = {}, step_key(0, state.step)
        for place, path in enumerate(sorted(shapes)):
            size = elements(shapes[path])
            k = max(1, int(fraction * size))
            mean[path] = np.zeros(size)
            # Without error feedback the rows scale what they have.
            indices = np.asarray(draw(jax.random.fold_in(key, place), size, k))
            mean[path][indices] = flat[:k] * (1 if error_feedback else size / k)
            mean[path], flat = mean[path].reshape(shapes[path]), flat[k:]
        return mean

    return Row(id, make, True, payload, rebuild)


# Gradients of noise have sums of like norms, so the second check, in step 3, takes all to high.
NOISE = {0: (False,), 1: (True,), 4: (False,), 5: (True,)}


def checked_too(payload):
    """With a norm a leaf, which a check sends, of matrices and of ResNet-18's 41 vectors."""
    return lambda shapes, step: payload(shapes, step) + 4 * (len(shapes) + 41)


def accordion_powersgd_row(id: str, low: int, high: int) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return accordion(powersgd(low, **kwargs), powersgd(high, **kwargs), interval=2)

    rebuild = rebuild_powersgd((low, high), ignoring(decoders.reduced))
    return Row(id, make, False, checked_too(payload_powersgd(high)), rebuild, NOISE, 4)


def accordion_coded_row(id: str, make_level, levels, decode, size, aggregate: str, bucket: int | None = None) -> Row:
    """Of a codec that encodes: each leaf's payload at its own level, one after another."""

    def make(**kwargs: Any) -> Compressor:
        low, high = (make_level(level, aggregate=aggregate, **kwargs) for level in levels)
        return accordion(low, high, interval=2)

    def rebuild(recorded, state, shapes):
        payloads = next(x for x in reversed(recorded) if x.dtype == np.uint8)
        shards, mean = 1 if aggregate == "gather" else len(payloads), {}
        for path in sorted(shapes):
            level, one = levels[int(state.level[path])], {path: shapes[path]}
            length = size(level)([shapes[path]], shards)
            pieces, payloads = payloads[:, :length], payloads[:, length:]
            parts = decoders.mean(decode(level), aggregate, pieces, one)
            if bucket:
                mean |= decoders.of_buckets(bucket, np.concatenate(parts[""]), one)
            else:
                mean[path] = decoders.joined(parts[path], shapes[path])
        return mean

    payload = payload_coded(size(levels[1]), aggregate)
    return Row(id, make, False, checked_too(payload), rebuild, NOISE, 4)


def ring_of_none(**kwargs: Any) -> Compressor:
    return none(aggregate="ring", **kwargs)


def level_of_qsgd(bits: int, **kwargs: Any) -> Compressor:
    return qsgd(bits, bucket_size=32, **{"min_size": 0, "error_feedback": True, **kwargs})


def gained(bits: int):
    """QSGD's decoder under error feedback, buckets of 32."""
    s = 2 ** (bits - 1) - 1
    return decoders.qsgd(bits, 32, 1 / (1 + min(32 / s**2, 32**0.5 / s)))
