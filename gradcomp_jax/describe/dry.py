"""A dry run of an optimiser: its step is traced, never run, for workers that need not exist.

    tx.init --> the first state, small numbers known --> tx.update --> counts of bits, as functions of the state

Nothing is compiled, placed or allocated, however large the parameters are.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax import known
from gradcomp_jax.agreement import update_of
from gradcomp_jax.arguments import is_whole, own, require_arrays, require_transformation, shown
from gradcomp_jax.compressor import AnyState, Called, compressor_states, is_compressor_state
from gradcomp_jax.exchange.bits import WireCount, wire_bits
from gradcomp_jax.exchange.collectives import axis_names
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.exchange.shares import Began, Round
from gradcomp_jax.notes import listening
from gradcomp_jax.outer import Outer

Workers = int | Mapping[str, int] | Mesh | AbstractMesh

# The two cases where data decides whether codes fit their buffer.
FIT, DO_NOT_FIT = -1, 0


class Dry(NamedTuple):
    """A traced step.

    Attributes:
      mesh: the mesh of the workers.
      program: a closed jaxpr, gradients and state -> the counts of the codecs.
      grads: the shapes of one device's gradients.
      state: the optimiser's first state in local form: shapes, and the known small numbers.
      called: how each codec's transformation was called, in the order of their states.
      rounds: for each codec, the remark of each round, with the remark at the beginning of its bucket.
      counts: the structure of the program's results.
    """

    mesh: AbstractMesh
    program: Any
    grads: Any
    state: Any
    called: list[Called]
    rounds: list[list[tuple[Began, Round]]]
    counts: Any

    @property
    def axes(self) -> frozenset[str]:
        """The axes of the workers, without the axes of the devices of one worker."""
        return frozenset(name for one in self.called for name in axis_names(one.made.settings.axis_name))

    @property
    def platform(self) -> str:
        """The platform that the step is traced for: "cpu", "gpu" or "tpu"."""
        device = self.mesh.abstract_device
        return jax.default_backend() if device is None else device.platform

    def workers_of(self, called: Called) -> int:
        """The number of a codec's workers."""
        return _size(self.mesh, called.made.settings.axis_name)

    def chips_of(self, called: Called) -> int:
        """With `across`, the number of devices of each worker; else 1."""
        fast = called.made.settings.fast
        return 1 if fast is None else _size(self.mesh, fast)

    def with_states(self, states: Mapping[int, AnyState]) -> list[Any]:
        """The program's arguments, with other states of some codecs."""
        places = iter(range(len(self.called)))
        put = lambda x: states.get(next(places), x) if is_compressor_state(x) else x  # noqa: E731
        return jax.tree.leaves((self.grads, jax.tree.map(put, self.state, is_leaf=is_compressor_state)))

    def bits(self, place: int, state: AnyState, link: str = "between", otherwise: int | None = None) -> int:
        """The bits that a device sends for one codec in a step that begins with this state of it.

        Args:
          place: the codec's place among the codecs.
          state: the codec's state.
          link: the link, like for `wire_bits`.
          otherwise: `FIT` or `DO_NOT_FIT`, for codecs where data decides whether codes fit their buffer.

        Raises:
          known.Unknown: the data decides, and `otherwise` is not given.
        """
        found = known.outputs(self.program, self.with_states({place: state}), otherwise)
        count = jax.tree.unflatten(self.counts, found)[place]
        is_count = lambda x: isinstance(x, WireCount)  # noqa: E731
        last = jax.tree.map(lambda x: WireCount(x.last(), x.last()), count, is_leaf=is_count)
        return wire_bits(last, link).last

    def messages(self, states: Mapping[int, AnyState]) -> list[known.Message]:
        """The collectives of a step that begins with these states of the codecs."""
        return known.messages(self.program, self.with_states(states), FIT)


def shapes_of(params: Any) -> Any:
    """The shapes of parameters; raises ValueError, by name, for a leaf that is not an array."""
    require_arrays("params", params)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), params)


