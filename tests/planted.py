"""Small codecs, sound ones and others that each break a law, to see what `gradcomp_jax.testing.check` finds."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax.coder import Coder, Coding
from gradcomp_jax.compressor import compressor
from gradcomp_jax.contract import Codec, Result, Say, total
from gradcomp_jax.exchange.plan import Settings
from gradcomp_jax.feedback import Feedback, feedback


def made(codec, error_feedback=True, aggregate=None):
    return compressor(codec, Settings("data", feedback(error_feedback), 0, None, False, aggregate))


class Turn(NamedTuple):
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Turns(Codec):
    """One half of each leaf, then the other: linear, and sound."""

    name: ClassVar[str] = "turns"

    def shrinks(self, path, leaf, uncompressed):
        return leaf.size > 1

    def start(self, leaves):
        return Turn(jnp.int32(0))

    def tensor(self, d):
        return total(d)

    def place(self, step, x):
        return step % 2 * (x.size // 2)

    def talk(self, phase, d, leaf, ctx):
        x = self.tensor(d)
        start = self.place(ctx.step, x)
        part = jax.lax.dynamic_slice(x.reshape(-1), (start,), (-(-x.size // 2),))
        heard = yield Say(part + self.seen(x))

        def spread(part):
            flat = jnp.zeros(x.size, part.dtype)
            return jax.lax.dynamic_update_slice(flat, part, (start,)).reshape(x.shape)

        return self.result(spread(heard.mean), spread(heard.own), x)

    def seen(self, x):
        """NaN where anything is not finite, of what is not sent too."""
        return jnp.sum(0 * x)

    def result(self, mean, own, x):
        return Result(mean, own)


class SendsMore(Turns):
    def result(self, mean, own, x):
        return Result(jax.lax.pmean(x, "data"), x)


class AveragesTwice(Turns):
    def result(self, mean, own, x):
        return Result(mean / jax.lax.axis_size("data"), own)


class DropsResidual(Turns):
    def result(self, mean, own, x):
        return Result(mean, x)


class OwesForEver(Turns):
    def tensor(self, d):
        return d[0]


class NeverSendsHalf(Turns):
    def place(self, step, x):
        return jnp.int32(0)


class WorkersPart(Turns):
    """Each at a place that it draws by its own index."""

    def place(self, step, x):
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("data"))
        return jax.random.randint(key, (), 0, x.size // 2, jnp.int32)


class OwnMean(Turns):
    def result(self, mean, own, x):
        return Result(mean + 0 * x, own)


class Blind(Turns):
    """To what is not finite in what it does not send."""

    def seen(self, x):
        return jnp.zeros((), x.dtype)


class LeavesOut(Turns):
    """Of each worker what is small, which is not linear."""

    def tensor(self, d):
        x = total(d)
        return jnp.where(jnp.abs(x) < 0.1 * jnp.max(jnp.abs(x)), 0, x)


class Grows(Turns):
    """Without bias, and so no contraction."""

    def result(self, mean, own, x):
        return Result(3 * mean, 3 * own)


@dataclasses.dataclass(frozen=True)
class Changes(Turns):
    def tick(self, state, after, ctx):
        return Turn(after.step.astype(jnp.float32) + 1)


class Kept(NamedTuple):
    step: jax.Array
    last: dict


@dataclasses.dataclass(frozen=True)
class KeepsItsOwn(Turns):
    """State of a worker that is not marked to be its own."""

    by_leaf: ClassVar[tuple[str, ...]] = ("last",)

    def init(self, path, leaf, salt):
        return {"last": jnp.zeros(leaf.shape, leaf.dtype)}

    def start(self, leaves):
        return Kept(jnp.int32(0), {path: x["last"] for path, x in leaves.items()})

    def result(self, mean, own, x):
        return Result(mean, own, {"last": own})


class Forgets(Feedback):
    def settle(self, terms, memory, own, ok):
        return 0 * super().settle(terms, memory, own, ok)


@dataclasses.dataclass(frozen=True)
class Rounds(Coder):
    """To one of 255 levels of the largest magnitude, at random: sound."""

    name: ClassVar[str] = "rounds"
    scales: ClassVar[tuple[str, ...]] = ("scale",)
    draws: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    seed: ClassVar[int] = 0

    def start(self):
        return Turn(jnp.int32(0))

    def largest(self, y):
        return jnp.max(jnp.abs(y)) + jnp.sum(0 * y)

    def uniform(self, part, shape):
        return jax.random.uniform(part.key, shape, jnp.float32)

    def encode(self, y, part):
        scale = self.largest(y)
        levels = jnp.where(scale > 0, y / scale, 0) * 127
        codes = jnp.floor(levels + self.uniform(part, y.shape)).astype(jnp.int8)
        return {"scale": scale, "codes": jax.lax.bitcast_convert_type(codes, jnp.uint8)}

    def restore(self, message, shape, part):
        codes = jax.lax.bitcast_convert_type(message["codes"], jnp.int8)
        return codes.astype(jnp.float32) / 127 * message["scale"]

    def size(self, shape):
        return 4 + math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Rounded(Coding):
    rounds: Coder = Rounds()
    name: ClassVar[str] = "rounded"

    @property
    def coder(self):
        return self.rounds


class SharesNumbers(Rounds):
    def uniform(self, part, shape):
        return jax.random.uniform(jax.random.key(7), shape, jnp.float32)


class DropsNaN(Rounds):
    def largest(self, y):
        return jnp.max(jnp.abs(jnp.nan_to_num(y)))


class Epsilon(Rounds):
    def largest(self, y):
        return super().largest(y) + 1e-3


class SaysLess(Rounds):
    def size(self, shape):
        return math.prod(shape)


class OtherUnderVmap(Rounds):
    """By a generator of jax's that draws other numbers where keys are batched."""

    def uniform(self, part, shape):
        words = jax.random.key_data(part.key)
        key = jax.random.wrap_key_data(jnp.concatenate([words, words]), impl="unsafe_rbg")
        return jax.random.uniform(key, shape, jnp.float32)
