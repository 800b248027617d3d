"""The codecs that the planner compares by default, and what runs of this project say about their accuracy."""

from typing import NamedTuple

import optax

from gradcomp_jax.across import across
from gradcomp_jax.codecs.cast import cast
from gradcomp_jax.codecs.float4 import float4
from gradcomp_jax.codecs.none import none
from gradcomp_jax.codecs.powersgd import powersgd
from gradcomp_jax.codecs.qsgd import qsgd
from gradcomp_jax.codecs.signnorm import signnorm
from gradcomp_jax.codecs.topk import topk
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.methods.diloco import diloco
from gradcomp_jax.methods.sparseloco import sparseloco

# docs/results.md has the runs: ResNet-8 for five epochs of CIFAR-10, on eight workers; the same network on handwritten
# digits; and a language model of 3.2 million parameters, for 480 steps.
_CIFAR = "CIFAR-10: {} %, uncompressed 77.01 %"
_DIGITS = "digits: {} %, uncompressed 98.89 %"
_TEXT = "a small language model: loss {}, uncompressed 1.842"
UNMEASURED = "no measured figure"


class Candidate(NamedTuple):
    """Something to compare.

    Attributes:
      tx: the codec, or the whole optimiser with outer steps.
      accuracy: what runs of this project say about its accuracy.
      offered: whether it may be recommended.
    """

    tx: optax.GradientTransformation
    accuracy: str = UNMEASURED
    offered: bool = True


def codecs() -> dict[str, Candidate]:
    """The codecs by name, those first that change training least.

    Those that lost more than three points of accuracy in these runs are not offered. Nor are those without any figure,
    but for the cast to bfloat16, which rounds to the 8 bits that much training has anyway.
    """
    found = [
        Candidate(cast("bfloat16")),
        Candidate(qsgd(bits=8), _CIFAR.format("76.02")),
        Candidate(qsgd(bits=4), _CIFAR.format("77.13")),
        Candidate(float4(), offered=False),
        Candidate(powersgd(rank=4), _CIFAR.format("74.97")),
        Candidate(signnorm(), _DIGITS.format("98.61")),
        Candidate(powersgd(rank=2), _CIFAR.format("72.85"), offered=False),
        Candidate(topk(0.01), _DIGITS.format("97.50")),
        Candidate(topk(chunk=4096, k=64), offered=False),
        Candidate(powersgd(rank=1), _CIFAR.format("68.37"), offered=False),
    ]
    return {x.tx.name: x for x in found if isinstance(x.tx, Compressor)}


def outer_steps(inner: optax.GradientTransformation, hierarchy: bool) -> dict[str, Candidate]:
    """The presets of outer steps by name; with `hierarchy`, across the axes "node" and "local"."""
    layout = across if hierarchy else lambda codec: codec
    sparse = topk(chunk=4096, k=64, bits=2, aggregate="gather")
    return {
        "diloco, every 30": Candidate(diloco(inner, every=30, codec=layout(none())), _TEXT.format("2.092")),
        "diloco, every 100": Candidate(diloco(inner, every=100, codec=layout(none()))),
        "sparseloco, every 30": Candidate(sparseloco(inner, every=30, codec=layout(sparse))),
    }