def dry_run(tx: optax.GradientTransformation, params: Any, workers: Workers) -> Dry:
    """Traces a step.

    Args:
      tx: the optimiser.
      params: the shapes of the parameters; always whole, even if they will lie in shards.
      workers: the workers, like for `describe`.

    Raises:
      ValueError: in the cases of `describe`.
    """
    require_transformation(tx)
    with listening() as said:
        jax.eval_shape(lambda params: tx.init(params), params)  # a new function, because jax traces equal ones once
    called = [x for x in said if isinstance(x, Called)]
    if not called:
        raise ValueError("tx holds no codec: put one first, as in optax.chain(powersgd(rank=4), optax.sgd(0.1))")
    mesh = _mesh(workers, called)
    params = _local(params, called, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        return _traced(tx, params, mesh)


def _mesh(workers: Any, called: list[Called]) -> AbstractMesh:
    """The workers as a mesh without devices."""
    workers = own("workers", workers)
    axes = tuple(dict.fromkeys(name for one in called for name in one.made.settings.axes))
    if isinstance(workers, Mesh | AbstractMesh):
        mesh = workers.abstract_mesh
        mesh = mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))
    else:
        if is_whole(workers) and len(axes) > 1:
            raise ValueError(
                f"workers={workers} is one number, and codecs of tx are along {', '.join(map(repr, axes))}: say how "
                f"many are along each, as in workers={dict.fromkeys(axes, 2)}"
            )
        sizes = workers if isinstance(workers, Mapping) else {axes[0]: workers}
        if not sizes or not all(isinstance(name, str) and is_whole(size) and size > 0 for name, size in sizes.items()):
            raise ValueError(
                f"workers={shown(workers)} must be a mesh, a number of at least 1, or such numbers by axis, as in "
                "{'node': 2, 'local': 4}"
            )
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    if missing := [name for name in axes if name not in mesh.axis_names]:
        raise ValueError(
            f"workers={shown(workers)} has no axis {missing[0]!r}, along which a codec of tx has its workers: it has "
            f"{', '.join(map(repr, mesh.axis_names))}. Name it there, or give the codec another axis_name"
        )
    return mesh


def _local(params: Any, called: list[Called], mesh: AbstractMesh) -> Any:
    """The shapes that a device sees: shards, for parameters that a codec takes to lie in shards."""
    leaves, treedef = flatten(params)
    for one in called:
        settings = one.made.settings
        for path in flatten(one.tree)[0]:
            axis = settings.cut_along(path, leaves[path], one.made.codec)
            if axis is not None:
                chips = _size(mesh, settings.fast)
                leaves[path] = _cut(path, leaves[path], axis, chips)
    return jax.tree.unflatten(treedef, leaves.values())


def _cut(path: str, leaf: Any, axis: int, chips: int) -> Any:
    if axis >= leaf.ndim or leaf.shape[axis] % chips:
        raise ValueError(
            f"leaf {path!r} of shape {leaf.shape} is to lie in {chips} shards along axis {axis}, by across(..., "
            "inside=), and does not divide: say there that it comes whole"
        )
    shape = (*leaf.shape[:axis], leaf.shape[axis] // chips, *leaf.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _size(mesh: AbstractMesh, axis: Any) -> int:
    return math.prod(mesh.shape[name] for name in axis_names(axis))


def _traced(tx: Any, params: Any, mesh: AbstractMesh) -> Dry:
    # Unchecked: `train_step`, which knows the loss, reports why it refuses a step.
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    first = _first_state(on_mesh(tx.init), params)
    places: list[int] = []

    def step(params: Any, state: Any) -> Any:
        if isinstance(tx, Outer):
            state, _ = tx.method.exchanged(range(tx.method.period(params).fragments), params, state, jnp.array(True))
        else:
            _, state = update_of(tx, mesh.shape, params, state, params, jnp.float32(0))
        after = compressor_states(state)
        for called, _ in _calls(said):
            places.extend(i for i, x in enumerate(after) if called.state and x.skipped is called.state.skipped)
        return [x.wire for x in after]

    with listening() as said:
        program, counts = jax.make_jaxpr(on_mesh(step), return_shape=True)(params, first)
    calls = _calls(said)
    # A state that comes out of a conditional is another object than the one that the codec returned inside.
    if len(places) != len(calls) or sorted(places) != list(range(len(compressor_states(first)))):
        raise ValueError(
            "tx calls a codec in some steps only, or more than once: there is a wrapper around the codec, such as "
            "optax.MultiSteps, which train_step refuses. Put it after the codec"
        )
    called, rounds = zip(*(calls[places.index(i)] for i in range(len(places))), strict=True)
    return Dry(mesh, program, params, first, list(called), list(rounds), jax.tree.structure(counts))


def _calls(said: list[Any]) -> list[tuple[Called, list[tuple[Began, Round]]]]:
    """The calls of updates, each with the remarks of its rounds."""
    found: list[tuple[Called, list[tuple[Began, Round]]]] = []
    rounds: list[tuple[Began, Round]] = []
    began: Any = None
    for x in said:
        if isinstance(x, Called) and x.plan is not None:
            found.append((x, rounds))
            rounds = []
        elif isinstance(x, Began):
            began = x
        elif isinstance(x, Round):
            rounds.append((began, x))
    return found


def _first_state(init: Any, params: Any) -> Any:
    """The first state: shapes, and the numbers that depend on no parameter."""
    program, shapes = jax.make_jaxpr(init, return_shape=True)(params)
    values = known.outputs(program, jax.tree.leaves(params))
    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(treedef, [_known(*each) for each in zip(values, leaves, strict=True)])


def _known(value: known.Value, shape: Any) -> Any:
    if shape.ndim or jnp.issubdtype(shape.dtype, jax.dtypes.extended):
        return shape
    try:
        return value()
    except known.Unknown:
        return shape
