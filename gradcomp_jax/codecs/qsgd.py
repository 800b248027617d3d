"""QSGD: unbiased stochastic rounding to few levels, bucket by bucket.

Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", NeurIPS 2017, arXiv 1610.02132, section 3. A bucket v of d consecutive values, with s levels:

    Q(v)_i = |v| sgn(v_i) xi_i     xi_i = (l + 1) / s with probability |v_i| s / |v| - l, else l / s

where l = floor(|v_i| s / |v|), so that E Q(v) = v. |v| is the largest magnitude of the bucket, as in the
paper's experiments (norm="max"), or its 2-norm, as in its theory (norm="l2"); for both (Lemma 3.1)

    E |Q(v) - v|_2^2 <= omega |v|_2^2     omega = min(d / s^2, sqrt(d) / s)

On the wire: the integers l sgn(v_i) + s in `bits` bits each, then one float32 |v| a bucket, in one buffer.
The codes of different workers cannot be added, so each worker gathers and decodes all.

The paper keeps no residual. Under error feedback an unbiased quantiser of large variance diverges; what is
sent is then scaled by 1 / (1 + omega), which makes it a contraction.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax import collectives
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import (
    Codec,
    Compressor,
    Exchanged,
    Predicate,
    Tensors,
    compressor,
    is_matrix,
    require_whole,
)
from gradcomp_jax.random import uniform16, worker_key
from gradcomp_jax.views import buckets, from_buckets
from gradcomp_jax.wire.packing import from_bytes, pack, to_bytes, unpack


class QSGDState(NamedTuple):
    """State of `qsgd`, the same on all workers.

    Attributes:
      step: int32, exchanges done; seeds the rounding.
    """

    step: jax.Array


def max_norm(v: jax.Array) -> jax.Array:
    """The largest magnitude of each row, [rows, d] -> [rows, 1]; not finite if any element is not."""
    # The order of non-negative floats is that of their bits, NaN above all; jnp.max may drop a NaN.
    largest = jnp.max(jax.lax.bitcast_convert_type(jnp.abs(v), jnp.int32), axis=1, keepdims=True)
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def l2_norm(v: jax.Array) -> jax.Array:
    """The 2-norm of each row, [rows, d] -> [rows, 1]; not finite if any element is not."""
    largest = max_norm(v)
    unit = v / jnp.where(largest > 0, largest, 1)  # whose squares neither overflow nor vanish
    return largest * jnp.sqrt(jnp.sum(unit * unit, axis=1, keepdims=True))


NORMS = {"max": max_norm, "l2": l2_norm}


def quantize(v: jax.Array, scale: jax.Array, levels: int, key: jax.Array) -> jax.Array:
    """Rounds v / scale * levels at random to integers of that expectation, within -levels..levels.

    Args:
      v: buckets, float32 [rows, d].
      scale: |v| of each, [rows, 1]; rows of scale 0 give zeros.
      levels: s.
      key: of the rounding.

    Returns:
      Integers, as float32 [rows, d].
    """
    # Below the smallest normal float the quotient is not to be trusted.
    usable = scale >= jnp.finfo(jnp.float32).tiny
    y = jnp.where(usable, v / jnp.where(usable, scale, 1), 0) * levels
    return jnp.clip(jnp.floor(y + uniform16(key, *v.shape)), -levels, levels)


def qsgd(
    bits: int = 4,
    *,
    bucket_size: int = 512,
    norm: str = "max",
    levels: int | None = None,
    aggregate: str = "gather",
    axis_name: AxisName = "data",
    error_feedback: bool = False,
    seed: int = 0,
    min_size: int = 10_000,
    compress: Predicate | None = None,
    allow_dense: bool = False,
) -> Compressor:
    """QSGD (Alistarh et al., NeurIPS 2017, section 3), not linear, by one all-gather.

    A worker of n sends (n - 1) payloads of bits + 32 / bucket_size bits an element, so against the
    2 (n - 1) / n of a float32 all-reduce it saves a factor of about 64 / (n bits): 4 at 4 bits and 4
    workers, nothing at 8 bits and 8. Each worker rounds by its own random numbers. State: one counter,
    and with error feedback a residual of the size of the compressed leaves on each worker.

    Args:
      bits: 2, 4 or 8 bits an element, sign included.
      bucket_size: d, elements that share a scale; a multiple of 4. The paper uses 128 at 2 bits.
      norm: the scale of a bucket, "max" or "l2".
      levels: s, at most and by default 2^(bits - 1) - 1.
      aggregate: how the codes are exchanged: "gather".
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: keep residuals, and scale what is sent by 1 / (1 + omega).
      seed: of the rounding.
      min_size: leaves of fewer elements are sent dense, by default those below 10,000, as in the paper.
      compress: (path, leaf) -> whether to compress it; by default every leaf of two axes or more.
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument out of range; later, in init and update, what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import qsgd
    >>> tx = optax.chain(qsgd(bits=4), optax.sgd(0.1, momentum=0.9))
    """
    require_whole("bits", bits, 1)
    if bits not in (2, 4, 8):
        raise ValueError(f"bits={bits} must be 2, 4 or 8; 1 bit leaves no level beside the sign")
    require_whole("bucket_size", bucket_size, 4)
    if bucket_size % 4:
        raise ValueError(f"bucket_size={bucket_size} must be a multiple of 4, so that its codes fill bytes")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} must be one of {', '.join(map(repr, NORMS))}")
    most = 2 ** (bits - 1) - 1
    s = most if levels is None else levels
    require_whole("levels", s, 1)
    if s > most:
        raise ValueError(
            f"levels={s} must be at most {most}: {bits} bits hold {2**bits} codes, and a sign and zero "
            "take 2 levels + 1 of them; use more bits"
        )
    average = collectives.aggregation("qsgd", aggregate)
    d = bucket_size
    omega = min(d / s**2, math.sqrt(d) / s)
    gain = 1 / (1 + omega) if error_feedback else 1.0

    def encode(v: jax.Array, key: jax.Array) -> jax.Array:
        """Buckets [rows, d] to bytes."""
        scale = NORMS[norm](v)
        codes = (quantize(v, scale, s, key) + s).astype(jnp.uint8)
        return jnp.concatenate([pack(codes, bits).reshape(-1), to_bytes(scale)])

    def decode(payload: jax.Array) -> jax.Array:
        """Bytes to buckets [rows, d]."""
        rows = payload.size // (d * bits // 8 + 4)
        end = rows * d * bits // 8
        signed = unpack(payload[:end].reshape(rows, -1), bits).astype(jnp.float32) - s
        scale = from_bytes(payload[end:], (rows, 1), jnp.float32)
        return signed * (scale / s * gain)

    def shrinks(path: str, leaf: Any) -> bool:
        del path
        return -(-leaf.size // d) * (d * bits // 8 + 4) < 4 * leaf.size

    def init(tensors: Tensors) -> QSGDState:
        del tensors
        return QSGDState(jnp.int32(0))

    def exchange(tensors: Tensors, state: QSGDState, axis_name: AxisName, **extra_args: Any) -> Exchanged:
        del extra_args
        if not tensors:
            return Exchanged({}, {}, QSGDState(state.step + 1), 0)
        rows = [buckets(x.astype(jnp.float32), d) for x in tensors.values()]

        def restore(v: jax.Array) -> Tensors:
            parts, start = {}, 0
            for (path, x), part in zip(tensors.items(), rows, strict=True):
                parts[path] = from_buckets(v[start : start + len(part)], x.shape).astype(x.dtype)
                start += len(part)
            return parts

        payload = encode(jnp.concatenate(rows), worker_key(seed, state.step, axis_name))
        mean, sent = average(payload, decode, axis_name)
        return Exchanged(restore(mean), restore(decode(payload)), QSGDState(state.step + 1), sent)

    return compressor(
        Codec("qsgd", init, exchange, is_matrix, shrinks),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
