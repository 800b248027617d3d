"""The screen output of an experiment: progress while it runs, then a table of all runs."""

import functools
from collections.abc import Sequence

import jax
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
    """Standard output; if it is not a terminal, plain text that is wide enough for the table.

    Of several processes only the first one prints, once they have joined. Without any, jax is not begun here.
    """
    others = jax.distributed.is_initialized() and jax.process_index() > 0
    # File names and error messages of libraries may contain text that rich takes for markup.
    plain = functools.partial(Console, highlight=False, markup=False, emoji=False, quiet=others)
    terminal = plain()
    return terminal if terminal.is_terminal else plain(width=120)


def progress(screen: Console) -> Progress:
    """A progress bar with room for `status`; nothing if standard output is not a terminal."""
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
    """A table with one row for each run; all runs have reached their end."""
    out = Table(title=title)
    out.add_column("codec")
    numbers = ("test accuracy", "MB a step", "MB in total", "ratio", "compressed steps", "their ratio")
    for heading in (*numbers, "ms a step", "total s"):
        out.add_column(heading, justify="right")
    for run in runs:
        megabytes = run.end["bytes"] / 1e6
        out.add_row(
            run.called,
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
    """The notes on the bytes of runs with this header."""
    return [BYTES_NOTE] + [BESIDE_NOTE] * ("beside" in header)  # records of earlier versions lack it


def notes(runs: Sequence[Run]) -> list[str]:
    """The notes below the table."""
    found = bytes_notes(runs[0].header)
    for run in runs:
        name, header, end = run.header["codec"], run.header, run.end
        if header["label"] not in (name, f"{name} every={run.every}"):
            found.append(f"Settings: {header['label']}.")
        if name != "none" and not end["compressed_steps"]:
            warmup = next((key for key in header["settings"] if key.endswith("_warmup_steps")), None)
            why = f": see --{warmup.removeprefix('accordion_')}" if warmup else ""
            found.append(f"{name} sent less than dense in none of the {run.step} steps{why}.")
        if run.left_over:
            found.append(f"{run.called}: {run.left_over}.")
        if run.ratio < 0.995:  # as the table shows it
            found.append(
                f"{name} does not pay here: over {header['workers']} workers it sends {1 / run.ratio:.2f} times as "
                "many bytes as a dense all-reduce."
            )
        if end["skipped"]:
            found.append(f"{name} skipped {end['skipped']} steps, whose gradients were not finite.")
    return found + [EMULATED_NOTE] * any(run.header["emulated"] for run in runs)
