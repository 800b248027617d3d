"""SparseLoCo: local steps, and differences of which the largest few travel, in two bits each.

Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706. For worker w:

    e_w <- beta e_w + Delta_w     sent_w = Q(topk(e_w))     e_w <- e_w - sent_w     theta <- theta - mean of sent_w

topk keeps 64 of each 4096 values, in blocks of 64 x 64 of a matrix, and Q leaves two bits of a value. There is no outer
momentum: the residual, which decays, stands in for it. Covenant-72B (arXiv 2603.08163) was trained so, with H = 30.
"""

import optax

from gradcomp_jax.arguments import factory
from gradcomp_jax.codecs.topk import topk
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.contract import AxisName, Codec
from gradcomp_jax.outer import Outer, outer


@factory
def sparseloco(
    inner: optax.GradientTransformation,
    *,
    every: int = 30,
    residual_decay: float | None = 0.95,
    codec: Compressor | None = None,
    axis_name: AxisName = "data",
) -> Outer:
    """SparseLoCo (arXiv 2508.15706): `outer` with chunked top-k of two bits and a residual that decays.

    The settings are those of Covenant-72B (arXiv 2603.08163), as in its authors' code: 64 of 4096, two bits, decay
    0.95, H = 30, outer learning rate 1 at first. Inner is AdamW there, with betas (0.9, 0.95) and weight decay 0.1. The
    mean is over all workers, as in the paper's algorithm. The code divides each coordinate by the number of workers
    that sent it, and clips workers to the median norm. Two bits mean two levels a chunk here, see `topk`.

    Args:
      inner: the optimiser of local steps, such as `optax.adamw(1e-3, b2=0.95, weight_decay=0.1)`.
      every: the local steps of a period, H; the paper compares 15 to 250.
      residual_decay: the share of a residual that an exchange leaves, beta; None: as codec says.
      codec: what compresses the differences; by default `topk(chunk=4096, k=64, bits=2, aggregate="gather")`. It must
        not be aggregated by "shuffle", which would make the mean sparse once more.
      axis_name: the mesh axis, or axes, of the workers, if codec is not given.

    Raises:
      ValueError: as `outer`; or codec is aggregated by "shuffle", or may be.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = gcj.sparseloco(optax.adamw(1e-3, b2=0.95, weight_decay=0.1), every=30)
    """
    if codec is None:
        codec = topk(chunk=4096, k=64, bits=2, aggregate="gather", axis_name=axis_name)
    elif isinstance(codec, Compressor) and codec.settings.aggregate != "gather" and _is_topk(codec.codec):
        raise ValueError(
            f"codec={codec.name} of sparseloco must have aggregate='gather': by 'shuffle' the mean of the workers' "
            "largest values would itself be cut to the largest"
        )
    return outer(inner, every=every, codec=codec, outer=optax.sgd(1.0), residual_decay=residual_decay)


def _is_topk(codec: Codec) -> bool:
    """Whether it is top-k, or switches between strengths of it."""
    return getattr(codec, "inner", codec).name == "topk"
