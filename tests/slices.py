"""Runs a codec `across` slices in a shard_map of one's own, and joins what their chips keep."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.compressor import compressor_states
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.sharding import is_per_worker, specs_of
from gradcomp_jax.testing.contexts import Run, is_spec

SLICES, CHIPS = 2, 4


class Seen(NamedTuple):
    """What a run returns, as numpy arrays.

    Attributes:
      updates: [steps, slices, chips, ...].
      states: each chip's local state, [steps, slices, chips, ...], after each step.
      last: the global state to go on from.
    """

    updates: Any
    states: Any
    last: Any


def mesh_of(slices: int = SLICES, chips: int = CHIPS) -> Any:
    """A mesh of slices, and chips in each."""
    return gc.make_mesh({"node": slices, "local": chips})


def run(tx: gc.Compressor, grads: Any, check_vma: bool = True, state: Any = None) -> Seen:
    """Runs `tx` over gradients [steps, slices, chips, ...]; `state` is a global one to start from."""
    step = program_of(tx, grads, check_vma)
    state = first_state(tx, *key_of(grads)) if state is None else state
    history = []
    for t in range(jax.tree.leaves(grads)[0].shape[0]):
        updates, state = step(jax.tree.map(lambda x, t=t: x[t], grads), state)
        history.append((jax.device_get(updates), of_chips(state, *jax.tree.leaves(grads)[0].shape[1:3])))
    return Seen(*jax.tree.map(lambda *leaves: np.stack(leaves), *history), state)


def of_chips(state: Any, *lead: int) -> Any:
    """What each chip has of a global state, [slices, chips, ...]; of what is the same on all its own copy."""

    def local(marked: Any) -> Any:
        count = len(marked.leading) if is_per_worker(marked) else 0

        def leaf(x: jax.Array) -> np.ndarray:
            rows = [np.asarray(shard.data) for shard in sorted(x.addressable_shards, key=lambda s: s.device.id)]
            return np.stack(rows).reshape(*lead, *x.shape[count:])

        return jax.tree.map(leaf, marked)

    return jax.tree.map(local, state, is_leaf=is_per_worker)


def key_of(grads: Any) -> tuple[Any, ...]:
    """What programs are looked up by: shapes and types of leaves, the tree's structure, slices and chips."""
    leaves, treedef = jax.tree.flatten(grads)
    return tuple((x.shape[3:], jnp.dtype(x.dtype)) for x in leaves), treedef, *leaves[0].shape[1:3]


def _params(leaves: Any, treedef: Any) -> Any:
    return jax.tree.unflatten(treedef, [np.zeros(*leaf) for leaf in leaves])


@functools.cache
def first_state(tx: gc.Compressor, leaves: Any, treedef: Any, slices: int, chips: int) -> Any:
    """The global state before the first step."""
    return jax.device_get(gc.init(tx, _params(leaves, treedef), mesh_of(slices, chips)))


def program_of(tx: gc.Compressor, grads: Any, check_vma: bool = True) -> jax.stages.Compiled:
    """The compiled step of `run`."""
    return _program(tx, *key_of(grads), check_vma)


@functools.cache
def _program(tx: gc.Compressor, leaves: Any, treedef: Any, slices: int, chips: int, check_vma: bool) -> Any:
    mesh, state = mesh_of(slices, chips), first_state(tx, leaves, treedef, slices, chips)

    def step(grads, state):
        updates, after = tx.update(jax.tree.map(lambda x: x[0, 0], grads), gc.local_state(state))
        return jax.tree.map(lambda x: x[None, None], updates), gc.global_state(after)

    each, specs = P("node", "local"), specs_of(state)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(each, specs), out_specs=(each, specs), check_vma=check_vma)
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (each, specs), is_leaf=is_spec)
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct((slices, chips, *x.shape), x.dtype), _params(leaves, treedef))
    return jax.jit(sharded, in_shardings=lies).lower(grads, state).compile()


def at(tree: Any, step: int) -> Any:
    """One step of many."""
    return jax.tree.map(lambda x: x[step], tree)


def of_slices(tx: gc.Compressor, seen: Seen, grads: Any) -> Run:
    """A run as of workers that are whole slices: their chips' shards joined."""
    shapes = {path: x.shape[3:] for path, x in flatten(grads)[0].items()}
    first = jax.tree.map(lambda x: x[:, :, 0], seen.states)
    states = first._replace(residual=joined(seen.states.residual, shapes))
    feedback = tx.settings.error_feedback
    if feedback is not None and not feedback.owes:
        mean = joined(seen.states.codec.mean, shapes).value
        states = states._replace(codec=states.codec._replace(mean=mean))
    return Run(jax.tree.map(lambda x: x[:, :, 0], seen.updates), states)


def joined(marked: gc.PerWorker, shapes: dict[str, tuple[int, ...]]) -> gc.PerWorker:
    """What is of shards, by path [steps, slices, chips, ...], as that of the leaves, [steps, slices, ...]."""
    wholes = {}
    for path, cut in zip(sorted(marked.value), marked.shards.cuts, strict=True):
        x = marked.value[path]
        rows = [whole(one, cut) for one in x.reshape(-1, *x.shape[2:])]
        wholes[path] = np.stack(rows).reshape(*x.shape[:2], *shapes[path])
    return marked._replace(value=wholes)


def whole(shards: np.ndarray, cut: Any) -> np.ndarray:
    """The whole, in the shape in which it is cut, of [chips, ...]."""
    cut = cut.among(len(shards))
    return np.take(np.concatenate(shards, axis=cut.axis), range(cut.view[cut.axis]), axis=cut.axis)


def assert_same(id: str, got: Any, want: Any) -> None:
    """To the bit; but for products of matrices, by a library whose last bits may depend on where arrays lie."""
    if "powersgd" in id or "gradiveq" in id:
        chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-5)
    else:
        chex.assert_trees_all_equal(got, want)


def codec_state(state: Any) -> gc.CompressorState:
    """The codec's state among those of a chain."""
    (found,) = compressor_states(state)
    return found
