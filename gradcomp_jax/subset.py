"""Coordinates that all workers agree on without a word: the exchange of random-k and random block.

The indices come from a random key that is the same on all workers, so only values travel, and values at the same
indices can be added: the compression is linear.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax import collectives
from gradcomp_jax.aggregation import LINEAR, require_aggregate
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import (
    Codec,
    Exchanged,
    Levels,
    Tensors,
    require_fraction,
    require_indexable,
    require_whole,
)
from gradcomp_jax.levels import mean_of_fronts
from gradcomp_jax.metrics import Bits
from gradcomp_jax.random import step_key
from gradcomp_jax.views import matrix_shape, share

Draw = Callable[[jax.Array, int, int], jax.Array]
"""(key, n, k) -> k distinct indices below n, int32; of fewer than k indices it gives the first."""

FRACTION = 0.01


class SubsetState(NamedTuple):
    """State of `randomk` and `randomblock`, the same on all workers.

    Attributes:
      step: int32, exchanges done; seeds the indices.
    """

    step: jax.Array


def subset(name: str, draw: Draw, fraction: float | None, rank: int | None, aggregate: str, seed: int) -> Codec:
    """The codec that sends the values at the indices of `draw`.

    Args:
      name: the factory's name.
      draw: see `Draw`.
      fraction: k / n for each leaf of n elements, at least one of them; `FRACTION` if there is no rank.
      rank: r; then k is PowerSGD's budget for a leaf, r (rows + columns). Leaves of one axis go dense.
      aggregate: "psum" or "ring".
      seed: of the indices.

    Raises:
      ValueError: fraction and rank both given, or out of range; another way to aggregate.
    """
    require_aggregate(name, aggregate, LINEAR)
    if fraction is not None and rank is not None:
        raise ValueError(
            f"fraction={fraction} and rank={rank} both say how much codec {name!r} sends: give one of them"
        )
    if rank is not None:
        require_whole("rank", rank, 1)
    elif fraction is not None:
        require_fraction(fraction)
    strength: float = rank or fraction or FRACTION

    def count(leaf: Any, strength: float) -> int:
        if rank is None:
            return share(leaf.size, strength)
        _, n, m = matrix_shape(leaf.shape) if leaf.ndim > 1 else (1, leaf.size, 1)
        return min(int(strength) * (n + m), leaf.size)

    def shrinks(path: str, leaf: Any) -> bool:
        require_indexable(name, path, leaf)
        return count(leaf, strength) < leaf.size

    def build(strengths: tuple[float, ...]) -> Codec:
        """The codec of some fractions or ranks, among which `level` chooses for each leaf where there are several."""

        def exchange(
            tensors: Tensors,
            state: SubsetState,
            axis_name: AxisName,
            *,
            feedback: bool = False,
            level: dict[str, jax.Array] | None = None,
            **extra_args: Any,
        ) -> Exchanged:
            del extra_args
            next_state = SubsetState(state.step + 1)
            key = step_key(seed, state.step)
            counts = {path: [count(x, strength) for strength in strengths] for path, x in tensors.items()}
            indices, gains = {}, {}
            for place, (path, x) in enumerate(tensors.items()):
                drawn = draw(jax.random.fold_in(key, place), x.size, max(counts[path]))
                sent = jnp.array(counts[path], jnp.int32)[0 if level is None else level[path]]
                # Where fewer are sent, the others lie outside and are dropped.
                indices[path] = jnp.where(jnp.arange(drawn.size, dtype=jnp.int32) < sent, drawn, x.size)
                # Unbiased where nothing that is left out comes back.
                gains[path] = jnp.ones((), x.dtype) if feedback else (x.size / sent).astype(x.dtype)
            values = {p: x.reshape(-1).at[indices[p]].get(mode="fill", fill_value=0) for p, x in tensors.items()}
            # Zero, unless something is not finite; the values alone might not show it.
            mark = jnp.sum(jnp.stack([jnp.sum(0 * x).astype(jnp.float32) for x in tensors.values()]))

            def mean() -> tuple[Tensors, jax.Array, Bits]:
                if level is None:
                    (means, marked), bits = collectives.mean((values, mark), axis_name, ring=aggregate == "ring")
                    return means, marked, bits
                means, marked, pair = mean_of_fronts(
                    values, counts, level, axis_name, beside=mark[None], ring=aggregate == "ring"
                )
                return means, marked[0], pair

            means, marked, bits = mean()

            def restore(values: Tensors, rest: jax.Array) -> Tensors:
                restored = {}
                for path, x in tensors.items():
                    flat = jnp.broadcast_to(rest.astype(x.dtype), x.size)
                    put = flat.at[indices[path]].set(values[path] * gains[path], mode="drop", unique_indices=True)
                    restored[path] = put.reshape(x.shape)
                return restored

            return Exchanged(restore(means, marked), restore(values, jnp.float32(0)), next_state, bits)

        def init(tensors: Tensors) -> SubsetState:
            del tensors
            return SubsetState(jnp.int32(0))

        return Codec(name, init, exchange, lambda path, leaf: True, shrinks, linear=True)

    setting = "fraction" if rank is None else "rank"
    levels = Levels(
        setting, strength, True, {"aggregate": aggregate, "seed": seed}, lambda ladder, feedback: build(ladder)
    )
    return build((strength,))._replace(levels=levels)
