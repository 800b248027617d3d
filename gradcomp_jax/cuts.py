"""How a leaf is cut into shards, one for each chip of a slice or device of a node."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The share of rows that may be added so that a leaf divides; beyond it the leaf is cut as a vector, if it can be.
PADDING = 1 / 8


class Cut(NamedTuple):
    """How a leaf is cut, for any number of shards; a leaf that does not divide is filled up with zeros.

    Attributes:
      view: the shape in which the leaf is cut, with as many elements.
      axis: the axis that is cut.
      unit: how many neighbouring places along the axis stay together.
      flattens: whether to cut the leaf as a vector if its axis would be filled up by more than `PADDING`.
    """

    view: tuple[int, ...]
    axis: int = 0
    unit: int = 1
    flattens: bool = False

    def among(self, shards: int) -> "Cut":
        """The cut for so many shards: this one, or the cut of the vector."""
        length = self.view[self.axis]
        wide = self.flattens and self.each(shards) * shards > (1 + PADDING) * length
        return Cut((math.prod(self.view),)) if wide else self

    def each(self, shards: int) -> int:
        """The number of places along the axis in a shard."""
        units = -(-self.view[self.axis] // self.unit)
        return max(1, -(-units // shards)) * self.unit

    def shape(self, shards: int) -> tuple[int, ...]:
        """The shape of a shard."""
        cut = self.among(shards)
        return (*cut.view[: cut.axis], cut.each(shards), *cut.view[cut.axis + 1 :])

    def lay(self, x: jax.Array, shards: int) -> jax.Array:
        """A leaf in its view, filled up, so that its shards lie side by side along the axis."""
        cut = self.among(shards)
        missing = cut.each(shards) * shards - cut.view[cut.axis]
        padding = [(0, missing if axis == cut.axis else 0) for axis in range(len(cut.view))]
        x = x.reshape(cut.view)
        return jnp.pad(x, padding) if missing else x

    def unlay(self, y: jax.Array, shards: int) -> jax.Array:
        """The inverse of `lay`, in the shape of the view."""
        cut = self.among(shards)
        return jax.lax.slice_in_dim(y, 0, cut.view[cut.axis], axis=cut.axis)

    def split(self, x: jax.Array, shards: int) -> jax.Array:
        """A leaf as its shards, [shards, ...]."""
        cut, y = self.among(shards), self.lay(x, shards)
        y = y.reshape(*y.shape[: cut.axis], shards, -1, *y.shape[cut.axis + 1 :])
        return jnp.moveaxis(y, cut.axis, 0)

    def join(self, parts: jax.Array) -> jax.Array:
        """The inverse of `split`, in the shape of the view."""
        shards, cut = len(parts), self.among(len(parts))
        y = jnp.moveaxis(parts, 0, cut.axis)
        return self.unlay(y.reshape(*y.shape[: cut.axis], -1, *y.shape[cut.axis + 2 :]), shards)


class Shard(NamedTuple):
    """The shape of a shard; code that asks for shapes can treat it like any leaf.

    Attributes:
      shape: the shard's shape.
      dtype: the shard's type.
      whole: the whole leaf.
      shards: the number of shards of the leaf.
    """

    shape: tuple[int, ...]
    dtype: Any
    whole: Any
    shards: int

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def whole(leaf: Any) -> Any:
    """The whole leaf of a shard; any other leaf is whole itself."""
    return leaf.whole if isinstance(leaf, Shard) else leaf


def shards_of(leaf: Any) -> int:
    """The number of shards of the leaf that this is a shard of; 1 for a whole leaf."""
    return leaf.shards if isinstance(leaf, Shard) else 1


def rows(leaf: Any) -> Cut:
    """The cut of a leaf without structure: along its rows, which are all axes but the last, or as a vector."""
    if len(leaf.shape) < 2 or not leaf.shape[-1]:
        return Cut((math.prod(leaf.shape),))
    return Cut((math.prod(leaf.shape[:-1]), leaf.shape[-1]), flattens=True)
