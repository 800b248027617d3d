"""Trees of gradients for the laws: shapes, and numpy arrays of these shapes."""

from typing import Any

import jax
import numpy as np

Shapes = Any
"""A tree whose leaves are shapes, tuples of whole numbers."""

# A matrix, a convolution, a vector and a scalar: two are compressed, two travel dense.
MIXED = {"dense": {"kernel": (40, 24), "bias": (24,)}, "conv": (3, 3, 8, 16), "gain": ()}
# Matrices with columns of at least 64 elements, which 1-bit SGD compresses.
MATRICES = {"a": (64, 24), "b": (64, 16)}
ONE = {"only": (64, 8)}
# One compressed leaf, and two that travel dense.
SMALL = {"conv": (3, 3, 8, 16), "bias": (16,), "gain": ()}


def is_shape(x: Any) -> bool:
    """Whether `x` is a shape."""
    return isinstance(x, tuple)


def zeros(shapes: Shapes, dtype: Any = np.float32) -> Any:
    """Leaves of zeros, as numpy arrays: jax would compile a program for each new shape."""
    return jax.tree.map(lambda shape: np.zeros(shape, dtype), shapes, is_leaf=is_shape)


def noise(shapes: Shapes, seed: int, lead: tuple[int, ...] = (), dtype: Any = np.float32) -> Any:
    """Leaves of unit normal noise, each of shape lead + shape, as numpy arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.standard_normal(lead + shape).astype(dtype), shapes, is_leaf=is_shape)
