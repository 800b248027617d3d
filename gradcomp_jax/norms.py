"""How much of a step's gradients a codec lost: norms by leaf, which the state of a `measured` codec keeps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.contract import Sparse
from gradcomp_jax.feedback import EF21, Feedback
from gradcomp_jax.views import STEP, inverse_power, on_cpus, others_are_automatic

Arrays = tuple[jax.Array, ...]

# If the sum of squares is above this, nothing that counts has vanished; squares of magnitudes below 2^-63 do vanish.
LEAST = 2.0**-46


def no_norms() -> jax.Array:
    """The norms of a leaf before the first step; see `MeasuredState`."""
    return jnp.zeros(3, jnp.float32)


def norm(x: jax.Array) -> jax.Array:
    """The 2-norm of all elements of an array of any shape; their squares neither overflow nor vanish."""
    down = _scale((x,))
    return jnp.sqrt(jnp.sum((x * down) ** 2)) * inverse_power(down)


def of_terms(terms: Arrays) -> jax.Array:
    """[2]: the norms of the gradient, which is the first of the terms, and of their sum."""
    return _norms(lax.optimization_barrier(terms), lambda g, *owed: (g, g + owed[0] if owed else g))


def of_lost(feedback: Feedback | EF21 | None, gradient: jax.Array, memory: Any, own: Any, beside: jax.Array) -> Any:
    """[1]: the norm of the terms' unsent part.

    Args:
      feedback: the codec's error feedback, or None.
      gradient: this worker's gradient.
      memory: the memory that the step left; None without feedback.
      own: this worker's share of the mean, times the number of workers.
      beside: the norms of the terms. A loss that is 10^8 times smaller may count as zero.
    """
    if feedback is not None:
        gradient, memory = lax.optimization_barrier((gradient, memory))
        return _norms((gradient, memory), lambda g, m: (feedback.missing(g, m),), jnp.max(beside))
    gradient, own = lax.optimization_barrier((gradient, own))
    if isinstance(own, Sparse):
        return _norms((own.added_to(gradient, -1),), lambda x: (x,), jnp.max(beside))
    return _norms((gradient, own), lambda g, x: (g - x,), jnp.max(beside))


def _norms(xs: Arrays, of: Callable[..., Arrays], beside: Any = 0.0) -> jax.Array:
    """The 2-norms of the results of a linear function of arrays; no square leaves its type's range.

    On CPUs each pass over the arrays counts. There one pass computes them, and two more follow only if a square left
    the range.
    """
    if not on_cpus() or others_are_automatic():
        return _scaled(xs, of)
    squares = _sums_of_squares(of(*xs))
    in_range = jnp.isfinite(jnp.max(squares)) & (jnp.maximum(jnp.max(squares), beside * beside) > LEAST)
    return lax.cond(in_range, lambda *_: jnp.sqrt(squares), lambda *xs: _scaled(xs, of), *xs)


def _scaled(xs: Arrays, of: Callable[..., Arrays]) -> jax.Array:
    down = _scale(xs)
    return jnp.sqrt(_sums_of_squares(of(*(x * down for x in xs)))) * inverse_power(down)


def _scale(xs: Arrays) -> jax.Array:
    """The power of two that scales the largest magnitude to about 1.

    It is 1 for zeros, because XLA squares the power where the zeros are a constant.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in xs]))
    return inverse_power(jnp.where(largest > 0, largest, 1))


def _sums_of_squares(xs: Arrays) -> jax.Array:
    """The sum of squares of each array, in one pass over their inputs; in partial sums, like `views.sum_of`."""
    if not on_cpus() or others_are_automatic() or xs[0].size % STEP:
        return jnp.stack([jnp.sum(x * x) for x in xs])
    add = lambda totals, ones: tuple(x + y for x, y in zip(totals, ones, strict=True))  # noqa: E731
    zeros = tuple(jnp.zeros((), x.dtype) for x in xs)
    sums = lax.reduce(tuple((x * x).reshape(-1, STEP) for x in xs), zeros, add, (1,))
    return jnp.stack([jnp.sum(x) for x in sums])
