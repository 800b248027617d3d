"""Summaries of runs: comparisons of the runs of one task, with the same number of workers and of steps.

Runs that differ only in the seed share a row.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from experiments import display
from experiments.records import Record, Run

BASELINE = "none"


class Row(NamedTuple):
    """The results of the runs of one codec with its settings; means over the runs, if not stated otherwise.

    Attributes:
      name: the codec's name, with the settings in which it differs from other rows of this codec in the section.
      label: the codec's name, with its settings from the records.
      seeds: the seeds of the runs, in order.
      accuracy: the accuracy on the test split at the end, between 0 and 1.
      low: the worst of the runs' accuracies.
      high: the best of the runs' accuracies.
      difference: percentage points above the baseline's mean; None for the baseline, and without a baseline.
      verdict: the place of the mean: "within", "below" or "above" the range of the baseline's runs; None if the
        baseline has fewer than two runs.
      loss: the loss on the test split at the end.
      step_mb: the MB (10^6 bytes) that one worker sends in a step.
      total_mb: the MB (10^6 bytes) that one worker sends over the run.
      ratio: how many times fewer bytes than dense.
      compressed_share: the share of steps that sent less than dense, between 0 and 1.
      compressed_ratio: how many times fewer bytes than dense these steps sent; None if there are none.
      skipped: the number of steps whose gradients were not finite, in all runs together.
      step_ms: the milliseconds of a step, the mean of the runs' medians.
      error: the relative error of compression, over the second half of the steps; None if it was not measured.
      owed: the largest and the last norm of the residual, means over the runs; None if nothing is owed, or if it was
        not measured.
      settings: all settings of the codec.
    """

    name: str
    label: str
    seeds: list[int]
    accuracy: float
    low: float
    high: float
    difference: float | None
    verdict: str | None
    loss: float
    step_mb: float
    total_mb: float
    ratio: float
    compressed_share: float
    compressed_ratio: float | None
    skipped: int
    step_ms: float
    error: float | None
    owed: tuple[float, float] | None
    settings: str


class Section(NamedTuple):
    """The runs of one task, with the same number of workers and of steps.

    Attributes:
      title: the task, the workers and the steps.
      facts: the facts that all runs share, (name, value).
      warnings: sentences about facts that make the comparison doubtful.
      unfinished: sentences about the runs that have not reached their end; they are in no row and no figure.
      rows: one row for each codec with its settings, the baseline first.
      notes: sentences to show beside the rows.
      runs: the runs that have reached their end, by the name of their row, in the order of the seeds.
    """

    title: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    unfinished: list[str]
    rows: list[Row]
    notes: list[str]
    runs: dict[str, list[Run]]


def summarize(runs: Iterable[Run]) -> list[Section]:
    """The sections of a report on the runs."""
    groups: dict[tuple[str, int, int], list[Run]] = {}
    for run in sorted(runs, key=order):
        groups.setdefault((run.header["task"], run.header["workers"], run.header["steps"]), []).append(run)
    return [_section(group) for _, group in sorted(groups.items())]


def names(runs: Sequence[Run]) -> dict[str, str]:
    """The short name of each label: the codec, with the settings in which its labels differ."""
    own = {run.name: own_settings(run) for run in runs}
    found = {}
    for run in runs:
        alike = [own[other.name] for other in runs if other.header["codec"] == run.header["codec"]]
        differing = [key for key in own[run.name] if any(other.get(key) != own[run.name][key] for other in alike)]
        found[run.name] = " ".join([run.header["codec"], *(f"{key}={own[run.name][key]}" for key in differing)])
    return found if len(set(found.values())) == len(found) else {label: label for label in found}


def own_settings(run: Run) -> Record:
    """The codec's settings, by keyword."""
    prefix = f"{run.header['codec']}_"
    return {key.removeprefix(prefix): x for key, x in run.header["settings"].items() if key.startswith(prefix)}


def common_settings(run: Run) -> Record:
    """All facts that must not differ in a comparison of codecs."""
    header, settings = run.header, run.header["settings"]
    keys = ("workers", "emulated", "steps", "parameters", "beside", "device")
    about = {key: header[key] for key in keys if key in header}
    own = {"codec", "seed", *(f"{header['codec']}_{key}" for key in own_settings(run))}
    return {key: x for key, x in settings.items() if key not in own} | about | header["versions"]


