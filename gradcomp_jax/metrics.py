"""Figures of a compressed training, read from the optimiser's state: what is lost, owed, sent and skipped."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax.arguments import factory, shown
from gradcomp_jax.compressor import Compressor, CompressorState, Estimated, compressor, compressor_states
from gradcomp_jax.exchange.bits import Links
from gradcomp_jax.norms import norm
from gradcomp_jax.views import narrow


class LeafMetrics(NamedTuple):
    """Figures of one compressed leaf; see `Metrics`, which has the same of all leaves together.

    Attributes:
      error: the relative error of compression.
      residual: the residual over the gradient.
      residual_norm: the 2-norm of the residual.
      gradient_norm: the 2-norm of the gradient.
    """

    error: jax.Array | None
    residual: jax.Array | None
    residual_norm: jax.Array | None
    gradient_norm: jax.Array | None


class Metrics(NamedTuple):
    """Figures of a compressed training, as `metrics` returns them: float32 scalars, or None.

    Norms are over compressed leaves. They are 2-norms of the arrays of all workers taken together, as if they were one
    vector; of the local form they are of this worker's arrays. Of leaves that are sent dense nothing is lost.

    Attributes:
      bytes: that one worker sent in the last step, as `wire_bits` counts them, rounded to float32. Of `across` those
        that one chip sent between slices.
      bytes_total: the same of all steps so far.
      skipped: steps that were skipped.
      error: the relative error of compression in the last step, the norm of what was not sent over the norm of what was
        to be sent. To be sent was the gradient and what error feedback owed; under `EF21` the change of the gradient.
        0 is exact.
      residual: the norm of the residual over the norm of the gradient of the last step: how many gradients are owed.
        Under `EF21` the residual is what the estimate lacks of the gradient. 0 without error feedback, which owes none.
      residual_norm: the norm of the residual, in the unit of the gradient.
      gradient_norm: the norm of the gradients of the last step, before any mean.
      leaves: by path, `error` to `gradient_norm` of each compressed leaf.
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
    """Norms of one leaf, or of several."""

    residual: Any
    gradient: Any = None
    given: Any = None
    lost: Any = None


@factory
def measured(codec: Compressor) -> Compressor:
    """A codec that keeps three norms of each compressed leaf, from which `metrics` tells what is lost.

    They are float32, this worker's, of the last step that was compressed: the norm of the gradient, of what was to be
    sent, and of what of that was not sent. What was sent is what this worker added to the mean, times the number of
    workers; so the error that a worker makes when it encodes the mean again, as by aggregate="shuffle", is its error
    too. Squares neither overflow nor vanish: of gradients of any finite magnitude the norms are right. Only a norm that
    is 10^8 times less than the largest of the three may be rounded to zero.

    Nothing else changes: what is sent, its bits, and what is applied are the codec's own, but for last bits where
    another program computes them in another order. With error feedback a step reads 3 arrays of the gradient's size
    more, and allocates none. Without it the codec has to compute what it sent, which it does not otherwise: one array
    more. There, `powersgd` that is `across` slices also sends that inside a slice, which `wire_bits` counts.

    A skipped step leaves the norms as they were, and so does `flush`. For another number of workers `resize_workers`
    gives each the mean of the old ones' norms, until the next step.

    Args:
      codec: a codec, such as `powersgd(2)`, `accordion(...)` or `across(...)`.

    Returns:
      A `Compressor`, in the place of the codec; its state has `norms`.

    Raises:
      ValueError: codec is none. What goes around codecs goes around this, as in `delayed(measured(onebit()))`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.measured(gcj.topk(0.01)), optax.sgd(0.1))
    """
    if not isinstance(codec, Compressor):
        raise ValueError(
            f"codec={shown(codec)} must be a codec, as in optax.chain(measured(topk(0.01)), optax.sgd(0.1)); what goes "
            "around a codec goes around measured, as in delayed(measured(onebit())), and of a per_layer of several "
            "codecs each is measured"
        )
    return compressor(codec.codec, codec.settings._replace(measured=True))


