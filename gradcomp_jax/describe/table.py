"""A description as text: one line for all leaves that are alike, totals, and further facts."""

import collections
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradcomp_jax.describe import Description, Part, Row

WIDTH, GAP = 110, 2
# The smallest widths of the last column and of the first, where its names have to be cut.
LEAST, SHORTEST = 24, 16
HEADING = ("leaf", "shape and type", "sent", "ratio", "residual", "taken for")
NUMBERS = (2, 3, 4)
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def text(told: "Description") -> str:
    """The table, of at most `WIDTH` columns."""
    totals = told.totals
    rows = [_cells(path, row, count, len(told.parts) > 1) for path, row, count in grouped(told.rows)]
    of_all = (f"{totals.elements:,} numbers", size(totals.sent), ratio(totals.ratio), _kept(totals.residual), "")
    lines = [*_table([HEADING, *rows, ("total", *of_all)]), ""]
    facts = list(_facts(told))
    width = max(len(name) for name, _ in facts) + GAP
    for name, fact in facts:
        lines += textwrap.wrap(fact, WIDTH, initial_indent=name.ljust(width), subsequent_indent=" " * width)
    return "\n".join(lines)


def grouped(rows: Sequence["Row"]) -> Iterator[tuple[str, "Row", int]]:
    """Groups of rows that differ only in numbers of their paths: the path with "*", the first row, and the count."""
    groups: dict[tuple, list[Row]] = collections.defaultdict(list)
    for row in rows:
        groups[(*re.split(r"\d+", row.path), None, *row[1:])].append(row)
    for alike in groups.values():
        pieces = [re.split(r"(\d+)", row.path) for row in alike]
        common = ["*" if len(set(each)) > 1 else each[0] for each in zip(*pieces, strict=True)]
        yield "".join(common), alike[0], len(alike)


def size(number: float) -> str:
    """Bytes with a unit, such as "7.34 MB"."""
    unit = 0
    while abs(number) >= 999.5 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} B" if not unit else f"{number:#.3g}".rstrip(".") + f" {UNITS[unit]}"


def ratio(fewer: float | None) -> str:
    """How many times fewer bytes, such as "85.3x"."""
    return "-" if fewer is None else f"{fewer:,.0f}x" if fewer >= 999.5 else f"{fewer:.1f}x"


def _cells(path: str, row: "Row", count: int, several: bool) -> tuple[str, ...]:
    """The cells of rows that are alike."""
    name = row.codec.removeprefix("measured(").partition("(")[0]
    taken = f"{name}: {row.view}" if several and row.view else row.view or name
    taken = f"dense: {row.why}" if row.codec == "" else taken + (f"; {row.advice}" if row.advice else "")
    return (
        path + (f" x {count}" if count > 1 else ""),
        f"{'x'.join(map(str, row.shape)) or 'scalar'} {row.dtype}",
        size(row.sent * count),
        ratio(row.ratio),
        _kept(row.residual * count),
        taken,
    )


def _short(name: str, room: int) -> str:
    """A name; without its middle if there is no room for all of it."""
    ends = (room - 3) // 2
    return name if len(name) <= room else f"{name[:ends]}...{name[-ends:]}"


def _kept(residual: int) -> str:
    return size(residual) if residual else "-"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """The lines of rows in columns; the last column takes the remaining width, and continues on further lines."""
    others = [max(map(len, column)) for column in zip(*(row[1:-1] for row in rows), strict=True)]
    room = max(SHORTEST, WIDTH - LEAST - sum(others) - GAP * len(HEADING[1:]))
    rows = [(_short(name, room), *cells) for name, *cells in rows]
    widths = [max(len(row[0]) for row in rows), *others]
    before = sum(widths) + GAP * len(widths)
    last = max(LEAST, WIDTH - before)
    for row in rows:
        cells = [x.rjust(w) if i in NUMBERS else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=False))]
        first, *more = textwrap.wrap(row[-1], last) or [""]
        yield (" " * GAP).join([*cells, first]).rstrip()
        yield from (" " * before + line for line in more)


def _facts(told: "Description") -> Iterator[tuple[str, str]]:
    """The facts below the table, each with its name."""
    totals = told.totals
    among = ", ".join(f"{count} along {axis!r}" for axis, count in told.workers.items())
    yield "workers", f"{among}; on {told.platform}"
    for part in told.parts:
        yield "codec", f"{part.codec} by {part.way}: {part.why}"
        if len(part.kinds) > 1:
            yield "kinds of steps", _kinds(part)
    if told.every > 1:
        yield "outer steps", f"all this once in {told.every} steps: {size(totals.sent / told.every)} a step"
    yield "messages", ", ".join(f"{count} {kind}" for kind, count in totals.messages.items()) or "none"
    if totals.inside:
        yield "inside a node", f"{size(totals.inside)} from each device, beside what it sends to other nodes"
    named = {"flags": totals.flags, "packing": totals.packing}
    if rest := ", ".join(f"{name} {size(number)}" for name, number in named.items() if round(number, 3)):
        yield "of no leaf", rest
    yield "other state", f"{size(totals.state)} on each {'device' if totals.inside else 'worker'}"


def _kinds(part: "Part") -> str:
    """The bytes that a worker sends in steps of each kind, in words."""
    by_size: dict[float, list[str]] = collections.defaultdict(list)
    for name, sent in part.kinds.items():
        by_size[sent].append(f"{name} (the table)" if name == part.kind else name)
    return "; ".join(f"{' or '.join(names)}: {size(sent)}" for sent, names in by_size.items())
