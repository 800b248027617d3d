"""1-bit SGD: the sign of every element, and two means for every column.

Seide, Fu, Droppo, Li, Yu, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training
of Speech DNNs", Interspeech 2014. With v = g + e, the gradient plus the residual, for each column j of a matrix:

    bit_ij = 1 if v_ij >= 0 else 0
    Q(v)_ij = mean over i of the v_ij with that bit      the two that minimise |v - Q(v)|^2
    e <- v - Q(v)

Two stages ("shuffle"): each worker is given its stripe of all columns by all others, quantised; averages it; quantises
the average, by means of its own; sends that to all. What the second stage loses is kept by the worker who lost it, in
the one residual, n-fold, as it is that worker's share of a mean; with `second_residual` it is set apart as in the
paper, and comes back at the second stage.

Where sources differ: the printed formula of the residual leaves out the carried term e, without which error feedback
does not work; the authors' code (CNTK) has it. A worker quantises its own stripe too, though it
need not: the authors' code adds that one as it is. A column is an output unit's fan-in, hence the elements along all
axes but the last in Flax's layout. With threshold="mean" the bits tell on which side of the column's mean m an element
lies, and stand for m - dev and m + dev, with dev the mean of |v - m| (an option of the authors' code).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory, is_whole, shown
from gradcomp_jax.coder import Coder, Coding, Message, Part
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Context, Mine, Predicate, Result, Say, Talk, total
from gradcomp_jax.cuts import Cut, rows
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.views import column_sums, columns, from_columns
from gradcomp_jax.wire.packing import Field

# Below this length a column's two float32 cost more than a bit an element.
SHORTEST = 64
THRESHOLDS = ("zero", "mean")


class OneBitState(NamedTuple):
    """State of `onebit`.

    Attributes:
      second: with second_residual, what the second stage owes on this worker's stripe, by leaf path, of the leaves'
        shapes and zero elsewhere (but in the first step on another number of workers); it is part of the residual
        too, n-fold. Else empty.
    """

    second: Any


def means(v: jax.Array, threshold: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bits of v [rows, columns] and the two values of each column, [columns], that they stand for.

    Args:
      v: float32.
      threshold: "zero" or "mean".

    Returns:
      Bits, bool [rows, columns]; the value of 0 and the value of 1. A side without elements has the value 0.
    """
    if threshold == "mean":
        middle = jnp.mean(v, axis=0)
        deviation = jnp.mean(jnp.abs(v - middle[None]), axis=0)
        return v >= middle[None], middle - deviation, middle + deviation
    above = v >= 0
    low, high, count = column_sums((jnp.minimum(v, 0), jnp.maximum(v, 0), above.astype(v.dtype)))
    return above, low / jnp.maximum(len(v) - count, 1), high / jnp.maximum(count, 1)


@dataclasses.dataclass(frozen=True)
class Bits(Coder):
    """A bit an element, and two values a column, of a matrix whose columns `axis` counts.

    Attributes:
      threshold: "zero" or "mean".
      axis: the axis.
    """

    threshold: str
    axis: int

    name: ClassVar[str] = "onebit"
    rowwise: ClassVar[bool] = True  # a column is a unit
    unit_axis: ClassVar[int] = -1
    scales: ClassVar[tuple[str, ...]] = ("high", "low")

    def lay(self, x: jax.Array) -> jax.Array:
        return columns(x.astype(jnp.float32), self.axis)

    def unlay(self, y: jax.Array, like: Any) -> jax.Array:
        return from_columns(y, like.shape, self.axis).astype(like.dtype)

    def encode(self, y: jax.Array, part: Part) -> Message:
        bits, low, high = means(y, self.threshold)
        return {"bits": Field(bits.astype(jnp.uint8), 1), "high": high, "low": low}

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return jnp.where(message["bits"].values == 1, message["high"][None], message["low"][None])

    def size(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] * shape[1] // 8) + 8 * shape[1]


