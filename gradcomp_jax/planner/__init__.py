"""Whether compression will pay, before there is a cluster: the predicted step of each codec, and a recommendation.

    loss_fn, params, batch -- work.py --> seconds of compute and codecs -+
    params, codecs -- describe --> messages and bytes -------------------+-- cost.py --> steps -- table.py --> text
    link, device -- targets.py --> rates --------------------------------+

`candidates.py` has the codecs that are compared by default. Every number of a plan is a prediction.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh

from gradcomp_jax.across import across
from gradcomp_jax.arguments import shown
from gradcomp_jax.codecs.none import none
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.contract import require_whole
from gradcomp_jax.describe import Description, describe
from gradcomp_jax.describe.dry import shapes_of
from gradcomp_jax.outer import Outer
from gradcomp_jax.planner import candidates, cost, table, work
from gradcomp_jax.planner.candidates import Candidate
from gradcomp_jax.planner.cost import Cost, Link
from gradcomp_jax.planner.targets import DEVICES, UTILISATION, Device, device_of, link_of

__all__ = ["DEVICES", "Device", "Link", "Plan", "Row", "plan"]

# A codec must be predicted to be faster by this part; and of codecs within CLOSE of the fastest, the one that changes
# training least is recommended.
MARGIN, CLOSE = 0.10, 0.05
# Where collectives are asynchronous, a compiled dense step for H100s overlaps 5 of 6 all-reduces with its backward
# pass (`gradcomp_jax.certify`). On CPUs XLA waits for each collective.
DENSE_OVERLAP = 5 / 6
DENSE = "none"


class Row(NamedTuple):
    """The prediction for one codec.

    Attributes:
      name: the codec, with its settings.
      tx: the codec's transformation, or the whole optimiser with outer steps.
      cost: the parts of a step's time; `cost.step` is their sum.
      speedup: how many times faster a step is than without compression.
      sent: the bytes that one device sends to other workers, by the ring laws; a mean over the steps of a period.
      kept: the bytes of residuals and other state that one device keeps.
      accuracy: what runs of this project say about its accuracy.
      offered: whether it may be recommended for each step; outer steps are recommended apart.
    """

    name: str
    tx: optax.GradientTransformation
    cost: Cost
    speedup: float
    sent: float
    kept: int
    accuracy: str
    offered: bool


class Plan(NamedTuple):
    """Predicted steps, fastest first; `str` of a plan is a table.

    Attributes:
      rows: the codecs, the uncompressed step among them under the name "none".
      refused: by name, the reason why a codec cannot be used.
      best: the recommended codec; "none" means: do not compress.
      reason: why, in a sentence.
      best_outer: the recommended way of outer steps, which changes the training more; None if it would gain too little.
      outer_reason: why, in a sentence.
      setting: workers, link, device, and where the seconds of the local step are from, in words.
    """

    rows: tuple[Row, ...]
    refused: dict[str, str]
    best: str
    reason: str
    best_outer: str | None
    outer_reason: str
    setting: dict[str, str]

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        return table.text(self)


class _Target(NamedTuple):
    """What all rows share.

    Attributes:
      workers: the workers, for `describe`.
      devices: the devices of each.
      link: the link between workers.
      device: the device; None: this one, which is timed.
      platform: its platform.
      repeats: how often a program is timed.
      overlap: the user's shares of overlap, by name, or one for all; None: by default.
    """

    workers: AbstractMesh
    devices: int
    link: Link
    device: Device | None
    platform: str
    repeats: int
    overlap: Mapping[str, float] | float | None


def plan(
    loss_fn: Callable[[Any, Any], Any] | None,
    params: Any,
    batch: Any = None,
    *,
    workers: int,
    link: Link | str,
    devices_per_worker: int = 1,
    device: Device | str | None = None,
    step_seconds: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    codecs: Mapping[str, optax.GradientTransformation] | None = None,
    overlap: Mapping[str, float] | float | None = None,
    repeats: int = 5,
) -> Plan:
    """Predicts the step time of data-parallel training with each codec, and recommends one, or none.

    Nothing is sent, and one device is enough. With shapes as parameters and `device`, nothing of their size is
    allocated.

    A step is the local step, the exchange, and what the two do at the same time:

    - Local step. `step_seconds`, if given. Else with `device` the operations of loss and gradients as XLA counts them,
      at 40 % of the published rate. Else it is timed here, with the optimiser.
    - Codec. Without `device` it is timed here: an exchange of one worker, and the decoding of other workers' codes.
      With `device` it is XLA's count of bytes at half of the published memory bandwidth, and of operations at 40 % of
      the published rate. The counts are of programs compiled for the platform that jax runs on here. One leaf of each
      shape stands for all. With `devices_per_worker` each device does its share.
    - Link. Each collective of the traced step by `gradcomp_jax.planner.cost`, with 4.6 % for packets' headers, one
      after another. Every worker sends and receives at the full rate at once; nothing is lost, and no switch is shared.
    - Overlap. On GPUs and TPUs 5/6 of the uncompressed exchange, and of a codec in b parts (b - 1) / b, may hide behind
      the backward pass, which is 2/3 of a local step. On CPUs nothing hides. An exchange of outer steps never hides.

    Codecs with several kinds of steps count with the strongest, like in `describe`. Outer steps add what a local step
    of `outer` costs beyond a plain one: nothing here, 1 to 4 % as measured.

    Args:
      loss_fn: (params, batch) -> loss; may be None if `step_seconds` is given.
      params: the parameters, or their shapes; always whole.
      batch: the batch of one device, or its shapes.
      workers: the number of workers, each with a link of its own; such as hosts, or sites.
      link: the link of each worker: "1gbit", with a latency "1gbit 20ms", or a `Link`.
      devices_per_worker: the devices that share a worker's link. Above 1 every codec is put `across` workers.
      device: a device that need not be here: "h100", "a100", "v5e", "cpu", or a `gradcomp_jax.planner.Device`.
      step_seconds: the seconds of a local step of one device.
      optimizer: the optimiser that is timed with the local step, and that outer steps take inside; by default Adam.
      codecs: by name, transformations to compare instead of the default ones: codecs, or `outer`s.
      overlap: the share of an exchange that the compiler overlaps with the backward pass, for all codecs, or by name.
        `gradcomp_jax.certify` tells it for a compiled step, `Report.overlapped`.
      repeats: how often a program is timed; medians are taken.

    Returns:
      A plan. A codec is recommended only if its step is predicted to be 10 % faster than the uncompressed one. Of
      codecs within 5 % of the fastest, the first is recommended; the default ones are in the order in which they change
      training. Default codecs that lost more than three points of accuracy in runs of this project are in the table and
      are not recommended. Nor are those without a figure, but for the cast to bfloat16. Outer steps are recommended
      apart, whatever their figure: the row tells it.

    Raises:
      ValueError: an argument is not usable, or the seconds of a local step cannot be told.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import gradcomp_jax as gcj
    >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    >>> told = gcj.plan(None, params, workers=8, link="100mbit", device="cpu", step_seconds=0.01)
    >>> told.best != "none", gcj.plan(None, params, workers=8, link="100gbit", device="cpu", step_seconds=0.01).best
    (True, 'none')
    """
    link, chosen = link_of(link), None if device is None else device_of(device)
    for name, value in {"workers": workers, "devices_per_worker": devices_per_worker, "repeats": repeats}.items():
        require_whole(name, value, 1)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    shapes = shapes_of(params)
    compute, told = _compute(loss_fn, params, batch, chosen, step_seconds, optimizer, repeats)
    platform = jax.default_backend() if chosen is None else chosen.platform
    among = work.absent(workers, devices_per_worker, platform)
    target = _Target(among, devices_per_worker, link, chosen, platform, repeats, overlap)
    dense = across(none()) if devices_per_worker > 1 else none()
    every = {DENSE: Candidate(dense, "")} | _candidates(codecs, optimizer, devices_per_worker)
    _require_overlap(overlap, every)
    rows: list[Row] = []
    refused: dict[str, str] = {}
    for name, one in every.items():
        try:
            rows.append(_row(name, one, shapes, compute, target, rows[0] if rows else None))
        except ValueError as error:
            if not rows:
                raise
            refused[name] = str(error)
    setting = _setting(workers, devices_per_worker, link, device, told)
    return Plan(tuple(sorted(rows, key=lambda row: row.cost.step)), refused, *_recommended(rows), setting)


def _compute(
    loss_fn: Any,
    params: Any,
    batch: Any,
    device: Device | None,
    given: float | None,
    optimizer: optax.GradientTransformation,
    repeats: int,
) -> tuple[float, str]:
    """The seconds of a local step, and where they are from."""
    if given is not None:
        if not given > 0:
            raise ValueError(f"step_seconds={shown(given)} must be above 0")
        return given, "given"
    if loss_fn is None:
        raise ValueError("loss_fn is None: give the seconds of a local step, step_seconds=, or a loss function")
    if device is not None:
        flops = work.operations(loss_fn, shapes_of(params), shapes_of(batch))
        rate = f"{UTILISATION:.0%} of {device.flops_per_second / 1e12:,.0f} TFLOP/s"
        return device.train_seconds(flops), f"{flops / 1e12:.3g} TFLOP at {rate}"
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((params, batch))):
        raise ValueError("params or batch are shapes, so a step cannot be timed here: give device= or step_seconds=")
    return work.local_step(loss_fn, optimizer, params, batch).timed(repeats), "timed here"


def _candidates(
    given: Mapping[str, optax.GradientTransformation] | None, optimizer: optax.GradientTransformation, devices: int
) -> dict[str, Candidate]:
    """The codecs to compare, by name."""
    if DENSE in (given or {}):
        raise ValueError(f"codecs has the name {DENSE!r}, which is that of the uncompressed step: give another")
    if given is None:
        found = candidates.codecs() | candidates.outer_steps(optimizer, devices > 1)
    else:
        found = {name: Candidate(tx) for name, tx in given.items()}
    plain = lambda tx: isinstance(tx, Compressor) and tx.settings.fast is None  # noqa: E731
    return {
        name: one._replace(tx=across(one.tx)) if devices > 1 and plain(one.tx) else one for name, one in found.items()
    }


def _row(name: str, one: Candidate, params: Any, compute: float, target: _Target, dense: Row | None) -> Row:
    told = describe(one.tx, params, target.workers)
    between, inside = work.talks(told)
    is_outer = isinstance(one.tx, Outer)
    spent = Cost(
        compute,
        work.codec_seconds(one.tx, params, target.workers, target.device, target.repeats),
        cost.total(between, target.link.shared(target.devices)),
        # Local steps average the gradients of a worker's devices, which an uncompressed exchange does too.
        dense.cost.inside if is_outer and dense else cost.total(inside, _inside(target)),
        _overlap(name, told, target),
        told.every,
    )
    return Row(
        name,
        one.tx,
        spent,
        dense.cost.step / spent.step if dense else 1.0,
        math.fsum(x.sent for x in between) / told.every,
        told.totals.residual + told.totals.state,
        one.accuracy,
        one.offered,
    )


def _inside(target: _Target) -> Link:
    if target.device is None and target.devices > 1:
        raise ValueError("devices_per_worker above 1 needs device=, whose link inside a worker is known")
    return target.link if target.device is None else target.device.inside


def _overlap(name: str, told: Description, target: _Target) -> float:
    """The share of an exchange that may hide behind the backward pass."""
    given = target.overlap.get(name) if isinstance(target.overlap, Mapping) else target.overlap
    if told.every > 1:
        return 0.0
    if given is not None:
        return given
    if target.platform == "cpu":
        return 0.0
    return DENSE_OVERLAP if name == DENSE else 1 - 1 / min(part.buckets for part in told.parts)


def _require_overlap(overlap: Mapping[str, float] | float | None, names: Collection[str]) -> None:
    shares = overlap if isinstance(overlap, Mapping) else {} if overlap is None else {DENSE: overlap}
    for name, share in shares.items():
        if name not in names:
            raise ValueError(f"overlap has no codec of the name {name!r} here: there are {', '.join(names)}")
        if not 0 <= share <= 1:
            raise ValueError(f"overlap={shown(overlap)} must have shares from 0 to 1")


def _recommended(rows: list[Row]) -> tuple[str, str, str | None, str]:
    """The codec to use and why, and the outer steps to use and why; rows: the uncompressed one first."""
    dense, *others = rows
    compressed = [row for row in others if row.cost.every == 1 and row.offered]
    found = cost.choose([(row.name, row.cost.step) for row in compressed], dense.cost.step, MARGIN, CLOSE)
    best = dense if found is None else next(row for row in compressed if row.name == found.name)
    reason = _reason(dense, best, min(compressed, key=lambda row: row.cost.step, default=None))
    outer = [row for row in others if row.cost.every > 1]
    rare = cost.choose([(row.name, row.cost.step) for row in outer], best.cost.step, MARGIN, 0.0)
    if rare is None:
        return best.name, reason, None, "outer steps would gain less than 10 % more" if outer else ""
    row = next(row for row in outer if row.name == rare.name)
    text = (
        f"if workers may train on their own for {row.cost.every} steps, which changes training more, a step takes "
        f"{table.time(row.cost.step)} instead of {table.time(best.cost.step)}"
    )
    return best.name, reason, row.name, text


def _reason(dense: Row, best: Row, fastest: Row | None) -> str:
    compute, adds = dense.cost.compute, dense.cost.step - dense.cost.compute
    begin = f"the uncompressed exchange adds {table.time(adds)} to a local step of {table.time(compute)}"
    if best is not dense:
        added = table.time(best.cost.step - compute)
        return f"{begin}, that of {best.name} {added}: a step is {best.speedup:.2f} times faster"
    if adds < MARGIN * compute:
        return f"{begin}: there is too little to win"
    if fastest is None:
        return f"{begin}, and there is no codec to compare"
    compared = f"a step of {fastest.name} would take {table.time(fastest.cost.step)}"
    return f"{begin}; {compared} instead of {table.time(dense.cost.step)}, which is not 10 % faster"


def _setting(workers: int, devices: int, link: Link, device: Any, told: str) -> dict[str, str]:
    of = f" of {devices} devices" if devices > 1 else ""
    name = device if isinstance(device, str) else "this one" if device is None else "a Device"
    latency = table.time(link.latency_seconds)
    return {
        "workers": f"{workers}{of}, each with a link of {table.rate(link.bits_per_second)} and {latency} latency",
        "device": f"{name}; local step {told}",
    }
