"""Figures over several runs, for files and for pages.

A codec has one hue in all figures. With its settings it has one shade of that hue and one marker in all figures of a
report; at its defaults it has the hue itself. Black is no compression. Runs that differ only in the seed look alike.
"""

import io
import math
import pathlib
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from experiments.link import Row
from experiments.records import Record, Run

# Okabe and Ito's colors, which differ for all kinds of color vision. Their yellow is left out: it is too pale for a
# line. More colors are for further codecs, whose markers differ too.
HUES = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#7a3e1d", "#8f8f8f", "#6a3d9a", "#b22234", "#5a7d00", "#b8860b"),
    "#2f4b7c",
)
# The codecs of these hues, in their order; the last hue is for all codecs that are not listed.
CODECS = (
    *("powersgd", "qsgd", "gradiveq", "topk", "signnorm", "onebit"),
    *("accordion", "adaptive", "randomk", "randomblock", "cast", "float4", "statistical"),
)
# Methods with outer steps, whose colors are codecs' that are seldom beside them.
METHODS = dict(zip(("diloco", "sparseloco", "muloco", "streaming_diloco"), HUES[1:5], strict=True))
HUE = {"none": "#1a1a1a", "dense": "#1a1a1a", **dict(zip(CODECS, HUES, strict=False)), **METHODS}
MARKERS = "osD^vPX<>p"
MEGABYTES = "MB sent by one worker (10⁶ bytes, log scale)"
# The labels of the values that `curves` draws.
LABELS = {
    "accuracy": "test accuracy",
    "loss": "training loss (log scale)",
    "error": "relative error of compression",
    "residual_norm": "norm of the residual (log scale)",
}
# Tol's colors; no codec has one of these.
WORK = {
    "compile": "#bbbbbb",
    "input": "#ddcc77",
    "step": "#332288",
    "evaluate": "#aa4499",
    "checkpoint": "#999933",
}
# The parts of an exchange; also Tol's.
EXCHANGE = {"encode": "#4477aa", "wire": "#bbbbbb", "decode": "#66ccee"}
ACCURACY_SPAN = 0.3  # the span of accuracies that is shown, so that differences at the end can be seen
POINTS = 80  # the most points of a curve of the training loss
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a label is a "$"
}


Point = tuple[float, float]


class Style(NamedTuple):
    """The look of the runs of a codec with its settings."""

    color: str
    marker: str


class Series(NamedTuple):
    """The runs of a codec with its settings.

    Attributes:
      name: the name for legends.
      style: the style of its lines and points.
      runs: one run for each seed, in the order of the seeds.
    """

    name: str
    style: Style
    runs: Sequence[Run]


def styles(labels: Mapping[str, str]) -> dict[str, Style]:
    """A style for each label, which is a codec with its settings; `labels` maps each to the codec's name."""
    found = {}
    for (label, codec), marker in zip(labels.items(), MARKERS * len(labels), strict=False):
        shades = _shades([other for other in labels if labels[other] == codec], codec)
        found[label] = Style(_shade(HUE.get(codec, HUES[-1]), shades[label]), marker)
    return found


def _shades(labels: Sequence[str], default: str) -> dict[str, float]:
    """Amounts for `_shade` by label, rising in their order; 0 for `default` and for a single label."""
    if default not in labels:
        return dict(zip(labels, np.linspace(-0.45, 0.5, len(labels)) if len(labels) > 1 else [0.0], strict=True))
    before = labels.index(default)
    lighter, darker = np.linspace(-0.45, 0, before + 1), np.linspace(0, 0.5, len(labels) - before)
    return dict(zip(labels, [*lighter[:-1], *darker], strict=True))


def _shade(color: str, amount: float) -> str:
    """The color, mixed with white if the amount is below 0, otherwise with black."""
    rgb = np.array(to_rgb(color))
    return to_hex(tuple(rgb + (1 - rgb) * -amount if amount < 0 else rgb * (1 - amount)))


# Drawing


