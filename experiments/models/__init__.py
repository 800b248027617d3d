"""The papers' networks for small images, in Flax NNX, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx, traverse_util

from experiments.models import densenet, layers, resnet, senet, vgg


class _Network(NamedTuple):
    title: str
    make: Callable[[tuple[int, int, int], int, nnx.Rngs], nnx.Module]
    smallest: int = 1  # height and width that leave a pixel after all poolings


_NETWORKS = {
    "resnet8": _Network("ResNet-8", partial(resnet.of_depth, 8)),
    "resnet8gn": _Network("ResNet-8 with group norms", partial(resnet.of_depth, 8, norm=layers.group_norm)),
    "resnet20": _Network("ResNet-20", partial(resnet.of_depth, 20)),
    "resnet32": _Network("ResNet-32", partial(resnet.of_depth, 32)),
    "resnet110": _Network("ResNet-110", partial(resnet.of_depth, 110)),
    "resnet18": _Network("ResNet-18", resnet.resnet18),
    "vgg12": _Network("VGG-12", vgg.vgg12, smallest=15),
    "vgg19": _Network("VGG-19-bn", vgg.vgg19, smallest=32),
    "senet18": _Network("SENet-18", senet.senet18),
    "densenet": _Network("DenseNet-121 (k=12)", densenet.DenseNet, smallest=8),
}

NAMES = {name: network.title for name, network in _NETWORKS.items()}


def create(name: str, image_shape: tuple[int, int, int], classes: int, seed: int) -> tuple[Any, Any, Any]:
    """A new network: `network(x, rngs=None)`, images [N, height, width, channels] -> logits [N, classes].

    The rngs are for dropout: a training step of a network that has it needs them, and after `network.eval()` none does.

    Args:
      name: a key of `NAMES`.
      image_shape: height, width and channels.
      classes: how many.
      seed: of the initial parameters.

    Returns:
      The network's structure, its parameters, and its batch statistics, for `nnx.merge`. Without batch normalization
      the statistics are empty.

    Raises:
      ValueError: if the images are smaller than the network's poolings can halve.
    """
    title, make, smallest = _NETWORKS[name]
    height, width, _ = image_shape
    if min(height, width) < smallest:
        raise ValueError(f"{title} needs images of {smallest}x{smallest} or more, got {height}x{width}")
    # Typed as a tuple of any length.
    parts: Any = nnx.split(make(image_shape, classes, nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
    return parts


def resnet18_shapes() -> dict[str, Any]:
    """The shapes of ResNet-18's parameters for CIFAR-10, on which PowerSGD's paper counts its bytes.

    62 tensors, 11,173,962 parameters. Kernels are [height, width, inputs, outputs].
    """
    return shapes(lambda: create("resnet18", (32, 32, 3), 10, 0)[1])


def shapes(params: Callable[[], Any]) -> dict[str, Any]:
    """The shapes of the parameters that a function makes, as a tree of dicts; nothing is computed."""
    # Blocks are numbered: as strings, so that a leaf's path, split at its slashes, leads to it.
    found = nnx.to_flat_state(jax.eval_shape(params))
    return traverse_util.unflatten_dict({tuple(map(str, path)): variable.shape for path, variable in found})
