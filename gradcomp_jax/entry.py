"""What a step is made of and called with, made sure of before jax meets it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax.arguments import require_arrays, require_transformation, shown, takes
from gradcomp_jax.compressor import compressor_states

# What loss_fn takes and returns, by (has_state, has_aux).
LOSSES = {
    (False, False): ("(params, batch)", "loss"),
    (False, True): ("(params, batch)", "(loss, aux)"),
    (True, False): ("(params, model_state, batch)", "(loss, model_state)"),
    (True, True): ("(params, model_state, batch)", "(loss, (model_state, aux))"),
}


def checked(loss_fn: Callable[..., Any], tx: Any, has_aux: bool, has_state: bool) -> Callable[..., Any]:
    """`loss_fn`, which refuses what it returns where a step cannot use that.

    Raises:
      ValueError: it does not take what a step gives, or tx is no transformation.
    """
    require_transformation(tx)
    given, returned = LOSSES[has_state, has_aux]
    flags = f"has_aux={has_aux}, has_state={has_state}"
    if not takes(loss_fn, 2 + has_state):
        raise ValueError(f"loss_fn={shown(loss_fn)} must be a function {given} -> {returned}, with {flags}")

    def loss_of(*args: Any) -> Any:
        out = loss_fn(*args)
        _require_pairs(out, returned, flags, has_aux + has_state)
        loss, more = out if has_aux or has_state else (out, None)
        if not isinstance(loss, jax.Array) or loss.ndim or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(
                f"loss_fn's loss is {_described(loss)}, it must be a scalar of real floating type, made of params and "
                f"batch: take jnp.mean over the examples. It is to return {returned}, with {flags}"
            )
        require_arrays("what loss_fn returns beside the loss", more)
        return out

    return loss_of


def require_rest(rest: tuple[Any, ...], has_state: bool) -> None:
    """Raises ValueError for what is given to a step after params and opt_state, where that is not batch or state."""
    given = "params, opt_state, model_state, batch" if has_state else "params, opt_state, batch"
    if len(rest) != 1 + has_state:
        raise ValueError(
            f"a step with has_state={has_state} takes ({given}), got {2 + len(rest)} arguments; a batch of several "
            "arrays is one tuple or dict of them"
        )
    if compressor_states(rest[-1]):
        raise ValueError(f"the batch holds an optimiser's state: a step takes ({given})")
    if not jax.tree.leaves(rest[-1]):
        raise ValueError(f"batch={shown(rest[-1])} holds no array: each leaf's first axis counts examples")
    for path, x in jax.tree_util.tree_leaves_with_path(rest[-1]):
        if 0 in np.shape(x)[:1]:
            raise ValueError(f"batch leaf {jax.tree_util.keystr(path)!r} of shape {np.shape(x)} has no examples")


def _require_pairs(out: Any, returned: str, flags: str, depth: int) -> None:
    """Refuses what is not a pair whose second is a pair ..., to this depth."""
    if depth == 0:
        return
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise ValueError(
            f"loss_fn is to return {returned}, with {flags}, and where that has a pair it has {_described(out)}"
        )
    _require_pairs(out[1], returned, flags, depth - 1)


def _described(x: Any) -> str:
    if isinstance(x, jax.Array):
        return f"an array of shape {x.shape} and type {x.dtype}"
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, tuple | list | dict) else shown(x)
