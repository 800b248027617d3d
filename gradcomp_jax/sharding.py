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
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.contract import AxisName
from gradcomp_jax.exchange.collectives import axis_names


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["axis", "role"])
@dataclasses.dataclass(frozen=True)
class PerWorker:
    """State that differs between the workers.

    Attributes:
      value: arrays; local form [...], global form [workers, ...].
      axis: the mesh axis, or axes, along which it differs.
      role: what it is: "owed" to later steps, which `flush` sends; "pending", a gradient that waits for the next step;
        an "estimate", as EF21's; or a part of a codec's own "state".
    """

    value: Any
    axis: AxisName
    role: str = "state"


def is_per_worker(x: Any) -> bool:
    """Whether `x` is wrapped in `PerWorker`."""
    return isinstance(x, PerWorker)


def _map_per_worker(f: Callable[[PerWorker], Any], state: Any, other: Callable[[Any], Any]) -> Any:
    return jax.tree.map(lambda x: f(x) if is_per_worker(x) else other(x), state, is_leaf=is_per_worker)


def _specs(state: Any) -> Any:
    return _map_per_worker(lambda x: jax.tree.map(lambda _: P(x.axis), x), state, lambda _: P())


def state_specs(tx: optax.GradientTransformation, params: Any) -> Any:
    """How the global form of the optimiser's state is sharded.

    Args:
      tx: the optimiser, with or without codecs.
      params: the parameters, or their shapes.

    Returns:
      A tree like `tx.init(params)` with a `PartitionSpec` for each array: over the workers' axis for what
      differs between them, replicated otherwise. It serves as in_specs and out_specs of shard_map.
    """
    return _specs(jax.eval_shape(tx.init, params))


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
    count = _count(mesh)

    def stack(x: PerWorker) -> PerWorker:
        n = count(x.axis)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), x)

    def global_init(params):
        return _map_per_worker(stack, tx.init(params), lambda x: x)

    if isinstance(mesh, int):
        return jax.jit(global_init)(params)
    mesh = automatic(mesh)
    jax.eval_shape(global_init, params)  # refuses a wrong axis before a sharding is made of it
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tx, params))
    return jax.jit(global_init, out_shardings=shardings)(jax.device_put(params, NamedSharding(mesh, P())))


def resize_workers(opt_state: Any, mesh: Mesh | int) -> Any:
    """The optimiser's state for another number of workers.

    From n to m workers, where m divides n, a new worker gets the mean over n / m old ones; otherwise each gets
    the mean over all. So the mean over the workers, which is what error feedback owes, stays; all that does not
    differ between the workers is untouched. Of integers, such as the lengths that `code_bits` reads, it gets the first.

    Args:
      opt_state: the global form, as `init` and the steps return it, or as read from a checkpoint. With several
        processes it must lie on the devices of `mesh`.
      mesh: the new mesh; or, for `simulate`, the new number of workers.

    Returns:
      The global form for the new workers, sharded over the mesh.

    Raises:
      ValueError: the leaves of opt_state do not begin with one number of workers, its axes are not axes of the
        mesh, there is no worker, or several processes hold it on other devices.

    >>> import jax.numpy as jnp
    >>> from gradcomp_jax import init, powersgd, resize_workers
    >>> state = init(powersgd(1), {"w": jnp.ones((8, 8))}, 4)
    >>> resize_workers(state, 6).residual.value["w"].shape
    (6, 8, 8)
    """
    count = _count(mesh)

    def resized(x: PerWorker) -> PerWorker:
        new = count(x.axis)
        rows = {leaf.shape[:1] for leaf in jax.tree.leaves(x)}
        if len(rows) > 1 or () in rows:
            raise ValueError(
                "the leaves of opt_state that differ between workers do not begin with one axis of workers, they have "
                f"{sorted(rows)}: pass the global form, as init and the steps return it"
            )
        return jax.tree.map(lambda old: _regrouped(old, new), x)

    def resize(opt_state):
        return _map_per_worker(resized, opt_state, lambda x: x)

    opt_state = jax.tree.map(functools.partial(_movable, mesh=mesh), opt_state)
    if isinstance(mesh, int):
        return jax.jit(resize)(opt_state)
    jax.eval_shape(resize, opt_state)  # refuses a wrong axis before a sharding is made of it
    shardings = jax.tree.map(lambda spec: NamedSharding(automatic(mesh), spec), _specs(opt_state))
    return jax.jit(resize, out_shardings=shardings)(opt_state)


def _regrouped(old: jax.Array, new: int) -> jax.Array:
    """Rows of old workers as those of new: means of equal groups, or of all; of whole numbers the first of each."""
    groups = new if old.shape[0] % new == 0 else 1
    grouped = old.reshape(groups, -1, *old.shape[1:])
    kept = jnp.mean(grouped, axis=1) if jnp.issubdtype(old.dtype, jnp.inexact) else grouped[:, 0]
    return jnp.broadcast_to(kept, (new, *old.shape[1:]))


def _movable(x: Any, mesh: Mesh | int) -> Any:
    """`x` such that jit takes it to the mesh: on the host, or where several processes share it, on its devices."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if isinstance(mesh, int) or x.sharding.device_set != set(mesh.devices.flat):
            raise ValueError(
                f"an array of opt_state of shape {x.shape} is shared by processes, on other devices than those of the "
                "mesh: save the state, and restore it on the mesh, or as numpy arrays, before resize_workers"
            )
        return x
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x))
    return np.asarray(x)


def require_workers(opt_state: Any, mesh: Mesh | int) -> None:
    """Raises ValueError for a state of another number of workers than the mesh has."""
    count = _count(mesh)
    for x in jax.tree.leaves(opt_state, is_leaf=is_per_worker):
        if is_per_worker(x):
            got = {leaf.shape[:1] for leaf in jax.tree.leaves(x)}
            if got and got != {(count(x.axis),)}:
                raise ValueError(
                    f"opt_state is of {sorted(got)} workers along {x.axis!r}, mesh={mesh} has {count(x.axis)}: pass "
                    "the mesh of the step, or the state through resize_workers first"
                )


def _count(mesh: Mesh | int) -> Callable[[AxisName], int]:
    """The number of workers along the axis of a codec."""
    if isinstance(mesh, int) and mesh < 1:
        raise ValueError(f"there must be at least 1 worker, got {mesh}")

    def count(axis: AxisName) -> int:
        if isinstance(mesh, int):
            return mesh
        missing = set(axis_names(axis)) - set(mesh.axis_names)
        if missing:
            raise ValueError(
                f"the codec's axis_name={axis!r} is not an axis of the mesh, which has {mesh.axis_names}: "
                "give the codec axis_name= one of these"
            )
        return math.prod(mesh.shape[name] for name in axis_names(axis))

    return count
