"""How payloads become a mean: the ways to aggregate, for codecs that are linear and for those that are not.

| algebra | aggregate | a worker of n sends, for a payload p |
|---|---|---|
| linear | "psum": an all-reduce of the payloads | 2 (n - 1) / n p |
| linear | "ring": added as they pass, hop by hop (GradiVeQ's Algorithm 1) | 2 (n - 1) / n p |
| not linear | "gather": all-gather; each worker decodes all | (n - 1) p |
| not linear | "shuffle": each worker decodes, averages and encodes again its shard of all tensors | 2 (n - 1) / n p |
| not linear | "ring": decoded, added and encoded again at each hop | 2 (n - 1) / n p |

A linear codec sends its payload through the codec that `linear` gives: the sum itself, or a quantiser, which makes
a composition. A codec that is not linear writes a `Coder`, two pure functions and how tensors are cut into shards,
and `exchange` does the rest. What a second encoding loses is the loss of the worker who encoded: it is part of its
`own`, so one residual serves every way to aggregate.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax import collectives
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import Codec, Compressor, Exchanged, Tensors
from gradcomp_jax.metrics import Bits, bit_pair, sum_bits
from gradcomp_jax.wire.packing import from_bytes, to_bytes

LINEAR = ("psum", "ring")
logger = logging.getLogger(__name__)


def require_aggregate(codec: str, aggregate: str | None, legal: Sequence[str]) -> None:
    """Raises ValueError for a way to aggregate that the codec cannot use; None, which stands for a choice, is legal."""
    if aggregate is None or aggregate in legal:
        return
    known = ", ".join(map(repr, legal))
    reasons = {
        "psum": f"codec {codec!r} is not linear: aggregate='psum' would add packed codes",
        "gather": f"codec {codec!r} is linear: aggregate='gather' would send each payload to all, where a sum will do",
        "shuffle": f"codec {codec!r} is linear: aggregate='shuffle' would decode before the sum, for nothing",
        "ring": f"codec {codec!r} loses too much at once: aggregate='ring' would encode the sum anew at each hop",
    }
    reason = reasons.get(aggregate, f"aggregate={aggregate!r} is not known for codec {codec!r}")
    raise ValueError(f"{reason}; use {known}")


def linear(codec: str, aggregate: str, quantizer: Compressor | None = None, axis_name: AxisName | None = None) -> Codec:
    """The codec through which a linear codec sends its payload: the exact mean, or a quantiser, which composes the two.

    Args:
      codec: the linear codec's name.
      aggregate: "psum" or "ring".
      quantizer: an unbiased one, whose codec replaces the sum. The linear codec's `own` must be made of its `own`.
      axis_name: the linear codec's, where there is a quantizer.

    Raises:
      ValueError: another way to aggregate; a quantizer that is not `qsgd`, is on another axis, keeps residuals of its
        own, or is given beside aggregate="ring".
    """
    require_aggregate(codec, aggregate, LINEAR)
    if quantizer is not None:
        if not isinstance(quantizer, Compressor) or quantizer.codec.name != "qsgd":
            name = quantizer.codec.name if isinstance(quantizer, Compressor) else quantizer
            raise ValueError(f"quantizer={name!r} of codec {codec!r} must be a qsgd(...), which rounds without bias")
        if quantizer.settings.axis_name != axis_name:
            raise ValueError(
                f"quantizer=qsgd(axis_name={quantizer.settings.axis_name!r}) is on another axis than codec {codec!r}, "
                f"axis_name={axis_name!r}: give both the same"
            )
        if quantizer.settings.error_feedback:
            raise ValueError(
                f"quantizer=qsgd(error_feedback=True) of codec {codec!r} would keep residuals of its own: leave it out "
                f"there; {codec}'s own error feedback holds for both"
            )
        if aggregate != "psum":
            raise ValueError(
                f"aggregate={aggregate!r} beside a quantizer, with which codec {codec!r} is not linear: say there how "
                "its codes are aggregated, as in qsgd(aggregate='ring')"
            )
        return quantizer.codec

    def exchange(tensors: Tensors, state: Any, axis_name: AxisName, **extra_args: Any) -> Exchanged:
        del extra_args
        mean, bits = collectives.mean(tensors, axis_name, ring=aggregate == "ring")
        return Exchanged(mean, tensors, state, bits)

    return Codec(codec, lambda tensors: (), exchange, lambda path, leaf: True, lambda path, leaf: True, linear=True)


class Compact(NamedTuple):
    """A shorter form of messages, which not every message has.

    Attributes:
      pack: message -> (bytes uint8 [p], whether the message fits, the true length of its code in bits as a pair).
      unpack: bytes -> message.
    """

    pack: Callable[[Any], tuple[jax.Array, jax.Array, jax.Array]]
    unpack: Callable[[jax.Array], Any]


class Coder(NamedTuple):
    """A codec that is not linear, for tensors of given shapes and a given number of shards.

    Attributes:
      cut: tensors -> shards, arrays [shards, ...].
      join: the inverse of cut.
      encode: (a shard, its index, a random key) -> message, arrays as narrow as they travel. Zeros must come back
        as zeros.
      decode: message -> shard.
      compact: a shorter form of the message; all workers use it in a step, or none does.
      length: message -> the true length of what it holds, in bits as a pair; for formats with unused room.
      vote: whether the mean of what was decoded is itself encoded, as in a majority vote.
      used: where only the front of a message's one buffer has a meaning: its length, int32, the same on all workers,
        and the least and the most that it can be.
    """

    cut: Callable[[Tensors], Any]
    join: Callable[[Any], Tensors]
    encode: Callable[[Any, jax.Array, jax.Array], Any]
    decode: Callable[[Any], Any]
    compact: Compact | None = None
    length: Callable[[Any], jax.Array] | None = None
    vote: bool = False
    used: tuple[jax.Array, int, int] | None = None


CoderOf = Callable[[Tensors, int], Coder]
"""(tensors, of which only shapes and types count; number of shards) -> Coder."""


class Aggregated(NamedTuple):
    """What `exchange` returns.

    Attributes:
      mean: identical on all workers.
      own: pmean(own) == mean.
      bits: that this worker sent.
      second: the next memory of the second stage; None without it.
      length: the true length of all that this worker encoded, in bits as a pair; None where it is that of the payload.
    """

    mean: Tensors
    own: Tensors
    bits: Bits
    second: Tensors | None = None
    length: jax.Array | None = None


def exchange(
    tensors: Tensors,
    coder_of: CoderOf,
    aggregate: str | None,
    axis_name: AxisName,
    key: jax.Array | None = None,
    second: Tensors | None = None,
) -> Aggregated:
    """Averages tensors through a coder.

    Args:
      tensors: this worker's, by path; at least one.
      coder_of: makes the coder.
      aggregate: "gather", "shuffle" or "ring"; None for the one of the first two that sends less, see `choose`.
      axis_name: the axis of the workers.
      key: this worker's own random key, of this step; not for coders that draw nothing.
      second: for "shuffle", a memory of the second stage's error alone, of the tensors' shapes, which the tensors
        hold too (n times, on this worker's shard): it is added at the second stage instead of the first.
    """
    n = collectives.workers(axis_name)
    key = jax.random.key(0) if key is None else key
    chosen = aggregate or choose(coder_of, tensors, n)
    coder = coder_of(tensors, 1 if chosen == "gather" else n)
    # Called in several places, traced once.
    coder = coder._replace(encode=jax.jit(coder.encode), decode=jax.jit(coder.decode))
    if chosen == "gather":
        return _gather(tensors, coder, axis_name, key)
    if chosen == "shuffle":
        return _shuffle(tensors, coder, axis_name, key, second)
    return _ring(tensors, coder, axis_name, key)


def choose(coder_of: CoderOf, tensors: Tensors, n: int) -> str:
    """Whichever of "gather" and "shuffle" has each of n workers send less; "gather", which encodes once, if equal.

    So it is for two workers, where only rounding makes a difference. What is chosen among more is logged, at level
    INFO, whenever a program is traced.
    """
    if n <= 2:
        return "gather"
    gathered, shuffled = (payload_bytes(coder_of(tensors, shards), tensors) for shards in (1, n))
    sent = {"gather": (n - 1) * gathered, "shuffle": 2 * (n - 1) * shuffled}
    chosen = min(sent, key=lambda way: sent[way])
    logger.info("aggregate=%r among %d workers: a worker sends %s bytes in a step", chosen, n, sent)
    return chosen


def payload_bytes(coder: Coder, tensors: Tensors) -> int:
    """The size of one shard's payload, in its compact form if there is one."""

    def payload(tensors, key):
        message = coder.encode(row(coder.cut(tensors), 0), jnp.int32(0), key)
        return pack_message(message) if coder.compact is None else coder.compact.pack(message)[0]

    return jax.eval_shape(payload, tensors, jax.random.key(0)).size


def _gather(tensors: Tensors, coder: Coder, axis_name: AxisName, key: jax.Array) -> Aggregated:
    message = coder.encode(row(coder.cut(tensors), 0), jnp.int32(0), key)
    own = coder.decode(message)
    average = functools.partial(_mean_of_decoded, coder)
    mean, bits, length = _send(
        message, coder, functools.partial(collectives.gather, axis_name=axis_name), average, axis_name
    )
    if coder.vote:
        voted = coder.decode(coder.encode(mean, jnp.int32(0), key))
        own = jax.tree.map(lambda x, new, old: x + (new - old), own, voted, mean)
        mean = voted
    mean, own = (coder.join(jax.tree.map(lambda x: x[None], x)) for x in (mean, own))
    return Aggregated(mean, own, bits, None, length)


def _shuffle(tensors: Tensors, coder: Coder, axis_name: AxisName, key: jax.Array, second: Tensors | None) -> Aggregated:
    n, me = collectives.workers(axis_name), collectives.worker_index(axis_name)
    shards = coder.cut(tensors)
    if second is not None:
        # What the second stage owes is in the tensors n times, as it is one worker's share of a mean.
        owed = coder.cut(second)
        shards = jax.tree.map(lambda x, e: x - n * e, shards, owed)

    def encode(shard_index_key):
        return coder.encode(*shard_index_key)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n, dtype=jnp.int32))
    # One after another: a shard's choice between branches stays a choice.
    messages = lax.map(encode, (shards, jnp.arange(n, dtype=jnp.int32), keys))
    own = jax.vmap(coder.decode)(messages)
    average = functools.partial(_mean_of_decoded, coder)

    def restore(received: jax.Array, unpack: Callable) -> Any:
        return jax.vmap(lambda payload: coder.decode(unpack(payload)))(received)

    scatter, gather = (functools.partial(f, axis_name=axis_name) for f in (collectives.scatter, collectives.gather))
    exact, scatter_bits, first_length = _send(messages, coder, scatter, average, axis_name, lead=True)
    if second is not None:
        exact = jax.tree.map(lambda x, e: x + e[me], exact, owed)
    message = coder.encode(exact, me, jax.random.fold_in(key, n))
    sent = coder.decode(message)
    mean, gather_bits, second_length = _send(message, coder, gather, restore, axis_name)
    lost = jax.tree.map(lambda s, x: s - x, sent, exact)
    if second is not None:
        owes = jax.tree.map(lambda e, x: jnp.zeros_like(e).at[me].set(-x), owed, lost)
        lost = jax.tree.map(lambda x, e: x + e[me], lost, owed)
        second = coder.join(owes)
    own = jax.tree.map(lambda x, more: x.at[me].add(n * more), own, lost)
    length = None
    if first_length is not None and second_length is not None:
        length = functools.reduce(sum_bits, [*first_length, second_length])
    static = isinstance(scatter_bits, int) and isinstance(gather_bits, int)
    bits = scatter_bits + gather_bits if static else sum_bits(scatter_bits, gather_bits)
    return Aggregated(coder.join(mean), coder.join(own), bits, second, length)


