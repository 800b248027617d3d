"""What a traced program returns whatever else it is given: outputs that hang on known arguments alone, if on any."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Value = Callable[[], Any]

# Of these an output is what is given.
_SAME = ("pvary", "pcast", "copy", "optimization_barrier", "sharding_constraint", "reshard")
_TALK = ("psum", "pmax", "pmin")  # others have an axis_name


class Unknown(Exception):  # noqa: N818  it is no error
    """It hangs on an argument that is not known, on what another device sends, or on a loop."""


def outputs(closed: Any, arguments: Sequence[Any]) -> list[Value]:
    """Of a program's outputs, functions that return each or raise `Unknown`; nothing is computed but what they need.

    Args:
      closed: a closed jaxpr.
      arguments: its arguments, those that are not known as `jax.ShapeDtypeStruct`.
    """
    values = [_unknown if isinstance(x, jax.ShapeDtypeStruct) else _given(x) for x in arguments]
    return _outputs(closed.jaxpr, [_given(x) for x in closed.consts], values)


def _given(x: Any) -> Value:
    return lambda: x


def _unknown() -> Any:
    raise Unknown


def _outputs(jaxpr: Any, consts: Sequence[Value], arguments: Sequence[Value]) -> list[Value]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    made = {x: (equation, k) for equation in jaxpr.eqns for k, x in enumerate(equation.outvars)}

    def later(x: Any) -> Value:
        return lambda: value(x)

    def value(x: Any) -> Any:
        if hasattr(x, "val"):  # a literal
            return x.val
        if x not in values:
            equation, k = made[x]
            values[x] = _given(_output(equation, [later(x) for x in equation.invars], k))
        found = values[x]()
        if np.shape(found) != x.aval.shape:  # a device has a part of it
            raise Unknown
        return found

    return [later(x) for x in jaxpr.outvars]


def _output(equation: Any, operands: list[Value], k: int) -> Any:
    """The equation's k-th output."""
    name, params = equation.primitive.name, equation.params
    if name in _SAME:
        return operands[k]()
    if name in ("while", "scan") or "axis_name" in params or name.startswith(_TALK):
        raise Unknown
    if name == "cond":
        inner, operands = params["branches"][int(operands[0]())], operands[1:]
    else:
        inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is not None:
        body, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        return _outputs(body, [_given(x) for x in consts], operands)[k]()
    with jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*(operand() for operand in operands), **params)
    return found[k] if equation.primitive.multiple_results else found
