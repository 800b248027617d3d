"""A page and a summary of runs, made from their records alone.

    python -m experiments.report --runs=experiments/results/cifar10 --out_dir=out

Writes report.html, which is whole in itself and asks nothing of a network, and report.md. Runs of one task, on as many
workers and for as many steps, are compared with each other; those that differ in the seed alone are one row. The same
records give the same files.
"""

import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe
from absl import app, flags

from experiments import display, figures, records
from experiments.records import Record, Run

BASELINE = "none"
EMULATED = "The workers are emulated on one CPU: none of this tells of the time that a network saves."
DOUBTS = "These runs differ in more than the codec and the seed"
UNFINISHED = "Unfinished, and in no table and no figure"
# What a report takes from the lines of each kind, and of what type it is.
NEEDED: dict[str, dict[str, Any]] = {
    "run": {
        **dict.fromkeys(("task", "codec", "label", "device", "date"), str),
        **dict.fromkeys(("seed", "workers", "steps", "parameters"), int),
        **dict.fromkeys(("settings", "versions"), dict),
        "emulated": bool,
    },
    "train": dict.fromkeys(("step", "bytes", "dense_bytes", "loss", "ms"), (int, float)),
    "test": dict.fromkeys(("step", "bytes", "dense_bytes", "loss", "accuracy"), (int, float)),
    "resumed": dict.fromkeys(("step", "workers"), int),
    "end": {
        **dict.fromkeys(("step", "bytes", "dense_bytes", "compressed_steps", "compressed_bytes", "skipped"), int),
        "seconds": dict,
    },
}


class ReportError(Exception):
    """There is nothing to make a report of."""


class Row(NamedTuple):
    """What the runs of one codec with its settings reached; means over them, if not said otherwise.

    Attributes:
      name: the codec's, with the settings in which it differs from its like in the section.
      label: the codec's, with its settings as the records have them.
      seeds: of the runs, in order.
      accuracy: on the test split at the end, between 0 and 1.
      low: the worst of the runs' accuracies.
      high: the best.
      difference: percentage points above the baseline's mean; None for the baseline, and where there is none.
      verdict: where the mean lies: "within", "below" or "above" the range of the baseline's runs; None where the
        baseline has fewer than two.
      loss: on the test split at the end.
      step_mb: 10^6 bytes that one worker sends a step.
      total_mb: 10^6 bytes that one worker sends over the run.
      ratio: how many times fewer bytes than dense.
      compressed_share: the part of the steps that sent less than dense, between 0 and 1.
      compressed_ratio: how many times fewer bytes than dense over those; None if there are none.
      skipped: steps whose gradients were not finite, in all runs together.
      step_ms: milliseconds of a step, the mean of the runs' medians.
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
    settings: str


class Section(NamedTuple):
    """The runs of one task, on as many workers and for as many steps.

    Attributes:
      title: what these are.
      facts: what all runs have in common, (name, value).
      warnings: what makes the comparison doubtful.
      unfinished: the runs that have not reached their end, and are in no row and no figure.
      rows: one a codec with its settings, the baseline first.
      notes: what must be said beside the rows.
      runs: those that have reached their end, by the name of their row, in the order of the seeds.
    """

    title: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    unfinished: list[str]
    rows: list[Row]
    notes: list[str]
    runs: dict[str, list[Run]]


class Plot(NamedTuple):
    """A figure for the page; all texts but `svg` are plain text."""

    title: str
    caption: str
    svg: str


# From files to runs


def find(places: Sequence[str]) -> list[pathlib.Path]:
    """The *.jsonl files that are named, or are in or below a directory that is.

    Raises:
      ReportError: there is no such file or directory, or nothing is found.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}  # each file once, however often it is named
    for place in map(pathlib.Path, places):
        if not place.exists():
            raise ReportError(f"--runs: there is no {place}")
        paths = sorted(place.rglob("*.jsonl")) if place.is_dir() else [place]
        found |= {path.resolve(): path for path in paths}
    if not found:
        raise ReportError(f"--runs: found no *.jsonl in {', '.join(places) or 'no place'}")
    return list(found.values())


