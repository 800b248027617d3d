"""The planner's cost model against measured exchanges and steps: it is fitted to some runs, and predicts the others.

    python -m experiments.predicted '--runs=out/allreduce/*.jsonl'
    python -m experiments.predicted '--runs=out/allreduce/*.jsonl' '--steps=out/end_to_end/*.jsonl'

`--runs` are records of experiments.allreduce, `--steps` of experiments.end_to_end. An exchange by a codec takes

    codec + latency * (messages that wait for one another) + headers * bytes / rate of the link

The fit finds three things: the latency, the headers, and for each codec its seconds for each parameter, with as many
hosts or nearly as many. Each run of --runs is left out of the fit in turn, and then predicted. All runs of --steps are
predicted by a fit to all of --runs, from the local step that was measured in the same run. Of --runs without a rate it
is taken from the run's own all-reduce, like `experiments.plan --measure` does.

The choice is the planner's: the fastest predicted codec if it is predicted to be 10 % faster than the uncompressed
exchange, otherwise none. The table compares it with the fastest that was measured.
"""

import collections
import glob
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.table import Table

from experiments import command, display, exchange_records, step_times
from experiments.records import RecordsError
from gradcomp_jax.planner import DENSE, MARGIN, cost

FLAGS = flags.FLAGS


class Way(NamedTuple):
    """A measured exchange, or step.

    Attributes:
      name: the codec with its settings, "none" for the uncompressed one.
      bytes: the bytes that a host sends.
      messages: how many messages it sends, by kind; None if that is not recorded.
      codec: the seconds of the codec alone; None if they are not recorded.
      seconds: the seconds of the whole.
    """

    name: str
    bytes: float
    messages: dict[str, int] | None
    codec: float | None
    seconds: float


class Run(NamedTuple):
    """The ways of one run.

    Attributes:
      name: what was measured.
      hosts: the number of hosts.
      parameters: the number of parameters.
      rate: bits a second of each host's link.
      local: the seconds of a local step; 0 for an exchange alone.
      ways: the ways, one of them uncompressed.
    """

    name: str
    hosts: int
    parameters: int
    rate: float
    local: float
    ways: list[Way]


class Fit(NamedTuple):
    """The fitted model.

    Attributes:
      latency: the seconds of a message that others wait for.
      headers: the bytes on the link for each byte sent.
      codecs: by name and number of hosts, a codec's seconds for each parameter.
      messages: by name and number of hosts, the messages of a codec.
    """

    latency: float
    headers: float
    codecs: dict[tuple[str, int], float]
    messages: dict[tuple[str, int], dict[str, int]]

    def seconds(self, way: Way, run: Run) -> float | None:
        """The predicted seconds of a way, from the nearest number of hosts; None if the fit saw no such codec."""
        seen = [key for key in self.codecs if key[0] == way.name]
        if not seen:
            return None
        key = min(seen, key=lambda key: abs(math.log(key[1] / run.hosts)))
        messages = self.messages[key] if way.messages is None else way.messages
        link = self.headers * 8 * way.bytes / run.rate
        return run.local + self.codecs[key] * run.parameters + self.latency * waits(messages, run.hosts) + link


class Judged(NamedTuple):
    """A run and its prediction.

    Attributes:
      run: the run.
      predicted: by name, the predicted seconds; of the ways that can be predicted.
      choice: the name of the chosen way.
      over: the measured seconds of the chosen way, over those of the fastest.
    """

    run: Run
    predicted: dict[str, float]
    choice: str
    over: float

    @property
    def errors(self) -> list[float]:
        """By how much each prediction is too large, as a share."""
        return [self.predicted[x.name] / x.seconds - 1 for x in self.run.ways if x.name in self.predicted]


def waits(messages: dict[str, int], hosts: int) -> int:
    """The messages of an exchange that wait for one another."""
    return sum(count * cost.hops(kind, hosts) for kind, count in messages.items())


def fit(runs: Sequence[Run]) -> Fit:
    """The model that fits exchanges best: least squares of relative errors.

    Raises:
      ValueError: there are fewer than two ways.
    """
    each, messages = collections.defaultdict(list), {}
    rows, rest = [], []
    for run in runs:
        for way in run.ways:
            if way.codec is None or way.messages is None:
                continue
            key = (way.name, run.hosts)
            each[key].append(way.codec / run.parameters)
            messages[key] = way.messages
            rows.append([waits(way.messages, run.hosts) / way.seconds, 8 * way.bytes / run.rate / way.seconds])
            rest.append(1 - way.codec / way.seconds)
    if len(rows) < 2:
        raise ValueError("a fit needs two exchanges or more")
    latency, headers = np.linalg.lstsq(np.array(rows), np.array(rest), rcond=None)[0]
    codecs = {key: statistics.median(seconds) for key, seconds in each.items()}
    return Fit(max(0.0, float(latency)), max(0.0, float(headers)), codecs, messages)


