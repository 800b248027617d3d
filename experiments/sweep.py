"""Runs a grid of trainings, each in a process of its own.

    python -m experiments.sweep --grid=experiments/sweeps/cifar10.toml --out_dir=out/cifar10
    python -m experiments.sweep --grid=experiments/sweeps/lm.toml --out_dir=out/lm --jobs=2

The grid is a TOML file. Every [[grid]] in it stands for all combinations of its presets, codecs and seeds:

    [[grid]]
    presets = ["experiments/presets/cifar10.flags"]
    codecs = ["none", "powersgd --powersgd_rank=1", "qsgd --qsgd_bits=8"]
    seeds = [0, 1, 2]

With `methods` in the place of `codecs` the runs are of `experiments.lm`. Each method may have its learning rates, too.

A run that has reached its end is skipped. A run that has not goes on from its checkpoint. A run that fails does not
keep the others from running. So after a failure or an interruption the same command finishes the work. Each run has a
directory in --out_dir, with its records and its log; `experiments.report` makes a page of them. GRADCOMP_DATA_DIR in
the environment names the folder of the data.
"""

import contextlib
import datetime
import itertools
import pathlib
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from absl import flags

from experiments import codecs, command, display, records
from experiments.interrupts import interruptible

FLAGS = flags.FLAGS

KEYS = {"presets": str, "codecs": str, "seeds": int}
# What tells the runs of a grid apart: the program, and its flag.
PROGRAMS = {"codecs": ("cifar", "codec"), "methods": ("lm", "method")}
# A flag without characters that are special in a shell or in a file name.
FLAG = re.compile(r"--(?:no)?(\w+?)(=[\w.+-]+)?")
POLL_SECONDS = 1.0


class GridError(Exception):
    """The file is not a grid."""


class Cell(NamedTuple):
    """One run.

    Attributes:
      preset: the path of a flagfile.
      codec: the name of the codec or method, and the flags of its settings.
      seed: the seed of the run.
      kind: "codecs" or "methods".
    """

    preset: str
    codec: str
    seed: int
    kind: str = "codecs"

    @property
    def name(self) -> str:
        """The name of the run and of its directory, such as "cifar10-qsgd_qsgd_bits=8-seed0"."""
        codec = "_".join(part.lstrip("-") for part in self.codec.split())
        return f"{pathlib.Path(self.preset).stem}-{codec}-seed{self.seed}"

    def command(self, out_dir: pathlib.Path) -> list[str]:
        """The command to run; `out_dir` is the sweep's."""
        codec, *settings = self.codec.split()
        folder, (program, flag) = out_dir / self.name, PROGRAMS[self.kind]
        return [
            *(sys.executable, "-m", f"experiments.{program}", f"--flagfile={self.preset}", f"--{flag}={codec}"),
            *settings,
            *(f"--seed={self.seed}", f"--out_dir={folder}", f"--checkpoint_dir={folder / 'checkpoints'}"),
        ]


def is_codec(text: str, kind: str = "codecs") -> bool:
    """Whether a text is a codec, or a method, with its own flags; those of a method may set its learning rates.

    Accordion's flags include those of the codec inside, and streaming_diloco's begin with "streaming".
    """
    name, *given = text.split(" ")
    own = codecs.CODECS if name == "accordion" else [name, name.removesuffix("_diloco")]
    prefixes = tuple(f"{prefix}_" for prefix in own)
    shared = ("every", *(["delayed"] if kind == "codecs" else ["adamw_lr", "muon_lr"]))
    flags = [match[1] if (match := FLAG.fullmatch(flag)) else "" for flag in given]
    return name.isidentifier() and all(flag in shared or flag.startswith(prefixes) for flag in flags)


def read(path: pathlib.Path) -> list[Cell]:
    """The runs of a grid's file, in its order.

    Raises:
      GridError: the file cannot be read, is not a grid, or names a run twice.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GridError(f"cannot read {path}: {error}") from error
    grids = content.get("grid")
    if set(content) != {"grid"} or not isinstance(grids, list):
        raise GridError(f"{path}: expected [[grid]] and nothing else at the top, got {', '.join(content) or 'nothing'}")
    cells: list[Cell] = []
    for grid in grids:
        cells += _cells(path, grid)
    for cell in cells:
        if not is_codec(cell.codec, cell.kind):
            raise GridError(
                f"{path}: {cell.codec!r} is not a {cell.kind[:-1]} with its own settings, such as "
                f"'qsgd --qsgd_bits=8'; what all {cell.kind} share belongs into a preset"
            )
        if not pathlib.Path(cell.preset).is_file():
            raise GridError(f"{path}: there is no preset {cell.preset}")
        if (count := [other.name for other in cells].count(cell.name)) > 1:
            raise GridError(f"{path}: there are {count} runs of the name {cell.name}")
    return cells


def _cells(path: pathlib.Path, grid: dict[str, list]) -> list[Cell]:
    """The runs of one [[grid]]."""
    kind = "methods" if "methods" in grid else "codecs"
    keys = {kind if key == "codecs" else key: type_ for key, type_ in KEYS.items()}
    if set(grid) != set(keys):
        raise GridError(f"{path}: a [[grid]] has {', '.join(keys)}, got {', '.join(grid) or 'nothing'}")
    for key, type_ in keys.items():
        value = grid[key]
        if not isinstance(value, list) or not value or not all(type(x) is type_ for x in value):
            raise GridError(f"{path}: {key} must be a list of {type_.__name__}, got {value!r}")
    combinations = itertools.product(*(grid[key] for key in keys))
    return [Cell(preset, codec, seed, kind) for preset, codec, seed in combinations]


def settings(cell: Cell) -> str:
    """The settings of a run: its codec and seed, and the lines of its preset."""
    preset = pathlib.Path(cell.preset).read_text(encoding="utf-8").splitlines()
    return "\n".join([cell.codec, f"--seed={cell.seed}", *(x for x in preset if x and not x.startswith("#"))]) + "\n"


def require_same(cell: Cell, folder: pathlib.Path) -> None:
    """Raises GridError if the run's directory is of a run with other settings; else writes the settings there."""
    path = folder / "settings.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "settings.partial"
        partial.write_text(settings(cell), encoding="utf-8")
        partial.rename(path)
    elif path.read_text(encoding="utf-8") != settings(cell):
        raise GridError(f"{folder} is of a run with other settings: move it away, or give another --out_dir")


