"""Puts state, parameters and batches where the steps on a mesh want them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.arguments import require_arrays, require_transformation
from gradcomp_jax.mesh import automatic, in_automatic_axes, lies_on, require_mesh
from gradcomp_jax.outer_state import require_whole_optimiser
from gradcomp_jax.replicas import differing
from gradcomp_jax.sharding import (
    PerWorker,
    global_state,
    leading_of,
    map_per_worker,
    marked,
    require_lying,
    require_workers,
    specs_of,
    state_specs,
)


def init(tx: optax.GradientTransformation, params: Any, mesh: Mesh | int | None = None, param_specs: Any = None) -> Any:
    """The optimiser's first state in its global form, for `train_step`, `simulate` or your own shard_map.

    Args:
      tx: the optimiser, with or without codecs.
      params: the parameters.
      mesh: the mesh of the step, by default of all devices; or, for `simulate`, the number of workers.
      param_specs: as in `state_specs`, for parameters that are sharded over the chips of a worker.

    Returns:
      A state like `tx.init(params)`. State that differs between workers has a leading axis for them. It is sharded over
      the mesh.

    Raises:
      ValueError: a codec's axis_name is not an axis of the mesh, or a codec refuses `params` or their sharding.
    """
    require_transformation(tx)
    require_arrays("params", params)
    mesh = require_mesh(mesh)
    if isinstance(mesh, int) or param_specs is None:
        return init_parts(tx, params, mesh, lambda state: state)
    mesh = automatic(mesh)
    return in_automatic_axes(mesh, functools.partial(_init_in_shards, tx, mesh, param_specs))(params)


def init_parts(tx: optax.GradientTransformation, params: Any, mesh: Mesh | int, choose: Callable[[Any], Any]) -> Any:
    """The part of the first state in its global form that `choose` picks; no other part is made."""
    first = lambda params: choose(global_init(tx, mesh, params))  # noqa: E731
    if isinstance(mesh, int):
        return in_automatic_axes(mesh, jax.jit(first))(params)
    mesh = automatic(mesh)
    jax.eval_shape(first, params)  # refuses a wrong axis before it is used in a sharding
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), choose(state_specs(tx, params)))
    made = jax.jit(first, out_shardings=shardings)
    return in_automatic_axes(mesh, lambda params: made(place(params, mesh)))(params)


def global_init(tx: optax.GradientTransformation, mesh: Mesh | int, params: Any) -> Any:
    """The first state in its global form, anywhere; as shapes it can be had for a mesh whose devices are absent too."""
    state = _with_axes(mesh, tx.init)(params)
    require_whole_optimiser(state)
    require_lying(state, None)
    return _of_all(state, mesh)


def _of_all(state: Any, mesh: Mesh | int) -> Any:
    """The global form of a local state; each worker has the same."""
    rows_of = leading_of(mesh)

    def stack(x: PerWorker) -> PerWorker:
        lead = rows_of(x)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*lead, *leaf.shape)), x)

    return map_per_worker(stack, state, lambda x: x)


def spread(state: Any, mesh: Mesh | int) -> Any:
    """The global form of a local state, on the mesh: each worker gets a copy of the one worker's state."""
    of_all = functools.partial(_of_all, mesh=mesh)
    if isinstance(mesh, int):
        return jax.jit(of_all)(state)
    mesh = automatic(mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(state))
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), state)
    made = jax.jit(of_all, out_shardings=shardings)
    return in_automatic_axes(mesh, lambda state: made(_placed(state, everywhere, mesh)))(state)


def _init_in_shards(tx: optax.GradientTransformation, mesh: Mesh, param_specs: Any, params: Any) -> Any:
    """`init` for parameters in shards: each chip sees its shard."""
    params = _placed(params, jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), params, param_specs), mesh)
    specs = state_specs(tx, params, param_specs)
    made = lambda params: global_state(tx.init(params))  # noqa: E731
    return jax.jit(jax.shard_map(made, mesh=mesh, in_specs=(param_specs,), out_specs=specs, check_vma=False))(params)


