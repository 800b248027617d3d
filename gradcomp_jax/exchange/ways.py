"""The ways from what each worker says to the mean over all: one message a round, whatever is in it.

| what is sent | aggregate | a worker of n sends, for a payload p |
|---|---|---|
| numbers as they are | "psum": an all-reduce | 2 (n - 1) / n p |
| numbers as they are | "ring": added as they pass, hop by hop (GradiVeQ's Algorithm 1) | 2 (n - 1) / n p |
| codes | "gather": all-gather; each worker decodes all | (n - 1) p |
| codes | "shuffle": each worker decodes, averages and encodes again its shard of all tensors | 2 (n - 1) / n p |
| codes | "ring": decoded, added and encoded again at each hop | 2 (n - 1) / n p |
| integers of a scale that all share | "psum", "ring": the largest scale, then the sum of integers | 2 (n - 1) / n p |

What a second encoding loses is the loss of the worker who encoded: it is part of its `own`, so one residual serves
every way. *Riders* are what travels beside codes and is to arrive exactly, as dense leaves do.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradcomp_jax.contract import Heard, Say
from gradcomp_jax.exchange.bits import Bits, sum_bits
from gradcomp_jax.exchange.collectives import Wire, after
from gradcomp_jax.views import HALVES, on_cpus, others_are_automatic, pack_front, split, unpack_front, widen

# What the sizes of fronts round up by at most: 17 from 1/32 to 1, each with a collective to compile.
FRONT_STEP = 1.25
# A whole gradient of more bytes is a message of its own: it needs no copy, and can overlap with others.
APART = 2**20


class Sent(NamedTuple):
    """What became of a round.

    Attributes:
      heard: the answer to each `Say`, in their order.
      rode: the means of the riders.
      ok: bool, whether all that arrived was finite, the same on all workers.
      bits: that this worker sent.
      length: the true length of what this worker encoded, in bits as a pair; None where it is not told.
      inside: bits that this chip sent to others of its worker, for all to choose the same branch.
    """

    heard: list[Heard]
    rode: list[jax.Array]
    ok: jax.Array
    bits: Bits
    length: jax.Array | None = None
    inside: int = 0


def agreed(flags: Sequence[jax.Array], before: jax.Array | None = None) -> jax.Array:
    """Whether all of some truth values hold, and the one before them if there is one."""
    flags = [*flags, *([] if before is None else [before])]
    if not flags:
        return jnp.array(True)
    # Not an "and" of them: XLA's CPU backend would copy it, with all its operands, into every fusion that selects by
    # it, and programs would grow with the square of the leaves. A sort does not fuse.
    return lax.sort(jnp.stack(flags).astype(jnp.int32))[0] == 1


def within(x: jax.Array, growth: float) -> jax.Array:
    """Whether all of `x` is finite and stays so when it grows so many times in magnitude."""
    return jnp.all(jnp.abs(x) <= float(jnp.finfo(x.dtype).max) / growth)


def exact(
    says: Sequence[Say],
    riders: Sequence[jax.Array],
    wire: Wire,
    strengths: Sequence[Any],
    *,
    ring: bool,
    before: jax.Array | None,
    checked: int | None = None,
) -> Sent:
    """The means of numbers that travel as they are, one buffer a type; large ones of a whole gradient apart.

    Arrays of 16 bits are summed in 16 bits, where the backend does that; means are float32 or wider. Where the compiler
    shards arrays over a further axis of the mesh nothing is put into a buffer, for which it would have to move them
    over that axis.

    Args:
      says: what is said.
      riders: what travels along.
      wire: the link.
      strengths: int32 for each that is said, or None.
      ring: hop by hop, instead of by the platform's all-reduce.
      before: whether all that arrived before in this step was finite; None: nothing did.
      checked: how many of the first riders must be finite; None: all.
    """
    last = len(says) + (len(riders) if checked is None else checked)
    riders = [carried(x) for x in riders]
    if any(say.fronts is not None and strength is not None for say, strength in zip(says, strengths, strict=True)):
        return _fronts(says, riders, wire, strengths, ring, before, last - len(says))
    arrays = [_share(x, wire.workers) for x in (*(carried(say.x) for say in says), *riders)]
    growths = [*(say.growth for say in says), *(1.0 for _ in riders)]
    may = [*(say.apart for say in says), *(True for _ in riders)]
    alone = others_are_automatic() and not ring
    groups: dict[Any, list[int]] = {}
    for place, x in enumerate(arrays):
        large = may[place] and x.size * x.dtype.itemsize > APART
        groups.setdefault(place if (large and not ring) or alone else str(x.dtype), []).append(place)
    buffers = [_flat([arrays[i] for i in places]) for places in groups.values()]
    means, bits = _mean(buffers, wire, ring)
    flags = []
    for mean, places in zip(means, groups.values(), strict=True):
        if counted := [i for i in places if i < last]:
            size = sum(arrays[i].size for i in counted)
            part = mean if counted == places else mean.reshape(-1)[:size]
            flags.append(within(part, max(growths[i] for i in counted)))
    ok = agreed(flags, before)
    got: dict[int, jax.Array] = {}
    for mean, places in zip(means, groups.values(), strict=True):
        got |= dict(zip(places, parts_of(mean, [arrays[i] for i in places]), strict=True))
        counted = [i for i in places if i < last]
        got |= dict(zip(counted, _apart(ok, mean, [arrays[i] for i in counted]), strict=True))
    heard = [Heard(got[i], _of_share(arrays[i], wire.workers)) for i in range(len(says))]
    return Sent(heard, [got[i] for i in range(len(says), len(arrays))], ok, bits)


def carried(x: jax.Array) -> jax.Array:
    """`x` in the type in which it is summed: bfloat16 on CPUs in float32.

    XLA widens it there on the wire; so what is counted is what is sent, and the sum is not rounded.
    """
    return x.astype(carried_in(x.dtype))


def carried_in(dtype: Any) -> Any:
    """The type in which numbers of another are summed."""
    return jnp.dtype(jnp.float32) if dtype == jnp.bfloat16 and on_cpus() else dtype


def _share(x: jax.Array, workers: int) -> jax.Array:
    """`x`, or of float16 a share of it by a power of two, so that no sum leaves the range."""
    return x * jnp.float16(_part(x.dtype, workers)) if x.dtype == jnp.float16 else x


def _of_share(share: jax.Array, workers: int) -> jax.Array:
    """What a share stands for, float32 or wider."""
    return widen(share) / _part(share.dtype, workers) if share.dtype == jnp.float16 else widen(share)


def _part(dtype: Any, workers: int) -> float:
    return 2.0 ** -(workers - 1).bit_length() if dtype == jnp.float16 else 1.0


def _apart(ok: jax.Array, mean: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays of a buffer, or zeros where not `ok`."""
    return parts_of(jnp.where(ok, mean, 0), like)


