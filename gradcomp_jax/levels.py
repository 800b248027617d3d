"""Leaves that differ in how strongly they are compressed, and still share one collective.

Shapes are static, so what a leaf sends at one of several levels, of which the step decides, fills one buffer from its
front; the smallest of some fixed sizes that holds all of it is sent.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradcomp_jax import collectives
from gradcomp_jax.aggregation import Coder, CoderOf, pack_message, row, unpacker
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import Tensors
from gradcomp_jax.metrics import sum_bits
from gradcomp_jax.views import pack_front, unpack_front


def mean_of_fronts(
    pieces: dict[str, jax.Array],
    lengths: dict[str, list[int]],
    level: dict[str, jax.Array],
    axis_name: AxisName,
    *,
    beside: jax.Array | None = None,
    ring: bool = False,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """All-reduces the front of each of some vectors to their mean, in one collective.

    Args:
      pieces: vectors.
      lengths: of each, how much is to be sent at each level; at least 1.
      level: int32 for each, the same on all workers.
      axis_name: the axis of the workers.
      beside: a further vector, to be sent whole, before all others.
      ring: as in `collectives.mean`.

    Returns:
      Vectors of the same sizes, of no meaning beyond what was to be sent; the mean of `beside`; and the bits this
      worker sent, as a pair.
    """
    wide = np.result_type(*(x.dtype for x in pieces.values()))
    extra = jnp.zeros(0, wide) if beside is None else beside.astype(wide)
    used = [jnp.array(lengths[path], jnp.int32)[level[path]] for path in pieces]
    least, most = (extra.size + sum(end(each) for each in lengths.values()) for end in (min, max))
    average = functools.partial(collectives.mean, axis_name=axis_name, ring=ring)
    buffer = jnp.concatenate([extra, pack_front([x.astype(wide) for x in pieces.values()], used)])
    length = functools.reduce(jnp.add, used) + extra.size
    received, bits = collectives.front(average, buffer, length, least, most)
    means = unpack_front(received[extra.size :], used, [x.size for x in pieces.values()])
    by_path = {path: x.astype(pieces[path].dtype) for path, x in zip(pieces, means, strict=True)}
    return by_path, received[: extra.size], bits


def at_levels(coders_of: Sequence[CoderOf], level: dict[str, jax.Array]) -> CoderOf:
    """A coder in which each leaf is encoded by one of several, which must cut it alike.

    What the leaves send fills one buffer from its front, and little more than that is sent.

    Args:
      coders_of: makes the coders, by level.
      level: int32 for each path, the same on all workers.
    """

    def coder_of(tensors: Tensors, shards: int) -> Coder:
        leaves = {path: [make({path: x}, shards) for make in coders_of] for path, x in tensors.items()}

        def like(path: str, coder: Coder) -> Any:
            shard = jax.eval_shape(lambda x: row(coder.cut({path: x}), 0), tensors[path])
            return jax.eval_shape(coder.encode, shard, jnp.int32(0), jax.random.key(0))

        messages = {path: [like(path, coder) for coder in coders] for path, coders in leaves.items()}
        sizes = {
            path: [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(m)) for m in each]
            for path, each in messages.items()
        }
        if (largest := sum(max(each) for each in sizes.values())) >= 2**31:
            path = max(sizes, key=lambda path: max(sizes[path]))
            raise ValueError(
                f"leaves at two levels share one buffer, here of up to {largest} bytes, which an int32 cannot count: "
                f"leave the largest, {path!r}, out by compress=, or send less of it at the low level"
            )
        lengths = {path: jnp.array(each, jnp.int32)[level[path]] for path, each in sizes.items()}

        def cut(tensors: Tensors) -> Any:
            return {path: leaves[path][0].cut({path: x}) for path, x in tensors.items()}

        def join(shards: Any) -> Tensors:
            return {k: v for path, x in shards.items() for k, v in leaves[path][0].join(x).items()}

        def encode(shard: Any, index: jax.Array, key: jax.Array) -> jax.Array:
            def piece(place: int, path: str) -> jax.Array:
                def encoded(coder: Coder) -> jax.Array:
                    payload = pack_message(coder.encode(shard[path], index, jax.random.fold_in(key, place)))
                    return jnp.pad(payload, (0, max(sizes[path]) - payload.size))

                return lax.switch(level[path], [functools.partial(encoded, coder) for coder in leaves[path]])

            pieces = [piece(place, path) for place, path in enumerate(leaves)]
            return pack_front(pieces, list(lengths.values()))

        def read(buffer: jax.Array, what: Callable[[Coder, Any], Any]) -> dict[str, Any]:
            """`what` each leaf's coder makes of its message."""
            pieces = unpack_front(buffer, list(lengths.values()), [max(each) for each in sizes.values()])

            def leaf(path: str, piece: jax.Array) -> Any:
                def of_message(coder: Coder, message: Any, size: int) -> Any:
                    return what(coder, unpacker(message)(piece[:size]))

                choices = zip(leaves[path], messages[path], sizes[path], strict=True)
                return lax.switch(level[path], [functools.partial(of_message, *choice) for choice in choices])

            return {path: leaf(path, piece) for path, piece in zip(leaves, pieces, strict=True)}

        def decode(buffer: jax.Array) -> Any:
            return read(buffer, lambda coder, message: coder.decode(message))

        def length(buffer: jax.Array) -> jax.Array:
            return functools.reduce(sum_bits, read(buffer, _length).values())

        used = functools.reduce(jnp.add, lengths.values())
        least, most = (sum(end(each) for each in sizes.values()) for end in (min, max))
        told = all(coder.length is not None for each in leaves.values() for coder in each)
        return Coder(cut, join, encode, decode, length=length if told else None, used=(used, least, most))

    return coder_of


def _length(coder: Coder, message: Any) -> jax.Array:
    assert coder.length is not None
    return coder.length(message)
