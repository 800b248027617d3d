"""Training steps that are timed in turn, by one process or by several hosts that begin and end together."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gcj


class Case(NamedTuple):
    """What is timed, and where it is.

    Attributes:
      step: (parameters, state, batch) -> (parameters, state, ...).
      params: the parameters.
      state: the optimiser's state.
      steps: the steps of a turn.
      bytes: a function from the state to the bytes that a worker has sent in all.
    """

    step: Any
    params: Any
    state: Any
    steps: int
    bytes: Callable[[Any], float]


class Turn(NamedTuple):
    """The outcome of a turn.

    Attributes:
      case: the case after it.
      seconds: the seconds that a step took; the slowest host counts.
      bytes: the bytes that a worker sent in a step, by wire_bits.
    """

    case: Case
    seconds: float
    bytes: float


def alone(
    loss_fn: Any, inner: optax.GradientTransformation, weights: Callable[[], Any], mesh: Mesh, steps: int
) -> Case:
    """Local steps by optax alone, without any exchange; each worker has parameters of its own.

    Args:
      loss_fn: (parameters, batch) -> loss.
      inner: the optimiser.
      weights: () -> the parameters to start from.
      mesh: the workers.
      steps: the steps of a turn.
    """

    def worker(params: Any, state: Any, batch: Any) -> Any:
        params, state = (jax.tree.map(lambda x: x[0], tree) for tree in (params, state))
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda x: x[None], (params, state, loss))

    def first() -> Any:
        params = weights()
        return jax.tree.map(lambda x: x[None], (params, inner.init(params)))

    each = P(mesh.axis_names)
    # Without donation: on CPUs such a step then needs a buffer of the gradients' size more.
    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=each, out_specs=each))
    params, state = jax.jit(jax.shard_map(first, mesh=mesh, in_specs=(), out_specs=each, check_vma=False))()
    return Case(step, params, state, steps, lambda _: 0.0)


def trained(
    loss_fn: Any,
    tx: optax.GradientTransformation,
    weights: Callable[[], Any],
    mesh: Mesh,
    steps: int,
    donate: bool = False,
) -> Case:
    """Steps of `train_step`; `donate` is its own, and the other arguments are those of `alone`."""
    params = gcj.place(jax.jit(weights)(), mesh)
    state = gcj.init(tx, params, mesh)
    step = gcj.train_step(loss_fn, tx, mesh, donate=donate)
    return Case(step, params, state, steps, lambda state: gcj.wire_bits(state).total / 8)


def turn(case: Case, batch: Any, meet: Callable[[], None], steps: int | None = None) -> Turn:
    """Times the steps of a turn, one after another without a pause.

    Args:
      case: what is timed.
      batch: the batch of every step.
      meet: see `timing.beginning`.
      steps: how many; by default the case's own.
    """
    params, state, steps = case.params, case.state, steps or case.steps
    sent = case.bytes(state)
    meet()
    began = time.perf_counter()
    for _ in range(steps):
        params, state, *_ = case.step(params, state, batch)
    jax.block_until_ready((params, state))
    meet()
    seconds = time.perf_counter() - began
    return Turn(case._replace(params=params, state=state), seconds / steps, (case.bytes(state) - sent) / steps)
