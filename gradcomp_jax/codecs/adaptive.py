"""Adaptive quantisation: the largest elements of a matrix, as one positive and one negative value for each column.

Dryden, Moon, Jacobs, Van Essen, "Communication Quantization for Data-Parallel Training of Deep Neural Networks", MLHPC
2016, in the form of the authors' poster and of their LBANN library of 2017 (threshold_scope="matrix"). The form of the
library of 2016 is threshold_scope="column". (The paper's own text was not at hand.) With v = g + e, the gradient plus
the residual, an n x m matrix, and pi the proportion:

    t <- the magnitude that about n m / pi elements reach
    tau+ <- the smallest v > 0 with |v| >= t     tau- <- the largest v < 0 with |v| >= t; if none, minus the other
    recon+_j <- mean of the v_ij >= tau+         recon-_j <- mean of the v_ij <= tau-
    Q(v)_ij = recon+_j if v_ij >= tau+, recon-_j if v_ij <= tau-, else 0
    e <- v - Q(v)

With "column", each column and each sign has a threshold of its own: a share of 1 / pi of the positive elements reaches
it, at least one. The negative elements have theirs likewise. Zeros are never sent; in the library of 2016 a column of
zeros sends all of them. If fewer than n m / pi elements differ from zero, all of these are sent; in the library of 2017
none is.

On the wire (`wire/columns.py`): 3 words of 32 bits a column, and 16 bits for each element that is sent, in a buffer
with room for a fixed number of them. Elements that do not fit are dropped from the last column backwards, and stay in
the residual. In two stages ("shuffle") the columns are cut into stripes; each stripe has thresholds of its own, in both
stages.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder, Coding, Message, Part, Switched, no_length
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Mine, Predicate, Strength
from gradcomp_jax.cuts import Cut, rows
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.views import columns, from_columns, max_norm, sum_of
from gradcomp_jax.wire import columns as sparse

SCOPES = ("matrix", "column")
# Sampling: the number of elements for the thresholds of a matrix, and of rows for those of its columns; how many must
# lie beyond the thresholds, so large proportions take more; and the size above which leaves are sampled.
ENTRIES, ROWS, BEYOND, LARGE = 1024, 128, 16, 2**16


class AdaptiveState(NamedTuple):
    """State of `adaptive`.

    Attributes:
      step: int32, exchanges done; seeds the sampling.
      length: the true length of this worker's code in the last step, see `code_bits`.
    """

    step: jax.Array
    length: Any


def kth_largest(v: jax.Array, keep: jax.Array) -> jax.Array:
    """The keep-th largest of each column: v float32 [n, m], not negative, keep int32 [m], from 1 to n -> [m].

    It bisects the floats' bits in 31 passes. This is exact for all values and any `keep`.
    """
    keys = lax.bitcast_convert_type(v, jnp.int32)  # in the same order, because no value is negative

    def halve(i: jax.Array, least: jax.Array) -> jax.Array:
        middle = least | (1 << (30 - i))
        reached = jnp.sum(keys >= middle[None], axis=0, dtype=jnp.int32)
        return jnp.where(reached >= keep, middle, least)

    # Zeros made of the keys, so that they vary over workers as the keys do.
    least = lax.fori_loop(0, 31, halve, jnp.sum(keys * 0, axis=0, dtype=jnp.int32))
    return lax.bitcast_convert_type(least, jnp.float32)


def thresholds(v: jax.Array, proportion: float, scope: str) -> tuple[jax.Array, jax.Array]:
    """tau+ and tau- of v [n, m], or of a sample of it: [1] for scope "matrix", [m] for "column".

    They are infinite if nothing is to be sent.
    """
    if scope == "matrix":
        v = v.reshape(-1, 1)
        keep = jnp.full(1, max(1, int(v.size / proportion)), jnp.int32)
        reached = jnp.abs(v) >= kth_largest(jnp.abs(v), keep)[None]
        above = jnp.min(jnp.where(reached & (v > 0), v, jnp.inf), axis=0)
        below = jnp.max(jnp.where(reached & (v < 0), v, -jnp.inf), axis=0)
        return jnp.where(jnp.isinf(above), -below, above), jnp.where(jnp.isinf(below), -above, below)

    def of_sign(v: jax.Array) -> jax.Array:
        count = jnp.sum(v > 0, axis=0)
        keep = jnp.maximum(1, (count.astype(jnp.float32) / proportion).astype(jnp.int32))
        return jnp.where(count > 0, kth_largest(jnp.maximum(v, 0), keep), jnp.inf)

    return of_sign(v), -of_sign(-v)


@dataclasses.dataclass(frozen=True)
class Columns(Coder):
    """The largest elements of a matrix, in the format of `wire.columns`; see `adaptive` for the settings."""

    proportion: float
    threshold_scope: str
    sample: bool | None
    room: float | None
    seed: int = 0

    name: ClassVar[str] = "adaptive"
    draws: ClassVar[bool] = True
    tells_length: ClassVar[bool] = True
    silences: ClassVar[bool] = True  # type: ignore[assignment]

    def lay(self, x: jax.Array) -> jax.Array:
        return columns(x.astype(jnp.float32), -1)

    def unlay(self, y: jax.Array, like: Any) -> jax.Array:
        return from_columns(y, like.shape, -1).astype(like.dtype)

    def branches(self, shape: tuple[int, ...]) -> bool:
        return True

    def sampled(self, shape: tuple[int, ...]) -> bool:
        """Whether thresholds are found on a sample."""
        return shape[0] * shape[1] > LARGE if self.sample is None else self.sample

    def capacity(self, shape: tuple[int, ...]) -> int:
        """How many elements of an n x m matrix can be sent."""
        n, m = shape
        asked = n * m / self.proportion + (2 * m if self.threshold_scope == "column" else 0)
        multiple = (2 if self.sampled(shape) else 1) if self.room is None else self.room
        return max(1, min(n * m, math.ceil(multiple * asked)))

    def entries(self, v: jax.Array, key: jax.Array) -> jax.Array:
        """The elements of v [n, m] that the thresholds are found on: all, or a random sample."""
        if not self.sampled(v.shape):
            return v
        if self.threshold_scope == "matrix":
            count = min(v.size, max(ENTRIES, math.ceil(BEYOND * self.proportion)))
            return v.reshape(-1)[jax.random.randint(key, (count,), 0, v.size, jnp.int32)]
        # About half of them have each sign.
        count = min(len(v), max(ROWS, math.ceil(2 * BEYOND * self.proportion)))
        return v[jax.random.randint(key, (count,), 0, len(v), jnp.int32)]

    def encode(self, y: jax.Array, part: Part) -> Message:
        above, below = (x[None] for x in thresholds(self.entries(y, part.key), self.proportion, self.threshold_scope))
        positive = (y >= above) & (y > 0)
        selected = sparse.keep_first(positive | ((y <= below) & (y < 0)), self.capacity(y.shape))

        def mean(side: jax.Array) -> jax.Array:
            count = sum_of(jnp.abs, side.astype(y.dtype), 0)
            return sum_of(jnp.abs, jnp.where(side, y, 0), 0) / jnp.maximum(count, 1)

        # NaN passes no threshold, and Inf may be among the dropped elements: the values show both.
        mark = 0 * max_norm(y.reshape(1, -1))[0]
        values = mean(selected & positive) + mark, mark - mean(selected & ~positive)
        return {"data": sparse.encode(selected, positive, *values, self.capacity(y.shape))}

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return sparse.decode(message["data"], (shape[0], shape[1]), self.capacity(shape))

    def bounds(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return sparse.values(message["data"], shape[1])

    def silenced(self, message: Message, ok: jax.Array) -> Message:
        return {"data": jnp.where(ok, message["data"], 0)}  # bytes of zeros stand for zeros

    def size(self, shape: tuple[int, ...]) -> int:
        return sparse.encoded_bytes((shape[0], shape[1]), self.capacity(shape))

    def code_length(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return sparse.sent_bits(message["data"], (shape[0], shape[1]))

    def start(self) -> AdaptiveState:
        return AdaptiveState(jnp.int32(0), Mine(no_length()))


@dataclasses.dataclass(frozen=True)
class Adaptive(Coding):
    """The codec; see `adaptive`.

    Attributes:
      coders: the coder, or several; then a leaf's strength chooses one.
    """

    coders: tuple[Columns, ...]

    name: ClassVar[str] = "adaptive"

    def cut(self, path: str, leaf: Any) -> Cut:
        return Cut(leaf.shape, leaf.ndim - 1) if leaf.ndim > 1 else rows(leaf)

    @property
    def coder(self) -> Coder:
        return self.coders[0] if len(self.coders) == 1 else Switched(self.coders)

    @property
    def strength(self) -> Strength:
        coder = self.coders[0]
        names = {"threshold_scope": "threshold_scope", "sample": "sample", "capacity": "room", "seed": "seed"}
        others = {name: getattr(coder, field) for name, field in names.items()}
        return Strength("proportion", coder.proportion, False, others, self.at)

    def at(self, proportions: tuple[float, ...]) -> "Adaptive":
        """The codec with these proportions."""
        return Adaptive(tuple(dataclasses.replace(self.coders[0], proportion=p) for p in proportions))


@factory
def adaptive(
    proportion: float = 32,
    *,
    threshold_scope: str = "matrix",
    sample: bool | None = None,
    capacity: float | None = None,
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
    """Adaptive quantisation (Dryden et al., MLHPC 2016), not linear.

    A leaf has n rows and m columns (the last axis). Its payload has 16 bits for each of capacity n m / pi elements (32
    bits above 32767 rows), and 96 bits a column. With "gather" a worker of N sends N - 1 payloads, with "shuffle"
    2 (N - 1) / N. `code_bits` tells how long the format would have been without the unused room. State: a residual of
    the size of the compressed leaves on each worker, a counter, and that length.

    Args:
      proportion: pi, above 1: about one element in pi is sent.
      threshold_scope: "matrix" or "column".
      sample: find thresholds on a random sample (1024 elements of a matrix, or 128 rows with "column"; 16 pi elements,
        or 32 pi rows, if those are more); by default for leaves of more than 65,536 elements.
      capacity: the buffer's room, as a multiple of the proportion's elements. By default 1 if thresholds are exact, and
        2 if they are sampled; the authors' is 4.
      aggregate: "gather" or "shuffle"; by default "gather" on two workers, and on more the one that sends less.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them the part that is not sent is lost.
      seed: the seed of the sampling.
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
      ValueError: an argument is out of range; later, in init and update, a refusal of `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.adaptive(proportion=64), optax.sgd(0.1))
    """
    if not proportion > 1:
        raise ValueError(f"proportion={proportion} must be above 1: one element in so many is sent")
    if threshold_scope not in SCOPES:
        raise ValueError(f"threshold_scope={threshold_scope!r} must be one of {', '.join(map(repr, SCOPES))}")
    if capacity is not None and not capacity > 0:
        raise ValueError(f"capacity={capacity} must be above 0: it multiplies the proportion's share")
    codec = Adaptive((Columns(proportion, threshold_scope, sample, capacity, seed),))
    require_aggregate("adaptive", codec.coder, aggregate)
    return compressor(
        codec,
        Settings(axis_name, feedback(error_feedback), min_size, compress, allow_dense, aggregate, dense_dtype, buckets),
    )
