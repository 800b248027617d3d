"""Four bits a value: the floating numbers of Streaming DiLoCo.

Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch", 2025, arXiv
2501.18512. Workers exchange numbers of 4 bits, a sign and 3 bits of exponent (E3M0), and add them up in float32. The
paper does not say how the exponents lie. Here a bucket of d consecutive values has a scale |v|, its largest magnitude,
and each value is rounded to the nearest of

    0, and +-2^-6 |v|, 2^-5 |v|, ..., |v|

Halfway between two levels the larger one is taken. So a value above 3/4 of the smallest level changes by at most a
third of itself, and one below half of that level becomes zero. The paper keeps no residual.

On the wire: four bits a value, two values in a byte, and one float32 a bucket.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder, Coding, Message, Part
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Predicate, require_whole
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.views import filled, max_norm
from gradcomp_jax.wire.packing import pack, unpack

# From such a part of the scale on a magnitude has the next exponent: halfway between two levels.
EDGES = (2.0**-7, *(0.75 * 2.0**-i for i in range(5, -1, -1)))
SIGN = 8


@dataclasses.dataclass(frozen=True)
class Exponents(Coder):
    """A sign and an exponent of three bits for each value of a flat tensor, and a scale for each bucket.

    Attributes:
      d: the bucket's size.
    """

    d: int

    name: ClassVar[str] = "float4"
    rowwise: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    indexes: ClassVar[bool] = False
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def unit(self) -> int:
        return self.d

    def encode(self, y: jax.Array, part: Part) -> Message:
        v = filled(y, -(-y.size // self.d) * self.d).reshape(-1, self.d)
        scale = max_norm(v)
        magnitude, code = jnp.abs(v), jnp.where(v < 0, jnp.uint8(SIGN), jnp.uint8(0))
        for edge in EDGES:  # comparisons instead of a division, which a compiler may not round exactly
            code = code + (magnitude >= scale * edge).astype(jnp.uint8)
        return {"codes": pack(code, 4), "scale": scale}

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        codes = unpack(message["codes"], 4)
        exponent = (codes & (SIGN - 1)).astype(jnp.int32)
        # The bits of 2^(exponent - 7).
        level = lax.bitcast_convert_type(exponent + 120 << 23, jnp.float32)
        signed = jnp.where(codes >= SIGN, -message["scale"], message["scale"])
        # Zero times a scale that is not finite is NaN, which a shard of the mean must stay.
        return (jnp.where(exponent > 0, level, 0) * signed).reshape(-1)[: shape[0]]

    def size(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // self.d) * (self.d // 2 + 4)


@dataclasses.dataclass(frozen=True)
class Float4(Coding):
    """The codec; see `float4`.

    Attributes:
      exponents: the coder.
    """

    exponents: Exponents

    name: ClassVar[str] = "float4"

    @property
    def coder(self) -> Coder:
        return self.exponents

    def default(self, path: str, leaf: Any) -> bool:
        return True

    def view(self, path: str, leaf: Any) -> str:
        return f"buckets of {self.exponents.d}, by 4 bits each"


@factory
def float4(
    bucket_size: int = 512,
    *,
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool | Feedback | EF21 = False,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """Floating numbers of four bits (Streaming DiLoCo), not linear.

    A payload has 4 + 32 / bucket_size bits an element. With "gather" a worker of n sends n - 1 payloads, with "shuffle"
    2 (n - 1) / n. "shuffle" rounds averages again on the way. State: none, or with error feedback a residual of the
    size of the compressed leaves on each worker.

    Args:
      bucket_size: the number of elements that share a scale; a multiple of 2.
      aggregate: "gather" or "shuffle"; by default "gather" on two workers, and on more the one that sends less.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; the paper keeps none.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default every leaf that shrinks, vectors too.
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
    >>> tx = optax.chain(gcj.float4(), optax.sgd(0.1, momentum=0.9))
    """
    del seed
    require_whole("bucket_size", bucket_size, 2)
    if bucket_size % 2:
        raise ValueError(f"bucket_size={bucket_size} must be a multiple of 2, so that its codes fill bytes")
    coder = Exponents(bucket_size)
    require_aggregate("float4", coder, aggregate)
    return compressor(
        Float4(coder),
        Settings(axis_name, feedback(error_feedback), min_size, compress, allow_dense, aggregate, dense_dtype, buckets),
    )
