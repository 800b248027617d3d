"""The mesh of workers that a step runs on."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from gradcomp_jax.arguments import is_whole, own, shown


def make_mesh(workers: int | Mapping[str, int] | None = None) -> Mesh:
    """A device mesh for `train_step` and `data_parallel`.

    Args:
      workers: the number of devices to lay along the axis "data"; or axis names with their sizes, such as
        `{"node": 2, "local": 4}`; by default all devices along "data".

    Returns:
      A mesh with automatic axes, which take ordinary arrays.

    Raises:
      ValueError: there are fewer devices, no axis, or a size that is not a whole number of at least 1.
    """
    available = jax.device_count()
    if not isinstance(workers, Mapping):
        workers = {"data": available if workers is None else workers}
    if not workers:
        raise ValueError("a mesh needs an axis of workers, such as make_mesh({'data': 4})")
    needed = 1
    for name, size in workers.items():
        if not is_whole(size) or size < 1:
            raise ValueError(
                f"axis {name!r} of the mesh has {shown(size)} workers, it needs at least 1, a whole number"
            )
        needed *= size
    if needed > available:
        raise ValueError(
            f"a mesh of {dict(workers)} needs {needed} devices, jax has {available}; a CPU can stand for "
            f"several: jax.config.update('jax_num_cpu_devices', {needed}) before jax is first used, or use "
            "simulate(), which needs one device only"
        )
    devices = jax.devices()[:needed]
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        # jax.make_mesh refuses several TPU slices, or GPU hosts: they lie one after another, along the first axes.
        by_slice = sorted(devices, key=lambda device: (device.slice_index, device.id))
        return Mesh(np.reshape(np.array(by_slice), tuple(workers.values())), tuple(workers))
    return jax.make_mesh(
        tuple(workers.values()), tuple(workers), axis_types=(AxisType.Auto,) * len(workers), devices=devices
    )


def require_mesh(mesh: Any, or_workers: bool = True) -> Any:
    """`mesh`, if it is a mesh or a number of workers; for None, a mesh over all devices.

    Raises:
      ValueError: it is neither, or it is a number and only a mesh will do.
    """
    mesh = own("mesh", mesh)
    if mesh is None:
        return make_mesh()
    if isinstance(mesh, Mesh) or (or_workers and is_whole(mesh)):
        return mesh
    workers = ", or, for simulate, the number of workers" if or_workers else "; simulate takes a number of workers"
    raise ValueError(f"mesh={shown(mesh)} must be a mesh, such as make_mesh(4){workers}")


def automatic(mesh: Mesh) -> Mesh:
    """`mesh` with automatic axes, which take ordinary arrays; the axes of `jax.make_mesh` are explicit."""
    return Mesh(mesh.devices, mesh.axis_names)


def lies_on(x: Any, mesh: Any) -> bool:
    """Whether an array, or a shape with a sharding, lies on such a mesh."""
    lies = getattr(x, "sharding", None)
    return isinstance(lies, NamedSharding) and isinstance(lies.mesh, Mesh) and automatic(lies.mesh) == automatic(mesh)


def in_automatic_axes(mesh: Mesh | int, f: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `f` with the axes of all meshes automatic, whatever mesh the caller has set.

    Under `jax.set_mesh(jax.make_mesh(...))` the axes are explicit. Then arrays carry their sharding in their types, and
    arrays on a mesh with automatic axes are refused. So arguments are converted from the caller's types, and results
    are converted back; the memory stays where it is.

    Args:
      mesh: the mesh for which f computes; or a number of workers, for any mesh.
      f: a function from trees of arrays to a tree of arrays.
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
    """The arrays of a tree in the same place, on meshes whose axes have these types; other axes are automatic."""

    def typed(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or not isinstance(getattr(x, "sharding", None), NamedSharding):
            return x
        old = x.sharding.mesh
        new = Mesh(old.devices, old.axis_names, tuple(types.get(name, AxisType.Auto) for name in old.axis_names))
        return x if new == old else jax.device_put(x, NamedSharding(new, x.sharding.spec))

    return jax.tree.map(typed, tree)
