"""The collectives of a compiled program, read from the text of its HLO, to check declared bytes."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from gradcomp_jax.arguments import shown


class Collective(NamedTuple):
    """One collective operation of a compiled program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      dtype: the operands' HLO types, such as "f32"; several are joined with "+".
      operand_bytes: the bytes of this worker's operands, over all runs of the loops around the collective.
      workers: the number of workers that take part.
      branch: the branches of conditionals around the collective, outermost first, such as "cond.3/1"; "" if it always
        runs.
      ring_bytes: the bytes that one worker sends for it, by the ring laws.
      operands: the number of its operand arrays. CPUs send each one in a message of its own, and give all-to-all one
        for each worker.
      groups: the groups of devices that take part together; empty between the slices of a TPU, where one chip of each
        slice takes part.
      name: the instruction's name.
    """

    kind: str
    dtype: str
    operand_bytes: int
    workers: int
    branch: str
    ring_bytes: float
    operands: int = 1
    groups: tuple[tuple[int, ...], ...] = ()
    name: str = ""

    def crosses(self, devices: int) -> bool:
        """Whether the collective goes between slices or nodes of so many devices, numbered one after another."""
        return not self.groups or any(len({device // devices for device in group}) > 1 for group in self.groups)


# For each kind, (n workers, p bytes of operands) -> the bytes that one worker sends.
RING_LAW = {
    "all-reduce": lambda n, p: 2 * (n - 1) * p / n,
    "all-gather": lambda n, p: (n - 1) * p,
    "reduce-scatter": lambda n, p: (n - 1) * p / n,
    "all-to-all": lambda n, p: (n - 1) * p / n,
    "collective-permute": lambda n, p: p if n > 1 else 0,
}
_UNKNOWN = ("collective-broadcast", "ragged-all-to-all", "send", "recv")
# The collectives between the slices of a TPU, by the names that its runtime gives them.
_BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "ALL_TO_ALL": "all-to-all",
    "REDUCE_SCATTER": "reduce-scatter",
    "ONE_TO_ONE": "collective-permute",
}
# Marks a fusion of a chain on TPUs; each fusion of the chain contains the collective again.
_IN_CHAIN = "chain_id="
_CHAIN_BEGINS = "AsyncCollectiveStart"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"^[a-z]+(\d+)")


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes, as text


def collective_bytes(compiled: Any) -> list[Collective]:
    """Every collective of a compiled program: its type, its bytes, and the branch around it.

    Args:
      compiled: the result of `jax.jit(f).lower(...).compile()`, or the text of its HLO module.

    Returns:
      The collectives, in the order of the program. A collective in a loop counts once for each trip.

    Raises:
      ValueError: a collective runs in a loop with an unknown number of trips, or it cannot be read; or the text is not
        compiled HLO.

    >>> import jax, jax.numpy as jnp
    >>> import gradcomp_jax as gcj
    >>> program = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    >>> gcj.collective_bytes(program)
    []
    """
    if not isinstance(compiled, str) and not hasattr(compiled, "as_text"):
        raise ValueError(f"compiled={shown(compiled)} must be a compiled program, such as step.lower(...).compile()")
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    devices = 1
    for key in ("replica_count", "num_partitions"):
        if found := re.search(rf"{key}=(\d+)", text.split("\n", 1)[0]):
            devices *= int(found[1])
    computations, entry = _parse(text)
    if not entry:
        raise ValueError("this is not the text of an HLO module: pass the result of lower(...).compile()")
    return _walk(computations, entry, "", 1, devices)


class Span(NamedTuple):
    """The start and the end of a collective, in a program's order.

    Attributes:
      start: the place of its first instruction in the program.
      done: the place of its last instruction; the same as `start` if the collective is synchronous.
      work: the number of fusions, products and library calls between these places.
    """

    start: int
    done: int
    work: int


class Schedule(NamedTuple):
    """The order of a compiled program, where each place is a number; called computations are not looked into.

    Attributes:
      spans: the span of each instruction, or of the pair that starts and ends it, by the name of the first.
      work: the places of fusions, products and library calls; for each place, whether it multiplies matrices.
    """

    spans: dict[str, Span]
    work: dict[int, bool]


_WORK = ("fusion", "custom-call", "dot", "convolution", "while", "conditional", "call", "sort")
_PRODUCTS = ("dot", "convolution")
_PRODUCT_CALLS = re.compile(r'custom_call_target="[^"]*(gemm|matmul|conv)', re.I)


def schedule(compiled: Any) -> Schedule:
    """The order of a compiled program's own instructions.

    Args:
      compiled: the program, like for `collective_bytes`.
    """
    computations, entry = _parse(compiled if isinstance(compiled, str) else compiled.as_text())
    instructions = computations.get(entry, [])
    work = {place: _multiplies(i, computations) for place, i in enumerate(instructions) if i.op in _WORK}
    found, open_since = {}, {}
    for place, i in enumerate(instructions):
        if i.op.endswith("-start") or i.op == "send":
            open_since[i.name] = place
        elif i.op.endswith("-done"):
            operand = re.match(r"(?:\([^()]*\) )?%?([\w.\-]+)", i.rest)
            if operand and operand[1] in open_since:
                start = open_since.pop(operand[1])
                done = start if '"is_sync":true' in instructions[start].rest else place
                found[operand[1]] = Span(start, done, sum(start < x < done for x in work))
        else:
            found[i.name] = Span(place, place, 0)
    return Schedule(found, work)


def _multiplies(i: _Instruction, computations: dict[str, list[_Instruction]]) -> bool:
    """Whether an instruction multiplies matrices: by itself, in a library, or in a computation that it calls."""
    if i.op in _PRODUCTS or _PRODUCT_CALLS.search(i.rest):
        return True
    called = computations.get(_attribute(i.rest, "to_apply") or _attribute(i.rest, "calls"), [])
    return any(_multiplies(inner, computations) for inner in called)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif body := _INSTRUCTION.match(line):
            computations[current].append(_Instruction(*body.groups()))
    return computations, entry


def _walk(computations, name: str, branch: str, times: int, devices: int) -> list[Collective]:
    """The collectives of computation `name` and of all computations that it calls."""
    found = []
    shapes = {i.name: i.shape for i in computations[name]}
    begins = any(_CHAIN_BEGINS in i.rest for i in computations[name])
    for i in computations[name]:
        kind = i.op.removesuffix("-start")
        if i.op == "send" and "_xla_megascale_transfer_type" in i.rest:
            found.append(_between_slices(i, shapes, branch, times))
        elif _repeats(i, kind, begins):
            continue
        elif kind in RING_LAW:
            if times < 0:
                raise ValueError(f"{i.name} runs in a loop of unknown length: its bytes cannot be told")
            found.append(_collective(i, kind, shapes, branch, times, devices))
        elif i.op == "conditional":
            for k, target in enumerate(_branches(i.rest)):
                inside = f"{branch}/{i.name}/{k}".lstrip("/")
                found += _walk(computations, target, inside, times, devices)
        elif i.op == "while":
            trips = _trips(i, computations[name], computations)
            for part, more in (("body", 0), ("condition", 1)):  # the condition is tested once more
                inner = times * (trips + more) if trips is not None and times >= 0 else -1
                found += _walk(computations, _attribute(i.rest, part), branch, inner, devices)
        elif i.op.startswith(_UNKNOWN):
            raise ValueError(f"{i.name} is a {i.op}, whose bytes are not known")
        elif i.op in ("call", "fusion", "async-start"):
            target = _attribute(i.rest, "to_apply") or _attribute(i.rest, "calls")
            found += _walk(computations, target, branch, times, devices)
    return found


def _trips(loop: _Instruction, around: list[_Instruction], computations: dict[str, list[_Instruction]]) -> int | None:
    """The number of a loop's trips, as the compiler states it; else only if the loop counts from 0 to a constant."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(said[1])
    test, body = (computations[_attribute(loop.rest, part)] for part in ("condition", "body"))
    compared = re.match(r"%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", test[-1].rest)
    if test[-1].op != "compare" or not compared:
        return None
    counter, limit = (_source(name, test) for name in compared.groups())
    index = counter and re.search(r"index=(\d+)", counter.rest)
    start = _source(_operands(loop)[0], around)
    if not limit or not index or not start or start.op != "tuple" or body[-1].op != "tuple":
        return None
    k = int(index[1])
    first, step = _source(_operands(start)[k], around), _source(_operands(body[-1])[k], body)
    if not first or not step or step.op != "add":
        return None
    before, by = (_source(name, body) for name in _operands(step))
    if not before or f"index={k}" not in before.rest or [_constant(first), by and _constant(by)] != [0, 1]:
        return None
    return _constant(limit)


