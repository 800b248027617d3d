"""SENet-18: ResNet-18 with squeeze and excitation.

Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv 1709.01507, section 3: each block weighs its channels
by a small network of the channels' means ("squeeze"), two linear layers ("excitation") with a sixteenth of the channels
between them, before its shortcut is added.

The form is that of Accordion's code (arXiv 2010.16248), as the floats it counts for PowerSGD are of this network. It
differs from the paper's: 516 filters, not 512, in the last stage; biases in the convolutions, which the batch
normalization after them takes away again; a ReLU before the squeeze.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import conv, linear, norm
from experiments.models.resnet import Projection, ResNet

REDUCTION = 16


class SEBlock(nnx.Module):
    """A residual block that weighs its channels, [N, H, W, inputs] -> [N, H / stride, W / stride, filters].

    The stride is 2 where the block widens, 1 elsewhere.
    """

    def __init__(self, inputs: int, filters: int, rngs: nnx.Rngs):
        stride = 1 if inputs == filters else 2
        self.conv1 = conv(inputs, filters, rngs, stride=stride, use_bias=True)
        self.norm1 = norm(filters, rngs)
        self.conv2 = conv(filters, filters, rngs, use_bias=True)
        self.norm2 = norm(filters, rngs)
        self.projection = Projection(inputs, filters, stride, rngs, use_bias=True) if inputs != filters else None
        self.reduce = linear(filters, filters // REDUCTION, rngs)
        self.expand = linear(filters // REDUCTION, filters, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        squeezed = jnp.mean(y, axis=(1, 2))
        weights = nnx.sigmoid(self.expand(nnx.relu(self.reduce(squeezed))))
        shortcut = x if self.projection is None else self.projection(x)
        return nnx.relu(y * weights[:, None, None] + shortcut)


def senet18(image_shape: tuple[int, int, int], classes: int, rngs: nnx.Rngs) -> ResNet:
    """SENet-18 in its CIFAR form."""
    return ResNet(SEBlock, (64, 128, 256, 516), 2, image_shape, classes, rngs, use_bias=True)
