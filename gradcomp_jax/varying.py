"""The values of a traced program that differ between workers: `shard_map`'s types, worked out without tracking.

`jax.shard_map(check_vma=True)` has types that tell along which mesh axes a value may differ, and it sums the gradients
with respect to values that are the same on all workers. A step that somebody else wrote for one device is traced
without such types, so its gradients stay each worker's own. This module reads the same facts from the step's jaxpr: the
batch, each worker's state and the worker's index differ along some axes, and a collective makes values the same again.
"""

from collections.abc import Sequence
from typing import Any

from gradcomp_jax.known import equations

Axes = frozenset[str]

NONE: Axes = frozenset()
# The results of these are the same along their axes; for all_gather and its like, because no code asks for a varying
# result.
_AGREE = ("psum", "pmax", "pmin", "all_gather")
# The results of these may differ along their axes, whatever their operands.
_PART = ("all_to_all", "ppermute", "pbroadcast", "reduce_scatter", "axis_index", "ragged_all_to_all", "pgather")


class PartingError(Exception):
    """A collective is in a branch or loop that only some workers may take, so that the others would not meet them."""


def outputs(jaxpr: Any, arguments: Sequence[Axes]) -> list[Axes]:
    """The mesh axes along which each output of a jaxpr may differ.

    Args:
      jaxpr: an open jaxpr, or a closed one.
      arguments: the axes along which each argument may differ.

    Raises:
      PartingError: whether workers meet in a collective depends on values that differ between them.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = dict(zip(jaxpr.invars, arguments, strict=True))

    def of(x: Any) -> Axes:
        return found.get(x, NONE) if not hasattr(x, "val") else NONE  # literals and constants are the same on all

    for equation in jaxpr.eqns:
        made = _made(equation, [of(x) for x in equation.invars])
        found |= zip(equation.outvars, made, strict=True)
    return [of(x) for x in jaxpr.outvars]


def _made(equation: Any, given: list[Axes]) -> list[Axes]:
    """The axes of an equation's outputs."""
    name, params = equation.primitive.name, equation.params
    joined = NONE.union(*given)
    axes = _axes(params)
    if name.startswith(_AGREE) and params.get("axis_index_groups") is None:
        return [x - axes for x in given]  # one output for each operand
    if name.startswith((*_AGREE, *_PART)):
        return [joined | axes] * len(equation.outvars)
    if name == "optimization_barrier":
        return given
    if name == "cond":
        return _of_cond(params["branches"], given)
    if name == "while":
        return _of_while(params, given)
    if name == "scan":
        return _of_scan(params, given)
    inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
    if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(given):
        return outputs(inner, given)
    return [joined] * len(equation.outvars)


def _axes(params: dict[str, Any]) -> Axes:
    names = params.get("axes", params.get("axis_name", ()))
    names = names if isinstance(names, tuple | list) else (names,)
    return frozenset(name for name in names if isinstance(name, str))


def _of_cond(branches: Sequence[Any], given: list[Axes]) -> list[Axes]:
    chosen, operands = given[0], given[1:]
    if chosen and any(_talks(branch, chosen) for branch in branches):
        raise PartingError
    found = [outputs(branch, operands) for branch in branches]
    return [chosen.union(*xs) for xs in zip(*found, strict=True)]


def _of_while(params: dict[str, Any], given: list[Axes]) -> list[Axes]:
    asked, done = params["cond_nconsts"], params["body_nconsts"]
    consts, carry = given[asked : asked + done], given[asked + done :]
    while True:
        (goes_on,) = outputs(params["cond_jaxpr"], [*given[:asked], *carry])
        if goes_on and (_talks(params["body_jaxpr"], goes_on) or _talks(params["cond_jaxpr"], goes_on)):
            raise PartingError
        new = [a | b | goes_on for a, b in zip(carry, outputs(params["body_jaxpr"], [*consts, *carry]), strict=True)]
        if new == carry:
            return carry
        carry = new


def _of_scan(params: dict[str, Any], given: list[Axes]) -> list[Axes]:
    if "ft_in" in params:  # from jax 0.12 on
        consts, carry, rest = map(list, params["ft_in"].update(given).unpack())
    else:
        begin = params["num_consts"]
        end = begin + params["num_carry"]
        consts, carry, rest = given[:begin], given[begin:end], given[end:]
    while True:
        made = outputs(params["jaxpr"], [*consts, *carry, *rest])
        new = [a | b for a, b in zip(carry, made, strict=False)]  # the scanned outputs come after the carry
        if new == carry:
            return [*carry, *made[len(carry) :]]
        carry = new


def _talks(closed: Any, axes: Axes) -> bool:
    """Whether there is a collective along one of these axes, at any depth."""
    collective = lambda name: name.startswith((*_AGREE, *_PART)) and name != "axis_index"  # noqa: E731
    return any(collective(e.primitive.name) and _axes(e.params) & axes for e in equations(closed.jaxpr))