def _source(name: str, instructions: list[_Instruction]) -> _Instruction | None:
    """The instruction of that name; for a copy, the instruction that it copies."""
    found = next((i for i in instructions if i.name == name), None)
    return _source(_operands(found)[0], instructions) if found and found.op in ("copy", "bitcast") else found


def _operands(i: _Instruction) -> list[str]:
    return re.findall(r"%?([\w.\-]+)\s*(?:,|$)", _arguments(i.rest))


def _constant(i: _Instruction) -> int | None:
    found = re.match(r"(\d+)\)", i.rest) if i.op == "constant" else None
    return int(found[1]) if found else None


def _collective(i: _Instruction, kind: str, shapes: dict[str, str], branch: str, times: int, devices: int):
    operands = _operands(i)
    missing = [operand for operand in operands if operand not in shapes]
    parts = [part for operand in operands if operand in shapes for part in _SHAPE.findall(shapes[operand])]
    if missing or not parts:
        raise ValueError(f"cannot read the operands of {i.name}: {_arguments(i.rest)!r}")
    size = times * sum(_shape_bytes(*part) for part in parts)
    groups = _groups(i.rest, devices) if kind != "collective-permute" else (tuple(range(devices)),)
    dtype = "+".join(sorted({part[0] for part in parts}))
    return Collective(
        kind, dtype, size, len(groups[0]), branch, RING_LAW[kind](len(groups[0]), size), len(operands), groups, i.name
    )