def _with_axes(mesh: Mesh | int, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Calls `f` where the axes of the mesh are bound, so `f` may ask for their sizes."""
    if isinstance(mesh, int):
        return f

    def called(x: Any) -> Any:
        bound = lambda _: f(x)  # noqa: E731
        for name, size in mesh.shape.items():
            bound = jax.vmap(bound, in_axes=None, out_axes=None, axis_name=name, axis_size=size)
        return bound(())

    return called


def place(tree: Any, mesh: Mesh | None = None) -> Any:
    """Puts parameters, an optimiser state, or a tree that holds them where the step on this mesh wants them.

    State that differs between workers is sharded over them, and all else is replicated. A fresh TrainState gets the
    global form of its optimiser's state. Parameters that lie in shards on this mesh already stay as they lie.

    If parameters lie on one device, such as new ones, a step of your own compiles twice: for them, and for the
    parameters that it returned. For placed parameters it compiles once. Arrays that were restored from a checkpoint may
    be committed to one device; the step refuses them there.

    Args:
      tree: numpy or jax arrays; an optimiser state in its global form; a TrainState, fresh too.
      mesh: the mesh of the step, by default of all devices.

    Returns:
      The same tree on the mesh. Arrays that lie there already are not copied.

    Raises:
      ValueError: the optimiser state has another number of workers, or several processes give different values.

    >>> import jax.numpy as jnp
    >>> import gradcomp_jax as gcj
    >>> gcj.place({"w": jnp.ones(3)}, gcj.make_mesh(1))["w"].sharding.is_fully_replicated
    True
    """
    mesh = automatic(require_mesh(mesh, or_workers=False))
    tree = in_global_form(tree, mesh)
    require_workers(tree, mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(tree))
    return in_automatic_axes(mesh, lambda tree: _placed(tree, shardings, mesh))(tree)


def _placed(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Puts each leaf where its sharding says; what processes share must be the same on all.

    Every process puts its own values on its own devices, and only a checksum is sent: `jax.device_put` would send each
    array whole, to compare it.
    """
    placed = jax.tree.map(_put, tree, shardings)
    if mesh.is_multi_process:
        new = jax.tree.map(lambda old, new: None if new is old else new, tree, placed)
        if found := differing(new, mesh):
            raise ValueError(
                f"leaf {next(iter(found))} differs between the processes, and is to be the same on all: make it from "
                "one seed on all, or take the first process's by "
                "jax.experimental.multihost_utils.broadcast_one_to_all(tree)"
            )
    return placed


def _put(x: Any, sharding: NamedSharding) -> Any:
    if not hasattr(x, "dtype"):  # such as a step number beside the arrays
        return x
    if lies_on(x, sharding.mesh) and sharding.spec == P():
        return x
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    host = np.asarray(jax.device_get(x))
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def shard_batch(batch: Any, mesh: Mesh | None = None) -> Any:
    """Makes one batch over the mesh from the rows that each process has read.

    Args:
      batch: this process's rows, arrays [rows, ...]. Every process has the same number, which divides among its
        devices. With one process it is the whole batch.
      mesh: the mesh of the step, by default of all devices.

    Returns:
      Arrays with the rows of all processes, in the order of the mesh, split over all its axes.

    Raises:
      ValueError: the rows of a leaf do not divide among this process's devices.

    >>> import numpy as np
    >>> import gradcomp_jax as gcj
    >>> gcj.shard_batch({"x": np.ones((8, 3))}, gcj.make_mesh(1))["x"].shape
    (8, 3)
    """
    mesh = automatic(require_mesh(mesh, or_workers=False))
    sharding = NamedSharding(mesh, P(tuple(mesh.axis_names)))
    require_divisible(batch, len(mesh.local_devices), f"the {len(mesh.local_devices)} devices of this process")

    def whole(x: Any) -> jax.Array:
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(whole(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(sharding, np.asarray(jax.device_get(x)))

    return in_automatic_axes(mesh, functools.partial(jax.tree.map, whole))(batch)


def require_divisible(batch: Any, workers: int, whom: str) -> None:
    """Raises ValueError, with the leaf's name, if the first axes of a batch do not divide among workers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not np.ndim(leaf) or np.shape(leaf)[0] % workers:
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path)!r} of shape {np.shape(leaf)} does not divide among {whom}: "
                "its first axis must be a multiple of them"
            )


def require_parts(batch: Any, workers: int, accumulate: int, whom: str) -> None:
    """Like `require_divisible`, if each worker cuts its part of the batch into further parts."""
    whom += f", and their parts among accumulate={accumulate}" * (accumulate > 1)
    require_divisible(batch, workers * accumulate, whom)


def is_train_state(x: Any) -> bool:
    """Whether `x` is Flax's TrainState, or an object with the same attributes. Flax is not needed for it."""
    return all(hasattr(x, name) for name in ("params", "opt_state", "tx", "step", "replace"))


def in_global_form(tree: Any, mesh: Mesh | int) -> Any:
    """The tree, in which fresh TrainStates hold their optimiser's state for the workers of a mesh.

    `TrainState.create` makes the local form, see `gradcomp_jax.sharding`. Each worker gets the state that the local
    form keeps for one, so the mean debt of the workers stays.

    Raises:
      ValueError: a TrainState of a codec under `across` is in its local form and is not new.
    """
    return jax.tree.map(lambda x: _in_global_form(x, mesh) if is_train_state(x) else x, tree, is_leaf=is_train_state)


def _in_global_form(state: Any, mesh: Mesh | int) -> Any:
    local = marked(jax.eval_shape(state.tx.init, state.params))
    found = marked(state.opt_state)
    shapes = [[np.shape(leaf) for x in values for leaf in jax.tree.leaves(x)] for values in (local, found)]
    if not shapes[0] or shapes[0] != shapes[1]:
        return state
    if isinstance(jax.tree.leaves(found)[0], jax.ShapeDtypeStruct):
        made = jax.eval_shape(lambda params: global_init(state.tx, mesh, params), state.params)
        return state.replace(opt_state=made)
    if all(x.shards is None for x in found):
        return state.replace(opt_state=spread(state.opt_state, mesh))
    if any(np.any(jax.device_get(leaf)) for x in found for leaf in jax.tree.leaves(x)):
        raise ValueError(
            "the optimiser's state in a TrainState is one worker's, of a codec that is across slices, and not new: "
            "give the one that the steps returned, or state.replace(opt_state=init(tx, params, mesh))"
        )
    return state.replace(opt_state=init(state.tx, state.params, mesh))
