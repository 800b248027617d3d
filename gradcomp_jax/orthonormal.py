"""Orthonormal bases of tall thin matrices, many at once.

On CPUs a library's QR computes them. On other devices QR is a call for each matrix, one after another, and it needs the
whole matrix. There, and for matrices in shards, Cholesky QR computes them: with the r x r Gram matrix G = P^T P = L L^T

    P <- P L^-T

has orthonormal columns, up to rounding errors, which grow with the square of the condition of P. So the first passes
factor G + s D, with D the diagonal of G. They give P a smaller condition, and then passes without a shift follow:
Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR for Computing the QR Factorization of
Ill-Conditioned Matrices", SIAM J. Sci. Comput. 42, 2020, arXiv 1809.11085.

One thing differs. Their s, 11 (n r + r (r + 1)) u |P|^2, bounds the worst case, and would drown the G of many rows. But
rounding errors add up like sqrt(n) (Higham, Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J.
Sci. Comput. 41, 2019), and s follows that. With one shifted pass of this s and two or three plain passes, float32 loses
columns from a condition of 10^6 on if r or n is large. With two shifted and two plain passes it is as orthonormal as QR
up to 10^7.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.contract import OverShards, Together
from gradcomp_jax.views import einsum, filled, inverse_power, on_cpus, split

# The numbers of passes with a shift, and without.
SHIFTED, PLAIN = 2, 2


def by_library(shards: int) -> bool:
    """Whether a library computes QR: on CPUs, for a whole matrix."""
    return shards == 1 and on_cpus()


def orthonormal(p: jax.Array, largest: jax.Array, shards: int = 1) -> Generator[Any, Any, jax.Array]:
    """An orthonormal basis of the rows of P^T [layers, r, n] (the columns of P), in the shape of P^T; part of a talk.

    Cholesky QR turns a column that depends on those before it into zeros, or into noise that does not depend on them.

    Args:
      p: P^T; for a matrix in shards, this shard's part along n.
      largest: the largest magnitude of each row, [layers, r, 1], over all shards.
      shards: the number of shards.
    """
    # The basis does not depend on such factors. With columns of one size P has its best condition, and squares stay in
    # range.
    p = p * inverse_power(largest)
    if by_library(shards):
        return orthonormalize(p)
    r, n = p.shape[1], p.shape[2] * shards
    shift = float(jnp.finfo(p.dtype).eps) * r * math.sqrt(n)
    for s in (*SHIFTED * (shift,), *PLAIN * (0.0,)):
        gram = yield OverShards((yield Together(products, ("lrn,lsn->lrs", p, p))))
        p = yield Together(products, ("lrs,lsn->lrn", (yield Together(inverse_factors, (gram, s))), p))
    return p


def orthonormalize(p: jax.Array) -> jax.Array:
    """An orthonormal basis of the rows of P^T [layers, r, n], of the same shape, from a library's QR.

    Rows of zeros get a basis vector too, so nothing here divides by zero.
    """
    if len(p) == 1:
        return jnp.linalg.qr(p[0].T)[0].T[None]
    # One matrix after another: a batched QR on emulated devices can deadlock in XLA's thread pool.
    return lax.map(lambda rows: jnp.linalg.qr(rows.T)[0].T, p)


def products(asked: list[tuple[str, jax.Array, jax.Array]]) -> list[jax.Array]:
    """The product of two arrays for each leaf; the first subscript counts layers, and alike products become one."""
    kinds = [(subscripts, a.shape[1:], b.shape[1:], a.dtype) for subscripts, a, b in asked]
    return by_kind(lambda kind, a, b: einsum(kind[0], a, b), kinds, [pair for _, *pair in asked])


def inverse_factors(asked: list[tuple[jax.Array, float]]) -> list[jax.Array]:
    """L^-1 for matrices G [layers, r, r], where L L^T = G + s D, and D is the diagonal of G.

    Args:
      asked: G and s, for each leaf.

    Returns:
      L^-1 for each leaf, [layers, r, r]. Its row is zero if a row of P^T depends on the rows before it, up to rounding.
    """
    most = max(gram.shape[-1] for gram, _ in asked)  # all are filled up to this size with zeros, so that one loop does
    grams = [filled(filled(gram, most).mT, most) for gram, _ in asked]
    shifts = [jnp.full((len(gram), 1, 1), s, gram.dtype) for gram, s in asked]
    kinds = [gram.dtype for gram in grams]
    found = by_kind(lambda _, *joined: inverse_factor(*joined), kinds, list(zip(grams, shifts, strict=True)))
    return [x[:, : gram.shape[-1], : gram.shape[-1]] for x, (gram, _) in zip(found, asked, strict=True)]


def by_kind(function: Callable[..., jax.Array], kinds: Sequence[Any], asked: Sequence[Any]) -> list[jax.Array]:
    """`function` of each leaf's arrays; it is called with a kind and the arrays of its leaves, joined along layers."""
    found: dict[int, jax.Array] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        joined = [jnp.concatenate(arrays) for arrays in zip(*(asked[i] for i in places), strict=True)]
        found |= zip(places, split(function(kind, *joined), [len(asked[i][0]) for i in places], axis=0), strict=True)
    return [found[i] for i in range(len(asked))]


def inverse_factor(gram: jax.Array, shift: jax.Array) -> jax.Array:
    """Like `inverse_factors`, for G [k, r, r] and s [k, 1, 1], with elimination in [G + s D, I]."""
    r, eye = gram.shape[-1], jnp.eye(gram.shape[-1], dtype=gram.dtype)
    places = lax.iota(jnp.int32, r)[:, None]
    diagonal = jnp.sum(gram * eye, axis=-1, keepdims=True)
    scale = jnp.where(diagonal > 0, lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    least = r * jnp.finfo(gram.dtype).eps

    def eliminate(j: jax.Array, rows: jax.Array) -> jax.Array:
        row = lax.dynamic_index_in_dim(rows, j, axis=1)
        pivot = lax.dynamic_index_in_dim(row, j, axis=2)
        row = jnp.where(pivot > least, row * lax.rsqrt(jnp.maximum(pivot, least)), 0)
        below = jnp.where(places > j, row[..., :r].mT, 0)
        return jnp.where(places == j, row, rows - below * row)

    scaled = gram * scale * scale.mT + shift * eye
    return lax.fori_loop(0, r, eliminate, jnp.concatenate([scaled, scale * eye], axis=-1))[..., r:]
