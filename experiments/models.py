"""The residual networks for small images, in Flax NNX.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, section 4.2:
a 3x3 convolution, three stages of n blocks with 16, 32 and 64 filters, the mean over the image, and a linear
layer: 6 n + 2 layers. The first block of stages two and three halves the image. Shortcuts have no parameters
("option A"): every second pixel, and zeros for the new channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

BLOCKS = {"resnet8": 1, "resnet20": 3}
TITLES = {"resnet8": "ResNet-8", "resnet20": "ResNet-20"}


def _conv(inputs: int, filters: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        filters,
        (3, 3),
        stride,
        padding=1,
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


def _norm(filters: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # The running mean of flax's default, 0.99, still remembers the initial network after a short training.
    return nnx.BatchNorm(filters, momentum=0.9, rngs=rngs)


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut, [N, H, W, inputs] -> [N, H / stride, W / stride, filters]."""

    def __init__(self, inputs: int, filters: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = _conv(inputs, filters, stride, rngs)
        self.norm1 = _norm(filters, rngs)
        self.conv2 = _conv(filters, filters, 1, rngs)
        self.norm2 = _norm(filters, rngs)
        self.stride = stride
        self.new_channels = filters - inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, inputs] -> [N, H / stride, W / stride, filters]."""
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], [(0, 0)] * 3 + [(0, self.new_channels)])
        return nnx.relu(y + shortcut)


class ResNet(nnx.Module):
    """ResNet of 6 n + 2 layers, images [N, H, W, channels] -> logits [N, classes]."""

    def __init__(self, n: int, channels: int, classes: int, rngs: nnx.Rngs):
        self.conv = _conv(channels, 16, 1, rngs)
        self.norm = _norm(16, rngs)
        blocks = []
        for inputs, filters in ((16, 16), (16, 32), (32, 64)):
            blocks.append(Block(inputs, filters, filters // inputs, rngs))
            blocks += [Block(filters, filters, 1, rngs) for _ in range(n - 1)]
        self.blocks = nnx.Sequential(*blocks)
        self.linear = nnx.Linear(64, classes, kernel_init=nnx.initializers.he_normal(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, channels] -> [N, classes]."""
        x = self.blocks(nnx.relu(self.norm(self.conv(x))))
        return self.linear(jnp.mean(x, axis=(1, 2)))


def create(name: str, channels: int, seed: int) -> tuple[Any, Any, Any]:
    """A new network of ten classes.

    Args:
      name: a key of `BLOCKS`.
      channels: of the images.
      seed: of the initial parameters.

    Returns:
      The network's structure, its parameters, and its batch statistics, for `nnx.merge`.
    """
    network = ResNet(BLOCKS[name], channels, 10, nnx.Rngs(seed))
    # Typed as a tuple of any length.
    parts: Any = nnx.split(network, nnx.Param, nnx.BatchStat)
    return parts


def resnet18_shapes() -> dict[str, Any]:
    """The shapes of ResNet-18's parameters in its CIFAR form, on which PowerSGD's paper counts its bytes.

    62 tensors, 11,173,962 parameters.
    """
    shapes: dict[str, Any] = {"conv": (3, 3, 3, 64), "bn": {"scale": (64,), "bias": (64,)}}
    width = 64
    for stage, filters in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name = f"stage{stage}_{block}"
            shapes[name] = {
                "conv1": (3, 3, width, filters),
                "bn1": {"scale": (filters,), "bias": (filters,)},
                "conv2": (3, 3, filters, filters),
                "bn2": {"scale": (filters,), "bias": (filters,)},
            }
            if width != filters:
                shapes[name]["shortcut"] = (1, 1, width, filters)
                shapes[name]["bn3"] = {"scale": (filters,), "bias": (filters,)}
            width = filters
    shapes["linear"] = {"kernel": (512, 10), "bias": (10,)}
    return shapes
