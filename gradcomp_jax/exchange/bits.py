"""The number of bits that travelled, counted in the state while training.

Three quantities have three names. *Payload* is the bits that one worker encodes. *Wire* is the bits that one worker
sends under the ring laws, with padding and uncompressed leaves. *Entropy* is the length of a variable code inside a
fixed buffer. `wire_bits` counts the wire, like `gradcomp_jax.hlo.collective_bytes`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gradcomp_jax.coder import CodeLength


class WireCount(NamedTuple):
    """The bits that one worker sent, as part of a codec's state; `wire_bits` reads it.

    jax has no int64 by default and a uint32 wraps at 512 MiB, so a count is a uint32 (high, low) pair.

    Attributes:
      last: uint32 [2], the bits of the last step.
      total: uint32 [2], the bits of all steps so far. Skipped steps count: their bits travelled too.
    """

    last: jax.Array
    total: jax.Array


class WireBits(NamedTuple):
    """The bits that one worker sent, in the last step and in total; Python ints."""

    last: int
    total: int


class Links(NamedTuple):
    """The bits on each link, for `across`.

    Attributes:
      between: the bits that one chip sent to other slices or nodes.
      inside: the bits that it sent to other chips of its own slice or node.
    """

    between: WireCount
    inside: WireCount


def no_bits(inside: bool = False) -> Any:
    """The count before the first step; with `inside`, a count for each link."""
    none = lambda: WireCount(jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.uint32))  # noqa: E731
    return Links(none(), none()) if inside else none()


Bits = int | jax.Array
"""A number of bits: a Python int; or a uint32 (high, low) pair if the step decides it, see `bit_pair`."""


def bit_pair(bits: Bits) -> jax.Array:
    """`bits` as a uint32 (high, low) pair, [2]."""
    if isinstance(bits, int):
        return jnp.asarray([bits >> 32, bits & 0xFFFFFFFF], jnp.uint32)
    return bits


def sum_bits(first: Bits, second: Bits) -> Bits:
    """The sum of two numbers of bits; a pair if one of them is a pair."""
    if isinstance(first, int) and isinstance(second, int):
        return first + second
    a, b = bit_pair(first), bit_pair(second)
    low = a[1] + b[1]
    carry = (low < b[1]).astype(jnp.uint32)
    return jnp.stack([a[0] + b[0] + carry, low])


def total_bits(pairs: jax.Array) -> jax.Array:
    """The sum of up to 2^24 pairs, uint32 [k, 2] -> [2]."""
    high, low = pairs[:, 0], pairs[:, 1]
    total, carry = jnp.uint32(0), jnp.uint32(0)
    for shift in (0, 8, 16, 24):  # by bytes, whose sums do not wrap
        carry = jnp.sum(low >> shift & 0xFF, dtype=jnp.uint32) + carry
        total, carry = total | (carry & 0xFF) << shift, carry >> 8
    return jnp.stack([jnp.sum(high, dtype=jnp.uint32) + carry, total])


def add_bits(count: Any, bits: Bits, inside: Bits = 0) -> Any:
    """`count` after a step that sent `bits`, and `inside` over the fast link."""
    if isinstance(count, Links):
        return Links(add_bits(count.between, bits), add_bits(count.inside, inside))
    last = bit_pair(bits)
    return WireCount(last, bit_pair(sum_bits(count.total, last)))


def further_bits(count: Any, bits: Bits) -> Any:
    """`count` if the last step also sent `bits`."""
    if isinstance(count, Links):
        return count._replace(between=further_bits(count.between, bits))
    return WireCount(*(bit_pair(sum_bits(x, bits)) for x in count))


def code_bits(opt_state: Any) -> float:
    """The true length of codes that fill only a part of their buffers: QSGD's Elias code, adaptive's columns.

    The whole buffer travels, and `wire_bits` counts it. A runtime with messages of any length would have to send only
    these bits (the *entropy*, see the module), before the ring laws multiply them. Each worker knows only its own
    length. With several processes call this function in all of them, because one alone would wait for the others.

    Args:
      opt_state: an optimiser state, of any form, that holds the state of such codecs. The lengths of several add up.

    Returns:
      The bits that a worker encoded in the last step, in both stages if there are two. It is the mean over the workers,
      the same number in every process.

    Raises:
      ValueError: there is no such codec.
    """
    is_length = lambda x: isinstance(x, CodeLength)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_length) if is_length(x)]
    if not found:
        raise ValueError(f"opt_state holds no code of variable length: got {type(opt_state).__name__}")
    pairs = [np.asarray(_of_all(length.last), np.float64).reshape(-1, 2) for length in found]
    return float(sum((high * 2.0**32 + low).mean() for high, low in (pair.T for pair in pairs)))


def _of_all(x: Any) -> Any:
    """An array that several processes may share, in a form that each process can read."""
    shared = isinstance(x, jax.Array) and not x.is_fully_addressable
    return multihost_utils.process_allgather(x, tiled=True) if shared else jax.device_get(x)


def wire_bits(opt_state: Any, link: str = "between") -> WireBits:
    """The bits that one worker sent, by the ring laws of `gradcomp_jax.exchange.collectives`.

    Skipped steps count: their gradients were not finite, but they travelled. The loss, auxiliary outputs and batch
    statistics of `train_step` count too, because they ride in the codec's messages. With several codecs they travel
    apart, and do not count. `average` does not count: it stands for links with cheap bytes. The ring law can give a
    fraction of a bit, such as among three workers; it is rounded up. Inside a TPU's slice the compiler may turn
    reduce-scatters into all-reduces, which send twice as much. `gradcomp_jax.certify` tells where.

    Args:
      opt_state: an optimiser state that holds the state of one or more codecs. The bits of several add up. May be the
        local form, the global one, or one replicated for pmap.
      link: with `across`, which bits to count: those that one chip sent "between" the slices or nodes, or "inside" its
        own. Other codecs send all bits between, and none inside.

    Returns:
      `(last, total)`, Python ints.

    Raises:
      ValueError: `opt_state` holds no codec's state, or there is no such link.
    """
    if link not in Links._fields:
        raise ValueError(f"link={link!r} must be 'between' or 'inside'")
    last = total = 0
    is_count = lambda x: isinstance(x, WireCount | Links)  # noqa: E731
    counts = [x for x in jax.tree.leaves(opt_state, is_leaf=is_count) if is_count(x)]
    if not counts:
        raise ValueError(f"opt_state holds no codec's state, so no bits were counted: got {type(opt_state).__name__}")
    if link == "inside":
        counts = [x for x in counts if isinstance(x, Links)]
    for count in (getattr(x, link) if isinstance(x, Links) else x for x in counts):
        last += _join(count.last)
        total += _join(count.total)
    return WireBits(last, total)


def _join(pair: jax.Array) -> int:
    # pmap keeps one copy a device; all are the same.
    high, low = np.asarray(jax.device_get(pair)).reshape(-1, 2)[0]
    return int(high) << 32 | int(low)
