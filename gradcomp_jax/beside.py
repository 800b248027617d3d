"""Reduces what workers bring beside gradients: the loss, auxiliary outputs, model state.

It rides in the codec's own messages as floating arrays, and their means over the workers arrive. Only the integer
leaves of a model state travel apart; the largest value of each arrives.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REDUCTIONS = ("mean", "sum", "workers")
# Whole numbers with fewer bits come back exactly from their float32 mean: three roundings of 2^-24 stay below 1/2.
EXACT_BITS = 21


def reductions(reduce_aux: Any, aux: Any, rows: set[int]) -> Any:
    """The reduction of each leaf of the auxiliary outputs: a tree like `aux`.

    Args:
      reduce_aux: as `train_step` takes it.
      aux: one worker's outputs.
      rows: the numbers of rows in the leaves of the worker's part of the batch.

    Raises:
      ValueError: reduce_aux is no prefix of aux, or names another reduction; or aux holds a random key to be reduced.
    """
    if reduce_aux is None:
        return jax.tree_util.tree_map_with_path(lambda path, x: _by_type(path, x, rows), aux)
    for how in jax.tree.leaves(reduce_aux):
        if how not in REDUCTIONS:
            raise ValueError(f"reduce_aux has {how!r}: a leaf must be one of {', '.join(map(repr, REDUCTIONS))}")
    try:
        hows = jax.tree.broadcast(reduce_aux, aux)
    except ValueError as error:
        raise ValueError(
            f"reduce_aux={reduce_aux!r} must be a prefix of the auxiliary outputs, which are "
            f"{jax.tree.map(lambda x: x.shape, aux)}"
        ) from error
    jax.tree_util.tree_map_with_path(_require_number, aux, hows)
    return hows


def over_parts(aux: Any, hows: Any) -> Any:
    """One worker's outputs from those of the parts of its batch [parts, ...]; under "workers" all parts are kept."""

    def reduced(x: jax.Array, how: str) -> jax.Array:
        if how == "workers":
            return x
        if how == "sum":
            return jnp.sum(x, axis=0)
        return jnp.mean(x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32), axis=0)

    return jax.tree.map(reduced, aux, hows)


def _require_number(path: Any, x: Any, how: str) -> None:
    if how != "workers" and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"auxiliary output {jax.tree_util.keystr(path) or 'aux'} is a random key, and keys have no mean or "
            "sum: give reduce_aux='workers' for it, which keeps each worker's"
        )


def _by_type(path: Any, x: Any, rows: set[int]) -> str:
    _require_number(path, x, "by its type")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return "sum"
    if x.ndim and x.shape[0] in rows - {1}:
        warnings.warn(
            f"auxiliary output {jax.tree_util.keystr(path) or 'aux'} of shape {x.shape} has as many rows as a worker's "
            "part of the batch, and is averaged over the workers, row by row: to keep all rows give "
            "reduce_aux='workers', which returns [workers, ...], or reduce_aux='mean' if this is meant",
            stacklevel=2,
        )
    return "mean"


def sent(aux: Any, hows: Any, workers: int) -> list[list[jax.Array]]:
    """For each leaf, the floating arrays whose means over the workers `arrived` asks for."""
    return [_sent(x, how, workers) for x, how in zip(jax.tree.leaves(aux), jax.tree.leaves(hows), strict=True)]


def _sent(x: jax.Array, how: str, workers: int) -> list[jax.Array]:
    if how == "workers":
        return []
    return [x] if jnp.issubdtype(x.dtype, jnp.inexact) else _pieces(x, workers)


def arrived(aux: Any, hows: Any, means: list[list[jax.Array]], workers: int, own: Callable[[Any], Any]) -> Any:
    """The auxiliary outputs of the step.

    Args:
      aux: one worker's outputs.
      hows: the reduction of each leaf.
      means: the means of the arrays of `sent`.
      workers: the number of workers.
      own: turns an output that each worker keeps into the step's output.
    """
    leaves, treedef = jax.tree.flatten(aux)
    of = lambda x, how, mean: own(x) if how == "workers" else _reduced(x, how, mean, workers)  # noqa: E731
    return jax.tree.unflatten(treedef, [of(*leaf) for leaf in zip(leaves, jax.tree.leaves(hows), means, strict=True)])


