"""Dynamic loss scaling, for gradients that are computed in float16.

Small gradients are lost in float16. So the loss is multiplied by a scale before it is differentiated, and gradients are
divided by it afterwards. If a gradient overflows, the step is skipped and the scale falls. After some steps without an
overflow it rises (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2).
"""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradcomp_jax.arguments import factory
from gradcomp_jax.compressor import compressor_states, skipped_steps
from gradcomp_jax.contract import require_whole


class LossScaleState(NamedTuple):
    """State of `loss_scaled`.

    Attributes:
      inner: the state of the optimiser inside.
      scale: float32, the factor for the next step's loss.
      steps: int32, steps since the scale last changed or a step was last skipped.
    """

    inner: Any
    scale: jax.Array
    steps: jax.Array


@factory
def loss_scaled(
    tx: optax.GradientTransformation, *, initial: float = 2.0**15, factor: float = 2.0, period: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """Dynamic loss scaling around a whole optimiser, including its codec.

    `train_step` and `simulate` multiply the loss by the scale before they differentiate it. In a step of your own,
    multiply it by `loss_scale(opt_state)`. Gradients are divided by the scale before they reach the codec. So residuals
    are in true units, and stay right when the scale changes. If gradients were unscaled behind the codec, residuals of
    one scale would be applied at another. When the codec skips a step, because some worker's gradient overflowed, the
    scale is divided by `factor` on all workers. It does not fall below 1.

    Args:
      tx: the optimiser, with a codec inside: `optax.chain(powersgd(2), optax.adam(1e-3))`.
      initial: the first scale.
      factor: the factor by which it rises and falls.
      period: steps without a skip after which it rises.

    Returns:
      A transformation that is the whole optimiser.

    Raises:
      ValueError: a setting is out of range; in init, tx holds no codec, and nothing else notices an overflow on another
        worker; or a parameter is in float16, where gradients cannot be unscaled without loss.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = gcj.loss_scaled(optax.chain(gcj.powersgd(2), optax.adam(1e-3)), initial=2.0**12)
    """
    for name, value, least in (("initial", initial, 1), ("factor", factor, 1)):
        if not isinstance(value, numbers.Real) or not least <= value < float("inf") or (name, value) == ("factor", 1):
            raise ValueError(f"{name}={value!r} must be a number of at least 1" + " and not 1" * (name == "factor"))
    require_whole("period", period, 1)
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> LossScaleState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.result_type(leaf) == jnp.float16:
                raise ValueError(
                    f"loss_scaled: parameter {jax.tree_util.keystr(path)} is in float16, and so would be its gradient, "
                    "which loses small values when it is unscaled: keep parameters in float32, and cast them in loss_fn"
                )
        state = inner.init(params)
        if loss_scales(state):
            raise ValueError("loss_scaled is inside loss_scaled: the loss would be multiplied by one of the two scales")
        if not compressor_states(state):
            raise ValueError(
                "loss_scaled goes around the whole optimiser, with the codec inside, as in loss_scaled(optax.chain("
                "powersgd(2), optax.sgd(0.1))): tx holds no codec. Behind a codec it would unscale too late"
            )
        return LossScaleState(state, jnp.float32(initial), jnp.int32(0))

    def update_fn(
        updates: Any, state: LossScaleState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LossScaleState]:
        unscaled = jax.tree.map(lambda g: g / state.scale.astype(g.dtype), updates)
        updates, after = inner.update(unscaled, state.inner, params, **extra_args)
        good = skipped_steps(after) == skipped_steps(state.inner)
        steps = jnp.where(good, state.steps + 1, 0)
        rises = steps == period
        higher = state.scale * jnp.float32(factor)
        risen = jnp.where(rises & jnp.isfinite(higher), higher, state.scale)
        scale = jnp.where(good, risen, state.scale / factor)
        return updates, LossScaleState(after, jnp.maximum(scale, 1), jnp.where(rises, 0, steps))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loss_scale(opt_state: Any) -> jax.Array:
    """The factor for the loss of the next step, float32; 1 without a `loss_scaled`.

    Args:
      opt_state: the optimiser's state, in any form; also inside jit.

    Raises:
      ValueError: a part of the optimiser is in a `loss_scaled`, and another codec is not in it; only that part would
        divide its gradients.
    """
    states = loss_scales(opt_state)
    if states and len(compressor_states(states[0].inner)) < len(compressor_states(opt_state)):
        raise ValueError(
            "loss_scaled is around a part of the optimiser, and a codec is outside of it, whose gradients it does not "
            "divide: put it around the whole, as in loss_scaled(optax.partition(...))"
        )
    return states[0].scale if states else jnp.float32(1)


def loss_scales(opt_state: Any) -> list[LossScaleState]:
    """The states of `loss_scaled` in an optimiser's state."""
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_loss_scale) if is_loss_scale(x)]


def is_loss_scale(x: Any) -> bool:
    """Whether `x` is the state of `loss_scaled`."""
    return isinstance(x, LossScaleState)
