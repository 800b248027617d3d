"""Figures of a compressed training, read from the optimiser's state: loss, debt, bytes sent and skipped steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax.arguments import factory, shown
from gradcomp_jax.compressor import AnyState, Compressor, Estimated, MeasuredState, compressor, compressor_states
from gradcomp_jax.exchange.bits import Links
from gradcomp_jax.norms import norm
from gradcomp_jax.views import narrow


class LeafMetrics(NamedTuple):
    """Figures of one compressed leaf; `Metrics` has the same figures for all leaves together.

    Attributes:
      error: the relative error of compression.
      residual: the norm of the residual over the norm of the gradient.
      residual_norm: the 2-norm of the residual.
      gradient_norm: the 2-norm of the gradient.
    """

    error: jax.Array | None
    residual: jax.Array | None
    residual_norm: jax.Array | None
    gradient_norm: jax.Array | None


class Metrics(NamedTuple):
    """Figures of a compressed training, as `metrics` returns them: float32 scalars, or None.

    Norms cover the compressed leaves; leaves that travel dense lose nothing. They are 2-norms over the arrays of all
    workers taken together, as if those were one vector. In the local form they cover this worker's arrays.

    Attributes:
      bytes: the bytes that one worker sent in the last step, counted like `wire_bits` and rounded to float32. With
        `across`, the bytes that one chip sent between slices.
      bytes_total: the bytes of all steps so far, counted the same way.
      skipped: the number of skipped steps.
      error: the relative error of compression in the last step. It is the norm of the unsent part over the norm of the
        whole that was to be sent: the gradient plus the residual, or under `EF21` the change of the gradient. 0 means
        that nothing was lost.
      residual: the norm of the residual over the norm of the last step's gradient: how many gradients are owed. Under
        `EF21` the residual is the gradient minus its estimate. Without error feedback nothing is owed, and this is 0.
      residual_norm: the norm of the residual, in the unit of the gradient.
      gradient_norm: the norm of the last step's gradients, before any mean.
      leaves: by path, `error`, `residual`, `residual_norm` and `gradient_norm` of each compressed leaf.
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
    """A codec that keeps three norms of each compressed leaf, so that `metrics` can tell how much is lost.

    The norms are float32. They are those of this worker in the last step that was compressed: the norm of the gradient,
    the norm of the whole that was to be sent, and the norm of its unsent part. The sent part is this worker's share of
    the mean, times the number of workers. So the error of a worker that encodes the mean again (aggregate="shuffle")
    counts as its own. Squares neither overflow nor vanish, and the norms are right for gradients of any finite
    magnitude. Only a norm 10^8 times smaller than the largest of the three may be rounded to zero.

    Nothing else changes. The codec sends the same messages with the same bits and applies the same mean, except for
    last bits where another program computes in another order. With error feedback a step reads 3 more arrays of the
    gradient's size, and allocates none. Without error feedback the codec must also compute its sent part, one more
    array. There, `powersgd` under `across` also sends this array inside a slice, and `wire_bits` counts it.

    A skipped step leaves the norms unchanged, and so does `flush`. `resize_workers` gives each new worker the mean of
    the old workers' norms, until the next step.

    Args:
      codec: a codec, such as `powersgd(2)`, `accordion(...)` or `across(...)`.

    Returns:
      A `Compressor` that takes the codec's place. Its state is a `MeasuredState`.

    Raises:
      ValueError: `codec` is not a codec. A wrapper such as `delayed` goes around `measured`, as in
        `delayed(measured(onebit()))`.

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
    """Relative error, residual, bytes and skipped steps, for the whole tree and by leaf.

    Call it between steps, or inside jit, shard_map, vmap or pmap: it computes on arrays alone, and nothing waits for
    the result until you read it. It exchanges nothing: inside a step the figures are this worker's, and with `across`
    those of this chip's shards. Norms of residuals are computed from the residuals. The other norms come from
    `measured`, and are zero before its first step. So `residual` is inf for a residual that earlier steps left without
    `measured` (after `swap`, for instance), until the next step.

    What is healthy: `residual_norm` rises in the first steps, and then falls with the loss. If it goes on rising while
    the loss stays or rises, the codec is too strong for the learning rate. `residual` is 2 to 20 gradients while the
    loss falls. It grows where gradients vanish, at the end of a training, and does no harm there. `error` is 0.9 and
    more with error feedback, which sends the rest later; without it, it should stay well below 1. docs/metrics.md has
    measured values.

    Args:
      opt_state: an optimiser state that holds the state of one or more codecs. The figures of several codecs are
        joined: bytes and skipped steps add up, and norms cover all leaves. May be the local form, the global one, or
        one replicated for pmap.

    Returns:
      The figures. If no codec is `measured`, then `error`, `residual` and `gradient_norm` are None. If some codecs are
      not, these three are None for their leaves, which count in `residual_norm` alone. `residual_norm` is None if there
      is no residual to read: under `EF21` without `measured`, and without any compressed leaf.

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


def _paths(state: AnyState) -> list[str]:
    """The paths of the leaves that have figures."""
    residual = {} if isinstance(state.codec, Estimated) else state.residual.value
    return list(state.norms.value if isinstance(state, MeasuredState) else residual)


def _norms(state: AnyState) -> dict[str, _Norms]:
    estimated = isinstance(state.codec, Estimated)
    residuals = {} if estimated else {path: narrow(norm(x), jnp.float32) for path, x in state.residual.value.items()}
    if not isinstance(state, MeasuredState):
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
    """Part / whole; 0 where both are 0."""
    return jnp.where(part == 0, 0, part / whole)


def _joined(norms: Sequence[jax.Array]) -> jax.Array:
    """The norm over all arrays that have these norms."""
    return norm(jnp.stack(norms))


def _total(xs: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(xs))


def _bytes(pair: jax.Array) -> jax.Array:
    """A count of bits, as it is in the state, in bytes, float32."""
    high, low = _first(pair, 1).astype(jnp.float32)
    return high * 2**29 + low / 8


def _first(x: jax.Array, ndim: int) -> jax.Array:
    """A value that is the same everywhere; pmap keeps one copy for each device, and this is the first."""
    return x if x.ndim == ndim else x[0]
