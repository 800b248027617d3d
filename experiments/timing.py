"""Exchanges timed in turn, round after round, and the gradients and states that they are timed with."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax import AccordionState, CompressorState, GradiVeQState, place


class Way(NamedTuple):
    """Something that is timed.

    Attributes:
      step: state -> (results, state); it may consume the state.
      state: the state to start from.
      hold: state -> the state before each step, made outside the time.
      copies: the name of another way, given before: the step is given a copy of that way's state, and what becomes of
        the copy is dropped. So a state that is as large as the gradient is there once.
    """

    step: Callable[[Any], tuple[Any, Any]]
    state: Any = ()
    hold: Callable[[Any], Any] = lambda state: state
    copies: str = ""


class Timed(NamedTuple):
    """The outcome of `in_turn`, by way.

    Attributes:
      seconds: of each round; of its slowest process.
      counted: the differences that `counter` told, of each round; of this process.
      states: the state after the last round.
    """

    seconds: dict[str, list[float]]
    counted: dict[str, list[list[int]]]
    states: dict[str, Any]


def in_turn(
    ways: Mapping[str, Way], rounds: int, mesh: Mesh | None = None, counter: Callable[[], Sequence[int]] = tuple
) -> Timed:
    """Runs all ways once in each round, and one round more before these, which may compile.

    Args:
      ways: the ways by name.
      rounds: how many rounds count.
      mesh: the mesh of all processes, which begin each way together; None for a single process.
      counter: counts that are read before and after each step, such as the bytes of an interface.
    """
    together = (lambda: None) if mesh is None else beginning(mesh)
    copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counted: dict[str, list[list[int]]] = {name: [] for name in ways}
    states = {name: way.state for name, way in ways.items()}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            state = jax.block_until_ready(copied(states[way.copies]) if way.copies else way.hold(states[name]))
            together()
            before, began = counter(), time.perf_counter()
            results, after = jax.block_until_ready(way.step(state))
            if turn:
                seconds[name].append(time.perf_counter() - began)
                counted[name].append([y - x for x, y in zip(before, counter(), strict=True)])
            states[name] = () if way.copies else after
            del results, state, after
    return Timed(slowest(seconds), counted, states)


def beginning(mesh: Mesh) -> Callable[[], None]:
    """A function that returns in all processes at about the same time."""
    spec = P(mesh.axis_names)
    ones = jax.jit(lambda: jnp.ones(mesh.size), out_shardings=NamedSharding(mesh, spec))()
    total = jax.jit(jax.shard_map(lambda x: lax.psum(x, mesh.axis_names), mesh=mesh, in_specs=spec, out_specs=P(None)))
    return lambda: jax.block_until_ready(total(ones)) and None


def slowest(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """The largest of all processes' times, round by round."""
    if jax.process_count() == 1:
        return seconds
    each = multihost_utils.process_allgather(np.array(list(seconds.values()), np.float32))
    return dict(zip(seconds, each.max(0).tolist(), strict=True))


def random_gradients(shapes: Any, mesh: Mesh) -> Any:
    """Gradients of 0.01 standard deviation, other ones for each device, [*mesh, ...], for a tree of shapes."""
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    axes, lead = mesh.axis_names, (1,) * len(mesh.axis_names)

    sizes = [math.prod(shape) for shape in leaves]

    def drawn() -> list[jax.Array]:  # on each device: a host that drew all would have to send them
        key = jax.random.fold_in(jax.random.key(0), lax.axis_index(axes))
        flat = 0.01 * jax.random.normal(key, (sum(sizes),))  # at once: a draw for each leaf compiles for long
        pieces = jnp.split(flat, np.cumsum(sizes)[:-1])
        return [x.reshape(*lead, *shape) for x, shape in zip(pieces, leaves, strict=True)]

    return jax.tree.unflatten(tree, jax.jit(jax.shard_map(drawn, mesh=mesh, in_specs=(), out_specs=P(*axes)))())


def zeros_like(grads: Any, mesh: Mesh) -> Any:
    """Zeros of the parameters' shapes, for gradients [*mesh, ...]."""
    return place(jax.tree.map(lambda x: np.zeros(x.shape[mesh.devices.ndim :], x.dtype), grads), mesh)


def at_level(level: int, own: AccordionState) -> AccordionState:
    """Accordion's state with all leaves at one level."""
    return own._replace(level={path: jnp.int32(level) for path in own.level})


def at_position(position: int, own: GradiVeQState) -> GradiVeQState:
    """GradiVeQ's state at a place in its cycle."""
    return own._replace(position=jnp.int32(position))


def with_samples(own: GradiVeQState) -> GradiVeQState:
    """GradiVeQ's state with noise as samples, because bases of zeros are found too quickly."""
    samples = {path: jax.random.normal(jax.random.key(0), x.shape) for path, x in own.samples.items()}
    return own._replace(samples=samples)


def changed(state: CompressorState, change: Callable[[Any], Any]) -> CompressorState:
    """The state, with a change to the state of GradiVeQ or accordion inside it."""
    phased = lambda x: isinstance(x, AccordionState | GradiVeQState)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if phased(x) else x, state, is_leaf=phased)
