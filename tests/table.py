"""The table of codecs, over which every law is tested. A new codec adds its rows here and inherits all."""

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
    gradiveq,
    none,
    onebit,
    powersgd,
    qsgd,
    randomblock,
    randomk,
    signnorm,
    topk,
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


class Cycle(NamedTuple):
    """The phases of a GradiVeQ row: dense, on the last training step, compressed."""

    warmup: int
    train: int
    compress: int
    settling: int = 0

    def phase(self, step: int) -> str:
        since = (step - self.warmup) % (self.settling + self.train + self.compress) - self.settling
        if step < self.warmup or since < self.train - 1:
            return "dense"
        return "fit" if since == self.train - 1 else "compressed"

    def phases(self) -> dict[int, tuple[bool, ...]]:
        """Steps of the warm-up and of each phase: whether they compress, and whether they fit."""
        first = self.warmup + self.settling + self.train
        return {0: (False, False), first - 2: (False, False), first - 1: (False, True), first: (True, False)}


def cut(shape, k, reuse):
    """K, slices and bases of a leaf."""
    size = elements(shape)
    slices = -(-size // min(size, k))
    return min(size, k), slices, -(-slices // min(slices, reuse or slices))


def rungs(k, most, ratios):
    """The d among which a leaf chooses; with a ratio there is one, with two of `accordion` two."""
    return sorted(int(k / r) for r in ratios) if ratios else sorted({max(1, min(k // r, most)) for r in (32, 16, 8, 4)})


def payload_gradiveq(cycle, k, ratios, reuse, most):
    def payload(shapes, step):
        total = payload_dense(shapes, step)
        if cycle.phase(step) == "dense":
            return total
        cuts = [(*cut(shape, k, reuse), rungs(cut(shape, k, reuse)[0], most, ratios)) for shape in shapes]
        if cycle.phase(step) == "fit":
            return total + 4 * sum(groups * length * d[-1] + (not ratios) for length, _, groups, d in cuts)
        # On a ladder the state that the test makes has all leaves on the lowest rung.
        return 4 * sum(slices * d[0] + 1 for _, slices, _, d in cuts)

    return payload


def rebuild_gradiveq(cycle, k, ratios, reuse, most, aggregate="psum"):
    """U (c - U^T mu) + mu of each slice, from the mean of the flat coefficients."""

    def rebuild(recorded, state, shapes):
        flat, levels = decoders.reduced(recorded, aggregate)[0], getattr(state, "level", None)
        state = state if levels is None else state.codec
        if state.position < cycle.train:
            return decoders.split(flat, shapes)
        if len(ratios) != 1:
            flat = flat[len(shapes) :]  # the losses come first
        mean = {}
        for path in sorted(shapes):
            length, slices, groups = cut(shapes[path], k, reuse)
            widths, size = rungs(length, most, ratios), elements(shapes[path])
            rung = len(widths) - 1 - int(levels[path]) if levels else int(state.rung[path]) if not ratios else 0
            if rung == len(widths):
                mean[path], flat = flat[:size].reshape(shapes[path]), flat[size:]
                continue
            d = widths[rung]
            c, flat = flat[: slices * d].reshape(slices, d), flat[slices * d :]
            mean[path] = restored(c, state, path, groups).reshape(-1)[:size].reshape(shapes[path])
        return mean

    return rebuild


def restored(c, state, path, groups):
    """The slices of coefficients c [slices, d]."""
    basis, mu = (np.asarray(x[path], np.float64) for x in (state.basis, state.mu))
    each, d = -(-len(c) // groups), c.shape[1]
    u = [basis[i // each][:, :d] for i in range(len(c))]
    return np.stack([u[i] @ (c[i] - u[i].T @ mu[i]) + mu[i] for i in range(len(c))])


def gradiveq_row(id: str, cycle: Cycle, k: int, ratio: float | None = None, reuse: int | None = None, **kwargs) -> Row:
    most = cycle.train - 1 if kwargs.get("select") != "holdout" else cycle.train - cycle.train // 5 - 1
    settings = {"train_steps": cycle.train, "compress_steps": cycle.compress, "warmup_steps": cycle.warmup, **kwargs}
    if ratio:
        settings["ratio"] = ratio

    def make(**kwargs: Any) -> Compressor:
        return gradiveq(k, reuse=reuse, **{**settings, "compress": lambda path, leaf: leaf.ndim > 1, **kwargs})

    by_paper = cycle, k, (ratio,) if ratio else (), reuse, most
    aggregate = kwargs.get("aggregate", "psum")
    slack = 2 * 4 * 4 if aggregate == "ring" else 0

    def payload(shapes, step):
        return payload_gradiveq(*by_paper)(shapes, step) + slack

    return Row(id, make, True, payload, rebuild_gradiveq(*by_paper, aggregate), cycle.phases(), 3)


def quantized_gradiveq_row(id: str, cycle: Cycle, k: int, ratio: float, bits: int, bucket: int) -> Row:
    """The gradients of the training steps, and the coefficients, through QSGD by "gather"; the warm-up is dense."""
    decode, size = decoders.qsgd(bits, bucket), size_qsgd(bits, bucket)
    settings = {"train_steps": cycle.train, "compress_steps": cycle.compress, "warmup_steps": cycle.warmup}

    def make(**kwargs: Any) -> Compressor:
        quantizer = qsgd(bits, bucket_size=bucket, aggregate="gather")
        choice = {"compress": lambda path, leaf: leaf.ndim > 1, **kwargs}
        return gradiveq(k, ratio=ratio, quantizer=quantizer, **settings, **choice)

    def coefficients(shape):
        length, slices, _ = cut(shape, k, None)
        return slices, int(length / ratio)

    def payload(shapes, step):
        if step < cycle.warmup:
            return payload_dense(shapes, step)
        if cycle.phase(step) == "compressed":
            return size([coefficients(shape) for shape in shapes], 1) + 4 * len(shapes)
        bases = [cut(shape, k, None)[0] for shape in shapes] if cycle.phase(step) == "fit" else []
        return size(shapes, 1) + 4 * sum(length * int(length / ratio) for length in bases)

    def rebuild(recorded, state, shapes):
        if state.position < 0:
            return rebuild_none()(recorded, state, shapes)
        if state.position < cycle.train:
            rows = decoders.mean(decode, "gather", recorded[0], shapes)[""][0]
            return decoders.of_buckets(bucket, rows, shapes)
        sizes = {path: coefficients(shape) for path, shape in shapes.items()}
        rows = decoders.mean(decode, "gather", recorded[1], sizes)[""][0]  # the losses come first
        c = decoders.of_buckets(bucket, rows, sizes)
        return {p: restored(c[p], state, p, 1).reshape(-1)[: elements(s)].reshape(s) for p, s in shapes.items()}

    def taken(step):
        dense, fit, compressed = (cycle.phase(step) == phase for phase in ("dense", "fit", "compressed"))
        return (True, False) if compressed else (False, step >= cycle.warmup, fit and not dense)

    first = cycle.warmup + cycle.train
    phases = {step: taken(step) for step in (0, first - 2, first - 1, first)}
    return Row(id, make, False, payload, rebuild, phases, 4)


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


def accordion_gradiveq_row(id: str, cycle: Cycle, k: int, low: float, high: float) -> Row:
    settings = {"train_steps": cycle.train, "compress_steps": cycle.compress, "warmup_steps": cycle.warmup}

    def make(**kwargs: Any) -> Compressor:
        choice = {"compress": lambda path, leaf: leaf.ndim > 1, **settings, **kwargs}
        return accordion(gradiveq(k, ratio=low, **choice), gradiveq(k, ratio=high, **choice), interval=4, window=1)

    by_paper = cycle, k, (low, high), None, cycle.train - 1
    # Whether it compresses, fits, checks: dense, fitted, low and then high.
    phases = {
        0: (False, False, True),
        1: (False, False, False),
        2: (False, True, False),
        3: (True, False, False),
        4: (True, False, True),
        5: (True, False, False),
    }
    payload = checked_too(payload_gradiveq(*by_paper))
    return Row(id, make, False, payload, rebuild_gradiveq(*by_paper), phases, 6)


def ring_of_none(**kwargs: Any) -> Compressor:
    return none(aggregate="ring", **kwargs)


def level_of_qsgd(bits: int, **kwargs: Any) -> Compressor:
    return qsgd(bits, bucket_size=32, **{"min_size": 0, "error_feedback": True, **kwargs})


def gained(bits: int):
    """QSGD's decoder under error feedback, buckets of 32."""
    s = 2 ** (bits - 1) - 1
    return decoders.qsgd(bits, 32, 1 / (1 + min(32 / s**2, 32**0.5 / s)))


ROWS = [
    Row("none", none, True, payload_dense, rebuild_none()),
    Row("none-ring", ring_of_none, True, lambda *args: payload_dense(*args) + 16, rebuild_none("ring")),
    powersgd_row("powersgd-1", 1),
    powersgd_row("powersgd-4", 4),
    powersgd_row("powersgd-2-plain", 2, error_feedback=False),
    powersgd_row("powersgd-1-ring", 1, "ring"),
    quantized_powersgd_row("powersgd-2-qsgd", 2, 8, 16),
    qsgd_row("qsgd-4", 4, 64),
    qsgd_row("qsgd-2", 2, 32),
    qsgd_row("qsgd-8-l2", 8, 64, norm="l2"),
    qsgd_row("qsgd-4-ef", 4, 64, error_feedback=True),
    qsgd_row("qsgd-2-l2-ef", 2, 32, norm="l2", error_feedback=True),
    qsgd_row("qsgd-4-shuffle", 4, 64, "shuffle"),
    qsgd_row("qsgd-2-ef-shuffle", 2, 32, "shuffle", error_feedback=True),
    qsgd_row("qsgd-4-ring", 4, 64, "ring"),
    qsgd_row("qsgd-4-ef-ring", 4, 64, "ring", error_feedback=True),
    qsgd_row("qsgd-elias", 4, 64, norm="l2", code="elias"),
    qsgd_row("qsgd-elias-shuffle", 4, 64, "shuffle", error_feedback=True, norm="l2", code="elias"),
    # Noise takes more than a bit an element.
    qsgd_row("qsgd-elias-full", 4, 64, norm="l2", code="elias", capacity=1),
    shared_row("qsgd-shared", 4, 64, "psum"),
    shared_row("qsgd-shared-ef-ring", 4, 64, "ring", error_feedback=True),
    gradiveq_row("gradiveq", Cycle(1, 3, 3), 16, 8),
    # Slices that do not tile the leaves, in groups that do not divide the slices.
    gradiveq_row("gradiveq-ef", Cycle(1, 3, 3, settling=1), 20, 10, 7, error_feedback=True),
    gradiveq_row("gradiveq-energy", Cycle(0, 5, 2), 64, select="energy", max_loss=0.4),
    gradiveq_row("gradiveq-holdout", Cycle(0, 5, 2), 64, select="holdout", max_loss=0.9),
    gradiveq_row("gradiveq-ring", Cycle(0, 2, 3), 16, 16, aggregate="ring"),
    quantized_gradiveq_row("gradiveq-qsgd", Cycle(1, 3, 3), 16, 8, 4, 32),
    onebit_row("onebit", "gather"),
    onebit_row("onebit-shuffle", "shuffle"),
    onebit_row("onebit-mean", "shuffle", threshold="mean", second_residual=True),
    adaptive_row("adaptive", "gather"),
    adaptive_row("adaptive-shuffle", "shuffle", sample=True),
    adaptive_row("adaptive-column", "shuffle", threshold_scope="column"),
    coded_row("topk", topk, decoders.topk(0.1), size_topk(0.1), "gather", fraction=0.1),
    coded_row("topk-shuffle", topk, decoders.topk(0.1), size_topk(0.1), "shuffle", fraction=0.1),
    subset_row("randomk", randomk, 0.1),
    subset_row("randomk-plain-ring", randomk, 0.1, "ring", error_feedback=False),
    subset_row("randomblock", randomblock, 0.1),
    coded_row("signnorm", signnorm, decoders.signnorm, size_signnorm, "gather"),
    coded_row("signnorm-shuffle", signnorm, decoders.signnorm, size_signnorm, "shuffle"),
    coded_row("signnorm-vote", signnorm, decoders.signnorm, size_signnorm, "shuffle", majority=True),
    accordion_powersgd_row("accordion-powersgd", 4, 1),
    accordion_coded_row("accordion-topk", topk, (0.3, 0.1), decoders.topk, size_topk, "shuffle"),
    accordion_coded_row(
        "accordion-qsgd", level_of_qsgd, (8, 2), gained, lambda bits: size_qsgd(bits, 32), "gather", bucket=32
    ),
    accordion_gradiveq_row("accordion-gradiveq", Cycle(0, 3, 5), 32, 16, 32),
]
BY_ID = {row.id: row for row in ROWS}
# Where a law does not depend on the settings, and for what costs a program of its own for each codec.
EACH = [BY_ID[id] for id in ("none", "powersgd-4", "qsgd-4", "qsgd-4-ef", "gradiveq", "gradiveq-ef")]
