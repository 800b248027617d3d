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
ride along.

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

from gradcomp_jax import collectives
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import (
    Codec,
    Compressor,
    Exchanged,
    Predicate,
    Tensors,
    compressor,
    is_matrix,
    require_whole,
)
from gradcomp_jax.random import step_key
from gradcomp_jax.views import matrix_shape

# A column of P with nothing above this carries no direction.
DEAD = 1e-30


class PowerSGDState(NamedTuple):
    """State of `powersgd`, the same on all workers.

    Attributes:
      q: Q^T by leaf path, the warm start, [layers, r, m]; m is the leaf's last axis.
      step: int32, exchanges done; seeds the columns of P drawn at random.
    """

    q: Tensors
    step: jax.Array


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
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them the part that is not of low rank is lost.
      seed: of the first Q and of the columns of P drawn at random.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default every leaf of two axes or more.
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: rank or min_rate out of range; later, in init and update, what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import powersgd
    >>> tx = optax.chain(powersgd(rank=4), optax.sgd(0.1, momentum=0.9))
    """
    require_whole("rank", rank, 1)
    if min_rate <= 0:
        raise ValueError(f"min_rate={min_rate} must be positive")

    def is_stacked(path: str, leaf: Any) -> bool:
        return stacked is not None and bool(stacked(path, leaf))

    def sizes(path: str, leaf: Any) -> tuple[int, int, int, int]:
        """layers, n, m, r of a leaf."""
        layers, n, m = matrix_shape(leaf.shape, is_stacked(path, leaf))
        return layers, n, m, min(n, m, rank)

    def shrinks(path: str, leaf: Any) -> bool:
        if leaf.ndim < 2 + is_stacked(path, leaf):
            return False
        _, n, m, r = sizes(path, leaf)
        return min_rate * r * (n + m) < n * m

    def normal(flat: jax.Array, step: jax.Array | int) -> jax.Array:
        """Unit normals of the shape of `flat`, the same on all workers."""
        return jax.random.normal(step_key(seed, step), flat.shape, flat.dtype)

    def init(tensors: Tensors) -> PowerSGDState:
        shapes = {path: (layers, r, m) for path, x in tensors.items() for layers, _, m, r in [sizes(path, x)]}
        q = {path: jnp.zeros(shape, tensors[path].dtype) for path, shape in shapes.items()}
        flat, unravel = ravel_pytree(q)
        return PowerSGDState(unravel(normal(flat, 0)), jnp.int32(0))

    def revive(p: Tensors, step: jax.Array) -> Tensors:
        """P with random columns where it has columns of zeros."""
        dead = {path: jnp.max(jnp.abs(x), axis=-1, keepdims=True) < DEAD for path, x in p.items()}
        flat, unravel = ravel_pytree(p)
        some = jnp.any(ravel_pytree(dead)[0])
        fresh = jax.lax.cond(some, lambda: normal(flat, step), lambda: jnp.zeros_like(flat))
        return jax.tree.map(jnp.where, dead, unravel(fresh), p)

    def exchange(tensors: Tensors, state: PowerSGDState, axis_name: AxisName, **extra_args: Any) -> Exchanged:
        del extra_args

        # HIGHEST: with the bfloat16 products that are the default on TPUs, own and mean would part.
        def einsum(subscripts: str, a: Tensors, b: Tensors) -> Tensors:
            return {path: jnp.einsum(subscripts, a[path], b[path], precision=jax.lax.Precision.HIGHEST) for path in a}

        def mean(factors: Tensors) -> tuple[Tensors, int]:
            flat, unravel = ravel_pytree(factors)
            flat, bits = collectives.mean(flat, axis_name)
            return unravel(flat), bits

        d = {path: x.reshape(sizes(path, x)[:3]) for path, x in tensors.items()}
        p, p_bits = mean(einsum("lrm,lnm->lrn", state.q, d))
        p = {path: orthonormalize(x) for path, x in revive(p, state.step + 1).items()}
        # The thin factor stays [r, n]: rewritten as a product with D^T this can cost ten times as much.
        q_own = einsum("lrn,lnm->lrm", jax.lax.optimization_barrier(p), d)
        q, q_bits = mean(q_own)

        def restore(q: Tensors) -> Tensors:
            return {path: x.reshape(tensors[path].shape) for path, x in einsum("lrn,lrm->lnm", p, q).items()}

        return Exchanged(restore(q), restore(q_own), PowerSGDState(q, state.step + 1), p_bits + q_bits)

    return compressor(
        Codec("powersgd", init, exchange, is_matrix, shrinks),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
