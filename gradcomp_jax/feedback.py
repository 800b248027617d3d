"""Error feedback: the part of a gradient that a codec did not send, and its way into later steps.

For worker w at step t with codec C. The exchange of C gives mean and own_w, where pmean(own_w) = mean:

| feedback | C is given | memory_w becomes | invariant |
|---|---|---|---|
| `Feedback(decay)` | g_w + decay memory_w | that - own_w | applied + mean memory + what decayed = sum of gradients |
| `EF21()` | g_w - memory_w | memory_w + own_w | applied = mean of the memories |

The first, at decay 1, is the error feedback of Seide et al. (Interspeech 2014) and Karimireddy et al. (ICML 2019): the
memory is a debt, the *residual*. With a decay below 1 (SparseLoCo, arXiv 2508.15706) old debts are forgotten. EF21 is
Richtárik, Sokolov, Fatkhullin, NeurIPS 2021, arXiv 2106.05203: the memory is the worker's estimate of its gradient. The
worker sends the change of this estimate; all workers keep the mean of the estimates, and apply it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gradcomp_jax.arguments import own, require_number
from gradcomp_jax.contract import Sparse


@dataclasses.dataclass(frozen=True)
class Feedback:
    """Ordinary error feedback: the part that is not sent is added to the next gradient; see the module.

    Attributes:
      decay: the share of a debt that remains after a step, above 0 and at most 1.
    """

    decay: float = 1.0

    owes = True  # the memory is a debt, which `flush` sends

    def __post_init__(self) -> None:
        require_number("decay", self.decay)
        object.__setattr__(self, "decay", own("decay", self.decay))
        if not 0 < self.decay <= 1:
            raise ValueError(
                f"decay={self.decay} must be above 0 and at most 1, the share that a step leaves of a residual"
            )

    def owe(self, gradient: jax.Array, memory: jax.Array) -> tuple[jax.Array, ...]:
        """The terms; the codec is given their sum."""
        return gradient, memory if self.decay == 1 else memory * self.decay

    def settle(self, terms: tuple[jax.Array, ...], memory: jax.Array, own: Any, ok: jax.Array) -> jax.Array:
        """The next memory; if not `ok`, the old one."""
        # Computed anew: keeping the sum that the codec was given until here would take a buffer of the gradient's size.
        gradient, owed = jax.lax.optimization_barrier(terms[0]), terms[1]
        return _plus(jnp.where(ok, gradient[None] + owed[None], memory[None]), own, -1, ok)

    def missing(self, gradient: jax.Array, memory: jax.Array) -> jax.Array:
        """The part of its terms that was not sent in the step that left this memory."""
        del gradient
        return memory


@dataclasses.dataclass(frozen=True)
class EF21:
    """EF21 (Richtárik et al., 2021): each worker sends the change of its gradient's estimate; see the module.

    All workers also keep the mean of the estimates, which has the size of the compressed leaves. EF21 is for codecs
    that are contractions; unbiased codecs are scaled down to be contractions.
    """

    owes = False

    def owe(self, gradient: jax.Array, memory: jax.Array) -> tuple[jax.Array, ...]:
        """The terms; the codec is given their sum."""
        return gradient, -memory

    def settle(self, terms: tuple[jax.Array, ...], memory: jax.Array, own: Any, ok: jax.Array) -> jax.Array:
        """The next memory; if not `ok`, the old one."""
        del terms
        return _plus(memory[None], own, 1, ok)

    def missing(self, gradient: jax.Array, memory: jax.Array) -> jax.Array:
        """The part of its terms that was not sent in the step that left this memory."""
        return gradient - memory


def _plus(x: jax.Array, own: Any, share: int, ok: jax.Array) -> jax.Array:
    """`x` [1, ...], plus `share` times `own` [...] if `ok`; the result is [...].

    Between steps, memory has an axis for the workers, [1, ...] on each. The sum is computed in that shape, because
    XLA's CPU backend reuses an operand's buffer only for results of the operand's own shape. Otherwise each step would
    copy the memory.
    """
    if isinstance(own, Sparse):
        kept = jax.tree.map(lambda v: jnp.where(ok, v, 0) if jnp.issubdtype(v.dtype, jnp.inexact) else v, own)
        return kept.added_to(x, share)[0]
    own = jnp.where(ok, own[None], 0)
    # A difference, not a sum with a product by -1: a compiler would contract that with the products that make up own.
    return (x + own if share > 0 else x - own)[0]


def feedback(error_feedback: bool | Feedback | EF21) -> Feedback | EF21 | None:
    """Turns a factory's `error_feedback` into a feedback; None: the part that is not sent is lost.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(error_feedback, Feedback | EF21):
        return error_feedback
    if error_feedback not in (True, False):
        raise ValueError(f"error_feedback={error_feedback!r} must be True, False, Feedback(decay=...) or EF21()")
    return Feedback() if error_feedback else None


def as_given(feedback: Feedback | EF21 | None) -> bool | Feedback | EF21:
    """The inverse of `feedback`, for messages."""
    return False if feedback is None else True if feedback == Feedback() else feedback