def _mean(buffers: list[jax.Array], wire: Wire, ring: bool) -> tuple[list[jax.Array], Bits]:
    n = wire.workers
    average = lambda x: widen(x) / (n * _part(x.dtype, n))  # noqa: E731
    if not ring:
        sums, bits = wire.total(buffers)
        return [average(x) for x in sums], bits
    pairs = [wire.ring_total(x.reshape(-1)) for x in buffers]
    return [average(x).reshape(b.shape) for (x, _), b in zip(pairs, buffers, strict=True)], sum(b for _, b in pairs)


def _fronts(
    says: Sequence[Say],
    riders: Sequence[jax.Array],
    wire: Wire,
    strengths: Sequence[Any],
    ring: bool,
    before: jax.Array | None,
    checked: int,
) -> Sent:
    """As `exact`, where of some only a front counts: all of it in one buffer, filled from the front.

    Riders of a type that would widen it, or be widened to twice their size, are messages before it.
    """
    wide = np.result_type(*(say.x.dtype for say in says))
    apart = [x.dtype in HALVES or np.result_type(x.dtype, wide) != wide for x in riders]
    if any(apart):
        others, same = ([x for x, it in zip(riders, apart, strict=True) if it is kind] for kind in (True, False))
        first_checked = sum(apart[:checked])
        first = exact([], others, wire, [], ring=ring, before=before, checked=first_checked)
        waiting = after([say.x for say in says], first.ok)
        says = [say._replace(x=x) for say, x in zip(says, waiting, strict=True)]
        then = _fronts(says, same, wire, strengths, ring, first.ok, checked - first_checked)
        came = iter(then.rode), iter(first.rode)
        # Of the first no front is sent, and nothing inside.
        return then._replace(rode=[next(came[it]) for it in apart], bits=sum_bits(first.bits, then.bits))
    fronts = [say.fronts or (say.x.size,) * 2 for say in says]
    used = [jnp.array(f, jnp.int32)[0 if s is None else s] for f, s in zip(fronts, strengths, strict=True)]
    riders = [*riders[checked:], *riders[:checked]]  # those that are not checked come first
    beside = jnp.concatenate([jnp.zeros(0, wide), *(x.reshape(-1).astype(wide) for x in riders)])
    unchecked = sum(x.size for x in riders[: len(riders) - checked])
    buffer = jnp.concatenate([beside, pack_front([say.x.reshape(-1).astype(wide) for say in says], used)])
    sizes = sizes_of(fronts, strengths, beside.size)

    def average(x: jax.Array) -> tuple[jax.Array, Bits]:
        (mean,), bits = _mean([x], wire, ring)
        return mean, bits

    received, bits, inside = wire.front(average, buffer, functools.reduce(jnp.add, used) + beside.size, sizes)
    ok = agreed([within(received[unchecked:], max(say.growth for say in says))], before)
    pieces = unpack_front(received[beside.size :], used, [say.x.size for say in says])
    heard = []
    for say, piece, count in zip(says, pieces, used, strict=True):
        counts = (jnp.arange(piece.size, dtype=jnp.int32) < count).reshape(say.x.shape)
        mean = jnp.where(counts & ok, piece.reshape(say.x.shape).astype(say.x.dtype), 0)
        heard.append(Heard(mean, jnp.where(counts, say.x, 0)))
    rode = [x.astype(like.dtype) for x, like in zip(parts_of(received, riders), riders, strict=True)]
    return Sent(heard, [*rode[len(rode) - checked :], *rode[: len(rode) - checked]], ok, bits, inside=inside)


