"""The records of `allreduce`: a file of JSON lines, and the figures, tables and pictures that are made from it."""

import json
import math
import pathlib
import statistics
from typing import Any, NamedTuple

from rich.table import Table

from experiments import figures
from experiments.records import RecordsError
from gradcomp_jax.planner.cost import HEADERS

HEADER = 66  # bytes of Ethernet, IPv4 and TCP with time stamps
BASELINES = ("psum, flat", "psum, by leaf")
Record = dict[str, Any]


class Records(NamedTuple):
    """The records of one run, as they lie in a file of JSON lines.

    Attributes:
      header: what was measured, where, when and by which command.
      latency: the ms of an empty collective of each kind, round by round.
      ways: a record for each way, see `way_record`.
    """

    header: Record
    latency: dict[str, list[float]]
    ways: list[Record]


class Figures(NamedTuple):
    """Figures of a way, in ms; medians. Without a rate of the link the last three are NaN.

    Attributes:
      whole: the exchange.
      encode: up to what is said.
      decode: from what is heard, with residual and state.
      wire: the rest, which is sending and waiting.
      floor: the time of its bytes at the rate of the link.
      bound: the floor with headers, a latency for each message, encode and decode.
      over: whole / bound.
    """

    whole: float
    encode: float
    decode: float
    wire: float
    floor: float
    bound: float
    over: float


def read(path: str) -> Records:
    """The records of a file.

    Raises:
      RecordsError: it cannot be read, or it is something else.
    """
    try:
        lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
        header, latency, *ways = lines
        if [line["kind"] for line in lines] != ["allreduce", "latency", *["way"] * len(ways)]:
            raise ValueError("its lines are of other kinds")
        return Records(header, latency["ms"], ways)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordsError(f"{path} is not the records of experiments.allreduce: {error}") from error


def write(path: str, records: Records) -> None:
    """Writes records to a file."""
    latency = {"kind": "latency", "ms": records.latency}
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) + "\n" for line in (records.header, latency, *records.ways)]
    pathlib.Path(path).write_text("".join(lines))


def figures_of(way: Record, records: Records) -> Figures:
    """The figures of a way."""
    middle = lambda times: statistics.median(times) if times else 0.0  # noqa: E731
    whole, codec = middle(way["whole_ms"]), middle(way["codec_ms"])
    encode = min(codec, middle(way["encode_ms"]))  # noise may make the part longer than the whole
    mbit = records.header["mbit"]
    floor = 8 * way["bytes"] / mbit / 1e3 if mbit else math.nan
    latency = sum(count * middle(records.latency[kind]) for kind, count in way["messages"].items())
    bound = floor * HEADERS + latency + codec
    return Figures(whole, encode, codec - encode, whole - codec, floor, bound, whole / bound)


def baseline_ms(records: Records) -> float:
    """The faster of the two baselines, in ms."""
    return min(figures_of(way, records).whole for way in records.ways if way["way"] in BASELINES)


def title(records: Records) -> str:
    """What was measured, in words."""
    header = records.header
    rate = f" at {header['mbit']:g} Mbit/s" if header["mbit"] else ""
    joined = f"joined by their links{rate}" if header["processes"] > 1 else "joined by memory"
    return f"{header['model']}, {header['parameters']:,} parameters, {header['hosts']} hosts {joined}"


def table(records: Records) -> Table:
    """The table of one run."""
    out = Table(title=f"{title(records)}; medians of {len(records.ways[0]['whole_ms'])}")
    out.add_column("way", no_wrap=True)
    headings = ("ms", "least", "most", "encode", "wire", "decode", "floor", "bound", "ms/bound")
    for heading in (*headings, "psum/ms", "messages", "MB", "carried/MB"):
        out.add_column(heading, justify="right", no_wrap=True)
    dense = baseline_ms(records)
    for way in records.ways:
        x = figures_of(way, records)
        carried = [count - HEADER * packets for count, packets in filter(None, way["counted"])]
        share = statistics.median(carried) / way["bytes"] if carried and way["bytes"] else 0
        ends = min(way["whole_ms"]), max(way["whole_ms"])
        cells = [f"{value:.1f}" for value in (x.whole, *ends, x.encode, x.wire, x.decode)]
        cells += [f"{x.floor:.1f}", f"{x.bound:.1f}", f"{x.over:.2f}"] if records.header["mbit"] else ["", "", ""]
        cells += [f"{dense / x.whole:.2f}", f"{sum(way['messages'].values())}", f"{way['bytes'] / 1e6:.3f}"]
        out.add_row(way["way"], *cells, f"{share:.3f}" if share else "")
    return out


def panel(records: Records) -> figures.Exchanges:
    """What a figure shows of a run."""
    bars = {}
    for way in records.ways:
        if way["way"] not in BASELINES:
            x = figures_of(way, records)
            bars[way["way"]] = figures.Exchange(x.encode, max(0.0, x.wire), x.decode, x.floor)
    return figures.Exchanges(title(records), bars, baseline_ms(records))
