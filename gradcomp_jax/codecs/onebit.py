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

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax import aggregation
from gradcomp_jax.aggregation import Coder, require_aggregate, require_second_stage
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import Codec, Compressor, Exchanged, Predicate, Tensors, compressor, is_matrix
from gradcomp_jax.sharding import PerWorker
from gradcomp_jax.views import stripes, unstriped
from gradcomp_jax.wire.packing import pack, unpack

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

    second: PerWorker | tuple[()]


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
    count = jnp.sum(above, axis=0).astype(v.dtype)

    def mean(side: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(side, v, 0), axis=0) / jnp.maximum(count, 1)

    return above, mean(~above, len(v) - count), mean(above, count)


def onebit(
    *,
    threshold: str = "zero",
    axis: int = -1,
    second_residual: bool = False,
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
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
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold={threshold!r} must be one of {', '.join(map(repr, THRESHOLDS))}")
    require_aggregate("onebit", aggregate, ("gather", "shuffle"))
    aggregate = require_second_stage(second_residual, aggregate, error_feedback)

    def coder_of(like: Tensors, shards: int) -> Coder:
        def encode(shard: Tensors, index: jax.Array, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
            del index, key
            message = {}
            for path, v in shard.items():
                bits, low, high = means(v, threshold)
                codes = jnp.pad(bits.astype(jnp.uint8), [(0, -len(v) % 8), (0, 0)])
                message[path] = {"bits": pack(codes, 1, axis=0), "high": high, "low": low}
            return message

        def decode(message: dict[str, dict[str, jax.Array]]) -> Tensors:
            shard = {}
            for path, part in message.items():
                rows = like[path].size // columns_in(like[path].shape)
                bits = unpack(part["bits"], 1, axis=0)[:rows]
                shard[path] = jnp.where(bits == 1, part["high"][None], part["low"][None])
            return shard

        cut = functools.partial(stripes, axis=axis, shards=shards)
        return Coder(cut, functools.partial(unstriped, like=like, axis=axis), encode, decode)

    def columns_in(shape: tuple[int, ...]) -> int:
        return shape[axis] if len(shape) > 1 else 1

    def shrinks(path: str, leaf: Any) -> bool:
        if leaf.ndim > 1 and not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"axis={axis} is not an axis of leaf {path!r} of shape {leaf.shape}: leave it out by compress="
            )
        return leaf.size > 0 and leaf.ndim > 0 and leaf.size >= SHORTEST * columns_in(leaf.shape)

    def init(tensors: Tensors) -> OneBitState:
        zeros = jax.tree.map(jnp.zeros_like, tensors)
        return OneBitState(PerWorker(zeros, axis_name) if second_residual else ())

    def exchange(tensors: Tensors, state: OneBitState, axis_name: AxisName, **extra_args: Any) -> Exchanged:
        del extra_args
        second = state.second.value if isinstance(state.second, PerWorker) else None
        got = aggregation.exchange(tensors, coder_of, aggregate, axis_name, second=second)
        kept = () if got.second is None else PerWorker(got.second, axis_name)
        return Exchanged(got.mean, got.own, OneBitState(kept), got.bits)

    def flushed(state: OneBitState) -> OneBitState:
        return jax.tree.map(jnp.zeros_like, state)

    return compressor(
        Codec("onebit", init, exchange, is_matrix, shrinks, flushed=flushed),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
