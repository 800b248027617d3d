"""The table of codecs, over which every law is tested. A new codec adds its rows here and inherits all."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gradcomp_jax import Compressor, none, powersgd, qsgd


class Row(NamedTuple):
    """A codec in one setting.

    Attributes:
      id: its name in test reports.
      make: keywords of the factory -> Compressor.
      linear: whether law 3 holds.
      payload: shapes of the compressed leaves -> bytes one worker hands to its collectives, by the paper.
      rebuild: (what each worker handed to the collectives, in order, each [workers, ...]; the state before;
        shapes by path) -> the mean by path, in numpy.
    """

    id: str
    make: Callable[..., Compressor]
    linear: bool
    payload: Callable[[list[tuple[int, ...]]], int]
    rebuild: Callable[..., dict[str, np.ndarray]]


def rebuild_none(recorded, state, shapes):
    del state
    return {path: recorded[0][path].mean(0) for path in shapes}


def matrix(shape):
    return int(np.prod(shape[:-1])), shape[-1]


def payload_powersgd(rank):
    return lambda shapes: sum(4 * min(n, m, rank) * (n + m) for n, m in map(matrix, shapes))


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
    return lambda shapes: sum(-(-int(np.prod(shape)) // bucket) * (bucket * bits // 8 + 4) for shape in shapes)


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
        settings = {"min_size": 0, "error_feedback": error_feedback, **kwargs}
        return qsgd(bits, bucket_size=bucket, norm=norm, **settings)

    return Row(id, make, False, payload_qsgd(bits, bucket), rebuild_qsgd(bits, bucket, gain))


def powersgd_row(id: str, rank: int, error_feedback: bool = True) -> Row:
    def make(**kwargs: Any) -> Compressor:
        return powersgd(rank, **{"error_feedback": error_feedback, **kwargs})

    return Row(id, make, True, payload_powersgd(rank), rebuild_powersgd)


ROWS = [
    Row("none", none, True, lambda shapes: sum(4 * int(np.prod(shape)) for shape in shapes), rebuild_none),
    powersgd_row("powersgd-1", 1),
    powersgd_row("powersgd-4", 4),
    powersgd_row("powersgd-2-plain", 2, error_feedback=False),
    qsgd_row("qsgd-4", 4, 64),
    qsgd_row("qsgd-2", 2, 32),
    qsgd_row("qsgd-8-l2", 8, 64, norm="l2"),
    qsgd_row("qsgd-4-ef", 4, 64, error_feedback=True),
    qsgd_row("qsgd-2-l2-ef", 2, 32, norm="l2", error_feedback=True),
]
BY_ID = {row.id: row for row in ROWS}
# One row of each algorithm, where a law does not depend on the settings.
EACH = [BY_ID["none"], BY_ID["powersgd-4"], BY_ID["qsgd-4"], BY_ID["qsgd-4-ef"]]