def read(path: pathlib.Path) -> Run:
    """The run whose records are in a file, with all that a report takes from them.

    Raises:
      RecordsError: the file cannot be read, or is something else.
    """
    run = records.read(path)
    for record in (run.header, *run.train, *run.test, *run.resumed, *filter(None, [run.end])):
        for key, kind in NEEDED[record["kind"]].items():
            if not isinstance(record.get(key), kind):
                raise records.RecordsError(
                    f"{path} is not the records of a run: {key!r} of a line of kind {record['kind']!r} is "
                    f"{record.get(key)!r}"
                )
    if run.end and not (run.train and run.test and min(run.step, run.end["bytes"]) > 0):
        raise records.RecordsError(f"{path} is not the records of a run: it has an end, but nothing before it")
    return run


# From runs to what is said of them


def summarize(runs: Iterable[Run]) -> list[Section]:
    """What a report says of the runs."""
    groups: dict[tuple[str, int, int], list[Run]] = {}
    for run in sorted(runs, key=_order):
        groups.setdefault((run.header["task"], run.header["workers"], run.header["steps"]), []).append(run)
    return [_section(group) for _, group in sorted(groups.items())]


def names(runs: Sequence[Run]) -> dict[str, str]:
    """What to call each label: the codec, with the settings in which its labels differ."""
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
    """All that must not differ in a comparison of codecs."""
    header, settings = run.header, run.header["settings"]
    about = {key: header[key] for key in ("workers", "emulated", "steps", "parameters", "device")}
    own = {"codec", "seed", *(f"{header['codec']}_{key}" for key in own_settings(run))}
    return {key: x for key, x in settings.items() if key not in own} | about | header["versions"]


def _order(run: Run) -> tuple[Any, ...]:
    """The baseline first, then by codec, from few bytes to many, and by seed."""
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
        notes=_notes(rows, base, first["emulated"]) if rows else [],
        runs=finished,
    )


def row(name: str, runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    """What runs that differ in the seed alone reached, beside the runs of the baseline, of which there may be none."""

    def mean(value: Callable[[Run], float]) -> float:
        return statistics.fmean(map(value, runs))

    accuracies, base = ([run.accuracy for run in group] for group in (runs, baseline))
    accuracy, others = statistics.fmean(accuracies), bool(baseline) and runs is not baseline
    compressed = [run.compressed_ratio for run in runs if run.compressed_share]
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
        step_mb=mean(lambda run: _end(run)["bytes"] / 1e6 / _end(run)["step"]),
        total_mb=mean(lambda run: _end(run)["bytes"] / 1e6),
        ratio=mean(lambda run: _end(run)["dense_bytes"]) / mean(lambda run: _end(run)["bytes"]),
        compressed_share=mean(lambda run: run.compressed_share),
        compressed_ratio=statistics.fmean(compressed) if compressed else None,
        skipped=sum(_end(run)["skipped"] for run in runs),
        step_ms=mean(lambda run: run.step_ms),
        settings=", ".join(f"{key}={x}" for key, x in own_settings(runs[0]).items()),
    )


def _end(run: Run) -> Record:
    """The line "end" of a run that has reached its end."""
    assert run.end is not None
    return run.end


