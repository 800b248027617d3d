"""QSGD: unbiased stochastic rounding to few levels, bucket by bucket.

Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", NeurIPS 2017, arXiv 1610.02132, section 3. A bucket v of d consecutive values, with s levels:

    Q(v)_i = |v| sgn(v_i) xi_i     xi_i = (l + 1) / s with probability |v_i| s / |v| - l, else l / s

where l = floor(|v_i| s / |v|), so that E Q(v) = v. |v| is the largest magnitude of the bucket, as in the
paper's experiments (norm="max"), or its 2-norm, as in its theory (norm="l2"); for both (Lemma 3.1)

    E |Q(v) - v|_2^2 <= omega |v|_2^2     omega = min(d / s^2, sqrt(d) / s)

On the wire: the integers l sgn(v_i) + s in `bits` bits each, and one float32 |v| a bucket. With the 2-norm most levels
are small, and Elias' code of them (section 3.2) is shorter. It fills a buffer of fixed size; if it does not fit for
some worker, all workers send the packed form in that step. The codes of different workers cannot be added, so they are
gathered and decoded, like in the paper's Algorithm 1, or exchanged in two stages.

With `shared_scale` the workers first agree on the largest |v| of each bucket, and all use it. Their integers can then
be added, and travel in fields that hold the sum, several to a word of 32 bits (the idea of THC, Li et al., NSDI 2024,
arXiv 2302.08545). The result is still unbiased; its variance is that of the worker with the largest gradient.

The paper keeps no residual. Under error feedback an unbiased quantiser of large variance diverges. Values are then
scaled by 1 / (1 + omega), which makes the quantiser a contraction. (A shared scale is at most the 2-norm of all
workers' buckets together, so omega is that of n d values.)
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder, Coding, Compact, Message, Part, Switched, no_length
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Mine, Predicate, Strength, require_whole
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.random import uniform23
from gradcomp_jax.views import filled, l2_norm, max_norm
from gradcomp_jax.wire import elias
from gradcomp_jax.wire.packing import fields_bytes, from_bytes, pack, pack_fields, to_bytes, unpack, unpack_fields


class QSGDState(NamedTuple):
    """State of `qsgd`; the same on all workers, except for `length`.

    Attributes:
      step: int32, exchanges done; seeds the rounding.
      length: the true length of this worker's code in the last step, see `code_bits`; empty without Elias' code.
    """

    step: jax.Array
    length: Any


# Room for Elias' code, as a multiple of its length for normal values: equal magnitudes take a fourth more.
HEADROOM = 1.25
NORMS = {"max": max_norm, "l2": l2_norm}


def quantize(v: jax.Array, scale: jax.Array, levels: int, key: jax.Array) -> jax.Array:
    """Rounds v / scale * levels at random to integers with this expectation, within -levels..levels.

    Args:
      v: buckets, float32 [rows, d].
      scale: |v| of each bucket, [rows, 1]; rows with scale 0 give zeros.
      levels: s.
      key: the key of the rounding.

    Returns:
      Integers, as float32 [rows, d].
    """
    # Below the smallest normal float the quotient cannot be trusted. A compiler may divide by multiplying with the
    # reciprocal, which is not normal for a scale above 2^126.
    usable = scale >= jnp.finfo(jnp.float32).tiny
    down = jnp.where(scale > 2.0**100, jnp.float32(2.0**-64), 1)
    y = jnp.where(usable, v * down / jnp.where(usable, scale * down, 1), 0) * levels
    floor = jnp.floor(y)
    # Not the floor of a sum, which would be rounded: here whole numbers stay as they are.
    return jnp.clip(jnp.where(uniform23(key, *v.shape) < y - floor, floor + 1, floor), -levels, levels)


def expected_elias(d: int, s: int) -> float:
    """The expected bits an element of Elias' code for normal values, in its shorter form."""
    return elias.expected_bits(d, s, elias.shorter_form(d, s))


def length_width(d: int, bits: int) -> int:
    """The number of bits for the length of a bucket's Elias code, which may be as long as the packed code."""
    return (d * bits).bit_length()


