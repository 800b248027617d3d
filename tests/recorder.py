"""What a codec hands to jax's collectives, kept while it is traced."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

COLLECTIVES = ("psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter")


class Branches(NamedTuple):
    """What the collectives of a conditional were given: in each of its branches, and which of them was taken."""

    index: Any
    operands: tuple[list, ...]


class Recorder:
    """Stands in the place of jax's collectives while a codec is traced, and keeps what they are given.

    Of a conditional it has all branches run, one beside the other, and the result of one taken: so that all they are
    given can leave the program, and one program shows every phase. What is given to a collective in a scan is kept
    with an axis for the turns, [workers, turns, ...].
    """

    def __init__(self):
        self.operands = []

    def trace(self, function):
        """`function`, which returns what the collectives in it were given too."""

        def recorded(*args):
            self.operands = []
            with pytest.MonkeyPatch.context() as patch:
                for name in COLLECTIVES:
                    patch.setattr(lax, name, self._recording(getattr(lax, name)))
                patch.setattr(lax, "cond", lambda pred, yes, no, *args: self._branches(pred, (no, yes), args))
                patch.setattr(lax, "switch", lambda index, branches, *args: self._branches(index, branches, args))
                patch.setattr(lax, "scan", functools.partial(self._turns, lax.scan))
                out = function(*args)
            return out, self.operands

        return recorded

    def _recording(self, collective):
        def record(operand, *args, **kwargs):
            self.operands.append(operand)
            return collective(operand, *args, **kwargs)

        return record

    def _turns(self, scan, body, *args, **kwargs):
        outside = self.operands

        def turn(carry, x):
            self.operands = []
            carry, y = body(carry, x)
            assert not any(isinstance(operand, Branches) for operand in self.operands), "which branch, in which turn?"
            return carry, (y, self.operands)

        carry, (ys, inside) = scan(turn, *args, **kwargs)
        self.operands = [*outside, *inside]
        return carry, ys

    def _branches(self, index, branches, args):
        outside, outs, operands = self.operands, [], []
        for branch in branches:
            self.operands = []
            outs.append(branch(*args))
            operands.append(self.operands)
        self.operands = outside
        index = lax.clamp(0, lax.convert_element_type(index, jnp.int32), len(branches) - 1)
        if any(operands):
            self.operands.append(Branches(index, tuple(operands)))
        return jax.tree.map(lambda *cases: lax.select_n(index, *map(jnp.asarray, cases)), *outs)


def sent(operands, choose):
    """The operands of the branches that `choose` chooses."""
    for operand in operands:
        if isinstance(operand, Branches):
            yield from sent(operand.operands[choose(operand)], choose)
        else:
            yield operand
