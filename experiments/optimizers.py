"""The optimisers and learning rates of the papers' experiments, behind any codec."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradcomp_jax import ef_momentum

OPTIMIZERS = ("sgd", "ef_momentum", "adagrad", "adam")
SCHEDULES = ("cosine", "step")


def optimizer(
    name: str, codec: optax.GradientTransformation, schedule: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """The codec, and after it the optimiser.

    Weight decay comes after the reduction, so it is not compressed. It leaves out biases and the parameters of
    normalisation, like in PowerSGD's experiments.

    Args:
      name: "sgd", with (heavy-ball) momentum; "ef_momentum", PowerSGD's Algorithm 2; "adagrad", 1-bit SGD's optimiser,
        with momentum after it; or "adam". The weight decay of the last two is decoupled.
      codec: the codec, which comes first.
      schedule: a function from the number of steps done to the learning rate.
      momentum: the momentum of all but "adam", which has its own.
      weight_decay: lambda in D + lambda x.
    """
    if name == "adam":
        return optax.chain(codec, optax.adamw(schedule, weight_decay=weight_decay, mask=decayed))
    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    if name == "sgd":
        return optax.chain(codec, decay, optax.sgd(schedule, momentum=momentum))
    if name == "adagrad":
        return optax.chain(codec, scale_by_adagrad(), decay, optax.sgd(schedule, momentum=momentum))
    return optax.chain(codec, decay, ef_momentum(momentum), optax.scale_by_learning_rate(schedule))


def scale_by_adagrad(eps: float = 1e-7) -> optax.GradientTransformation:
    """AdaGrad: h <- h + g^2, then g / (sqrt(h) + eps), from h = 0.

    1-bit SGD (Seide et al., Interspeech 2014) has it after the aggregation and before momentum. optax's scale_by_rss
    has eps in the root, which gives another step for gradients below eps.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(lambda h, g: h + g * g, state, updates)
        return jax.tree.map(lambda g, h: g / (jnp.sqrt(h) + eps), updates, state), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def decayed(params: Any) -> Any:
    """Which parameters decay: kernels, not vectors (biases, and the scales and shifts of normalisation)."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def schedule(
    name: str,
    lr: float,
    scale: float,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float,
    decay_epochs: Sequence[float],
) -> optax.Schedule:
    """The learning rate by the number of steps done; its largest value is `scale * lr`.

    Args:
      name: "step", PowerSGD's and Accordion's: in the warm-up linearly from lr, which suits one worker, to scale * lr
        (Goyal et al., arXiv 1706.02677), then down to a tenth at each of decay_epochs. Or "cosine": linearly from 0 in
        the warm-up, then half a cosine back to 0. If a training is not longer than its warm-up, it ends within it.
      lr: the learning rate before it is scaled.
      scale: the factor of the learning rate; PowerSGD and Accordion take the number of workers.
      steps_per_epoch: the number of steps in an epoch.
      epochs: the length of the training; "step" does not depend on it.
      warmup_epochs: the length of the warm-up in epochs.
      decay_epochs: the epochs at which "step" falls, ascending.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    if name == "cosine":
        if warmup >= epochs * steps_per_epoch:
            return optax.linear_schedule(0.0, scale * lr, warmup)
        return optax.warmup_cosine_decay_schedule(0.0, scale * lr, warmup, epochs * steps_per_epoch)
    boundaries = {round(epoch * steps_per_epoch): 0.1 for epoch in decay_epochs}
    decay = optax.piecewise_constant_schedule(1.0, boundaries)

    def step_schedule(count):
        rise = jnp.clip(count / max(warmup, 1), 0.0, 1.0) if warmup else 1.0
        return lr * (1 + (scale - 1) * rise) * decay(count)

    return step_schedule
