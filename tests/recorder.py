"""A wire that keeps what it is given, to be handed to an exchange."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.exchange.collectives import Wire


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["kind"])
@dataclasses.dataclass
class Message:
    """What one collective was given.

    Attributes:
      kind: as `gradcomp_jax.Collective` names it.
      operands: an array, or a tree of several.
    """

    kind: str
    operands: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["index", "messages"], meta_fields=["sizes"])
@dataclasses.dataclass
class Branches:
    """What the collectives of a conditional were given.

    Attributes:
      index: of the branch taken.
      messages: a list of `Message` and `Branches` for each branch.
      sizes: whether the branches differ in how much of one buffer they send, as those of `Wire.front` do.
    """

    index: Any
    messages: tuple[list, ...]
    sizes: bool = False


@dataclasses.dataclass(frozen=True)
class Recorder(Wire):
    """Keeps what its collectives are given.

    Of a conditional it has all branches run, one beside the other, and the result of one taken: so that all they are
    given can leave the program, and one program shows every phase. What is given to a collective in a scan is kept
    with an axis for the turns, [workers, turns, ...].
    """

    given: list = dataclasses.field(default_factory=list)

    def _sum(self, tree):
        return super()._sum(self._keep("all-reduce", tree))

    def _max(self, tree):
        return super()._max(self._keep("all-reduce", tree))

    def _all_gather(self, x):
        return super()._all_gather(self._keep("all-gather", x))

    def _all_to_all(self, x):
        return super()._all_to_all(self._keep("all-to-all", x))

    def _pass_on(self, tree):
        return super()._pass_on(self._keep("collective-permute", tree))

    def scan(self, turn, carry, xs):
        def kept(carry, x):
            (carry, y), inside = self._apart(lambda: turn(carry, x))
            assert not any(isinstance(x, Branches) for x in inside), "which branch, in which turn?"
            return carry, (y, inside)

        carry, (ys, inside) = lax.scan(kept, carry, xs)
        self.given.extend(inside)
        return carry, ys

    def switch(self, index, branches):
        outs, messages = zip(*map(self._apart, branches), strict=True)
        index = lax.clamp(0, lax.convert_element_type(index, jnp.int32), len(branches) - 1)
        if any(messages):
            self.given.append(Branches(index, messages))
        return jax.tree.map(lambda *cases: lax.select_n(index, *map(jnp.asarray, cases)), *outs)

    def front(self, *args):
        out = super().front(*args)
        self.given[-1].sizes = True
        return out

    def _keep(self, kind: str, operands: Any) -> Any:
        self.given.append(Message(kind, operands))
        return operands

    def _apart(self, function: Callable[[], Any]) -> tuple[Any, list]:
        """What a function returns, and what the collectives in it are given."""
        outside = self.given[:]
        self.given.clear()
        try:
            out = function()
            return out, self.given[:]
        finally:
            self.given[:] = outside


def sent(given: list, choose: Callable[[Branches], int]) -> Iterator[Message]:
    """The messages of the branches that `choose` chooses."""
    for x in given:
        if isinstance(x, Branches):
            yield from sent(x.messages[choose(x)], choose)
        else:
            yield x
