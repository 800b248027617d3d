"""How a leaf is cut into shards, one for each chip of a slice or device of a node."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Of a leaf's rows, what may be added for them to divide; else it is cut as a vector, where it can be.
PADDING = 1 / 8


class Cut(NamedTuple):
    """How a leaf is cut, among any number of shards; what does not divide is filled up with zeros.

    Attributes:
      view: a shape of as many elements, in which it is cut.
      axis: the axis that is cut.
      unit: how many places along it stay together.
      flattens: cut it as a vector instead, where its places along the axis would be filled up by more than `PADDING`.
    """

    view: tuple[int, ...]
    axis: int = 0
    unit: int = 1
    flattens: bool = False

    def among(self, shards: int) -> "Cut":
        """The cut among so many shards: this one, or that of the vector."""
        length = self.view[self.axis]
        wide = self.flattens and self.each(shards) * shards > (1 + PADDING) * length
        return Cut((math.prod(self.view),)) if wide else self

    def each(self, shards: int) -> int:
        """Places along the axis in a shard."""
        units = -(-self.view[self.axis] // self.unit)
        return max(1, -(-units // shards)) * self.unit

    def shape(self, shards: int) -> tuple[int, ...]:
        """The shape of a shard."""
        cut = self.among(shards)
        return (*cut.view[: cut.axis], cut.each(shards), *cut.view[cut.axis + 1 :])

    def lay(self, x: jax.Array, shards: int) -> jax.Array:
        """A leaf in shards that lie side by side along the axis."""
        cut = self.among(shards)
        missing = cut.each(shards) * shards - cut.view[cut.axis]
        padding = [(0, missing if axis == cut.axis else 0) for axis in range(len(cut.view))]
        x = x.reshape(cut.view)
        return jnp.pad(x, padding) if missing else x

    def unlay(self, y: jax.Array, shards: int) -> jax.Array:
        """The inverse of `lay`, in the shape of the view that was cut."""
        cut = self.among(shards)
        return jax.lax.slice_in_dim(y, 0, cut.view[cut.axis], axis=cut.axis)

    def split(self, x: jax.Array, shards: int) -> jax.Array:
        """A leaf as its shards, [shards, ...]."""
        cut, y = self.among(shards), self.lay(x, shards)
        y = y.reshape(*y.shape[: cut.axis], shards, -1, *y.shape[cut.axis + 1 :])
        return jnp.moveaxis(y, cut.axis, 0)

    def join(self, parts: jax.Array) -> jax.Array:
        """The inverse of `split`, in the shape of the view that was cut."""
        shards, cut = len(parts), self.among(len(parts))
        y = jnp.moveaxis(parts, 0, cut.axis)
        return self.unlay(y.reshape(*y.shape[: cut.axis], -1, *y.shape[cut.axis + 2 :]), shards)


class Shard(NamedTuple):
    """What is to be known of a shard beforehand; to those who ask for shapes a leaf like others.

    Attributes:
      shape: its shape.
      dtype: its type.
      whole: the leaf of which it is one.
      shards: how many there are.
    """

    shape: tuple[int, ...]
    dtype: Any
    whole: Any
    shards: int

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


def whole(leaf: Any) -> Any:
    """The leaf of which this is a shard; another is whole itself."""
    return leaf.whole if isinstance(leaf, Shard) else leaf


def shards_of(leaf: Any) -> int:
    """In how many shards a leaf lies of which this is one; 1 of a whole leaf."""
    return leaf.shards if isinstance(leaf, Shard) else 1


def rows(leaf: Any) -> Cut:
    """The cut of what has no structure: by rows, which are all axes but the last, or as a vector."""
    if len(leaf.shape) < 2 or not leaf.shape[-1]:
        return Cut((math.prod(leaf.shape),))
    return Cut((math.prod(leaf.shape[:-1]), leaf.shape[-1]), flattens=True)
