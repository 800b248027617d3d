"""How codes travel: the messages of all shards go out as one buffer, with riders beside them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.coder import Coder, Message
from gradcomp_jax.contract import Heard, Say, Sparse, dense
from gradcomp_jax.exchange.bits import Bits, bit_pair, sum_bits, total_bits
from gradcomp_jax.exchange.collectives import Wire, of_ring, vary_as
from gradcomp_jax.exchange.shards import (
    Group,
    add,
    add_each,
    cut,
    decode_all,
    encode_all,
    encode_each,
    encode_mean,
    grouped,
    lengths,
    owns,
    row,
    sound,
    uncut,
)
from gradcomp_jax.exchange.ways import Sent, agreed, parts_of, sizes_of, within
from gradcomp_jax.views import add_window, halved, late_zeros, pack_front, unpack_front, widen
from gradcomp_jax.wire.packing import pack_arrays, pack_terms, unpack_arrays, unpack_sum


class Riders(NamedTuple):
    """Arrays that travel exactly beside codes, cut into as many shards.

    Attributes:
      arrays: the arrays.
      shards: the number of shards.
      checked: how many of the first arrays must be finite.
    """

    arrays: Sequence[jax.Array]
    shards: int
    checked: int

    def _types(self) -> list[Any]:
        return sorted({x.dtype for x in self.arrays}, key=str)

    def _size(self, dtype: Any) -> int:
        return -(-sum(x.size for x in self.arrays if x.dtype == dtype) // self.shards)

    def pack(self) -> jax.Array:
        """The arrays' bytes, uint8 [shards, b]."""
        flats = [jnp.concatenate([x.reshape(-1) for x in self.arrays if x.dtype == dtype]) for dtype in self._types()]
        parts = [cut(flat, self.shards, self._size(flat.dtype)) for flat in flats]
        return pack_arrays(parts, 1) if parts else jnp.zeros((self.shards, 0), jnp.uint8)

    def unpack(self, data: jax.Array) -> list[jax.Array]:
        """A vector for each type, [..., elements of a shard], from bytes [..., b]."""
        like = [jax.ShapeDtypeStruct((self._size(dtype),), dtype) for dtype in self._types()]
        return unpack_arrays(data, like)

    def mean(self, data: jax.Array) -> list[jax.Array]:
        """The mean of the workers' vectors for each type, from their bytes [n, b]; float32 or wider."""
        return [jnp.sum(widen(x), axis=0) / len(data) for x in self.unpack(data)]

    def repack(self, means: list[jax.Array]) -> jax.Array:
        """The bytes of a shard's means, in the arrays' own types."""
        vectors = [halved(x, dtype) for x, dtype in zip(means, self._types(), strict=True)]
        return pack_arrays(vectors) if vectors else jnp.zeros(0, jnp.uint8)

    def sound(self, shards: list[jax.Array]) -> list[jax.Array]:
        """Whether the checked arrays are finite, from vectors [shards, ...] for each type; one flag a type."""
        sizes = [sum(x.size for x in self.arrays[: self.checked] if x.dtype == dtype) for dtype in self._types()]
        return [within(x.reshape(-1)[:size], 1) for x, size in zip(shards, sizes, strict=True) if size]

    def restore(self, shards: list[jax.Array]) -> list[jax.Array]:
        """The arrays, float32 or wider, from vectors [shards, ...] for each type."""
        arrays = list(self.arrays)
        for flat, dtype in zip(shards, self._types(), strict=True):
            places = [place for place, x in enumerate(self.arrays) if x.dtype == dtype]
            for place, x in zip(places, parts_of(widen(flat.reshape(-1)), [arrays[i] for i in places]), strict=True):
                arrays[place] = x
        return arrays


Collective = Callable[[jax.Array], tuple[jax.Array, Bits]]


