"""Top K: the coordinates with the largest magnitudes.

A baseline of Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, arXiv 1905.13727 (Table 4); error feedback for it is
Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599. For each tensor of n elements,
S_w holds the k indices of largest |D_w| on worker w:

    own_w = D_w on S_w, 0 elsewhere     mean <- mean of own_w

This leaves at most (1 - k / n) of |D_w|^2 out. The workers' indices differ, so values and indices are gathered: k
float32, and k indices of ceil(log2 n) bits. With "shuffle" a worker averages its shard of each tensor and sends the
same fraction of that on. The paper counts 32 bits an index, so its budget c of floats is a fraction k / n = c / 2.

With `chunk` the k largest of each chunk are sent, in two bits a value; see `chunked`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradcomp_jax.arguments import factory
from gradcomp_jax.codecs.chunked import ChunkedTopK, chunked
from gradcomp_jax.coder import Coder, Coding, Message, Part, Switched
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import AxisName, Bucketing, Predicate, Sparse, Strength, require_fraction
from gradcomp_jax.exchange.plan import Settings, require_aggregate
from gradcomp_jax.feedback import EF21, Feedback, feedback
from gradcomp_jax.select import SMALL, largest
from gradcomp_jax.views import share
from gradcomp_jax.wire.packing import Field, fields_bytes


@dataclasses.dataclass(frozen=True)
class Largest(Coder):
    """Places and values of the elements with the largest magnitudes, in a flat tensor or a shard of it.

    Attributes:
      fraction: k / n; k is rounded down, but at least 1.
    """

    fraction: float

    name: ClassVar[str] = "topk"
    scales: ClassVar[tuple[str, ...]] = ("values",)

    def count(self, n: int) -> tuple[int, int]:
        """k, and the bits of an index below n."""
        return share(n, self.fraction), max(0, n - 1).bit_length()

    def branches(self, shape: tuple[int, ...]) -> bool:
        return shape[0] > SMALL

    def encode(self, y: jax.Array, part: Part) -> Message:
        k, width = self.count(y.size)
        chosen = largest(y, k)
        places = chosen.astype(jnp.uint8 if width <= 8 else jnp.uint32)
        return {
            "indices": Field(places, width),
            "values": y.at[chosen].get(mode="promise_in_bounds", wrap_negative_indices=False),
        }

    def sparse(self, message: Message, shape: tuple[int, ...]) -> Sparse:
        return Sparse(message["indices"].values.astype(jnp.int32), message["values"], shape)

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return self.sparse(message, shape).dense()

    def add(self, to: jax.Array, message: Message, part: Part, share: float) -> jax.Array:
        return self.sparse(message, to.shape).added_to(to, share)

    def size(self, shape: tuple[int, ...]) -> int:
        k, width = self.count(shape[0])
        return 4 * k + fields_bytes(k, width)


@dataclasses.dataclass(frozen=True)
class TopK(Coding):
    """The codec; see `topk`.

    Attributes:
      fractions: the fraction, or several; then a leaf's strength chooses one.
    """

    fractions: tuple[float, ...]

    name: ClassVar[str] = "topk"

    def view(self, path: str, leaf: Any) -> str:
        return f"the largest {' or '.join(map(str, self.fractions))} of its numbers"

    @property
    def coder(self) -> Coder:
        coders = tuple(Largest(fraction) for fraction in self.fractions)
        return coders[0] if len(coders) == 1 else Switched(coders)

    @property
    def strength(self) -> Strength:
        return Strength("fraction", self.fractions[0], True, {"transform": self.transform}, self.at)

    def at(self, fractions: tuple[float, ...]) -> "TopK":
        """The codec with these fractions."""
        return dataclasses.replace(self, fractions=fractions)

    def default(self, path: str, leaf: Any) -> bool:
        return True


# The fraction where nothing is given.
FRACTION = 0.01


@factory
def topk(
    fraction: float | None = None,
    *,
    chunk: int | None = None,
    k: int | None = None,
    bits: int | None = 2,
    levels: str = "chunk",
    aggregate: str | None = None,
    axis_name: AxisName = "data",
    error_feedback: bool | Feedback | EF21 = True,
    seed: int = 0,
    min_size: int = 0,
    compress: Predicate | None = None,
    allow_dense: bool = False,
    dense_dtype: DTypeLike | None = None,
    buckets: Bucketing = None,
) -> Compressor:
    """Top K of each leaf (Table 4 of PowerSGD), or of each chunk (SparseLoCo's codec); not linear.

    By `fraction` a payload has 32 + ceil(log2 n) bits for each of k = fraction n elements of a leaf. By `chunk` and `k`
    all leaves lie in one stream, and a payload has 83 bytes for each 4096 elements of it: 197 times fewer than float32.
    With "gather" a worker of N sends N - 1 payloads, with "shuffle" 2 (N - 1) / N. State: a residual of the size of the
    compressed leaves on each worker.

    Args:
      fraction: k / n for each leaf, and for each shard of it with "shuffle"; k is rounded down, but at least 1. By
        default 0.01. Table 4's budgets of 1/136 and 1/32 are 1/272 and 1/64.
      chunk: the number of elements in a chunk of the stream, instead of `fraction`; 4096 in SparseLoCo. A square, such
        as 4096, makes blocks of matrices chunks.
      k: how many elements of each chunk are sent, 1 to `chunk`; 64 in SparseLoCo.
      bits: the bits of a value in a chunk: 2, or None for whole float32 values.
      levels: the two bits of a value. "chunk": a sign, and one of two levels of the chunk. "sigma": the authors' own
        rule, one of four levels of the whole stream, or of a shard of it with "shuffle".
      aggregate: "gather" or "shuffle"; by default "gather" on two workers, and on more the one that sends less.
      axis_name: the mesh axis, or axes, of the workers.
      error_feedback: whether to keep residuals; without them the part that is not sent is lost.
      seed: without effect; if magnitudes are equal, the one at the lower index is sent.
      min_size: leaves of fewer elements are sent dense.
      compress: (path, leaf) -> whether to compress it; by default, like in the paper, every leaf, vectors too.
      allow_dense: accept a tree whose leaves are all sent dense.
      dense_dtype: the type of leaves that are sent dense, "bfloat16" or "float16"; by default float32 or wider. Their
        rounding is not fed back.
      buckets: the number of parts of the exchange. Each sends messages of its own once its gradients are there. Or
        (path) -> the number of a leaf's part; lower numbers go first. For the default see `compressor`.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: an argument is out of range; later, in init and update, a refusal of `compressor`.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.topk(fraction=0.01), optax.sgd(0.1))
    >>> tx = optax.chain(gcj.topk(chunk=4096, k=64), optax.sgd(0.1))
    """
    del seed
    codec: TopK | ChunkedTopK
    if chunk is None and k is None:
        if bits != 2 or levels != "chunk":
            raise ValueError(f"bits={bits} and levels={levels!r} are for chunks: give chunk= and k= too")
        fraction = FRACTION if fraction is None else fraction
        require_fraction(fraction)
        codec = TopK((fraction,))
    else:
        if fraction is not None:
            raise ValueError(f"fraction={fraction} does not go with chunk={chunk} and k={k}: k of a chunk are kept")
        codec = chunked(chunk, k, bits, levels)
    require_aggregate("topk", codec.coder, aggregate)

    settings = Settings(
        axis_name, feedback(error_feedback), min_size, compress, allow_dense, aggregate, dense_dtype, buckets
    )
    return compressor(codec, settings)
