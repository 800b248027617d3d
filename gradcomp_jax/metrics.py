"""Figures of a compressed training, from the optimiser's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax.arguments import factory, shown
from gradcomp_jax.compressor import Compressor, Estimated, MeasuredState, compressor, compressor_states
from gradcomp_jax.exchange.bits import Links, WireCount
from gradcomp_jax.views import inverse_power, narrow, widen


class LeafMetrics(NamedTuple):
    """Figures of one leaf, as `Metrics` has them of all.

    Attributes:
      error: the relative error of compression.
      residual: the residual over the gradient.
      residual_norm: the 2-norm of the residuals.
      gradient_norm: the 2-norm of the gradients.
    """

    error: jax.Array | None
    residual: jax.Array | None
    residual_norm: jax.Array | None
    gradient_norm: jax.Array | None


class Metrics(NamedTuple):
    """Figures of a compressed training; float32 scalars, or None.

    Attributes:
      bytes: that one worker sent in the last step, by `wire_bits`; of `across`, between the slices.
      bytes_total: in all steps so far.
      skipped: steps that were skipped.
      error: the relative error of compression in the last step, without a unit.
      residual: the residual over the gradient, without a unit.
      residual_norm: the 2-norm of the residuals, in the gradients' unit.
      gradient_norm: the 2-norm of the gradients of the last step.
      leaves: the same four of each compressed leaf, by path.
    """

    bytes: jax.Array
    bytes_total: jax.Array
    skipped: jax.Array
    error: jax.Array | None
    residual: jax.Array | None
    residual_norm: jax.Array | None
    gradient_norm: jax.Array | None
    leaves: dict[str, LeafMetrics]


class _Norms(NamedTuple):
    """2-norms over all that is given of a leaf, or of several: all workers', or one's."""

    residual: jax.Array | None
    gradient: jax.Array | None
    sent: jax.Array | None
    lost: jax.Array | None


@factory
def measured(tx: Compressor) -> Compressor:
    codec = tx
    if not isinstance(codec, Compressor):
        raise ValueError(f"codec={shown(codec)} must be a codec")
    return compressor(codec.codec, codec.settings._replace(measured=True))


@jax.jit
def _metrics(states: list[Any]) -> Metrics:
    leaves: dict[str, _Norms] = {}
    for state in states:
        leaves |= _leaves(state)
    counts = [_between(state.wire) for state in states]
    skipped = [_once(state.skipped, 0).astype(jnp.float32) for state in states]
    every = _Norms(*(_joined([getattr(x, name) for x in leaves.values()]) for name in _Norms._fields))
    whole = _figures(every)
    return Metrics(
        sum(_bytes(x.last) for x in counts),
        sum(_bytes(x.total) for x in counts),
        sum(skipped),
        *whole,
        {path: _figures(x) for path, x in leaves.items()},
    )

def metrics(opt_state: Any) -> Metrics:
    return _metrics(compressor_states(opt_state))


def _leaves(state: Any) -> dict[str, _Norms]:
    measures = isinstance(state, MeasuredState)
    estimates = isinstance(state.codec, Estimated)
    owed = {} if estimates else {path: norm(x) for path, x in state.residual.value.items()}
    if not measures:
        return {path: _Norms(x, None, None, None) for path, x in owed.items()}
    found = {}
    for path, x in state.norms.value.items():
        gradient, sent, lost = (norm(x[..., i]) for i in range(3))
        residual = lost if estimates else owed.get(path, jnp.float32(0))
        found[path] = _Norms(residual, gradient, sent, lost)
    return found


def _figures(x: _Norms) -> LeafMetrics:
    if x.gradient is None:
        return LeafMetrics(None, None, x.residual, None)
    return LeafMetrics(_over(x.lost, x.sent), _over(x.residual, x.gradient), x.residual, x.gradient)


def _over(part, whole):
    return jnp.where((part == 0) & (whole == 0), 0, part / whole)


def _joined(norms: list[Any]):
    norms = [x for x in norms if x is not None]
    return norm(jnp.stack(norms)) if norms else None


def norm(x: jax.Array) -> jax.Array:
    """float32, the 2-norm of all elements of an array."""
    x = widen(x)
    down = inverse_power(jnp.max(jnp.abs(x), initial=0))
    return narrow(jnp.sqrt(jnp.sum((x * down) ** 2)) / down, jnp.float32)


def _between(count: Any) -> WireCount:
    return count.between if isinstance(count, Links) else count


def _once(x: jax.Array, ndim: int) -> jax.Array:
    return x if x.ndim == ndim else x[0]


def _bytes(pair: jax.Array) -> jax.Array:
    high, low = _once(pair, 1).astype(jnp.float32)
    return high * 2.0**29 + low / 8
