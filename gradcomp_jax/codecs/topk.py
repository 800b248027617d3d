"""Top K: the coordinates of largest magnitude.

A baseline of Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727 (Table 4); error feedback for it is
Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599. For each tensor of n elements
S_w, the k indices of largest |D_w| on worker w:

    own_w = D_w on S_w, 0 elsewhere     mean <- mean of own_w

which leaves at most (1 - k / n) of |D_w|^2 out. The workers' indices differ, so values and indices are gathered: k
float32, and k indices of ceil(log2 n) bits. By "shuffle" a worker averages its shard of each tensor and sends the
same fraction of that on. The paper counts 32 bits an index, so its budget c of floats is a fraction k / n = c / 2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gradcomp_jax import aggregation
from gradcomp_jax.aggregation import Coder, require_aggregate
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import (
    Codec,
    Compressor,
    Exchanged,
    Levels,
    Predicate,
    Tensors,
    compressor,
    require_fraction,
    require_indexable,
)
from gradcomp_jax.levels import at_levels
from gradcomp_jax.select import largest
from gradcomp_jax.views import flat_shards, from_flat_shards, share
from gradcomp_jax.wire.packing import fields_bytes, pack_fields, unpack_fields


def topk(
    fraction: float = 0.01,
    *,
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
) -> Compressor:
    """Top K (Table 4 of PowerSGD), not linear.

    A payload has 32 + ceil(log2 n) bits for each of k = fraction n elements of a leaf. By "gather" a worker of N sends
    N - 1 of them, by "shuffle" 2 (N - 1) / N. State: a residual of the size of the compressed leaves on each worker.

    Args:
      fraction: k / n for each leaf, and for each shard of it by "shuffle"; k is rounded down, but at least 1. Table 4's
        budgets of 1/136 and 1/32 are 1/272 and 1/64.
      aggregate: "gather" or "shuffle"; by default the one that sends less, "gather" for two workers.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them what is not sent is lost.
      seed: without effect; of equal magnitudes the one at the lower index is sent.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default, as in the paper, every leaf, vectors too.
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument out of range; later, in init and update, what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import topk
    >>> tx = optax.chain(topk(fraction=0.01), optax.sgd(0.1))
    """
    del seed
    require_fraction(fraction)
    require_aggregate("topk", aggregate, ("gather", "shuffle"))

    def sizes(leaf: Any, fraction: float, shards: int) -> tuple[int, int, int]:
        """n, k, and the bits of an index, in a shard of a leaf."""
        n = max(1, -(-leaf.size // shards))
        return n, share(n, fraction), (n - 1).bit_length()

    def coder_of(fraction: float, like: Tensors, shards: int) -> Coder:
        def encode(shard: Tensors, index: jax.Array, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
            del index, key
            message = {}
            for path, x in shard.items():
                _, k, width = sizes(like[path], fraction, shards)
                chosen = largest(x, k)
                message[path] = {"indices": pack_fields(chosen.astype(jnp.uint32), width), "values": x[chosen]}
            return message

        def decode(message: dict[str, dict[str, jax.Array]]) -> Tensors:
            shard = {}
            for path, part in message.items():
                n, k, width = sizes(like[path], fraction, shards)
                chosen = unpack_fields(part["indices"], k, width).astype(jnp.int32)
                zeros = jnp.zeros(n, jnp.float32)
                shard[path] = zeros.at[chosen].set(part["values"], mode="drop", unique_indices=True)
            return shard

        cut, join = functools.partial(flat_shards, shards=shards), functools.partial(from_flat_shards, like=like)
        return Coder(cut, join, encode, decode)

    def shrinks(path: str, leaf: Any) -> bool:
        require_indexable("topk", path, leaf)
        _, k, width = sizes(leaf, fraction, 1)
        return 4 * k + fields_bytes(k, width) < 4 * leaf.size

    def build(fractions: tuple[float, ...]) -> Codec:
        """The codec of some fractions, among which `level` chooses for each leaf where there are several."""
        coders = [lambda like, shards, f=f: coder_of(f, like, shards) for f in fractions]

        def exchange(
            tensors: Tensors,
            state: Any,
            axis_name: AxisName,
            *,
            level: dict[str, jax.Array] | None = None,
            **extra_args: Any,
        ) -> Exchanged:
            del extra_args
            coder = coders[0] if level is None else at_levels(coders, level)
            got = aggregation.exchange(tensors, coder, aggregate, axis_name)
            return Exchanged(got.mean, got.own, state, got.bits)

        return Codec("topk", lambda tensors: (), exchange, lambda path, leaf: True, shrinks)

    levels = Levels("fraction", fraction, True, {"aggregate": aggregate}, lambda ladder, feedback: build(ladder))
    return compressor(
        build((fraction,))._replace(levels=levels),
        axis_name=axis_name,
        error_feedback=error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
