"""GradiVeQ's rows of the table: what it sends depends on the step."""

from typing import Any, NamedTuple

import numpy as np

from gradcomp_jax import Compressor, accordion, gradiveq, qsgd
from tests import decoders
from tests.decoders import Flat, elements
from tests.rows import GATHER, REDUCE, RING, SUM, TINY, Row, payload_dense, rebuild_none, size_qsgd, with_norms


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

    @property
    def steps(self) -> tuple[int, int, int, int]:
        """Steps of the warm-up and of each phase: dense, fit, compressed."""
        first = self.warmup + self.settling + self.train
        return 0, first - 2, first - 1, first

    def taken(self, step: int) -> tuple[int, int]:
        """The kind of the step, and whether the bases are fitted."""
        return int(self.phase(step) == "compressed"), int(self.phase(step) == "fit")

    def messages(self, once: tuple[str, ...] = SUM) -> dict[int, tuple[str, ...]]:
        """One message a step, and another for the bases."""
        return {step: once + SUM * self.taken(step)[1] for step in range(8)}


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

    def rebuild(recorded, state, shapes, riding):
        flat, levels = Flat(decoders.reduced(recorded, aggregate)[0]), getattr(state, "level", None)
        state, mean = state if levels is None else state.codec, {}
        compressed = state.position >= cycle.train
        fronts = compressed and len(ratios) != 1  # before which is what rides
        rode = flat.take((riding,)) if fronts else None
        for path in sorted(shapes):
            length, slices, groups = cut(shapes[path], k, reuse)
            widths, size = rungs(length, most, ratios), elements(shapes[path])
            rung = len(widths) - 1 - int(levels[path]) if levels else int(state.rung[path]) if not ratios else 0
            if not compressed or rung == len(widths):
                mean[path] = flat.take(shapes[path])
            else:
                c = flat.take((widths[rung], slices)).T
                mean[path] = restored(c, state, path, groups).reshape(-1)[:size].reshape(shapes[path])
            flat.take((int(compressed) + bool(levels),))  # the loss, the norm
        return mean, flat.take((riding,)) if rode is None else rode

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

    messages = cycle.messages(RING if slack else SUM)
    phases = {step: cycle.taken(step) for step in cycle.steps}
    whole = () if slack else cycle.steps[:3]
    return Row(id, make, True, payload, rebuild_gradiveq(*by_paper, aggregate), messages, phases, 3, whole=whole)


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

    def rebuild(recorded, state, shapes, riding):
        if state.position < 0:
            return rebuild_none()(recorded, state, shapes, riding)
        compressed = state.position >= cycle.train
        sizes = {path: coefficients(shape) if compressed else shape for path, shape in shapes.items()}
        losses = len(shapes) if compressed else 0  # ride too, in front
        recorded, rode = decoders.alone(recorded, losses + riding, "gather", place=0)
        rows = decoders.mean(decode, "gather", recorded[0], sizes)[""][0]
        if not compressed:
            return decoders.of_buckets(bucket, rows, shapes), rode
        c = decoders.of_buckets(bucket, rows, {path: size[::-1] for path, size in sizes.items()})
        mean = {p: restored(c[p].T, state, p, 1).reshape(-1)[: elements(s)].reshape(s) for p, s in shapes.items()}
        return mean, rode[losses:]

    def taken(step):
        kind, fits = cycle.taken(step)
        return kind or 2 * (step >= cycle.warmup), fits

    messages = {step: (GATHER if step >= cycle.warmup else REDUCE, *SUM * cycle.taken(step)[1]) for step in range(8)}
    phases = {step: taken(step) for step in cycle.steps}
    beside = (("two", cycle.steps[3]), *TINY)  # with the losses
    return Row(id, make, False, payload, rebuild, messages, phases, 4, "gather", whole=(0,), beside=beside)


def accordion_gradiveq_row(id: str, cycle: Cycle, k: int, low: float, high: float) -> Row:
    settings = {"train_steps": cycle.train, "compress_steps": cycle.compress, "warmup_steps": cycle.warmup}

    def make(**kwargs: Any) -> Compressor:
        choice = {"compress": lambda path, leaf: leaf.ndim > 1, **settings, **kwargs}
        return accordion(gradiveq(k, ratio=low, **choice), gradiveq(k, ratio=high, **choice), interval=4, window=1)

    by_paper = cycle, k, (low, high), None, cycle.train - 1
    # Dense, fitted, low and then high.
    phases = {step: cycle.taken(step) for step in range(6)}
    low_steps = tuple(step for step in phases if step < 5)

    def payload(shapes, step):
        ratios = by_paper[2] if step not in low_steps else (low,)
        if cycle.phase(step) != "compressed":
            ratios = by_paper[2]
        return payload_gradiveq(cycle, k, ratios, None, cycle.train - 1)(shapes, step)

    rebuild = rebuild_gradiveq(*by_paper)
    whole = tuple(step for step in phases if cycle.phase(step) != "compressed")
    messages = cycle.messages()
    return with_norms(Row(id, make, False, payload, rebuild, messages, phases, 4, fills=low_steps, whole=whole))
