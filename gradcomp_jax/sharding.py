"""State across devices: what differs between workers is marked, stored as one global array, and resharded.

Almost all of an optimiser's state is the same on all workers; a residual is not. Returned from shard_map as
if it were replicated, it would silently keep one worker's copy. So a leaf that differs is wrapped in
`PerWorker`, and has two forms:

- *local*, inside a step: this worker's value, shape [...]; what `tx.init(params)` returns;
- *global*, between steps: one array [workers, ...], sharded over its first axis; what `init` returns, and
  what a checkpoint holds.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.arguments import require_arrays, require_mesh, require_transformation
from gradcomp_jax.contract import AxisName
from gradcomp_jax.cuts import Cut
from gradcomp_jax.exchange.collectives import axis_names
from gradcomp_jax.exchange.plan import axes_of


class _Value(NamedTuple):
    value: Any


class Shards(NamedTuple):
    """That what is in a `PerWorker` is of shards of the leaves, of which each chip of a worker has one.

    Attributes:
      axes: of which each has a leading axis of its own in the global form: the workers', if it differs between them,
        and that of their chips.
      cuts: of each array, in the order of its tree, how the whole is cut; None: the first chip's stands for all.
      lie: where parameters themselves lie in shards, of all leaves the path, and the axis that is cut, or None.
    """

    axes: tuple[AxisName, ...]
    cuts: tuple[Cut | None, ...]
    lie: tuple[tuple[str, int | None], ...] = ()


class PerWorker(_Value):
    """State that differs between the workers.

    It is a NamedTuple of its value alone, and so to jax, `optax.tree_utils` and `flax.serialization` what optax's
    states are; axis and role are of its type, of which there is one for each pair of them.

    Attributes:
      value: arrays; local form [...], global form [workers, ...].
      axis: the mesh axis, or axes, along which it differs.
      role: what it is: "owed" to later steps, which `flush` sends; "pending", a gradient that waits for the next step;
        an "estimate", as EF21's; or a part of a codec's own "state".
      shards: of what `across` keeps of shards, how they lie; else None.
    """

    __slots__ = ()
    axis: AxisName
    role: str
    shards: Shards | None

    def __new__(
        cls, value: Any, axis: AxisName | None = None, role: str = "state", shards: Shards | None = None
    ) -> "PerWorker":
        kind = cls if axis is None else _per_worker(axis, role, shards)
        return super().__new__(kind, value)

    def __reduce__(self) -> Any:
        return PerWorker, (self.value, self.axis, self.role, self.shards)

    def __repr__(self) -> str:
        return f"PerWorker(value={self.value!r}, axis={self.axis!r}, role={self.role!r})"

    @property
    def leading(self) -> tuple[AxisName, ...]:
        """The mesh axes, or groups of them, of each of which the global form has an axis."""
        return (self.axis,) if self.shards is None else self.shards.axes


@functools.cache
def _per_worker(axis: AxisName, role: str, shards: Shards | None) -> type[PerWorker]:
    fields = {"__slots__": (), "__module__": __name__, "axis": axis, "role": role, "shards": shards}
    return type("PerWorker", (PerWorker,), fields)


def is_per_worker(x: Any) -> bool:
    """Whether `x` is wrapped in `PerWorker`."""
    return isinstance(x, PerWorker)


def _map_per_worker(f: Callable[[PerWorker], Any], state: Any, other: Callable[[Any], Any]) -> Any:
    return jax.tree.map(lambda x: f(x) if is_per_worker(x) else other(x), state, is_leaf=is_per_worker)


def specs_of(state: Any) -> Any:
    """The `state_specs` of a state."""
    return _map_per_worker(lambda x: jax.tree.map(lambda _: P(*x.leading), x), state, lambda _: P())


def state_specs(tx: optax.GradientTransformation, params: Any, param_specs: Any = None) -> Any:
    """How the global form of the optimiser's state is sharded.

    Args:
      tx: the optimiser, with or without codecs.
      params: the parameters, or their shapes; where they are sharded, whole.
      param_specs: how the parameters are sharded over the chips of a worker, a tree of `PartitionSpec`s like them;
        None: they are the same on all.

    Returns:
      A tree like `tx.init(params)` with a `PartitionSpec` for each array: over the workers' axis for what
      differs between them, as the parameters for copies of these, replicated otherwise. It serves as in_specs and
      out_specs of shard_map.

    Raises:
      ValueError: a codec takes a parameter to lie otherwise.
    """
    require_transformation(tx)
    state = jax.eval_shape(tx.init, params)
    _require_lying(state, param_specs)
    if param_specs is None:
        return specs_of(state)
    as_param = lambda x, spec: specs_of(x) if is_per_worker(x) else spec  # noqa: E731
    return optax.tree_map_params(tx, as_param, state, param_specs, transform_non_params=specs_of, is_leaf=is_per_worker)


def _require_lying(state: Any, param_specs: Any) -> None:
    """Raises ValueError, by name, for a parameter that does not lie as a codec that is across slices has it."""
    for x in _marked(state):
        if x.shards is None or len(x.leading) < 2:
            continue
        if param_specs is None:
            if x.shards.lie:
                raise ValueError(
                    "parameters are in shards by across(..., inside=): give param_specs=, how they lie, as in init(tx, "
                    "params, mesh, param_specs) and state_specs(tx, params, param_specs)"
                )
            continue
        lie, axes = dict(x.shards.lie), axes_of(param_specs, *x.leading)
        for path in lie or axes:
            if lie.get(path) != axes.get(path):
                has = "whole" if lie.get(path) is None else f"cut along axis {lie[path]}"
                is_ = "whole" if axes.get(path) is None else f"cut along axis {axes[path]}"
                raise ValueError(
                    f"parameter {path!r} is {is_} by param_specs, and {has} for the codec: give that the same, as in "
                    "across(codec, inside=param_specs)"
                )


def _marked(state: Any) -> list[PerWorker]:
    return [x for x in jax.tree.leaves(state, is_leaf=is_per_worker) if is_per_worker(x)]


def local_state(state: Any) -> Any:
    """The local form of a state, inside shard_map: strips the leading axis of what differs by worker.

    Raises:
      ValueError: that axis is not 1 here, so the state was not sharded as `state_specs` says.
    """

    def strip(path, x):
        if not is_per_worker(x):
            return x
        count = len(x.leading)
        for leaf in jax.tree.leaves(x):
            if leaf.shape[:count] != (1,) * count:
                raise ValueError(
                    f"state leaf {jax.tree_util.keystr(path)} of shape {leaf.shape} is not one worker's row of "
                    "the global form: make the state by init(tx, params, mesh), or take one of another number of "
                    "workers through resize_workers(opt_state, mesh), and pass it through shard_map "
                    "with in_specs from state_specs(tx, params)"
                )
        return jax.tree.map(lambda leaf: leaf[(0,) * count], x)

    return jax.tree_util.tree_map_with_path(strip, state, is_leaf=is_per_worker)


def global_state(state: Any) -> Any:
    """The inverse of `local_state`: restores the leading axis on the way out of shard_map."""
    lead = lambda x: jax.tree.map(lambda leaf: leaf[(None,) * len(x.leading)], x)  # noqa: E731
    return _map_per_worker(lead, state, lambda x: x)


def automatic(mesh: Mesh) -> Mesh:
    """`mesh` with automatic axes, which take ordinary arrays; those of `jax.make_mesh` are explicit."""
    return Mesh(mesh.devices, mesh.axis_names)


def in_automatic_axes(mesh: Mesh | int, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, called where the axes of all meshes are automatic, whatever mesh the caller has set.

    Under `jax.set_mesh(jax.make_mesh(...))`, whose axes are explicit, arrays carry their sharding in their types, and
    those on a mesh with automatic axes are refused. So arguments come from the caller's types, and results go to them;
    the memory stays where it is.

    Args:
      mesh: for which f computes; or a number of workers, for any.
      f: a function of trees of arrays to one.
    """

    def called(*args: Any) -> Any:
        theirs = jax.sharding.get_abstract_mesh()
        if theirs.empty:
            return f(*args)
        ours = theirs if isinstance(mesh, int) else mesh.abstract_mesh
        ours = ours.update_axis_types(dict.fromkeys(ours.axis_names, AxisType.Auto))
        with jax.sharding.use_abstract_mesh(ours):
            results = f(*_typed(args, {}))
        return _typed(results, dict(zip(theirs.axis_names, theirs.axis_types, strict=True)))

    return called