@matplotlib.rc_context(STYLE)
def final_accuracy(series: Sequence[Series], baseline: Series | None) -> Figure:
    """Test accuracy at the end against all bytes sent: a point for each codec, with its seeds around it.

    Args:
      series: the series to draw.
      baseline: the series to compare the others with, or None; it has a line at its mean and a band over its seeds.
    """
    figure, axes = _panel()
    labels: list[tuple[Point, str, str]] = []
    taken: list[Point] = []
    for one, name in zip(series, _wrapped(series), strict=True):
        x = [run.test[-1]["bytes"] / 1e6 for run in one.runs]
        y = [run.accuracy for run in one.runs]
        if one is baseline:
            axes.axhspan(min(y), max(y), color=one.style.color, alpha=0.12, linewidth=0)
            axes.axhline(statistics.fmean(y), color=one.style.color, linewidth=0.8, linestyle="--")
        if len(y) > 1:
            axes.scatter(x, y, s=12, color=one.style.color, marker=one.style.marker, alpha=0.5, linewidth=0)
        mean = (statistics.fmean(x), statistics.fmean(y))
        axes.scatter(*mean, s=55, color=one.style.color, marker=one.style.marker, edgecolor="white", zorder=3)
        labels.append((mean, name, one.style.color))
        taken += [mean, *zip(x, y, strict=True)]
    axes.margins(0.2, 0.15)
    axes.set(xlabel=MEGABYTES, ylabel="test accuracy at the end")
    _log(axes, "x")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _label_points(figure, axes, labels, taken)
    return figure


@matplotlib.rc_context(STYLE)
def curves(series: Sequence[Series], value: str, against: str) -> Figure:
    """Lines over the course of the runs, one for each run.

    Args:
      series: the series to draw.
      value: "accuracy", on the test split; "loss", on the training split; "error" or "residual_norm", for runs that
        have it.
      against: "step" or "bytes".
    """
    names = _wrapped(series)
    columns = 3 if max(map(len, names)) < 24 else 2
    lines = 1 + max(name.count("\n") for name in names)
    figure, axes = _panel(height=3.6 + 0.16 * lines * math.ceil(len(series) / columns))
    shown = [[run for run in one.runs if told(run, value)] for one in series]
    for number, (one, name) in enumerate(zip(series, names, strict=True)):
        for place, run in enumerate(shown[number]):
            points = told(run, value) if value == "accuracy" else _means(told(run, value), POINTS, value)
            (line,) = _line(axes, points, value, against, one.style, thin=len(one.runs) > 1)
            line.set_gid(f"run{place}-codec{number}")
            line.set_label("_" if place else name)  # "_" is left out of the legend
    if value == "accuracy":
        _cut(axes)
    _scales(axes, value, against)
    figure.legend(loc="outside lower center", ncols=min(columns, sum(map(bool, shown))), fontsize=8)
    return figure


def told(run: Run, value: str) -> list[Record]:
    """The records of a run that have a value for `curves`; none for a residual that is always zero."""
    found = [record for record in (run.test if value == "accuracy" else run.train) if value in record]
    return [] if value == "residual_norm" and not any(record[value] for record in found) else found


@matplotlib.rc_context(STYLE)
def time_split(series: Sequence[Series]) -> Figure:
    """The seconds of each kind of work, as a bar for each codec; means over its seeds."""
    names = _wrapped(series)
    figure, axes = _panel(height=1.3 + 0.15 * len(series) + 0.15 * sum(1 + name.count("\n") for name in names))
    times = [[run.end["seconds"] for run in one.runs if run.end] for one in series]
    kinds = dict.fromkeys([*WORK, *(kind for alike in times for seconds in alike for kind in seconds)])
    left = np.zeros(len(series))
    for kind in kinds:
        means = [statistics.fmean(seconds.get(kind, 0.0) for seconds in alike) for alike in times]
        if any(means):
            axes.barh(range(len(series)), means, left=left, height=0.65, color=WORK.get(kind, "#333333"), label=kind)
            left += means
    for row, total in enumerate(left):
        axes.annotate(
            f"{total:,.0f} s" if total >= 100 else f"{total:.1f} s",
            (total, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(series)), names)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="seconds of a whole run")
    figure.legend(loc="outside lower center", ncols=len(WORK), fontsize=8, handlelength=1, columnspacing=1)
    return figure


