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
    """What a model and its optimiser hold, as a TrainState does.

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


def on_modules(make: Callable[[Any], Callable[..., Any]], loss_fn: Any, axes: Any, has_aux: bool, extra: int) -> Any:
    """A step (model, optimizer, batch, ...) -> loss, or (loss, aux), that changes model and optimizer in place.

    The model's other floating state, such as batch statistics, is averaged over the workers. Each worker folds its
    index into the model's random keys, which stay as they are.

    Args:
      make: a loss_fn (params, model_state, batch, ..., shared) -> the step of it.
      loss_fn: (model, batch, ...) -> loss, or (loss, aux).
      axes: of the workers.
      has_aux: loss_fn returns auxiliary outputs.
      extra: whether there is a last argument that all workers share, 1 or 0.
    """
    from flax import nnx

    bare = getattr(nnx, "as_pure", None) or nnx.pure  # its name before Flax 0.12.1
    steps: dict[Any, Callable[..., Any]] = {}

    def of_graph(graph: Any, treedef: Any, wrt: Any) -> Callable[..., Any]:
        def of_model(params: Any, others: Any, *given: Any) -> Any:
            keys, *shared = given[-1]
            index = collectives.worker_index(axes)
            keys = jax.tree.map(lambda key: jax.random.fold_in(key, index), keys)
            others = jax.tree.map(lambda x: x, others)  # variables that this trace may change
            model = nnx.merge(graph, jax.tree.unflatten(treedef, jax.tree.leaves(params)), keys, others)
            out = loss_fn(model, *given[:-1], *shared)
            loss, aux = out if has_aux else (out, None)
            others = nnx.split(model, wrt, nnx.RngKey, ...)[-1]
            return loss, (others, aux) if has_aux else others

        return make(of_model)

    def step(model: Any, optimizer: Any, *rest: Any) -> Any:
        if not isinstance(optimizer, nnx.Optimizer):
            raise ValueError(f"after a module the step takes its nnx.Optimizer, got a {type(optimizer).__name__}")
        parts: Any = nnx.split(model, optimizer.wrt, nnx.RngKey, ...)
        graph, params, keys, others = parts
        if graph not in steps:
            steps[graph] = of_graph(graph, jax.tree.structure(params), optimizer.wrt)
        held = Held(bare(params), bare(optimizer.opt_state), optimizer.step[...], optimizer.tx)
        given, shared = rest[: len(rest) - extra], rest[len(rest) - extra :]
        results = steps[graph](held, others, *given, (keys, *shared))
        held, others, out = results[0], results[1], results[2:]
        nnx.update(model, held.params, others)
        nnx.update(optimizer.opt_state, nnx.state(held.opt_state))
        optimizer.step[...] = held.step
        return tuple(out) if has_aux else out[0]

    return step
