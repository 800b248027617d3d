"""Checks the parts and the arguments of a step before jax meets them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax.arguments import require_arrays, require_transformation, shown, takes
from gradcomp_jax.compressor import compressor_states
from gradcomp_jax.contract import require_whole


class Form(NamedTuple):
    """The arguments of a step after params and opt_state, and the outputs of loss_fn.

    Attributes:
      has_state: there is a model state.
      has_aux: loss_fn returns auxiliary outputs.
      rng: there is a random key.
      shared: there is an argument that is the same on all workers.
    """

    has_state: bool
    has_aux: bool
    rng: bool
    shared: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of a step's arguments after params and opt_state, and of loss_fn's after params, in order."""
        return (*("model_state",) * self.has_state, "batch", *("key",) * self.rng, *("shared",) * self.shared)

    @property
    def given(self) -> str:
        """The arguments of loss_fn, in words."""
        return f"({', '.join(('params', *self.names))})"

    @property
    def returned(self) -> str:
        """The outputs of loss_fn, in words."""
        more = "(model_state, aux)" if self.has_state and self.has_aux else "model_state" if self.has_state else "aux"
        return f"(loss, {more})" if self.has_state or self.has_aux else "loss"

    @property
    def flags(self) -> str:
        """The settings that give a step this form, in words."""
        extra = [f"{name}=True" for name in ("rng", "shared") if getattr(self, name)]
        return ", ".join((f"has_aux={self.has_aux}", f"has_state={self.has_state}", *extra))


def checked(loss_fn: Callable[..., Any], tx: Any, form: Form, accumulate: Any) -> Callable[..., Any]:
    """A `loss_fn` that refuses outputs that a step cannot use.

    Raises:
      ValueError: it does not take a step's arguments, tx is no transformation, or accumulate no number of parts.
    """
    require_transformation(tx)
    require_whole("accumulate", accumulate, 1)
    if not takes(loss_fn, 1 + len(form.names)):
        raise ValueError(
            f"loss_fn={shown(loss_fn)} must be a function {form.given} -> {form.returned}, with {form.flags}"
        )

    def loss_of(*args: Any) -> Any:
        out = loss_fn(*args)
        _require_pairs(out, form.returned, form.flags, form.has_aux + form.has_state)
        loss, more = out if form.has_aux or form.has_state else (out, None)
        if not isinstance(loss, jax.Array) or loss.ndim or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(
                f"loss_fn's loss is {_described(loss)}, it must be a scalar of real floating type, made of params and "
                f"batch: take jnp.mean over the examples. It is to return {form.returned}, with {form.flags}"
            )
        require_arrays("what loss_fn returns beside the loss", more)
        return out

    return loss_of


def require_rest(rest: tuple[Any, ...], form: Form) -> None:
    """Raises ValueError if a step's arguments after params and opt_state do not have its form."""
    given = ", ".join(("params", "opt_state", *form.names))
    if len(rest) != len(form.names):
        raise ValueError(
            f"a step with {form.flags} takes ({given}), got {2 + len(rest)} arguments; a batch of several arrays is "
            "one tuple or dict of them, and a TrainState stands in the place of the first two"
        )
    batch = rest[form.has_state]
    if compressor_states(batch):
        raise ValueError(f"the batch holds an optimiser's state: a step takes ({given})")
    if not jax.tree.leaves(batch):
        raise ValueError(f"batch={shown(batch)} holds no array: each leaf's first axis counts examples")
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if 0 in np.shape(x)[:1]:
            raise ValueError(f"batch leaf {jax.tree_util.keystr(path)!r} of shape {np.shape(x)} has no examples")
    if form.rng:
        require_key("the step's key", rest[form.has_state + 1])


def is_key(x: Any) -> bool:
    """Whether `x` may be one random key: of the new kind, or uint32 [n] of the old."""
    if not hasattr(x, "dtype"):
        return False
    dtype, shape = x.dtype, np.shape(x)
    return (jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()) or (dtype == jnp.uint32 and len(shape) == 1)


def require_key(what: str, key: Any) -> None:
    """Raises ValueError if `key` is not one random key, of the new kind or the old."""
    if not is_key(key):
        raise ValueError(
            f"{what} is {_described(key)}, it must be one random key, such as jax.random.key(0), a new one in each "
            "step: each worker folds its index into it"
        )


def _require_pairs(out: Any, returned: str, flags: str, depth: int) -> None:
    """Refuses an output that is not a pair; down to `depth`, its second element must be a pair too."""
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
