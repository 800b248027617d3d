"""Random K and Random Block: coordinates on which all workers agree without a message.

Baselines of Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727 (Table 4). For each tensor of n
elements, S is a set of k indices. A generator that all workers share draws them without replacement (Random K), or

    S = start, ..., start + k - 1 modulo n     with start uniform on 0 .. n - 1 (Random Block, elements in C order)

    mean_S <- mean of D_S     one all-reduce of k floats     mean elsewhere 0     own_S = D_S

All workers send the same coordinates, so both are linear. Under error feedback nothing is scaled, like in the paper;
without it values are scaled by n / k, which makes them unbiased. Random K's indices are the first k places of a keyed
bijection of 0 .. n - 1. A shuffle of a large tensor would take longer than sending it. Random Block sends neighbours
together, which suits correlated gradients badly.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder
from gradcomp_jax.compressor import Compressor, compressor, quantizing
from gradcomp_jax.contract import (
    AxisName,
    Bucketing,
    Codec,
    Context,
    Predicate,
    Result,
    Say,
    Sparse,
    Strength,
    Talk,
    Together,
    require_fraction,
    require_indexable,
    require_whole,
    total,
)
from gradcomp_jax.cuts import shards_of, whole
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.random import distinct, key_of, step_key
from gradcomp_jax.views import share, wide

FRACTION = 0.01


class SubsetState(NamedTuple):
    """State of `randomk` and `randomblock`, the same on all workers.

    Attributes:
      step: int32, exchanges done; seeds the indices.
    """

    step: jax.Array


class QuantizedSubsetState(NamedTuple):
    """State of `randomk` and `randomblock` with a quantizer.

    Attributes:
      step: int32, exchanges done; seeds the indices.
      quantizer: the quantiser's state.
    """

    step: jax.Array
    quantizer: Any


class Draw(NamedTuple):
    """A request for indices.

    Attributes:
      key: the step's key; a shard has its own.
      salt: the leaf's own number.
      n: the number of elements.
      k: the number of indices.
    """

    key: jax.Array
    salt: int
    n: int
    k: int

    @staticmethod
    def words(draws: list["Draw"]) -> jax.Array:
        """The data of a key for each draw, uint32 [., 2]."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(draws[0].key, jnp.array([draw.salt for draw in draws]))
        return jax.random.key_data(keys)


def scattered(draws: list[Draw]) -> list[jax.Array]:
    """Different indices for each draw, int32 [k]; a smaller strength uses the first of them."""
    return distinct(Draw.words(draws), [draw.n for draw in draws], [draw.k for draw in draws])


def block(draws: list[Draw]) -> list[jax.Array]:
    """For each draw, k consecutive indices modulo n from a random start, int32 [k]."""
    keys = key_of(Draw.words(draws))
    sizes = jnp.array([draw.n for draw in draws], jnp.int32)
    starts = jax.vmap(lambda key, n: jax.random.randint(key, (), 0, n, jnp.int32))(keys, sizes)
    found = []
    for start, (_, _, n, k) in zip(starts, draws, strict=True):
        ahead = jnp.arange(k, dtype=jnp.int32)
        # start + ahead may not fit an int32.
        found.append(jnp.where(ahead < n - start, start + ahead, ahead - (n - start)))
    return found


