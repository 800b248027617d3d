"""GradiVeQ's rows of the table: what it sends depends on the step."""

from typing import Any, NamedTuple

import numpy as np

from gradcomp_jax import Compressor, accordion, gradiveq, qsgd
from tests import decoders
from tests.decoders import elements
from tests.rows import Row, checked_too, payload_dense, rebuild_none, size_qsgd


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
