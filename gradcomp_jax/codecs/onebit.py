"""1-bit SGD: the sign of every element, and two means for every column.

Seide, Fu, Droppo, Li, Yu, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training
of Speech DNNs", Interspeech 2014. With v = g + e, the gradient plus the residual, for each column j of a matrix:

    bit_ij = 1 if v_ij >= 0 else 0
    Q(v)_ij = mean over i of the v_ij with that bit      the two that minimise |v - Q(v)|^2
    e <- v - Q(v)

Two stages ("shuffle"): each worker receives its stripe of all columns from all others, quantised. It averages the
stripe, quantises the average with means of its own, and sends that to all. The error of the second stage stays in the
residual of the worker that made it. The error is that worker's share of a mean, so it is kept n-fold. With
`second_residual` it is set apart like in the paper, and comes back at the second stage.

Where sources differ: the printed formula of the residual leaves out the carried term e. Error feedback does not work
without it, and the authors' code (CNTK) has it. A worker quantises its own stripe too, though it need not; the authors'
code adds that one unquantised. A column is an output unit's fan-in: in Flax's layout, the elements along all axes but
the last. With threshold="mean" the bits tell on which side of the column's mean m an element lies. They stand for
m - dev and m + dev, where dev is the mean of |v - m| (an option of the authors' code).
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

# Below this length a column's two float32 take more room than one bit an element.
SHORTEST = 64
THRESHOLDS = ("zero", "mean")


class OneBitState(NamedTuple):
    """State of `onebit`.

    Attributes:
      second: with second_residual, the second stage's residual on this worker's stripe, by leaf path. Its arrays have
        the leaves' shapes, and are zero outside the stripe, except in the first step on another number of workers.
        The residual contains it too, n-fold. Without second_residual it is empty.
    """

    second: Any


def means(v: jax.Array, threshold: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bits of v [rows, columns], and for each column the two values that they stand for, [columns].

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
    """One bit for each element of a matrix, and two values for each column; `axis` counts the columns.

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
                f"axis={axis} is not an axis of leaf {path!r} of shape {leaf.shape}: leave it out with compress="
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

    A payload has one bit an element and 64 a column. With "gather" a worker of n sends n - 1 payloads, with "shuffle",
    the paper's two stages, 2 (n - 1) / n. State: a residual, float32, of the size of the compressed leaves on each
    worker, and with second_residual as much again. Leaves whose columns have fewer than 64 elements travel dense.

    Args:
      threshold: bits compare elements with it: "zero", or the column's "mean".
      axis: the axis that counts the columns; the elements along all others make a column.
      second_residual: keep the second stage's error apart, like the paper; for "shuffle".
      aggregate: "gather" or "shuffle"; by default "gather" on two workers, and on more the one that sends less.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them training diverges, as the paper reports.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default every leaf of two axes or more.
      allow_dense: accept a tree whose leaves are all sent dense.
      dense_dtype: the type of leaves that are sent dense, "bfloat16" or "float16"; by default float32 or wider. Their
        rounding is not fed back.
      buckets: the number of parts of the exchange. Each sends messages of its own once its gradients are there. Or
        (path) -> the number of a leaf's part; lower numbers go first. For the default see `compressor`.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument is out of range, or second_residual without error feedback or with "gather"; later, in
        init and update, a refusal of `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.onebit(), optax.sgd(0.1))
    """
    del seed
    if not is_whole(axis):
        raise ValueError(f"axis={shown(axis)} must be a whole number, the place of an axis")
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold={threshold!r} must be one of {', '.join(map(repr, THRESHOLDS))}")
    require_aggregate("onebit", Bits(threshold, axis), aggregate)
    if second_residual and (aggregate == "gather" or not error_feedback):
        raise ValueError(
            "second_residual=True keeps the loss of the second stage of aggregate='shuffle', under error feedback: got "
            f"aggregate={aggregate!r}, error_feedback={error_feedback}"
        )
    aggregate = "shuffle" if second_residual else aggregate

    settings = Settings(
        axis_name, feedback(error_feedback), min_size, compress, allow_dense, aggregate, dense_dtype, buckets
    )
    return compressor(OneBit(Bits(threshold, axis), second_residual), settings)
