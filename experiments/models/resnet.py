"""Residual networks for small images.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385. A 3x3 convolution,
stages of blocks, the mean over the image, and a linear layer. The first block of every stage but the first widens:
it halves the image and has more filters. What its shortcut does then, the paper offers as options:

* Section 4.2, for CIFAR-10: three stages of n blocks with 16, 32 and 64 filters, 6 n + 2 layers, and shortcuts
  without parameters ("option A"): every second pixel, and zeros for the new channels.
* Section 4.1, for ImageNet: four stages with 64, 128, 256 and 512 filters, and a 1x1 convolution with batch
  normalization as such a shortcut ("option B"). The CIFAR form of its ResNet-18, on which PowerSGD and Accordion
  count what they send, has the 3x3 convolution above in place of ImageNet's 7x7 convolution and pooling.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import layers
from experiments.models.layers import conv, linear

Norm = Callable[[int, nnx.Rngs], nnx.Module]


class Projection(nnx.Module):
    """The shortcut of "option B", [N, H, W, inputs] -> [N, H / stride, W / stride, filters]."""

    def __init__(self, inputs: int, filters: int, stride: int, rngs: nnx.Rngs, use_bias: bool = False):
        self.conv = conv(inputs, filters, rngs, size=1, stride=stride, use_bias=use_bias)
        self.norm = layers.norm(filters, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut, [N, H, W, inputs] -> [N, H / stride, W / stride, filters].

    The stride is 2 where the block widens, 1 elsewhere.
    """

    def __init__(self, inputs: int, filters: int, rngs: nnx.Rngs, project: bool = False, norm: Norm = layers.norm):
        self.stride = 1 if inputs == filters else 2
        self.new_channels = filters - inputs
        self.conv1 = conv(inputs, filters, rngs, stride=self.stride)
        self.norm1 = norm(filters, rngs)
        self.conv2 = conv(filters, filters, rngs)
        self.norm2 = norm(filters, rngs)
        self.projection = Projection(inputs, filters, 2, rngs) if project and inputs != filters else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + self.shortcut(x))

    def shortcut(self, x: jax.Array) -> jax.Array:
        """[N, H, W, inputs] -> [N, H / stride, W / stride, filters]: the images themselves, where nothing widens."""
        if self.projection is not None:
            return self.projection(x)
        return jnp.pad(x[:, :: self.stride, :: self.stride], [(0, 0)] * 3 + [(0, self.new_channels)])


class ResNet(nnx.Module):
    """Stages of blocks, images [N, H, W, channels] -> logits [N, classes].

    Args:
      block: makes a block from its inputs, its filters and rngs.
      widths: the filters of each stage.
      blocks: in each stage.
      image_shape: height, width and channels.
      classes: how many.
      rngs: for the initial parameters.
      use_bias: whether the first convolution has one.
      norm: makes the normalization after the first convolution.
    """

    def __init__(
        self,
        block: Callable[[int, int, nnx.Rngs], nnx.Module],
        widths: Sequence[int],
        blocks: int,
        image_shape: tuple[int, int, int],
        classes: int,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        norm: Norm = layers.norm,
    ):
        self.conv = conv(image_shape[-1], widths[0], rngs, use_bias=use_bias)
        self.norm = norm(widths[0], rngs)
        outputs = [filters for filters in widths for _ in range(blocks)]
        inputs = [widths[0], *outputs[:-1]]
        self.blocks = nnx.Sequential(*(block(i, o, rngs) for i, o in zip(inputs, outputs, strict=True)))
        self.linear = linear(widths[-1], classes, rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[N, H, W, channels] -> [N, classes]; rngs are for networks with dropout, which this one has not."""
        x = self.blocks(nnx.relu(self.norm(self.conv(x))))
        return self.linear(jnp.mean(x, axis=(1, 2)))


def of_depth(
    depth: int, image_shape: tuple[int, int, int], classes: int, rngs: nnx.Rngs, norm: Norm = layers.norm
) -> ResNet:
    """The network of section 4.2, of depth 6 n + 2."""
    return ResNet(partial(Block, norm=norm), (16, 32, 64), (depth - 2) // 6, image_shape, classes, rngs, norm=norm)


def resnet18(image_shape: tuple[int, int, int], classes: int, rngs: nnx.Rngs) -> ResNet:
    """ResNet-18 in its CIFAR form."""
    return ResNet(partial(Block, project=True), (64, 128, 256, 512), 2, image_shape, classes, rngs)
