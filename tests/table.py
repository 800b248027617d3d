"""The table of codecs, over which every law is tested. A new codec adds its rows here and inherits all."""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradcomp_jax import Compressor, gradiveq, none, powersgd, qsgd


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
    """

    id: str
    make: Callable[..., Compressor]
    linear: bool
    payload: Callable[[list[tuple[int, ...]], int], int]
    rebuild: Callable[..., dict[str, np.ndarray]]
    phases: Mapping[int, tuple[bool, ...]] = types.MappingProxyType({0: ()})


def rebuild_none(recorded, state, shapes):
    del state
    return {path: recorded[0][path].mean(0) for path in shapes}


def payload_dense(shapes, step):
    del step
    return sum(4 * int(np.prod(shape)) for shape in shapes)


def matrix(shape):
    return int(np.prod(shape[:-1])), shape[-1]


def payload_powersgd(rank):
    return lambda shapes, step: sum(4 * min(n, m, rank) * (n + m) for n, m in map(matrix, shapes))


def rebuild_powersgd(recorded, state, shapes):
    """Flat P and flat Q of each worker -> P^ Q^T, with numpy's own QR."""
    p_flat, q_flat = (x.astype(np.float64).mean(0) for x in recorded)
    mean = {}
    for path in sorted(shapes):
        (n, m), r = matrix(shapes[path]), state.q[path].shape[1]
        p, p_flat = p_flat[: r * n].reshape(r, n), p_flat[r * n :]
        q, q_flat = q_flat[: r * m].reshape(r, m), q_flat[r * m :]
        basis = np.linalg.qr(p.T)[0]
        # A basis is known up to signs, which each column of Q shares: take them from LAPACK's convention,
        # the one that both sides use.
        mean[path] = (basis @ q).reshape(shapes[path])
    return mean