def _verdict(accuracy: float, base: Sequence[float]) -> str:
    if accuracy > max(base):
        return "above"
    return "within" if accuracy >= min(base) else "below"


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the runs have in common, and their seeds and dates."""
    every = [common_settings(run) for run in runs]
    same = [(key, _text(x)) for key, x in every[0].items() if all(key in one and one[key] == x for one in every)]
    seeds = sorted({run.header["seed"] for run in runs})
    dates = sorted({run.header["date"] for run in runs})
    return [*same, ("seeds", _text(seeds)), ("date", " to ".join(dict.fromkeys((dates[0], dates[-1]))))]


def _warnings(runs: Sequence[Run], named: dict[str, str]) -> list[str]:
    """What the runs differ in beside codec and seed, and what else makes their comparison doubtful."""
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
    """Who has which value, if they are not all the same."""
    holders: dict[str, list[Run]] = {}
    for run, value in values:
        holders.setdefault(_text(value), []).append(run)
    parts = [f"{value} in {_who(group, named)}" for value, group in holders.items()]
    return [f"{what} differs: {'; '.join(parts)}."] if len(holders) > 1 else []


def _who(runs: Sequence[Run], named: dict[str, str]) -> str:
    """Such as "none (seeds 0, 1), powersgd (seed 0)"."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(named[run.name], []).append(run.header["seed"])
    return ", ".join(f"{name} (seed{'s' * (len(some) > 1)} {_text(some)})" for name, some in seeds.items())


def _unfinished(run: Run, named: dict[str, str]) -> str:
    tested = f"; test accuracy {run.accuracy:.2%} at step {run.test[-1]['step']:,}" if run.test else ""
    return f"{_who([run], named)}: interrupted at step {run.step:,} of {run.header['steps']:,}{tested}."


def _notes(rows: Sequence[Row], base: Row | None, emulated: bool) -> list[str]:
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
    return [*found, display.BYTES_NOTE] + [display.EMULATED_NOTE] * emulated


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


# From what is said to files

COLUMNS: dict[str, Callable[[Row], str]] = {
    "codec": lambda row: row.name,
    "runs": lambda row: str(len(row.seeds)),
    "test accuracy, %": lambda row: f"{100 * row.accuracy:.2f}",
    "over seeds, %": lambda row: f"{100 * row.low:.2f} to {100 * row.high:.2f}" if len(row.seeds) > 1 else "one run",
    f"minus {BASELINE}, points": lambda row: "" if row.difference is None else f"{row.difference:+.2f}",
    f"range of {BASELINE}'s seeds": lambda row: {None: "", "within": "within"}.get(row.verdict, "outside"),
    "test loss": lambda row: f"{row.loss:.4f}",
    "MB a step": lambda row: f"{row.step_mb:.4f}",
    "MB in total": lambda row: f"{row.total_mb:,.1f}" if row.total_mb >= 100 else f"{row.total_mb:.3g}",
    "ratio": lambda row: f"{row.ratio:.2f}",
    "compressed steps, %": lambda row: f"{100 * row.compressed_share:.0f}",
    "their ratio": lambda row: "" if row.compressed_ratio is None else f"{row.compressed_ratio:.2f}",
    "skipped steps": lambda row: str(row.skipped),
    "ms a step": lambda row: f"{row.step_ms:.1f}",
}


def plots(number: int, section: Section, looks: dict[str, figures.Style]) -> list[Plot]:
    """The figures of a section, the `number`-th on the page."""
    if not section.runs:
        return []
    series = [figures.Series(name, looks[runs[0].name], runs) for name, runs in section.runs.items()]
    base = next((one for one in series if one.runs[0].header["codec"] == BASELINE), None)
    band = "" if base is None else f" The dashed line is the mean of {BASELINE}"
    band += "; the band is the range of its seeds." if base and len(base.runs) > 1 else "." * bool(base)
    small = " Small points are single seeds." if any(len(one.runs) > 1 for one in series) else ""
    thin = " Thin lines of one color are seeds." if small else ""
    split = "The first step of each process compiles; the first evaluation compiles too. Means over the seeds."
    emulated = f" {EMULATED}" if any(one.runs[0].header["emulated"] for one in series) else ""
    smooth = "Each point is a mean over consecutive steps."
    every = f"At each evaluation; what is far below the results at the end is not shown.{thin}"
    drawn = [
        ("Accuracy against bytes", f"Up and to the left is better.{band}{small}", figures.final_accuracy(series, base)),
        ("Where the time goes", split + emulated, figures.time_split(series)),
        ("Test accuracy against steps", every, figures.curves(series, "accuracy", "step")),
        ("Test accuracy against bytes", every, figures.curves(series, "accuracy", "bytes")),
        ("Training loss against steps", smooth + thin, figures.curves(series, "loss", "step")),
        ("Training loss against bytes", smooth + thin, figures.curves(series, "loss", "bytes")),
    ]
    return [
        Plot(title, caption, figures.svg(figure, f"s{number}-f{place}"))
        for place, (title, caption, figure) in enumerate(drawn)
    ]


