"""Reads checkpoints that Orbax wrote, for the number of workers there is now."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gradcomp_jax.arguments import shown
from gradcomp_jax.cuts import Cut
from gradcomp_jax.mesh import automatic, lies_on, require_mesh
from gradcomp_jax.placing import in_global_form, place
from gradcomp_jax.resizing import resize_workers
from gradcomp_jax.sharding import PerWorker, is_per_worker, map_per_worker, specs_of
from gradcomp_jax.survivors import parts_in


def restore(
    directory: str | os.PathLike,
    like: Any,
    mesh: Mesh | int | None = None,
    *,
    step: int | None = None,
    item: str = "default",
) -> Any:
    """Reads a checkpoint, made with any number of workers, for the workers of a mesh.

    Orbax takes the shapes of the arrays from a target. If the target has another number of workers, Orbax refuses, and
    advises `strict=False`. With that it cuts residuals off or fills them with zeros. `restore` reads the number of
    workers from the checkpoint first. If there are others now, the state goes through `resize_workers`.

    Args:
      directory: the directory of an `orbax.checkpoint.CheckpointManager`, or one checkpoint of a
        `StandardCheckpointer`; or the one that `elastic` got as checkpoint=.
      like: a tree like the one that was saved, such as `{"params": params, "opt_state": init(tx, params, mesh)}`. It
        holds arrays, or their shapes from `jax.eval_shape`. A TrainState may be fresh from its `create`. Arrays that
        lie in shards on the mesh here are restored in these shards.
      mesh: the mesh of the step, by default of all devices; or, for `simulate`, the number of workers.
      step: the step of the checkpoint; by default the last.
      item: the item of the checkpoint, if several were saved.

    Returns:
      A tree like `like`, placed on the mesh as `place` does it: the next step can take it.

    Raises:
      ImportError: orbax-checkpoint is not installed.
      FileNotFoundError: there is no such checkpoint.
      ValueError: `directory` is no path; or a leaf is missing from the checkpoint, is left over in it, or has another
        shape for a reason other than the number of workers.
    """
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise ImportError("restore reads checkpoints by Orbax: pip install orbax-checkpoint") from error
    if not isinstance(directory, str | os.PathLike):
        raise ValueError(
            f"directory={shown(directory)} must be a path: the order is restore(directory, like); a CheckpointManager "
            "has it as its directory"
        )
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"there is no directory {directory}")
    mesh = require_mesh(mesh)
    whole = in_global_form(like, mesh)

    def target(metadata: Any) -> Any:
        of_one, of_all, saved = (
            {path: np.shape(x) for path, x in _by_path(x).items()} for x in (like, whole, metadata)
        )
        if saved == of_one != of_all:  # a TrainState was saved before its first step
            return jax.tree.map(lambda x: np.zeros(np.shape(x), jnp.result_type(x)), like)
        return _target(whole, saved, mesh)

    path = os.path.abspath(directory)
    if parts := parts_in(path, step):
        saved = _joined(parts, whole, target)
    elif os.path.exists(os.path.join(path, "_METADATA")):
        with ocp.StandardCheckpointer() as reader:
            saved = reader.restore(path, target(reader.metadata(path).item_metadata))
    else:
        saved = _of_manager(path, target, step, item)
    resized = lambda x: resize_workers(x, mesh) if is_per_worker(x) else x  # noqa: E731
    saved = jax.tree.map(resized, in_global_form(saved, mesh), is_leaf=is_per_worker)
    return saved if isinstance(mesh, int) else place(saved, mesh)


def _joined(files: list[pathlib.Path], like: Any, target: Callable[[Any], Any]) -> Any:
    """What the survivors of a run saved, each for its own workers, as one tree like `like`."""
    parts = []
    for file in files:
        with np.load(file) as arrays:
            parts.append(dict(arrays))
    differs = lambda x: x.shards is None or len(x.leading) > 1  # between workers, not only between their chips  # noqa: E731
    rows = _by_path(map_per_worker(lambda x: jax.tree.map(lambda _: differs(x), x), like, lambda _: False))
    first = parts[0]
    joined = {k: np.concatenate([part[k] for part in parts]) if rows.get(k) else first[k] for k in first}
    target(joined)  # refuses another tree

    def typed(path: Any, x: Any) -> Any:
        y = joined[jax.tree_util.keystr(path, simple=True, separator="/")]
        if not hasattr(x, "dtype"):
            return type(x)(y)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(y), impl=jax.random.key_impl(x))
        return y.view(x.dtype) if y.dtype.kind == "V" else y  # numpy does not know jax's narrow types

    return jax.tree_util.tree_map_with_path(typed, like)


def _of_manager(directory: str, target: Callable[[Any], Any], step: int | None, item: str) -> Any:
    """What a CheckpointManager saved for a step. `target` makes the target of the read from the shapes there."""
    import orbax.checkpoint as ocp

    handlers = {item: ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager(directory, item_names=(item,), item_handlers=handlers) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            raise FileNotFoundError(
                f"there is no checkpoint {'' if step is None else f'of step {step} '}in {directory}"
            )
        if not (manager.directory / str(step) / item).exists():
            raise FileNotFoundError(f"the checkpoint of step {step} in {directory} has no item {item!r}: give item=")
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target(manager.item_metadata(step)[item]))})
        return manager.restore(step, args=args)[item]


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@dataclasses.dataclass(frozen=True)
class _Lies:
    """How many leading axes an array has for workers and their chips; if it holds shards, how the whole is cut."""

    lead: int
    cut: Cut | None


def _lies(x: PerWorker) -> PerWorker:
    leaves, treedef = jax.tree.flatten(x)
    cuts = [None] * len(leaves) if x.shards is None else x.shards.cuts
    return jax.tree.unflatten(treedef, [_Lies(len(x.leading), cut) for cut in cuts])


def _target(like: Any, saved: dict[str, tuple[int, ...]], mesh: Mesh | int) -> Any:
    """What Orbax is to read: `like` with as many workers as were saved. If their number changed, it is on the host."""
    mine = _by_path(like)
    if differing := sorted(mine.keys() ^ saved.keys()):
        what = "lacks" if differing[0] in mine else "has beside what like has"
        hint = "its error_feedback, " if "/residual/value" in differing[0] else ""
        raise ValueError(
            f"the checkpoint {what} leaf {differing[0]!r}: make like with the tx, {hint}and the parameters that the "
            "checkpoint was made with"
        )
    marked = jax.tree.map(lambda x: _lies(x) if is_per_worker(x) else None, like, is_leaf=is_per_worker)
    workers = _by_path(marked)

    def target(path: Any, x: Any, spec: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        shape, lies = saved[name], workers.get(name, _Lies(0, None))
        lead, cut = lies.lead, lies.cut
        expected = x.shape[lead:] if cut is None else cut.shape(shape[lead - 1])
        if shape[lead:] != expected:
            hint = "; it is one worker's, from tx.init: save init(tx, params, mesh)" if shape == x.shape[lead:] else ""
            raise ValueError(f"leaf {name!r} of the checkpoint has the shape {shape}, like has {x.shape}{hint}")
        if isinstance(mesh, int) or shape != x.shape:
            return np.zeros(shape, jnp.dtype(x.dtype))
        lies = x.sharding.spec if lies_on(x, mesh) else spec
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(automatic(mesh), lies))

    return jax.tree_util.tree_map_with_path(target, like, specs_of(like))
