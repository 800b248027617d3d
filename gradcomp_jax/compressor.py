"""The contract between codecs and the rest, and the one place that keeps it.

A *codec* turns this worker's tensors into what goes on the wire and back (`Codec`, `Exchanged`).
`compressor` makes an optax transformation of it: it refuses what must not be summed, chooses the leaves to
compress, adds and stores the residual, keeps what is not finite out, and counts the bits. No codec does any
of that, and nothing else does.

Error feedback, for worker w at step t, with codec C:

    tensors_w = gradient_w + residual_w
    mean, own_w = exchange(tensors_w)             pmean(own_w) = mean
    residual_w <- tensors_w - own_w (+ what the gradients' type cannot hold of the mean)

so that over any steps: sum of applied + mean of residuals = sum of mean gradients.
"""

import collections
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradcomp_jax import collectives
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.metrics import Bits, WireCount, add_bits, no_bits, sum_bits
from gradcomp_jax.sharding import PerWorker
from gradcomp_jax.views import narrow, widen

Tensors = dict[str, jax.Array]
"""Leaves by path ("conv1/kernel"), in float32 or wider."""

Predicate = Callable[[str, Any], bool]
"""(path, leaf with shape and dtype) -> bool."""


class Exchanged(NamedTuple):
    """What a codec's exchange returns.

    Attributes:
      mean: what every worker will apply; bit-identical on all workers.
      own: what this worker added to the mean, times the number of workers: pmean(own) == mean.
      state: the codec's next state; the same on all workers, but for leaves in `PerWorker`.
      bits: wire bits this worker sent; the same number on all workers.
    """

    mean: Tensors
    own: Tensors
    state: Any
    bits: Bits


class Levels(NamedTuple):
    """What a codec offers a controller that switches between two strengths of it, such as `accordion`.

    Attributes:
      setting: the name of the setting that makes the strength, such as "rank".
      value: its value in this codec.
      more_sends_more: whether a larger value sends more.
      others: the codec's other settings, by name.
      build: ((value, ...), error_feedback) -> a codec whose exchange takes `level={path: int32}`, the place of
        each leaf's value among these, and `restart={path: bool}`, where to forget what was learned at another. The
        state serves all of them.
    """

    setting: str
    value: Any
    more_sends_more: bool
    others: dict[str, Any]
    build: Callable[[tuple, bool], "Codec"]


class Codec(NamedTuple):
    """An algorithm, as two pure functions and two rules about leaves.

    Attributes:
      name: the factory's name, for messages.
      init: tensors -> state. Looks at shapes and types only.
      exchange: (tensors, state, axis_name, **extra_args) -> Exchanged, of one tensor at least. The extra
        arguments are those of the transformation's update, and two of `compressor`'s: `gradients`, the tensors
        before the residual was added, and `feedback`, whether what is left out comes back. Pass them on to a
        codec inside.
      default: (path, leaf) -> whether the paper compresses such a leaf.
      shrinks: (path, leaf) -> whether this codec can send such a leaf in fewer bytes than it has.
      linear: whether the compressed form of a sum is the sum of the compressed forms.
      levels: how to switch its strength; None where it has only one.
      flushed: state -> the state once the residual has been sent, for codecs whose state repeats a part of it.
    """

    name: str
    init: Callable[[Tensors], Any]
    exchange: Callable[..., Exchanged]
    default: Predicate
    shrinks: Predicate
    linear: bool = False
    levels: Levels | None = None
    flushed: Callable[[Any], Any] = lambda state: state


class CompressorState(NamedTuple):
    """The state of every codec's transformation.

    Attributes:
      codec: the codec's own state, such as a warm start; the same on all workers, but for leaves in `PerWorker`.
      residual: what error feedback still owes, for each compressed leaf by path; empty without it.
      wire: bits sent, see `wire_bits`.
      skipped: int32, steps in which some worker's gradient was not finite. Such a step yields zeros and
        leaves `codec` and `residual` as they were; what it sent is counted in `wire`.
    """

    codec: Any
    residual: PerWorker
    wire: WireCount
    skipped: jax.Array


class Settings(NamedTuple):
    """The keywords of every factory that `compressor` serves; see there."""

    axis_name: AxisName
    error_feedback: bool
    min_size: int
    compress: Predicate | None
    allow_dense: bool


class Compressor(optax.GradientTransformationExtraArgs):
    """An optax transformation, local gradients in and aggregated gradients out, that carries its codec.

    Attributes:
      codec: the codec.
      settings: with which `compressor` made this of it.
    """

    codec: Codec
    settings: Settings

    def __new__(cls, init: Callable, update: Callable, codec: Codec, settings: Settings) -> "Compressor":
        self = super().__new__(cls, init, update)
        self.codec, self.settings = codec, settings
        return self


