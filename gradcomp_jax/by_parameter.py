"""The arrays of an optimiser's state in an order in which CPUs compute them fast."""

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["treedef", "order"])
@dataclasses.dataclass(frozen=True)
class ByParameter:
    """A tree whose arrays are in the order of parameters: each parameter beside what an optimiser keeps for it.

    XLA's CPU backend computes a program's results in their order. So what a step reads and writes for one parameter is
    still in the cache when it is read again.

    Attributes:
      arrays: the arrays.
      treedef: the tree's structure.
      order: for each of the arrays its place in the tree.
    """

    arrays: list[jax.Array]
    treedef: Any
    order: tuple[int, ...]

    @classmethod
    def of(cls, tree: Any, params: Any) -> "ByParameter":
        """A tree with arrays whose paths end like those of `params`; other arrays come last."""
        found, treedef = jax.tree_util.tree_flatten_with_path(tree)
        numbers = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params))}

        def number(place: int) -> int:
            path = found[place][0]
            return next((numbers[path[i:]] for i in range(len(path)) if path[i:] in numbers), len(numbers))

        order = sorted(range(len(found)), key=number)
        return cls([found[place][1] for place in order], treedef, tuple(order))

    @property
    def tree(self) -> Any:
        """The tree."""
        whole = dict(zip(self.order, self.arrays, strict=True))
        return jax.tree.unflatten(self.treedef, [whole[place] for place in range(len(whole))])
