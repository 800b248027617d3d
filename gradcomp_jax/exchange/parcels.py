"""What leaves a tree of gradients for the exchange, bucket by bucket, and how what comes back becomes a tree again.

Without a fast axis these are the leaves themselves. With one they are shards: of leaves that each chip has whole, of
their sum over a worker's chips; of leaves that come in shards, these.
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
    """What is to be exchanged.

    Attributes:
      terms: the gradients that are compressed, by path, float32 or wider.
      riders: of each bucket, what is not compressed, and with the last one what travels beside.
      checked: of each bucket, how many of the first riders must be finite.
      bits: that this chip sent inside a slice.
    """

    terms: Tensors
    riders: list[list[jax.Array]]
    checked: list[int]
    bits: int


def pack(
    the: Plan, leaves: dict[str, Any], beside: Sequence[Any], wire: Wire, summed: bool, narrower: Any = None
) -> Parcels:
    """A tree of gradients as what is to be exchanged.

    Args:
      the: the plan.
      leaves: the gradients by path.
      beside: arrays of which the means are wanted too.
      wire: the link.
      summed: whether the gradients of a worker's chips add up to the worker's; else it has their mean.
      narrower: a type of 16 bits, in which what is not compressed travels.
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
    """The inverse of `pack`, of means.

    Args:
      the: the plan.
      leaves: the gradients by path.
      beside: what was given beside them.
      mean: what the exchange made of `Parcels.terms`.
      rode: and of `Parcels.riders`.
      ok: whether all is finite.
      wire: the link.

    Returns:
      The means by path, of the leaves' shapes, zeros where not ok; those of what was beside; the bits that this chip
      sent inside a slice.
    """
    selected = wire.fast is None and len(the.buckets) == 1  # then what the exchange made is zeros where not ok
    means: Tensors = {}
    more: list[jax.Array] = []
    sent = 0
    for place, paths in enumerate(the.buckets):
        dense = [path for path in paths if path not in the.compressed]
        got = {path: mean[path] for path in paths if path in mean} | dict(zip(dense, rode[place], strict=False))
        more = rode[place][len(dense) :]
        # Of shards before they are joined: what is joined before all is known to be finite would have to be kept.
        got = {path: x if selected and path in mean else jnp.where(ok, x, 0) for path, x in got.items()}
        if wire.fast is not None:
            got, more, bits = _joined(the, got, more, _beside(the, beside, place), wire, list(means.values()))
            sent += bits
        means |= {path: _turned(the, path, x, back=True).reshape(leaves[path].shape) for path, x in got.items()}
    return means, more, sent


def _turned(the: Plan, path: str, x: jax.Array, back: bool = False) -> jax.Array:
    """What came in shards with its axes as the codec has them; back: as the leaf has them."""
    if path not in the.shards:
        return x
    axis, to = the.shards[path]
    return jnp.moveaxis(x, to, axis) if back else jnp.moveaxis(x, axis, to)


def _beside(the: Plan, beside: Sequence[Any], place: int) -> list[jax.Array]:
    """What travels beside a bucket."""
    return [widen(x) for x in beside] if place == len(the.buckets) - 1 else []


def _in_shards(
    the: Plan, leaves: Tensors, beside: list[jax.Array], wire: Wire, summed: bool
) -> tuple[Tensors, list[jax.Array], int]:
    """Shards of the sum or mean over a worker's chips; of what types show to be the same on them, of itself."""
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
    """The inverse, but for the sum."""
    paths = [path for path in shards if path not in the.shards]
    cuts: list[Cut] = [*(the.cuts[path] for path in paths), *map(rows, like)]
    whole, bits = inside.join([*(shards[path] for path in paths), *beside], cuts, wire, before)
    rest = [x.reshape(y.shape) for x, y in zip(whole[len(paths) :], like, strict=True)]
    return shards | dict(zip(paths, whole, strict=False)), rest, bits