@dataclasses.dataclass(frozen=True)
class Buckets(Coder):
    """QSGD's code of a flat tensor, bucket by bucket; see `qsgd` for the settings.

    Attributes:
      bits: the bits of a code.
      d: the bucket's size.
      norm: "max" or "l2".
      s: levels.
      room: the buffer for Elias' code, in bits an element; None: packed.
      insists: whether to refuse tensors that are too large for Elias' code, instead of packing them.
      seed: the seed of the rounding.
      contracts: whether decoded values are scaled by 1 / (1 + omega), under error feedback.
    """

    bits: int
    d: int
    norm: str
    s: int
    room: float | None = None
    insists: bool = False
    seed: int = 0
    contracts: bool = False

    name: ClassVar[str] = "qsgd"
    ways: ClassVar[tuple[str, ...]] = ("gather", "shuffle", "ring")
    rowwise: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    indexes: ClassVar[bool] = False
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def unit(self) -> int:
        return self.d

    def under(self, feedback: bool) -> "Buckets":
        return dataclasses.replace(self, contracts=feedback)

    def gain(self, values: int) -> float:
        """1 / (1 + omega) for a bucket of `values` values, under error feedback; else 1."""
        omega = min(values / self.s**2, math.sqrt(values) / self.s)
        return 1 / (1 + omega) if self.contracts else 1.0

    def rows(self, y: jax.Array) -> jax.Array:
        """Flat elements as buckets [rows, d], filled up with zeros."""
        return filled(y, -(-y.size // self.d) * self.d).reshape(-1, self.d)

    def encode(self, y: jax.Array, part: Part) -> Message:
        v = self.rows(y)
        scale = NORMS[self.norm](v)
        codes = (quantize(v, scale, self.s, part.key) + self.s).astype(jnp.uint8)
        return {"codes": pack(codes, self.bits), "scale": scale}

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        signed = unpack(message["codes"], self.bits).astype(jnp.float32) - self.s
        values = signed * (message["scale"] / self.s * self.gain(self.d))
        return values.reshape(-1)[: shape[0]]

    def size(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // self.d) * (self.d * self.bits // 8 + 4)

    def start(self) -> QSGDState:
        return QSGDState(jnp.int32(0), Mine(no_length()) if self.room else ())

    def compact(self, units: int) -> Compact | None:
        if self.room is None:
            return None
        d, s, room, width = self.d, self.s, math.ceil(units * self.d * self.room / 8), length_width(self.d, self.bits)
        if room > elias.MOST_BYTES:
            if self.insists:
                raise ValueError(
                    f"codec 'qsgd': Elias' code of {units * d} elements takes {room} bytes, above the "
                    f"{elias.MOST_BYTES} that it can address: use code='packed', aggregate='shuffle', or compress= less"
                )
            return None
        form, scales, fields = elias.shorter_form(d, s), 4 * units, fields_bytes(units, width)

        def shorten(message: Message) -> tuple[jax.Array, jax.Array, jax.Array]:
            signed = unpack(message["codes"], self.bits).astype(jnp.int32) - s
            # The last shard is filled up with zero bytes, which are codes of -s.
            signed = jnp.where(message["scale"] > 0, signed, 0)
            data, lengths = elias.encode(signed, room, form)
            # Up to the first sum that is too large, no sum has wrapped around.
            fits = jnp.all(jnp.cumsum(lengths, dtype=jnp.uint32) <= 8 * room) & jnp.all(lengths < 1 << width)
            packed = pack_fields(lengths.astype(jnp.uint32), width)
            length = (32 + width) * len(lengths) + jnp.sum(lengths, dtype=jnp.uint32)
            payload = jnp.concatenate([to_bytes(message["scale"]), packed, data])
            return payload, fits, jnp.stack([jnp.zeros_like(length), length])

        def lengthen(payload: jax.Array) -> Message:
            scale = from_bytes(payload[:scales], (units, 1), jnp.float32)
            lengths = unpack_fields(payload[scales : scales + fields], units, width).astype(jnp.int32)
            signed, intact = elias.decode(payload[scales + fields :], lengths, d, s, form)
            # An invalid code must not become a gradient.
            codes = pack((signed + s).astype(jnp.uint8), self.bits)
            return {"codes": codes, "scale": jnp.where(intact, scale, jnp.nan)}

        return Compact(scales + fields + room, shorten, lengthen)


@dataclasses.dataclass(frozen=True)
class SharedBuckets(Buckets):
    """The same code with one scale for all workers, so that their integers can be summed."""

    shares_scale: ClassVar[bool] = True

    def size(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // self.d) * (self.d + 4)  # one byte for each element, as with few workers

    def scale(self, y: jax.Array) -> jax.Array:
        """|v| of each bucket of a flat tensor, [rows, 1]."""
        return NORMS[self.norm](self.rows(y))

    def quantize_by(self, y: jax.Array, scale: jax.Array, key: jax.Array) -> jax.Array:
        """The integers of a tensor by these scales, int8 [rows, d], within -s..s."""
        return quantize(self.rows(y), scale, self.s, key).astype(jnp.int8)

    def of_integers(self, integers: jax.Array, scale: jax.Array, workers: int) -> jax.Array:
        """The values of integers [rows, d], flat. A scale is at most the 2-norm of all workers' buckets together."""
        return (integers.astype(jnp.float32) * (scale / self.s * self.gain(workers * self.d))).reshape(-1)


@dataclasses.dataclass(frozen=True)
class QSGD(Coding):
    """The codec; see `qsgd`.

    Attributes:
      coders: the coder, or several; then a leaf's strength chooses one.
      switchable: whether its strength can be switched.
    """

    coders: tuple[Buckets, ...]
    switchable: bool = True

    name: ClassVar[str] = "qsgd"

    @property
    def coder(self) -> Coder:
        return self.coders[0] if len(self.coders) == 1 else Switched(self.coders)

    def view(self, path: str, leaf: Any) -> str:
        return f"buckets of {self.coders[0].d}, by {' or '.join(str(coder.bits) for coder in self.coders)} bits each"

    @property
    def strength(self) -> Strength | None:
        coder = self.coders[0]
        others = {"bucket_size": coder.d, "norm": coder.norm, "seed": coder.seed, "transform": self.transform}
        return Strength("bits", coder.bits, True, others, self.at) if self.switchable else None

    def at(self, bits: tuple[int, ...]) -> "QSGD":
        """The codec with these numbers of bits."""
        coders = (dataclasses.replace(self.coders[0], bits=b, s=2 ** (b - 1) - 1) for b in bits)
        return dataclasses.replace(self, coders=tuple(coders))


@factory
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
    error_feedback: bool | Feedback | EF21 = False,
    seed: int = 0,
    min_size: int = 10_000,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """QSGD (Alistarh et al., NeurIPS 2017, section 3), unbiased, not linear.

    A payload has bits + 32 / bucket_size bits an element. With "gather" a worker of n sends n - 1 payloads, with
    "shuffle" and "ring" 2 (n - 1) / n, like a float32 all-reduce. "shuffle" and "ring" round averages again on the way.
    Each worker rounds with its own random numbers. State: one counter, and with error feedback a residual of the size
    of the compressed leaves on each worker.

    Args:
      bits: 2, 4 or 8 bits an element, including the sign.
      bucket_size: d, the number of elements that share a scale; a multiple of 4. The paper uses 128 at 2 bits.
      norm: the scale of a bucket, "max" or "l2".
      levels: s, at most and by default 2^(bits - 1) - 1.
      code: "packed", or "elias"; `code_bits` tells the true length of the latter. By default "elias" if norm="l2" and
        its buffer is smaller than the packed codes for normally distributed values (and the tree is not too large for
        it); otherwise "packed".
      capacity: the buffer for Elias' code, in bits an element; by default 1.25 times the code of normal values.
      shared_scale: all workers use one scale for a bucket, and sum their integers: 8 bits an element up to
        127 / s workers, 16 up to 32767 / s, 32 beyond.
      aggregate: "gather", "shuffle" or "ring"; by default "gather" on two workers, and on more the one of the first two
        that sends less. With shared_scale "psum" (default) or "ring".
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: keep residuals, or `Feedback`, `EF21`, and scale decoded values by 1 / (1 + omega).
      seed: the seed of the rounding.
      min_size: leaves of fewer elements are sent dense; by default 10,000, like in the paper.
      compress: (path, leaf) -> whether to compress it; by default every leaf of two axes or more.
      allow_dense: accept a tree whose leaves are all sent dense.
      dense_dtype: the type of leaves that are sent dense, "bfloat16" or "float16"; by default float32 or wider. Their
        rounding is not fed back.
      buckets: the number of parts of the exchange. Each sends messages of its own once its gradients are there. Or
        (path) -> the number of a leaf's part; lower numbers go first. For the default see `compressor`.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument is out of range; later, in init and update, a refusal of `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.qsgd(bits=4), optax.sgd(0.1, momentum=0.9))
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
    s = levels or 2 ** (bits - 1) - 1
    kind = SharedBuckets if shared_scale else Buckets
    coder = kind(bits, bucket_size, norm, s, None, code == "elias", seed)
    require_aggregate("qsgd", coder, aggregate)
    room = _room(coder, code, capacity, aggregate)
    switchable = levels is None and not shared_scale and room is None
    codec = QSGD((dataclasses.replace(coder, room=room),), switchable)
    return compressor(
        codec,
        Settings(axis_name, feedback(error_feedback), min_size, compress, allow_dense, aggregate, dense_dtype, buckets),
    )


def _room(coder: Buckets, code: str | None, capacity: float | None, aggregate: str | None) -> float | None:
    """The buffer for Elias' code, in bits an element; None if Elias' code is not used."""
    if code not in (None, "packed", "elias"):
        raise ValueError(f"code={code!r} must be 'packed' or 'elias'")
    if code == "elias" and (coder.shares_scale or aggregate == "ring"):
        raise ValueError(
            "code='elias' is for aggregate='gather' and 'shuffle': integers of a shared scale are summed as they are, "
            "and in a ring each hop would have to ask all workers whether the next code fits"
        )
    if capacity is not None and not capacity > 0:
        raise ValueError(f"capacity={capacity} must be above 0, bits an element")
    taken = capacity or HEADROOM * expected_elias(coder.d, coder.s)
    possible = not coder.shares_scale and aggregate != "ring"
    shorter = coder.norm == "l2" and taken + length_width(coder.d, coder.bits) / coder.d < coder.bits
    if code == "elias" or (code is None and possible and shorter):
        return taken
    if capacity is not None:
        raise ValueError(f"capacity={capacity} is that of Elias' code, which is not used here: pass code='elias'")
    return None
