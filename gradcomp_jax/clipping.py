"""Clipping by a norm over a tree that lies in shards."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradcomp_jax.arguments import factory, require_number, takes
from gradcomp_jax.contract import AxisName, Predicate
from gradcomp_jax.exchange.collectives import Wire, known_equal
from gradcomp_jax.exchange.plan import axes_of, comes_whole, flatten
from gradcomp_jax.views import widen


@factory
def clip_by_global_norm(
    max_norm: float, over: AxisName, *, inside: bool | Predicate | Any = False
) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for updates whose leaves lie in shards over a mesh axis, like their parameters.

    Optax's own function takes the norm of one chip's shards, so each chip would clip differently.

    Args:
      max_norm: the largest norm of the whole tree.
      over: the mesh axis, or axes, of the chips; each has a shard.
      inside: like that of `across`. The layout of the updates, a tree of `PartitionSpec`s like them. Or (path, leaf) ->
        whether a leaf is whole, and the same on all chips. False: no leaf is whole. A leaf is whole too if the types of
        shard_map show that it is the same on all chips.

    Returns:
      A stateless transformation, to put after `across(codec, inside=...)`. Its update raises ValueError if the axis
      is not bound.
      is not bound.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.across(gcj.qsgd(4), inside=False), gcj.clip_by_global_norm(1.0, "local"), optax.adam(1e-3))
    """
    require_number("max_norm", max_norm)
    lie = inside if isinstance(inside, bool) or takes(inside, 2) else axes_of(inside, (), over)

    def update_fn(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        leaves, _ = flatten(updates)
        whole = {path for path, x in leaves.items() if comes_whole(lie, path, x) or known_equal(x, over)}
        squares = {path: jnp.sum(widen(x) ** 2) for path, x in leaves.items()}
        of = lambda paths: sum((squares[path] for path in paths), jnp.float32(0))  # noqa: E731
        total, _ = Wire(over).total(of(path for path in leaves if path not in whole))
        norm = jnp.sqrt(total + of(path for path in leaves if path in whole))
        clip = lambda x: jnp.where(norm < max_norm, x, (x / norm.astype(x.dtype)) * max_norm)  # noqa: E731
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
