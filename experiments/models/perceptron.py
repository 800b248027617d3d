"""A perceptron for CIFAR's images as vectors; 10,510,346 parameters at its usual width."""

from functools import partial

from flax import nnx

from experiments.models import layers


def perceptron(width: int = 2048) -> nnx.Module:
    """Two hidden layers, [N, 3072] -> logits [N, 10]."""
    linear = partial(layers.linear, rngs=nnx.Rngs(0))
    return nnx.Sequential(linear(3072, width), nnx.relu, linear(width, width), nnx.relu, linear(width, 10))