def _repeats(i: _Instruction, kind: str, begins: bool) -> bool:
    """Whether an instruction belongs to a collective that is counted elsewhere: a receiving end, or a later link."""
    receives = i.op in ("send-done", "recv", "recv-done") and "xla_megascale" in i.rest
    return receives or (kind in RING_LAW and _IN_CHAIN in i.rest and not begins)


def _between_slices(i: _Instruction, shapes: dict[str, str], branch: str, times: int) -> Collective:
    """The collective in which a chip sends to its peers in the other slices of a TPU."""
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
    peers = re.search(r'_xla_megascale_target="?\{+([\d,]+|\d+->\d+)\}', i.rest)
    operand = re.match(r"%?([\w.\-]+)", i.rest)
    if not named or named[1] not in _BETWEEN_SLICES or not peers or not operand or operand[1] not in shapes:
        raise ValueError(f"cannot read the bytes of {i.name} between slices: {i.rest[:200]!r}")
    if times < 0:
        raise ValueError(f"{i.name} runs in a loop of unknown length: its bytes cannot be told")
    kind, n = _BETWEEN_SLICES[named[1]], len(re.split(",|->", peers[1]))
    parts = _SHAPE.findall(shapes[operand[1]])
    size = times * sum(_shape_bytes(*part) for part in parts)
    return Collective(kind, parts[0][0], size, n, branch, RING_LAW[kind](n, size), name=i.name)


def _arguments(rest: str) -> str:
    """The text before the parenthesis that closes an instruction's operands, without braces and shapes."""
    depth = 1
    for end, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return re.sub(r"\{[^{}]*\}|\[[\d,]*\]", "", rest[:end])
    return rest


def _branches(rest: str) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in several[1].split(",")]
    # A predicate of type bool; index 0 is the false branch, like in lax.cond and lax.switch.
    return [_attribute(rest, "false_computation"), _attribute(rest, "true_computation")]


def _attribute(rest: str, key: str) -> str:
    found = re.search(rf"{key}=%?([\w.\-]+)", rest)
    return found[1] if found else ""


def _shape_bytes(dtype: str, dims: str) -> int:
    bits = _BITS.match(dtype)
    # pred is a byte; a type of less than a byte takes a whole one on the wire.
    size = max(1, int(bits[1]) // 8) if bits else 1
    return size * math.prod(int(d) for d in dims.split(",") if d)


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices of each group, from the three ways to write them: lists, an iota, or axes of a mesh."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _as_groups(_numbers(iota[3]), _numbers(iota[4] or ""), int(iota[2]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=[^{]*)?\s*\{([\w',\s\\]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"(\w+)\W*=(\d+)", mesh[1])}
        inside = re.findall(r"\w+", mesh[2])
        names = list(sizes)
        order = [names.index(axis) for axis in [*(x for x in names if x not in inside), *inside]]
        return _as_groups(list(sizes.values()), order, math.prod(sizes[axis] for axis in inside))
    if explicit := re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\s*\{[\d,]+\})*)\}", rest):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", explicit[1]))
    if (other := re.search(r"replica_groups=(\S+)", rest)) and not other[1].startswith("{}"):
        raise ValueError(f"cannot read replica_groups={other[1]}")
    return (tuple(range(devices)),)


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _as_groups(shape: list[int], order: list[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Devices in groups of one size: numbered in C order of a shape, then read with its axes in another order."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    numbers = numbers.transpose(order) if order else numbers
    return tuple(tuple(int(x) for x in group) for group in numbers.reshape(-1, size))
