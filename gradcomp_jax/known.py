"""The known part of a traced program: outputs that depend on known arguments alone, and the collectives that run.

Conditionals are followed where their index is known. Only requested values are computed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

Value = Callable[[], Any]

# Primitives whose outputs are their inputs: a known value is known, and the same, on all devices.
_SAME = ("pvary", "pcast", "copy", "optimization_barrier", "sharding_constraint", "reshard", "pmax", "pmin")
# The kinds of collectives, by the beginnings of their primitives' names.
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
    """A value depends on an unknown argument, on the data of another device, or on a loop."""


class Message(NamedTuple):
    """A collective of a traced program.

    Attributes:
      kind: the kind of collective, as in `gradcomp_jax.Collective`.
      axes: the mesh axes over which it goes.
      times: the number of its operands, over all turns of a loop.
      bytes: the bytes of its operands on one device, over all turns.
      calls: the turns of the loop around it; 1 outside of loops.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: int
    calls: int = 1


def outputs(closed: Any, arguments: Sequence[Any], otherwise: int | None = None) -> list[Value]:
    """For each output of a program, a function that returns its value or raises `Unknown`.

    Args:
      closed: a closed jaxpr.
      arguments: the program's arguments; an unknown one is a `jax.ShapeDtypeStruct`.
      otherwise: the branch to take in conditionals whose index is unknown; None: their results are unknown too.
    """
    scope = _Scope(closed.jaxpr, [_given(x) for x in closed.consts], _values(arguments), otherwise)
    return [functools.partial(scope.value, x) for x in closed.jaxpr.outvars]


def messages(closed: Any, arguments: Sequence[Any], otherwise: int | None = None) -> list[Message]:
    """The collectives of a program; a conditional has those of the branch taken.

    Args:
      closed: a closed jaxpr.
      arguments: the arguments, like for `outputs`.
      otherwise: the branch to take in conditionals whose index is unknown, like for `outputs`.

    Raises:
      Unknown: the branch depends on unknown values, and `otherwise` is None.
    """
    return list(_Scope(closed.jaxpr, [_given(x) for x in closed.consts], _values(arguments), otherwise).messages())


def _values(arguments: Sequence[Any]) -> list[Value]:
    return [_unknown if isinstance(x, jax.ShapeDtypeStruct) else _given(x) for x in arguments]


def _given(x: Any) -> Value:
    return lambda: x


def _unknown() -> Any:
    raise Unknown


class _Scope:
    """The values of a jaxpr, each computed when it is requested."""

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
        """The jaxpr inside an equation, for a conditional the branch taken; None if there is none."""
        operands, params = equation.invars, equation.params
        if equation.primitive.name == "cond":
            found, operands = params["branches"][self.index(operands[0], len(params["branches"]))], operands[1:]
        else:
            found = params.get("jaxpr", params.get("call_jaxpr"))
        if found is None:
            return None
        consts = [_given(x) for x in getattr(found, "consts", ())]
        loops = equation.primitive.name == "scan"  # its operands change from turn to turn
        arguments = [_unknown if loops else functools.partial(self.value, x) for x in operands]
        return _Scope(getattr(found, "jaxpr", found), consts, arguments, self.otherwise)

    def index(self, x: Any, branches: int) -> int:
        """The index of the branch that is taken."""
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
                size = sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
                yield Message(kind, (axes,) if isinstance(axes, str) else tuple(axes), len(equation.invars), size)
            elif any(map(_kind, inside(equation))) and (inner := self.inner(equation)) is not None:
                turns = params["length"] if name == "scan" else 1
                for x in inner.messages():
                    yield x._replace(times=turns * x.times, bytes=turns * x.bytes, calls=turns * x.calls)


def _kind(equation: Any) -> str:
    """The kind of a collective; empty for other equations."""
    return next((kind for name, kind in _TALK.items() if equation.primitive.name.startswith(name)), "")


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[Any]:
    """All equations of a jaxpr, with those of the loops, branches and functions inside it."""
    for equation in jaxpr.eqns:
        yield equation
        yield from inside(equation)


def inside(equation: Any) -> Iterator[Any]:
    """All equations inside an equation."""
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from equations(inner)
