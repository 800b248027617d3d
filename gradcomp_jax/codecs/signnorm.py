"""Signs with one norm a tensor, and signSGD's majority vote.

Sign+Norm is a baseline of Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727 (Table 4); that error
feedback makes signs converge is Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes", ICML 2019, arXiv 1901.09847. With D the gradient plus the residual, a tensor of n elements,

    C(D) = |D|_1 / n sign(D)     sign(0) = +1

which is a contraction: |C(D) - D|^2 = |D|^2 - |D|_1^2 / n. On the wire: the signs of all tensors as bits, and one
float32 a tensor. By "shuffle" a worker's shard of each tensor has a norm of its own.

With `majority` it is Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
ICLR 2019, arXiv 1810.05291, without momentum: the update is the sign of the sum of the workers' signs. It has no
magnitude, so error feedback does not go with it. Ours are: ties give +1, but zeros where all elements of a tensor tie;
and a worker for whom a tensor is all zeros does not vote on it. By "shuffle" both are said of a shard.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gradcomp_jax import aggregation
from gradcomp_jax.aggregation import Coder, require_aggregate
from gradcomp_jax.collectives import AxisName
from gradcomp_jax.compressor import Codec, Compressor, Exchanged, Predicate, Tensors, compressor, require_indexable
from gradcomp_jax.views import elements_in, flat_shards, from_flat_shards
from gradcomp_jax.wire.packing import pack, unpack


def signnorm(
    *,
    majority: bool = False,
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool | None = None,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
) -> Compressor:
    """Sign+Norm (Table 4 of PowerSGD), or signSGD with majority vote; not linear.

    A payload has one bit an element and 32 a tensor, in float32. By "gather" a worker of n sends n - 1 of them, by
    "shuffle" 2 (n - 1) / n. State: a residual of the size of the compressed leaves on each worker; nothing else.

    Args:
      majority: the update is -1 or +1, as most workers' signs. Learning rates must be smaller by far.
      aggregate: "gather" or "shuffle"; by default the one that sends less, "gather" for two workers.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; by default without majority, and only then.
      seed: without effect.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default, as in the paper, every leaf, vectors too.
      allow_dense: accept a tree of which no leaf is compressed.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument out of range; later, in init and update, what `compressor` refuses.

    >>> import optax
    >>> from gradcomp_jax import signnorm
    >>> tx = optax.chain(signnorm(), optax.sgd(0.1, momentum=0.9))
    """
    del seed
    require_aggregate("signnorm", aggregate, ("gather", "shuffle"))
    if majority and error_feedback:
        raise ValueError(
            "error_feedback=True does not go with majority=True: votes have no magnitude, so what is left out of them "
            "would grow without bound; leave one of them out"
        )

    def coder_of(like: Tensors, shards: int) -> Coder:
        sizes = {path: -(-x.size // shards) for path, x in like.items()}

        def encode(shard: Tensors, index: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
            del key
            norms = []
            for path, x in shard.items():
                count = elements_in(index, shards, like[path].shape)
                # Where a shard is filled up, what was decoded has signs too.
                magnitudes = jnp.where(jnp.arange(x.size, dtype=jnp.int32) < count, jnp.abs(x), 0)
                norms.append(jnp.sum(magnitudes) / jnp.maximum(count, 1).astype(jnp.float32))
            norm = jnp.stack(norms)
            if majority:
                norm = jnp.where(norm == 0, 0, norm / norm)  # what is not finite becomes NaN
            signs = jnp.concatenate([(x >= 0).astype(jnp.uint8) for x in shard.values()])
            return {"norm": norm, "signs": pack(jnp.pad(signs, (0, -signs.size % 8)), 1)}

        def decode(message: dict[str, jax.Array]) -> Tensors:
            signs = unpack(message["signs"], 1).astype(jnp.float32) * 2 - 1
            shard, start = {}, 0
            for place, (path, size) in enumerate(sizes.items()):
                shard[path] = signs[start : start + size] * message["norm"][place]
                start += size
            return shard

        cut, join = functools.partial(flat_shards, shards=shards), functools.partial(from_flat_shards, like=like)
        return Coder(cut, join, encode, decode, vote=majority)

    def shrinks(path: str, leaf: Any) -> bool:
        require_indexable("signnorm", path, leaf)
        return 4 - (-leaf.size // 8) < 4 * leaf.size

    def exchange(tensors: Tensors, state: Any, axis_name: AxisName, **extra_args: Any) -> Exchanged:
        del extra_args
        got = aggregation.exchange(tensors, coder_of, aggregate, axis_name)
        return Exchanged(got.mean, got.own, state, got.bits)

    return compressor(
        Codec("signnorm", lambda tensors: (), exchange, lambda path, leaf: True, shrinks),
        axis_name=axis_name,
        error_feedback=not majority if error_feedback is None else error_feedback,
        min_size=min_size,
        compress=compress,
        allow_dense=allow_dense,
    )
