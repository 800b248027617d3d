"""Two bits a value, by bins of standard deviations: MuLoCo's statistical quantiser. Nothing is drawn.

Thérien et al., "MuLoCo: Muon is a practical inner optimizer for DiLoCo", arXiv 2505.23725. The rule is that of the
authors' code; SparseLoCo's code has the same. For each tensor, or shard of it, with mean m and standard deviation s:

    code = round((v - m) / (1.5 s)) + 2, from 0 to 3     decoded: the mean of all values of the same code

On the wire: two bits a value, and four float32 a tensor. No other values would be closer to those of their bins. So the
part that is left out is smaller than the tensor, and error feedback applies.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder, Coding, Message, Part
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Predicate
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.wire.packing import Field, fields_bytes
from gradcomp_jax.wire.values import BINS, binned, of_bins


@dataclasses.dataclass(frozen=True)
class Binned(Coder):
    """The bins of a flat tensor, or of a shard of it, and the table of their means."""

    name: ClassVar[str] = "statistical"
    scales: ClassVar[tuple[str, ...]] = ("table",)
    indexes: ClassVar[bool] = False

    def encode(self, y: jax.Array, part: Part) -> Message:
        bins, table = binned(y, self._inside(y.size, part))
        return {"bins": Field(bins, 2), "table": table}

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        values = of_bins(message["bins"].values, message["table"])
        return jnp.where(self._inside(values.size, part), values, 0)

    def _inside(self, size: int, part: Part) -> jax.Array:
        """Which places are not there to fill up the last shard."""
        return jnp.arange(size, dtype=jnp.int32) < part.valid(size)

    def size(self, shape: tuple[int, ...]) -> int:
        return fields_bytes(shape[0], 2) + 4 * BINS


@dataclasses.dataclass(frozen=True)
class Statistical(Coding):
    """The codec; see `statistical`.

    Attributes:
      binned: the coder.
    """

    binned: Binned

    name: ClassVar[str] = "statistical"

    @property
    def coder(self) -> Coder:
        return self.binned


@factory
def statistical(
    *,
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool | Feedback | EF21 = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """MuLoCo's statistical quantiser of two bits (arXiv 2505.23725), not linear.

    A payload has two bits an element, and 16 bytes a leaf. With "gather" a worker of n sends n - 1 payloads, with
    "shuffle" 2 (n - 1) / n. State: a residual, float32, of the size of the compressed leaves on each worker.

    Args:
      aggregate: "gather" or "shuffle"; by default "gather" on two workers, and on more the one that sends less.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default matrices, as the authors do.
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
    >>> tx = optax.chain(gcj.statistical(), optax.sgd(0.1))
    """
    del seed
    coder = Binned()
    require_aggregate("statistical", coder, aggregate)
    kept = feedback(error_feedback)
    return compressor(
        Statistical(coder),
        Settings(axis_name, kept, min_size, compress, allow_dense, aggregate, dense_dtype, buckets),
    )