@matplotlib.rc_context(STYLE)
def accuracy(runs: Sequence[Run], title: str, path: pathlib.Path) -> None:
    """Writes a figure of test accuracy against steps, and against the bytes that one worker sent, as a PNG."""
    looks = styles({run.name: run.header["codec"] for run in runs})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_step, by_bytes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        (line,) = _line(by_step, run.test, "accuracy", "step", looks[run.name], thin=False)
        line.set_label(f"{run.called} ({run.test[-1]['bytes'] / 1e6:.3g} MB in all)")
        _line(by_bytes, run.test, "accuracy", "bytes", looks[run.name], thin=False)
    for axes, against in ((by_step, "step"), (by_bytes, "bytes")):
        _cut(axes)
        _scales(axes, "accuracy", against)
    by_bytes.set_ylabel("")
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


@matplotlib.rc_context(STYLE)
def losses(rows: Sequence[Row], title: str, path: pathlib.Path) -> None:
    """Writes a figure of validation loss against tokens, bytes, and simulated time, as a PNG."""
    looks = styles({row.name: row.method for row in rows})
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for row in rows:
        look: dict[str, Any] = {"color": looks[row.name].color, "marker": looks[row.name].marker, "markersize": 4}
        for place, run in enumerate(row.runs):
            size = run.header["batch_size"]
            columns = [(x["step"] * size / 1e6, x["bytes"] / 1e6, row.minutes(x), x["loss"]) for x in run.test]
            sent = [column for column in columns if column[1]]  # nothing before the first exchange
            for axis, axes in enumerate(panels):
                shown = sent if axis == 1 else columns
                (line,) = axes.plot([c[axis] for c in shown], [c[3] for c in shown], **look, linewidth=1.2, alpha=0.85)
                sum_mb = run.end["bytes"] / 1e6
                in_all = f"{sum_mb:,.0f}" if sum_mb >= 100 else f"{sum_mb:.3g}"
                line.set_label("_" if axis or place else f"{row.name} ({in_all} MB in all)")
    labels = "millions of tokens", MEGABYTES, "simulated minutes (a model, log scale)"
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel=label)
    panels[0].set(ylabel="validation loss, nats a character")
    for axes in panels[1:]:
        _log(axes, "x")
    figure.legend(loc="outside lower center", ncols=min(3, len(rows)), fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


class Exchange(NamedTuple):
    """The parts of an exchange by a codec, in ms, and the least time of its bytes; NaN if that is not known."""

    encode: float
    wire: float
    decode: float
    floor: float


class Exchanges(NamedTuple):
    """Exchanges of one gradient over one kind of link.

    Attributes:
      title: what was measured.
      bars: by codec.
      dense: the ms of the platform's own mean.
    """

    title: str
    bars: Mapping[str, Exchange]
    dense: float


@matplotlib.rc_context(STYLE)
def exchanges(panels: Sequence[Exchanges], path: pathlib.Path) -> None:
    """Writes a figure of the ms of exchanges, one panel a gradient and link, as a PNG."""
    heights = [1.0 + 0.28 * len(panel.bars) for panel in panels]
    figure = Figure(figsize=(7.5, sum(heights) + 0.5), layout="constrained")
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(every, panels, strict=True):
        left = np.zeros(len(panel.bars))
        for part, color in EXCHANGE.items():
            widths = np.array([getattr(bar, part) for bar in panel.bars.values()])
            axes.barh(range(len(left)), widths, left=left, height=0.65, color=color, label=part)
            left += widths
        rows = np.arange(len(left))
        floors = [bar.floor for bar in panel.bars.values()]
        axes.vlines(floors, rows - 0.45, rows + 0.45, color="#1a1a1a", linewidth=1.5, label="floor")
        axes.axvline(panel.dense, color="#1a1a1a", linestyle="--", linewidth=0.9, label="psum")
        for row, total in enumerate(left):
            axes.annotate(f"{total:,.0f}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(rows, [textwrap.fill(name, 30) for name in panel.bars])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.set(title=panel.title, xlabel="ms of an exchange")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(height: float = 4.1) -> tuple[Figure, Axes]:
    """A figure with one panel, narrow, so that its text can be read on a phone too."""
    figure = Figure(figsize=(5.4, height), layout="constrained")
    return figure, figure.subplots()


def _line(axes: Axes, points: Sequence[Mapping[str, Any]], value: str, against: str, style: Style, thin: bool) -> Any:
    x = [point[against] / (1e6 if against == "bytes" else 1) for point in points]
    look: dict[str, Any] = {"color": style.color, "marker": style.marker, "markersize": 4.5, "alpha": 0.85}
    # The lines of two equally good codecs coincide; a few markers keep both in sight.
    every = max(1, math.ceil(len(x) / 12))
    return axes.plot(x, [point[value] for point in points], **look, linewidth=0.8 if thin else 1.5, markevery=every)


def _wrapped(series: Sequence[Series]) -> list[str]:
    """The names, wrapped to lines that fit a legend."""
    return [textwrap.fill(one.name, 30) for one in series]


def _cut(axes: Axes) -> None:
    """Cuts off the part far below the results at the end, so that their differences can be seen."""
    points = [np.column_stack(line.get_data(orig=False)) for line in axes.lines]
    low, high = axes.get_ylim()
    low = max(low, min(high - ACCURACY_SPAN, min(line[-1, 1] for line in points) - 0.05))
    shown = np.concatenate(points)
    axes.set(ylim=(low, high), xlim=(0.8 * shown[shown[:, 1] >= low, 0].min(), None))


def _scales(axes: Axes, value: str, against: str) -> None:
    axes.set(ylabel=LABELS[value])
    if value == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    elif value == "error":
        axes.set(ylim=(0, None))
    else:
        _log(axes, "y")
    if against == "step":
        axes.set(xlabel="training steps", xlim=(0, None))
    else:
        axes.set(xlabel=MEGABYTES)
        _log(axes, "x")


def _log(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers, as many as fit."""
    scale, axis = (axes.set_xscale, axes.xaxis) if which == "x" else (axes.set_yscale, axes.yaxis)
    scale("log")
    low, high = axis.get_view_interval()
    if not 0 < low < high:  # no drawn number is above 0
        scale("linear")
        return
    decades = math.log10(high / low)
    axis.set_major_locator(
        AutoLocator() if decades < 0.7 else LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=20)
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _means(records: Sequence[Mapping[str, Any]], most: int, value: str = "loss") -> list[dict[str, float]]:
    """At most `most` points; each is a mean over as many consecutive records, at the last one's step and bytes."""
    size = max(1, math.ceil(len(records) / most))
    parts = [records[begin : begin + size] for begin in range(0, len(records), size)]
    return [
        {**{key: part[-1][key] for key in ("step", "bytes")}, value: statistics.fmean(r[value] for r in part)}
        for part in parts
    ]


def _label_points(
    figure: Figure, axes: Axes, labels: Sequence[tuple[Point, str, str]], points: Sequence[Point]
) -> None:
    """Writes each label, (point, text, color), beside its point, where it covers no other label and no point."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # fixes the places
    frame, taken = axes.get_window_extent(), []
    for x, y in axes.transData.transform(points):
        taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    for point, text, color in labels:
        for distance, angle in (
            (distance, angle) for distance in (7, 14, 24, 36, 50, 70) for angle in range(0, 360, 30)
        ):
            dx, dy = (distance * f(math.radians(angle)) for f in (math.cos, math.sin))
            note = axes.annotate(
                text,
                point,
                (dx, dy),
                textcoords="offset points",
                ha="center" if abs(dx) < 1 else "left" if dx > 0 else "right",
                va="center" if abs(dy) < 1 else "bottom" if dy > 0 else "top",
                fontsize=8,
                color="#333333",
                bbox={"facecolor": "white", "alpha": 0.75, "pad": 0.5, "linewidth": 0},
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5} if distance > 7 else None,
            )
            note.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(note).padded(1)  # without the arrow
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


# Writing


@matplotlib.rc_context(STYLE)
def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page, the same each time; `name` makes its ids differ from others'."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    opening, rest = re.split(r"(?<=>)\n", buffer.getvalue().partition("<svg")[2], maxsplit=1)
    opening = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", opening)
    rest = re.sub(r'(\bid="|\burl\(#|\bhref="#)', rf"\g<1>{name}-", rest)
    return f"<svg{opening}\n{rest}"
