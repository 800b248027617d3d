"""A plan as text."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradcomp_jax.describe.table import size

if TYPE_CHECKING:
    from gradcomp_jax.planner import Plan, Row

WIDTH = 110
HEADING = ("", "a step", "times faster", "codec", "link", "hidden", "sent", "kept", "accuracy here")


def text(plan: "Plan") -> str:
    """The table, of at most `WIDTH` columns where names are short."""
    rows = [HEADING, *map(_cells, plan.rows)]
    first, *others, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(first), *(x.rjust(w) for x, w in zip(numbers, others, strict=True)), last])
        for name, *numbers, last in rows
    ]
    facts = dict(plan.setting) | {"recommended": f"{_said(plan.best)}: {plan.reason}"}
    if plan.outer_reason:
        facts["outer steps"] = f"{plan.best_outer}: {plan.outer_reason}" if plan.best_outer else plan.outer_reason
    facts |= {f"without {name}": reason for name, reason in plan.refused.items()}
    return "\n".join([*(line.rstrip() for line in lines), "", *_wrapped(facts)])


def _wrapped(facts: dict[str, str]) -> Iterator[str]:
    for name, fact in facts.items():
        yield from textwrap.wrap(f"{name}: {fact}", WIDTH, subsequent_indent="  ")


def _said(best: str) -> str:
    return "do not compress" if best == "none" else best


def _cells(row: "Row") -> tuple[str, ...]:
    of = row.cost
    numbers = (time(of.codec / of.every), time(of.wire / of.every + of.inside), time(of.hidden) if of.hidden else "-")
    return (
        row.name,
        time(of.step),
        f"{row.speedup:.2f}",
        *numbers,
        size(row.sent),
        size(row.kept) if row.kept >= 1000 else "-",  # counts
        row.accuracy,
    )


def time(seconds: float) -> str:
    """Seconds with a unit, such as "96.2 ms"."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def rate(bits: float) -> str:
    """Bits a second with a unit, such as "25 Gbit/s"."""
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"
