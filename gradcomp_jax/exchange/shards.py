"""Tensors in shards: how they are cut, encoded and decoded, whichever worker gets which shard."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.coder import Coder, Message, Part
from gradcomp_jax.contract import Sparse
from gradcomp_jax.exchange.bits import total_bits
from gradcomp_jax.exchange.ways import within
from gradcomp_jax.random import key_of
from gradcomp_jax.views import always, platform, split


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ys", "keys", "strength"], meta_fields=["coder", "each", "shards"]
)
@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that are cut into shards together: one tensor, or with a pooled coder all.

    Functions of a group with many operations are jitted, so that groups of one shape are traced once.

    Attributes:
      coder: the tensors' coder.
      ys: the tensors, as the coder lays them out.
      each: the number of places of the last axis in a shard.
      shards: the number of shards.
      keys: the data of each tensor's random keys, one for each shard and one more; empty if the coder draws nothing.
      strength: int32, or None.
    """

    coder: Coder
    ys: list[jax.Array]
    each: int
    shards: int
    keys: Any
    strength: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a shard."""
        return (*self.ys[0].shape[:-1], self.each)

    def part(self, index: Any, key: jax.Array | None = None) -> Part:
        """The coder's description of the shard at `index`; to encode it the coder needs a key."""
        length = self.each * self.shards if self.coder.pooled else self.ys[0].shape[-1]
        return Part(index, self.shards, length, key, self.strength)

    def key(self, place: int, index: Any) -> jax.Array | None:
        """The key of a tensor's shard; index `shards` has the key of the second encoding."""
        return key_of(self.keys[place][index]) if len(self.keys) else None

    def restore(self, message: Message, index: Any = 0) -> jax.Array:
        """The tensor that the message of one shard stands for."""
        return self.coder.restore(message, self.shape, self.part(index))

    def starts(self) -> list[int]:
        """The place where each tensor begins, and the end, if all tensors lie one after another in whole units."""
        starts, unit = [0], self.coder.unit
        for y in self.ys:
            starts.append(starts[-1] + -(-y.shape[-1] // unit) * unit)
        return starts


def grouped(
    coder: Coder, ys: Sequence[Any], shards: int, key: Any, strengths: Sequence[Any], draws: bool = True
) -> list[Group]:
    """The groups of some tensors that are to be cut into so many shards."""
    groups = []
    keys: Any = ()
    if coder.draws and draws:  # all at once: to draw one by one compiles for long
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        of_each = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(ys), dtype=jnp.int32))
        keys = fold(of_each, jnp.arange(shards + 1, dtype=jnp.int32))
        # As data, which can be split: jax's check for reused keys takes a part of a key array for the whole array.
        keys = [x[0] for x in split(jax.random.key_data(keys), [1] * len(ys), axis=0)]
    for places in [list(range(len(ys)))] if coder.pooled else [[place] for place in range(len(ys))]:
        mine, strength = [ys[i] for i in places], strengths[places[0]]
        one = coder.at(strength)
        if shards == 1 and not one.rowwise:
            each = mine[0].shape[-1]
        else:
            units = sum(-(-y.shape[-1] // one.unit) for y in mine)
            each = max(1, -(-units // shards)) * one.unit
        of_these = [keys[i] for i in places] if len(keys) else ()
        groups.append(Group(one, mine, each, shards, of_these, strength if one is coder else None))
    return groups


@functools.partial(jax.jit, inline=True)
def encode_all(group: Group) -> Message:
    """The messages of all shards, arrays [shards, ...]."""
    coder, n = group.coder, group.shards
    if coder.rowwise:  # whole tensors are encoded, and messages cut
        whole = [
            coder.encode(y, Part(0, 1, y.shape[-1], group.key(i, 0), group.strength)) for i, y in enumerate(group.ys)
        ]
        axis, count = coder.unit_axis, group.each // coder.unit
        rows = jax.tree.map(lambda *x: jnp.concatenate(x, axis) if len(x) > 1 else x[0], *whole)
        return jax.tree.map(lambda x: cut(x, n, count, axis), rows)
    if n == 1:
        return jax.tree.map(lambda x: x[None], coder.encode(group.ys[0], group.part(0, group.key(0, 0))))
    shards = cut(group.ys[0], n, group.each), jnp.arange(n, dtype=jnp.int32)
    encode = lambda shard: coder.encode(shard[0], group.part(shard[1], group.key(0, shard[1])))  # noqa: E731
    # One after another where there are branches: a shard's choice between them stays a choice.
    return lax.map(encode, shards) if coder.branches(group.shape) else jax.vmap(encode)(shards)


def encode_each(groups: list[Group]) -> list[Message]:
    """The messages of all shards of all groups, arrays [shards, ...]."""
    messages: list[Message] = []
    for group in groups:
        if messages and group.coder.branches(group.shape):
            # One after another, so that memory holds the work of one: the compiler would begin with all of them.
            done = always(jax.tree.leaves(messages[-1])[0])
            group = dataclasses.replace(group, ys=[jnp.where(done, y, 0) for y in group.ys])
        messages.append(encode_all(group))
    return messages


@functools.partial(jax.jit, inline=True)
def encode_mean(group: Group, mean: jax.Array, index: jax.Array) -> tuple[Message, jax.Array]:
    """The message of a shard's mean, for the shard at `index`, and the change that encoding makes."""
    message = group.coder.encode(mean, group.part(index, group.key(0, group.shards)))
    return message, group.restore(message, index) - mean


@functools.partial(jax.jit, static_argnames="share", inline=True)
def add(group: Group, to: jax.Array, message: Message, index: jax.Array, share: float) -> jax.Array:
    """`to` plus `share` times the tensor that the message of the shard at `index` stands for."""
    return group.coder.add(to, message, group.part(index), share)


@functools.partial(jax.jit, inline=True)
def decode_all(group: Group, messages: Message) -> list[jax.Array]:
    """The group's tensors, from the messages of all shards."""
    coder = group.coder
    if coder.rowwise:
        axis = coder.unit_axis
        starts, ys = group.starts(), []
        sizes = [end - start for start, end in itertools.pairwise(starts)]
        arrays, treedef = jax.tree.flatten(jax.tree.map(lambda x: uncut(x, axis), messages))
        pieces = [split(x, [size // coder.unit for size in sizes], axis) for x in arrays]
        for y, size, *mine in zip(group.ys, sizes, *pieces, strict=True):
            whole = coder.restore(jax.tree.unflatten(treedef, mine), (*y.shape[:-1], size), group.part(0))
            ys.append(whole[..., : y.shape[-1]])
        return ys
    if (sparse := sparse_of(group, messages)) is not None:
        return [sparse.dense()]
    if group.shards == 1:
        return [group.restore(row(messages, 0))]
    # TPUs lay few columns in tiles of 128: where the work of a shard is large, memory holds that of one at a time.
    in_turn = platform() == "tpu" and coder.branches(group.shape)
    shards = lax.map(group.restore, messages) if in_turn else jax.vmap(group.restore)(messages)
    return [uncut(shards)[..., : group.ys[0].shape[-1]]]


@functools.partial(jax.jit, inline=True)
def owns(group: Group, messages: Message) -> list[Any]:
    """The group's tensors as decoded from the messages [shards, ...] of all their shards; perhaps `Sparse`."""
    coder = group.coder
    if coder.rowwise and not coder.pooled:
        whole = jax.tree.map(lambda x: uncut(x, coder.unit_axis), messages)
        count = -(-group.ys[0].shape[-1] // coder.unit)
        whole = jax.tree.map(lambda x: lax.slice_in_dim(x, 0, count, axis=coder.unit_axis), whole)
        return [coder.restore(whole, group.ys[0].shape, group.part(0))]
    sparse = sparse_of(group, messages)
    return decode_all(group, messages) if sparse is None else [sparse]


def sparse_of(group: Group, messages: Message) -> Sparse | None:
    """The group's tensor as `Sparse`, if the coder keeps few elements of each shard; else None."""
    parts = jax.vmap(lambda message: group.coder.sparse(message, (group.each,)))(messages)
    if parts is None:
        return None
    indices = parts.indices + group.each * jnp.arange(group.shards, dtype=jnp.int32)[:, None]
    return Sparse(indices.reshape(-1), parts.values.reshape(-1), group.ys[0].shape)


def cut(y: jax.Array, shards: int, each: int, axis: int = -1) -> jax.Array:
    """Cuts an axis into shards of `each`, filled up with zeros: [shards, ..., each, ...]."""
    axis %= y.ndim
    missing = shards * each - y.shape[axis]
    if missing:
        y = jnp.pad(y, [(0, missing if i == axis else 0) for i in range(y.ndim)])
    return jnp.moveaxis(y.reshape(*y.shape[:axis], shards, each, *y.shape[axis + 1 :]), axis, 0)


def uncut(shards: jax.Array, axis: int = -1) -> jax.Array:
    """The inverse of `cut`; the zeros that filled up the axis stay."""
    axis %= shards.ndim - 1
    y = jnp.moveaxis(shards, 0, axis)
    return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def add_each(
    groups: Sequence[Group], totals: Sequence[list[jax.Array]], messages: Sequence[Message], n: int
) -> list[list[jax.Array]]:
    """Each group's `totals` plus an n-th of its tensors, which one worker's messages of whole tensors stand for."""
    sums = []
    for group, total, one in zip(groups, totals, messages, strict=True):
        if group.coder.rowwise:
            parts = decode_all(group, jax.tree.map(lambda x: x[None], one))
            sums.append([t + y / n for t, y in zip(total, parts, strict=True)])
        else:
            sums.append([add(group, total[0], one, jnp.int32(0), 1 / n)])
    return sums


def row(tree: Any, index: Any) -> Any:
    """Row `index` of each array; with None, each array as a row of its own."""
    if index is None:
        return jax.tree.map(lambda x: x[None], tree)
    cut = functools.partial(lax.dynamic_index_in_dim, index=index, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(cut, tree)


def sound(groups: list[Group], messages: list[Message], growth: float) -> jax.Array:
    """Whether everything in messages [n, ...] is finite, and stays finite if it grows by twice the factor `growth`."""
    bounds = []
    for group, message in zip(groups, messages, strict=True):
        bounds.append(jax.vmap(lambda one, g=group: g.coder.bounds(one, g.shape, g.part(0)))(message).reshape(-1))
    return within(jnp.concatenate(bounds), 2 * growth)


def lengths(groups: list[Group], messages: list[Message]) -> jax.Array | None:
    """The true length of messages [shards, ...] of all groups, as a pair; None where it is not told."""
    told = [each for each in zip(groups, messages, strict=True) if each[0].coder.tells_length]
    pairs = [jax.vmap(lambda one, g=g: g.coder.code_length(one, g.shape, g.part(0)))(message) for g, message in told]
    return total_bits(jnp.concatenate(pairs)) if pairs else None
