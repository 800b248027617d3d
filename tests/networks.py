"""Trees of gradients of whole networks."""

import functools

import jax

from experiments.models import resnet18_shapes
from gradcomp_jax.testing.trees import is_shape

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
