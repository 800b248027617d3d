"""Random Block: a block of consecutive coordinates that begins at a random place, the same on all workers.

A baseline of Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727 (Table 4). For
each tensor of n elements, in C order, with start uniform on 0 .. n - 1 from a generator that all workers
share:

    S = start, ..., start + k - 1 modulo n     mean_S <- mean of D_S     mean elsewhere 0     own_S = D_S

Neighbours are sent together, which correlated gradients resent.
Linear; scaled by n / k without error feedback only.
"""

import jax
import jax.numpy as jnp

from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import Compressor, Predicate, compressor
from gradcomp_jax.subset import subset


def block(key: jax.Array, n: int, k: int) -> jax.Array:
    """K consecutive indices modulo n from a random start, int32 [k]."""
    start = jax.random.randint(key, (), 0, n, jnp.int32)
    ahead = jnp.arange(k, dtype=jnp.int32)
    # start + ahead may not fit an int32.
    return jnp.where(ahead < n - start, start + ahead, ahead - (n - start))


def randomblock(
    fraction: float | None = None,
    *,
    rank: int | None = None,
    aggregate: str = "psum",
    axis_name: AxisName = "data",
    error_feedback: bool = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
) -> Compressor:
    """Random Block (Table 4 of PowerSGD), linear, by one all-reduce of k floats a leaf.

    One more float for the tree tells of gradients that are not finite. State: one counter, and a residual of the size
    of the compressed leaves on each worker.

    Args:
      fraction: k / n; by default 0.01. k is at least 1.
      rank: instead of fraction, PowerSGD's rank whose budget of r (rows + columns) floats a leaf gets; vectors are
        then sent whole, as in the paper.
      aggregate: "psum", or "ring" for an all-reduce of our own, hop by hop.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them values are scaled by n / k.
      seed: of the blocks' places.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default every leaf, vectors too.
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: fraction and rank both given or out of range, another way to aggregate; later, in init and update,
        what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import randomblock
    >>> tx = optax.chain(randomblock(fraction=0.01), optax.sgd(0.1))
    """
    return compressor(
        subset("randomblock", block, fraction, rank, aggregate, seed),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
