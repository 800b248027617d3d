"""A codec of your own, DeMo's, checked and trained with: `python examples/demo_codec.py`.

Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870. Each worker has a momentum m of its
own and sends its fast components, the k largest coefficients of the cosine transform of each chunk of s x s:

    m <- beta m + g      q = top_k(DCT(m))      m <- m - DCT^-1(q)      x <- x - lr sign(DCT^-1(mean of all q))
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradcomp_jax as gcj
from gradcomp_jax.coder import Coder, Coding
from gradcomp_jax.compressor import compressor
from gradcomp_jax.contract import Result, Say, total
from gradcomp_jax.exchange.plan import Settings


@dataclasses.dataclass(frozen=True)
class Fast(Coder):
    """The k largest elements of each column, and their places."""

    k: int
    name, scales = "demo", ("values",)

    def lay(self, x):
        return x.astype(jnp.float32)  # a column for each chunk, as it is

    def encode(self, y, part):
        places = jax.lax.top_k(jnp.abs(y).T, min(self.k, len(y)))[1].T
        return {"values": jnp.take_along_axis(y, places, axis=0), "places": places.astype(jnp.uint16)}

    def restore(self, message, shape, part):
        return jnp.zeros(shape, jnp.float32).at[message["places"], jnp.arange(shape[1])].set(message["values"])

    def size(self, shape):
        return (4 + 2) * min(self.k, shape[0]) * shape[1]


@dataclasses.dataclass(frozen=True)
class DeMo(Coding):
    """The codec; a leaf is a matrix of chunks whose sides divide its own, of s at most."""

    coder: Fast = dataclasses.field(default=Fast(32))
    s: int = 64
    name = "demo"

    def grid(self, shape):
        sides = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        rows, columns = (max(d for d in range(1, self.s + 1) if side % d == 0) for side in sides)
        return sides[0] // rows, rows, sides[1] // columns, columns

    def shrinks(self, path, leaf, uncompressed):
        down, rows, across, columns = self.grid(leaf.shape)
        return self.coder.size((rows * columns, down * across)) < uncompressed

    def talk(self, phase, d, leaf, ctx):
        m = total(d)  # the gradient, and beta times what is left of the momentum
        chunks = m.reshape(self.grid(m.shape))
        turned = jax.scipy.fft.dctn(chunks, axes=(1, 3), norm="ortho").transpose(1, 3, 0, 2)
        heard = yield Say(turned.reshape(turned.shape[0] * turned.shape[1], -1), growth=self.s)
        parts = [y.reshape(turned.shape).transpose(2, 0, 3, 1) for y in (heard.mean, heard.own)]
        return Result(*(jax.scipy.fft.idctn(y, axes=(1, 3), norm="ortho").reshape(m.shape) for y in parts))


def demo(k=32, s=64, beta=0.999, *, aggregate=None):
    """The momentum is what error feedback with a decay keeps. The mean is over all workers, not over senders alone."""
    return compressor(DeMo(Fast(k), s), Settings("data", gcj.Feedback(decay=beta), 0, None, False, aggregate))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # four emulated workers
    print(gcj.testing.check(lambda aggregate=None: demo(4, 8, aggregate=aggregate), tree={"kernel": (32, 16)}))
    rng, mesh = np.random.default_rng(0), gcj.make_mesh(4)
    params = {"in": jnp.float32(rng.normal(size=(64, 128)) / 8), "out": jnp.float32(rng.normal(size=(128, 16)) / 11)}
    loss_fn = lambda p, batch: jnp.mean((jnp.tanh(batch["x"] @ p["in"]) @ p["out"] - batch["y"]) ** 2)  # noqa: E731
    tx, truth = optax.chain(demo(), optax.sign_sgd(optax.linear_schedule(3e-3, 0, 300))), rng.normal(size=(64, 16)) / 8
    step, state = gcj.train_step(loss_fn, tx, mesh), gcj.init(tx, params, mesh)
    for t in range(301):
        x = rng.normal(size=(128, 64))
        params, state, loss = step(params, state, {"x": jnp.float32(x), "y": jnp.float32(np.tanh(x @ truth))})
        if t % 100 == 0:
            print(f"step {t:3}: loss {loss:.4f}")
    dense = 2 * 3 / 4 * 32 * sum(x.size for x in params.values())  # bits, of an all-reduce among four
    print(f"{dense / gcj.wire_bits(state).last:.1f} times fewer bytes than uncompressed")
