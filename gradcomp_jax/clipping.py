"""Clipping by a norm over a tree that lies in shards."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradcomp_jax.arguments import factory, require_number
from gradcomp_jax.contract import AxisName, Predicate
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.views import widen


@factory
def clip_by_global_norm(
    max_norm: float, over: AxisName, *, inside: bool | Predicate = False
) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` of updates whose leaves lie in shards over a mesh axis, as those of parameters do.

    Optax's takes the norm of what it sees, which is another on each chip.

    Args:
      max_norm: the largest norm of the whole tree.
      over: the mesh axis, or axes, of the chips that have a shard each.
      inside: as of `across`: (path, leaf) -> whether a leaf is whole, and the same on all chips; False: none is.

    Returns:
      A stateless transformation, to stand after `across(codec, inside=...)`. Its update raises ValueError where the
      axis is not bound.

    >>> import optax
    >>> from gradcomp_jax import across, clip_by_global_norm, qsgd
    >>> tx = optax.chain(across(qsgd(4), inside=False), clip_by_global_norm(1.0, "local"), optax.adam(1e-3))
    """
    require_number("max_norm", max_norm)

    def whole(path: str, leaf: Any) -> bool:
        return inside if isinstance(inside, bool) else bool(inside(path, leaf))

    def update_fn(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        leaves, _ = flatten(updates)
        squares = {path: jnp.sum(widen(x) ** 2) for path, x in leaves.items()}
        of_shards = [square for path, square in squares.items() if not whole(path, leaves[path])]
        total, _ = Wire(over).total(sum(of_shards, jnp.float32(0)))
        norm = jnp.sqrt(total + sum((x for path, x in squares.items() if whole(path, leaves[path])), jnp.float32(0)))
        clip = lambda x: jnp.where(norm < max_norm, x, (x / norm.astype(x.dtype)) * max_norm)  # noqa: E731
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
