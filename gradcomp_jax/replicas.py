"""Compares the copies of what must be the same on all workers."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.exchange.collectives import Wire, axis_names
from gradcomp_jax.mesh import automatic, in_automatic_axes, lies_on, require_mesh
from gradcomp_jax.notes import logger
from gradcomp_jax.random import mixed


def check_replicas(tree: Any, mesh: Mesh | None = None, *, repair: bool = False) -> Any:
    """Compares a checksum of each copy of what must be the same on all workers. Call it every thousand steps or so.

    Copies part where a step of your own is unchecked (`check_vma=False`), where hosts compute differently, and where
    memory fails. Training then goes on, to no purpose. State that differs between workers on purpose is left out: a
    residual has no copy.

    The cost is a pass over the arrays, and one message of four bytes for each array. Every process calls it.

    Args:
      tree: parameters, an optimiser state in its global form, or a tree that holds them, as the steps return them.
      mesh: the mesh of the step, by default of all devices.
      repair: whether all workers take the first worker's copy of the leaves that differ, in place of the error. Those
        leaves are sent whole, and a warning names them on the logger "gradcomp_jax".

    Returns:
      The tree; if nothing was repaired, with the same arrays.

    Raises:
      ValueError: copies differ, and `repair` is off: the message names the first leaf, and the workers whose copy is
        not the first worker's. Or an array does not lie on the mesh.

    >>> import jax.numpy as jnp
    >>> import gradcomp_jax as gcj
    >>> mesh = gcj.make_mesh(1)
    >>> params = gcj.check_replicas(gcj.place({"w": jnp.ones(3)}, mesh), mesh)
    """
    mesh = automatic(require_mesh(mesh, or_workers=False))
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if hasattr(x, "dtype") and not lies_on(x, mesh):
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path)!r} does not lie on the mesh, so it has no copies to compare: give "
                "what the steps returned, or place(tree, mesh)"
            )
    return in_automatic_axes(mesh, functools.partial(_checked, mesh, repair))(tree)


def _checked(mesh: Mesh, repair: bool, tree: Any) -> Any:
    found = differing(tree, mesh)
    if not found:
        return tree
    (first, workers), *others = found.items()
    more = f", and so do {len(others)} more leaves" * bool(others)
    told = f"the copies of leaf {first!r} differ{more}: {_named(workers, mesh)} not what the first worker has"
    if not repair:
        raise ValueError(
            f"{told}. Go on from a checkpoint, or let all take the first worker's by check_replicas(tree, mesh, "
            "repair=True)"
        )
    logger.log(logging.WARNING, "%s; all take the first worker's", told)

    def repaired(path: Any, x: Any) -> Any:
        return _from_first(mesh, x.sharding.spec)(x) if jax.tree_util.keystr(path) in found else x

    return jax.tree_util.tree_map_with_path(repaired, tree)


def differing(tree: Any, mesh: Mesh) -> dict[str, list[int]]:
    """The leaves of which workers have different copies, by path, each with the places in the mesh of those workers.

    Args:
      tree: arrays on the mesh; whatever is no array is left out.
      mesh: the mesh.
    """
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    leaves = {path: x for path, x in leaves.items() if hasattr(x, "dtype") and x.size}
    if not leaves:
        return {}
    together = jax.jit(jnp.stack, out_shardings=NamedSharding(mesh, P()))
    sums = jax.device_get(together([_checksums(mesh, x.sharding.spec)(x) for x in leaves.values()]))
    found = {}
    for (path, x), of_workers in zip(leaves.items(), sums, strict=True):
        firsts: dict[str, int] = {}  # by the part of the array, the first checksum
        parts = x.sharding.devices_indices_map(x.shape)
        owners = [str(parts[device]) for device in mesh.devices.flat]
        same = [firsts.setdefault(part, one) == one for part, one in zip(owners, of_workers.tolist(), strict=True)]
        if not all(same):
            found[path] = [worker for worker, agrees in enumerate(same) if not agrees]
    return found


def _named(workers: list[int], mesh: Mesh) -> str:
    """Workers in words, with their processes if there are several."""
    processes = sorted({mesh.devices.flat[worker].process_index for worker in workers})
    several = len({device.process_index for device in mesh.devices.flat}) > 1
    of = f" (process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))})" * several
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))}{of} ha{'ve' if len(workers) > 1 else 's'}"


@functools.cache
def _checksums(mesh: Mesh, spec: P) -> Any:
    """A program from an array to the checksums of each device's part, uint32 [devices]; it sends nothing."""
    whole = P(tuple(mesh.axis_names))
    one = lambda x: checksum(x)[None]  # noqa: E731
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=whole, check_vma=False))


def checksum(x: jax.Array) -> jax.Array:
    """A checksum of an array's bits and their places, uint32; a change of one word always changes it."""
    bits = _bits(x).reshape(-1).astype(jnp.uint32)
    places = lax.iota(jnp.uint32, bits.size)
    return jnp.sum(mixed(bits ^ mixed(places)), dtype=jnp.uint32)


@functools.cache
def _from_first(mesh: Mesh, spec: P) -> Any:
    """A program that gives all copies of an array the first one's bits."""
    along = {name for entry in spec if entry is not None for name in axis_names(entry)}
    copies = tuple(name for name in mesh.axis_names if name not in along)

    def one(x: jax.Array) -> jax.Array:
        bits, _ = Wire(copies).from_first(_bits(x))
        return _of_bits(bits, x)

    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _bits(x: jax.Array) -> jax.Array:
    """An array's bits, as whole numbers of 8 to 32 bits without sign, with the array's leading axes."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_bits(x.real), _bits(x.imag)], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(x, _unsigned(x.dtype))
    return bits if _unsigned(x.dtype).itemsize > 1 else bits.astype(jnp.uint8)


def _of_bits(bits: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_bits`, for an array like `like`."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(like))
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        real, imaginary = (_of_bits(bits[..., part], like.real) for part in range(2))
        return lax.complex(real, imaginary)
    if like.dtype == jnp.bool_:
        return bits.astype(jnp.bool_)
    return lax.bitcast_convert_type(bits.astype(_unsigned(like.dtype)), like.dtype)


def _unsigned(dtype: Any) -> jnp.dtype:
    """The type of an element's bits; elements of 64 bits become two of 32."""
    bits = (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits
    return jnp.dtype(f"uint{min(32, bits)}")
