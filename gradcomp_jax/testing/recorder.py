"""Two wires for an exchange: one keeps the operands of its collectives, the other replays them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.exchange.collectives import Wire


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["kind"])
@dataclasses.dataclass
class Message:
    """The operands of one collective.

    Attributes:
      kind: the kind of collective, as in `gradcomp_jax.Collective`.
      operands: an array, or a tree of several.
    """

    kind: str
    operands: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["index", "messages"], meta_fields=["sizes"])
@dataclasses.dataclass
class Branches:
    """The operands of the collectives in a conditional.

    Attributes:
      index: the index of the branch taken.
      messages: a list of `Message` and `Branches` for each branch; all are empty if no branch sends.
      sizes: whether the branches send different lengths of one buffer, like those of `Wire.front`.
    """

    index: Any
    messages: tuple[list, ...]
    sizes: bool = False


@dataclasses.dataclass(frozen=True)
class Recorder(Wire):
    """A wire that keeps the operands of its collectives.

    It runs all branches of a conditional, and takes the result of one. So the operands of all branches can leave the
    program, and one program shows every phase. The operands of a collective in a scan are kept with an axis for the
    turns, [workers, turns, ...].
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
        self.given.append(Branches(index, messages))
        return _taken(index, outs)

    def front(self, *args):
        out = super().front(*args)
        self.given[-1].sizes = True
        return out

    def _keep(self, kind: str, operands: Any) -> Any:
        self.given.append(Message(kind, operands))
        return operands

    def _apart(self, function: Callable[[], Any]) -> tuple[Any, list]:
        """The return value of a function, and the operands of the collectives in it."""
        outside = self.given[:]
        self.given.clear()
        try:
            out = function()
            return out, self.given[:]
        finally:
            self.given[:] = outside


@dataclasses.dataclass(frozen=True)
class Replay(Wire):
    """A wire that gives its collectives the operands that a `Recorder` kept, whatever they get now.

    Attributes:
      given: the operands that are left.
      turns: the turn of each scan around the collective that comes next.
    """

    given: list = dataclasses.field(default_factory=list)
    turns: list = dataclasses.field(default_factory=list)

    def _sum(self, tree):
        return super()._sum(self._kept("all-reduce"))

    def _max(self, tree):
        return super()._max(self._kept("all-reduce"))

    def _all_gather(self, x):
        return super()._all_gather(self._kept("all-gather"))

    def _all_to_all(self, x):
        return super()._all_to_all(self._kept("all-to-all"))

    def _pass_on(self, tree):
        return super()._pass_on(self._kept("collective-permute"))

    def scan(self, turn, carry, xs):
        before = self.given[:]

        def replayed(carry, x):
            i, x = x
            self.given[:] = before  # each time that jax traces this function
            self.turns.append(i)
            try:
                return turn(carry, x)
            finally:
                self.turns.pop()

        turns = len(jax.tree.leaves(xs)[0])
        return lax.scan(replayed, carry, (jnp.arange(turns, dtype=jnp.int32), xs))

    def switch(self, index, branches):
        node = self.given.pop(0)
        assert isinstance(node, Branches), f"a conditional, where {node.kind} was"
        rest, outs = self.given[:], []
        for branch, messages in zip(branches, node.messages, strict=True):
            self.given[:] = messages
            outs.append(branch())
        self.given[:] = rest
        return _taken(node.index, outs)

    def _kept(self, kind: str) -> Any:
        message = self.given.pop(0)
        assert isinstance(message, Message), f"{kind}, where a conditional was"
        assert message.kind == kind, f"{kind}, where {message.kind} was"
        for i in self.turns:
            message = jax.tree.map(lambda x, i=i: x[i], message)
        return message.operands


def _taken(index: Any, outs: Sequence[Any]) -> Any:
    """The result of the branch taken, from the results of all."""
    return jax.tree.map(lambda *cases: lax.select_n(index, *map(jnp.asarray, cases)), *outs)


def sent(given: list, choose: Callable[[Branches], int]) -> Iterator[Message]:
    """The messages of the branches that `choose` chooses; it is not called for conditionals that send nothing."""
    for x in given:
        if not isinstance(x, Branches):
            yield x
        elif any(x.messages):
            yield from sent(x.messages[choose(x)], choose)
