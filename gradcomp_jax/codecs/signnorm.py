"""Signs with one norm a tensor, and signSGD's majority vote.

Sign+Norm is a baseline of Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727 (Table 4); that error
feedback makes signs converge is Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes", ICML 2019, arXiv 1901.09847. With D the gradient plus the residual, a tensor of n elements,

    C(D) = |D|_1 / n sign(D)     sign(0) = +1

which is a contraction: |C(D) - D|^2 = |D|^2 - |D|_1^2 / n. On the wire: the signs of all tensors as bits, and one
float32 a tensor. By "shuffle" a worker's shard of each tensor has a norm of its own.

With `majority` it is Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
ICLR 2019, arXiv 1810.05291, without momentum: the update is the sign of the sum of the workers' signs. It has no
magnitude, so error feedback does not go with it. Ours are: ties give +1, but zeros where all elements of a tensor tie;
and a worker for whom a tensor is all zeros does not vote on it. By "shuffle" both are said of a shard.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder, Coding, Message, Part
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Predicate
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.views import l1_norm
from gradcomp_jax.wire.packing import Field


@dataclasses.dataclass(frozen=True)
class Signs(Coder):
    """The signs of a flat tensor, or of a shard of it, and its norm.

    Attributes:
      majority: the norm is 1, or 0 of a tensor of zeros, and the mean is encoded too.
    """

    majority: bool = False

    name: ClassVar[str] = "signnorm"
    scales: ClassVar[tuple[str, ...]] = ("norm",)

    @property
    def votes(self) -> bool:  # type: ignore[override]
        return self.majority

    def encode(self, y: jax.Array, part: Part) -> Message:
        count = part.valid(y.size)
        # Where a shard is filled up, what was decoded has signs too.
        valid = y if part.length % part.shards == 0 else jnp.where(jnp.arange(y.size, dtype=jnp.int32) < count, y, 0)
        norm = l1_norm(valid) / jnp.maximum(count, 1).astype(jnp.float32)
        if self.majority:
            norm = jnp.sign(norm) + 0 * norm  # what is not finite becomes NaN
        return {"norm": norm, "signs": Field((y >= 0).astype(jnp.uint8), 1)}

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return jnp.where(message["signs"].values == 1, message["norm"], -message["norm"])

    def size(self, shape: tuple[int, ...]) -> int:
        return 4 + -(-shape[0] // 8)


@dataclasses.dataclass(frozen=True)
class SignNorm(Coding):
    """The codec; see `signnorm`."""

    signs: Signs

    name: ClassVar[str] = "signnorm"

    @property
    def coder(self) -> Coder:
        return self.signs

    def default(self, path: str, leaf: Any) -> bool:
        return True


@factory
def signnorm(
    *,
    majority: bool = False,
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
    """Sign+Norm (Table 4 of PowerSGD), or signSGD with majority vote; not linear.

    A payload has one bit an element and 32 a tensor, in float32. By "gather" a worker of n sends n - 1 of them, by
    "shuffle" 2 (n - 1) / n. State: a residual of the size of the compressed leaves on each worker; nothing else.

    Args:
      majority: the update is -1 or +1, as most workers' signs. Learning rates must be smaller by far.
      aggregate: "gather" or "shuffle"; by default the one that sends less, "gather" for two workers.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; by default without majority, and only then.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default, as in the paper, every leaf, vectors too.
      allow_dense: accept a tree of which no leaf is compressed.
      dense_dtype: the type in which leaves that are sent dense travel, "bfloat16" or "float16"; by default float32 or
        wider. Their rounding is not fed back.
      buckets: in how many parts the exchange goes, each with messages of its own as soon as its gradients are there; or
        (path) -> the number of a leaf's part, of which lower ones go first. By default see `compressor`.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument out of range; later, in init and update, what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import signnorm
    >>> tx = optax.chain(signnorm(), optax.sgd(0.1, momentum=0.9))
    """
    del seed
    require_aggregate("signnorm", Signs(majority), aggregate)
    if majority and error_feedback:
        raise ValueError(
            "error_feedback=True does not go with majority=True: votes have no magnitude, so what is left out of them "
            "would grow without bound; leave one of them out"
        )

    kept = feedback(not majority if error_feedback is None else error_feedback)
    settings = Settings(axis_name, kept, min_size, compress, allow_dense, aggregate, dense_dtype, buckets)
    return compressor(SignNorm(Signs(majority)), settings)