def _reduced(x: jax.Array, how: str, means: list[jax.Array], workers: int) -> jax.Array:
    whole = not jnp.issubdtype(x.dtype, jnp.inexact)
    if how == "mean":
        return _joined(x, means, workers).astype(jnp.float32) / workers if whole else means[0]
    return _joined(x, means, workers) if whole else means[0] * workers


def _pieces(x: jax.Array, workers: int) -> list[jax.Array]:
    """Whole numbers as floats with so few bits that each one's sum over the workers is exact."""
    x = _summable(x)
    unsigned = x.astype(jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    bits = _piece_bits(workers)
    mask = jnp.asarray(2**bits - 1, unsigned.dtype)
    shifts = range(0, 8 * x.dtype.itemsize, bits)
    return [(unsigned >> jnp.asarray(s, unsigned.dtype) & mask).astype(jnp.float32) for s in shifts]


def _joined(x: jax.Array, means: list[jax.Array], workers: int) -> jax.Array:
    """The sum over the workers, from the means of its pieces; it wraps around like its type."""
    dtype = _summable(x).dtype
    total = jnp.zeros(x.shape, dtype)
    for i, mean in enumerate(means):
        piece = jnp.round(mean * workers).astype(dtype)
        total = total + (piece << jnp.asarray(i * _piece_bits(workers), dtype))
    return total


def _piece_bits(workers: int) -> int:
    return max(1, EXACT_BITS - workers.bit_length())


def _summable(x: jax.Array) -> jax.Array:
    """The array in a type of at least 32 bits, as in `jnp.sum`."""
    return jnp.asarray(x, jnp.sum(jnp.zeros(1, x.dtype)).dtype)


def model_state_parts(model_state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """The floating leaves, which are averaged, and the others; of these the largest value is kept.

    Raises:
      TypeError: a leaf is a random key.
    """
    floats: list[jax.Array] = []
    others: list[jax.Array] = []
    for path, x in jax.tree_util.tree_leaves_with_path(model_state):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"leaf {jax.tree_util.keystr(path)} of the model state is a random key, and keys have no "
                "mean: pass the workers' keys in the batch"
            )
        (floats if jnp.issubdtype(x.dtype, jnp.inexact) else others).append(x)
    return floats, others


def model_state(like: Any, before: Any, floats: list[jax.Array], others: list[jax.Array], kept: jax.Array) -> Any:
    """The model state, made of the means of its floating leaves and the largest values of its other leaves.

    If the step is skipped, a floating leaf that is not finite stays as it was before.

    Raises:
      ValueError: loss_fn changed the structure, or a leaf's shape or kind of type.
    """
    require_like(like, before)
    leaves, treedef = jax.tree.flatten(like)
    means, largest = iter(floats), iter(others)
    merged = []
    for x, old in zip(leaves, jax.tree.leaves(before), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            merged.append(next(largest))
            continue
        mean = next(means)
        merged.append(jnp.where(kept | jnp.all(jnp.isfinite(mean)), mean.astype(old.dtype), old))
    return jax.tree.unflatten(treedef, merged)


def require_like(new: Any, before: Any) -> None:
    """Raises ValueError if a model state has another structure than before, or a leaf another shape or kind."""
    treedef, given = jax.tree.structure(new), jax.tree.structure(before)
    if len({treedef, given}) > 1:
        raise ValueError(f"loss_fn is given a model state {given}, and returns one of another structure: {treedef}")
    for (path, old), x in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(new), strict=True):
        _require_like(path, x, old)


def _require_like(path: Any, new: jax.Array, old: jax.Array) -> None:
    floats = [jnp.issubdtype(x.dtype, jnp.inexact) for x in (new, old)]
    if new.shape != old.shape or floats[0] != floats[1] or not (floats[0] or new.dtype == old.dtype):
        raise ValueError(
            f"leaf {jax.tree_util.keystr(path)} of the model state is given as {old.dtype}{list(old.shape)}, and "
            f"loss_fn returns it as {new.dtype}{list(new.shape)}"
        )