def _typed(tree: Any, types: dict[str, AxisType]) -> Any:
    """The arrays of a tree where they lie, on meshes whose axes are of these types, or automatic."""

    def typed(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or not isinstance(getattr(x, "sharding", None), NamedSharding):
            return x
        old = x.sharding.mesh
        new = Mesh(old.devices, old.axis_names, tuple(types.get(name, AxisType.Auto) for name in old.axis_names))
        return x if new == old else jax.device_put(x, NamedSharding(new, x.sharding.spec))

    return jax.tree.map(typed, tree)


def init(tx: optax.GradientTransformation, params: Any, mesh: Mesh | int, param_specs: Any = None) -> Any:
    """The optimiser's first state in its global form, for `train_step`, `simulate` or your own shard_map.

    Args:
      tx: the optimiser, with or without codecs.
      params: the parameters.
      mesh: the mesh of the step; or, for `simulate`, the number of workers.
      param_specs: as in `state_specs`, of parameters that are sharded over the chips of a worker.

    Returns:
      Like `tx.init(params)`, with a leading axis for the workers on what differs between them, sharded
      over the mesh.

    Raises:
      ValueError: a codec's axis_name is not an axis of the mesh, or a codec refuses `params`, or how they
        lie.
    """
    require_transformation(tx)
    require_arrays("params", params)
    mesh = require_mesh(mesh)
    first = functools.partial(global_init, tx, mesh)
    if isinstance(mesh, int):
        return in_automatic_axes(mesh, jax.jit(first))(params)
    mesh = automatic(mesh)
    if param_specs is not None:
        return in_automatic_axes(mesh, functools.partial(_init_in_shards, tx, mesh, param_specs))(params)
    jax.eval_shape(first, params)  # refuses a wrong axis before a sharding is made of it
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tx, params))
    made = jax.jit(first, out_shardings=shardings)
    return in_automatic_axes(mesh, lambda params: made(place(params, mesh)))(params)


