"""PowerSGD: low-rank gradients by one warm-started step of subspace iteration.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
NeurIPS 2019, arXiv 1905.13727, Algorithm 1. For each matrix, D_w (n x m) is the gradient of worker w plus its
residual, and Q (m x r) is the same on all workers:

    P   <- mean of D_w Q           first all-reduce: r n floats
    P^  <- orthonormalise(P)
    Q_w <- D_w^T P^
    Q   <- mean of Q_w             second all-reduce: r m floats
    mean <- P^ Q^T                 own_w <- P^ Q_w^T

Q is kept for the next step. All matrices of a tree share the two all-reduces; leaves that are not compressed
ride along. With a quantiser the factors travel through it instead of a sum; Q_w is then the quantised factor.

Where sources differ: the residual is taken from the worker's own approximation, like in the printed Algorithm 2. The
authors' first code subtracts the mean's, and then the residuals of single workers grow like sqrt(t). P is
orthonormalised with QR, or on GPUs and TPUs with Cholesky QR (`orthonormal.py`). Columns of P that are zero are drawn
at random first. Otherwise a gradient that is exactly zero once, such as one behind a layer initialised to zero, leaves
Q at zero for ever, or tied to rows that may never be used. Even so Q may stay in a subspace that holds less than it
could: Xie, Chen, Yuan, "From PowerSGD to PowerSGD+", 2025, arXiv 2509.11254, have a case in which training does not
converge for this reason, and renew Q with an SVD every so often. `refresh` draws Q anew; this sends nothing, and one
step of subspace iteration follows like in every step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory, is_whole, shown
from gradcomp_jax.coder import Coder
from gradcomp_jax.compressor import Compressor, compressor, quantizing
from gradcomp_jax.contract import (
    AxisName,
    Bucketing,
    Codec,
    Context,
    Gain,
    OverShards,
    Predicate,
    Result,
    Say,
    Strength,
    Talk,
    Tensors,
    Together,
    moderate,
    require_whole,
    total,
)
from gradcomp_jax.cuts import Cut, shards_of, whole
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.orthonormal import orthonormal
from gradcomp_jax.random import scattered, step_key
from gradcomp_jax.views import einsum, filled, inverse_power, known_late, on_cpus, others_are_automatic, wide

# Up to this rank P Q^T is a sum of r outer products, which costs less than storing the matrix product.
WRITTEN_OUT = 8
# Rows in a block: in blocks, XLA's CPU backend computes such a product over all rows up to four times as fast.
ROWS = 16


class PowerSGDState(NamedTuple):
    """State of `powersgd`, the same on all workers.

    Attributes:
      q: Q^T by leaf path, the warm start, [layers, r, m]; m is the leaf's last axis.
      step: int32, exchanges done; seeds the columns of P drawn at random.
      quantizer: the quantiser's state; empty without one.
    """

    q: Tensors
    step: jax.Array
    quantizer: Any


def tamed(rows: jax.Array) -> jax.Array:
    """`rows` [..., r, n], each matrix divided by the power of two below its largest magnitude; zeros stay.

    The orthonormal factor does not depend on such divisors. But Q is as large as gradients are, and its products with
    gradients could leave the range of their type.
    """
    return rows * inverse_power(jnp.max(jnp.abs(rows), axis=(-2, -1), keepdims=True))


def of_rank(old: jax.Array, new: jax.Array) -> jax.Array:
    """Q^T of another rank: the columns of the old Q that fit, and then those of the new one.

    Both are scaled to like magnitudes, because products with a gradient need that; bases do not depend on it.

    Args:
      old: [layers, r, m].
      new: [layers, another r, m].
    """
    if new.shape[1] <= old.shape[1]:
        return old[:, : new.shape[1]]
    return jnp.concatenate([tamed(old), tamed(new[:, old.shape[1] :])], axis=1)


@dataclasses.dataclass(frozen=True)
class PowerSGD(Codec):
    """The algorithm; see `powersgd` for its settings.

    Attributes:
      ranks: the rank, or several; then a leaf's strength chooses one. Q has as many columns as the highest rank. At a
        lower rank the first columns are in use and the others are zero, so they are drawn anew for a higher one.
      numbers: the coder for P and Q; None for a sum.
      every: the number of steps after which Q is drawn anew; None: never.
    """

    ranks: tuple[int, ...]
    min_rate: float = 1.0
    stacked: Predicate | None = None
    split: Callable[[str, Any], int] | None = None
    numbers: Coder | None = None
    seed: int = 0
    every: int | None = None

    name: ClassVar[str] = "powersgd"
    by_leaf: ClassVar[tuple[str, ...]] = ("q",)

    @property
    def coder(self) -> Coder | None:
        return self.numbers

    @property
    def strength(self) -> Strength | None:
        others = {name: getattr(self, name) for name in ("min_rate", "stacked", "split", "seed")}
        others["refresh"] = self.every
        return None if self.numbers else Strength("rank", self.ranks[0], True, others, self.at)

    def at(self, ranks: tuple[int, ...]) -> "PowerSGD":
        """The codec with these ranks."""
        return dataclasses.replace(self, ranks=ranks)

    def matrix(self, path: str, leaf: Any) -> tuple[int, int, int]:
        """The layers, n and m of a leaf; for a shard those of the whole leaf."""
        leaf = whole(leaf)
        stacked = self.stacked is not None and bool(self.stacked(path, leaf))
        inner = leaf.shape[stacked:]
        rows = best_split(inner) if self.split is None else self.split(path, leaf)
        if not is_whole(rows) or not 0 < rows < max(2, len(inner)):
            raise ValueError(
                f"split={shown(rows)} of leaf {path!r}: of its {len(inner)} axes 1 to {len(inner) - 1} make the rows"
            )
        return leaf.shape[0] if stacked else 1, math.prod(inner[:rows]), math.prod(inner[rows:])

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        if whole(leaf).ndim < 2 + (self.stacked is not None and bool(self.stacked(path, whole(leaf)))):
            return False
        (layers, n, m), shards = self.matrix(path, leaf), shards_of(leaf)
        sent = min(n, m, self.ranks[-1]) * (-(-n // shards) - (-m // shards))
        return self.min_rate * sent * layers * wide(leaf.dtype).itemsize < uncompressed

    def cut(self, path: str, leaf: Any) -> Cut:
        layers, n, m = self.matrix(path, leaf)
        return Cut((n, m)) if layers == 1 else Cut((layers, n, m), 1)

    def arrives(self, path: str, leaf: Any) -> int:
        return int(self.stacked is not None and bool(self.stacked(path, leaf)))

    def view(self, path: str, leaf: Any) -> str:
        layers, n, m = self.matrix(path, leaf)
        ranks = [min(n, m, rank) for rank in self.ranks]
        many = f"{layers} matrices of " if layers > 1 else ""
        return f"{many}{n} x {m} at rank {' or '.join(map(str, ranks))}"

    def gain(self, path: str, leaf: Any) -> Gain:
        _, n, m = self.matrix(path, leaf)
        ratio = n * m / (min(n, m, self.ranks[-1]) * (n + m))
        return Gain(ratio, "" if ratio >= 2 else "see stacked= and split= if this is no single matrix, or compress=")

    def init(self, path: str, leaf: Any, salt: int) -> dict[str, Any]:
        layers, n, m = self.matrix(path, leaf)
        shape = layers, min(n, m, max(self.ranks)), m
        return {"q": jax.random.normal(jax.random.fold_in(step_key(self.seed, 0), salt), shape, leaf.dtype)}

    def start(self, leaves: dict[str, dict[str, Any]]) -> PowerSGDState:
        q = {path: fields["q"] for path, fields in leaves.items()}
        return PowerSGDState(q, jnp.int32(0), self.numbers.start() if self.numbers else ())

    def forget(self, leaf: Any, where: jax.Array) -> Any:
        return leaf._replace(q=jnp.where(where, 0, leaf.q))

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        layers, r, m = leaf.q.shape
        # The terms stay apart: their sum is as large as the gradient, and a product is not. But a product with an array
        # that the compiler shards is summed over its axis, once for each term.
        sharded = others_are_automatic()
        order = computed(d[0].shape, layers, m) if ctx.fresh and not sharded else ()
        first, *more = (total(d),) if sharded else d
        terms = [Matrix.of(first, layers, m, order), *(Matrix.of(x, layers, m) for x in more)]
        rows, q = terms[0].x.shape[1], leaf.q  # for a leaf in shards, the rows of one shard
        salt = yield Together(salts, (ctx.salt, ctx.step))
        if self.every is not None:
            due = (ctx.step > 0) & (ctx.step % self.every == 0)
            q = jnp.where(due, scattered(q.shape, q.dtype, self.seed, salt, ctx.step), q)

        p = yield self.say(added([x.times(tamed(q)) for x in terms]).swapaxes(1, 2))
        p = p.mean.reshape(r, layers, rows).swapaxes(0, 1)
        largest = yield OverShards(jnp.max(jnp.abs(p), axis=-1, keepdims=True), largest=True)
        drawn = scattered((layers, r, math.prod(ctx.whole) // (layers * m)), p.dtype, self.seed, salt, ctx.step + 1)
        p = yield from orthonormal(*revive(p, largest, own_rows(drawn, rows, ctx)), ctx.shards)
        # The thin factor stays [r, n]: rewritten as a product with D^T this can cost ten times as much.
        p = jax.lax.optimization_barrier(p)
        heard = yield self.say(added([x.down(p) for x in terms]), partial=True)
        mean, own = (x.reshape(r, layers, m).swapaxes(0, 1) for x in (heard.mean, heard.own))
        # Parameters and momentum both take the mean, and each would sum it up anew; the residual takes own only once.
        applied = einsum("lrn,lrm->lnm", p, mean).reshape(d[0].shape)
        return Result(applied, outer(p, own, d[0].shape), {"q": mean})

    def say(self, factor: jax.Array, partial: bool = False) -> Say:
        """Asks for a factor [layers, r, ...]; its columns go in front of its layers, so those in use lead."""
        layers, r, length = factor.shape
        counts = tuple(min(r, rank) * layers * length for rank in self.ranks)
        return Say(factor.swapaxes(0, 1), counts if len(counts) > 1 else None, growth=r, partial=partial)


def added(products: list[jax.Array]) -> jax.Array:
    """The sum of the products with the terms; under error feedback the first term is the gradient."""
    gradient, *owed = products
    return gradient if not owed else moderate(gradient) + owed[0]


def salts(asked: list[tuple[int, jax.Array]]) -> list[jax.Array]:
    """The leaves' own numbers, known late, so that their users compile once for leaves of one shape; with the step."""
    return known_late([salt for salt, _ in asked], asked[0][1])


