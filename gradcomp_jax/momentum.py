"""PowerSGD's momentum, which differs from Nesterov's.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
NeurIPS 2019, arXiv 1905.13727, Algorithm 2, where D_t is the aggregated gradient:

    m_t = decay * m_{t-1} + D_t
    x_t = x_{t-1} - lr * (D_t + m_t)

The Nesterov momentum of optax and PyTorch applies D_t + decay * m_t instead. In a steady state at decay 0.9 the gain
is 11 here and 10 there. At decay 0 the step is twice the learning rate here, and once there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradcomp_jax.arguments import own, require_number


class EFMomentumState(NamedTuple):
    """State of `ef_momentum`.

    Attributes:
      momentum: m, a tree like the parameters.
    """

    momentum: optax.Updates


def ef_momentum(decay: float = 0.9) -> optax.GradientTransformation:
    """Momentum after error feedback, PowerSGD's Algorithm 2; scale its output by the learning rate.

    Args:
      decay: lambda of the paper, in [0, 1); the paper's image experiments use 0.9, its LSTM 0.

    Returns:
      A transformation from the aggregated gradient D to D + m.

    Raises:
      ValueError: decay is not in [0, 1).

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.powersgd(rank=2), gcj.ef_momentum(0.9), optax.scale_by_learning_rate(0.1))
    """
    if not isinstance(decay, jax.Array):  # optax.inject_hyperparams makes an array of a number or a schedule
        require_number("decay", decay, "a number; a schedule goes through optax.inject_hyperparams(ef_momentum)")
        decay = own("decay", decay)
    if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must be in [0, 1)")

    def init_fn(params: optax.Params) -> EFMomentumState:
        return EFMomentumState(jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates: optax.Updates, state: EFMomentumState, params: optax.Params | None = None):
        del params
        momentum = jax.tree.map(lambda m, d: (decay * m + d).astype(m.dtype), state.momentum, updates)
        return jax.tree.map(jnp.add, updates, momentum), EFMomentumState(momentum)

    return optax.GradientTransformation(init_fn, update_fn)
