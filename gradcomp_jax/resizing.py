"""State for another number of workers: the debt of the residuals stays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.cuts import Cut
from gradcomp_jax.mesh import automatic, in_automatic_axes, require_mesh
from gradcomp_jax.sharding import OWN, PerWorker, leading_of, map_per_worker, specs_of


def resize_workers(opt_state: Any, mesh: Mesh | int | None = None) -> Any:
    """The optimiser's state for another number of workers.

    Going from n to m workers, a new worker gets the mean over n / m old ones if m divides n; otherwise each gets the
    mean over all. So the mean over the workers stays, and error feedback owes as much as before. State that does not
    differ between the workers is untouched. Integers, such as the lengths that `code_bits` reads, are not averaged: a
    new worker gets those of the first.

    Under `outer`, the mean of the workers' own parameters stays too, and so does the mean of their inner optimisers'
    states. Of counts in these a new worker gets the largest. Numbers that are not finite are left out of the means. The
    place in the period stays.

    Args:
      opt_state: the global form, as `init` and the steps return it, or as read from a checkpoint. With several
        processes it must lie on the devices of `mesh`.
      mesh: the new mesh, by default of all devices; or, for `simulate`, the new number of workers.

    Returns:
      The global form for the new workers, sharded over the mesh.

    Raises:
      ValueError: the leaves of opt_state do not begin with one number of workers, its axes are not axes of the
        mesh, there is no worker, or several processes hold it on other devices.

    >>> import jax.numpy as jnp
    >>> import gradcomp_jax as gcj
    >>> state = gcj.init(gcj.powersgd(1), {"w": jnp.ones((8, 8))}, 4)
    >>> gcj.resize_workers(state, 6).residual.value["w"].shape
    (6, 8, 8)
    """
    mesh = require_mesh(mesh)
    rows_of = leading_of(mesh)

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
        return map_per_worker(resized, opt_state, lambda x: x)

    def moved(opt_state):
        opt_state = jax.tree.map(functools.partial(_movable, mesh=mesh), opt_state)
        if isinstance(mesh, int):
            return jax.jit(resize)(opt_state)
        jax.eval_shape(resize, opt_state)  # refuses a wrong axis before it is used in a sharding
        shardings = jax.tree.map(lambda spec: NamedSharding(automatic(mesh), spec), specs_of(opt_state))
        return jax.jit(resize, out_shardings=shardings)(opt_state)

    return in_automatic_axes(mesh, moved)(opt_state)


def regrouped(old: jax.Array, new: int) -> jax.Array:
    """The rows of new workers: means of equal groups of old rows, or of all; for whole numbers, each group's first."""
    groups = new if old.shape[0] % new == 0 else 1
    grouped = old.reshape(groups, -1, *old.shape[1:])
    kept = jnp.mean(grouped, axis=1) if jnp.issubdtype(old.dtype, jnp.inexact) else grouped[:, 0]
    return jnp.broadcast_to(kept, (new, *old.shape[1:]))


def _met(old: jax.Array, new: int) -> jax.Array:
    """Like `regrouped` for what workers have of their own under `outer`: a ruined worker ruins no other."""
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return regrouped(old, new)
    groups = new if old.shape[0] % new == 0 else 1
    grouped = old.reshape(groups, -1, *old.shape[1:])
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return jnp.broadcast_to(jnp.max(grouped, axis=1), (new, *old.shape[1:]))
    finite = jnp.isfinite(grouped)
    mean = jnp.mean(grouped, axis=1, where=finite)
    return jnp.broadcast_to(jnp.where(jnp.any(finite, axis=1), mean, grouped[:, 0]), (new, *old.shape[1:]))


def _resized(x: PerWorker, new: tuple[int, ...]) -> PerWorker:
    """The global form, for new numbers of workers and chips, of state that differs between workers."""
    if x.shards is None:
        return jax.tree.map(lambda old: (_met if x.role == OWN else regrouped)(old, *new), x)
    leaves, treedef = jax.tree.flatten(x)
    moved = [cut_anew(old, cut, new) for old, cut in zip(leaves, x.shards.cuts, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def alone(x: PerWorker) -> PerWorker:
    """The local form for a single worker with a single chip, from the global form of several."""
    ones = (1,) * len(x.leading)
    return jax.tree.map(lambda leaf: leaf[(0,) * len(ones)], _resized(x, ones))


def cut_anew(old: jax.Array, cut: Cut | None, new: tuple[int, ...]) -> jax.Array:
    """Shards [workers, chips, ...], or [chips, ...], for other numbers of both; each element's debt stays."""
    if len(new) == 2:
        old = jnp.swapaxes(jax.vmap(lambda one: cut_anew(one, cut, new[1:]))(old), 0, 1)
        return jnp.swapaxes(jax.vmap(lambda chip: regrouped(chip, new[0]))(old), 0, 1)
    if len(old) == new[0]:
        return old
    if cut is None:
        return jnp.broadcast_to(old[:1], (*new, *old.shape[1:]))
    return cut.split(cut.join(old), *new)


def whole_of(x: PerWorker) -> list[jax.Array]:
    """The arrays of a global form [workers, ...]; shards are joined to the whole leaves."""
    if x.shards is None:
        return jax.tree.leaves(x)
    join = lambda old, cut: jax.vmap(cut.join)(old)  # noqa: E731
    return [join(old, cut) for old, cut in zip(jax.tree.leaves(x), x.shards.cuts, strict=True)]


def _movable(x: Any, mesh: Mesh | int) -> Any:
    """Moves `x` to the devices of the mesh through the host; if several processes share it, it stays as it is."""
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
