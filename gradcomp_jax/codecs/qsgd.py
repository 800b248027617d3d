"""QSGD: unbiased stochastic rounding to few levels, bucket by bucket.

Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", NeurIPS 2017, arXiv 1610.02132, section 3. A bucket v of d consecutive values, with s levels:

    Q(v)_i = |v| sgn(v_i) xi_i     xi_i = (l + 1) / s with probability |v_i| s / |v| - l, else l / s

where l = floor(|v_i| s / |v|), so that E Q(v) = v. |v| is the largest magnitude of the bucket, as in the
paper's experiments (norm="max"), or its 2-norm, as in its theory (norm="l2"); for both (Lemma 3.1)

    E |Q(v) - v|_2^2 <= omega |v|_2^2     omega = min(d / s^2, sqrt(d) / s)

On the wire: the integers l sgn(v_i) + s in `bits` bits each, and one float32 |v| a bucket; or, as with the 2-norm most
levels are small, Elias' code of them (section 3.2), in a buffer of fixed size: where it does not fit for
some worker, all send the packed form in that step. The codes of different
workers cannot be added, so they are gathered and decoded, as in the paper's Algorithm 1, or exchanged in two stages.

With `shared_scale` the workers first agree on the largest |v| of each bucket, which becomes the scale of all; their
integers can then be added, and travel as integers of the narrowest type that holds the sum (the idea of THC, Li et al.,
NSDI 2024, arXiv 2302.08545). Still unbiased, of the variance of the worker with the largest gradient.

The paper keeps no residual. Under error feedback an unbiased quantiser of large variance diverges; what is
sent is then scaled by 1 / (1 + omega), which makes it a contraction. (With a shared scale, which is at most the 2-norm
of all workers' buckets together, omega is that of n d values.)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax import aggregation, collectives
from gradcomp_jax.aggregation import (
    LINEAR,
    Aggregated,
    Coder,
    Compact,
    require_aggregate,
)
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import (
    Codec,
    Compressor,
    Exchanged,
    Levels,
    Predicate,
    Tensors,
    compressor,
    is_matrix,
    require_whole,
)
from gradcomp_jax.levels import at_levels
from gradcomp_jax.metrics import CodeLength, no_length
from gradcomp_jax.random import uniform16, worker_key
from gradcomp_jax.sharding import PerWorker
from gradcomp_jax.views import buckets, from_buckets, from_shards, l2_norm, max_norm, shards_of
from gradcomp_jax.wire import elias
from gradcomp_jax.wire.packing import fields_bytes, from_bytes, pack, pack_fields, to_bytes, unpack, unpack_fields


class QSGDState(NamedTuple):
    """State of `qsgd`; the same on all workers but for `length`.

    Attributes:
      step: int32, exchanges done; seeds the rounding.
      length: the true length of what this worker encoded in the last step, see `code_bits`; empty without Elias' code.
    """

    step: jax.Array
    length: PerWorker | tuple[()]


# Room for Elias' code, as a multiple of what normal values take: equal magnitudes take a fourth more.
HEADROOM = 1.25
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


def expected_elias(d: int, s: int) -> float:
    """Bits an element that Elias' code of normal values is expected to take, in its shorter form."""
    return elias.expected_bits(d, s, elias.shorter_form(d, s))


def length_width(d: int, bits: int) -> int:
    """Bits in which the length of a bucket's Elias code travels: it may be as long as the packed code."""
    return (d * bits).bit_length()


def sum_type(levels: int, workers: int) -> Any:
    """The narrowest integer type that holds the sum of `workers` integers within -levels..levels."""
    return next(t for t in (jnp.int8, jnp.int16, jnp.int32) if levels * workers <= jnp.iinfo(t).max)


