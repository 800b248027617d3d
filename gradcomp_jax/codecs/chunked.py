"""Top K of each chunk, in two bits a value: SparseLoCo's codec.

Sarfi, Thérien, Lidin, Belilovsky, "Communication Efficient LLM Pre-training with SparseLoCo", 2025, arXiv 2508.15706.
All tensors lie in one stream, which is cut into chunks of c values. Of each chunk the k largest magnitudes are kept:

    own_w = two_bits(D_w) on S_w, 0 elsewhere     mean <- mean of own_w

where S_w holds the k places of each chunk. A tensor is seen as a matrix [all axes but the last, last]. The stream
begins with the whole blocks of sqrt(c) x sqrt(c) of all matrices, one chunk each. What is left over of all tensors
follows, flat. If c is not a square there are no blocks. Only the last chunk is filled up, with zeros.

Two bits are a sign, and one of two levels of the chunk. The kept magnitudes form a lower and an upper group, and the
levels are the groups' means (`wire.values`). The upper level travels in the 16 bits of a bfloat16, which has the range
of float32, and the lower level as a share of it, in 8 bits. The authors' own rule for the values is `Sigmas` there.

The places of a chunk travel in rising order, by Elias-Fano's code. A value of zero is not sent. If k = c, all values
are sent, zeros too, and no places.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.coder import Coder, Coding, Message, Part
from gradcomp_jax.contract import Sparse, require_indexable, require_whole
from gradcomp_jax.views import joined, split
from gradcomp_jax.wire.places import pack_places, places_bytes, unpack_places
from gradcomp_jax.wire.values import LEVELS, Values, Whole

# An index that is beyond the end of every stream, in whichever shard.
NOWHERE = 2**31 - 1


class Blocks(NamedTuple):
    """A tensor as a matrix, and the part of it that is whole blocks.

    Attributes:
      rows, columns: the matrix.
      high, wide: the part of whole blocks, from the first row and column on; both are 0 if there is no whole block.
      side: the side of a block.
    """

    rows: int
    columns: int
    high: int
    wide: int
    side: int

    @classmethod
    def of(cls, shape: tuple[int, ...], chunk: int) -> "Blocks":
        """The blocks of a tensor; none unless `chunk` is a square."""
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        side = math.isqrt(chunk)
        if side * side != chunk or min(rows, columns) < side:
            return cls(rows, columns, 0, 0, side)
        return cls(rows, columns, rows - rows % side, columns - columns % side, side)

    @property
    def inside(self) -> int:
        """The number of elements in whole blocks."""
        return self.high * self.wide

    @property
    def outside(self) -> int:
        """The number of elements that are left over."""
        return self.rows * self.columns - self.inside

    def apart(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The elements in blocks, block by block, and those left over: right of the blocks, and then below; flat."""
        if not self.inside:
            return jnp.zeros(0, x.dtype), x.reshape(-1)
        x = x.reshape(self.rows, self.columns)
        tiles = x[: self.high, : self.wide].reshape(self.high // self.side, self.side, -1, self.side)
        rest = jnp.concatenate([x[: self.high, self.wide :].reshape(-1), x[self.high :].reshape(-1)])
        return tiles.swapaxes(1, 2).reshape(-1), rest

    def together(self, tiles: jax.Array, rest: jax.Array) -> jax.Array:
        """The inverse of `apart`, [rows, columns]."""
        if not self.inside:
            return rest.reshape(self.rows, self.columns)
        shape = self.high // self.side, self.wide // self.side, self.side, self.side
        beside = self.high * (self.columns - self.wide)
        left = tiles.reshape(shape).swapaxes(1, 2).reshape(self.high, self.wide)
        upper = jnp.concatenate([left, rest[:beside].reshape(self.high, -1)], axis=1) if beside else left
        return jnp.concatenate([upper, rest[beside:].reshape(-1, self.columns)]) if self.high < self.rows else upper


@dataclasses.dataclass(frozen=True)
class Chunks(Coder):
    """Places and values of the largest magnitudes of each chunk of a stream of all tensors.

    Attributes:
      chunk: c, the number of values in a chunk.
      k: how many of them are kept.
      values: how these travel.
    """

    chunk: int
    k: int
    values: Values

    name: ClassVar[str] = "topk"
    joins: ClassVar[bool] = True

    @property
    def scales(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.values.scales

    @property
    def unit(self) -> int:
        return self.chunk

    @property
    def chunk_bytes(self) -> int:
        """The bytes of a chunk."""
        return self.size((2 * self.chunk,)) - self.size((self.chunk,))

    def lay_all(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        blocks = [Blocks.of(x.shape, self.chunk) for x in xs]
        total = sum(block.inside + block.outside for block in blocks)
        if total >= NOWHERE - self.chunk:
            raise ValueError(
                f"codec 'topk': a stream of {total} elements has more than an int32 can number: exchange it in parts, "
                "with buckets="
            )
        tiles, rest = zip(*(b.apart(x.astype(jnp.float32)) for b, x in zip(blocks, xs, strict=True)), strict=True)
        # What is left over is little, of many leaves.
        return [joined([*tiles, jnp.concatenate(rest)], -(-total // self.chunk) * self.chunk)]

    def unlay_all(self, ys: Sequence[jax.Array], likes: Sequence[Any]) -> list[jax.Array]:
        blocks = [Blocks.of(like.shape, self.chunk) for like in likes]
        pieces = split(ys[0], [block.inside for block in blocks] + [block.outside for block in blocks])
        xs = [block.together(*pieces[i :: len(blocks)]) for i, block in enumerate(blocks)]
        return [x.reshape(like.shape).astype(like.dtype) for x, like in zip(xs, likes, strict=True)]

    def encode(self, y: jax.Array, part: Part) -> Message:
        chunks = y.reshape(-1, self.chunk)
        if self.k == self.chunk:
            return self.values.encode(chunks, jnp.full(chunks.shape, True))
        found, chosen = lax.top_k(jnp.where(jnp.isnan(chunks), jnp.inf, jnp.abs(chunks)), self.k)
        places = jnp.sort(jnp.where(found > 0, chosen, self.chunk), axis=-1)
        kept = jnp.take_along_axis(chunks, places, axis=-1, mode="fill", fill_value=0)
        return {"places": pack_places(places, self.chunk), **self.values.encode(kept, places < self.chunk)}

    def sparse(self, message: Message, shape: tuple[int, ...]) -> Sparse | None:
        if self.k == self.chunk:
            return None
        places = unpack_places(message["places"], self.k, self.chunk)
        first = lax.broadcasted_iota(jnp.int32, places.shape, 0) * self.chunk
        indices = jnp.where(places < self.chunk, first + places, NOWHERE)
        return Sparse(indices.reshape(-1), self.values.restore(message, self.k).reshape(-1), shape)

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        kept = self.sparse(message, shape)
        return self.values.restore(message, self.k).reshape(shape) if kept is None else kept.dense()

    def add(self, to: jax.Array, message: Message, part: Part, share: float) -> jax.Array:
        kept = self.sparse(message, to.shape)
        return super().add(to, message, part, share) if kept is None else kept.added_to(to, share)

    def bounds(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return self.values.bounds(message)

    def size(self, shape: tuple[int, ...]) -> int:
        rows = -(-shape[0] // self.chunk)
        places = places_bytes(self.k, self.chunk) if self.k < self.chunk else 0
        return rows * places + self.values.size(rows, self.k)


@dataclasses.dataclass(frozen=True)
class ChunkedTopK(Coding):
    """The codec; see `topk`.

    Attributes:
      chunks: the coder.
    """

    chunks: Chunks

    name: ClassVar[str] = "topk"

    @property
    def coder(self) -> Coder:
        return self.chunks

    def default(self, path: str, leaf: Any) -> bool:
        return True

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        require_indexable(self.name, path, leaf)
        # A leaf's part of the stream: it does not fill chunks of its own.
        length = leaf.size if self.transform is None else self.transform.length(leaf.size)
        return length * self.chunks.chunk_bytes < uncompressed * self.chunks.chunk

    def view(self, path: str, leaf: Any) -> str:
        return f"the largest {self.chunks.k} of each {self.chunks.chunk} numbers"


def chunked(chunk: Any, k: Any, bits: Any, levels: Any) -> ChunkedTopK:
    """The codec of these settings of `topk`; see there.

    Raises:
      ValueError: a setting is out of range, or one is missing.
    """
    if chunk is None or k is None:
        given, missing = ("k", "chunk") if chunk is None else ("chunk", "k")
        raise ValueError(f"codec 'topk': {given}= goes with {missing}=, as in topk(chunk=4096, k=64)")
    require_whole("chunk", chunk, 1)
    require_whole("k", k, 1)
    if k > chunk:
        raise ValueError(f"k={k} must be at most chunk={chunk}: so many values of each chunk are kept")
    if bits not in (2, None) or isinstance(bits, float):
        raise ValueError(f"bits={bits} of codec 'topk' must be 2, or None for whole float32 values")
    if levels not in LEVELS:
        raise ValueError(f"levels={levels!r} must be one of {', '.join(map(repr, LEVELS))}")
    if bits is None and levels != "chunk":
        raise ValueError(f"levels={levels!r} is for values of 2 bits: leave it out, or give bits=2")
    return ChunkedTopK(Chunks(chunk, k, Whole() if bits is None else LEVELS[levels]))
