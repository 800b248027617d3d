"""When outer steps happen: which fragments are exchanged, and which are taken over, beside which local step.

The *place* of a step counts the local steps before it: 0 to every - 1 in the first period, every to 2 every - 1 in all
later ones. The first period is told from the others because nothing is on its way when it begins.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax.arguments import shown
from gradcomp_jax.exchange.plan import natural


class Moment(NamedTuple):
    """What happens around one local step, as indices of fragments.

    Attributes:
      before: fragments that are exchanged beside the step, from the parameters before it.
      after: fragments that are exchanged after the step.
      adopted: fragments of whose new anchor each worker goes on after the step.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    adopted: tuple[int, ...] = ()


QUIET = Moment()
"""A local step, and nothing else."""


class Period(NamedTuple):
    """The plan of a period.

    Attributes:
      every: the local steps of a period, in which each fragment is exchanged once.
      fragments: the number of fragments.
      delay: the local steps between the moment from which a fragment is exchanged and the one at which it is adopted.
    """

    every: int
    fragments: int = 1
    delay: int = 0

    def due(self, fragment: int) -> int:
        """After how many steps of a period a fragment is exchanged, 1 to `every`; the last at the end."""
        return self.every * (fragment + 1) // self.fragments

    def at(self, place: int) -> Moment:
        """What happens around the step at a place."""
        done, number = place % self.every, place + 1
        each = range(self.fragments)
        if not self.delay:
            now = tuple(f for f in each if self.due(f) == done + 1)
            return Moment((), now, now)
        before = tuple(f for f in each if place and self.due(f) % self.every == done)
        lands = lambda f: self.due(f) + self.delay  # noqa: E731
        adopted = tuple(f for f in each if number >= lands(f) and (number - lands(f)) % self.every == 0)
        return Moment(before, (), adopted)

    def pending(self, place: int) -> tuple[int, ...]:
        """The fragments that have been exchanged before the step at a place, and that are adopted at it or later."""
        earlier = range(max(1, place - self.delay + 1), place)
        return tuple(f for other in earlier for f in self.at(other).before)

    def after(self, place: Any) -> Any:
        """The place of the next step, for a number or an array."""
        return place + 1 - self.every * ((place + 1) // (2 * self.every))

    def folded(self, place: jax.Array) -> jax.Array:
        """A place in this plan, from one in a plan with a longer period, as after `swap`."""
        return place - self.every * jnp.maximum(place // self.every - 1, 0)

    @property
    def places(self) -> range:
        """All places."""
        return range(2 * self.every)

    def moments(self, place: int, steps: int) -> tuple[Moment, ...]:
        """What happens around so many steps from a place on."""
        found = []
        for _ in range(steps):
            found.append(self.at(place))
            place = self.after(place)
        return tuple(found)


def in_fragments(paths: Sequence[str], fragments: int | Callable[[str], int]) -> dict[str, int]:
    """The fragment of each path.

    Args:
      paths: the paths of the leaves.
      fragments: the number of fragments, or (path) -> the index of a leaf's fragment. By number, layer l is in fragment
        l mod fragments: the strided pattern of Streaming DiLoCo (arXiv 2501.18512, section 2.2). A layer is the leaves
        whose paths agree up to the first number in them, or up to the last name; layers are in natural order.

    Raises:
      ValueError: there are fewer layers than fragments, or the function skips an index.
    """
    if callable(fragments):
        found = {path: fragments(path) for path in paths}
        for path, index in found.items():
            if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
                raise ValueError(
                    f"fragments= returned {shown(index)} for leaf {path!r}: it must return an index from 0"
                )
        if missing := sorted({*range(max(found.values(), default=0) + 1)} - {*found.values()}):
            raise ValueError(f"fragments= puts no leaf into fragment {missing[0]}: give the indices without a gap")
        return found
    layers = sorted({_layer(path) for path in paths}, key=natural)
    if len(layers) < fragments:
        raise ValueError(
            f"fragments={fragments} is more than the number of layers of the parameters, {len(layers)}, such as "
            f"{layers[0] if layers else ''!r}: give fewer, or a function (path) -> the index of its fragment"
        )
    return {path: layers.index(_layer(path)) % fragments for path in paths}


def _layer(path: str) -> str:
    names = path.split("/")
    numbered = [place for place, name in enumerate(names) if re.search(r"\d", name)]
    return "/".join(names[: numbered[0] + 1] if numbered else names[:-1] or names)
