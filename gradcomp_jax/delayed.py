"""Double buffering: a step applies the exchange of the gradients of the step before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradcomp_jax.compressor import AnyState, Compressor, Delivered
from gradcomp_jax.exchange import collectives
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.sharding import PerWorker
from gradcomp_jax.views import narrow


class DelayedState(NamedTuple):
    """State of `delayed`.

    Attributes:
      codec: the state of the codec's transformation.
      pending: this worker's gradients of the last step, in the parameters' types; the next step exchanges them.
    """

    codec: AnyState
    pending: PerWorker


def delayed(tx: Compressor) -> optax.GradientTransformationExtraArgs:
    """Exchanges the gradients of the step before, and keeps those of this step for the next.

    It is the double buffering of 1-bit SGD (Seide et al., Interspeech 2014); QSGD's experiments use it too. The
    exchange does not wait for this step's gradients, so a runtime with asynchronous collectives (GPU, TPU; not XLA's
    CPU) can run it while they are computed. Gradients are applied one step late, to parameters one step newer than
    those they were computed at.

    The first update is zero, because zeros are exchanged then. A codec that counts or samples steps takes this step
    like others (GradiVeQ without a warm-up, Accordion's first window). After any number of steps, the applied updates,
    the mean of the residuals and the mean of the pending gradients add up to the sum of the mean gradients. A gradient
    that is not finite is skipped in the step that would apply it. `flush` sends the pending gradients. The state is the
    codec's, and each worker's gradients.

    Args:
      tx: a codec, such as `powersgd(rank=2)`.

    Returns:
      A transformation to put first in `optax.chain`, like the codec itself.

    Raises:
      ValueError: tx is not a codec, or it is one for parameters in shards.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.delayed(gcj.onebit()), optax.sgd(0.1))
    """
    if not isinstance(tx, Compressor):
        raise ValueError(f"tx={tx!r} must be a codec, as in optax.chain(delayed(onebit()), optax.sgd(0.1))")
    if tx.settings.inside is not True:
        raise ValueError(
            "tx is for parameters in shards, with across(..., inside=), and their gradients cannot wait: "
            "leave delayed out"
        )
    axes = tx.settings.axes
    axis_name = tx.settings.axis_name if tx.settings.fast is None else axes

    def init_fn(params: Any) -> DelayedState:
        return DelayedState(tx.init(params), PerWorker(jax.tree.map(jnp.zeros_like, params), axis_name, "pending"))

    def update_fn(updates: Any, state: DelayedState, params: Any = None, **extra_args: Any):
        leaves, _ = flatten(updates)
        collectives.workers(axis_name)
        collectives.require_local(list(leaves.items()), axis_name)
        collectives.require_same_elsewhere(list(leaves.items()), axis_name)
        applied, codec = tx.update(state.pending.value, state.codec, params, **extra_args | {"fresh": False})
        # The state keeps its types, which are the parameters', even if gradients have others.
        applied = jax.tree.map(lambda a, g: narrow(a, g.dtype), applied, updates)
        pending = jax.tree.map(lambda g, p: narrow(g, p.dtype), updates, state.pending.value)
        late = lambda codec: DelayedState(codec, PerWorker(pending, axis_name, "pending"))  # noqa: E731
        return applied, Delivered(late(codec.state), codec.beside) if isinstance(codec, Delivered) else late(codec)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
