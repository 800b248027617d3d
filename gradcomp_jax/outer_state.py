"""The state of `outer`, and what can be read in it."""

from typing import Any, NamedTuple

import jax
import optax

from gradcomp_jax.compressor import AnyState
from gradcomp_jax.sharding import PerWorker


class Worker(NamedTuple):
    """What a worker has of its own between exchanges; a local step changes all of it, and nothing else but the place.

    Attributes:
      params: the worker's own parameters.
      inner: the inner optimiser's state.
      held: int32, the steps that were left out because this worker's gradient was not finite.
      absent: int32, the times that this worker began anew because its difference was not finite.
      weight: float32 [fragments], the weight of its steps since each fragment was last exchanged.
      loss: float32, the sum of the finite losses since the last exchange.
      steps: float32, the number of losses in that sum.
    """

    params: Any
    inner: Any
    held: jax.Array
    absent: jax.Array
    weight: jax.Array
    loss: jax.Array
    steps: jax.Array


class OuterState(NamedTuple):
    """State of `outer`.

    Attributes:
      worker: a `Worker`, what each worker has of its own.
      place: int32, the place in the period, the same on all workers, see `gradcomp_jax.periods`.
      codec: the state of the codec's transformation, for each fragment.
      outer: the outer optimiser's state, for each fragment; the same on all workers.
      rest: by path, for parameters of 16 bits, what the anchor has beyond them, float32.
      loss: the mean loss over all workers and their steps between the last exchange and the one before; NaN before the
        first exchange, and after one that was void.
    """

    worker: PerWorker
    place: jax.Array
    codec: tuple[AnyState, ...]
    outer: tuple[Any, ...]
    rest: dict[str, jax.Array]
    loss: jax.Array


def local_params(opt_state: Any) -> Any:
    """Each worker's own parameters under `outer`, at which gradients are to be taken.

    Args:
      opt_state: the optimiser's state. Inside a shard_map of your own, in its local form, this worker's parameters
        come out; outside, from the global form, those of all workers, with a leading axis for them.

    Raises:
      ValueError: `opt_state` is not of an `outer`.
    """
    return outer_state(opt_state).worker.value.params


def held(opt_state: Any) -> jax.Array:
    """The local steps that each worker left out because its gradient was not finite: int32 [workers], global form.

    Raises:
      ValueError: `opt_state` is not of an `outer`.
    """
    return outer_state(opt_state).worker.value.held


def absent(opt_state: Any) -> jax.Array:
    """The times that each worker, absent from an exchange, began anew from the anchor: int32 [workers], global form.

    Raises:
      ValueError: `opt_state` is not of an `outer`.
    """
    return outer_state(opt_state).worker.value.absent


def on_schedule(state: Any, other: Any) -> Any:
    """An inner optimiser's state with the schedules, and the values of `optax.inject_hyperparams`, of another.

    Without it a worker that leaves out steps, or begins anew, would have another learning rate than the others. The
    state of a schedule is any NamedTuple whose only field is `count`, as optax's are.
    """
    injects = lambda x: isinstance(x, optax.InjectStatefulHyperparamsState)  # noqa: E731
    counts = lambda x: getattr(x, "_fields", None) == ("count",)  # noqa: E731

    def one(own: Any, others: Any) -> Any:
        if injects(own):
            return others._replace(inner_state=on_schedule(own.inner_state, others.inner_state))
        return others if counts(own) else own

    return jax.tree.map(one, state, other, is_leaf=lambda x: injects(x) or counts(x))


def outer_state(opt_state: Any) -> OuterState:
    """The state of the `outer` in an optimiser's state; raises ValueError if there is none."""
    found = outer_states(opt_state)
    if not found:
        raise ValueError(f"opt_state is not of an outer(...): got {type(opt_state).__name__}")
    return found[0]


def outer_states(tree: Any) -> list[OuterState]:
    """The states of `outer` in a tree."""
    is_outer = lambda x: isinstance(x, OuterState)  # noqa: E731
    return [x for x in jax.tree.leaves(tree, is_leaf=is_outer) if is_outer(x)]


def require_whole_optimiser(state: Any) -> None:
    """Raises ValueError if an `outer` is only a part of the optimiser with this state."""
    if not isinstance(state, OuterState) and outer_states(state):
        raise ValueError(
            "outer(...) is a whole optimiser, and tx has something around it, such as optax.chain: what comes after it "
            "would move the anchor, and not the workers. Chain inside: outer(optax.chain(...), ...) for local steps, "
            "outer=optax.chain(...) for outer steps"
        )
