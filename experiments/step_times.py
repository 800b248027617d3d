"""Records of `experiments.end_to_end`: milliseconds a step by framework and method, as a table and as a figure.

A file has a header, which tells what was measured and on what, and a line for each case: "framework", "method" with its
settings, "ms" of a step in each round, "wire_bytes" that a worker sends in a step by wire_bits (ours alone), and
"counted_bytes" by the counter of its interface, if one was named.
"""

import glob
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from experiments import figures
from experiments.records import RecordsError

Record = dict[str, Any]
LOCAL = "local"
NAMES = {"jax": "gradcomp_jax", "torch": "PyTorch"}
# PyTorch's cases are named like ours in the records.
TORCH = {LOCAL: LOCAL, "ddp": "DDP", "powersgd": "DDP, powerSGD_hook"}
DENSE = ("none", "ddp")


class Run(NamedTuple):
    """A measurement of one model on one set of hosts.

    Attributes:
      header: what was measured, and on what.
      cases: the lines of its cases.
    """

    header: Record
    cases: list[Record]

    def middle(self, case: Record) -> float:
        """The median milliseconds of a step."""
        return statistics.median(case["ms"])

    def added(self, case: Record) -> float:
        """The milliseconds that a case's step takes beyond the local step of its framework; medians."""
        local = next(x for x in self.cases if (x["framework"], x["method"]) == (case["framework"], LOCAL))
        return self.middle(case) - self.middle(local)

    @property
    def title(self) -> str:
        """What was measured, in words."""
        head = self.header
        links = f" at {head['mbit']:g} Mbit/s" if head["mbit"] else ""
        cores = "a core" if head["cores"] == 1 else f"{head['cores']} cores"
        hosts = (
            f"{head['hosts']} hosts of {cores}{links}"
            if head["hosts"] > 1
            else f"{head['workers']} workers, one process"
        )
        return f"{head['model']}, {head['parameters']:,} parameters, batch {head['batch']}, {hosts}"


def case(framework: str, method: str) -> Record:
    """A case without figures."""
    return {"framework": framework, "method": method, "ms": [], "counted_bytes": [], "wire_bytes": None}


def add(record: Record, seconds: float, counted: float, sent: float | None) -> None:
    """Adds a round's figures, all of one step: seconds, bytes of the interface, bytes by wire_bits."""
    record["ms"].append(round(1e3 * seconds, 3))
    record["counted_bytes"].append(round(counted))
    record["wire_bytes"] = None if sent is None else round(sent)


def without_first(record: Record) -> Record:
    """The case without the figures of its first round."""
    return record | {key: record[key][1:] for key in ("ms", "counted_bytes")}


def write(run: Run, path: pathlib.Path) -> None:
    """Writes the records.

    Raises:
      RecordsError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in [run.header, *run.cases]), encoding="utf-8")
    except OSError as error:
        raise RecordsError(f"cannot write {path}: {error.strerror}") from error


def read(patterns: Sequence[str]) -> list[Run]:
    """The records in files, given by patterns.

    Raises:
      RecordsError: there are none, or a file is something else.
    """
    paths = [pathlib.Path(path) for pattern in patterns for path in sorted(glob.glob(pattern))]
    if not paths:
        raise RecordsError(f"--runs={','.join(patterns)} names no file")
    runs = []
    for path in paths:
        try:
            header, *cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if header["kind"] != "end_to_end":
                raise ValueError(f"its kind is {header['kind']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordsError(f"{path} is not the records of experiments.end_to_end: {error}") from error
        runs.append(Run(header, cases))
    return runs


def called(case: Record) -> str:
    """The name of a case for readers."""
    return TORCH[case["method"]] if case["framework"] == "torch" else case["method"]


def table(run: Run) -> Table:
    """A table with a line for each case."""
    out = Table(title=f"{run.title}, medians of {run.header['rounds']}")
    out.add_column("")
    out.add_column("method", overflow="fold")
    for heading in ("ms a step", "least to greatest", "added to local", "MB by wire_bits", "MB by counter"):
        out.add_column(heading, justify="right")
    for case in run.cases:
        sent, counted = case["wire_bytes"], statistics.median(case["counted_bytes"])
        out.add_row(
            NAMES[case["framework"]],
            called(case),
            f"{run.middle(case):.1f}",
            f"{min(case['ms']):.1f} to {max(case['ms']):.1f}",
            "" if case["method"] == LOCAL else f"{run.added(case):.1f}",
            "" if sent is None else f"{sent / 1e6:.3f}",
            f"{counted / 1e6:.3f}" if counted else "",
        )
    return out


def notes(run: Run) -> list[str]:
    """What PowerSGD adds here and in PyTorch, in a sentence; none if one of them was not measured."""
    both = {
        framework: next(
            (x for x in run.cases if x["framework"] == framework and x["method"].startswith("powersgd")), None
        )
        for framework in NAMES
    }
    ours, theirs = both["jax"], both["torch"]
    if ours is None or theirs is None:
        return []
    added, theirs_added = run.added(ours), run.added(theirs)
    share = f": {added / theirs_added:.2f} of that" if theirs_added > 0 else ""
    return [f"PowerSGD adds {added:.1f} ms to a local step here, and {theirs_added:.1f} ms in PyTorch{share}."]


@matplotlib.rc_context(figures.STYLE)
def figure(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Writes a PNG with a panel for each run: a step's local part, and what each method adds to it."""
    rows = sum(len(run.cases) for run in runs)
    sizes = [len(run.cases) for run in runs]
    drawn = Figure(figsize=(7.5, 0.8 * len(runs) + 0.26 * rows), layout="constrained")
    panels = drawn.subplots(len(runs), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for run, axes in zip(runs, panels, strict=True):
        _bars(run, axes)
    panels[-1].set(xlabel="ms a step: a local step (grey), and what is added to it")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)


def _bars(run: Run, axes: Axes) -> None:
    """A bar for each case; those that are much longer than the compressed ones are cut, and tell their length."""
    middles = [run.middle(case) for case in run.cases]
    end = 1.25 * max(x for x, case in zip(middles, run.cases, strict=True) if case["method"] not in DENSE)
    for row, (case, ms) in enumerate(zip(run.cases, middles, strict=True)):
        added = 0.0 if case["method"] == LOCAL else run.added(case)
        axes.barh(row, ms - added, color="#bbbbbb", height=0.7)
        hue = figures.HUE.get("none" if case["method"] == "ddp" else case["method"].partition(" ")[0], figures.HUES[-1])
        axes.barh(
            row,
            added,
            left=ms - added,
            color=hue,
            height=0.7,
            hatch="//" * (case["framework"] == "torch"),
            edgecolor="white",
        )
        text = f"{ms:,.0f}" + f" (+{added:,.0f})" * (case["method"] != LOCAL)
        axes.annotate(
            text + " →" * (ms > end),
            (min(ms, end), row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(middles)), [f"{called(case)} ({NAMES[case['framework']]})" for case in run.cases])
    axes.set(xlim=(0, end), title=run.title)
    axes.title.set_fontsize(9)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