def metrics(opt_state: Any) -> Metrics:
    """Relative error, residual, bytes and skipped steps, of the whole tree and by leaf.

    It computes on arrays alone, so it can be called between steps or inside jit, shard_map, vmap and pmap; nothing
    waits for the result until it is read. It exchanges nothing: inside a step it tells of this worker, and of
    `across` of this chip's shards. Norms of residuals are read from the residuals, the others from what `measured`
    keeps; before the first step they are zero.

    What is healthy: `residual_norm` rises in the first steps, and then falls with the loss. If it goes on rising while
    the loss stays or rises, the codec is too strong for the learning rate. `residual` is 2 to 20 gradients while the
    loss falls. It grows where gradients vanish, at the end of a training, and does no harm there. `error` is 0.9 and
    more with error feedback, which sends the rest later; without it, it should stay well below 1. docs/metrics.md has
    measured values.

    Args:
      opt_state: an optimiser state that holds the state of one codec, or of several, whose figures are joined: sums of
        bytes and skipped steps, norms over all leaves. May be the local form, the global one, or one replicated for
        pmap.

    Returns:
      The figures. Where no codec is `measured`, `error`, `residual` and `gradient_norm` are None; so they are of the
      leaves of those that are not, which count in `residual_norm` alone. `residual_norm` is None where there is none:
      under `EF21` without `measured`, and without any compressed leaf.

    Raises:
      ValueError: `opt_state` holds no codec's state, or two codecs in it have a leaf of the same path.

    >>> import jax.numpy as jnp
    >>> import gradcomp_jax as gcj
    >>> tx, params = gcj.measured(gcj.topk(0.01)), {"w": jnp.zeros((64, 64))}
    >>> step = gcj.simulate(lambda params, x: jnp.sum(params["w"] * jnp.mean(x)), tx, 4)
    >>> params, opt_state, _ = step(params, gcj.init(tx, params, 4), jnp.ones(8))
    >>> figures = gcj.metrics(opt_state)
    >>> print(f"error {figures.error:.3f}, residual {figures.residual:.3f} gradients, {figures.bytes:.0f} bytes")
    error 0.995, residual 0.995 gradients, 342 bytes
    """
    states = compressor_states(opt_state)
    if not states:
        raise ValueError(
            f"opt_state holds no codec's state, so there are no figures: got {type(opt_state).__name__}; give that of "
            "an optimiser with a codec in it, such as optax.chain(measured(topk(0.01)), optax.sgd(0.1))"
        )
    paths = [path for state in states for path in _paths(state)]
    if double := sorted(path for path in set(paths) if paths.count(path) > 1):
        raise ValueError(
            f"two codecs in opt_state have a leaf {double[0]!r}, of which metrics would tell once: call it with the "
            "state of each by itself"
        )
    return _metrics(states)


@jax.jit
def _metrics(states: list[Any]) -> Metrics:
    leaves = {path: x for state in states for path, x in _norms(state).items()}
    complete = [x for x in leaves.values() if x.gradient is not None]
    together = _figures(_Norms(*map(_joined, zip(*complete, strict=True)))) if complete else _figures(_Norms(None))
    residuals = [x.residual for x in leaves.values() if x.residual is not None]
    counts = [state.wire.between if isinstance(state.wire, Links) else state.wire for state in states]
    figures = LeafMetrics(*together)._replace(residual_norm=_joined(residuals) if residuals else None)
    return Metrics(
        _total([_bytes(count.last) for count in counts]),
        _total([_bytes(count.total) for count in counts]),
        _total([_first(state.skipped, 0).astype(jnp.float32) for state in states]),
        *figures,
        {path: _figures(x) for path, x in leaves.items()},
    )


def _paths(state: CompressorState) -> list[str]:
    """Of the leaves of which there are figures."""
    residual = {} if isinstance(state.codec, Estimated) else state.residual.value
    return list(state.norms.value if state.norms else residual)


def _norms(state: CompressorState) -> dict[str, _Norms]:
    estimated = isinstance(state.codec, Estimated)
    residuals = {} if estimated else {path: narrow(norm(x), jnp.float32) for path, x in state.residual.value.items()}
    if not state.norms:
        return {path: _Norms(x) for path, x in residuals.items()}
    found = {}
    for path, x in state.norms.value.items():
        gradient, given, lost = (norm(x[..., i]) for i in range(3))
        residual = lost if estimated else residuals.get(path, jnp.float32(0))
        found[path] = _Norms(residual, gradient, given, lost)
    return found


def _figures(x: _Norms) -> LeafMetrics:
    if x.gradient is None:
        return LeafMetrics(None, None, x.residual, None)
    return LeafMetrics(_over(x.lost, x.given), _over(x.residual, x.gradient), x.residual, x.gradient)


def _over(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Part / whole; 0 where both are."""
    return jnp.where(part == 0, 0, part / whole)


def _joined(norms: Sequence[jax.Array]) -> jax.Array:
    """The norm over all of which these are the norms."""
    return norm(jnp.stack(norms))


def _total(xs: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(xs))


def _bytes(pair: jax.Array) -> jax.Array:
    """float32, of a count of bits as it is in the state."""
    high, low = _first(pair, 1).astype(jnp.float32)
    return high * 2**29 + low / 8


def _first(x: jax.Array, ndim: int) -> jax.Array:
    """What is the same everywhere; of pmap's copies, one for each device, the first."""
    return x if x.ndim == ndim else x[0]
