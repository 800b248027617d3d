"""How a tree of gradients becomes parcels for the exchange, bucket by bucket, and how the means become a tree again.

Without a fast axis the parcels are the leaves themselves. With a fast axis they are shards. If each chip has a leaf
whole, they are shards of its sum over a worker's chips. If a leaf comes in shards, they are those shards.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax.cuts import Cut, rows
from gradcomp_jax.exchange import inside
from gradcomp_jax.exchange.collectives import Wire, known_equal
from gradcomp_jax.exchange.plan import Plan
from gradcomp_jax.views import halved, widen

Tensors = dict[str, jax.Array]


class Parcels(NamedTuple):
    """The arrays of an exchange.

    Attributes:
      terms: the gradients that are compressed, by path, float32 or wider.
      riders: for each bucket, the leaves that are not compressed. The last bucket also has the arrays beside the
        gradients.
      checked: for each bucket, how many of the first riders must be finite.
      bits: the bits that this chip sent inside a slice.
    """

    terms: Tensors
    riders: list[list[jax.Array]]
    checked: list[int]
    bits: int


def pack(
    the: Plan, leaves: dict[str, Any], beside: Sequence[Any], wire: Wire, summed: bool, narrower: Any = None
) -> Parcels:
    """Turns a tree of gradients into parcels.

    Args:
      the: the plan.
      leaves: the gradients by path.
      beside: further arrays, whose means are wanted too.
      wire: the link.
      summed: whether a worker's gradient is the sum of its chips' gradients; else it is their mean.
      narrower: a type of 16 bits, for the leaves that are not compressed; None: float32 or wider.
    """
    terms: Tensors = {}
    riders: list[list[jax.Array]] = []
    checked: list[int] = []
    sent = 0
    for place, paths in enumerate(the.buckets):
        mine = {path: _turned(the, path, widen(leaves[path])) for path in paths}
        more = _beside(the, beside, place)
        if wire.fast is not None:
            mine, more, bits = _in_shards(the, mine, more, wire, summed)
            sent += bits
        dense = [mine.pop(path) for path in paths if path not in the.compressed]
        terms |= mine
        riders.append([*(halved(x, narrower) if narrower else x for x in dense), *more])
        checked.append(len(dense))
    return Parcels(terms, riders, checked, sent)


def unpack(
    the: Plan,
    leaves: dict[str, Any],
    beside: Sequence[Any],
    mean: Tensors,
    rode: list[list[jax.Array]],
    ok: jax.Array,
    wire: Wire,
) -> tuple[Tensors, list[jax.Array], int]:
    """The inverse of `pack`, for means.

    Args:
      the: the plan.
      leaves: the gradients by path.
      beside: the arrays that `pack` was given beside them.
      mean: the means of `Parcels.terms`.
      rode: the means of `Parcels.riders`.
      ok: whether everything is finite.
      wire: the link.

    Returns:
      The means by path, in the leaves' shapes, zeros if not ok; the means of the arrays beside them; the bits that this
      chip sent inside a slice.
    """
    selected = wire.fast is None and len(the.buckets) == 1  # then the exchange's means are zeros if not ok
    means: Tensors = {}
    more: list[jax.Array] = []
    sent = 0
    for place, paths in enumerate(the.buckets):
        dense = [path for path in paths if path not in the.compressed]
        got = {path: mean[path] for path in paths if path in mean} | dict(zip(dense, rode[place], strict=False))
        more = rode[place][len(dense) :]
        # Shards are selected before they are joined: otherwise whole tensors would wait in memory for the flag.
        got = {path: x if selected and path in mean else jnp.where(ok, x, 0) for path, x in got.items()}
        if wire.fast is not None:
            got, more, bits = _joined(the, got, more, _beside(the, beside, place), wire, list(means.values()))
            sent += bits
        means |= {path: _turned(the, path, x, back=True).reshape(leaves[path].shape) for path, x in got.items()}
    return means, more, sent


def _turned(the: Plan, path: str, x: jax.Array, back: bool = False) -> jax.Array:
    """A leaf that came in shards, with its axes in the codec's order; with `back`, in the leaf's order."""
    if path not in the.shards:
        return x
    axis, to = the.shards[path]
    return jnp.moveaxis(x, to, axis) if back else jnp.moveaxis(x, axis, to)


def _beside(the: Plan, beside: Sequence[Any], place: int) -> list[jax.Array]:
    """The arrays that travel beside a bucket: all with the last one, none with the others."""
    return [widen(x) for x in beside] if place == len(the.buckets) - 1 else []


def _in_shards(
    the: Plan, leaves: Tensors, beside: list[jax.Array], wire: Wire, summed: bool
) -> tuple[Tensors, list[jax.Array], int]:
    """Shards of the sum or mean over a worker's chips; arrays that types show to be equal on all chips are only cut."""
    paths = [path for path in leaves if path not in the.shards]
    xs = [*(leaves[path] for path in paths), *beside]
    cuts = [*(the.cuts[path] for path in paths), *map(rows, beside)]
    done = [known_equal(x, wire.inside.axis) for x in xs]
    differ = [place for place, it in enumerate(done) if not it]
    shards, bits = inside.sum_into_shards([xs[i] for i in differ], [cuts[i] for i in differ], wire)
    mine = dict(zip(differ, shards, strict=True))
    mine = {i: x if summed and i < len(paths) else x / wire.shards for i, x in mine.items()}
    for place, it in enumerate(done):
        if it:
            mine[place] = jnp.take(cuts[place].split(xs[place], wire.shards), wire.inside.index, axis=0)
    got = [mine[place] for place in range(len(xs))]
    return leaves | dict(zip(paths, got, strict=False)), got[len(paths) :], bits


def _joined(
    the: Plan,
    shards: Tensors,
    beside: list[jax.Array],
    like: list[jax.Array],
    wire: Wire,
    before: list[jax.Array],
) -> tuple[Tensors, list[jax.Array], int]:
    """The inverse of `_in_shards`, without a sum."""
    paths = [path for path in shards if path not in the.shards]
    cuts: list[Cut] = [*(the.cuts[path] for path in paths), *map(rows, like)]
    whole, bits = inside.join([*(shards[path] for path in paths), *beside], cuts, wire, before)
    rest = [x.reshape(y.shape) for x, y in zip(whole[len(paths) :], like, strict=True)]
    return shards | dict(zip(paths, whole, strict=False)), rest, bits
