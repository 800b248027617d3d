"""One compiled step per codec, context, number of workers and tree, which returns all numbers that the laws need.

Compiling is the cost of these tests. So every test gets a codec's numbers from `run`, with a tree and a number of
workers that other tests use too; the number of steps does not matter. A step runs a compressor over gradients
[workers, ...] and returns the updates and the state of every worker. It returns replicated leaves for every worker too,
so that a test can see whether they are equal.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.agreement import Shapes
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.mesh import make_mesh
from gradcomp_jax.placing import init
from gradcomp_jax.sharding import global_state, is_per_worker, local_state

CONTEXTS = ("vmap", "pmap", "checked", "unchecked")


class Run(NamedTuple):
    """The results of a run, as numpy arrays.

    Attributes:
      updates: [steps, workers, ...].
      states: a CompressorState of arrays [steps, workers, ...], after each step.
    """

    updates: Any
    states: Any


def run(tx: Compressor, grads: Any, context: str, state: Any = None) -> Run:
    """Runs `tx` over grads [steps, workers, ...] in a context; `state` is a global state to start from."""
    step, state = program(tx, grads, context, state)
    if context == "unchecked":
        return Run(*jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), step(grads, state)))
    history = []
    for t in range(jax.tree.leaves(grads)[0].shape[0]):
        *seen, state = step(jax.tree.map(lambda x, t=t: x[t], grads), state)
        history.append(seen)
    return Run(*jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(history)))


def program(tx: Compressor, grads: Any, context: str, state: Any = None) -> tuple[jax.stages.Compiled, Any]:
    """The compiled step of `run`, and its first state; in the context "unchecked" a scan of all steps."""
    if state is None:
        state = first_state(tx, jax.tree.map(lambda x: x[0], grads))
    if context == "pmap":
        workers = jax.tree.leaves(grads)[0].shape[1]
        state = map_state(lambda x: x, lambda x: np.broadcast_to(x, (workers, *np.shape(x))), state)
    step_grads = grads if context == "unchecked" else jax.tree.map(lambda x: x[0], grads)
    return _program(tx, Shapes.of(step_grads), Shapes.of(state), context, jax.config.read("jax_enable_x64")), state


def first_state(tx: Compressor, grads: Any) -> Any:
    """The global state before steps with gradients [workers, ...]."""
    state = _state_of_one(tx, Shapes.of(jax.tree.map(lambda x: x[0], grads)))
    workers = jax.tree.leaves(grads)[0].shape[0]
    return map_state(lambda x: np.broadcast_to(x, (workers, *x.shape[1:])), lambda x: x, state)


def sharded(tx: Compressor, grads: Any, state: Any, check_vma: bool, scan: bool = False) -> tuple[Any, Any, Any]:
    """A step under shard_map, its mesh, and the PartitionSpecs of its arguments.

    The step takes gradients [workers, ...], in a scan [steps, workers, ...], and the state. It returns the updates and
    the state of each worker. Outside a scan it also returns the state for the next step.
    """
    mesh = make_mesh(jax.tree.leaves(grads)[0].shape[1 if scan else 0])
    specs = P(None, "data") if scan else P("data"), map_state(lambda _: P("data"), lambda _: P(), state)
    function = jax.shard_map(
        functools.partial(_steps if scan else _step, tx),
        mesh=mesh,
        in_specs=specs,
        out_specs=P("data") if scan else (P("data"), P("data"), specs[1]),
        check_vma=check_vma,
    )
    return function, mesh, specs


def _step(tx: Compressor, grads: Any, state: Any) -> tuple[Any, Any, Any]:
    """A step of one worker inside shard_map."""
    updates, state = tx.update(jax.tree.map(lambda x: x[0], grads), local_state(state))
    return *jax.tree.map(lambda x: x[None], (updates, state)), global_state(state)


def _steps(tx: Compressor, grads: Any, state: Any) -> tuple[Any, Any]:
    """All steps of one worker inside shard_map, in a scan."""

    def body(state: Any, g: Any) -> Any:
        updates, after = tx.update(g, state)
        return after, (updates, state)

    # The scan gives the state before each step: XLA may compute a second copy of the state after it separately, with
    # other last bits.
    local = local_state(state)
    last, (updates, before) = lax.scan(body, local, jax.tree.map(lambda x: x[:, 0], grads))
    states = jax.tree.map(lambda x, end: jnp.concatenate([x[1:], end[None]]), before, last)
    return jax.tree.map(lambda x: x[None], (updates, states))


def map_state(per_worker: Callable, other: Callable, *states: Any) -> Any:
    """A state, mapped with `per_worker` where it differs between the workers, and with `other` where it does not."""
    f = lambda *x: jax.tree.map(per_worker, *x) if is_per_worker(x[0]) else other(*x)  # noqa: E731
    return jax.tree.map(f, *states, is_leaf=is_per_worker)


def worker_axes(state: Any) -> Any:
    """The axes for vmap over the workers: 0 where a state differs between them, None where it does not."""
    return map_state(lambda _: 0, lambda _: None, state)


@functools.cache
def _state_of_one(tx: Compressor, shapes: Shapes) -> Any:
    # Zeros of numpy: jax would compile a program for each shape, and that adds up.
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.tree())
    return jax.device_get(init(tx, params, 1))


@functools.cache
def _program(tx: Compressor, of_grads: Shapes, of_state: Shapes, context: str, x64: bool) -> jax.stages.Compiled:
    del x64
    grads, state = of_grads.tree(), of_state.tree()
    step: Any

    def worker(grads, state):
        updates, state = tx.update(grads, state)
        return updates, state, state

    if context == "vmap":
        # out_axes=None asserts that the replicated part is the same on all workers.
        axes = worker_axes(state)
        step = jax.jit(jax.vmap(worker, in_axes=(0, axes), out_axes=(0, 0, axes), axis_name="data"))
    elif context == "pmap":
        step = jax.pmap(worker, axis_name="data", devices=jax.devices()[: jax.tree.leaves(grads)[0].shape[0]])
    else:
        step, mesh, specs = sharded(tx, grads, state, check_vma=context == "checked", scan=context == "unchecked")
        # Results lie like the arguments, so that they can be arguments again.
        step = jax.jit(step, in_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec))
    return step.lower(grads, state).compile()


def forget() -> None:
    """Drops the compiled steps."""
    _program.cache_clear()
    _state_of_one.cache_clear()


def is_spec(x: Any) -> bool:
    """Whether `x` is a PartitionSpec."""
    return isinstance(x, P)
