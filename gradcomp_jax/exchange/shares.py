"""The bytes that each leaf sends in a step, by the ring laws: a forecast from shapes alone."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradcomp_jax.contract import Context, Say
from gradcomp_jax.exchange import plan, ways
from gradcomp_jax.wire.packing import terms_a_word

# The bytes of the int32 in which a worker tells whether its codes fit.
FLAG = 4


class Began(NamedTuple):
    """A remark that the talks of a bucket begin.

    Attributes:
      phase: the kind of the step.
      dense: the paths of the leaves that travel as they are; these are the first riders.
    """

    phase: int
    dense: tuple[str, ...]


class Word(NamedTuple):
    """The numbers that one leaf says.

    Attributes:
      path: the leaf's path; empty for a rider.
      shape: the numbers' shape.
      dtype: the numbers' type.
      summed: the type in which they would be summed.
      fronts: the `fronts` of their `Say`.
      strength: the index of the leaf's strength if it never changes; else None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    summed: Any
    fronts: tuple[int, ...] | None = None
    strength: int | None = None

    @classmethod
    def of(cls, path: str, x: Any, *more: Any) -> "Word":
        """The word of an array, while it is traced, because the types depend on the platform."""
        return cls(path, x.shape, x.dtype, ways.carried_in(x.dtype), *more)

    def count(self, strengths: Mapping[str, int]) -> int:
        """How many numbers travel."""
        return math.prod(self.shape) if self.fronts is None else self.fronts[strengths.get(self.path, 0)]


class Round(NamedTuple):
    """A remark in each round: the numbers that go out in it.

    Attributes:
      exact: the numbers that travel as they are.
      coded: the numbers that travel as codes.
      riders: the arrays that ride along.
      coder: the coder of the codes, or None.
      route: how the codes travel; None if there are none, or if they share a scale.
    """

    exact: Sequence[Word]
    coded: Sequence[Word]
    riders: Sequence[Word]
    coder: Any
    route: plan.Route | None

    @classmethod
    def of(
        cls,
        exact: Mapping[tuple[str, int], Say],
        coded: Mapping[tuple[str, int], Say],
        riders: Sequence[Any],
        coder: Any,
        route: plan.Route | None,
        contexts: Mapping[str, Context],
    ) -> "Round":
        """The round of the leaves' asks, which are by path and place, with the leaves' contexts."""

        def word(path: str, say: Say) -> Word:
            strength = contexts[path].strength
            return Word.of(path, say.x, say.fronts, strength if isinstance(strength, int) else None)

        words = lambda says: [word(path, say) for (path, _), say in says.items()]  # noqa: E731
        return cls(words(exact), words(coded), [Word.of("", x) for x in riders], coder, route)


class Shares(NamedTuple):
    """The bytes that a worker sends in a step.

    Attributes:
      leaves: the bytes of each leaf, by path.
      flags: the bytes of the flags with which the workers agree whether codes fit their buffer.
    """

    leaves: dict[str, float]
    flags: float


def shares(rounds: Sequence[tuple[Began, Round]], workers: int, strengths: Mapping[str, int]) -> Shares:
    """The bytes that each leaf sends in the rounds of a step.

    Bytes that belong to no single leaf, such as padding, are left out. Codes with a shorter form are taken to fit it.

    Args:
      rounds: the remarks of the rounds, each with the remark at the beginning of its bucket.
      workers: the number of workers.
      strengths: the index of each leaf's strength, for a codec of several.
    """
    leaves: dict[str, float] = collections.defaultdict(float)
    flags = 0.0
    for began, said in rounds:
        riding = said.route is not None and said.route.ride
        law = _law(said.route.way if riding and said.route else "psum", workers)
        named = [x._replace(path=path) for path, x in zip(began.dense, said.riders, strict=False)]
        for word in (*said.exact, *named):
            # Riders of codes travel in their own type.
            leaves[word.path] += law * word.count(strengths) * (word.dtype if riding else word.summed).itemsize
        if said.coded:
            sent, asked = _coded(said, workers, strengths)
            flags += asked
            for word, each in zip(said.coded, sent, strict=True):
                leaves[word.path] += each
    return Shares(dict(leaves), flags)


def _law(way: str, workers: int) -> float:
    """The bytes that a worker sends for each byte that is said."""
    return workers - 1 if way == "gather" else 2 * (workers - 1) / workers


def _coded(said: Round, workers: int, strengths: Mapping[str, int]) -> tuple[list[float], float]:
    """The bytes that each word sends as codes, and the bytes of flags."""
    coder, route = said.coder, said.route
    reduce = _law("psum", workers)
    if route is None:
        words = coder.d // terms_a_word(coder.s, workers)
        rows = [-(-math.prod(word.shape) // coder.d) for word in said.coded]
        return [reduce * 4 * (1 + words) * count for count in rows], 0.0
    shards = 1 if route.way == "gather" else workers
    constant = [word.strength for word in said.coded]
    places = [strengths.get(word.path, 0) for word in said.coded]
    law = _law(route.way, workers) * shards
    sent = [law * each for each in plan.payloads(coder, said.coded, constant, shards, places)]
    stages = 2 if route.way == "shuffle" else 1
    return sent, stages * reduce * FLAG * plan.shortens(coder, said.coded, constant, shards)
