"""What a traced program does whatever else it is given: outputs that hang on known arguments alone, and what it sends.

Conditionals are followed where their index is known; nothing is computed but what is asked for.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

Value = Callable[[], Any]

# Of these an output is what is given; what is known is known, and the same, on all devices.
_SAME = ("pvary", "pcast", "copy", "optimization_barrier", "sharding_constraint", "reshard", "pmax", "pmin")
# The kinds of collectives, by how their names begin.
_TALK = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


class Unknown(Exception):  # noqa: N818  it is no error
    """It hangs on an argument that is not known, on what another device sends, or on a loop."""


class Message(NamedTuple):
    """A collective of a traced program.

    Attributes:
      kind: as `gradcomp_jax.Collective` names it.
      axes: the mesh axes over which it goes.
      times: how many operands it has, in all turns of a loop.
    """

    kind: str
    axes: tuple[str, ...]
    times: int


def outputs(closed: Any, arguments: Sequence[Any], otherwise: int | None = None) -> list[Value]:
    """Of a program's outputs, functions that return each or raise `Unknown`.

    Args:
      closed: a closed jaxpr.
      arguments: its arguments, those that are not known as `jax.ShapeDtypeStruct`.
      otherwise: the branch of conditionals whose index is not known; None: they are not known either.
    """
    scope = _Scope(closed.jaxpr, [_given(x) for x in closed.consts], _values(arguments), otherwise)
    return [functools.partial(scope.value, x) for x in closed.jaxpr.outvars]


def messages(closed: Any, arguments: Sequence[Any], otherwise: int | None = None) -> list[Message]:
    """The collectives of a program, of its conditionals those of the branch taken.

    Args:
      closed: a closed jaxpr.
      arguments: as of `outputs`.
      otherwise: as of `outputs`.

    Raises:
      Unknown: which branch holds on what is not known.
    """
    return list(_Scope(closed.jaxpr, [_given(x) for x in closed.consts], _values(arguments), otherwise).messages())


def _values(arguments: Sequence[Any]) -> list[Value]:
    return [_unknown if isinstance(x, jax.ShapeDtypeStruct) else _given(x) for x in arguments]


def _given(x: Any) -> Value:
    return lambda: x


def _unknown() -> Any:
    raise Unknown


class _Scope:
    """The values of a jaxpr, computed as they are asked for."""

    def __init__(self, jaxpr: Any, consts: Sequence[Value], arguments: Sequence[Value], otherwise: int | None):
        self.jaxpr, self.otherwise = jaxpr, otherwise
        self.values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        self.made = {x: (equation, k) for equation in jaxpr.eqns for k, x in enumerate(equation.outvars)}

    def value(self, x: Any) -> Any:
        if hasattr(x, "val"):  # a literal
            return x.val
        if x not in self.values:
            self.values[x] = _given(self.output(*self.made[x]))
        found = self.values[x]()
        if np.shape(found) != x.aval.shape:  # a device has a part of it
            raise Unknown
        return found

    def output(self, equation: Any, k: int) -> Any:
        """The equation's k-th output."""
        name, params = equation.primitive.name, equation.params
        if name in _SAME:
            return self.value(equation.invars[k])
        if name in ("while", "scan") or "axis_name" in params or name.startswith(tuple(_TALK)):
            raise Unknown
        if (inner := self.inner(equation)) is not None:
            return inner.value(inner.jaxpr.outvars[k])
        with jax.ensure_compile_time_eval():
            found = equation.primitive.bind(*map(self.value, equation.invars), **params)
        return found[k] if equation.primitive.multiple_results else found

    def inner(self, equation: Any) -> "_Scope | None":
        """What is inside of an equation, of a conditional the branch taken; None if nothing is."""
        operands, params = equation.invars, equation.params
        if equation.primitive.name == "cond":
            found, operands = params["branches"][self.index(operands[0], len(params["branches"]))], operands[1:]
        else:
            found = params.get("jaxpr", params.get("call_jaxpr"))
        if found is None:
            return None
        consts = [_given(x) for x in getattr(found, "consts", ())]
        loops = equation.primitive.name == "scan"  # whose operands change from turn to turn
        arguments = [_unknown if loops else functools.partial(self.value, x) for x in operands]
        return _Scope(getattr(found, "jaxpr", found), consts, arguments, self.otherwise)

    def index(self, x: Any, branches: int) -> int:
        """The branch that is taken."""
        try:
            return int(self.value(x))
        except Unknown:
            if self.otherwise is None:
                raise
            return self.otherwise % branches

    def messages(self) -> Iterator[Message]:
        """The collectives, in the order of the program; there are none in while loops."""
        for equation in self.jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            if kind := _kind(equation):
                axes = params.get("axes", params.get("axis_name"))
                yield Message(kind, (axes,) if isinstance(axes, str) else tuple(axes), len(equation.invars))
            elif any(map(_kind, inside(equation))) and (inner := self.inner(equation)) is not None:
                turns = params["length"] if name == "scan" else 1
                yield from (x._replace(times=turns * x.times) for x in inner.messages())


def _kind(equation: Any) -> str:
    """Of a collective its kind; empty of others."""
    return next((kind for name, kind in _TALK.items() if equation.primitive.name.startswith(name)), "")


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[Any]:
    """All equations, those of loops, branches and functions inside included."""
    for equation in jaxpr.eqns:
        yield equation
        yield from inside(equation)


def inside(equation: Any) -> Iterator[Any]:
    """All equations inside of one."""
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from equations(inner)
