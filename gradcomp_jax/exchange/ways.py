"""The ways from the workers' numbers to their mean: one message a round, whatever is in it.

| numbers or codes | aggregate | a worker of n sends, for a payload p |
|---|---|---|
| numbers as they are | "psum": an all-reduce | 2 (n - 1) / n p |
| numbers as they are | "ring": added as they pass, hop by hop (GradiVeQ's Algorithm 1) | 2 (n - 1) / n p |
| codes | "gather": all-gather; each worker decodes all | (n - 1) p |
| codes | "shuffle": each worker decodes, averages and encodes again its shard of all tensors | 2 (n - 1) / n p |
| codes | "ring": decoded, added and encoded again at each hop | 2 (n - 1) / n p |
| integers in a scale that all share | "psum", "ring": the largest scale, then the sum of integers | 2 (n - 1) / n p |

The loss of a second encoding belongs to the worker that encoded: it is part of that worker's `own`, so one residual
serves every way. *Riders* are arrays that travel beside codes and must arrive exactly, like dense leaves.
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
from gradcomp_jax.views import HALVES, LARGE, on_cpus, others_are_automatic, pack_front, split, unpack_front, widen

# The sizes of fronts grow by at most this factor: 17 sizes from 1/32 to 1, each with a collective to compile.
FRONT_STEP = 1.25
# A whole gradient with more bytes than this is a message of its own: it needs no copy, and can overlap with others.
APART = 2**20
# Of more numbers than a worker can have, so many times the largest have a finite sum.
TINY = 2.0**-64
# Matrices with fewer columns are multiplied slowly.
NARROW = 16


class Sent(NamedTuple):
    """The outcome of a round.

    Attributes:
      heard: the answer to each `Say`, in their order.
      rode: the means of the riders.
      ok: bool, whether everything that arrived was finite, the same on all workers.
      bits: the bits that this worker sent.
      length: the true length of this worker's codes, in bits as a pair; None where it is not told.
      inside: the bits that this chip sent to other chips of its worker, so that all choose the same branch.
    """

    heard: list[Heard]
    rode: list[jax.Array]
    ok: jax.Array
    bits: Bits
    length: jax.Array | None = None
    inside: int = 0


def agreed(flags: Sequence[jax.Array], before: jax.Array | None = None) -> jax.Array:
    """Whether all flags are true, and also `before`, if it is given."""
    flags = [*flags, *([] if before is None else [before])]
    if not flags:
        return jnp.array(True)
    # Not an "and": XLA's CPU backend would copy it, with all its operands, into every fusion that selects by the
    # result, and programs would grow with the square of the number of leaves. A sort does not fuse.
    return lax.sort(jnp.stack(flags).astype(jnp.int32))[0] == 1


def within(x: jax.Array, growth: float) -> jax.Array:
    """Whether all of `x` is finite, and stays finite if its magnitude grows by the factor `growth`."""
    if growth == 1 and _is_matrix(x) and on_cpus() and not others_are_automatic():
        # A product with a matrix is far faster there than a comparison of all elements. As weights are tiny, finite
        # numbers have a finite sum.
        rows = x.reshape(-1, x.shape[-1])
        return jnp.all(jnp.isfinite(jnp.full(rows.shape[0], TINY, x.dtype) @ rows))
    return jnp.all(jnp.abs(x) <= float(jnp.finfo(x.dtype).max) / growth)


def _is_matrix(x: jax.Array) -> bool:
    return x.ndim > 1 and x.shape[-1] >= NARROW and x.size >= LARGE and x.dtype in (jnp.float32, jnp.float64)


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
    """The means of numbers that travel as they are: one buffer a type, and large whole gradients apart.

    Arrays of 16 bits are summed in 16 bits, if the backend does that. Means are float32 or wider. If the compiler
    shards arrays over a further mesh axis, each array travels by itself: to fill a buffer they would have to move over
    that axis.

    Args:
      says: the numbers.
      riders: arrays that travel along.
      wire: the link.
      strengths: for each `Say`, its strength, int32, or None.
      ring: whether to sum hop by hop, instead of with the platform's all-reduce.
      before: whether everything that arrived earlier in this step was finite; None: nothing has arrived.
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
    """`x` in the type in which it is summed: on CPUs bfloat16 becomes float32.

    XLA itself widens bfloat16 on the wire there. So the count is true, and the sum is not rounded.
    """
    return x.astype(carried_in(x.dtype))


def carried_in(dtype: Any) -> Any:
    """The type in which numbers of type `dtype` are summed."""
    return jnp.dtype(jnp.float32) if dtype == jnp.bfloat16 and on_cpus() else dtype


def _share(x: jax.Array, workers: int) -> jax.Array:
    """`x`; float16 is divided by a power of two, so that no sum leaves the range."""
    return x * jnp.float16(_part(x.dtype, workers)) if x.dtype == jnp.float16 else x


def _of_share(share: jax.Array, workers: int) -> jax.Array:
    """The inverse of `_share`, float32 or wider."""
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
    """Like `exact`, if of some arrays only a front counts: all go in one buffer, filled from the front.

    Riders whose type would widen the buffer, and riders of 16 bits, which it would widen, go in messages before it.
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
        # The first message has no fronts, so it sent nothing inside.
        return then._replace(rode=[next(came[it]) for it in apart], bits=sum_bits(first.bits, then.bits))
    fronts = [say.fronts or (say.x.size,) * 2 for say in says]
    used = [jnp.array(f, jnp.int32)[0 if s is None else s] for f, s in zip(fronts, strengths, strict=True)]
    riders = [*riders[checked:], *riders[:checked]]  # unchecked riders come first
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
    """The sizes, rising, in which a buffer travels that is filled from its front.

    If all fronts that vary have one strength (the same tracer), these sizes are exact. Otherwise each is at most
    `FRONT_STEP` times the one before.

    Args:
      fronts: how many elements of each array count at each strength. If all always count, any number of strengths will
        do.
      strengths: int32 for each array, or None.
      beside: the number of elements that come first and always count.
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
    """The inverse of `_flat`; further elements of the vector are left out."""
    if len(like) == 1 and flat.shape == like[0].shape:
        return [flat]
    return [part.reshape(x.shape) for part, x in zip(split(flat, [x.size for x in like]), like, strict=True)]
