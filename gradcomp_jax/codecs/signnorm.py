"""Signs with one norm a tensor, and signSGD's majority vote.

Sign+Norm is a baseline of Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727 (Table 4). Karimireddy
et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019, arXiv 1901.09847, show that
error feedback makes signs converge. D is the gradient plus the residual, a tensor of n elements:

    C(D) = |D|_1 / n sign(D)     sign(0) = +1

This is a contraction: |C(D) - D|^2 = |D|^2 - |D|_1^2 / n. On the wire: the signs of all tensors as bits, and one
float32 a tensor. With "shuffle" a worker's shard of each tensor has a norm of its own.

`majority` is Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019,
arXiv 1810.05291, without momentum: the update is the sign of the sum of the workers' signs. It has no magnitude, so
error feedback does not go with it. Two rules are ours. Ties give +1, but if all elements of a tensor tie, they give
zeros. A worker whose tensor is all zeros does not vote on it. With "shuffle" both rules hold for a shard.
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
      majority: the norm is 1, or 0 for a tensor of zeros, and the mean is encoded too.
    """

    majority: bool = False

    name: ClassVar[str] = "signnorm"
    scales: ClassVar[tuple[str, ...]] = ("norm",)

    @property
    def votes(self) -> bool:  # type: ignore[override]
        return self.majority

    def encode(self, y: jax.Array, part: Part) -> Message:
        count = part.valid(y.size)
        # In the padding of a shard, decoded values have signs too.
        valid = y if part.length % part.shards == 0 else jnp.where(jnp.arange(y.size, dtype=jnp.int32) < count, y, 0)
        norm = l1_norm(valid) / jnp.maximum(count, 1).astype(jnp.float32)
        if self.majority:
            norm = jnp.sign(norm) + 0 * norm  # a norm that is not finite becomes NaN
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

    A payload has one bit an element and 32 a tensor, in float32. With "gather" a worker of n sends n - 1 payloads, with
    "shuffle" 2 (n - 1) / n. State: a residual of the size of the compressed leaves on each worker; nothing else.

    Args:
      majority: the update is -1 or +1, like most workers' signs. Learning rates must be much smaller.
      aggregate: "gather" or "shuffle"; by default "gather" on two workers, and on more the one that sends less.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; by default without majority, and only then.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default, like in the paper, every leaf, vectors too.
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
    >>> tx = optax.chain(gcj.signnorm(), optax.sgd(0.1, momentum=0.9))
    """
    del seed
    require_aggregate("signnorm", Signs(majority), aggregate)
    if majority and error_feedback:
        raise ValueError(
            "error_feedback=True does not go with majority=True: votes have no magnitude, so residuals would grow "
            "without bound; leave one of them out"
        )

    kept = feedback(not majority if error_feedback is None else error_feedback)
    settings = Settings(axis_name, kept, min_size, compress, allow_dense, aggregate, dense_dtype, buckets)
    return compressor(SignNorm(Signs(majority)), settings)
