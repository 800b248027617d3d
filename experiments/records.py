"""The records of a run: one file of JSON lines, from which tables, figures and reports are made.

Each line has a "kind":

- run, the first line: the settings of the run, see `loop.header`;
- train, every --log_every steps: means over the steps since the line before;
- test, at every evaluation;
- leaves, after a line "test", if codecs are measured: "error", "residual" and "residual_norm" by path;
- levels, after a line "train": accordion's decision for each leaf, with the reason, if a decision has changed;
- resumed, where a run went on from a checkpoint;
- end, the last line, only in a run that has reached its end.

A line "train" also has "code_bits" for codecs whose codes vary in length, see `gradcomp_jax.code_bits`. If codecs are
measured, it has "error", "residual" and "residual_norm", see `gradcomp_jax.metrics`. These figures, and those of
"leaves", describe the last step.

All lines but the first have "step", the number of training steps before; "bytes", the bytes that one worker has sent by
then; and "dense_bytes", the bytes that it would have sent in a dense all-reduce of the gradients in their own type.
Both count the gradients, and the values that travel in the same messages: the loss, the accuracy and batch statistics,
as many floats as "beside" in the first line says. Figures that are not finite are written like Python's json does, NaN.
"""

import contextlib
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tensorboardX

from gradcomp_jax import WireBits

Record = dict[str, Any]


class RecordsError(Exception):
    """A file is not the records of a run, or it cannot be written."""


class Run(NamedTuple):
    """The records of one run.

    Attributes:
      header: the line "run".
      train: the lines "train".
      test: the lines "test".
      resumed: the lines "resumed".
      levels: the lines "levels", whose "decisions" are sentences.
      leaves: the lines "leaves".
      end: the line "end"; empty in a run that has not reached its end.
    """

    header: Record
    train: list[Record]
    test: list[Record]
    resumed: list[Record]
    levels: list[Record]
    leaves: list[Record]
    end: Record

    @property
    def name(self) -> str:
        """The codec with its settings, such as "qsgd bits=2"."""
        return self.header["label"]

    @property
    def called(self) -> str:
        """The codec without its settings, such as "topk", or "topk, every 10" with outer steps."""
        return self.header["codec"] if self.every == 1 else f"{self.header['codec']}, every {self.every}"

    @property
    def every(self) -> int:
        """The local steps of a period, with outer steps; otherwise 1."""
        return self.header["settings"].get(f"{self.header['codec']}_every", 1)

    @property
    def left_over(self) -> str:
        """What is to be said of steps after the last exchange, in words; empty if there are none."""
        delay, fragments = (
            self.header["settings"].get(f"{self.header['codec']}_{key}", default)
            for key, default in (("delay", 0), ("fragments", 1))
        )
        # With a delay an exchange is beside the step after the period's last.
        left = (self.step - 1) % self.every + 1 if delay else self.step % self.every
        if left == self.step and self.every > 1:
            return "there was no exchange" + " of its last fragment" * (fragments > 1)
        if fragments > 1 and left:
            return (
                f"the last {left} steps came after the last exchange of its last fragment, and count for nothing there"
            )
        return f"the last {left} steps came after its last exchange, and count for nothing" if left else ""

    @property
    def accuracy(self) -> float:
        """The accuracy on the test split at the last evaluation, between 0 and 1."""
        return self.test[-1]["accuracy"] if self.test else float("nan")

    @property
    def step(self) -> int:
        """The last step with a record."""
        return max((record["step"] for record in (*self.train, *self.test)), default=0)

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than dense the run sent; infinite if it sent nothing."""
        last = self.end or max((*self.train, *self.test), key=lambda record: record["step"])
        return last["dense_bytes"] / last["bytes"] if last["bytes"] else math.inf

    @property
    def compressed_share(self) -> float:
        """The share of steps that sent less than dense, between 0 and 1; for a run that has reached its end."""
        return self.end["compressed_steps"] / self.step

    @property
    def compressed_ratio(self) -> float | None:
        """How many times fewer bytes than dense these steps sent; None if there are none, or if the workers changed.

        If they changed, a dense step sent more, or less, at first than later. None too if these steps sent nothing.
        """
        if not self.end["compressed_bytes"] or any(line["workers"] != self.header["workers"] for line in self.resumed):
            return None
        return self.end["dense_bytes"] * self.compressed_share / self.end["compressed_bytes"]

    @property
    def step_ms(self) -> float:
        """The median milliseconds of a step."""
        times = [record["ms"] for record in self.train]
        return statistics.median(times[1:] or times)  # the first time may include the compilation


def differences(settings: Record, others: Record) -> str:
    """The differences between two runs' settings, such as "lr=0.1, not 0.2"; empty if there are none."""
    found = []
    for key in {**settings, **others}:
        if key not in settings or key not in others:
            found.append(f"{'no ' * (key not in settings)}{key}, which only one of the versions has")
        elif settings[key] != others[key]:
            found.append(f"{key}={settings[key]!r}, not {others[key]!r}")
    return "; ".join(found)


