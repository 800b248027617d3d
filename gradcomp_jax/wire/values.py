"""Kept values in two bits each, or whole: for codecs that keep a part of a tensor, or quantise all of it.

Two rules make two bits of a value. `Levels` gives each row a sign and two magnitudes. `Sigmas` gives all rows one table
of four values, for bins of 1.5 standard deviations around the mean. It is the rule of SparseLoCo's code and MuLoCo's.
"""

import abc
import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.coder import Message
from gradcomp_jax.views import column_sums, inverse_power, max_norm
from gradcomp_jax.wire.packing import fields_bytes, pack_fields, unpack_fields

# Rounds of Lloyd's algorithm for two groups: more change the error by less than a tenth.
ROUNDS = 3
# The width of the authors' bins, in standard deviations, and their number.
WIDTH, BINS = 1.5, 4


def two_means(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits each row of magnitudes into two groups, around whose means they vary little.

    Args:
      x: magnitudes below 4, float32 [rows, k].
      counted: which of them count, bool [rows, k].

    Returns:
      Which are in the upper group, [rows, k], and the means of the upper and the lower group, [rows, 1]; 0 for a group
      without members.
    """

    def mean(of: jax.Array, y: jax.Array) -> jax.Array:
        count = jnp.sum(of, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.sum(jnp.where(of, y, 0), axis=-1, keepdims=True) / jnp.maximum(count, 1).astype(jnp.float32)

    middle = mean(counted, x)
    spread = jnp.sqrt(mean(counted, jnp.square(x - middle)))
    # Rounded up it could be above all.
    threshold = jnp.minimum(middle + spread, jnp.max(x, axis=-1, keepdims=True))
    for _ in range(ROUNDS):
        upper = x >= threshold
        threshold = (mean(counted & upper, x) + mean(counted & ~upper, x)) / 2
    upper = x >= threshold
    return upper, mean(counted & upper, x), mean(counted & ~upper, x)


class Values(abc.ABC):
    """How kept values travel; frozen dataclasses without state."""

    scales: ClassVar[tuple[str, ...]]
    """The names of the arrays that bound the values, like `Coder.scales`."""

    @abc.abstractmethod
    def encode(self, kept: jax.Array, sent: jax.Array) -> Message:
        """The message of values, float32 [rows, k]; only those count that are `sent`, bool [rows, k]."""

    @abc.abstractmethod
    def restore(self, message: Message, k: int) -> jax.Array:
        """The values that a message stands for, float32 [rows, k]."""

    @abc.abstractmethod
    def size(self, rows: int, k: int) -> int:
        """The bytes of a message."""

    def bounds(self, message: Message) -> jax.Array:
        """Numbers that bound the values in magnitude."""
        return message[self.scales[0]].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Whole(Values):
    """Whole float32 values."""

    scales: ClassVar[tuple[str, ...]] = ("values",)

    def encode(self, kept: jax.Array, sent: jax.Array) -> Message:
        return {"values": kept}

    def restore(self, message: Message, k: int) -> jax.Array:
        return message["values"]

    def size(self, rows: int, k: int) -> int:
        return 4 * rows * k


@dataclasses.dataclass(frozen=True)
class Levels(Values):
    """A sign and one of two levels of the row; the levels take three bytes."""

    scales: ClassVar[tuple[str, ...]] = ("upper",)

    def encode(self, kept: jax.Array, sent: jax.Array) -> Message:
        down = inverse_power(max_norm(kept))
        above, upper, lower = two_means(jnp.abs(kept) * down, sent)
        lost = jnp.sum(0 * kept, axis=-1, keepdims=True)  # NaN, where anything is not finite
        # To the bits of a bfloat16: a conversion there and back could be dropped by a compiler.
        rounded = lax.reduce_precision(upper / down + lost, exponent_bits=8, mantissa_bits=7)
        bits = (lax.bitcast_convert_type(rounded, jnp.uint32) >> 16).astype(jnp.uint16)
        base = rounded * down
        share = jnp.round(255 * (lower / jnp.where(base > 0, base, 1)))
        codes = (kept < 0).astype(jnp.uint8) | above.astype(jnp.uint8) << 1
        shares = jnp.clip(share, 0, 255).astype(jnp.uint8)
        return {"codes": jnp.concatenate([pack_fields(codes, 2), shares], axis=-1), "upper": bits}

    def restore(self, message: Message, k: int) -> jax.Array:
        codes, share = message["codes"][..., :-1], message["codes"][..., -1:]
        upper = self.upper(message)
        lower = upper * (share.astype(jnp.float32) / 255)
        codes = unpack_fields(codes, k, 2)
        magnitude = jnp.where(codes >= 2, upper, lower)
        return jnp.where(codes & 1 == 1, -magnitude, magnitude)

    def upper(self, message: Message) -> jax.Array:
        """The upper level of each row, float32 [rows, 1]."""
        return lax.bitcast_convert_type(message["upper"].astype(jnp.uint32) << 16, jnp.float32)

    def bounds(self, message: Message) -> jax.Array:
        return self.upper(message).reshape(-1)

    def size(self, rows: int, k: int) -> int:
        return rows * (fields_bytes(k, 2) + 3)


def binned(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bin of each value, 1.5 standard deviations wide, and the mean of the values in each bin.

    Args:
      x: values, float32 [...].
      counted: which of them count, bool [...].

    Returns:
      uint8 [...], from 0 to 3; float32 [4], 0 for a bin without values, NaN if anything is not finite.
    """
    down = inverse_power(max_norm(x.reshape(1, -1)))[0, 0]
    unit = x * down
    count, total = _totals(counted, jnp.where(counted, unit, 0))
    middle = total / jnp.maximum(count, 1)
    (variation,) = _totals(jnp.where(counted, jnp.square(unit - middle), 0))
    spread = variation / jnp.maximum(count - 1, 1)
    width = jnp.where(spread > 0, WIDTH * jnp.sqrt(spread), 1)
    edges = [middle + (edge - BINS / 2 + 0.5) * width for edge in range(BINS - 1)]
    sums = []
    for low, high in itertools.pairwise([jnp.float32(-jnp.inf), *edges, jnp.float32(jnp.inf)]):
        here = counted & (unit >= low) & (unit < high)
        sums += [here, jnp.where(here, unit, 0)]
    sums = _totals(*sums)
    table = [total / jnp.maximum(count, 1) for count, total in zip(sums[::2], sums[1::2], strict=True)]
    bins = functools.reduce(jnp.add, [(unit >= edge).astype(jnp.uint8) for edge in edges])
    return bins, jnp.stack(table) / down + jnp.sum(0 * x)


def _totals(*parts: jax.Array) -> list[jax.Array]:
    """The sums of all elements of arrays of one shape, in float32 and in one pass."""
    columns = math.gcd(parts[0].size, 1024)
    sums = column_sums(tuple(part.astype(jnp.float32).reshape(-1, columns) for part in parts))
    return [jnp.sum(x) for x in sums]


def of_bins(bins: jax.Array, table: jax.Array) -> jax.Array:
    """The value of each bin, from the results of `binned`."""
    return table.at[bins.astype(jnp.int32)].get(mode="promise_in_bounds", wrap_negative_indices=False)


@dataclasses.dataclass(frozen=True)
class Sigmas(Values):
    """The authors' rule: bins of 1.5 standard deviations around the mean, and a table of the bins' means.

    Mean, deviation and table are those of all rows of a message. The authors have a table for each tensor.
    """

    scales: ClassVar[tuple[str, ...]] = ("table",)

    def encode(self, kept: jax.Array, sent: jax.Array) -> Message:
        bins, table = binned(kept, sent)
        return {"codes": pack_fields(bins, 2), "table": table}

    def restore(self, message: Message, k: int) -> jax.Array:
        return of_bins(unpack_fields(message["codes"], k, 2), message["table"])

    def size(self, rows: int, k: int) -> int:
        return rows * fields_bytes(k, 2) + 4 * BINS


LEVELS: dict[str, Values] = {"chunk": Levels(), "sigma": Sigmas()}
