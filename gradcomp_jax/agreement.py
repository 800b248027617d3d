"""Keeps the workers alike: tx must give the same on all, or it is refused in our own words."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from gradcomp_jax.contract import AlreadyReducedError, AxisName
from gradcomp_jax.exchange import collectives
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.sharding import PerWorker, is_per_worker

_UPDATES_DIFFER = (
    "the updates of tx still differ between the workers along {axes} at {leaf!r}: put a codec, none() or average() "
    "first in the chain, with the mesh's axis as its axis_name. Leaves that optax.masked or optax.partition keep from "
    "the codec need none() of their own; or leave them to the codec, and out of its compress=. The zeros of "
    "optax.set_to_zero and optax.selective_transform have the type of the gradients and count as different: freeze "
    "after the codec, by optax.chain(codec, optax.freeze(mask), ...), or see train_step"
)
_STATE_DIFFERS = (
    "the state of tx would differ between the workers along {axes} at {leaf!r}: transformations "
    "that keep anything of the gradients (momentum, adam, optax.apply_every, zero_nans) must come after the codec, "
    "which makes the gradients the same on all"
)
_AROUND = (
    "tx calls a codec in some steps only, or with gradients already the same on all workers along {axes}: there is a "
    "wrapper around the codec, such as optax.MultiSteps, apply_if_finite, conditionally_transform or "
    "conditionally_mask, or a second codec behind it. Workers could part, or wait for each other for ever. Put the "
    "wrapper after the codec: optax.chain(codec, optax.MultiSteps(...)). Steps that are not finite the codec skips by "
    "itself; to send once for several batches, let loss_fn average over them. Without a wrapper or second codec, a "
    "transformation before the codec mixes, in its control flow, values that differ between workers with values that "
    "do not: let it start from vary(zeros, axis)"
)
_SEARCHES = (
    "a transformation in tx asks for {asked}, as line searches do. They evaluate the loss at other parameters, on the "
    "whole batch, which a step over several workers cannot give. Use another rule for the learning rate, such as "
    "optax.contrib.reduce_on_plateau, which gets the mean loss as value"
)


class Shapes(NamedTuple):
    """The structure, shapes and types of a tree, as a key to remember it by."""

    treedef: Any
    leaves: tuple

    @classmethod
    def of(cls, tree: Any) -> "Shapes":
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves))

    def tree(self) -> Any:
        return jax.tree.unflatten(self.treedef, [jax.ShapeDtypeStruct(*leaf) for leaf in self.leaves])


@functools.lru_cache(maxsize=64)
def require_agreement(tx: optax.GradientTransformation, sizes: tuple[tuple[str, int], ...], params: Shapes) -> None:
    """Refuses a tx that would let the workers part, in the same words wherever the step then runs.

    Under shard_map, types tell which values may differ between workers. vmap and unchecked steps have no such types.
    For them tx is traced alone, over a mesh of no devices.
    """
    _trace_alone(tx, dict(sizes), params.tree(), check_vma=True)


def _trace_alone(tx: optax.GradientTransformation, sizes: Mapping[str, int], params: Any, check_vma: bool) -> None:
    axes = tuple(sizes)

    def update(grads: Any, state: Any, params: Any) -> None:
        loss = collectives.vary(jnp.float32(0), axes)
        if check_vma:
            update_of(tx, sizes, grads, state, params, loss)
        else:
            _call(tx, grads, state, params, loss, Wire(axes), {})

    on_no_devices(update, tx, sizes, params, check_vma)


def on_no_devices(
    update: Callable[[Any, Any, Any], Any],
    tx: optax.GradientTransformation,
    sizes: Mapping[str, int],
    params: Any,
    check_vma: bool = True,
) -> None:
    """Traces `update(grads, state, params)` of tx over a mesh of no devices, where types tell which values may differ.

    Args:
      update: the function to trace.
      tx: the transformation.
      sizes: the sizes of the workers' axes.
      params: the shapes and types of the parameters.
      check_vma: whether types tell.
    """
    axes = tuple(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), axes, axis_types=(AxisType.Auto,) * len(axes))

    def worker(params: Any) -> None:
        state = jax.tree.map(_vary_per_worker, tx.init(params), is_leaf=is_per_worker)
        update(collectives.vary(params, axes), state, params)

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(jax.shard_map(worker, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check_vma), params)


def update_of(
    tx: optax.GradientTransformation,
    sizes: Mapping[str, int],
    grads: Any,
    state: Any,
    params: Any,
    loss: jax.Array,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """`tx.update`; if types tell which values differ between workers, it refuses in our own words.

    If types are not tracked, it is `tx.update` alone.

    Args:
      tx: the transformation.
      sizes: the sizes of the workers' axes.
      grads: this worker's gradients.
      state: the state.
      params: the parameters.
      loss: this worker's loss; transformations that ask for `value` get its mean.
      **extra_args: the codec's extra arguments.
    """
    axes = tuple(sizes)
    try:
        updates, state = _call(tx, grads, state, params, loss, Wire(axes), extra_args)
    except (TypeError, AlreadyReducedError) as error:
        if not collectives.tracked(axes):
            raise
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        # An update that fails without types too has other reasons, and gives them.
        _trace_alone(tx, sizes, shapes, check_vma=False)
        raise ValueError(_AROUND.format(axes=axes)) from error
    if refusals := _differing(updates, axes, _UPDATES_DIFFER) + _differing(state, axes, _STATE_DIFFERS):
        raise ValueError(refusals[0])
    return updates, state


def _call(
    tx: Any, grads: Any, state: Any, params: Any, loss: jax.Array, wire: Wire, extra_args: Mapping[str, Any]
) -> tuple[Any, Any]:
    update = optax.with_extra_args_support(tx).update
    try:
        return update(grads, state, params, **extra_args)
    except TypeError as error:
        asked = re.findall("'(value|grad|value_fn)'", str(error)) if "required keyword-only" in str(error) else []
        if asked == ["value"]:
            total, _ = wire.total(loss)
            value = total / wire.workers
            return update(collectives.after(grads, value), state, params, value=value, **extra_args)
        if asked:
            raise ValueError(_SEARCHES.format(asked=" and ".join(asked))) from error
        if not extra_args or "unexpected keyword argument" not in str(error):
            raise
        # Perhaps a transformation, such as optax's sam, that takes no arguments but its own.
        return update(grads, state, params)


def _vary_per_worker(x: Any) -> Any:
    return PerWorker(collectives.vary(x.value, x.axis), x.axis) if is_per_worker(x) else x


def _differing(tree: Any, axes: AxisName, refusal: str) -> list[str]:
    return [refusal.format(leaf=leaf, axes=axes) for leaf in differing(tree, axes)]


def differing(tree: Any, axes: AxisName) -> list[str]:
    """The paths of leaves that may differ along `axes` by their types, and are not marked so."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_per_worker)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if not is_per_worker(leaf) and collectives.known_different(leaf, axes)
    ]
