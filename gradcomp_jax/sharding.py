"""State across devices: what differs between workers is marked, stored as one global array, and resharded.

Almost all of an optimiser's state is the same on all workers; a residual is not. Returned from shard_map as
if it were replicated, it would silently keep one worker's copy. So a leaf that differs is wrapped in
`PerWorker`, and has two forms:

- *local*, inside a step: this worker's value, shape [...]; what `tx.init(params)` returns;
- *global*, between steps: one array [workers, ...], sharded over its first axis; what `init` returns, and
  what a checkpoint holds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.collectives import AxisName, axis_names


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class PerWorker:
    """State that differs between the workers.

    Attributes:
      value: arrays; local form [...], global form [workers, ...].
      axis: the mesh axis, or axes, along which it differs.
    """

    value: Any
    axis: AxisName


def is_per_worker(x: Any) -> bool:
    """Whether `x` is wrapped in `PerWorker`."""
    return isinstance(x, PerWorker)


def _map_per_worker(f: Callable[[PerWorker], Any], state: Any, other: Callable[[Any], Any]) -> Any:
    return jax.tree.map(lambda x: f(x) if is_per_worker(x) else other(x), state, is_leaf=is_per_worker)


def state_specs(tx: optax.GradientTransformation, params: Any) -> Any:
    """How the global form of the optimiser's state is sharded.

    Args:
      tx: the optimiser, with or without codecs.
      params: the parameters, or their shapes.

    Returns:
      A tree like `tx.init(params)` with a `PartitionSpec` for each array: over the workers' axis for what
      differs between them, replicated otherwise. It serves as in_specs and out_specs of shard_map.
    """
    return _map_per_worker(
        lambda x: jax.tree.map(lambda _: P(x.axis), x), jax.eval_shape(tx.init, params), lambda _: P()
    )


def local_state(state: Any) -> Any:
    """The local form of a state, inside shard_map: strips the leading axis of what differs by worker.

    Raises:
      ValueError: that axis is not 1 here, so the state was not sharded as `state_specs` says.
    """

    def strip(path, x):
        if not is_per_worker(x):
            return x
        for leaf in jax.tree.leaves(x):
            if leaf.ndim == 0 or leaf.shape[0] != 1:
                raise ValueError(
                    f"state leaf {jax.tree_util.keystr(path)} of shape {leaf.shape} is not one worker's row of "
                    "the global form: make the state by init(tx, params, mesh) and pass it through shard_map "
                    "with in_specs from state_specs(tx, params)"
                )
        return jax.tree.map(lambda leaf: leaf[0], x)

    return jax.tree_util.tree_map_with_path(strip, state, is_leaf=is_per_worker)


def global_state(state: Any) -> Any:
    """The inverse of `local_state`: restores the leading axis on the way out of shard_map."""
    return _map_per_worker(lambda x: jax.tree.map(lambda leaf: leaf[None], x), state, lambda x: x)


def automatic(mesh: Mesh) -> Mesh:
    """`mesh` with automatic axes, which take ordinary arrays; those of `jax.make_mesh` are explicit."""
    return Mesh(mesh.devices, mesh.axis_names)


def init(tx: optax.GradientTransformation, params: Any, mesh: Mesh | int) -> Any:
    """The optimiser's first state in its global form, for `train_step`, `simulate` or your own shard_map.

    Args:
      tx: the optimiser, with or without codecs.
      params: the parameters.
      mesh: the mesh of the step; or, for `simulate`, the number of workers.

    Returns:
      Like `tx.init(params)`, with a leading axis for the workers on what differs between them, sharded
      over the mesh.

    Raises:
      ValueError: a codec's axis_name is not an axis of the mesh, or a codec refuses `params`.
    """
    if isinstance(mesh, Mesh):
        mesh = automatic(mesh)

    def workers(axis: AxisName) -> int:
        if isinstance(mesh, int):
            return mesh
        missing = set(axis_names(axis)) - set(mesh.axis_names)
        if missing:
            raise ValueError(
                f"the codec's axis_name={axis!r} is not an axis of the mesh, which has {mesh.axis_names}: "
                "give the codec axis_name= one of these"
            )
        return mesh.shape[axis] if isinstance(axis, str) else math.prod(mesh.shape[name] for name in axis)

    def global_init(params):
        def stack(x: PerWorker) -> PerWorker:
            n = workers(x.axis)
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), x)

        return _map_per_worker(stack, tx.init(params), lambda x: x)

    if isinstance(mesh, int):
        return jax.jit(global_init)(params)
    jax.eval_shape(global_init, params)  # refuses a wrong axis before a sharding is made of it
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tx, params))
    return jax.jit(global_init, out_shardings=shardings)(jax.device_put(params, NamedSharding(mesh, P())))
