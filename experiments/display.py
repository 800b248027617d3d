"""What an experiment shows on the screen: progress while it runs, then a table over all runs."""

import functools
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.records import Record, Run

BYTES_NOTE = (
    "MB: 10^6 bytes that one worker sends for the gradients. Ratio: those of a dense all-reduce in the gradients' "
    "own type, over these. Compressed steps: those that send less than it."
)
BESIDE_NOTE = (
    "MB and the ratio also count the loss, the accuracy and batch statistics, which ride in the same messages."
)
EMULATED_NOTE = (
    "The workers are emulated on one CPU: ms a step is compute only and tells nothing of the time a network saves."
)


def console() -> Console:
    """Standard output; where it is no terminal, plain text wide enough for the table."""
    # Names of files and errors of libraries may hold what rich takes for markup.
    plain = functools.partial(Console, highlight=False, markup=False, emoji=False)
    terminal = plain()
    return terminal if terminal.is_terminal else plain(width=120)


def progress(screen: Console) -> Progress:
    """A bar with room for `status`; nothing where standard output is not a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=5),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )


def table(runs: Sequence[Run], title: str) -> Table:
    """One row a run that has reached its end."""
    out = Table(title=title)
    out.add_column("codec")
    numbers = ("test accuracy", "MB a step", "MB in total", "ratio", "compressed steps", "their ratio")
    for heading in (*numbers, "ms a step", "total s"):
        out.add_column(heading, justify="right")
    for run in runs:
        megabytes = run.end["bytes"] / 1e6
        out.add_row(
            run.header["codec"],
            f"{run.accuracy:.2%}",
            f"{megabytes / run.step:.4f}",
            f"{megabytes:.2f}",
            f"{run.ratio:.2f}",
            f"{run.compressed_share:.0%}",
            f"{run.compressed_ratio:.2f}" if run.compressed_ratio else "",
            f"{run.step_ms:.1f}",
            f"{sum(run.end['seconds'].values()):.1f}",
        )
    return out


def bytes_notes(header: Record) -> list[str]:
    """What must be said of the bytes of runs with this header."""
    return [BYTES_NOTE] + [BESIDE_NOTE] * ("beside" in header)  # in the records of earlier versions it is not


def notes(runs: Sequence[Run]) -> list[str]:
    """What must be said beside the table."""
    found = bytes_notes(runs[0].header)
    for run in runs:
        name, header, end = run.header["codec"], run.header, run.end
        if header["label"] != name:
            found.append(f"Settings: {header['label']}.")
        if name != "none" and not end["compressed_steps"]:
            warmup = next((key for key in header["settings"] if key.endswith("_warmup_steps")), None)
            why = f": see --{warmup.removeprefix('accordion_')}" if warmup else ""
            found.append(f"{name} sent less than dense in none of the {run.step} steps{why}.")
        if run.ratio < 0.995:  # as the table shows it
            found.append(
                f"{name} does not pay here: over {header['workers']} workers it sends {1 / run.ratio:.2f} times as "
                "many bytes as a dense all-reduce."
            )
        if end["skipped"]:
            found.append(f"{name} skipped {end['skipped']} steps, whose gradients were not finite.")
    return found + [EMULATED_NOTE] * any(run.header["emulated"] for run in runs)
