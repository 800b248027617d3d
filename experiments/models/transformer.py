"""A decoder-only transformer.

Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised Multitask Learners", 2019, section 2.3
(GPT-2), after Vaswani et al., arXiv 1706.03762. A block has causal attention, and a network of one hidden layer that is
four times as wide. Each is added to its input, and has a layer norm before it. One more layer norm follows the last
block. Positions are learned. The head is the embedding once more. Initial weights are normal with deviation 0.02; those
before an addition are divided by the root of the number of additions.

It has no dropout, because a training here sees each character once, and no biases.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

DEVIATION = 0.02


class Block(nnx.Module):
    """Attention, then a network of one hidden layer, [N, T, width] -> [N, T, width]."""

    def __init__(self, width: int, heads: int, additions: int, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, deviation: float = DEVIATION) -> nnx.Linear:
            kernel_init = nnx.initializers.normal(deviation)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=kernel_init, rngs=rngs)

        self.heads, added = heads, DEVIATION / math.sqrt(additions)
        self.norm1 = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, added)
        self.norm2 = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, added)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Blocks between an embedding and its transpose, symbols int [N, T] -> logits [N, T, symbols].

    Args:
      symbols: the number of symbols.
      context: the largest T.
      width: of the embedding; a multiple of heads.
      layers: the number of blocks.
      heads: the heads of each attention.
      rngs: for the initial parameters.
    """

    def __init__(self, symbols: int, context: int, width: int, layers: int, heads: int, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(DEVIATION)
        self.embedding = nnx.Embed(symbols, width, embedding_init=normal, rngs=rngs)
        self.positions = nnx.Param(normal(rngs.params(), (context, width)))
        self.blocks = nnx.List([Block(width, heads, 2 * layers, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)

    def __call__(self, symbols: jax.Array) -> jax.Array:
        x = (
            jax.nn.one_hot(symbols, self.embedding.num_embeddings) @ self.embedding.embedding[...]
            + self.positions[: symbols.shape[-1]]
        )
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))