def judged(run: Run, by: Fit) -> Judged:
    """A run as it is predicted by a fit."""
    predicted = {way.name: seconds for way in run.ways if (seconds := by.seconds(way, run)) is not None}
    measured = {way.name: way.seconds for way in run.ways if way.name in predicted}
    if DENSE not in predicted:
        raise ValueError(f"{run.name} has no uncompressed exchange among the predicted ones")
    others = [(name, seconds) for name, seconds in predicted.items() if name != DENSE]
    found = cost.choose(others, predicted[DENSE], MARGIN, 0.0)
    choice = DENSE if found is None else found.name
    return Judged(run, predicted, choice, measured[choice] / min(measured.values()))


def left_out(runs: Sequence[Run]) -> list[Judged]:
    """Each run, predicted by a fit to the others."""
    return [judged(run, fit([other for other in runs if other is not run])) for run in runs]


# Records


def read_exchanges(path: str) -> Run:
    """A run of experiments.allreduce.

    Raises:
      RecordsError: the file is something else.
    """
    header, _, lines = exchange_records.read(path)
    try:
        if header["hosts"] < 2:
            raise ValueError("one host exchanges nothing")
        found = {line["way"]: _exchange(line) for line in lines}
        # The platform's own all-reduce, in the faster of two forms, has no codec.
        plain = min((way for name, way in found.items() if name.startswith("psum")), key=lambda way: way.seconds)
        others = [way for name, way in found.items() if not name.startswith("psum") and name != DENSE]
        ways = [plain._replace(name=DENSE, codec=0.0), *others]
        rate = 1e6 * header["mbit"] if header["mbit"] else 8 * cost.HEADERS * plain.bytes / plain.seconds
        limit = f"{header['mbit']:g} Mbit/s" if header["mbit"] else "no limit"
        name = f"{header['model']}, {header['hosts']} hosts, {limit}"
        return Run(name, header["hosts"], header["parameters"], rate, 0.0, ways)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordsError(f"{path} is not the records of experiments.allreduce: {error!r}") from error


def _exchange(line: dict[str, Any]) -> Way:
    codec = _middle(line["codec_ms"]) if line["codec_ms"] else 0.0
    return Way(line["way"], line["bytes"], line["messages"], codec, _middle(line["whole_ms"]))


def read_steps(path: str) -> Run:
    """A run of experiments.end_to_end.

    Raises:
      RecordsError: the file is something else.
    """
    (run,) = step_times.read([path])
    header, lines = run.header, run.cases
    try:
        ours = {line["method"]: line for line in lines if line["framework"] == "jax"}
        local = _middle(ours.pop(step_times.LOCAL)["ms"])
        ways = [Way(name, line["wire_bytes"], None, None, _middle(line["ms"])) for name, line in ours.items()]
        if not header["mbit"]:
            raise ValueError("it has no rate of the links, which end_to_end --mbit tells")
        rate, limit = 1e6 * header["mbit"], f"{header['mbit']:g} Mbit/s"
        name = f"steps of {header['model']}, {header['hosts']} hosts, {limit}"
        return Run(name, header["hosts"], header["parameters"], rate, local, ways)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordsError(f"{path} is not the records of experiments.end_to_end: {error!r}") from error


def _middle(milliseconds: Sequence[float]) -> float:
    return statistics.median(milliseconds) / 1e3


# The command


def table(found: Sequence[Judged]) -> Table:
    """A line for each run."""
    out = Table(title="Predicted by a fit to other runs")
    for heading in ("run", "chosen", "fastest measured"):
        out.add_column(heading, overflow="fold")
    for heading in ("chosen / fastest", "median error", "greatest error", "ways"):
        out.add_column(heading, justify="right")
    for one in found:
        errors = [abs(x) for x in one.errors]
        fastest = min((x for x in one.run.ways if x.name in one.predicted), key=lambda x: x.seconds)
        shown = (f"{one.over:.2f}", f"{statistics.median(errors):.0%}", f"{max(errors):.0%}", str(len(errors)))
        out.add_row(one.run.name, one.choice, fastest.name, *shown)
    return out


def main() -> None:
    """Prints the fit, and the table."""
    paths = [path for pattern in FLAGS.runs for path in sorted(glob.glob(pattern))]
    try:
        runs = [read_exchanges(path) for path in paths]
        if len(runs) < 2:
            raise ValueError(f"--runs={','.join(FLAGS.runs)} must name two files or more: each is predicted by others")
        whole = fit(runs)
        steps = [read_steps(path) for pattern in FLAGS.steps for path in sorted(glob.glob(pattern))]
        found = left_out(runs) + [judged(run, whole) for run in steps]
    except (RecordsError, ValueError) as error:
        sys.exit(f"error: {error}")
    screen = display.console()
    screen.print(table(found))
    screen.print(f"All runs together: latency {1e3 * whole.latency:.3f} ms, headers {whole.headers:.3f}.")


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_list("runs", [], "Records of experiments.allreduce; patterns may stand for several.")
    flags.DEFINE_list("steps", [], "Records of experiments.end_to_end; patterns may stand for several.")


if __name__ == "__main__":
    # Not at import: a test of another experiment may define flags with these names.
    define_flags()
    command.run(main)
