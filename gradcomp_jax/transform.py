"""Orthonormal transforms of blocks, before a coder: its loss falls on other numbers, or is smaller.

T is a matrix of b x b, the same on all workers, and C is the coder. Each block x of b elements in C order becomes

    T^T C(T x)

- "hadamard": T = H S / sqrt(b), where H has entries -1 and 1, and S has random signs. Suresh, Yu, Kumar, McMahan,
  "Distributed Mean Estimation with Limited Communication", ICML 2017, arXiv 1611.00429, section 3. It makes the
  elements of a block alike. Then a few large ones no longer set the scale of all, as they do in QSGD.
- "dct": the discrete cosine transform of type II. Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization",
  2024, arXiv 2411.19870. It gathers a slowly varying block in few elements, which top-k then sends. (DeMo has blocks of
  64 x 64 of a matrix, and keeps k elements of each. Here blocks are rows, and k counts elements of the leaf.)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax.arguments import factory
from gradcomp_jax.coder import Coder, Coding, Switched
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import require_whole
from gradcomp_jax.random import scattered
from gradcomp_jax.views import buckets, from_buckets

KINDS = ("hadamard", "dct")


@dataclasses.dataclass(frozen=True)
class Transform:
    """A transform; see `transformed`."""

    kind: str
    block: int
    seed: int

    def length(self, size: int) -> int:
        """The number of elements after the transform of a tensor of `size` elements: whole blocks."""
        return -(-size // self.block) * self.block

    @property
    def growth(self) -> float:
        """The factor by which a block's largest magnitude can grow."""
        return math.sqrt(self.block)

    def __call__(self, x: jax.Array) -> jax.Array:
        """T of each block of x, flat; the last block is filled up with zeros."""
        rows = buckets(x, self.block)
        return self._turned(rows * self._signs(rows), 0).reshape(-1)

    def inverse(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """T^T of each block."""
        rows = self._turned(buckets(y, self.block), 1)
        return from_buckets(rows * self._signs(rows), shape)

    def _turned(self, rows: jax.Array, axis: int) -> jax.Array:
        """Multiplies rows [., b] by T without its signs (axis 0) or by its transpose (axis 1), as two small products.

        The precision is HIGHEST, because the mean of transformed tensors must be the transform of their mean.
        """
        a, b = (jnp.asarray(factor, rows.dtype) for factor in self._factors())
        letters = "xac,ap,cq->xpq" if axis else "xac,pa,qc->xpq"
        cut = rows.reshape(-1, len(a), len(b))
        return jnp.einsum(letters, cut, a, b, precision=jax.lax.Precision.HIGHEST).reshape(rows.shape)

    def _factors(self) -> tuple[np.ndarray, np.ndarray]:
        """The two factors of T without its signs, which is their Kronecker product."""
        if self.kind == "dct":
            places = np.arange(self.block)
            waves = np.cos(np.pi / self.block * np.outer(places, places + 0.5)) * math.sqrt(2 / self.block)
            return np.eye(1), np.where(places[:, None] > 0, waves, math.sqrt(1 / self.block))
        bits = self.block.bit_length() - 1
        return _hadamard(bits // 2), _hadamard(bits - bits // 2)

    def _signs(self, rows: jax.Array) -> jax.Array:
        if self.kind == "dct":
            return jnp.ones((), rows.dtype)
        return jnp.where(scattered(rows.shape, jnp.float32, self.seed) < 0, -1, 1).astype(rows.dtype)


def _hadamard(bits: int) -> np.ndarray:
    """Sylvester's matrix of 2^bits rows, orthonormal."""
    places = np.arange(2**bits)
    return (-1.0) ** np.bitwise_count(places[:, None] & places) / math.sqrt(2**bits)


def _takes_flat(coder: Coder) -> bool:
    """Whether a coder takes a tensor as flat, and the inverse transform may follow it."""
    coder = coder.coders[0] if isinstance(coder, Switched) else coder
    return type(coder).lay is Coder.lay and not (coder.votes or coder.shares_scale)


@factory
def transformed(tx: Compressor, kind: str, block: int = 64, *, seed: int = 0) -> Compressor:
    """A codec that codes, with an orthonormal transform of blocks before it and the inverse behind it.

    The coding error of a block keeps its 2-norm. A leaf's last block is filled up, which sends a little more.

    Args:
      tx: a codec whose coder takes a tensor as flat: `qsgd`, `topk`, or `signnorm` without majority.
      kind: "hadamard" or "dct".
      block: b, the number of elements that are transformed together; a power of two for "hadamard". Both kinds cost
        2 (p + q) flops an element: "hadamard" with p q = b, "dct" with p = 1 and q = b.
      seed: the seed of the signs of "hadamard", which are the same in all steps.

    Returns:
      A `Compressor`, with the settings of tx.

    Raises:
      ValueError: an argument is out of range, or tx is none of those codecs.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.transformed(gcj.qsgd(2, bucket_size=128), "hadamard", 128), optax.sgd(0.1))
    >>> tx = optax.chain(gcj.transformed(gcj.topk(0.01), "dct"), optax.sgd(0.1))
    """
    codec = tx.codec if isinstance(tx, Compressor) else None
    if not isinstance(codec, Coding) or not _takes_flat(codec.coder) or codec.transform is not None:
        raise ValueError(
            f"tx={tx if codec is None else codec.name!r} must be a qsgd without shared_scale, a topk or a signnorm "
            "without majority, and without a transform: that goes before a coder of flat tensors, once"
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, KINDS))}")
    require_whole("block", block, 2)
    if kind == "hadamard" and block & (block - 1):
        raise ValueError(f"block={block} must be a power of two for kind='hadamard'")
    return compressor(dataclasses.replace(codec, transform=Transform(kind, block, seed)), tx.settings)
