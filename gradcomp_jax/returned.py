"""Handles the outputs of the workers' own steps: passed on, averaged, or refused; see `data_parallel`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gradcomp_jax import beside
from gradcomp_jax.compressor import compressor_states, is_compressor_state, skipped_steps
from gradcomp_jax.exchange import collectives
from gradcomp_jax.exchange.collectives import Wire, axis_names
from gradcomp_jax.placing import is_train_state
from gradcomp_jax.sharding import PerWorker, global_state, is_per_worker, map_per_worker
from gradcomp_jax.step import apart, keep_state, once_stored
from gradcomp_jax.varying import Axes

_DIFFERS = (
    "what the step returns at {leaf} differs between the workers along {axes}, and is passed on to the next step: the "
    "optimiser needs a codec, none() or average() first in its chain, with the mesh's axis as its axis_name; "
    "accumulation, skipping and momentum go after it, as in optax.chain(codec, optax.MultiSteps(...)). Average by "
    "jax.lax.pmean(x, {axes}) what else the step keeps or shows, such as batch statistics or gradients"
)


class Returned(NamedTuple):
    """What a worker returns.

    Attributes:
      out: its outputs, with state in its global form.
      leads: the leading axes of each leaf; none if it is the same on all workers.
    """

    out: Any
    leads: list[tuple[Any, ...]]


def along(tree: Any, axes: Sequence[str]) -> Any:
    """The axes along which each leaf of an argument may differ: `axes`, and for `PerWorker` state its own axes."""
    return map_per_worker(lambda x: jax.tree.map(lambda _: _names(x), x), tree, lambda _: frozenset(axes))


def _names(x: PerWorker) -> Axes:
    return frozenset(name for axis in x.leading for name in axis_names(axis))


def returned(out: Any, differs: Any, passed: Sequence[Any], keys: Sequence[Any], rows: set[int]) -> Returned:
    """Makes a worker's return value from the outputs of its step.

    Args:
      out: the outputs.
      differs: the axes along which each leaf may differ.
      passed: the arguments that a step may pass on.
      keys: this worker's random keys; a key that differs by worker may not be passed on.
      rows: the numbers of rows in the worker's part of the batch.

    Raises:
      ValueError: an output that is passed on differs between the workers, or an output is a random key that does.
    """
    given = _nodes(passed)
    kinds = {kind for kind, _ in given}
    is_part = lambda x: _kind(x) in kinds or is_train_state(x) or is_compressor_state(x) or is_per_worker(x)  # noqa: E731
    treedef: Any
    found, treedef = jax.tree_util.tree_flatten_with_path(out, is_leaf=is_part)
    names = [f"its output{jax.tree_util.keystr(path)}" for path, _ in found]
    parts, differ = [part for _, part in found], treedef.flatten_up_to(differs)
    stays = list(map(is_part, parts))
    for name, part, its, stay in zip(names, parts, differ, stays, strict=True):
        if stay:
            _require_same(name, part, its)
        _require_no_key(name, part, its, keys)
    metrics = {name: (part, its) for name, part, its, stay in zip(names, parts, differ, stays, strict=True) if not stay}
    parts = _kept(parts, _before(parts, given))
    reduced = _reduced(metrics, rows, parts)
    whole = global_state(treedef.unflatten([reduced.get(name, part) for name, part in zip(names, parts, strict=True)]))
    leaves = jax.tree.leaves(whole, is_leaf=is_per_worker)
    leads = [[x.leading] * len(jax.tree.leaves(x)) if is_per_worker(x) else [()] for x in leaves]
    return Returned(whole, [lead for of_leaf in leads for lead in of_leaf])


def _nodes(args: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The trees that a step may pass on, each with its kind: the arguments, then the trees in them, and so on."""
    found, level = [], list(args)
    while level:
        found += level
        children = [jax.tree_util.default_registry.flatten_one_level(x) for x in level]
        level = [x for inner in children if inner is not None for x in inner[0] if not jax.tree_util.all_leaves([x])]
    return [(kind, x) for x in found if (kind := _kind(x)) is not None]


def _kind(x: Any) -> Any:
    """The structure and shapes of a tree, which identify it; None for scalars, which may be anything."""
    shapes = tuple(map(np.shape, jax.tree.leaves(x)))
    return (jax.tree.structure(x), shapes) if any(shapes) else None


def _before(parts: Sequence[Any], given: Sequence[tuple[Any, Any]]) -> list[Any]:
    """What each part was before the step, or None; parts of one kind, such as a mean of parameters, go in order."""
    queues: dict[Any, list[Any]] = {}
    for kind, x in given:
        queues.setdefault(kind, []).append(x)
    return [queue.pop(0) if (queue := queues.get(_kind(part))) else None for part in parts]


def _require_same(name: str, part: Any, differs: Any) -> None:
    """Raises ValueError, with the name, if a leaf differs between the workers and is not marked so."""
    leaves = jax.tree_util.tree_leaves_with_path(part, is_leaf=is_per_worker)
    for (path, x), its in zip(leaves, jax.tree.leaves(differs, is_leaf=is_per_worker), strict=True):
        axes = frozenset().union(*jax.tree.leaves(its)) - (_names(x) if is_per_worker(x) else frozenset())
        if axes:
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(_DIFFERS.format(leaf=where, axes=tuple(sorted(axes))))


def _require_no_key(name: str, part: Any, differs: Any, keys: Sequence[Any]) -> None:
    """Raises ValueError, with the name, for a worker's random key; a key of the old kind is known by shape and type."""
    kinds = {(x.shape, x.dtype) for x in keys}
    for (path, x), axes in zip(jax.tree_util.tree_leaves_with_path(part), jax.tree.leaves(differs), strict=True):
        if axes and (jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) or (x.shape, x.dtype) in kinds):
            raise ValueError(
                f"the step returns at {name}{jax.tree_util.keystr(path)} a random key that differs by worker: "
                "make the next step's key outside of the step, such as jax.random.fold_in(key, step)"
            )


def _kept(parts: Sequence[Any], before: Sequence[Any]) -> list[Any]:
    """The parts that are passed on; if a codec skipped the step, they are as before it."""
    mine = [part for part, old in zip(parts, before, strict=True) if old is not None]
    if not compressor_states(mine):
        return list(parts)
    kept = skipped_steps(mine) == skipped_steps(list(before))
    params = [x.params if is_train_state(x) else x for x in mine[:1]]
    kept = once_stored(kept, [] if compressor_states(params) else params)
    return [part if old is None else keep_state(kept, part, old) for part, old in zip(parts, before, strict=True)]


def _reduced(metrics: dict[str, Any], rows: set[int], states: Any) -> dict[str, Any]:
    """Reduces outputs over all workers; each comes with the axes along which its leaves differ."""
    trees = {name: part for name, (part, _) in metrics.items()}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    axes = jax.tree.leaves({name: its for name, (_, its) in metrics.items()})
    found = {jax.tree_util.keystr(path): x for path, x in leaves}
    for along_axes in sorted(set(axes) - {frozenset()}, key=sorted):
        wire = Wire(tuple(sorted(along_axes)))
        mine = {name: x for (name, x), its in zip(found.items(), axes, strict=True) if its == along_axes}
        hows = beside.reductions(None, mine, rows)
        sent = collectives.after(beside.sent(mine, hows, wire.workers), compressor_states(states))
        means = apart(sent, wire)
        found |= beside.arrived(mine, hows, means, wire.workers, own=lambda x: x)
    return jax.tree.unflatten(jax.tree.structure(trees), list(found.values()))