def order(run: Run) -> tuple[Any, ...]:
    """A sorting key: the baseline comes first; then by codec, from few bytes to many, and by seed."""
    last = run.end or {"bytes": 0, "dense_bytes": 1}
    sent = float(f"{last['bytes'] / last['dense_bytes']:.3g}")  # seeds of one codec may differ a little
    codec = run.header["codec"]
    return (codec != BASELINE, codec, sent, run.name, run.header["seed"], run.header["date"])


def _section(runs: Sequence[Run]) -> Section:
    named = names(runs)
    finished: dict[str, list[Run]] = {}
    for run in runs:
        if run.end:
            finished.setdefault(named[run.name], []).append(run)
    for alike in finished.values():
        alike.sort(key=lambda run: run.header["seed"])
    baseline = next((group for group in finished.values() if group[0].header["codec"] == BASELINE), [])
    rows = [row(name, group, baseline) for name, group in finished.items()]
    base = next((row for row in rows if finished[row.name] is baseline), None)
    first = runs[0].header
    return Section(
        title=f"{first['task']}, {first['workers']} workers, {first['steps']:,} steps",
        facts=_facts(runs),
        warnings=_warnings(runs, named),
        unfinished=[_unfinished(run, named) for run in runs if not run.end],
        rows=rows,
        notes=_notes(rows, base, first) if rows else [],
        runs=finished,
    )