def of(lines: Iterable[Record]) -> Run:
    """The run that these records describe.

    Raises:
      RecordsError: the first record is not of the kind "run", or another is of an unknown kind.
    """
    header, *rest = lines or [{}]
    kinds: dict[str, list[Record]] = {kind: [] for kind in ("train", "test", "resumed", "levels", "leaves", "end")}
    if header.get("kind") != "run":
        raise RecordsError("the first line is not of the kind 'run'")
    for record in rest:
        if record.get("kind") not in kinds:
            raise RecordsError(f"there is a line of kind {record.get('kind')!r}")
        kinds[record["kind"]].append(record)
    ends = kinds.pop("end")
    end = ends[-1] if ends else {}
    return Run(header=header, end=end, **kinds)


def read(path: pathlib.Path) -> Run:
    """The run whose records are in a file; a last line that was cut off, such as by a kill, is left out.

    Raises:
      RecordsError: the file cannot be read, or it is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        # The text after the last newline is empty, or it is a line that was not written to its end.
        return of([json.loads(line) for line in lines[:-1]])
    except (OSError, ValueError, AttributeError, TypeError, RecordsError) as error:
        raise RecordsError(f"{path} is not the records of a run: {error}") from error


class Recorder:
    """Keeps the records of a run while it goes on: in a file, for TensorBoard if asked, and for its checkpoints.

    Attributes:
      state: everything that another process needs to go on; JSON.
    """

    def __init__(
        self, path: pathlib.Path | None, header: Record, board: pathlib.Path | None, state: Record | None = None
    ):
        """Writes the file, up to the point of `state`.

        Args:
          path: the path of the file; None for none, because another process of the run writes it.
          header: the first line of new records.
          board: TensorBoard's directory.
          state: the state of the recorder in the checkpoint from which the run goes on.

        Raises:
          RecordsError: the file is of a run with other settings that has reached its end, or of something else. Also,
            here and later: it cannot be written.
        """
        self.path = path
        self.state = state or {
            "lines": [header],
            "recent": [],  # loss, accuracy and milliseconds of each step since the last line "train"
            "step": 0,
            "bits": 0,
            "dense_bits": 0,
            "compressed_steps": 0,
            "compressed_bits": 0,
            "exchanges": 0,  # steps that sent something
            "seconds": {},  # by kind of work
        }
        if path:
            _require_own(path, header)
            with _named(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # In one step, so that the file has either its old content or the new.
                partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
                partial.write_text("".join(map(_text, self.state["lines"])), encoding="utf-8")
                partial.replace(path)
        with _named(board):
            # TensorBoard forgets its figures of later steps. Its file names have the second: with the step added, a run
            # that goes on within a second does not overwrite its own file.
            first = self.state["step"] + 1
            self.board = board and tensorboardX.SummaryWriter(str(board), purge_step=first, filename_suffix=f".{first}")

    @property
    def sent(self) -> str:
        """The bytes that one worker has sent so far, beside those that it would have sent dense, in words."""
        return f"{self.state['bits'] / 8e6:.1f} of {self.state['dense_bits'] / 8e6:.1f} MB dense"

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Adds the time of a block to the time of its kind."""
        began = time.perf_counter()
        yield
        self.state["seconds"][kind] = self.state["seconds"].get(kind, 0.0) + time.perf_counter() - began

    def count(self, wire: WireBits, dense_bits: int, loss: float, accuracy: float, ms: float) -> None:
        """Counts a step."""
        state = self.state
        sent = wire.total - state["bits"]  # not wire.last, which local steps leave as it was
        state["step"] += 1
        state["bits"] = wire.total
        state["dense_bits"] += dense_bits
        state["exchanges"] += sent > 0
        if sent < dense_bits:
            state["compressed_steps"] += 1
            state["compressed_bits"] += sent
        state["recent"].append([loss, accuracy, ms])

    def train(self, **values: float) -> None:
        """Writes a line "train" about the steps since the line before."""
        losses, accuracies, ms = zip(*self.state["recent"], strict=True)
        means = {"loss": statistics.fmean(losses), "accuracy": statistics.fmean(accuracies)}
        self.state["recent"] = []
        self.write("train", **means, ms=statistics.median(ms), **values)

    def levels(self, decisions: list[str]) -> bool:
        """Writes a line "levels" if the decisions differ from the last written ones; returns whether it wrote."""
        written = [line["decisions"] for line in self.state["lines"] if line["kind"] == "levels"]
        if changed := decisions != (written[-1] if written else []):
            self.write("levels", decisions=decisions)
        return changed

    def end(self, **values: Any) -> None:
        """Writes the line "end"."""
        self.write(
            "end",
            compressed_steps=self.state["compressed_steps"],
            compressed_bytes=self.state["compressed_bits"] // 8,
            exchanges=self.state["exchanges"],
            **values,
            seconds={kind: _rounded(value) for kind, value in self.state["seconds"].items()},
        )

    def write(self, kind: str, **values: Any) -> None:
        """Writes a line."""
        so_far = {"bytes": self.state["bits"] // 8, "dense_bytes": self.state["dense_bits"] // 8}
        values = {**so_far, **{key: _rounded(value) for key, value in values.items()}}
        line = {"kind": kind, "step": self.state["step"], **values}
        self.state["lines"].append(line)
        if self.path:
            with _named(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(_text(line))
        if self.board:
            for key, value in _scalars(values):
                self.board.add_scalar(f"{kind}/{key}", value, line["step"])

    def close(self) -> Run:
        """The run so far."""
        if self.board:
            self.board.close()
        return of(self.state["lines"])


def _require_own(path: pathlib.Path, header: Record) -> None:
    """Raises RecordsError rather than lose the records of another run that has reached its end."""
    if path.exists() and path.stat().st_size:
        other = read(path)
        difference = differences(other.header["settings"], header["settings"])
        if other.end and difference:
            raise RecordsError(f"{path} has the records of a run with {difference}: give another --out_dir, or move it")


@contextlib.contextmanager
def _named(path: pathlib.Path | None) -> Iterator[None]:
    """Turns errors of writing into errors with the file's name."""
    try:
        yield
    except OSError as error:
        raise RecordsError(f"cannot write {path}: {error.strerror}") from error


def _scalars(values: Record) -> Iterator[tuple[str, float]]:
    """The numbers among values, by key; numbers by path have keys of both."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{path}", x) for path, x in value.items())
        elif isinstance(value, int | float):
            yield key, value


def _text(line: Record) -> str:
    return json.dumps(line) + "\n"


def _rounded(value: Any) -> Any:
    """A float with six significant digits, because float32 has no more, alone or in a dict; other values unchanged."""
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
