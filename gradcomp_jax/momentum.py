"""PowerSGD's momentum, which is not Nesterov's.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
NeurIPS 2019, arXiv 1905.13727, Algorithm 2: with the aggregated gradient D_t,

    m_t = decay * m_{t-1} + D_t
    x_t = x_{t-1} - lr * (D_t + m_t)

optax's (and PyTorch's) Nesterov applies D_t + decay * m_t instead. In a steady state at decay 0.9 the gain
here is 11, there 10; at decay 0 this steps by twice the learning rate, there by once.
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
    """Momentum after error feedback, as in PowerSGD's Algorithm 2; to be scaled by the learning rate.

    Args:
      decay: lambda of the paper, in [0, 1); the paper's image experiments use 0.9, its LSTM 0.

    Returns:
      A transformation from the aggregated gradient D to D + m.

    Raises:
      ValueError: decay is not in [0, 1).

    >>> import optax
    >>> from gradcomp_jax import ef_momentum, powersgd
    >>> tx = optax.chain(powersgd(rank=2), ef_momentum(0.9), optax.scale_by_learning_rate(0.1))
    """
    if not isinstance(decay, jax.Array):  # which optax.inject_hyperparams makes of a number or a schedule
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