def payload_qsgd(bits, bucket):
    return lambda shapes, step: sum(-(-int(np.prod(shape)) // bucket) * (bucket * bits // 8 + 4) for shape in shapes)


def rebuild_qsgd(bits, bucket, gain=1.0):
    levels, slices = 2 ** (bits - 1) - 1, 8 // bits

    def rebuild(recorded, state, shapes):
        del state
        (payloads,) = recorded
        rows = {path: -(-int(np.prod(shape)) // bucket) for path, shape in shapes.items()}
        count = sum(rows.values())
        mean = np.zeros((count, bucket))
        for payload in payloads:
            codes = payload[: count * bucket * bits // 8].reshape(count, -1)
            scale = payload[count * bucket * bits // 8 :].copy().view(np.float32).astype(np.float64)
            values = np.concatenate([codes >> (bits * i) & (2**bits - 1) for i in range(slices)], axis=1)
            mean += (values.astype(np.float64) - levels) / levels * scale[:, None] * gain / len(payloads)
        restored, start = {}, 0
        for path in sorted(shapes):
            flat = mean[start : start + rows[path]].reshape(-1)
            restored[path] = flat[: int(np.prod(shapes[path]))].reshape(shapes[path])
            start += rows[path]
        return restored

    return rebuild


def qsgd_row(id: str, bits: int, bucket: int, norm: str = "max", error_feedback: bool = False) -> Row:
    s = 2 ** (bits - 1) - 1
    gain = 1 / (1 + min(bucket / s**2, bucket**0.5 / s)) if error_feedback else 1.0

    def make(**kwargs: Any) -> Compressor:
        settings = {"min_size": 0, "error_feedback": error_feedback, "aggregate": "gather", **kwargs}
        return qsgd(bits, bucket_size=bucket, norm=norm, **settings)

    return Row(id, make, False, payload_qsgd(bits, bucket), rebuild_qsgd(bits, bucket, gain))


def powersgd_row(id: str, rank: int, error_feedback: bool = True) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return powersgd(rank, **{"error_feedback": error_feedback, **kwargs})

    return Row(id, make, True, payload_powersgd(rank), rebuild_powersgd)


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
    size = int(np.prod(shape))
    slices = -(-size // min(size, k))
    return min(size, k), slices, -(-slices // min(slices, reuse or slices))


def rungs(k, most, ratio):
    """The d among which a leaf chooses; with a ratio there is one."""
    return [int(k / ratio)] if ratio else sorted({max(1, min(k // r, most)) for r in (32, 16, 8, 4)})


def payload_gradiveq(cycle, k, ratio, reuse, most):
    def payload(shapes, step):
        total = payload_dense(shapes, step)
        if cycle.phase(step) == "dense":
            return total
        cuts = [(*cut(shape, k, reuse), rungs(cut(shape, k, reuse)[0], most, ratio)) for shape in shapes]
        if cycle.phase(step) == "fit":
            return total + 4 * sum(groups * length * d[-1] + (not ratio) for length, _, groups, d in cuts)
        # On a ladder the state that the test makes has all leaves on the lowest rung.
        return 4 * sum(slices * d[0] + 1 for _, slices, _, d in cuts)

    return payload


def rebuild_gradiveq(cycle, k, ratio, reuse, most):
    """U (c - U^T mu) + mu of each slice, from the mean of the flat coefficients."""

    def rebuild(recorded, state, shapes):
        if state.position < cycle.train:
            return rebuild_none(recorded, state, shapes)
        if ratio:
            coefficients, _ = recorded[0]
            flat = np.concatenate([coefficients[path].mean(0).reshape(-1) for path in sorted(shapes)])
        else:
            flat = recorded[0].mean(0)[len(shapes) :]  # the losses come first
        mean = {}
        for path in sorted(shapes):
            length, slices, groups = cut(shapes[path], k, reuse)
            widths, size = rungs(length, most, ratio), int(np.prod(shapes[path]))
            rung = 0 if ratio else int(state.rung[path])
            if rung == len(widths):
                mean[path], flat = flat[:size].reshape(shapes[path]), flat[size:]
                continue
            d = widths[rung]
            c, flat = flat[: slices * d].reshape(slices, d), flat[slices * d :]
            basis, mu = (np.asarray(x[path], np.float64) for x in (state.basis, state.mu))
            each = -(-slices // groups)
            rows = [basis[i // each][:, :d] @ (c[i] - basis[i // each][:, :d].T @ mu[i]) + mu[i] for i in range(slices)]
            mean[path] = np.concatenate(rows)[:size].reshape(shapes[path])
        return mean

    return rebuild


def gradiveq_row(id: str, cycle: Cycle, k: int, ratio: float | None = None, reuse: int | None = None, **kwargs) -> Row:
    most = cycle.train - 1 if kwargs.get("select") != "holdout" else cycle.train - cycle.train // 5 - 1
    settings = {"train_steps": cycle.train, "compress_steps": cycle.compress, "warmup_steps": cycle.warmup, **kwargs}
    if ratio:
        settings["ratio"] = ratio

    def make(**kwargs: Any) -> Compressor:
        return gradiveq(k, reuse=reuse, **{**settings, "compress": lambda path, leaf: leaf.ndim > 1, **kwargs})

    by_paper = cycle, k, ratio, reuse, most
    return Row(id, make, True, payload_gradiveq(*by_paper), rebuild_gradiveq(*by_paper), cycle.phases())


ROWS = [
    Row("none", none, True, payload_dense, rebuild_none),
    powersgd_row("powersgd-1", 1),
    powersgd_row("powersgd-4", 4),
    powersgd_row("powersgd-2-plain", 2, error_feedback=False),
    qsgd_row("qsgd-4", 4, 64),
    qsgd_row("qsgd-2", 2, 32),
    qsgd_row("qsgd-8-l2", 8, 64, norm="l2"),
    qsgd_row("qsgd-4-ef", 4, 64, error_feedback=True),
    qsgd_row("qsgd-2-l2-ef", 2, 32, norm="l2", error_feedback=True),
    gradiveq_row("gradiveq", Cycle(1, 3, 3), 16, 8),
    # Slices that do not tile the leaves, in groups that do not divide the slices.
    gradiveq_row("gradiveq-ef", Cycle(1, 3, 3, settling=1), 20, 10, 7, error_feedback=True),
    gradiveq_row("gradiveq-energy", Cycle(0, 5, 2), 64, select="energy", max_loss=0.4),
    gradiveq_row("gradiveq-holdout", Cycle(0, 5, 2), 64, select="holdout", max_loss=0.9),
]
BY_ID = {row.id: row for row in ROWS}
# One row of each algorithm, where a law does not depend on the settings.
EACH = [BY_ID[id] for id in ("none", "powersgd-4", "qsgd-4", "qsgd-4-ef", "gradiveq", "gradiveq-ef")]