def sizes_of(fronts: Sequence[tuple[int, ...]], strengths: Sequence[Any], beside: int) -> list[int]:
    """The sizes in which a buffer travels that is filled from its front, rising.

    Where all are of one strength, as the same tracer says, these are known; else each is at most `FRONT_STEP` times the
    one before.

    Args:
      fronts: how much of each counts at each strength; of what all counts, at any number of them.
      strengths: int32 for each, or None.
      beside: what leads, and counts always.
    """
    varying = [(f, s) for f, s in zip(fronts, strengths, strict=True) if min(f) < max(f)]
    least, most = (beside + sum(end(f) for f in fronts) for end in (min, max))
    if varying and all(s is varying[0][1] for _, s in varying):
        rest = most - sum(max(f) for f, _ in varying)
        return sorted({rest + sum(of_each) for of_each in zip(*(f for f, _ in varying), strict=True)})
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, int(sizes[-1] * FRONT_STEP))))
    return sizes


def _flat(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays of one type in one vector; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate([x.reshape(-1) for x in arrays])


def parts_of(flat: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """The inverse of `_flat`; what follows in the vector is left out."""
    if len(like) == 1 and flat.shape == like[0].shape:
        return [flat]
    return [part.reshape(x.shape) for part, x in zip(split(flat, [x.size for x in like]), like, strict=True)]