def global_init(tx: optax.GradientTransformation, mesh: Mesh | int, params: Any) -> Any:
    """The first state in its global form, wherever it lies; as shapes also for a mesh whose devices are absent."""
    rows_of = _rows(mesh)

    def stack(x: PerWorker) -> PerWorker:
        lead = rows_of(x)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*lead, *leaf.shape)), x)

    state = _with_axes(mesh, tx.init)(params)
    _require_lying(state, None)
    return _map_per_worker(stack, state, lambda x: x)


def _init_in_shards(tx: optax.GradientTransformation, mesh: Mesh, param_specs: Any, params: Any) -> Any:
    """`init`, where each chip sees its shard of the parameters."""
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, param_specs)
    specs = state_specs(tx, params, param_specs)
    made = lambda params: global_state(tx.init(params))  # noqa: E731
    return jax.jit(jax.shard_map(made, mesh=mesh, in_specs=(param_specs,), out_specs=specs, check_vma=False))(params)


def _with_axes(mesh: Mesh | int, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`f`, called where the axes of the mesh are bound, so that it may ask for their sizes."""
    if isinstance(mesh, int):
        return f

    def called(x: Any) -> Any:
        bound = lambda _: f(x)  # noqa: E731
        for name, size in mesh.shape.items():
            bound = jax.vmap(bound, in_axes=None, out_axes=None, axis_name=name, axis_size=size)
        return bound(())

    return called


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts parameters, an optimiser state, or a tree that holds them where the step on this mesh wants them.

    What differs between workers is sharded over them, and all else is replicated; but parameters that lie in shards on
    this mesh already stay as they lie. A step on what lies there compiles once; on parameters that lie on one device,
    such as new ones, it compiles a second time for those it returned; and what was restored from a checkpoint may be
    committed to one device, where the step refuses it.

    Args:
      tree: arrays, numpy's or jax's; an optimiser state in its global form.
      mesh: the mesh of the step.

    Returns:
      The same tree on the mesh; arrays that lie there already are not copied.

    Raises:
      ValueError: the optimiser state is one of another number of workers, or several processes give different values.

    >>> import jax.numpy as jnp
    >>> from gradcomp_jax import make_mesh, place
    >>> place({"w": jnp.ones(3)}, make_mesh(1))["w"].sharding.is_fully_replicated
    True
    """
    mesh = automatic(require_mesh(mesh, or_workers=False))
    require_workers(tree, mesh)
    put = lambda path, x, spec: _put(path, x, NamedSharding(mesh, spec))  # noqa: E731
    return in_automatic_axes(mesh, functools.partial(jax.tree_util.tree_map_with_path, put))(tree, specs_of(tree))


def _put(path: Any, x: Any, sharding: NamedSharding) -> jax.Array:
    if not hasattr(x, "dtype"):  # such as a step number beside the arrays
        return x
    if lies_on(x, sharding.mesh) and sharding.spec == P():
        return x
    try:
        return jax.device_put(x, sharding)
    except AssertionError as error:  # by which jax says that processes give different values
        raise ValueError(
            f"leaf {jax.tree_util.keystr(path)} differs between the processes, and is to be the same on all: make it "
            "from one seed on all, or take the first process's by "
            "jax.experimental.multihost_utils.broadcast_one_to_all(tree)"
        ) from error


def lies_on(x: Any, mesh: Any) -> bool:
    """Whether an array, or a shape with a sharding, is laid out on such a mesh."""
    lies = getattr(x, "sharding", None)
    return isinstance(lies, NamedSharding) and isinstance(lies.mesh, Mesh) and automatic(lies.mesh) == automatic(mesh)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """One batch over the mesh, made of the rows that each process has read.

    Args:
      batch: this process's rows, arrays [rows, ...]; as many on every process, divisible among its devices. With one
        process it is the whole batch.
      mesh: the mesh of the step.

    Returns:
      Arrays of the rows of all processes, in the order of the mesh, split over all its axes.

    Raises:
      ValueError: the rows of a leaf do not divide among this process's devices.

    >>> import numpy as np
    >>> from gradcomp_jax import make_mesh, shard_batch
    >>> shard_batch({"x": np.ones((8, 3))}, make_mesh(1))["x"].shape
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
    """Raises ValueError, by name of the leaf, for a batch whose first axes do not divide among workers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not np.ndim(leaf) or np.shape(leaf)[0] % workers:
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path)!r} of shape {np.shape(leaf)} does not divide among {whom}: "
                "its first axis must be a multiple of them"
            )


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
    mesh = require_mesh(mesh)
    rows_of = _rows(mesh)

    def resized(x: PerWorker) -> PerWorker:
        new = rows_of(x)
        rows = {leaf.shape[: len(new)] for leaf in jax.tree.leaves(x)}
        if len(rows) > 1 or any(len(row) < len(new) for row in rows):
            raise ValueError(
                "the leaves of opt_state that differ between workers do not begin with one axis of workers, they have "
                f"{sorted(rows)}: pass the global form, as init and the steps return it"
            )
        return _resized(x, new)

    def resize(opt_state):
        return _map_per_worker(resized, opt_state, lambda x: x)

    def moved(opt_state):
        opt_state = jax.tree.map(functools.partial(_movable, mesh=mesh), opt_state)
        if isinstance(mesh, int):
            return jax.jit(resize)(opt_state)
        jax.eval_shape(resize, opt_state)  # refuses a wrong axis before a sharding is made of it
        shardings = jax.tree.map(lambda spec: NamedSharding(automatic(mesh), spec), specs_of(opt_state))
        return jax.jit(resize, out_shardings=shardings)(opt_state)

    return in_automatic_axes(mesh, moved)(opt_state)