class Received(NamedTuple):
    """The messages of all workers, as they arrived.

    Attributes:
      all: the messages of each group, arrays [n, ...].
      of: a worker's index -> that worker's messages; without a shorter form or fronts, from its bytes alone.
    """

    all: list[Message]
    of: Callable[[Any], list[Message]]


Consume = Callable[[Received, jax.Array], Any]


class Delivery(NamedTuple):
    """The outcome of sending messages.

    Attributes:
      result: what `consume` made of the messages that arrived.
      bits: the bits that this worker sent.
      inside: the bits that this chip sent to other chips of its worker.
      length: the true length of this worker's messages, in bits as a pair; None where it is not told.
    """

    result: Any
    bits: Bits
    inside: int
    length: jax.Array | None


def send(
    groups: list[Group],
    messages: list[Message],
    riding: jax.Array,
    collective: Collective,
    consume: Consume,
    wire: Wire,
) -> Delivery:
    """Sends messages, and the bytes of riders, as one buffer.

    Args:
      groups: the groups.
      messages: the message of each group; arrays [n, ...] if the collective sends a different message to each worker.
      riding: the riders' bytes [b]; or [n, b] if the collective sends different bytes to each worker.
      collective: the function that sends a buffer.
      consume: the function that gets the messages and the riders' bytes [n, b] that arrive.
      wire: the link.
    """
    lead = riding.ndim - 1
    if groups[0].coder.fronts(groups[0].shape) is not None:
        sent = _send_fronts(groups, messages, riding, collective, consume, wire)
        return Delivery(*sent, lengths(groups, messages if lead else [row(m, None) for m in messages]))
    like = [row(message, 0) for message in messages] if lead else messages
    compact = groups[0].coder.compact(groups[0].each // groups[0].coder.unit)

    def plain() -> tuple[Any, Bits]:
        unpack = functools.partial(unpack_arrays, like=like)
        arrived = lambda data: Received(unpack(data), lambda worker: unpack(row(data, worker)))  # noqa: E731
        return _carry(pack_arrays(messages, lead), riding, collective, consume, arrived)

    if compact is None:
        return Delivery(*plain(), 0, lengths(groups, messages if lead else [row(m, None) for m in messages]))
    # One after another: a vmap of these loops would select the whole of their results in each turn.
    pack, unpack = compact.pack, functools.partial(lax.map, compact.unpack)
    payload, fits, length = lax.map(pack, messages[0]) if lead else pack(messages[0])
    agreed_to, asking = wire.all_(jnp.all(fits))

    def shorter() -> tuple[Any, Bits]:
        return _carry(payload, riding, collective, consume, lambda data: _unpacked([unpack(data)]))

    unfit, inside = wire.widest(1 - agreed_to.astype(jnp.int32))
    result, bits = wire.switch(1 - unfit, [_paired(plain), _paired(shorter)])
    return Delivery(result, sum_bits(bits, asking), inside, total_bits(length) if lead else length)


def _paired(branch: Callable[[], tuple[Any, Bits]]) -> Callable[[], tuple[Any, jax.Array]]:
    """A branch whose bits are a pair."""

    def paired() -> tuple[Any, jax.Array]:
        result, bits = branch()
        return result, bit_pair(bits)

    return paired


def _unpacked(messages: list[Message]) -> Received:
    return Received(messages, functools.partial(row, messages))


def _carry(
    payload: jax.Array,
    riding: jax.Array,
    collective: Collective,
    consume: Consume,
    arrived: Callable[[jax.Array], Received],
) -> tuple[Any, Bits]:
    received, bits = collective(jnp.concatenate([payload, riding], axis=-1) if riding.shape[-1] else payload)
    end = payload.shape[-1]
    return consume(arrived(received[..., :end]), received[..., end:]), bits


def _send_fronts(
    groups: list[Group],
    messages: list[Message],
    riding: jax.Array,
    collective: Collective,
    consume: Consume,
    wire: Wire,
) -> tuple[Any, Bits, int]:
    """Like `send`, for messages whose fronts alone count: one buffer, filled from its front."""
    fronts = [group.coder.fronts(group.shape) or () for group in groups]
    used = [jnp.array(f, jnp.int32)[group.strength] for f, group in zip(fronts, groups, strict=True)]
    beside = riding.shape[-1]
    sizes = sizes_of(fronts, [group.strength for group in groups], beside)
    pack = lambda *pieces: pack_front(pieces, used)  # noqa: E731
    pieces = [message["data"] for message in messages]
    buffer = (jax.vmap(pack) if riding.ndim > 1 else pack)(*pieces)
    buffer = jnp.concatenate([riding, buffer], axis=-1) if beside else buffer
    length = functools.reduce(jnp.add, used) + beside
    received, bits, inside = wire.front(collective, buffer, length, sizes)
    got = jax.vmap(lambda data: unpack_front(data, used, [max(f) for f in fronts]))(received[..., beside:])
    return consume(_unpacked([{"data": x} for x in got]), received[..., :beside]), bits, inside


def coded(
    says: Sequence[Say],
    coder: Coder,
    way: str,
    riders: Sequence[jax.Array],
    wire: Wire,
    key: jax.Array,
    strengths: Sequence[Any],
    *,
    before: jax.Array | None,
    checked: int,
) -> Sent:
    """The means of numbers that travel as codes; under "gather" and "shuffle" riders travel exactly beside them.

    Args:
      says: the numbers.
      coder: the coder that turns them into bytes.
      way: one of `coder.ways`.
      riders: arrays that travel along.
      wire: the link.
      key: this worker's own random key for this round.
      strengths: for each `Say`, its strength, int32, or None.
      before: whether everything that arrived earlier in this step was finite; None: nothing has arrived.
      checked: how many of the first riders must be finite.
    """
    growth = max(say.growth for say in says)
    ys = coder.lay_all([say.x for say in says])
    strengths = strengths[: len(ys)]  # of tensors that are joined there is one
    if way == "gather":
        sent = _gather(ys, coder, Riders(riders, 1, checked), wire, key, strengths, before, growth)
    elif way == "shuffle":
        owed = [say.second for say in says if say.second is not None]
        seconds = coder.lay_all(owed) if owed else [None] * len(ys)
        sent = _shuffle(ys, seconds, coder, Riders(riders, wire.workers, checked), wire, key, strengths, before, growth)
    else:
        sent = _ring(ys, coder, wire, key, strengths, before, growth)
    fields = [_all_unlaid(coder, [one[place] for one in sent.heard], says) for place in range(len(Heard._fields))]
    return sent._replace(heard=[Heard(*one) for one in zip(*fields, strict=True)])


def _all_unlaid(coder: Coder, xs: Sequence[Any], says: Sequence[Say]) -> list[Any]:
    """Tensors, perhaps `Sparse`, in the shapes and types of what was said; None for each if there are none."""
    if xs[0] is None:
        return [None] * len(says)
    if coder.joins:
        zeros = lambda x: late_zeros(jax.ShapeDtypeStruct(x.shape, x.values.dtype), x.values)  # noqa: E731
        whole = [x.added_to(zeros(x)) if isinstance(x, Sparse) else x for x in xs]
        return coder.unlay_all(whole, [say.x for say in says])
    return [_unlaid(coder, x, say.x) for x, say in zip(xs, says, strict=True)]


def _unlaid(coder: Coder, x: Any, like: jax.Array) -> Any:
    if isinstance(x, Sparse):  # of a flat tensor
        window = x.window and (x.window[0], x.window[1].astype(like.dtype))
        return Sparse(x.indices, x.values.astype(like.dtype), like.shape, window)
    return coder.unlay(x, like)


def _silenced(groups: list[Group], messages: list[Message], ok: jax.Array) -> list[Message]:
    return [group.coder.silenced(message, ok) for group, message in zip(groups, messages, strict=True)]


def _hushed(group: Group, ys: list[jax.Array], ok: jax.Array) -> list[jax.Array]:
    """Tensors, made zero where not `ok` if their coder cannot silence messages."""
    return ys if group.coder.silences else [jnp.where(ok, y, 0) for y in ys]


def _gather(ys, coder: Coder, ride: Riders, wire: Wire, key: jax.Array, strengths, before, growth) -> Sent:
    n = wire.workers
    groups = grouped(coder, ys, 1, key, strengths)
    messages = encode_each(groups)

    def consume(received: Received, rode: jax.Array) -> tuple[Any, Any, jax.Array]:
        exact = ride.mean(rode)
        ok = agreed([sound(groups, received.all, n * growth), *ride.sound(exact)], before)
        means = _mean_of_all(groups, lambda worker: _silenced(groups, received.of(worker), ok), n)
        means = [_hushed(group, mean, ok) for group, mean in zip(groups, means, strict=True)]
        return [_voted(group, mean) for group, mean in zip(groups, means, strict=True)], exact, ok

    mine = [row(message, 0) for message in messages]
    (means, exact, ok), bits, inside, length = send(groups, mine, ride.pack()[0], wire.gather, consume, wire)
    heard = []
    sent = jax.tree.map(lambda x: x[None], _as_sent(groups, mine, 0))
    for group, message, (voted, mean) in zip(groups, sent, means, strict=True):
        became = owns(group, message)
        if coder.votes:
            became = [dense(x) + (v - m) for x, v, m in zip(became, voted, mean, strict=True)]
        heard += [Heard(v, own) for v, own in zip(voted, became, strict=True)]
    return Sent(heard, ride.restore(exact), ok, bits, length, inside)


def _as_sent(groups: list[Group], messages: list[Message], lead: int) -> list[Message]:
    """Messages, unpacked from their bytes where they are packed anyway: their sources need not be kept."""
    if groups[0].coder.tells_length or groups[0].coder.fronts(groups[0].shape) is not None:
        return messages
    like = [row(message, 0) for message in messages] if lead else messages
    return unpack_arrays(lax.optimization_barrier(pack_arrays(messages, lead)), like)


def _mean_of_all(groups: list[Group], of: Callable[[Any], list[Message]], n: int) -> list[list[jax.Array]]:
    """The mean over the workers of their decoded messages of whole tensors; of: worker -> messages."""
    if n == 1:
        return [decode_all(g, row(m, None)) for g, m in zip(groups, of(0), strict=True)]

    # One after another: memory holds one decoded copy however many workers there are. By index, because a scan would
    # copy the payloads.
    added = lambda worker, totals: add_each(groups, totals, of(worker), n)  # noqa: E731
    first = next(x for x in jax.tree.leaves(of(0)) if x.size)
    zeros = [[late_zeros(y, first) for y in group.ys] for group in groups]
    return functools.reduce(lambda t, w: added(w, t), range(n), zeros) if n == 2 else lax.fori_loop(0, n, added, zeros)


def _voted(group: Group, mean: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """The mean as it is after encoding, if the coder votes; and the mean itself."""
    if not group.coder.votes:
        return mean, mean
    again = dataclasses.replace(group, ys=mean)
    return decode_all(again, encode_all(again)), mean


def _shuffle(ys, seconds, coder: Coder, ride: Riders, wire: Wire, key: jax.Array, strengths, before, growth) -> Sent:
    n, me = wire.workers, wire.index
    # The tensors contain the second stage's residual n times, because it is one worker's share of a mean.
    firsts = [y if e is None else y - n * e for y, e in zip(ys, seconds, strict=True)]
    groups = grouped(coder, firsts, n, key, strengths)
    owed = [cut(e, n, group.each) for e, group in zip(seconds, groups, strict=False) if e is not None]
    messages = encode_each(groups)

    def average(received: Received, rode: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        return _mean_of_shards(groups, received.all, n, me), ride.mean(rode)

    def restore(received: Received, rode: jax.Array) -> tuple[Any, list[jax.Array], jax.Array]:
        exact = ride.unpack(rode)
        ok = agreed([sound(groups, received.all, n * growth), *ride.sound(exact)], before)
        messages = _silenced(groups, received.all, ok)
        means = [_hushed(g, decode_all(g, m), ok) for g, m in zip(groups, messages, strict=True)]
        return means, exact, ok

    first = send(groups, messages, ride.pack(), wire.scatter, average, wire)
    exact, rode = first.result
    if seconds[0] is not None:
        exact = [x + row(e, me) for x, e in zip(exact, owed, strict=True)]
    encoded = [encode_mean(g, x, me) for g, x in zip(groups, exact, strict=True)]
    again, lost = [message for message, _ in encoded], [change for _, change in encoded]
    then = send(groups, again, ride.repack(rode), wire.gather, restore, wire)
    means, rode, ok = then.result
    heard = []
    sent = _as_sent(groups, messages, 1)
    for place, (group, message, mean) in enumerate(zip(groups, sent, means, strict=True)):
        second = None
        if seconds[0] is not None:
            second = add_window(jnp.zeros_like(ys[place]), -lost[place], me * group.each)
            lost[place] = lost[place] + row(owed[place], me)
        for own, start, one in zip(owns(group, message), group.starts(), mean, strict=False):
            heard.append(Heard(one, _plus_window(own, n * lost[place], _begin(group, me, start, one)), second))
    length = then.length
    if first.length is not None and length is not None:
        length = bit_pair(sum_bits(first.length, length))
    return Sent(heard, ride.restore(rode), ok, sum_bits(first.bits, then.bits), length, first.inside + then.inside)


def _begin(group: Group, me: jax.Array, start: int, y: jax.Array) -> jax.Array:
    """The place where this worker's shard begins, counted from the start of a group's tensor that begins at `start`."""
    if not group.coder.pooled:
        return me * group.each
    # In units, because an int32 cannot count the elements of all tensors. A shard without a part of y begins outside y.
    unit = group.coder.unit
    each = group.each // unit
    return jnp.clip(me * each - start // unit, -each, -(-y.shape[-1] // unit)) * unit


def _plus_window(own: Any, window: jax.Array, start: jax.Array) -> Any:
    """`own`, a tensor or `Sparse`, plus `window`, which begins at place `start` of the last axis."""
    if isinstance(own, Sparse):
        return dataclasses.replace(own, window=(start, window))
    return add_window(own, window, start)


def _mean_of_shards(groups: list[Group], received: list[Message], n: int, me: jax.Array) -> list[jax.Array]:
    """The means of this worker's shards, from the messages [n, ...] that all workers sent for them."""

    def added(worker: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        each = zip(groups, totals, received, strict=True)
        return [add(group, total, row(message, worker), me, 1 / n) for group, total, message in each]

    # Their types vary like the added arrays, which may come from a part of a message alone.
    like = [[me, *jax.tree.leaves(message)] for message in received]
    zeros = [jnp.zeros(group.shape, jnp.float32) for group in groups]
    zeros = [functools.reduce(vary_as, leaves, zero) for leaves, zero in zip(like, zeros, strict=True)]
    return lax.fori_loop(0, n, added, zeros)


def _ring(ys, coder: Coder, wire: Wire, key: jax.Array, strengths, before, growth) -> Sent:
    n = wire.workers
    groups = grouped(coder, ys, n, key, strengths)
    shards = [cut(_pooled(group), n, group.each) for group in groups]

    def encode(parts: list[jax.Array], index: jax.Array) -> list[Message]:
        return [g.coder.encode(x, g.part(index, g.key(0, index))) for g, x in zip(groups, parts, strict=True)]

    def restore(messages: list[Message]) -> list[jax.Array]:
        return [group.restore(message) for group, message in zip(groups, messages, strict=True)]

    like = jax.eval_shape(encode, row(shards, 0), jnp.int32(0))
    unpack = functools.partial(unpack_arrays, like=like)

    def first(part: Any) -> tuple[jax.Array, list[jax.Array]]:
        messages = encode(*part)
        return pack_arrays(messages), restore(messages)

    def hop(data: jax.Array, part: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Adds this worker's shard to the sum that came in and sends it on; the worker's own part is the difference."""
        received = restore(unpack(data))
        messages = encode(jax.tree.map(jnp.add, received, part[0]), part[1])
        return pack_arrays(messages), jax.tree.map(jnp.subtract, restore(messages), received)

    mine, own, passing = wire.around_ring((shards, jnp.arange(n, dtype=jnp.int32)), first, hop)
    payloads, gathering = wire.gather(mine)
    received = unpack(of_ring(payloads))
    ok = agreed([sound(groups, received, n * growth)], before)
    heard = []
    for group, message, parts in zip(groups, _silenced(groups, received, ok), own, strict=True):
        sums = decode_all(group, message)
        heard += [Heard(x / n, o) for x, o in zip(sums, _unpooled(group, parts), strict=True)]
    return Sent(heard, [], ok, passing + gathering)


def _pooled(group: Group) -> jax.Array:
    """The group's tensors, joined along the last axis, each filled up to whole units."""
    starts = group.starts()
    sizes = [end - start for start, end in itertools.pairwise(starts)]
    filled = [cut(y, 1, size)[0] for y, size in zip(group.ys, sizes, strict=True)]
    return jnp.concatenate(filled, axis=-1) if len(filled) > 1 else filled[0]


def _unpooled(group: Group, shards: jax.Array) -> list[jax.Array]:
    """The inverse of `_pooled`, from shards."""
    starts = group.starts()
    flat = uncut(shards)
    return [flat[..., start : start + y.shape[-1]] for y, start in zip(group.ys, starts, strict=False)]


def shared(says: Sequence[Say], coder: Any, way: str, wire: Wire, key: jax.Array, before: jax.Array | None) -> Sent:
    """The means of numbers that travel as integers and are summed as integers, in scales that all workers share.

    The scale of a unit is the largest of all workers' scales for it.
    """
    n = wire.workers
    ys = [coder.lay(say.x) for say in says]
    (group,) = grouped(coder, ys, 1, key, [None] * len(ys))
    scales = jnp.concatenate([coder.scale(y) for y in ys])
    # As integers, which have the order of floats without their signs. A maximum of floats may drop a NaN, and the NaN
    # that a processor makes of Inf / Inf may have a sign.
    order, asking = wire.largest(lax.bitcast_convert_type(scales, jnp.int32).reshape(-1) & 0x7FFFFFFF)
    scales = lax.bitcast_convert_type(order, jnp.float32).reshape(scales.shape)
    ok = agreed([within(scales, 2 * n * max(say.growth for say in says))], before)
    scales = jnp.where(ok, scales, 0)
    ends = [start // coder.unit for start in group.starts()]
    keys = [group.key(place, 0) for place in range(len(ys))]
    each = list(zip(ys, ends, ends[1:], keys, strict=False))
    mine = [coder.quantize_by(y, scales[a:b], k) for y, a, b, k in each]
    words = jnp.concatenate([pack_terms(x, coder.s, n) for x in mine])
    sums, bits = (wire.ring_total if way == "ring" else wire.total)(words.reshape(-1))
    sums = unpack_sum(sums.reshape(words.shape), coder.s, n)
    heard = []
    for say, y, own, (_, a, b, _) in zip(says, ys, mine, each, strict=True):
        values = [coder.of_integers(x, scales[a:b], n)[: y.shape[-1]] for x in (sums[a:b], own)]
        heard.append(Heard(coder.unlay(values[0] / n, say.x), coder.unlay(values[1], say.x)))
    return Sent(heard, [], ok, asking + bits)
