"""MuLoCo: DiLoCo with Muon for the local steps. Two bits a value are then enough for the differences.

Thérien et al., "MuLoCo: Muon is a practical inner optimizer for DiLoCo", arXiv 2505.23725. For worker w:

    e_w <- beta e_w + Delta_w     sent_w = Q(e_w)     e_w <- e_w - sent_w     theta <- SGD on the mean of sent_w

Q is the statistical quantiser of `gradcomp_jax.codecs.statistical`, with 2 bits, and SGD has Nesterov momentum.
"""

import optax

from gradcomp_jax.arguments import factory
from gradcomp_jax.codecs.statistical import statistical
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.contract import AxisName
from gradcomp_jax.outer import Outer, outer


@factory
def muloco(
    inner: optax.GradientTransformation,
    *,
    every: int = 30,
    residual_decay: float | None = 0.9,
    codec: Compressor | None = None,
    axis_name: AxisName = "data",
) -> Outer:
    """MuLoCo (arXiv 2505.23725): `outer` around Muon, with differences of two bits.

    The settings are those of the authors' code for its runs with compression (416 million parameters, 8 workers):
    H = 30, decay 0.9, SGD with Nesterov momentum 0.8 and learning rate 0.9. Their Muon differs from optax's in its
    coefficients and scale, and trains embeddings, norms and the head by AdamW with the same learning rate; optax's does
    so for leaves that are no matrices.

    Args:
      inner: the optimiser of local steps, such as `optax.contrib.muon(0.02)`.
      every: the local steps of a period, H.
      residual_decay: the share of a residual that an exchange leaves, beta; None: as codec says.
      codec: what compresses the differences; by default `statistical(aggregate="gather")`.
      axis_name: the mesh axis, or axes, of the workers, if codec is not given.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = gcj.muloco(optax.contrib.muon(0.02), every=30)
    """
    codec = statistical(aggregate="gather", axis_name=axis_name) if codec is None else codec
    nesterov = optax.sgd(0.9, momentum=0.8, nesterov=True)
    return outer(inner, every=every, codec=codec, outer=nesterov, residual_decay=residual_decay)
