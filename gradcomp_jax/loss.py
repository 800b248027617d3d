"""A worker's own loss and gradients, for any model.

The types of `shard_map(check_vma=True)` track which values may differ between workers. Some models train, but cannot be
given such types: a scan whose carry starts from a constant, a conditional with a constant branch, a custom_vjp that
returns plain zeros. Their step is traced without types.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax import beside
from gradcomp_jax.entry import Form
from gradcomp_jax.exchange import collectives
from gradcomp_jax.known import equations
from gradcomp_jax.views import widen

_CONSTRAINED = (
    "loss_fn constrains the sharding of an array{what}. In a step each worker computes on its own part of the batch, "
    "on a device of its own (with check_vma=False too), and nothing is sharded over the axes {axes} of the mesh. "
    "Leave with_sharding_constraint out of loss_fn. To shard a model over a further axis, leave that axis to the "
    "compiler, in a shard_map of your own with axis_names= the workers' axes alone"
)


class UntypedError(Exception):
    """The model fails under shard_map's types; its own error is the cause."""


def own_gradients(loss_fn: Callable[..., Any], params: Any, rest: Any, axes: tuple[str, ...], scale: Any) -> Any:
    """This worker's loss, the outputs beside it, and its gradients.

    Args:
      loss_fn: (params, rest) -> (loss, others).
      params: the parameters, the same on all workers.
      rest: the other arguments of loss_fn.
      axes: the axes of the workers.
      scale: the factor for the loss before it is differentiated, or None.

    Returns:
      ((loss, others), gradients). The loss is as loss_fn returned it; the gradients are those of loss * scale.

    Raises:
      UntypedError: types are tracked, and loss_fn raised an error.
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


def accumulated_gradients(
    loss_fn: Callable[..., Any], params: Any, rest: Any, axes: tuple[str, ...], scale: Any, form: Form, micro: int
) -> Any:
    """Like `own_gradients`, over `micro` parts of the worker's batch, one after another in one loop.

    The gradients are means over the parts, summed in float32 or wider. A model state passes from part to part. Each
    part has a key of its own.

    Args:
      loss_fn: (params, rest) -> (loss, (model state, auxiliary outputs)).
      params: the parameters, the same on all workers.
      rest: the other arguments of loss_fn, in the given form.
      axes: the axes of the workers.
      scale: the factor for the loss before it is differentiated, or None.
      form: the form of rest.
      micro: the number of parts into which the batch is cut, along the first axes.

    Returns:
      ((loss, (model state, auxiliary outputs)), gradients); auxiliary outputs have a leading axis of parts.
    """
    k = int(form.has_state)
    parts = jax.tree.map(lambda x: x.reshape(micro, -1, *x.shape[1:]), rest[k])

    def turn(carry: Any, given: Any) -> tuple[Any, Any]:
        total, state = carry
        which, part = given
        key = tuple(jax.random.fold_in(key, which) for key in rest[k + 1 : k + 1 + form.rng])
        of_part = (*state, part, *key, *rest[k + 1 + form.rng :])
        (loss, (new_state, aux)), grads = own_gradients(loss_fn, params, of_part, axes, scale)
        if form.has_state:
            beside.require_like(new_state, state[0])
            state = (jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state[0]),)
        return (jax.tree.map(lambda sum_, g: sum_ + widen(g) / micro, total, grads), state), (loss, aux)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, widen(jnp.zeros((), x.dtype)).dtype), params)
    first = collectives.vary((zeros, tuple(rest[:k])), axes)
    (total, state), (losses, aux) = jax.lax.scan(turn, first, (jnp.arange(micro), parts))
    grads = jax.tree.map(lambda x, like: x.astype(like.dtype), total, params)
    return (jnp.mean(losses), (state[0] if state else None, aux)), grads


def with_rest(loss_fn: Callable[..., Any], form: Form) -> Callable[..., Any]:
    """`loss_fn` as (params, rest) -> (loss, (model state, auxiliary outputs)); None if there is none."""

    def called(params, rest):
        out = loss_fn(params, *rest)
        if not (form.has_state or form.has_aux):
            return out, (None, None)
        loss, more = out
        more = jax.tree.map(jnp.asarray, more)  # Python's numbers too
        if form.has_state and form.has_aux:
            return loss, more
        return loss, (more, None) if form.has_state else (None, more)

    return called


def of_worker(rest: tuple[Any, ...], form: Form, axes: tuple[str, ...]) -> tuple[Any, ...]:
    """The arguments of loss_fn after params on this worker, with its own key."""
    if not form.rng:
        return rest
    key = rest[form.has_state + 1]
    return (
        *rest[: form.has_state + 1],
        jax.random.fold_in(key, collectives.worker_index(axes)),
        *rest[form.has_state + 2 :],
    )


def require_unconstrained(loss_fn: Callable[..., Any], params: Any, rest: Any, mesh: Mesh, specs: Any) -> None:
    """Refuses a sharding constraint in a model, in our own words; jax would notice it only when it compiles.

    Args:
      loss_fn: (params, rest) -> (loss, others).
      params: the parameters.
      rest: the other arguments of loss_fn.
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
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name == "sharding_constraint" and not _everywhere(equation.params["sharding"]):
            what = f" of shape {equation.invars[0].aval.shape} to {equation.params['sharding']}"
            raise ValueError(_CONSTRAINED.format(what=what, axes=mesh.axis_names))


def _everywhere(sharding: Any) -> bool:
    return isinstance(sharding, NamedSharding) and not any(sharding.spec)