@dataclasses.dataclass(frozen=True)
class OneBit(Coding):
    """The codec; see `onebit`.

    Attributes:
      bits: the coder.
      second_residual: whether the second stage's error is kept apart.
    """

    bits: Bits
    second_residual: bool = False

    name: ClassVar[str] = "onebit"

    @property
    def by_leaf(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("second",) if self.second_residual else ()

    @property
    def coder(self) -> Coder:
        return self.bits

    def coder_state(self, state: OneBitState) -> Any:
        return ()

    def with_coder_state(self, state: OneBitState, coder_state: Any) -> OneBitState:
        return state

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        axis = self.bits.axis
        if leaf.ndim > 1 and not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"axis={axis} is not an axis of leaf {path!r} of shape {leaf.shape}: leave it out by compress="
            )
        count = leaf.shape[axis] if leaf.ndim > 1 else 1
        return leaf.size > 0 and leaf.ndim > 0 and leaf.size >= SHORTEST * count

    def cut(self, path: str, leaf: Any) -> Cut:
        axis = self.bits.axis
        return Cut(leaf.shape, axis % leaf.ndim) if leaf.ndim > 1 else rows(leaf)

    def init(self, path: str, leaf: Any, salt: int) -> dict[str, Any]:
        return {"second": jnp.zeros(leaf.shape, leaf.dtype)} if self.second_residual else {}

    def start(self, leaves: dict[str, dict[str, Any]]) -> OneBitState:
        return OneBitState(Mine({path: x["second"] for path, x in leaves.items()}) if self.second_residual else ())

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: OneBitState, ctx: Context) -> Talk:
        heard = yield Say(total(d), second=leaf.second if self.second_residual else None)
        return Result(heard.mean, heard.own, {"second": heard.second} if self.second_residual else {})

    def flushed(self, state: OneBitState) -> OneBitState:
        return jax.tree.map(jnp.zeros_like, state)


@factory
def onebit(
    *,
    threshold: str = "zero",
    axis: int = -1,
    second_residual: bool = False,
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
    """1-bit SGD (Seide et al., Interspeech 2014), not linear.

    A payload has one bit an element and 64 a column. By "gather" a worker of n sends n - 1 of them, by "shuffle", the
    paper's two stages, 2 (n - 1) / n. State: a residual, float32, of the size of the compressed leaves on each worker,
    and with second_residual as much again. Leaves whose columns have fewer than 64 elements travel dense.

    Args:
      threshold: what bits compare with, "zero" or the column's "mean".
      axis: the axis that counts the columns; the elements along all others make a column.
      second_residual: keep the second stage's error apart, as the paper does; for "shuffle".
      aggregate: "gather" or "shuffle"; by default the one that sends less, "gather" for two workers.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them training diverges, as the paper reports.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default every leaf of two axes or more.
      allow_dense: accept a tree of which no leaf is compressed.
      dense_dtype: the type in which leaves that are sent dense travel, "bfloat16" or "float16"; by default float32 or
        wider. Their rounding is not fed back.
      buckets: in how many parts the exchange goes, each with messages of its own as soon as its gradients are there; or
        (path) -> the number of a leaf's part, of which lower ones go first. By default see `compressor`.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument out of range, or second_residual without error feedback or by "gather"; later, in init
        and update, what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import onebit
    >>> tx = optax.chain(onebit(), optax.sgd(0.1))
    """
    del seed
    if not is_whole(axis):
        raise ValueError(f"axis={shown(axis)} must be a whole number, the place of an axis")
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold={threshold!r} must be one of {', '.join(map(repr, THRESHOLDS))}")
    require_aggregate("onebit", Bits(threshold, axis), aggregate)
    if second_residual and (aggregate == "gather" or not error_feedback):
        raise ValueError(
            "second_residual=True keeps what the second stage of aggregate='shuffle' loses, under error feedback: got "
            f"aggregate={aggregate!r}, error_feedback={error_feedback}"
        )
    aggregate = "shuffle" if second_residual else aggregate

    settings = Settings(
        axis_name, feedback(error_feedback), min_size, compress, allow_dense, aggregate, dense_dtype, buckets
    )
    return compressor(OneBit(Bits(threshold, axis), second_residual), settings)
