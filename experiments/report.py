"""A page and a summary of runs, made from their records alone.

    python -m experiments.report --runs=experiments/results/cifar10 --out_dir=out

It writes report.html, a single file that needs no network, and report.md with a figure. Runs of one task, with the same
number of workers and of steps, are compared with each other. Runs that differ only in the seed share a row. The same
records give the same files.
"""

import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2
from absl import flags

from experiments import command, figures, records
from experiments.records import Run
from experiments.summary import BASELINE, Row, Section, order, summarize

EMULATED = "The workers are emulated on one CPU: none of this tells of the time that a network saves."
LOST_ERROR = (
    "The norm of what was not sent in a step, over the norm of what was to be sent: the gradient and the residual."
)
LOST_RESIDUAL = (
    "The norm of what error feedback owes, over all workers. A healthy one falls with the loss. Codecs without error "
    "feedback are not shown."
)
DOUBTS = "These runs differ in more than the codec and the seed"
UNFINISHED = "Unfinished, and in no table and no figure"
# The values that a report takes from the lines of each kind, with their types.
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


class Plot(NamedTuple):
    """A figure for the page; all texts but `svg` are plain text."""

    title: str
    caption: str
    svg: str


# From files to runs


def find(places: Sequence[str]) -> list[pathlib.Path]:
    """The named *.jsonl files, and those in or below a named directory.

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
    """The run whose records are in a file, with everything that a report takes from them.

    Raises:
      RecordsError: the file cannot be read, or it is something else.
    """
    run = records.read(path)
    for record in (run.header, *run.train, *run.test, *run.resumed, *[run.end] * bool(run.end)):
        for key, kind in NEEDED[record["kind"]].items():
            if not isinstance(record.get(key), kind):
                raise records.RecordsError(
                    f"{path} is not the records of a run: {key!r} of a line of kind {record['kind']!r} is "
                    f"{record.get(key)!r}"
                )
    if run.end and not (run.train and run.test and min(run.step, run.end["bytes"]) > 0):
        raise records.RecordsError(f"{path} is not the records of a run: it has an end, but nothing before it")
    return run


# From runs to files

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
# The columns of measured codecs.
LOST: dict[str, Callable[[Row], str]] = {
    "relative error": lambda row: "" if row.error is None else f"{row.error:.3f}",
    "residual norm, largest and last": lambda row: "{:.3g}, {:.3g}".format(*row.owed) if row.owed else "",
}


def columns(section: Section) -> dict[str, Callable[[Row], str]]:
    """The columns of a section's table."""
    return COLUMNS | (LOST if any(row.error is not None for row in section.rows) else {})


def series_of(section: Section, looks: dict[str, figures.Style]) -> tuple[list[figures.Series], figures.Series | None]:
    """The series of a section to draw, and the one among them that is the baseline, or None."""
    series = [figures.Series(name, looks[runs[0].name], runs) for name, runs in section.runs.items()]
    return series, next((one for one in series if one.runs[0].header["codec"] == BASELINE), None)


def styles(sections: Sequence[Section]) -> dict[str, figures.Style]:
    """The style of each label, the same in all sections."""
    every = [run for section in sections for runs in section.runs.values() for run in runs]
    return figures.styles({run.name: run.header["codec"] for run in sorted(every, key=order)})


def plots(number: int, section: Section, looks: dict[str, figures.Style]) -> list[Plot]:
    """The figures of a section, which is the `number`-th on the page."""
    if not section.runs:
        return []
    series, base = series_of(section, looks)
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
    for title, value, what in (
        ("Relative error of compression against steps", "error", LOST_ERROR),
        ("Norm of the residual against steps", "residual_norm", LOST_RESIDUAL),
    ):
        if any(figures.told(run, value) for one in series for run in one.runs):
            drawn.append((title, f"{what} {smooth}{thin}", figures.curves(series, value, "step")))
    return [
        Plot(title, caption, figures.svg(figure, f"s{number}-f{place}"))
        for place, (title, caption, figure) in enumerate(drawn)
    ]


def html(sections: Sequence[Section]) -> str:
    """The page, in a single file."""
    looks = styles(sections)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        title=_title(sections),
        columns=columns,
        doubts=DOUBTS,
        unfinished=UNFINISHED,
        looks=looks,
        sections=[(section, plots(number, section, looks)) for number, section in enumerate(sections)],
    )


def markdown(sections: Sequence[Section]) -> str:
    """The report with one figure for each section, for a code host or a terminal."""
    lines = [f"# {_title(sections)}", "", "All figures are in [report.html](report.html).", ""]
    for number, section in enumerate(sections, 1):
        lines += [f"## {_plain(section.title)}", ""]
        for heading, sentences in ((DOUBTS, section.warnings), (UNFINISHED, section.unfinished)):
            if sentences:
                lines += [f"**{heading}:**", "", *(f"- {_plain(sentence)}" for sentence in sentences), ""]
        if section.rows:
            cells = columns(section)
            alignment = ["---", *["---:"] * (len(cells) - 1)]
            table = [list(cells), alignment, *([cell(row) for cell in cells.values()] for row in section.rows)]
            table[2:] = [[_plain(cell) for cell in line] for line in table[2:]]
            lines += [*(f"| {' | '.join(line)} |" for line in table), ""]
            lines += [f"![Accuracy against bytes]({picture(number)})", ""]
        lines += [*(f"- {_plain(note)}" for note in section.notes), ""]
        lines += ["Common to all: " + "; ".join(f"{_plain(key)} {_plain(x)}" for key, x in section.facts) + ".", ""]
        lines += [*(f"- {_plain(row.name)}: {_plain(row.settings)}" for row in section.rows if row.settings), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def picture(number: int) -> str:
    """The file name of the figure of the `number`-th section, counted from 1."""
    return f"report-{number}.png"


def _title(sections: Sequence[Section]) -> str:
    finished = sum(len(runs) for section in sections for runs in section.runs.values())
    unfinished = sum(len(section.unfinished) for section in sections)
    return f"Gradient compression: {finished} run{'s' * (finished != 1)}" + (
        f", {unfinished} unfinished" if unfinished else ""
    )


def _plain(text: str) -> str:
    """The text, escaped so that Markdown takes nothing in it for markup."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def write(places: Sequence[str], out_dir: pathlib.Path) -> None:
    """Writes the page, the summary and its figures.

    Args:
      places: files, and directories in which to look for *.jsonl.
      out_dir: the directory to write to; it is made if it does not exist.

    Raises:
      ReportError: nothing is found.
      RecordsError: a file is not the records of a run.
    """
    sections = summarize(map(read, find(places)))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "report.html").write_text(html(sections), encoding="utf-8")
    (out_dir / "report.md").write_text(markdown(sections), encoding="utf-8")
    looks = styles(sections)
    for number, section in enumerate(sections, 1):
        if section.runs:
            figures.final_accuracy(*series_of(section, looks)).savefig(out_dir / picture(number), dpi=150)


def main() -> None:
    """Writes both files, and tells where they are."""
    out_dir = command.directory("out_dir", flags.FLAGS.out_dir)
    try:
        write(flags.FLAGS.runs, out_dir)
    except (ReportError, records.RecordsError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Written: {out_dir / 'report.html'}, {out_dir / 'report.md'}")


if __name__ == "__main__":
    # Not at import: other experiments have flags with the same names.
    flags.DEFINE_list("runs", ["out"], "Files of records, and directories in which to look for *.jsonl.")
    flags.DEFINE_string("out_dir", "out", "The directory of the report.")
    command.run(main)
