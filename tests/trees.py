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


def transformer(layers=12, width=16):
    """The leaves of GPT-2: 148 with its 12 layers."""

    def dense(*shape):
        return {"kernel": shape, "bias": shape[1:]}

    norm = {"scale": (width,), "bias": (width,)}
    block = {
        "attention": {"qkv": dense(width, 3 * width), "out": dense(width, width)},
        "mlp": {"up": dense(width, 4 * width), "down": dense(4 * width, width)},
        "norm_1": norm,
        "norm_2": norm,
    }
    tree = {f"block_{i}": block for i in range(layers)}
    return {"embedding": (16 * width, width), "positions": (4 * width, width), "norm": norm, **tree}


def is_shape(x):
    return isinstance(x, tuple)


def zeros(shapes, dtype=np.float32):
    """Leaves of zeros, as numpy arrays: of jax's each new shape would be compiled."""
    return jax.tree.map(lambda shape: np.zeros(shape, dtype), shapes, is_leaf=is_shape)


def noise(shapes, seed, lead=(), dtype=np.float32):
    """Unit normal leaves of shape lead + shape, as numpy arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.standard_normal(lead + shape).astype(dtype), shapes, is_leaf=is_shape)
