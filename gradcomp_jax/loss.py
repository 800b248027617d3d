"""A worker's own loss and gradients, whatever a model contains.

`shard_map(check_vma=True)` tracks by types what may differ between workers. Some models train, but cannot be given such
types: a scan whose carry starts from a constant, a conditional with a constant branch, a custom_vjp that returns plain
zeros. Their step is traced without types.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.exchange import collectives

_CONSTRAINED = (
    "loss_fn constrains the sharding of an array{what}. In a step each worker computes on its own part of the batch, "
    "on a device of its own (with check_vma=False too), and nothing is sharded over the axes {axes} of the mesh. "
    "Leave with_sharding_constraint out of loss_fn. To shard a model over a further axis, leave that axis to the "
    "compiler, in a shard_map of your own with axis_names= the workers' axes alone"
)


class UntypedError(Exception):
    """The model fails under shard_map's types; its own error is the cause."""


def own_gradients(loss_fn: Callable[..., Any], params: Any, rest: Any, axes: tuple[str, ...], scale: Any) -> Any:
    """This worker's loss, what is beside it, and gradients.

    Args:
      loss_fn: (params, rest) -> (loss, others).
      params: the parameters, the same on all workers.
      rest: what else loss_fn takes.
      axes: of the workers.
      scale: by which the loss is multiplied before it is differentiated.

    Returns:
      ((loss, others), gradients); the loss as it was returned, gradients of it times the scale.

    Raises:
      UntypedError: where types are tracked, loss_fn raised anything.
      ValueError: the loss is reduced over the workers already.
    """

    def scaled(params: Any, rest: Any) -> tuple[Any, Any]:
        loss, others = loss_fn(params, rest)
        return loss if scale is None else loss.astype(scale.dtype) * scale, (loss, others)

    typed = collectives.tracked(axes)
    try:
        (_, beside), grads = jax.value_and_grad(scaled, has_aux=True)(collectives.vary(params, axes), rest)
    except Exception as error:
        if typed:
            raise UntypedError from error
        raise
    if collectives.known_equal(beside[0], axes):
        raise ValueError(
            f"loss_fn's loss is already reduced over the workers along {axes}, which would divide its "
            "gradients: return the worker's own mean, the step averages the loss it returns"
        )
    return beside, grads


def require_unconstrained(loss_fn: Callable[..., Any], params: Any, rest: Any, mesh: Mesh, specs: Any) -> None:
    """Refuses a sharding constraint in a model, which jax would notice when it compiles, in words of its own.

    Args:
      loss_fn: (params, rest) -> (loss, others).
      params: the parameters.
      rest: what else loss_fn takes.
      mesh: the workers.
      specs: how `rest` is split over the mesh.

    Raises:
      ValueError: an array is constrained over an axis of the mesh.
    """
    loss = jax.shard_map(
        lambda params, rest: loss_fn(params, rest)[0],
        mesh=mesh,
        in_specs=(P(), specs),
        out_specs=P(),
        check_vma=False,
    )
    try:
        jaxpr = jax.make_jaxpr(loss)(params, rest)
    except ValueError as error:
        if "with_sharding_constraint" in str(error):
            raise ValueError(_CONSTRAINED.format(what="", axes=mesh.axis_names)) from error
        raise
    for equation in _equations(jaxpr.jaxpr):
        if equation.primitive.name == "sharding_constraint" and not _everywhere(equation.params["sharding"]):
            what = f" of shape {equation.invars[0].aval.shape} to {equation.params['sharding']}"
            raise ValueError(_CONSTRAINED.format(what=what, axes=mesh.axis_names))


def _everywhere(sharding: Any) -> bool:
    return isinstance(sharding, NamedSharding) and not any(sharding.spec)


def _equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[Any]:
    """All equations, those of loops, branches and functions inside included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)