def row(name: str, runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    """The row of runs that differ only in the seed, compared with the runs of the baseline, which may be empty."""

    def mean(value: Callable[[Run], float]) -> float:
        return statistics.fmean(map(value, runs))

    accuracies, base = ([run.accuracy for run in group] for group in (runs, baseline))
    accuracy, others = statistics.fmean(accuracies), bool(baseline) and runs is not baseline
    compressed = [ratio for run in runs if (ratio := run.compressed_ratio)]
    return Row(
        name=name,
        label=runs[0].name,
        seeds=[run.header["seed"] for run in runs],
        accuracy=accuracy,
        low=min(accuracies),
        high=max(accuracies),
        difference=100 * (accuracy - statistics.fmean(base)) if others else None,
        verdict=_verdict(accuracy, base) if others and len(base) > 1 else None,
        loss=mean(lambda run: run.test[-1]["loss"]),
        step_mb=mean(lambda run: run.end["bytes"] / 1e6 / run.end["step"]),
        total_mb=mean(lambda run: run.end["bytes"] / 1e6),
        ratio=mean(lambda run: run.end["dense_bytes"]) / mean(lambda run: run.end["bytes"]),
        compressed_share=mean(lambda run: run.compressed_share),
        compressed_ratio=statistics.fmean(compressed) if compressed else None,
        skipped=sum(run.end["skipped"] for run in runs),
        step_ms=mean(lambda run: run.step_ms),
        error=_late_error(runs),
        owed=_owed(runs),
        settings=", ".join(f"{key}={x}" for key, x in own_settings(runs[0]).items()),
    )


def _late_error(runs: Sequence[Run]) -> float | None:
    """The mean relative error over the second half of the steps; None if it was not measured."""
    found = [line["error"] for run in runs for line in run.train if "error" in line and 2 * line["step"] > run.step]
    return statistics.fmean(found) if found else None


def _owed(runs: Sequence[Run]) -> tuple[float, float] | None:
    """The largest and the last norm of the residual; None where there is none."""
    norms = [[line["residual_norm"] for line in run.train if "residual_norm" in line] for run in runs]
    if not all(map(any, norms)):
        return None
    return statistics.fmean(map(max, norms)), statistics.fmean(each[-1] for each in norms)


def _verdict(accuracy: float, base: Sequence[float]) -> str:
    if accuracy > max(base):
        return "above"
    return "within" if accuracy >= min(base) else "below"


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The facts that the runs share, and their seeds and dates."""
    every = [common_settings(run) for run in runs]
    same = [(key, _text(x)) for key, x in every[0].items() if all(key in one and one[key] == x for one in every)]
    seeds = sorted({run.header["seed"] for run in runs})
    dates = sorted({run.header["date"] for run in runs})
    return [*same, ("seeds", _text(seeds)), ("date", " to ".join(dict.fromkeys((dates[0], dates[-1]))))]


def _warnings(runs: Sequence[Run], named: dict[str, str]) -> list[str]:
    """Sentences about differences beside codec and seed, and about other facts that make a comparison doubtful."""
    found = []
    every = [(run, common_settings(run)) for run in runs]
    for key in dict.fromkeys(key for _, settings in every for key in settings):
        found += _difference(key, [(run, settings.get(key)) for run, settings in every], named)
    for label, name in named.items():
        alike = [(run, own_settings(run)) for run in runs if run.name == label]
        for key in dict.fromkeys(key for _, settings in alike for key in settings):
            found += _difference(f"{key} of {name}", [(run, settings.get(key)) for run, settings in alike], named)
    for run in runs:
        twins = [other for other in runs if other.end and _cell(other) == _cell(run)]
        if len(twins) > 1 and twins[0] is run:
            found.append(
                f"There are {len(twins)} runs of {_who([run], named)}: they are not independent, and counted as if "
                "they were."
            )
        for record in run.resumed:
            if record["workers"] != run.header["workers"]:
                found.append(
                    f"{_who([run], named)} went on with {record['workers']} workers after step {record['step']:,}."
                )
    return found


def _cell(run: Run) -> tuple[str, int]:
    return run.name, run.header["seed"]


def _difference(what: str, values: Sequence[tuple[Run, Any]], named: dict[str, str]) -> list[str]:
    """A sentence that tells which runs have which value, if not all are the same."""
    holders: dict[str, list[Run]] = {}
    for run, value in values:
        holders.setdefault(_text(value), []).append(run)
    parts = [f"{value} in {_who(group, named)}" for value, group in holders.items()]
    return [f"{what} differs: {'; '.join(parts)}."] if len(holders) > 1 else []


def _who(runs: Sequence[Run], named: dict[str, str]) -> str:
    """The runs in words, such as "none (seeds 0, 1), powersgd (seed 0)"."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(named[run.name], []).append(run.header["seed"])
    return ", ".join(f"{name} (seed{'s' * (len(some) > 1)} {_text(some)})" for name, some in seeds.items())


def _unfinished(run: Run, named: dict[str, str]) -> str:
    tested = f"; test accuracy {run.accuracy:.2%} at step {run.test[-1]['step']:,}" if run.test else ""
    return f"{_who([run], named)}: at step {run.step:,} of {run.header['steps']:,}{tested}."


def _notes(rows: Sequence[Row], base: Row | None, header: Record) -> list[str]:
    found = []
    if base is None:
        found.append(f"No run of {BASELINE} has reached its end, so that no differences to it are given.")
    elif len(base.seeds) == 1:
        found.append(
            f"{BASELINE} has one run: how much of a difference is due to the seed alone cannot be told from these runs."
        )
    else:
        n = len(base.seeds)
        found.append(
            f"The {n} seeds of {BASELINE} reach {base.low:.2%} to {base.high:.2%}, a range of "
            f"{100 * (base.high - base.low):.2f} points."
        )
        for verdict, where in (("within", "Within this range"), ("below", "Below it"), ("above", "Above it")):
            some = [row.name for row in rows if row.verdict == verdict]
            found += [f"{where}: {', '.join(some)}."] * bool(some)
        if any(len(row.seeds) > 1 for row in rows if row is not base):
            found.append("Several runs of a codec are judged by their mean.")
        found.append(
            f"One more seed of {BASELINE} would itself fall outside the range of {n} with a probability of "
            f"{2 / (n + 1):.0%}: outside is a hint, and no proof, of a difference."
        )
    if any(len(row.seeds) == 1 for row in rows if row is not base):
        found.append("A row of one run has a spread too, which is not known.")
    for row in rows:
        if row is not base and row.ratio == 1:
            found.append(f"{row.name} sent as much as dense in every step: if it has a warm-up, that was longer.")
        if row.ratio < 0.995:  # as the table shows it
            found.append(f"{row.name} does not pay here: it sends {1 / row.ratio:.2f} times as many bytes as dense.")
        if row.skipped:
            found.append(f"{row.name} skipped {row.skipped} steps, whose gradients were not finite.")
    return [*found, *display.bytes_notes(header)] + [display.EMULATED_NOTE] * header["emulated"]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