@dataclasses.dataclass(frozen=True)
class Subset(Codec):
    """The codec that sends the values at drawn indices.

    Attributes:
      name: the factory's name.
      draw: the function that draws the indices for all leaves.
      amounts: fractions or ranks: one, or several; then a leaf's strength chooses one.
      ranked: whether they are PowerSGD's ranks; a leaf then gets their budget of r (rows + columns).
      numbers: the coder for the values; None for a sum.
      seed: the seed of the indices.
    """

    name: str  # type: ignore[misc]
    draw: Any
    amounts: tuple[float, ...]
    ranked: bool = False
    numbers: Coder | None = None
    seed: int = 0

    @property
    def coder(self) -> Coder | None:
        return self.numbers

    @property
    def strength(self) -> Strength | None:
        setting, others = "rank" if self.ranked else "fraction", {"seed": self.seed}
        return None if self.numbers else Strength(setting, self.amounts[0], True, others, self.at)

    def at(self, amounts: tuple[float, ...]) -> "Subset":
        """The codec with these fractions or ranks."""
        return dataclasses.replace(self, amounts=amounts)

    def counts(self, size: int, shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
        """How many of `size` elements are sent at each strength; the leaf of this shape may be cut into shards."""
        if not self.ranked:
            return tuple(share(size, amount) for amount in self.amounts)
        sides = math.prod(shape[:-1]) + shape[-1] if len(shape) > 1 else math.prod(shape) + 1
        return tuple(min(-(-int(amount) * sides // shards), size) for amount in self.amounts)

    def default(self, path: str, leaf: Any) -> bool:
        return True

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        require_indexable(self.name, path, leaf)
        counts = self.counts(leaf.size, whole(leaf).shape, shards_of(leaf))
        return leaf.size > 0 and counts[-1] * wide(leaf.dtype).itemsize < uncompressed

    def view(self, path: str, leaf: Any) -> str:
        amounts = " or ".join(map(str, self.amounts))
        return f"as many of its numbers as rank {amounts} has" if self.ranked else f"{amounts} of its numbers"

    def start(self, leaves: dict[str, dict[str, Any]]) -> Any:
        zero = jnp.int32(0)
        return QuantizedSubsetState(zero, self.numbers.start()) if self.numbers else SubsetState(zero)

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        n = d[0].size
        counts, key = self.counts(n, ctx.whole, ctx.shards), step_key(self.seed, ctx.step)
        key = key if ctx.shard is None else jax.random.fold_in(key, ctx.shard)
        indices = yield Together(self.draw, Draw(key, ctx.salt, n, max(counts)))
        values = functools.reduce(jnp.add, [jnp.take(x, indices, mode="clip") for x in d])
        # Zero, or NaN if something is not finite; the values alone might not show it.
        mark = jnp.where(jnp.all(jnp.isfinite(total(d))), jnp.zeros((), values.dtype), jnp.nan)
        fronts = counts if len(counts) > 1 else None
        heard = yield Say(values + mark, fronts, growth=1.0 if ctx.feedback else n / min(counts))
        # Scaled to be unbiased, if the part that is left out never comes back.
        sent = jnp.array(counts, d[0].dtype)[0 if ctx.strength is None else ctx.strength]
        gain = 1 if ctx.feedback else n / sent
        mean = Sparse(indices, heard.mean * gain, d[0].shape).dense()
        return Result(mean, Sparse(indices, heard.own * gain, d[0].shape))


def _codec(
    name: str,
    draw: Any,
    fraction: float | None,
    rank: int | None,
    aggregate: str,
    quantizer: Compressor | None,
    axis_name: AxisName,
    seed: int,
) -> tuple[Subset, str | None]:
    """The codec, and how its values travel."""
    require_aggregate(name, None, aggregate)
    if fraction is not None and rank is not None:
        raise ValueError(
            f"fraction={fraction} and rank={rank} both say how much codec {name!r} sends: give one of them"
        )
    if rank is not None:
        require_whole("rank", rank, 1)
    elif fraction is not None:
        require_fraction(fraction)
    numbers, way = quantizing(name, quantizer, aggregate, axis_name)
    return Subset(name, draw, (rank or fraction or FRACTION,), rank is not None, numbers, seed), way


@factory
def randomk(
    fraction: float | None = None,
    *,
    rank: int | None = None,
    aggregate: str = "psum",
    quantizer: Compressor | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool | Feedback | EF21 = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """Random K (Table 4 of PowerSGD), linear, with one all-reduce of k floats a leaf.

    State: one counter, and a residual of the size of the compressed leaves on each worker.

    Args:
      fraction: k / n; by default 0.01. k is at least 1.
      rank: instead of fraction, PowerSGD's rank: a leaf gets its budget of r (rows + columns) floats, and vectors are
        sent whole, like in the paper.
      aggregate: "psum", or "ring" for an all-reduce of our own, hop by hop.
      quantizer: a compressor, such as `qsgd(8)`; the values then travel through its codec, which is not linear.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals, or `Feedback`, `EF21`; without them values are scaled by n / k.
      seed: the seed of the indices.
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
      ValueError: fraction and rank are both given or out of range, or aggregate is neither way; later, in init and
        update, a refusal of `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.randomk(fraction=0.01), optax.sgd(0.1))
    """
    codec, way = _codec("randomk", scattered, fraction, rank, aggregate, quantizer, axis_name, seed)
    return compressor(
        codec, Settings(axis_name, feedback(error_feedback), min_size, compress, allow_dense, way, dense_dtype, buckets)
    )


@factory
def randomblock(
    fraction: float | None = None,
    *,
    rank: int | None = None,
    aggregate: str = "psum",
    quantizer: Compressor | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool | Feedback | EF21 = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """Random Block (Table 4 of PowerSGD), linear, with one all-reduce of k floats a leaf.

    State: one counter, and a residual of the size of the compressed leaves on each worker.

    Args:
      fraction: k / n; by default 0.01. k is at least 1.
      rank: instead of fraction, PowerSGD's rank: a leaf gets its budget of r (rows + columns) floats, and vectors are
        sent whole, like in the paper.
      aggregate: "psum", or "ring" for an all-reduce of our own, hop by hop.
      quantizer: a compressor, such as `qsgd(8)`; the values then travel through its codec, which is not linear.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals, or `Feedback`, `EF21`; without them values are scaled by n / k.
      seed: the seed of the blocks' places.
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
      ValueError: fraction and rank are both given or out of range, or aggregate is neither way; later, in init and
        update, a refusal of `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.randomblock(fraction=0.01), optax.sgd(0.1))
    """
    codec, way = _codec("randomblock", block, fraction, rank, aggregate, quantizer, axis_name, seed)
    return compressor(
        codec, Settings(axis_name, feedback(error_feedback), min_size, compress, allow_dense, way, dense_dtype, buckets)
    )