class Matrix(NamedTuple):
    """A term D as a matrix, or as one for each layer; its rows may lie in another order than the leaf's.

    Attributes:
      x: [layers, n, m].
      rows: the sizes of the leaf's axes that count rows; empty if the rows lie in the leaf's order.
      order: the order of these axes in x.
    """

    x: jax.Array
    rows: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, x: jax.Array, layers: int, m: int, order: tuple[int, ...] = ()) -> "Matrix":
        """The matrix of a leaf."""
        turned = x.transpose(*order, *range(len(order), x.ndim)) if order else x
        return cls(turned.reshape(layers, -1, m), x.shape[: len(order)], order)

    def times(self, q: jax.Array) -> jax.Array:
        """D Q, from Q^T [layers, r, m]: [layers, n, r]."""
        # As written: the other way round, such a product takes two to ten times as long on CPUs.
        product = jax.lax.optimization_barrier(einsum("lnm,lrm->lnr", self.x, q))
        if self.order:
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            lying = product.reshape(*(self.rows[axis] for axis in self.order), -1)
            product = lying.transpose(*back, len(back)).reshape(product.shape)
        return product

    def down(self, p: jax.Array) -> jax.Array:
        """P^T D, from P^T [layers, r, n]: [layers, r, m]."""
        layers, r, n = p.shape
        if self.order:
            p = p.reshape(r, *self.rows).transpose(0, *(1 + axis for axis in self.order)).reshape(p.shape)
        if r > WRITTEN_OUT or n % ROWS or not on_cpus():
            return einsum("lrn,lnm->lrm", p, self.x)
        blocks = p.reshape(layers, r, -1, ROWS), self.x.reshape(layers, -1, ROWS, self.x.shape[-1])
        return jnp.sum(einsum("lrbk,lbkm->lbrm", *blocks), axis=1)


