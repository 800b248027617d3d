"""What an experiment shows: progress while it runs, then a table and a figure over all codecs."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # a figure goes to a file, on machines without a screen too

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

BYTES_NOTE = (
    "MB: 10^6 bytes that one worker sends for the gradients. Ratio: those of a dense float32 all-reduce, over these. "
    "Compressed steps: those that send less than it."
)
EMULATED_NOTE = (
    "The workers are emulated on one CPU: ms a step is compute only and tells nothing of the time a network saves."
)


class Point(NamedTuple):
    """One evaluation.

    Attributes:
      step: how many steps of training came before.
      megabytes: sent by one worker so far, in 10^6 bytes.
      accuracy: on the test split, between 0 and 1.
    """

    step: int
    megabytes: float
    accuracy: float


class Result(NamedTuple):
    """One codec's training.

    Attributes:
      name: the codec's.
      settings: its keywords that are not at their defaults, after its name.
      curve: the evaluations, the last one after the last step.
      step_megabytes: one worker sent in each step.
      dense_megabytes: one worker would have sent in a step by a dense float32 all-reduce.
      step_ms: median milliseconds of a step.
      seconds: from start to end, compilation and evaluation included.
    """

    name: str
    settings: str
    curve: list[Point]
    step_megabytes: list[float]
    dense_megabytes: float
    step_ms: float
    seconds: float

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than dense, over the run."""
        return self.dense_megabytes / statistics.fmean(self.step_megabytes)

    @property
    def compressed(self) -> list[float]:
        """What was sent in each step that sent less than dense."""
        return [megabytes for megabytes in self.step_megabytes if megabytes < self.dense_megabytes]


def console() -> Console:
    """Standard output; where it is no terminal, plain text wide enough for the table."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=120)


def progress(screen: Console) -> Progress:
    """A bar with room for `status`; nothing where standard output is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=5),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )


def table(results: Sequence[Result], title: str) -> Table:
    """One row a codec."""
    out = Table(title=title)
    out.add_column("codec")
    numbers = ("test accuracy", "MB a step", "MB in total", "ratio", "compressed steps", "their ratio")
    for heading in (*numbers, "ms a step", "total s"):
        out.add_column(heading, justify="right")
    for result in results:
        last = result.curve[-1]
        compressed = result.compressed
        share = len(compressed) / len(result.step_megabytes)
        their_ratio = f"{result.dense_megabytes / statistics.fmean(compressed):.2f}" if compressed else ""
        out.add_row(
            result.name,
            f"{last.accuracy:.2%}",
            f"{statistics.fmean(result.step_megabytes):.4f}",
            f"{last.megabytes:.2f}",
            f"{result.ratio:.2f}",
            f"{share:.0%}",
            their_ratio,
            f"{result.step_ms:.1f}",
            f"{result.seconds:.1f}",
        )
    return out


def notes(results: Sequence[Result], workers: int, emulated: bool) -> list[str]:
    """What must be said beside the table."""
    found = [BYTES_NOTE]
    for result in results:
        if result.settings != result.name:
            found.append(f"Settings: {result.settings}.")
        if result.name != "none" and not result.compressed:
            found.append(
                f"{result.name} sent less than dense in none of the {len(result.step_megabytes)} steps: if it has a "
                "warm-up, that was longer."
            )
        if result.ratio < 0.995:  # as the table shows it
            found.append(
                f"{result.name} does not pay here: over {workers} workers it sends {1 / result.ratio:.2f} times as "
                "many bytes as a dense all-reduce."
            )
    return found + [EMULATED_NOTE] * emulated


def plot(results: Sequence[Result], title: str, path: pathlib.Path) -> None:
    """Writes a figure of test accuracy against steps, and against what one worker sent, as a PNG."""
    figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    # Where two codecs do equally well their lines coincide; different markers keep both in sight.
    for result, marker in zip(results, "osD^v<>PX*" * len(results), strict=False):
        steps, megabytes, accuracy = zip(*result.curve, strict=True)
        style = {"marker": marker, "markersize": 5, "alpha": 0.8}
        by_step.plot(steps, accuracy, label=f"{result.name} ({megabytes[-1]:.3g} MB in all)", **style)
        by_bytes.plot(megabytes, accuracy, **style)
    by_step.set(xlabel="training steps", ylabel="test accuracy")
    by_bytes.set(xlabel="MB sent by one worker so far (10^6 bytes, log scale)", xscale="log")
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_step.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    by_step.legend(loc="lower right")
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
