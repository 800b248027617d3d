"""What is left when processes have died: their mesh, their state, and parts of a checkpoint. Nothing here communicates.

A state in its global form has rows for the workers, and each process holds the rows of its own devices. Without the
dead the rows of the others stay, bit for bit, and so does what is the same on all workers.
"""

import os
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gradcomp_jax.mesh import require_mesh


class Share(NamedTuple):
    """Which part of the rows is a process's: number `part`, from 0, of `parts`, one for each process of a mesh."""

    part: int
    parts: int


def share_of(mesh: Mesh | None = None) -> Share:
    """This process's place among the processes of a mesh, by which it takes its share of the data.

    After a death jax still counts all processes that began: use this in the place of `jax.process_index()` and
    `jax.process_count()`.

    Args:
      mesh: the mesh of the step, by default of all devices.

    Returns:
      (part, parts).

    Raises:
      ValueError: this process has no device of the mesh.

    >>> import gradcomp_jax as gcj
    >>> gcj.share_of(gcj.make_mesh(1))
    Share(part=0, parts=1)
    """
    processes = sorted(processes_of(require_mesh(mesh, or_workers=False)))
    if jax.process_index() not in processes:
        raise ValueError(f"process {jax.process_index()} has no device of the mesh, whose processes are {processes}")
    return Share(processes.index(jax.process_index()), len(processes))


def processes_of(mesh: Mesh) -> set[int]:
    """The processes that have devices of a mesh."""
    return {device.process_index for device in mesh.devices.flat}


def without_others(mesh: Mesh, members: Collection[int]) -> Mesh:
    """The mesh of the devices of some processes.

    Raises:
      ValueError: they are no grid, as when a slice has lost only a part of its chips.
    """
    stays = np.vectorize(lambda device: device.process_index in members, otypes=[bool])(mesh.devices)
    for axis in range(stays.ndim):
        others = tuple(k for k in range(stays.ndim) if k != axis)
        whole = stays.all(axis=others)
        if whole.any() and (whole == stays.any(axis=others)).all():
            return Mesh(mesh.devices.compress(whole, axis), mesh.axis_names, axis_types=mesh.axis_types)
    raise ValueError(
        f"the devices of processes {sorted(members)} are no grid along the axes {mesh.axis_names}: a slice has lost "
        "only some of its chips, and the others are of no use without them"
    )


def turned(mesh: Mesh) -> Mesh:
    """The mesh with its first process behind the others."""
    first = mesh.devices.flat[0].process_index
    count = sum(any(x.process_index == first for x in row.flat) for row in np.split(mesh.devices, len(mesh.devices)))
    return Mesh(np.roll(mesh.devices, -count, axis=0), mesh.axis_names, axis_types=mesh.axis_types)


def moved(tree: Any, mesh: Mesh) -> Any:
    """A state on another mesh of devices that hold it already: each device keeps what it has, in the same memory.

    Arrays that do not lie on a mesh, and leaves that are no arrays, stay.
    """

    def move(x: Any) -> Any:
        if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding):
            return x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(move(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        old, new = x.sharding, NamedSharding(mesh, x.sharding.spec)
        held = {shard.device: shard.data for shard in x.addressable_shards}
        counts = [_pieces(mesh, names) for names in (*x.sharding.spec, *((None,) * (x.ndim - len(x.sharding.spec))))]
        shape = [size * count for size, count in zip(old.shard_shape(x.shape), counts, strict=True)]
        return jax.make_array_from_single_device_arrays(tuple(shape), new, [held[k] for k in mesh.local_devices])

    return jax.tree.map(move, tree)


def _pieces(mesh: Mesh, names: Any) -> int:
    """Into how many pieces an axis is cut that lies over these axes of a mesh."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def save_part(directory: str | os.PathLike, process: int, step: int, state: Any) -> pathlib.Path:
    """Writes what this process holds of a state, for `restore`: `directory/step/process.npz`, all of it or nothing."""
    folder = pathlib.Path(directory) / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _own_block(x) for path, x in leaves
    }
    unfinished = folder / f"{process}.unfinished"
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    return unfinished.replace(folder / f"{process}.npz")


def _own_block(x: Any) -> np.ndarray:
    """The rows of an array that this process holds, as one array.

    Raises:
      ValueError: other processes hold rows between them.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _own_block(jax.random.key_data(x))
    starts = [[range(*k.indices(n))[0] for k, n in zip(s.index, x.shape, strict=True)] for s in x.addressable_shards]
    low = np.min(starts, axis=0).astype(int)
    ends = [np.add(start, shard.data.shape) for start, shard in zip(starts, x.addressable_shards, strict=True)]
    distinct = {tuple(start): shard.data.size for start, shard in zip(starts, x.addressable_shards, strict=True)}
    block = np.empty(np.max(ends, axis=0).astype(int) - low, x.dtype)
    if sum(distinct.values()) != block.size:
        raise ValueError("the rows of this process do not lie side by side: order the mesh by processes")
    for start, end, shard in zip(starts, ends, x.addressable_shards, strict=True):
        block[tuple(slice(int(a), int(b)) for a, b in zip(start - low, end - low, strict=True))] = shard.data
    return block


def parts_in(directory: str | os.PathLike, step: int | None) -> list[pathlib.Path]:
    """The parts that survivors saved before a step, by default the last one that there is, by process."""
    steps: dict[int, list[pathlib.Path]] = {}
    for file in pathlib.Path(directory).glob("*/*.npz"):
        if file.parent.name.isdigit() and file.stem.isdigit():
            steps.setdefault(int(file.parent.name), []).append(file)
    parts = steps.get(max(steps, default=0) if step is None else step, [])
    return sorted(parts, key=lambda file: int(file.stem))