def computed(shape: tuple[int, ...], layers: int, m: int) -> tuple[int, ...]:
    """The order in which XLA's CPU backend computes the rows of a gradient; empty if it is the leaf's own.

    A leaf of four axes is taken for a convolution's kernel [h, w, i, o]. The backend computes such a gradient as
    [i, h, w, o], and transposes it for each product that reads it in another order.
    """
    return (2, 0, 1) if on_cpus() and layers == 1 and len(shape) == 4 and shape[-1] == m else ()


def outer(p: jax.Array, q: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """P Q^T in a leaf's shape, from P^T [layers, r, n] and Q^T [layers, r, m]."""
    layers, r, m = q.shape
    if r > WRITTEN_OUT:
        return einsum("lrn,lrm->lnm", p, q).reshape(shape)
    # In the leaf's own shape it fuses into its user: then nothing of the gradient's size is stored.
    cut = next(axis for axis in range(len(shape) - 1, 0, -1) if math.prod(shape[axis:]) == m)
    rows, columns = shape[:cut] + (1,) * (len(shape) - cut), (layers,) + (1,) * (cut - 1) + shape[cut:]
    return functools.reduce(jnp.add, [p[:, i].reshape(rows) * q[:, i].reshape(columns) for i in range(r)])


def revive(p: jax.Array, largest: jax.Array, drawn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P^T [layers, r, n] with drawn rows instead of zeros, and the bounds of the rows, like `largest`."""
    dead = largest < jnp.finfo(p.dtype).tiny
    return jnp.where(dead, drawn, p), jnp.where(dead, 1, largest)


def own_rows(drawn: jax.Array, rows: int, ctx: Context) -> jax.Array:
    """The rows of a shard from numbers for all rows of a matrix, [layers, r, n]; zeros for the shard's padding."""
    if ctx.shard is None:
        return drawn
    return jax.lax.dynamic_slice_in_dim(filled(drawn, rows * ctx.shards), ctx.shard * rows, rows, axis=2)


def best_split(shape: tuple[int, ...]) -> int:
    """How many of the first axes make the rows, such that rows plus columns are fewest; on a tie, the most axes."""
    if len(shape) < 2:
        return 1
    return min(range(len(shape) - 1, 0, -1), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))


@factory
def powersgd(
    rank: int = 2,
    *,
    min_rate: float = 1.0,
    stacked: Predicate | None = None,
    split: Callable[[str, Any], int] | None = None,
    refresh: int | None = None,
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
    """PowerSGD (Vogels et al., NeurIPS 2019, Algorithm 1), linear, with two all-reduces.

    A leaf is taken for a matrix of n rows and m columns, such that n + m is least. It takes r (n + m) floats instead of
    n m, in float32 (float64 for float64 gradients). A kernel [H, W, in, out] becomes H W in x out, one [out, in, H, W]
    becomes out x in H W, and an attention's [D, heads, D / heads] becomes D x D. State: a residual of the size of the
    compressed leaves on each worker, and Q with r m floats for each leaf.

    Args:
      rank: r, at least 1; a leaf uses at most min(n, m). The paper uses 1, 2 and 4.
      min_rate: a leaf is compressed if min_rate * r (n + m) < n m; PyTorch's hook has 2.
      stacked: (path, leaf) -> whether the leaf's first axis counts layers, like under a scan over layers. Then each
        layer is a matrix of its own.
      split: (path, leaf) -> how many of the leaf's axes, without the axis of layers, make the rows.
      refresh: the number of steps after which Q is drawn anew, so that it does not stay in a subspace; by default
        never, like in the paper.
      aggregate: "psum", or "ring" for an all-reduce of our own, hop by hop.
      quantizer: a compressor, such as `qsgd(8)`; P and Q then travel through its codec, which is not linear. It has the
        same axis_name; its min_size and compress do not matter here.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals, or `Feedback`, `EF21`; without them the part that is not of low rank is
        lost.
      seed: the seed of the first Q and of the columns of P that are drawn at random.
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
      ValueError: rank, min_rate or refresh is out of range, or the quantizer does not go with it; later, in init and
        update, a refusal of `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.powersgd(rank=4), optax.sgd(0.1, momentum=0.9))
    """
    require_whole("rank", rank, 1)
    if refresh is not None:
        require_whole("refresh", refresh, 1)
    if not min_rate > 0:
        raise ValueError(f"min_rate={min_rate} must be positive")
    require_aggregate("powersgd", None, aggregate)
    numbers, way = quantizing("powersgd", quantizer, aggregate, axis_name)
    codec = PowerSGD((rank,), min_rate, stacked, split, numbers, seed, refresh)
    return compressor(
        codec, Settings(axis_name, feedback(error_feedback), min_size, compress, allow_dense, way, dense_dtype, buckets)
    )