def qsgd(
    bits: int = 4,
    *,
    bucket_size: int = 512,
    norm: str = "max",
    levels: int | None = None,
    code: str | None = None,
    capacity: float | None = None,
    shared_scale: bool = False,
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool = False,
    seed: int = 0,
    min_size: int = 10_000,
    compress: Predicate | None = None,
    allow_dense: bool = False,
) -> Compressor:
    """QSGD (Alistarh et al., NeurIPS 2017, section 3), unbiased, not linear.

    A payload has bits + 32 / bucket_size bits an element. By "gather" a worker of n sends n - 1 of them, against
    the 2 (n - 1) / n of a float32 all-reduce; by "shuffle" and "ring" 2 (n - 1) / n, and what is averaged is rounded
    again, on the way. Each worker rounds by its own random numbers. State: one counter, and with error feedback a
    residual of the size of the compressed leaves on each worker.

    Args:
      bits: 2, 4 or 8 bits an element, sign included.
      bucket_size: d, elements that share a scale; a multiple of 4. The paper uses 128 at 2 bits.
      norm: the scale of a bucket, "max" or "l2".
      levels: s, at most and by default 2^(bits - 1) - 1.
      code: "packed", or "elias", whose true length `code_bits` tells; by default "elias" for norm="l2" where it is
        shorter, in its buffer, for normal values (and the tree is not too large for it).
      capacity: of the buffer for Elias' code, in bits an element; by default 1.25 times what normal values take.
      shared_scale: all workers use one scale for a bucket, and sum their integers: 8 bits an element up to
        127 / s workers, 16 up to 32767 / s, 32 beyond.
      aggregate: "gather", "shuffle" or "ring"; by default the one of the first two that sends less, which is
        "gather" for two workers. With shared_scale "psum" (default) or "ring".
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
    if levels is not None:
        require_whole("levels", levels, 1)
        most = 2 ** (bits - 1) - 1
        if levels > most:
            raise ValueError(
                f"levels={levels} must be at most {most}: {bits} bits hold {2**bits} codes, and a sign and zero "
                "take 2 levels + 1 of them; use more bits"
            )
    if shared_scale:
        aggregate = aggregate or "psum"
    require_aggregate("qsgd", aggregate, LINEAR if shared_scale else ("gather", "shuffle", "ring"))
    d = bucket_size
    if code not in (None, "packed", "elias"):
        raise ValueError(f"code={code!r} must be 'packed' or 'elias'")
    if code == "elias" and (shared_scale or aggregate == "ring"):
        raise ValueError(
            "code='elias' is for aggregate='gather' and 'shuffle': integers of a shared scale are summed as they are, "
            "and in a ring each hop would have to ask all workers whether the next code fits"
        )
    if capacity is not None and not capacity > 0:
        raise ValueError(f"capacity={capacity} must be above 0, bits an element")
    elias_coded = code == "elias"
    if code is None and norm == "l2" and not shared_scale and aggregate != "ring":
        taken = capacity or HEADROOM * expected_elias(d, levels or 2 ** (bits - 1) - 1)
        elias_coded = taken + length_width(d, bits) / d < bits
    if capacity is not None and not elias_coded:
        raise ValueError(f"capacity={capacity} is that of Elias' code, which is not used here: pass code='elias'")

    def levels_of(bits: int) -> int:
        return levels or 2 ** (bits - 1) - 1

    def gain(s: int, values: int, feedback: bool) -> float:
        omega = min(values / s**2, math.sqrt(values) / s)
        return 1 / (1 + omega) if feedback else 1.0

    def cut(tensors: Tensors) -> jax.Array:
        """All tensors as buckets, one below the other, [rows, d]."""
        return jnp.concatenate([buckets(x.astype(jnp.float32), d) for x in tensors.values()])

    def joined(rows: jax.Array, like: Tensors) -> Tensors:
        parts, start = {}, 0
        for path, x in like.items():
            end = start + -(-x.size // d)
            parts[path] = from_buckets(rows[start:end], x.shape).astype(x.dtype)
            start = end
        return parts

    def coder_of(bits: int, feedback: bool, like: Tensors, shards: int) -> Coder:
        s = levels_of(bits)
        rows = sum(-(-x.size // d) for x in like.values())
        each = -(-rows // shards)
        form, width = elias.shorter_form(d, s), length_width(d, bits)
        room = math.ceil(each * d * (capacity or HEADROOM * expected_elias(d, s)) / 8) if elias_coded else 0
        if code == "elias" and room > elias.MOST_BYTES:
            raise ValueError(
                f"codec 'qsgd': Elias' code of {rows * d} elements in {shards} parts takes {room} bytes, above the "
                f"{elias.MOST_BYTES} that it can address: use code='packed', aggregate='shuffle', or compress= less"
            )

        def encode(v: jax.Array, index: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
            del index
            scale = NORMS[norm](v)
            codes = (quantize(v, scale, s, key) + s).astype(jnp.uint8)
            return {"codes": pack(codes, bits), "scale": scale}

        def decode(message: dict[str, jax.Array]) -> jax.Array:
            signed = unpack(message["codes"], bits).astype(jnp.float32) - s
            return signed * (message["scale"] / s * gain(s, d, feedback))

        def shorten(message: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            signed = unpack(message["codes"], bits).astype(jnp.int32) - s
            data, lengths = elias.encode(signed, room, form)
            # Up to the first sum that is too large, none has wrapped.
            fits = jnp.all(jnp.cumsum(lengths, dtype=jnp.uint32) <= 8 * room) & jnp.all(lengths < 1 << width)
            fields = pack_fields(lengths.astype(jnp.uint32), width)
            length = (32 + width) * len(lengths) + jnp.sum(lengths, dtype=jnp.uint32)
            payload = jnp.concatenate([to_bytes(message["scale"]), fields, data])
            return payload, fits, jnp.stack([jnp.zeros_like(length), length])

        def lengthen(payload: jax.Array) -> dict[str, jax.Array]:
            scales, fields = 4 * each, fields_bytes(each, width)
            scale = from_bytes(payload[:scales], (each, 1), jnp.float32)
            lengths = unpack_fields(payload[scales : scales + fields], each, width).astype(jnp.int32)
            signed, intact = elias.decode(payload[scales + fields :], lengths, d, s, form)
            # A code that is none must not become a gradient.
            return {"codes": pack((signed + s).astype(jnp.uint8), bits), "scale": jnp.where(intact, scale, jnp.nan)}

        return Coder(
            compact=Compact(shorten, lengthen) if 0 < room <= elias.MOST_BYTES else None,
            cut=lambda tensors: shards_of(cut(tensors), shards),
            join=lambda parts: joined(from_shards(parts, rows), like),
            encode=encode,
            decode=decode,
        )

    def exchange_shared(tensors: Tensors, key: jax.Array, axis_name: AxisName, feedback: bool) -> Aggregated:
        """Integers of one scale, summed."""
        s, n = levels_of(bits), collectives.workers(axis_name)
        v = cut(tensors)
        # As integers, whose order is that of non-negative floats: a maximum of floats may drop a NaN. Without their
        # signs: of Inf / Inf, a processor makes a NaN that has one.
        order = jax.lax.bitcast_convert_type(NORMS[norm](v), jnp.int32) & 0x7FFFFFFF
        largest, scale_bits = collectives.largest(order, axis_name)
        scale = jax.lax.bitcast_convert_type(largest, jnp.float32)
        mine = quantize(v, scale, s, key).astype(sum_type(s, n))
        sums, summing = collectives.total(mine, axis_name, ring=aggregate == "ring")
        unit = scale / s * gain(s, n * d, feedback)
        mean, own = sums.astype(jnp.float32) * (unit / n), mine.astype(jnp.float32) * unit
        return Aggregated(joined(mean, tensors), joined(own, tensors), scale_bits + summing)

    def shrinks(path: str, leaf: Any) -> bool:
        del path
        each = d if shared_scale else d * bits // 8
        return -(-leaf.size // d) * (each + 4) < 4 * leaf.size

    def init(tensors: Tensors) -> QSGDState:
        del tensors
        return QSGDState(jnp.int32(0), PerWorker(no_length(), axis_name) if elias_coded else ())

    def build(ladder: tuple[int, ...]) -> Codec:
        """The codec of some numbers of bits, among which `level` chooses for each leaf where there are several."""

        def exchange(
            tensors: Tensors,
            state: QSGDState,
            axis_name: AxisName,
            *,
            feedback: bool = False,
            level: dict[str, jax.Array] | None = None,
            **extra_args: Any,
        ) -> Exchanged:
            del extra_args
            next_state = QSGDState(state.step + 1, state.length)
            key = worker_key(seed, state.step, axis_name)
            if shared_scale:
                got = exchange_shared(tensors, key, axis_name, feedback)
            else:
                coders = [functools.partial(coder_of, bits, feedback) for bits in ladder]
                coder = coders[0] if level is None else at_levels(coders, level)
                got = aggregation.exchange(tensors, coder, aggregate, axis_name, key)
            if got.length is not None:
                next_state = next_state._replace(length=PerWorker(CodeLength(got.length), axis_name))
            return Exchanged(got.mean, got.own, next_state, got.bits)

        return Codec("qsgd", init, exchange, is_matrix, shrinks)

    levels_offered = None
    if levels is None and not shared_scale and not elias_coded:
        others = {"bucket_size": d, "norm": norm, "aggregate": aggregate, "seed": seed}
        levels_offered = Levels("bits", bits, True, others, lambda ladder, error_feedback: build(ladder))
    return compressor(
        build((bits,))._replace(levels=levels_offered),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
