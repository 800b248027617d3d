"""The way inside a slice or node: its chips sum tensors into shards, and join the means of these shards.

    gradients of each chip -- sum_into_shards --> shards -- an exchange between slices --> means -- join --> whole means

So each chip does a part of the work, and sends a part of the payload over the slow link.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradcomp_jax.contract import First, Heard, OverShards, Say
from gradcomp_jax.cuts import Cut
from gradcomp_jax.exchange.collectives import LANES, TILE, Wire, after
from gradcomp_jax.exchange.ways import APART
from gradcomp_jax.views import always, filled, platform, split


def sum_into_shards(xs: Sequence[jax.Array], cuts: Sequence[Cut], wire: Wire) -> tuple[list[jax.Array], int]:
    """This chip's shards of the sums of some tensors over the chips of a slice.

    A large tensor is a message of its own, which needs no copy. The others share one message for each type.

    Args:
      xs: the tensors.
      cuts: how each tensor is cut.
      wire: the link between slices; it knows the link inside.

    Returns:
      The shards, and the bits that this chip sent.
    """
    n, inside = wire.shards, wire.inside
    laid = [cut.lay(x, n) for x, cut in zip(xs, cuts, strict=True)]
    axes = [cut.among(n).axis for cut in cuts]
    is_apart = [_is_apart(x, axis, n) for x, axis in zip(laid, axes, strict=True)]
    shards: list[Any] = [None] * len(xs)
    sent = 0
    for places in _grouped(is_apart, laid):
        i, *_ = places
        if is_apart[i]:
            shards[i], bits = inside.sum_shards(laid[i], axes[i])
        else:
            parts = [cuts[i].split(xs[i], n) for i in places]
            sums, bits = _sum_rows(jnp.concatenate([x.reshape(n, -1) for x in parts], axis=1), inside)
            mine = split(sums, [x[0].size for x in parts])
            for i, x, part in zip(places, mine, parts, strict=True):
                shards[i] = x.reshape(part.shape[1:])
        sent += bits
    return shards, sent


def _is_large(size: int) -> bool:
    """Whether it costs more to copy so many bytes into a shared message than to send a message of their own."""
    return size > (APART // 32 if platform() == "tpu" else APART)


def _is_apart(x: jax.Array, axis: int, n: int) -> bool:
    """Whether a tensor that is laid for n shards along an axis is a message of its own, as it lies."""
    large = _is_large(x.size * x.dtype.itemsize)
    if platform() != "tpu":
        return large
    if not large or x.ndim == 1:
        return False
    # XLA keeps most reduce-scatters if shards are an even number of tiles of 8 x 128, cut along their edges. It turns
    # the others into all-reduces, which send twice as much (jax 0.10.2); certify tells which.
    *lead, r, c = (1, *(length // n if i == axis else length for i, length in enumerate(x.shape)))
    tiles = math.prod(lead) * -(-r // 8) * -(-c // 128)
    at_edges = r >= 8 and c % 128 == 0 if axis == x.ndim - 1 else c >= 128 and (r % 8 == 0 or axis < x.ndim - 2)
    return at_edges and tiles % 2 == 0


def _sum_rows(x: jax.Array, inside: Wire) -> tuple[jax.Array, int]:
    """This chip's row of the sum of `x` [chips, k], and the bits that it sent; see `_is_apart`."""
    k = x.shape[1]
    if platform() != "tpu":
        row, bits = inside.sum_shards(x)
    elif k < 2 * TILE:  # a filled-up array would be larger
        total, bits = inside.total(x)
        row = jax.lax.dynamic_index_in_dim(total, inside.index)
    else:
        tiled = filled(x, -(-k // (2 * TILE)) * 2 * TILE)
        row, bits = inside.sum_shards(tiled.reshape(len(x), -1, LANES))
    return row.reshape(-1)[:k], bits


def join(
    shards: Sequence[jax.Array], cuts: Sequence[Cut], wire: Wire, before: Sequence[jax.Array] = ()
) -> tuple[list[jax.Array], int]:
    """The inverse of `sum_into_shards`, without a sum: joins the chips' shards to tensors, in the shapes of `cuts`.

    Args:
      shards: this chip's shards.
      cuts: how each tensor was cut.
      wire: the link between slices; it knows the link inside.
      before: the tensors that were joined before.

    Returns:
      The tensors, the same on all chips, and the bits that this chip sent.
    """
    n, inside = wire.shards, wire.inside
    xs: list[Any] = [None] * len(shards)
    sent = 0
    is_apart = [_is_large(x.size * x.dtype.itemsize) and (x.ndim > 1 or platform() != "tpu") for x in shards]
    for places in _grouped(is_apart, shards):
        i, *_ = places
        if is_apart[i]:
            x, bits = inside.join_shards(_in_turn(shards[i], before), cuts[i].among(n).axis)
            xs[i] = cuts[i].unlay(x, n)
            before = [xs[i]]
        else:
            flat, bits = inside.gather(jnp.concatenate([shards[i].reshape(-1) for i in places]))
            pieces = split(flat, [shards[i].size for i in places])
            for i, piece in zip(places, pieces, strict=True):
                xs[i] = cuts[i].join(piece.reshape(n, *shards[i].shape))
        sent += bits
    return xs, sent


def _in_turn(x: jax.Array, before: Sequence[jax.Array]) -> jax.Array:
    """`x`; on TPUs it waits for the tensors joined before. Otherwise all could be whole before the first is used."""
    first = [y[(0,) * y.ndim] for y in before if y.size]
    return jnp.where(always(first), x, jnp.zeros_like(x)) if platform() == "tpu" and first else x


def _grouped(is_apart: Sequence[bool], xs: Sequence[jax.Array]) -> list[list[int]]:
    """The places that share a message: each place that is apart has one, the others share one for each type."""
    groups: dict[Any, list[int]] = {}
    for place, (alone, x) in enumerate(zip(is_apart, xs, strict=True)):
        groups.setdefault(place if alone else str(x.dtype), []).append(place)
    return list(groups.values())


def over_shards(asked: dict[Any, OverShards], wire: Wire) -> tuple[dict[Any, jax.Array], int]:
    """Sums and maxima over the chips of a slice, one message for each kind and type."""
    if wire.fast is None or not asked:
        return {key: ask.x for key, ask in asked.items()}, 0
    groups: dict[Any, list[Any]] = {}
    for key, ask in asked.items():
        groups.setdefault((ask.largest, str(ask.x.dtype)), []).append(key)
    answers, sent = {}, 0
    for (largest, _), keys in groups.items():
        flat = jnp.concatenate([asked[key].x.reshape(-1) for key in keys])
        got, bits = wire.inside.largest(flat) if largest else wire.inside.total(flat)
        sent += bits
        for key, x in zip(keys, split(got, [asked[key].x.size for key in keys]), strict=True):
            answers[key] = x.reshape(asked[key].x.shape)
    return answers, sent


def _last(x: jax.Array) -> Cut:
    """The cut of a partial sum: along the last axis, so that the front of the rows stays the front."""
    return Cut(x.shape, x.ndim - 1)


def in_parts(says: dict[Any, Say], wire: Wire, before: Any) -> tuple[dict[Any, Say], int]:
    """The asks, in which this chip says only its part of each partial sum; and the bits that it sent inside."""
    partial = {key: say for key, say in says.items() if say.partial and wire.fast is not None}
    if not partial:
        return says, 0
    waiting = after([say.x for say in partial.values()], before)
    cuts = [_last(x) for x in waiting]
    parts, bits = sum_into_shards(waiting, cuts, wire)
    said = dict(says)
    for (key, say), part in zip(partial.items(), parts, strict=True):
        row = say.x.shape[-1]
        fronts = None if say.fronts is None else tuple(front // row * part.shape[-1] for front in say.fronts)
        said[key] = say._replace(x=part, fronts=fronts)
    return said, bits


def of_parts(heard: dict[Any, Heard], says: dict[Any, Say], wire: Wire, want_own: bool) -> tuple[dict[Any, Heard], int]:
    """The inverse of `in_parts`: the answers, with partial sums whole again; and the bits that this chip sent inside.

    Args:
      heard: the answers.
      says: the asks, as they were before `in_parts`.
      wire: the link.
      want_own: whether `Heard.own` is used. If not, it has no meaning, and is not sent.
    """
    partial = [key for key, say in says.items() if say.partial and wire.fast is not None]
    if not partial:
        return heard, 0
    cuts = [_last(says[key].x) for key in partial]
    # Apart, because in one buffer the types would say that the means differ between workers too.
    means, bits = join([heard[key].mean for key in partial], cuts, wire)
    owns, more = (means, 0) if not want_own else join(after([heard[key].own for key in partial], means), cuts, wire)
    pairs = zip(means, owns, strict=True)
    return heard | {key: Heard(*pair) for key, pair in zip(partial, pairs, strict=True)}, bits + more


def from_first_shard(
    asked: dict[Any, First], from_first: Callable[[Any], tuple[Any, Any]], wire: Wire
) -> tuple[dict[Any, Any], Any, int]:
    """The first worker's arrays; with `First.of_first_shard`, those of its first shard.

    Arrays of a first shard travel in parts between slices.

    Args:
      asked: the asks.
      from_first: the function that fetches the first worker's trees.
      wire: the link.

    Returns:
      The answers; the bits that this chip sent between slices, and inside.
    """
    shared = {key: ask.x for key, ask in asked.items() if ask.of_first_shard and wire.fast is not None}
    own = {key: ask.x for key, ask in asked.items() if key not in shared}
    if not shared:
        answers, bits = from_first(own)
        return answers, bits, 0
    leaves, treedef = jax.tree.flatten(shared)
    first = wire.inside.index == 0
    cuts = [Cut((x.size,)) for x in leaves]
    parts, sent = sum_into_shards([jnp.where(first, x, jnp.zeros_like(x)) for x in leaves], cuts, wire)
    (answers, parts), bits = from_first((own, parts))
    whole, joined = join(parts, cuts, wire)
    whole = [x.reshape(like.shape) for x, like in zip(whole, leaves, strict=True)]
    return answers | jax.tree.unflatten(treedef, whole), bits, sent + joined
