"""The layers that the networks share, with He's normal initial kernels."""

from flax import nnx


def conv(inputs: int, filters: int, rngs: nnx.Rngs, size: int = 3, stride: int = 1, use_bias: bool = False) -> nnx.Conv:
    """A convolution of size x size, size odd, [N, H, W, inputs] -> [N, ceil(H / stride), ceil(W / stride), filters]."""
    return nnx.Conv(
        inputs,
        filters,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=use_bias,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


def norm(filters: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch normalization, [..., filters] -> [..., filters]."""
    # The running mean of flax's default, 0.99, still remembers the initial network after a short training.
    return nnx.BatchNorm(filters, momentum=0.9, rngs=rngs)


def group_norm(filters: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group normalization in groups of 8 (Wu and He, ECCV 2018, arXiv 1803.08494), [..., filters] -> [..., filters]."""
    return nnx.GroupNorm(filters, num_groups=None, group_size=8, rngs=rngs)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer, [N, inputs] -> [N, outputs]."""
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