def _ring(tensors: Tensors, coder: Coder, axis_name: AxisName, key: jax.Array) -> Aggregated:
    n = collectives.workers(axis_name)
    shards = (coder.cut(tensors), jnp.arange(n, dtype=jnp.int32))

    def first(part):
        shard, index = part
        message = coder.encode(shard, index, jax.random.fold_in(key, index))
        return message, coder.decode(message)

    def hop(message, part):
        """What came in, this worker's shard added, goes on; its own part is the difference."""
        shard, index = part
        received = coder.decode(message)
        summed = jax.tree.map(jnp.add, received, shard)
        message = coder.encode(summed, index, jax.random.fold_in(key, index))
        return message, jax.tree.map(lambda s, r: s - r, coder.decode(message), received)

    message, own, passing = collectives.around_ring(shards, first, hop, axis_name)
    payloads, gathering = collectives.gather(pack_message(message), axis_name)
    unpack = unpacker(message)
    sums = jax.vmap(lambda payload: coder.decode(unpack(payload)))(collectives.of_ring(payloads))
    mean = jax.tree.map(lambda x: x / n, sums)
    return Aggregated(coder.join(mean), coder.join(own), passing + gathering)


def _mean_of_decoded(coder: Coder, received: jax.Array, unpack: Callable[[jax.Array], Any]) -> Any:
    """The mean of what payloads [n, p] decode to."""

    # One after another: memory holds one decoded copy however many workers there are. By index, as a scan would copy
    # the payloads.
    def add(worker: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, coder.decode(unpack(received[worker])))

    total = lax.fori_loop(1, len(received), add, coder.decode(unpack(received[0])))
    return jax.tree.map(lambda x: x / len(received), total)


