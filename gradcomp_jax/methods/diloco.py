"""DiLoCo, and Streaming DiLoCo.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv 2311.08105, Algorithm 1:
AdamW on each worker, and every H steps the mean difference, uncompressed, through SGD with Nesterov momentum.

Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv 2501.18512, Algorithm 2: the same by
fragments of the layers, in turn, so that less is sent at once. Each fragment is adopted tau steps after it was taken,
as a mix of a worker's own parameters and the anchor. Differences travel as floats of 4 bits.
"""

from collections.abc import Callable

import optax

from gradcomp_jax.arguments import factory
from gradcomp_jax.codecs.float4 import float4
from gradcomp_jax.codecs.none import none
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.contract import AxisName
from gradcomp_jax.outer import Outer, outer


@factory
def diloco(
    inner: optax.GradientTransformation,
    *,
    every: int = 500,
    codec: Compressor | None = None,
    axis_name: AxisName = "data",
) -> Outer:
    """DiLoCo (arXiv 2311.08105): `outer` with the settings of its Table 5.

    There inner is AdamW with learning rate 4e-4, 1,000 steps of warm-up, a decay to 0 and weight decay 0.1, on 8
    workers, for models of 60 to 400 million parameters. The outer optimiser is SGD with Nesterov momentum 0.9 and
    learning rate 0.7. The paper trains 24,000 steps in the ordinary way first.

    Args:
      inner: the optimiser of local steps, such as `optax.adamw(4e-4, weight_decay=0.1)`.
      every: the local steps of a period; the paper compares 50 to 2,000 (Figure 4).
      codec: what compresses the differences; by default nothing does.
      axis_name: the mesh axis, or axes, of the workers, if codec is not given.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = gcj.diloco(optax.adamw(4e-4, weight_decay=0.1), every=500)
    """
    codec = none(axis_name=axis_name) if codec is None else codec
    return outer(inner, every=every, codec=codec, outer=optax.sgd(0.7, momentum=0.9, nesterov=True))


@factory
def streaming_diloco(
    inner: optax.GradientTransformation,
    *,
    every: int = 100,
    fragments: int | Callable[[str], int] = 4,
    delay: int = 1,
    alpha: float = 0.5,
    codec: Compressor | None = None,
    axis_name: AxisName = "data",
) -> Outer:
    """Streaming DiLoCo (arXiv 2501.18512): `outer` by fragments, with a delay, in 4 bits.

    The paper has a fragment for every three layers, in strides (section 3.3.1), and the embeddings as one more. It has
    an outer learning rate of 0.4 (section 3.2), a delay of 1 step, and up to 5 without loss (section 3.3.2). It gives
    neither momentum nor the mix alpha of its main runs: momentum is DiLoCo's here, and alpha is one of the two values
    that it compares. Of the 4-bit floats it gives the bits, a sign and three of an exponent, and no scale or rounding:
    see `float4` for ours.

    Args:
      inner: the optimiser of local steps.
      every: the local steps of a period.
      fragments: as in `outer`.
      delay: as in `outer`. To overlap, make the step by `train_step(..., steps=delay)`.
      alpha: as in `outer`.
      codec: what compresses the differences; by default `float4(aggregate="gather")`.
      axis_name: the mesh axis, or axes, of the workers, if codec is not given.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = gcj.streaming_diloco(optax.adamw(4e-4), every=100, fragments=4, delay=5)
    """
    codec = float4(aggregate="gather", axis_name=axis_name) if codec is None else codec
    momentum = optax.sgd(0.4, momentum=0.9, nesterov=True)
    return outer(inner, every=every, codec=codec, outer=momentum, fragments=fragments, delay=delay, alpha=alpha)