def require_static(name: str, value: Any) -> None:
    """Raises ValueError for an argument that jax traces."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is a value that jax traces, but a codec's settings are fixed when it is made: under "
            f"optax.inject_hyperparams name {name!r}, and all other settings of the codec, in static_args"
        )


def require_whole(name: str, value: Any, least: int) -> None:
    """Raises ValueError for an argument that is not a whole number of at least `least`."""
    require_static(name, value)
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def require_fraction(fraction: Any) -> None:
    """Raises ValueError for a share of a leaf's elements that is not above 0 and at most 1."""
    require_static("fraction", fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 1")


def require_indexable(codec: str, path: str, leaf: Any) -> None:
    """Raises ValueError for a leaf whose elements an int32 cannot number."""
    if leaf.size >= 2**31:
        raise ValueError(
            f"leaf {path!r} of shape {leaf.shape} has 2^31 elements or more, which codec {codec!r} cannot number: "
            "leave it out by compress=, or split it"
        )


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a leaf has more than one axis: kernels and embeddings, not biases and scales."""
    del path
    return leaf.ndim > 1


def compressor(
    codec: Codec,
    *,
    axis_name: AxisName,
    error_feedback: bool,
    min_size: int,
    compress: Predicate | None,
    allow_dense: bool,
) -> Compressor:
    """Turns a codec into an optax transformation; the arguments are those of every public factory.

    Args:
      codec: the codec.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep a residual, float32, for each compressed leaf.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress the leaf, such as
        `lambda path, leaf: "embed" not in path`; None leaves it to the codec. Leaves whose payload would not
        be smaller than they are, and those below min_size, are sent dense whatever it says. (Of small leaves
        cut among many workers, the shards' payloads may still add up to more.)
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A transformation to put first in `optax.chain`. Its update takes this worker's own gradients and
      must run where `axis_name` is bound. Where a gradient is not finite on any worker it returns zeros on
      all; `train_step` and `simulate` then keep parameters and optimiser state, while in a bare
      `optax.chain` the zeros reach the next transformation. Means are rounded to the gradient's type and
      kept within its range; error feedback sends later what that takes away. With the extra argument
      flush=True, which `gradcomp_jax.flush` gives, the exchange is dense and the codec's state stays.

      Gradients that are already reduced are refused by name where types are tracked, which is under
      `shard_map(check_vma=True)`; under vmap, pmap and `check_vma=False` that cannot be seen.
    """
    require_whole("min_size", min_size, 0)
    settings = Settings(axis_name, error_feedback, min_size, compress, allow_dense)
    choose = compress or codec.default

    def compressed(path: str, leaf: Any) -> bool:
        return bool(choose(path, leaf)) and leaf.size >= min_size and codec.shrinks(path, leaf)

    def split(tree: Any) -> tuple[Tensors, dict[str, Any], Any]:
        leaves, treedef = flatten(tree)
        tensors: Tensors = {}
        dense: Tensors = {}
        for path, leaf in leaves.items():
            _require_real(codec.name, path, leaf)
            (tensors if compressed(path, leaf) else dense)[path] = widen(leaf)
        if dense and not tensors and not allow_dense:
            path, leaf = max(leaves.items(), key=lambda item: item[1].size)
            raise ValueError(
                f"codec {codec.name!r} would compress none of the {len(dense)} leaves: each is below "
                f"min_size={min_size}, would not shrink, or is left out by "
                f"{'compress=' if compress else 'the rule for its shape'} (the largest is {path!r} of shape "
                f"{leaf.shape}); lower min_size, change compress= or the codec's settings, or pass "
                "allow_dense=True to mean it"
            )
        return tensors, dense, treedef

    def init_fn(params: Any) -> CompressorState:
        tensors, _, _ = split(params)
        residual = jax.tree.map(jnp.zeros_like, tensors) if error_feedback else {}
        return CompressorState(codec.init(tensors), PerWorker(residual, axis_name), no_bits(), jnp.int32(0))

    def update_fn(updates: Any, state: CompressorState, params: Any = None, *, flush: bool = False, **extra_args: Any):
        del params
        collectives.workers(axis_name)
        leaves, treedef = flatten(updates)
        collectives.require_local(list(leaves.items()), axis_name)
        collectives.require_same_elsewhere(list(leaves.items()), axis_name)
        tensors, dense, _ = split(updates)
        _require_state_of(codec.name, state, jax.eval_shape(init_fn, updates))

        gradients = tensors
        if error_feedback:
            tensors = {path: x + state.residual.value[path] for path, x in tensors.items()}
        if flush:
            mean, bits = collectives.mean(tensors, axis_name)
            exchanged = Exchanged(mean, tensors, codec.flushed(state.codec), bits)
        elif not tensors:
            exchanged = Exchanged({}, {}, state.codec, 0)
        else:
            extra_args = {**extra_args, "gradients": gradients, "feedback": error_feedback}
            exchanged = codec.exchange(tensors, state.codec, axis_name, **extra_args)
        dense, dense_bits = collectives.mean(dense, axis_name)

        # Every worker tests the same received values, so all agree without a round of their own.
        mean = {**exchanged.mean, **dense}
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in mean.values()] or [jnp.array(True)]))

        def if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        # What a narrower type cannot hold of the mean stays in the residual too.
        applied = {path: narrow(x, leaves[path].dtype) for path, x in mean.items()}
        residual = {}
        if error_feedback:
            lost = {path: mean[path] - widen(applied[path]) for path in tensors}
            residual = {path: x - exchanged.own[path] + lost[path] for path, x in tensors.items()}
        if flush:
            residual = jax.tree.map(jnp.zeros_like, residual)
        updates = [jnp.where(finite, applied[path], jnp.zeros_like(applied[path])) for path in leaves]
        return jax.tree.unflatten(treedef, updates), CompressorState(
            codec=if_finite(exchanged.state, state.codec),
            residual=PerWorker(if_finite(residual, state.residual.value), axis_name),
            wire=add_bits(state.wire, sum_bits(exchanged.bits, dense_bits)),
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )

    return Compressor(init_fn, update_fn, codec, settings)


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by path, in the tree's order, and its structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    below = collections.Counter(path[:depth] for path, _ in leaves for depth in range(len(path)))

    def name(path: tuple) -> str:
        # An nnx.Variable wraps its array as its only attribute, "value"; nnx.Optimizer initialises from
        # variables and updates from arrays, and both must give the same names.
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value") and below[path[:-1]] == 1:
            path = path[:-1]
        return jax.tree_util.keystr(path, simple=True, separator="/")

    by_path = {name(path): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        raise ValueError("two leaves of the gradients have the same path: a key holds a '/', rename it")
    return by_path, treedef


def skipped(opt_state: Any) -> int:
    """How many steps the codecs in `opt_state` skipped, as some worker's gradient was not finite.

    Args:
      opt_state: an optimiser state that holds the state of one codec, or of several: they add up. May be
        the local form, the global one, or one replicated for pmap.

    Raises:
      ValueError: `opt_state` holds no codec's state.
    """
    states = compressor_states(opt_state)
    if not states:
        raise ValueError(f"opt_state holds no codec's state, so no steps were counted: got {type(opt_state).__name__}")
    return sum(int(np.asarray(state.skipped).reshape(-1)[0]) for state in states)


def skipped_steps(opt_state: Any) -> jax.Array:
    """`skipped` inside a step: int32, of the local form."""
    return jnp.sum(jnp.stack([jnp.int32(0), *(state.skipped for state in compressor_states(opt_state))]))


def compressor_states(opt_state: Any) -> list[CompressorState]:
    """The states of all codecs' transformations in an optimiser state."""
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_compressor_state) if is_compressor_state(x)]


def is_compressor_state(x: Any) -> bool:
    """Whether `x` is the state of a codec's transformation."""
    return isinstance(x, CompressorState)


def _require_real(codec: str, path: str, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"codec {codec!r} takes gradients of real floating type, leaf {path!r} is {leaf.dtype}: keep it "
            "out of the gradients (jax.grad with allow_int=False, optax.masked) or split complex ones into "
            "real and imaginary parts"
        )


def _require_state_of(codec: str, state: CompressorState, expected: CompressorState) -> None:
    """Raises ValueError, naming the leaf, for a state that was not made for gradients like these."""

    def shapes(tree):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path): (x.shape, str(x.dtype)) for path, x in leaves}

    got, want = shapes(state), shapes(expected)
    for path in sorted(got.keys() | want.keys()):
        if got.get(path) != want.get(path):
            raise ValueError(
                f"the state of codec {codec!r} is not one of these gradients: {path} is "
                f"{_describe(got.get(path))}, expected {_describe(want.get(path))}; make the state by "
                "init(tx, params, mesh) from parameters like these, and inside your own shard_map pass it "
                "through local_state first"
            )


def _describe(leaf: tuple | None) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
