"""Methods of exchange compared over a simulated link: rows, a table, and their notes, from the records of runs alone.

The simulated time of a run is a model, not a measurement:

    steps * (seconds that a worker computes in a step) + 8 * (bytes that a worker sent) / (bits a second of its link)

The bytes are counted by the ring laws, as everywhere in this library. Nothing overlaps: neither an exchange with the
backward pass, nor one with a delay with the steps that it would hide behind. A link has no latency and no other
traffic, and all workers are equally fast.
"""

import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags
from rich.table import Table

from experiments import records
from experiments.records import Record, Run

FLAGS = flags.FLAGS


class Row(NamedTuple):
    """The runs of one method with its settings.

    Attributes:
      name: the method with its settings.
      method: the method.
      runs: one run for each seed.
      step_seconds: the seconds that a worker computes in a step, for the simulated time.
    """

    name: str
    method: str
    runs: list[Run]
    step_seconds: float

    def minutes(self, record: Record) -> float:
        """The simulated minutes up to a record of one of the runs."""
        return (record["step"] * self.step_seconds + 8 * record["bytes"] / (1e6 * FLAGS.link)) / 60


def define_flags() -> None:
    """Defines the flags of the simulated time."""
    flags.DEFINE_float(
        "link",
        100.0,
        "Mbit/s at which each worker sends, for the simulated time. That time is a model, not a measurement: the bytes "
        "that a worker sent over this rate, and --step_time for each step, with nothing overlapped.",
        lower_bound=1e-6,
    )
    flags.DEFINE_float(
        "step_time",
        0.0,
        "Seconds that a worker computes in a step, for the simulated time. 0: the median step of the run here, which "
        "computes for all workers, over their number.",
        lower_bound=0,
    )


def read(folder: str) -> list[Run]:
    """The runs in and below a directory that have reached their end.

    Raises:
      RecordsError: a file is something else.
      ValueError: there are none, or they are not of one task.
    """
    runs = [run for path in sorted(pathlib.Path(folder).rglob("*.jsonl")) if (run := records.read(path)).end]
    if not runs:
        raise ValueError(f"--runs={folder} has no *.jsonl of a run that has reached its end")
    facts = ("task", "workers", "steps", "batch_size", "parameters")
    if len({tuple(run.header.get(key) for key in facts) for run in runs}) > 1:
        raise ValueError(f"--runs={folder} has runs of several tasks: give a directory for each")
    return runs


def rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each method with its settings, in the order in which they first come; dense is the first."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.header["codec"] != "dense"):
        groups.setdefault(run.name, []).append(run)
    found = []
    for name, alike in groups.items():
        header = alike[0].header
        computed = computed_by_one(header)
        here = statistics.fmean(run.step_ms for run in alike) / 1e3 / computed
        found.append(Row(name, alike[0].header["codec"], alike, FLAGS.step_time or here))
    return found


def computed_by_one(header: Record) -> int:
    """For how many workers one device computes."""
    return header["workers"] // header.get("processes", 1) if header["emulated"] else 1


def table(rows: Sequence[Row], title: str) -> Table:
    """A table with a line for each row; means over the seeds."""
    out = Table(title=title)
    out.add_column("method", overflow="fold")
    numbers = ("validation loss", "over seeds", "tokens", "MB sent", "ratio", "exchanges", "ms a step", "sim. min")
    for heading in numbers:
        out.add_column(heading, justify="right")
    for row in rows:
        losses = [run.test[-1]["loss"] for run in row.runs]
        first = row.runs[0]
        out.add_row(
            row.name,
            f"{statistics.fmean(losses):.4f}",
            f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else "one run",
            f"{first.step * first.header['batch_size']:,}",
            f"{statistics.fmean(run.end['bytes'] / 1e6 for run in row.runs):,.2f}",
            f"{statistics.fmean(run.ratio for run in row.runs):,.1f}",
            f"{first.end['exchanges']}",
            f"{statistics.fmean(run.step_ms for run in row.runs):.0f}",
            f"{statistics.fmean(row.minutes(run.end) for run in row.runs):.2f}",
        )
    return out


def notes(rows: Sequence[Row]) -> list[str]:
    """The notes below the table."""
    header = rows[0].runs[0].header
    here, seconds = "each worker has a device, the median step", "the ms a step"
    if header["emulated"]:
        here = f"one device computes for {computed_by_one(header)} workers"
        seconds += ", over the number of these,"
    if FLAGS.step_time:
        seconds = f"--step_time={FLAGS.step_time:g} s"
    found = [
        "MB: 10^6 bytes that one worker sends, by the ring laws. Ratio: those of a dense all-reduce of the gradients "
        "in each step, over these. Exchanges: steps that sent something.",
        f"ms a step: here, where {here}.",
        f"sim. min: a model, not a measurement. Each step takes {seconds} and the bytes take their time at "
        f"--link={FLAGS.link:g} Mbit/s. Nothing overlaps, and there is no latency.",
    ]
    for row in rows:
        if left_over := row.runs[0].left_over:
            found.append(f"{row.name}: {left_over}.")
        if skipped := sum(run.end["skipped"] for run in row.runs):
            found.append(f"{row.name} skipped {skipped} exchanges, which were not finite.")
    return found
