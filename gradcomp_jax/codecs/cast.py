"""Gradients in a narrower type of floating numbers: bfloat16, float16, or float8 in either form.

PyTorch's bf16_compress_hook and fp16_compress_hook do the same. It takes half or a quarter of float32's bytes. For each
tensor:

    own_w = D_w rounded to the type     mean <- mean of own_w

With "psum" numbers of 16 bits are summed as they are, in 16 bits if the backend does that. Nothing is cheaper than
such an all-reduce, but each addition rounds, and no own_w holds this loss. With "gather" and "shuffle" the numbers
travel as bytes, and are averaged in float32. With "shuffle" a worker's shard of the mean is rounded again; this loss is
part of its own_w. A tensor, or a shard of it, is first divided by a power of two next to its largest magnitude. Then
nothing leaves the range, and little falls below it. float8_e4m3fn keeps its 3 bits of mantissa down to 2^-13 of the
largest magnitude, and something down to 2^-17; float8_e5m2 keeps its 2 bits down to 2^-28. Values are rounded to the
nearest.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder, Message, Part
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Codec, Context, Predicate, Result, Say, Talk, total
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.views import HALVES, dtype_of, halved, on_cpus, sum_of

TYPES = {name: jnp.dtype(name) for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")}
# Smaller powers of two count as this one: their reciprocal, times the largest value of a type, leaves the range.
LEAST = 2.0**-112


def power(largest: jax.Array) -> jax.Array:
    """The largest power of two that is not above a float32 of at least 0; at least `LEAST`."""
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    return jnp.maximum(lax.bitcast_convert_type(exponent, jnp.float32), LEAST)


@dataclasses.dataclass(frozen=True)
class Narrow(Coder):
    """The values of a flat tensor, or of a shard of it, in a narrow type, scaled; and the largest magnitude.

    Attributes:
      dtype: the type.
    """

    dtype: Any

    name: ClassVar[str] = "cast"
    indexes: ClassVar[bool] = False
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def ways(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("psum", "gather", "shuffle") if self.dtype in HALVES else ("gather", "shuffle")

    @property
    def top(self) -> float:
        """The image of the power of two below the largest magnitude; up to twice this value fits the type."""
        return 2.0 ** min(14, int(jnp.finfo(self.dtype).maxexp) - 2)

    def encode(self, y: jax.Array, part: Part) -> Message:
        # A maximum may drop a NaN. A maximum of the bits as integers would keep it, but is ten times slower on CPUs.
        scale = jnp.max(jnp.abs(y)) + sum_of(lambda x: 0 * x, y, 0)
        return {"scale": scale, "values": (y * (self.top / power(scale))).astype(self.dtype)}

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        scale = message["scale"]
        return jnp.where(scale == 0, 0, message["values"].astype(jnp.float32) * (power(scale) / self.top))

    def size(self, shape: tuple[int, ...]) -> int:
        return 4 + self.dtype.itemsize * shape[0]


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """The codec; see `cast`.

    Attributes:
      narrow: the coder.
      summed: whether numbers are summed as they are; None: if a sum sends no more than codes.
    """

    narrow: Narrow
    summed: bool | None = None

    name: ClassVar[str] = "cast"

    @property
    def coder(self) -> Narrow:
        return self.narrow

    def default(self, path: str, leaf: Any) -> bool:
        return True

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        return self.narrow.size((leaf.size,)) < uncompressed

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        x, dtype = total(d), self.narrow.dtype
        by_sum = dtype == jnp.bfloat16 and not on_cpus() if self.summed is None else self.summed
        heard = yield Say(halved(x, dtype), exact=True, apart=True) if by_sum else Say(x)
        return Result(heard.mean.astype(x.dtype), heard.own.astype(x.dtype))


@factory
def cast(
    dtype: DTypeLike = "bfloat16",
    *,
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool | Feedback | EF21 | None = None,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """Gradients rounded to 16 or 8 bits, not linear.

    A payload has 16 or 8 bits an element, and 32 more a leaf unless it is summed. With "psum" and "shuffle" a worker of
    n sends 2 (n - 1) / n payloads, with "gather" n - 1. State: none, or under error feedback a residual, float32, of
    the size of the compressed leaves on each worker.

    Args:
      dtype: "bfloat16", "float16", "float8_e4m3fn" or "float8_e5m2".
      aggregate: "psum" (16 bits only), "gather" or "shuffle". By default "psum" for bfloat16 if the backend sums it in
        16 bits (GPU, TPU); else "gather" on two workers, and the one of the others that sends less on more. CPUs sum
        bfloat16 in float32, which then travels and counts. A sum of float16 has no scale: values beyond 65504 are cut
        off, and values below 3e-8 n vanish.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals. By default for 8 bits only. They round a value by up to 6 or 12 %; 16
        bits round it by at most 0.4 %, and a residual takes twice the memory of such gradients. The loss of additions
        in 16 bits is not kept.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default every leaf, vectors too.
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
    >>> tx = optax.chain(gcj.cast("bfloat16"), optax.sgd(0.1, momentum=0.9))
    """
    del seed
    found = dtype_of(dtype)
    if found not in TYPES.values():
        raise ValueError(f"dtype={dtype!r} of codec 'cast' must be one of {', '.join(map(repr, TYPES))}")
    coder = Narrow(found)
    require_aggregate("cast", coder, aggregate)
    kept = feedback(found not in HALVES if error_feedback is None else error_feedback)
    codec = Cast(coder, None if aggregate is None else aggregate == "psum")
    return compressor(
        codec, Settings(axis_name, kept, min_size, compress, allow_dense, aggregate, dense_dtype, buckets)
    )