def regrouped(old: jax.Array, new: int) -> jax.Array:
    """Rows of old workers as those of new: means of equal groups, or of all; of whole numbers the first of each."""
    groups = new if old.shape[0] % new == 0 else 1
    grouped = old.reshape(groups, -1, *old.shape[1:])
    kept = jnp.mean(grouped, axis=1) if jnp.issubdtype(old.dtype, jnp.inexact) else grouped[:, 0]
    return jnp.broadcast_to(kept, (new, *old.shape[1:]))


def _resized(x: PerWorker, new: tuple[int, ...]) -> PerWorker:
    """The global form of what differs between workers, for so many."""
    if x.shards is None:
        return jax.tree.map(lambda old: regrouped(old, *new), x)
    leaves, treedef = jax.tree.flatten(x)
    moved = [cut_anew(old, cut, new) for old, cut in zip(leaves, x.shards.cuts, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def alone(x: PerWorker) -> PerWorker:
    """The local form for a single worker, of a single chip, of the global form of several."""
    ones = (1,) * len(x.leading)
    return jax.tree.map(lambda leaf: leaf[(0,) * len(ones)], _resized(x, ones))


def cut_anew(old: jax.Array, cut: Cut | None, new: tuple[int, ...]) -> jax.Array:
    """Shards [workers, chips, ...], or [chips, ...], for other numbers of both: what each element owes stays."""
    if len(new) == 2:
        old = jnp.swapaxes(jax.vmap(lambda one: cut_anew(one, cut, new[1:]))(old), 0, 1)
        return jnp.swapaxes(jax.vmap(lambda chip: regrouped(chip, new[0]))(old), 0, 1)
    if len(old) == new[0]:
        return old
    if cut is None:
        return jnp.broadcast_to(old[:1], (*new, *old.shape[1:]))
    return cut.split(cut.join(old), *new)


def whole_of(x: PerWorker) -> list[jax.Array]:
    """The arrays of a global form [workers, ...], of shards those of the whole leaves."""
    if x.shards is None:
        return jax.tree.leaves(x)
    join = lambda old, cut: jax.vmap(cut.join)(old)  # noqa: E731
    return [join(old, cut) for old, cut in zip(jax.tree.leaves(x), x.shards.cuts, strict=True)]


def _movable(x: Any, mesh: Mesh | int) -> Any:
    """`x` on the devices of the mesh, by way of the host, or where several processes share it, as it is."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if isinstance(mesh, int) or x.sharding.device_set != set(mesh.devices.flat):
            raise ValueError(
                f"an array of opt_state of shape {x.shape} is shared by processes, on other devices than those of the "
                "mesh: save the state, and restore it on the mesh, or as numpy arrays, before resize_workers"
            )
        return x
    lies = None if isinstance(mesh, int) else NamedSharding(automatic(mesh), P())
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        data = jax.device_put(jax.device_get(jax.random.key_data(x)), lies)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(np.asarray(jax.device_get(x)), lies)


def require_workers(opt_state: Any, mesh: Mesh | int) -> None:
    """Raises ValueError for a state of another number of workers than the mesh has."""
    rows_of = _rows(mesh)
    for x in jax.tree.leaves(opt_state, is_leaf=is_per_worker):
        if is_per_worker(x):
            want = rows_of(x)
            got = {np.shape(leaf)[: len(want)] for leaf in jax.tree.leaves(x)}
            if got and got != {want}:
                along = x.axis if x.shards is None else x.leading
                has = want[0] if len(want) == 1 else want
                raise ValueError(
                    f"opt_state is of {sorted(got)} workers along {along!r}, mesh={mesh} has {has}: pass "
                    "the mesh of the step, or the state through resize_workers(opt_state, mesh) first, which keeps "
                    "what the residuals owe"
                )


def require_state(tx: optax.GradientTransformation, params: Any, opt_state: Any, mesh: Mesh | int) -> None:
    """Refuses, by name of the leaf, a state that is not the global form of one of `tx` for `params` on the mesh.

    Raises:
      ValueError: it is another's; the message says what leads from it to one that fits, if anything does.
    """
    require_transformation(tx)
    expected = jax.eval_shape(tx.init, params)
    if any(x.shards is not None and x.shards.lie for x in _marked(expected)):
        raise ValueError(
            "a codec of tx is for parameters in shards, by across(..., inside=), and this takes whole ones: leave "
            "inside= out, or call tx.update in a shard_map of your own; there tx.update(zeros, state, params, "
            "flush=True) gives what is owed at the end"
        )
    got, want = _leaves(opt_state), _leaves(expected)
    differing = sorted(got.keys() ^ want.keys())
    if owed := [path for path in differing if ".residual" in path]:
        with_it, without = ("opt_state", "tx") if owed[0] in got else ("tx", "opt_state")
        raise ValueError(
            f"{with_it} keeps error feedback and {without} does not, by leaf {owed[0]}: give the codec the "
            "error_feedback with which the state was made. To change it, flush with the tx of the state, and begin "
            "with a state of init(tx, params, mesh)"
        )
    if differing:
        raise ValueError(
            f"opt_state is not one of tx for these parameters: leaf {differing[0]} is "
            f"{'left over' if differing[0] in got else 'missing'}; give the tx and the parameters that the state was "
            "made with, or make a new one by init(tx, params, mesh)"
        )
    mine = _leaves(_map_per_worker(lambda x: x, expected, lambda _: None))
    if mine and all(np.shape(got[path]) == want[path].shape for path in mine):
        raise ValueError(
            f"opt_state is in its local form, as tx.init makes it: leaf {min(mine)} has no axis of workers; make the "
            "state by init(tx, params, mesh)"
        )
    require_workers(opt_state, mesh)


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _rows(mesh: Mesh | int) -> Callable[[PerWorker], tuple[int, ...]]:
    """The sizes of the leading axes of the global form: how many workers, and of `across` how many chips."""
    count = _count(mesh)

    def rows_of(x: PerWorker) -> tuple[int, ...]:
        if x.shards is not None:
            _require_slices(x.leading, mesh)
        return tuple(map(count, x.leading))

    return rows_of


def _require_slices(axes: tuple[AxisName, ...], mesh: Mesh | int) -> None:
    """Raises ValueError for a mesh that has not the axes of a codec that is across slices."""
    if isinstance(mesh, int):
        raise ValueError(
            f"mesh={mesh} is a number of workers, and the codec is across slices: give a mesh of slices and their "
            "chips, such as make_mesh({'node': 2, 'local': 4}), and train by train_step; simulate has no slices"
        )
    names = [name for axis in axes for name in axis_names(axis)]
    if missing := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(
            f"the codec is across slices, and the mesh has no axis {missing[0]!r}, it has {mesh.axis_names}: name the "
            "mesh's axes in across(codec, slow=, fast=)"
        )


def _count(mesh: Mesh | int) -> Callable[[AxisName], int]:
    """The number of workers along the axis of a codec."""
    require_mesh(mesh)
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
