"""DenseNet for small images.

Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017, arXiv 1608.06993,
section 3, DenseNet-BC: every layer sees the outputs of all layers before it in its dense block, and adds k channels
to them, through a bottleneck of 4 k; between blocks a transition halves the channels and the image.

The paper's networks for CIFAR have three dense blocks. This is the one of common CIFAR code and of Accordion: the four
blocks of the paper's DenseNet-121 (Table 1), with k = 12 in place of 32, and a 3x3 convolution in place of ImageNet's
7x7 convolution and pooling.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import conv, linear, norm

LAYERS = (6, 12, 24, 16)
GROWTH = 12  # k


class Layer(nnx.Module):
    """One layer of a dense block, [N, H, W, inputs] -> [N, H, W, inputs + k]."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.norm1 = norm(inputs, rngs)
        self.conv1 = conv(inputs, 4 * GROWTH, rngs, size=1)
        self.norm2 = norm(4 * GROWTH, rngs)
        self.conv2 = conv(4 * GROWTH, GROWTH, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class Transition(nnx.Module):
    """Between dense blocks, [N, H, W, inputs] -> [N, H // 2, W // 2, inputs // 2]."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.norm = norm(inputs, rngs)
        self.conv = conv(inputs, inputs // 2, rngs, size=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(nnx.relu(self.norm(x)))
        # nnx.avg_pool divides by an integer, which jax refuses under jax_numpy_dtype_promotion="strict".
        return nnx.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4


class DenseNet(nnx.Module):
    """Dense blocks with transitions between them, images [N, H, W, channels] -> logits [N, classes]."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, rngs: nnx.Rngs):
        width = 2 * GROWTH
        self.conv = conv(image_shape[-1], width, rngs)
        layers: list[nnx.Module] = []
        for block, count in enumerate(LAYERS):
            if block:
                layers.append(Transition(width, rngs))
                width //= 2
            for _ in range(count):
                layers.append(Layer(width, rngs))
                width += GROWTH
        self.layers = nnx.Sequential(*layers)
        self.norm = norm(width, rngs)
        self.linear = linear(width, classes, rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[N, H, W, channels] -> [N, classes]; rngs are for networks with dropout, which this one has not."""
        x = nnx.relu(self.norm(self.layers(self.conv(x))))
        return self.linear(jnp.mean(x, axis=(1, 2)))
