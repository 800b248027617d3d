"""State across devices: state that differs between workers is marked, stored as one global array, and resharded.

Almost all of an optimiser's state is the same on all workers. A residual is not. If shard_map returned it as
replicated, one worker's copy would silently remain. So a leaf that differs is wrapped in `PerWorker`, and has two
forms:

- *local*, inside a step: this worker's value, shape [...]. `tx.init(params)` returns this form.
- *global*, between steps: one array [workers, ...], sharded over its first axis. `init` returns this form, and a
  checkpoint holds it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax.arguments import require_transformation
from gradcomp_jax.contract import AxisName
from gradcomp_jax.cuts import Cut
from gradcomp_jax.exchange.collectives import axis_names
from gradcomp_jax.exchange.plan import axes_of
from gradcomp_jax.mesh import require_mesh

OWN = "own"
"""The role of what a worker has of its own between the exchanges of `outer`."""


class _Value(NamedTuple):
    value: Any


class Shards(NamedTuple):
    """Says that a `PerWorker` holds shards of the leaves; each chip of a worker has one shard.

    Attributes:
      axes: the axes that each have a leading axis in the global form: the workers' axis, if the value differs between
        workers, and the axis of their chips.
      cuts: how the whole of each array is cut, in the order of its tree; None: the first chip's array stands for all.
      lie: if the parameters themselves are in shards: for every leaf its path, and the axis that is cut, or None.
    """

    axes: tuple[AxisName, ...]
    cuts: tuple[Cut | None, ...]
    lie: tuple[tuple[str, int | None], ...] = ()


class PerWorker(_Value):
    """State that differs between the workers.

    It is a NamedTuple of its value alone. So jax, `optax.tree_utils` and `flax.serialization` treat it like optax's
    own states. Axis, role and shards belong to its type; each combination has a type of its own.

    Attributes:
      value: arrays; local form [...], global form [workers, ...].
      axis: the mesh axis, or axes, along which it differs.
      role: what it is: "owed" to later steps, which `flush` sends; "pending", a gradient that waits for the next step;
        an "estimate", as in EF21; "norms", which `metrics` reads; what is a worker's "own" under `outer`; or a part of
        a codec's "state".
      shards: how shards lie, for state of shards under `across`; else None.
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
        """The mesh axes, or groups of them, that each have a leading axis in the global form."""
        return (self.axis,) if self.shards is None else self.shards.axes


@functools.cache
def _per_worker(axis: AxisName, role: str, shards: Shards | None) -> type[PerWorker]:
    fields = {"__slots__": (), "__module__": __name__, "axis": axis, "role": role, "shards": shards}
    return type("PerWorker", (PerWorker,), fields)


def is_per_worker(x: Any) -> bool:
    """Whether `x` is wrapped in `PerWorker`."""
    return isinstance(x, PerWorker)


def map_per_worker(f: Callable[[PerWorker], Any], state: Any, other: Callable[[Any], Any]) -> Any:
    """Applies `f` to each `PerWorker` of a state, and `other` to each other leaf."""
    return jax.tree.map(lambda x: f(x) if is_per_worker(x) else other(x), state, is_leaf=is_per_worker)


def specs_of(state: Any) -> Any:
    """The `state_specs` of a state."""
    return map_per_worker(lambda x: jax.tree.map(lambda _: P(*x.leading), x), state, lambda _: P())


def state_specs(tx: optax.GradientTransformation, params: Any, param_specs: Any = None) -> Any:
    """How the global form of the optimiser's state is sharded.

    Args:
      tx: the optimiser, with or without codecs.
      params: the parameters, or their shapes; the whole ones, if they are sharded.
      param_specs: how the parameters are sharded over the chips of a worker, a tree of `PartitionSpec`s like them;
        None: they are the same on all chips.

    Returns:
      A tree like `tx.init(params)` with a `PartitionSpec` for each array. State that differs between workers lies over
      their axis, copies of the parameters lie as the parameters do, and the rest is replicated. It serves as in_specs
      and out_specs of shard_map.

    Raises:
      ValueError: a codec expects a parameter to be sharded in another way.
    """
    require_transformation(tx)
    state = jax.eval_shape(tx.init, params)
    require_lying(state, param_specs)
    if param_specs is None:
        return specs_of(state)
    as_param = lambda x, spec: specs_of(x) if is_per_worker(x) else spec  # noqa: E731
    return optax.tree_map_params(tx, as_param, state, param_specs, transform_non_params=specs_of, is_leaf=is_per_worker)


def require_lying(state: Any, param_specs: Any) -> None:
    """Raises ValueError, with the name, if a parameter is not sharded as a codec under `across` expects it."""
    for x in marked(state):
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


def marked(state: Any) -> list[PerWorker]:
    """All values that are wrapped in `PerWorker`."""
    return [x for x in jax.tree.leaves(state, is_leaf=is_per_worker) if is_per_worker(x)]


def local_state(state: Any) -> Any:
    """The local form of a state, inside shard_map: strips the leading axis of state that differs between workers.

    Raises:
      ValueError: the leading axis is not 1 here, so the state was not sharded as `state_specs` says.
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
    return map_per_worker(lead, state, lambda x: x)


def require_workers(opt_state: Any, mesh: Mesh | int) -> None:
    """Raises ValueError if a state has another number of workers than the mesh."""
    rows_of = leading_of(mesh)
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
                    "what the residuals owe; in the place of tx.init(params), make it by init(tx, params, mesh)"
                )


def require_state(tx: optax.GradientTransformation, params: Any, opt_state: Any, mesh: Mesh | int) -> None:
    """Refuses a state that is not the global form of a state of `tx` for `params` on the mesh, and names the leaf.

    Raises:
      ValueError: the state belongs to another; the message says how to get one that fits, if there is a way.
    """
    require_transformation(tx)
    expected = jax.eval_shape(tx.init, params)
    if any(x.shards is not None and x.shards.lie for x in marked(expected)):
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
            f"{with_it} keeps a residual at {owed[0]} and {without} does not: give the tx with which the state was "
            "made. To change error_feedback, flush with that tx, and begin with a state of init(tx, params, mesh); for "
            "another codec or strength see swap(tx, new_tx, params, opt_state, mesh)"
        )
    if differing:
        raise ValueError(
            f"opt_state is not one of tx for these parameters: leaf {differing[0]} is "
            f"{'left over' if differing[0] in got else 'missing'}; give the tx and the parameters that the state was "
            "made with, or make a new one by init(tx, params, mesh)"
        )
    mine = _leaves(map_per_worker(lambda x: x, expected, lambda _: None))
    if mine and all(np.shape(got[path]) == want[path].shape for path in mine):
        raise ValueError(
            f"opt_state is in its local form, as tx.init makes it: leaf {min(mine)} has no axis of workers; make the "
            "state by init(tx, params, mesh)"
        )
    require_workers(opt_state, mesh)


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def leading_of(mesh: Mesh | int) -> Callable[[PerWorker], tuple[int, ...]]:
    """The sizes of the leading axes of the global form: how many workers, and under `across` how many chips."""
    count = _count(mesh)

    def rows_of(x: PerWorker) -> tuple[int, ...]:
        if x.shards is not None:
            _require_slices(x.leading, mesh)
        return tuple(map(count, x.leading))

    return rows_of


def _require_slices(axes: tuple[AxisName, ...], mesh: Mesh | int) -> None:
    """Raises ValueError if a mesh lacks the axes of a codec under `across`."""
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
