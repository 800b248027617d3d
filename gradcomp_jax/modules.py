"""Flax's NNX in a step: modules and optimisers that are changed in place.

Nothing here imports Flax before the caller has.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax

from gradcomp_jax.exchange import collectives


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """The contents of a model and its optimiser, in the form of a TrainState.

    Attributes:
      params: the parameters, a tree of arrays.
      opt_state: the optimiser's state.
      step: steps done.
      tx: the optimiser's transformation.
    """

    params: Any
    opt_state: Any
    step: Any
    tx: Any = dataclasses.field(metadata={"static": True})

    def replace(self, **changes: Any) -> "Held":
        """The same with some parts changed."""
        return dataclasses.replace(self, **changes)


def is_module(x: Any) -> bool:
    """Whether `x` is a module of Flax's NNX."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


class ModuleStep:
    """A step (model, optimizer, batch, ...) -> loss, or (loss, aux), that changes model and optimizer in place.

    The model's other floating state, such as batch statistics, is averaged over the workers. Each worker folds its
    index into the model's random keys, which stay as they are.

    Args:
      make: makes a step from a loss_fn (params, model_state, batch, ..., shared).
      loss_fn: (model, batch, ...) -> loss, or (loss, aux).
      axes: the axes of the workers.
      has_aux: loss_fn returns auxiliary outputs.
      extra: whether there is a last argument that all workers share, 1 or 0.
    """

    def __init__(self, make: Callable[[Any], Callable[..., Any]], loss_fn: Any, axes: Any, has_aux: bool, extra: int):
        self._make, self._loss_fn, self._axes, self._has_aux, self._extra = make, loss_fn, axes, has_aux, extra
        self._steps: dict[Any, Callable[..., Any]] = {}

    def __call__(self, model: Any, optimizer: Any, *rest: Any) -> Any:
        from flax import nnx

        bare = getattr(nnx, "as_pure", None) or nnx.pure  # its name before Flax 0.12.1
        if not isinstance(optimizer, nnx.Optimizer):
            raise ValueError(f"after a module the step takes its nnx.Optimizer, got a {type(optimizer).__name__}")
        parts: Any = nnx.split(model, optimizer.wrt, nnx.RngKey, ...)
        graph, params, keys, others = parts
        if graph not in self._steps:
            self._steps[graph] = self._make(self._loss_of(graph, jax.tree.structure(params), optimizer.wrt))
        held = Held(bare(params), bare(optimizer.opt_state), optimizer.step[...], optimizer.tx)
        given, shared = rest[: len(rest) - self._extra], rest[len(rest) - self._extra :]
        results = self._steps[graph](held, others, *given, (keys, *shared))
        held, others, out = results[0], results[1], results[2:]
        nnx.update(model, held.params, others)
        nnx.update(optimizer.opt_state, nnx.state(held.opt_state))
        optimizer.step[...] = held.step
        return tuple(out) if self._has_aux else out[0]

    def _loss_of(self, graph: Any, treedef: Any, wrt: Any) -> Callable[..., Any]:
        """loss_fn as a function of the parameters and the other state of a model with this graph."""
        from flax import nnx

        def of_params(params: Any, others: Any, *given: Any) -> Any:
            keys, *shared = given[-1]
            index = collectives.worker_index(self._axes)
            keys = jax.tree.map(lambda key: jax.random.fold_in(key, index), keys)
            others = jax.tree.map(lambda x: x, others)  # variables that this trace may change
            model = nnx.merge(graph, jax.tree.unflatten(treedef, jax.tree.leaves(params)), keys, others)
            out = self._loss_fn(model, *given[:-1], *shared)
            loss, aux = out if self._has_aux else (out, None)
            others = nnx.split(model, wrt, nnx.RngKey, ...)[-1]
            return loss, (others, aux) if self._has_aux else others

        return of_params
