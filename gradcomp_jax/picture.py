"""A picture of a compiled step, which shows the collectives with work beside them. Needs matplotlib."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's colors, which differ for all kinds of color vision.
COLORS = {"between": "#d55e00", "inside": "#0072b2", "matrix products": "#1a1a1a", "other work": "#b0b0b0"}
ROW = 0.28  # inches
LABELLED = 16  # up to so many collectives of a link have a row and a label each


def picture(report: Any) -> Figure:
    """Draws the order of a compiled program from left to right; it shows no times, because the program was not run.

    Args:
      report: a report from `gradcomp_jax.certify.certify`.

    Returns:
      A figure: the work, and below it each link's collectives, without those in loops, branches and fusions.
    """
    told = [(x, x.span) for x in report.sent if x.span]
    at = {place: x for x, place in enumerate(sorted({*report.work, *(place for _, s in told for place in s[:2])}))}
    bars = {link: [(x, at[s.start], at[s.done]) for x, s in told if x.link == link] for link in report.totals}
    rows = {link: _rows([(start, done) for _, start, done in those]) for link, those in bars.items()}
    count = 1 + sum(max(those, default=-1) + 1 for those in rows.values())
    figure = Figure((11, 1.6 + ROW * count), layout="constrained")
    axes = figure.subplots()
    for name, multiplies in (("other work", False), ("matrix products", True)):
        places = [at[place] for place, is_product in report.work.items() if is_product == multiplies]
        axes.bar(places, 0.8, width=1, align="edge", bottom=-0.4, color=COLORS[name])
    names, row = {0: "work"}, 1
    for link, those in bars.items():
        if those:
            names[row] = link
            _draw(axes, those, [row + x for x in rows[link]])
            row += max(rows[link]) + 1
    axes.set_yticks(list(names), list(names.values()))
    axes.set(ylim=(row - 0.4, -0.6), xlim=(0, len(at)), xlabel="operations, in the order of the compiled program")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    untold = len(report.sent) - len(told)
    more = f"; {untold} in loops, branches or fusions are not drawn" if untold else ""
    axes.set_title(f"{report.target}: {_overlapped(report)}{more}", loc="left", fontsize=10)
    keys = [Patch(color=color, label=name) for name, color in COLORS.items()]
    keys.append(Patch(facecolor="none", edgecolor="#666666", label="synchronous"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    return figure


def _rows(spans: list[tuple[int, int]]) -> list[int]:
    """The row of each span: the first row that is free there; if there are few spans, a row each."""
    if len(spans) <= LABELLED:
        return list(range(len(spans)))
    ends: list[int] = []
    found = []
    for start, done in spans:
        row = next((row for row, end in enumerate(ends) if end < start), len(ends))
        ends[row : row + 1] = [done]
        found.append(row)
    return found


def _draw(axes: Axes, bars: list[tuple[Any, int, int]], rows: list[int]) -> None:
    for (x, start, done), row in zip(bars, rows, strict=True):
        color = COLORS[x.link]
        face, edge = ("none", color) if start == done else (color, "white")
        axes.barh(row, done + 1 - start, left=start, height=0.7, facecolor=face, edgecolor=edge, align="center")
        if len(bars) <= LABELLED:
            text = f" {x.collective.kind}, {x.collective.ring_bytes / 1e6:,.3g} MB "
            left = done < 0.8 * axes.dataLim.xmax
            axes.text(done + 1 if left else start, row, text, va="center", ha="left" if left else "right", fontsize=7)


def _overlapped(report: Any) -> str:
    between = [x for x in report.sent if x.link == "between"]
    beside = sum(bool(x.span and x.span.work) for x in between)
    return f"{beside} of {len(between)} collectives between slices or nodes have work beside them"
