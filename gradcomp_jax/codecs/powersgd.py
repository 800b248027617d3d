"""PowerSGD: low-rank gradients by one warm-started step of subspace iteration.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
NeurIPS 2019, arXiv 1905.13727, Algorithm 1. For each matrix, with D_w (n x m) the gradient of worker w plus
its residual and Q (m x r) the same on all workers:

    P   <- mean of D_w Q           first all-reduce: r n floats
    P^  <- orthonormalise(P)
    Q_w <- D_w^T P^
    Q   <- mean of Q_w             second all-reduce: r m floats
    mean <- P^ Q^T                 own_w <- P^ Q_w^T

Q is kept for the next step. All matrices of a tree share the two all-reduces; leaves that are not compressed
ride along. With a quantiser the factors travel through that instead of the sum; Q_w is then what it made of it.

Where sources differ: the residual is taken from the worker's own approximation, as Algorithm 2 is printed
(the authors' first code subtracts the mean's, and then the residuals of single workers grow like sqrt(t)).
P is orthonormalised by QR, and columns of P that are zero are drawn at random first: otherwise a gradient
that is exactly zero once, as behind a layer initialised to zero, leaves Q at zero for ever, or tied to rows
that may never be used.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gradcomp_jax.aggregation import linear
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import (
    Codec,
    Compressor,
    Exchanged,
    Levels,
    Predicate,
    Tensors,
    compressor,
    is_matrix,
    require_whole,
)
from gradcomp_jax.levels import mean_of_fronts
from gradcomp_jax.metrics import Bits, sum_bits
from gradcomp_jax.random import step_key
from gradcomp_jax.views import matrix_shape

# A column of P with nothing above this carries no direction.
DEAD = 1e-30


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


def orthonormalize(p: jax.Array) -> jax.Array:
    """An orthonormal basis of the rows of P^T [layers, r, n] (of the columns of P), of the same shape.

    Rows of zeros get a basis vector too, so that nothing here divides by zero.
    """
    # One matrix after another: a batched QR on emulated devices can deadlock in XLA's thread pool.
    return jax.lax.map(lambda rows: jnp.linalg.qr(rows.T)[0].T, p)


def powersgd(
    rank: int = 2,
    *,
    min_rate: float = 1.0,
    stacked: Predicate | None = None,
    aggregate: str = "psum",
    quantizer: Compressor | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
) -> Compressor:
    """PowerSGD (Vogels et al., NeurIPS 2019, Algorithm 1), linear, by two all-reduces.

    A leaf [..., m] is compressed as a matrix of m columns, from n m to r (n + m) floats, in float32 (float64
    for float64 gradients). State: a residual of the size of the compressed leaves on each worker, and
    Q of r m floats a leaf.

    Args:
      rank: r, at least 1; at most min(n, m) is used of it. The paper uses 1, 2 and 4.
      min_rate: a leaf is compressed if min_rate * r (n + m) < n m; PyTorch's hook has 2.
      stacked: (path, leaf) -> whether the leaf's first axis counts layers, as under a scan over layers:
        each layer is then a matrix of its own.
      aggregate: "psum", or "ring" for an all-reduce of our own, hop by hop.
      quantizer: a compressor, such as `qsgd(8)`, through whose codec P and Q travel; not linear then. On the same
        axis_name; what it would compress does not matter here.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them the part that is not of low rank is lost.
      seed: of the first Q and of the columns of P drawn at random.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default every leaf of two axes or more.
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: rank or min_rate out of range, or what `gradcomp_jax.aggregation.linear` refuses; later, in init and
        update, what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import powersgd
    >>> tx = optax.chain(powersgd(rank=4), optax.sgd(0.1, momentum=0.9))
    """
    require_whole("rank", rank, 1)
    if min_rate <= 0:
        raise ValueError(f"min_rate={min_rate} must be positive")

    reduce = linear("powersgd", aggregate, quantizer, axis_name)

    def is_stacked(path: str, leaf: Any) -> bool:
        return stacked is not None and bool(stacked(path, leaf))

    def sizes(path: str, leaf: Any, rank: int) -> tuple[int, int, int, int]:
        """layers, n, m, r of a leaf."""
        layers, n, m = matrix_shape(leaf.shape, is_stacked(path, leaf))
        return layers, n, m, min(n, m, rank)

    def shrinks(path: str, leaf: Any) -> bool:
        if leaf.ndim < 2 + is_stacked(path, leaf):
            return False
        _, n, m, r = sizes(path, leaf, rank)
        return min_rate * r * (n + m) < n * m

    def normal(flat: jax.Array, step: jax.Array | int) -> jax.Array:
        """Unit normals of the shape of `flat`, the same on all workers."""
        return jax.random.normal(step_key(seed, step), flat.shape, flat.dtype)

    def build(ranks: tuple[int, ...]) -> Codec:
        """The codec of some ranks, among which `level` chooses for each leaf where there are several.

        Then Q has as many columns as the highest rank. At a lower one the first of them are in use and the others
        zero, so that they are drawn at random when they are used again.
        """
        most = max(ranks)

        def init(tensors: Tensors) -> PowerSGDState:
            shapes = {path: (layers, r, m) for path, x in tensors.items() for layers, _, m, r in [sizes(path, x, most)]}
            q = {path: jnp.zeros(shape, tensors[path].dtype) for path, shape in shapes.items()}
            flat, unravel = ravel_pytree(q)
            return PowerSGDState(unravel(normal(flat, 0)), jnp.int32(0), reduce.init({}))

        def revive(p: Tensors, step: jax.Array) -> Tensors:
            """P with random columns where it has columns of zeros."""
            dead = {path: jnp.max(jnp.abs(x), axis=-1, keepdims=True) < DEAD for path, x in p.items()}
            flat, unravel = ravel_pytree(p)
            some = jnp.any(ravel_pytree(dead)[0])
            fresh = jax.lax.cond(some, lambda: normal(flat, step), lambda: jnp.zeros_like(flat))
            return jax.tree.map(jnp.where, dead, unravel(fresh), p)

        def exchange(
            tensors: Tensors,
            state: PowerSGDState,
            axis_name: AxisName,
            *,
            level: dict[str, jax.Array] | None = None,
            restart: dict[str, jax.Array] | None = None,
            **extra_args: Any,
        ) -> Exchanged:
            # HIGHEST: with the bfloat16 products that are the default on TPUs, own and mean would part.
            def einsum(subscripts: str, a: Tensors, b: Tensors) -> Tensors:
                return {p: jnp.einsum(subscripts, a[p], b[p], precision=jax.lax.Precision.HIGHEST) for p in a}

            def mean_of_active(factors: Tensors) -> tuple[Tensors, Tensors, Bits]:
                """The mean and own, both zero in the columns that are not in use."""
                assert level is not None
                ranks_of = {p: [sizes(p, tensors[p], rank)[3] for rank in ranks] for p in factors}
                in_use = {
                    p: (jnp.arange(x.shape[1], dtype=jnp.int32) < jnp.array(ranks_of[p], jnp.int32)[level[p]])[
                        None, :, None
                    ]
                    for p, x in factors.items()
                }
                own = {p: jnp.where(in_use[p], x, 0) for p, x in factors.items()}
                # Columns before layers, so that those in use lie in front.
                front = {p: x.swapaxes(0, 1) for p, x in own.items()}
                lengths = {p: [r * x.shape[1] * x.shape[2] for r in ranks_of[p]] for p, x in front.items()}
                flat = {p: x.reshape(-1) for p, x in front.items()}
                reduced, _, bits = mean_of_fronts(flat, lengths, level, axis_name, ring=aggregate == "ring")
                reduced = {p: x.reshape(front[p].shape).swapaxes(0, 1) for p, x in reduced.items()}
                return {p: jnp.where(in_use[p], x, 0) for p, x in reduced.items()}, own, bits

            def mean(factors: Tensors, inner: Any) -> tuple[Tensors, Tensors, Any, Bits]:
                """The mean over the workers, own, the quantiser's next state, and the bits."""
                if level is not None:
                    reduced, own, bits = mean_of_active(factors)
                    return reduced, own, inner, bits
                flat, unravel = ravel_pytree(factors)
                got = reduce.exchange({"": flat}, inner, axis_name, **extra_args)
                return unravel(got.mean[""]), unravel(got.own[""]), got.state, got.bits

            q = state.q
            if restart is not None:
                q = {path: jnp.where(restart[path], 0, x) for path, x in q.items()}
            d = {path: x.reshape(sizes(path, x, most)[:3]) for path, x in tensors.items()}
            p, _, inner, p_bits = mean(einsum("lrm,lnm->lrn", q, d), state.quantizer)
            p = {path: orthonormalize(x) for path, x in revive(p, state.step + 1).items()}
            # The thin factor stays [r, n]: rewritten as a product with D^T this can cost ten times as much.
            q_own = einsum("lrn,lnm->lrm", jax.lax.optimization_barrier(p), d)
            q, q_own, inner, q_bits = mean(q_own, inner)

            def restore(q: Tensors) -> Tensors:
                return {path: x.reshape(tensors[path].shape) for path, x in einsum("lrn,lrm->lnm", p, q).items()}

            bits = sum_bits(p_bits, q_bits) if level is not None or quantizer is not None else p_bits + q_bits
            return Exchanged(restore(q), restore(q_own), PowerSGDState(q, state.step + 1, inner), bits)

        return Codec("powersgd", init, exchange, is_matrix, shrinks, linear=quantizer is None)

    others = {"min_rate": min_rate, "stacked": stacked, "aggregate": aggregate, "seed": seed}
    levels = None if quantizer is not None else Levels("rank", rank, True, others, lambda ranks, feedback: build(ranks))
    return compressor(
        build((rank,))._replace(levels=levels),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