def recorded(folder: pathlib.Path) -> records.Run | None:
    """The records of a run so far; None if there are none."""
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(records.RecordsError):  # the first line is not written yet
            return records.read(path)
    return None


def part(folder: pathlib.Path) -> float:
    """The share of a run that is done, between 0 and 1."""
    found = recorded(folder)
    return found.step / found.header["steps"] if found else 0.0


def run(cell: Cell, out_dir: pathlib.Path, interrupted: Callable[[], bool], show: Callable[[float], None]) -> str:
    """Runs a cell in a process of its own, to its end unless the user interrupts.

    Args:
      cell: the run.
      out_dir: the sweep's directory.
      interrupted: returns whether the user asks to stop; then the process is asked to stop.
      show: a function that is called now and then with the share of the run that is done, between 0 and 1.

    Returns:
      The reason of a failure; empty if the run did not fail.
    """
    folder = out_dir / cell.name
    asked = False
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        # In a session of its own, where Ctrl-C does not reach it a second time.
        process = subprocess.Popen(cell.command(out_dir), stdout=log, stderr=log, start_new_session=True)
        try:
            while process.poll() is None:
                if interrupted() and not asked:
                    asked = True
                    process.send_signal(signal.SIGINT)
                show(part(folder))
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()  # if the process is still there, something has gone wrong here
            process.wait()
    if process.returncode == 0:
        return ""
    *_, last = ["", *(folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    return f"exit code {process.returncode}, {last!r}; see {folder / 'log.txt'}"


def sweep(grid: pathlib.Path, out_dir: pathlib.Path, screen: display.Console, jobs: int = 1) -> list[str]:
    """Runs the runs that are not done yet.

    Args:
      grid: the file.
      out_dir: the directory of the runs' directories.
      screen: the console to show progress on.
      jobs: the number of runs at a time.

    Returns:
      The runs that failed, each with the reason.

    Raises:
      GridError: the file is not a grid, or a directory is of a run with other settings.
      KeyboardInterrupt: the user interrupted, and the run has ended.
    """
    cells = read(grid)
    for cell in cells:
        require_same(cell, out_dir / cell.name)
    todo = [cell for cell in cells if not ((found := recorded(out_dir / cell.name)) and found.end)]
    screen.print(f"{len(cells)} runs, {len(cells) - len(todo)} of them done before", soft_wrap=True)
    began, before = time.perf_counter(), sum(part(out_dir / cell.name) for cell in todo)
    with interruptible() as interrupted, display.progress(screen) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("sweep", total=len(todo), status="")

        def left() -> str:
            """The remaining time in words, at the speed since the beginning."""
            now = sum(part(out_dir / cell.name) for cell in todo)
            progress.update(bar, completed=now)
            if now == before:
                return "time left unknown"
            seconds = (time.perf_counter() - began) / (now - before) * (len(todo) - now)
            return f"{datetime.timedelta(seconds=round(seconds))} left"

        def one(number: int, cell: Cell) -> str:
            """Runs a cell, unless the user interrupts; returns the failure, or nothing."""
            if interrupted():
                return ""
            show = lambda part: progress.update(bar, status=f"{cell.name} {part:.0%}, {left()}")  # noqa: E731
            failure = run(cell, out_dir, interrupted, show)
            if interrupted():
                return ""
            found = recorded(out_dir / cell.name)
            outcome = f"failed, {failure}" if failure or not found else reached(found)
            screen.print(f"{number}/{len(todo)} {cell.name}: {outcome}; {left()}", soft_wrap=True)
            return f"{cell.name}: {failure}" if failure else ""

        failures = [failure for failure in pool.map(one, itertools.count(1), todo) if failure]
    if interrupted():
        raise KeyboardInterrupt
    return failures


def reached(found: records.Run) -> str:
    """What a run reached, in words."""
    return f"test loss {found.test[-1]['loss']:.4f}, test accuracy {found.accuracy:.2%}"


def main() -> None:
    """Runs the grid, and reports the failures."""
    screen = display.console()
    try:
        out_dir = command.directory("out_dir", FLAGS.out_dir)
        failures = sweep(pathlib.Path(FLAGS.grid), out_dir, screen, FLAGS.jobs)
    except (GridError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        screen.print("interrupted; the same command goes on", soft_wrap=True)
        sys.exit(130)
    where = f"python -m experiments.report --runs={FLAGS.out_dir} makes a page of the records"
    screen.print(where, soft_wrap=True)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    # Not at import: other experiments have flags with the same names.
    flags.DEFINE_string("grid", None, "The TOML file of what to run.", required=True)
    flags.DEFINE_string("out_dir", "out", "The directory of the runs' directories.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time; each takes all the cores that it gets.", lower_bound=1)
    command.run(main)