def row(tree: Any, index: Any) -> Any:
    """Row `index` of each array."""
    return jax.tree.map(lambda x: x[index], tree)


def pack_message(message: Any) -> jax.Array:
    """The bytes of a message's arrays, one after another, uint8 [p]."""
    return jnp.concatenate([to_bytes(x) for x in jax.tree.leaves(message)])


def unpacker(message: Any) -> Callable[[jax.Array], Any]:
    """The inverse of `pack_message`, for messages of these shapes and types."""
    leaves, treedef = jax.tree.flatten(message)

    def unpack(payload: jax.Array) -> Any:
        parts, start = [], 0
        for leaf in leaves:
            size = leaf.size * leaf.dtype.itemsize
            parts.append(from_bytes(payload[start : start + size], leaf.shape, leaf.dtype))
            start += size
        return jax.tree.unflatten(treedef, parts)

    return unpack


def _send(
    message: Any,
    coder: Coder,
    collective: Callable[[jax.Array], tuple[jax.Array, int]],
    consume: Callable[[jax.Array, Callable], Any],
    axis_name: AxisName,
    lead: bool = False,
) -> tuple[Any, Bits, jax.Array | None]:
    """Sends a message, or with `lead` several, and hands what is received to `consume(payloads, unpack)`."""
    each = jax.vmap if lead else lambda f: f
    unpack = unpacker(jax.tree.map(lambda x: x[0], message) if lead else message)

    def send(payload: jax.Array, unpack: Callable) -> tuple[Any, Bits]:
        received, bits = collective(payload)
        return consume(received, unpack), bits

    length = None if coder.length is None else each(coder.length)(message)
    if coder.used is not None:
        received, pair = collectives.front(collective, each(pack_message)(message), *coder.used)
        return consume(received, unpack), pair, length
    if coder.compact is None:
        return *send(each(pack_message)(message), unpack), length

    compact = coder.compact
    payload, fits, length = each(compact.pack)(message)
    agreed, agreement = collectives.all_(jnp.all(fits), axis_name)

    def shorter() -> tuple[Any, jax.Array]:
        result, bits = send(payload, compact.unpack)
        return result, bit_pair(bits)

    def plain() -> tuple[Any, jax.Array]:
        result, bits = send(each(pack_message)(message), unpack)
        return result, bit_pair(bits)

    result, pair = lax.cond(agreed, shorter, plain)
    return result, sum_bits(pair, agreement), length


def require_second_stage(second_residual: bool, aggregate: str | None, error_feedback: bool) -> str | None:
    """`aggregate`, which a residual of the second stage makes "shuffle"; ValueError where there is no such stage."""
    if not second_residual:
        return aggregate
    if aggregate == "gather" or not error_feedback:
        raise ValueError(
            "second_residual=True keeps what the second stage of aggregate='shuffle' loses, under error feedback: got "
            f"aggregate={aggregate!r}, error_feedback={error_feedback}"
        )
    return "shuffle"
