"""Trees of gradients that the laws are tested on."""

import functools

import jax
import numpy as np

from experiments.models import resnet18_shapes

# A matrix, a convolution, a vector and a scalar: two that are compressed, two that travel dense.
MIXED = {"dense": {"kernel": (40, 24), "bias": (24,)}, "conv": (3, 3, 8, 16), "gain": ()}
# Columns of 64 elements at least, which 1-bit SGD compresses.
MATRICES = {"a": (64, 24), "b": (64, 16)}
ONE = {"only": (64, 8)}
# One leaf that is compressed, and two that travel dense.
SMALL = {"conv": (3, 3, 8, 16), "bias": (16,), "gain": ()}


# To make the network takes longer than to trace a codec on it.
resnet18 = functools.cache(resnet18_shapes)


def resnet18_shapes_once():
    """Each shape that ResNet-18 has."""
    return {str(shape): shape for shape in dict.fromkeys(jax.tree.leaves(resnet18(), is_leaf=is_shape))}


def is_shape(x):
    return isinstance(x, tuple)


def zeros(shapes, dtype=np.float32):
    """Leaves of zeros, as numpy arrays: of jax's each new shape would be compiled."""
    return jax.tree.map(lambda shape: np.zeros(shape, dtype), shapes, is_leaf=is_shape)


def noise(shapes, seed, lead=(), dtype=np.float32):
    """Unit normal leaves of shape lead + shape, as numpy arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.standard_normal(lead + shape).astype(dtype), shapes, is_leaf=is_shape)