def html(sections: Sequence[Section]) -> str:
    """The page, whole in itself."""
    every = [run for section in sections for runs in section.runs.values() for run in runs]
    looks = figures.styles({run.name: run.header["codec"] for run in sorted(every, key=_order)})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = markupsafe.Markup  # matplotlib has escaped what is in it
    return environment.get_template("report.html.j2").render(
        title=_title(sections),
        columns=COLUMNS,
        doubts=DOUBTS,
        unfinished=UNFINISHED,
        looks=looks,
        sections=[(section, plots(number, section, looks)) for number, section in enumerate(sections)],
    )


def markdown(sections: Sequence[Section]) -> str:
    """The same without figures, for a code host or a terminal."""
    lines = [f"# {_title(sections)}", "", "The figures are in [report.html](report.html).", ""]
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for heading, sentences in ((DOUBTS, section.warnings), (UNFINISHED, section.unfinished)):
            if sentences:
                lines += [f"**{heading}:**", "", *(f"- {_plain(sentence)}" for sentence in sentences), ""]
        if section.rows:
            alignment = ["---", *["---:"] * (len(COLUMNS) - 1)]
            table = [list(COLUMNS), alignment, *([cell(row) for cell in COLUMNS.values()] for row in section.rows)]
            table[2:] = [[_plain(cell) for cell in cells] for cells in table[2:]]
            lines += [*(f"| {' | '.join(cells)} |" for cells in table), ""]
        lines += [*(f"- {_plain(note)}" for note in section.notes), ""]
        lines += ["Common to all: " + "; ".join(f"{_plain(key)} {_plain(x)}" for key, x in section.facts) + ".", ""]
        lines += [*(f"- {_plain(row.name)}: {_plain(row.settings)}" for row in section.rows if row.settings), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _title(sections: Sequence[Section]) -> str:
    finished = sum(len(runs) for section in sections for runs in section.runs.values())
    unfinished = sum(len(section.unfinished) for section in sections)
    return f"Gradient compression: {finished} run{'s' * (finished != 1)}" + (
        f", {unfinished} unfinished" if unfinished else ""
    )


def _plain(text: str) -> str:
    """The text, such that Markdown takes nothing in it for markup."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def write(places: Sequence[str], out_dir: pathlib.Path) -> None:
    """Writes both files.

    Args:
      places: files, and directories in which to look for *.jsonl.
      out_dir: where to write; it is made if it is not there.

    Raises:
      ReportError: nothing is found.
      RecordsError: a file is not the records of a run.
    """
    sections = summarize(map(read, find(places)))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "report.html").write_text(html(sections), encoding="utf-8")
    (out_dir / "report.md").write_text(markdown(sections), encoding="utf-8")


def main(argv: list[str]) -> None:
    """Writes both files, and tells where they are."""
    out_dir = pathlib.Path(flags.FLAGS.out_dir)
    if argv[1:]:
        sys.exit(f"error: {argv[1]!r} is no flag; all settings are given as --name=value")
    try:
        write(flags.FLAGS.runs, out_dir)
    except (ReportError, records.RecordsError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Written: {out_dir / 'report.html'}, {out_dir / 'report.md'}")


if __name__ == "__main__":
    # Not at import: other experiments have flags of the same names.
    flags.DEFINE_list("runs", ["out"], "Files of records, and directories in which to look for *.jsonl.")
    flags.DEFINE_string("out_dir", "out", "The directory of the report.")
    app.run(main)
