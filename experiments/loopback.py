"""A wire on which nothing is sent: each worker hears itself instead of the others, in messages as large as real ones.

With it a codec's update computes all that it computes between hosts, and waits for no link. Each collective becomes a
permute to oneself, which copies, which XLA neither removes nor fuses with its neighbours, and for which gloo sends
nothing. The numbers are those of this worker alone, so they are of use for timing only.
"""

import contextlib
import dataclasses
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax import compressor
from gradcomp_jax.exchange.collectives import Wire

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


class Said(NamedTuple):
    """What a worker said in a step, as numbers of fixed shape; they pass through conditionals and loops.

    Attributes:
      total: float32, the sum of all numbers in all messages, which cannot be had without computing these.
      messages: int32 [kinds], how many messages there were of each of `KINDS`. CPUs send each array in one of its own.
    """

    total: jax.Array
    messages: jax.Array


@dataclasses.dataclass(frozen=True)
class Loopback(Wire):
    """The wire; `said` has what was said since it was made, or since the conditional or loop around began."""

    said: list[Said] = dataclasses.field(default_factory=list)

    def _sum(self, tree):
        return jax.tree.map(functools.partial(self._heard, "all-reduce"), tree)

    def _max(self, tree):
        return jax.tree.map(functools.partial(self._heard, "all-reduce"), tree)

    def _all_gather(self, x):
        heard = self._heard("all-gather", x)
        return self._moved(jnp.broadcast_to(heard, (self.workers, *x.shape)))

    def _all_to_all(self, x):
        return self._heard("all-to-all", x)

    def _pass_on(self, tree):
        return jax.tree.map(functools.partial(self._heard, "collective-permute"), tree)

    def switch(self, index, branches):
        out, said = lax.switch(index, [functools.partial(self._apart, branch) for branch in branches])
        self.said.append(said)
        return out

    def scan(self, turn, carry, xs):
        def kept(carry, x):
            (carry, y), said = self._apart(lambda: turn(carry, x))
            return carry, (y, said)

        carry, (ys, said) = lax.scan(kept, carry, xs)
        self.said.append(jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), said))
        return carry, ys

    def _heard(self, kind: str, x: jax.Array) -> jax.Array:
        heard = self._moved(x)
        messages = jnp.array([kind == other for other in KINDS], jnp.int32)
        self.said.append(Said(jnp.sum(heard.astype(jnp.float32)), messages))
        return heard

    def _moved(self, x: jax.Array) -> jax.Array:
        return lax.ppermute(x, self.axis, [(worker, worker) for worker in range(self.workers)])

    def _apart(self, function: Callable[[], Any]) -> tuple[Any, Said]:
        """The return value of a function, and what is said in it."""
        outside = self.said[:]
        self.said.clear()
        try:
            return function(), in_all(self.said)
        finally:
            self.said[:] = outside


def in_all(said: list[Said]) -> Said:
    """What was said, added up."""
    nothing = Said(jnp.float32(0), jnp.zeros(len(KINDS), jnp.int32))
    return functools.reduce(lambda x, y: Said(x.total + y.total, x.messages + y.messages), said, nothing)


@contextlib.contextmanager
def nothing_sent() -> Iterator[list[Said]]:
    """In this context the updates of codecs are traced with this wire; gives what they say.

    Trace them inside `shard_map(check_vma=False)`, because what a worker hears differs from worker to worker.
    """
    said: list[Said] = []
    with unittest.mock.patch.object(compressor, "Wire", functools.partial(Loopback, said=said)):
        yield said
