"""How much of recorded gradients GradiVeQ's bases lose, computed with the codec's own functions on arrays.

A loss is |g - ghat|^2 / |g|^2. Slices have the codec's default length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax.codecs.gradiveq import principal_basis, slice_length, unexplained

# The axes of [steps, H, W, D, F] along which weights are neighbours; the axis of the nearest in a slice comes first.
NEIGHBOURS = {"next filter": 4, "next depth": 3, "next column": 2, "next row": 1}


class Fit(NamedTuple):
    """The losses of bases that are fitted on one window of steps, by the number d of columns kept, from 1.

    Attributes:
      samples: the loss of the variance of the first slice's samples, with the basis fitted on them, [d].
      first: the loss of each slice's later gradients, with the first slice's basis, [slices, d].
      own: the same loss, with the slice's own basis, [slices, d].
      weights: each slice's share of the squares of all later gradients, [slices].
    """

    samples: np.ndarray
    first: np.ndarray
    own: np.ndarray
    weights: np.ndarray


class Findings(NamedTuple):
    """The findings for one layer.

    Attributes:
      shape: the shape of its kernel.
      correlations: mean |r|, by kind of neighbours.
      fits: the fits by the number L of samples, ascending.
      aging: the loss in each step after the fit, [steps], with `columns` of the first slice's basis.
      mean_loss: the loss when each kernel [H, W] is replaced with its mean.
    """

    shape: tuple[int, ...]
    correlations: dict[str, float]
    fits: dict[int, Fit]
    aging: np.ndarray
    mean_loss: float


def analyse(gradients: np.ndarray, train_steps: int) -> Findings:
    """All findings for one layer.

    Args:
      gradients: the gradients of its kernel, [steps, H, W, D, F].
      train_steps: L_t. Correlations, and the basis that ages, come from the first L_t steps. The other bases are judged
        on the last L_t steps, and fitted on the L_t steps, or on all steps, before these.
    """
    shape = gradients.shape[1:]
    k = slice_length(shape)
    slices = gradients.reshape(len(gradients), -1, k)
    end = len(slices) - train_steps
    return Findings(
        shape,
        correlations(gradients[:train_steps]),
        {window: fit(slices[end - window : end], slices[end:]) for window in (train_steps, end)},
        aging(slices[:train_steps], slices[train_steps:], columns(k, train_steps)),
        mean_loss(gradients[end:]),
    )


def columns(k: int, samples: int) -> int:
    """K / 8 columns; fewer if the samples span fewer."""
    return max(1, min(k // 8, samples - 1))


def correlations(gradients: np.ndarray) -> dict[str, float]:
    """Mean |r| over the steps of gradients [steps, H, W, D, F], for neighbours and for any two weights of a slice."""
    deviation = gradients - gradients.mean(axis=0)
    z = deviation / np.maximum(np.linalg.norm(deviation, axis=0), np.finfo(np.float32).tiny)
    found = {}
    for kind, axis in NEIGHBOURS.items():
        along = np.moveaxis(z, axis, 0)
        found[kind] = float(np.abs(np.sum(along[1:] * along[:-1], axis=1)).mean()) if len(along) > 1 else 0.0
    first_slice = z.reshape(len(z), -1)[:, : slice_length(z.shape[1:])]
    r = np.abs(first_slice.T @ first_slice)
    found["any two"] = float(r[~np.eye(len(r), dtype=bool)].mean())
    return found


def fit(train: np.ndarray, later: np.ndarray) -> Fit:
    """Fits bases on slices [L, slices, K], and judges them on later slices."""
    first_basis, samples = basis_of(train[:, 0])
    first, own = [], []
    for m in range(train.shape[1]):
        mu = train[:, m].mean(axis=0)
        first.append(loss(later[:, m], first_basis, mu))
        own.append(loss(later[:, m], basis_of(train[:, m])[0], mu))
    squares = np.sum(later**2, axis=(0, 2))
    return Fit(np.asarray(samples), np.stack(first), np.stack(own), squares / squares.sum())


def aging(train: np.ndarray, later: np.ndarray, d: int) -> np.ndarray:
    """The loss of each later step [steps, slices, K] with d columns of the first slice's basis."""
    basis, mu = basis_of(train[:, 0])[0][:, :d], train.mean(axis=0)
    return np.stack([loss(step, basis, mu)[-1] for step in later])


def mean_loss(gradients: np.ndarray) -> float:
    """The loss of gradients [steps, H, W, D, F] when each kernel [H, W] is replaced with its mean."""
    mean = gradients.mean(axis=(1, 2), keepdims=True)
    return float(np.sum((gradients - mean) ** 2) / np.sum(gradients**2))


loss = jax.jit(unexplained)


@jax.jit
def basis_of(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The basis [K, d] of all d columns that samples [L, K] span, and the share of variance that the first d miss."""
    d = min(len(samples) - 1, samples.shape[1])
    basis, variance = principal_basis(samples, d)
    return basis, 1 - jnp.cumsum(variance)[:d] / jnp.sum(variance)
