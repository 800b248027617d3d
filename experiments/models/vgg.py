"""VGG networks for small images.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, arXiv 1409.1556:
stages of 3x3 convolutions, each stage ended by max pooling, and three linear layers.

* VGG-19-bn: the paper's configuration E (Table 1) with batch normalization after each convolution, linear layers of
  512 in place of 4096, as the image is down to 1x1 there, and dropout of one half before each of them. The form is
  that of Accordion's code (arXiv 2010.16248), as the floats it counts for PowerSGD are of this network.
* QSGD's VGG of 12 layers. What is known is the name alone, and that QSGD trained in CNTK; no layers, widths or number
  of parameters. Ours is CNTK's own VGG for CIFAR-10, which CNTK calls VGG9 after its layers with parameters, and whose
  table has 12 rows: six convolutions, three poolings (3x3, stride 2) and three linear layers. That QSGD's 12 layers
  are these is our guess.
"""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from experiments.models.layers import conv, linear, norm


class Pool(nnx.Module):
    """Max pooling at a stride of 2, [N, H, W, C] -> [N, (H - window) // 2 + 1, (W - window) // 2 + 1, C]."""

    def __init__(self, window: int):
        self.window = (window, window)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.max_pool(x, self.window, (2, 2))


class VGG(nnx.Module):
    """Stages of convolutions, then linear layers, images [N, H, W, channels] -> logits [N, classes].

    Args:
      stages: the filters of each convolution, by stage.
      window: of the pooling that ends each stage, at a stride of 2.
      batch_norm: whether each convolution is followed by batch normalization.
      hidden: outputs of the linear layers before the last.
      dropout: rate, before every linear layer.
      image_shape: height, width and channels.
      classes: how many.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        window: int,
        batch_norm: bool,
        hidden: Sequence[int],
        dropout: float,
        image_shape: tuple[int, int, int],
        classes: int,
        rngs: nnx.Rngs,
    ):
        *size, width = image_shape
        features: list = []
        for stage in stages:
            for filters in stage:
                features.append(conv(width, filters, rngs, use_bias=True))
                features += [norm(filters, rngs), nnx.relu] if batch_norm else [nnx.relu]
                width = filters
            features.append(Pool(window))
            size = [(x - window) // 2 + 1 for x in size]
        self.features = nnx.Sequential(*features)
        inputs = [math.prod(size) * width, *hidden]
        self.hidden = nnx.List([linear(i, o, rngs) for i, o in zip(inputs[:-1], hidden, strict=True)])
        self.linear = linear(inputs[-1], classes, rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[N, H, W, channels] -> [N, classes]; rngs are for dropout while training."""
        x = self.features(x)
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = nnx.relu(layer(self.dropout(x, rngs=rngs)))
        return self.linear(self.dropout(x, rngs=rngs))


def vgg19(image_shape: tuple[int, int, int], classes: int, rngs: nnx.Rngs) -> VGG:
    """VGG-19-bn, 16 convolutions and 3 linear layers."""
    stages = [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4]
    return VGG(stages, 2, True, [512, 512], 0.5, image_shape, classes, rngs)


def vgg12(image_shape: tuple[int, int, int], classes: int, rngs: nnx.Rngs) -> VGG:
    """QSGD's VGG of 12 layers, as far as it is known."""
    stages = [[64] * 2, [96] * 2, [128] * 2]
    return VGG(stages, 3, False, [1024, 1024], 0.0, image_shape, classes, rngs)
