"""Where compression pays: the planner's choice for 2 to 4096 workers, and links of 100 Mbit/s to 400 Gbit/s.

    python -m experiments.scale --figure=out/scale.png
    python -m experiments.scale --device=a100 --latency_us=50 --figure=out/scale-a100.png

No number of it is measured. The model is that of `gradcomp_jax.plan`, with the published figures of --device: an
all-reduce is a ring or a tree, whichever is faster, and with eight devices a host each sends a share of the host's
bytes over the link that they share. There are three cases: ResNet-18 on images of CIFAR-10, a transformer of 7 billion
parameters with one device on each link, and the same with eight. The upper row has codecs that exchange in each step.
In the lower row workers may also train on their own for 30 or 100 steps. A codec must be predicted to be 10 % faster
than no compression. Above the dashed line a tree is the faster all-reduce of the uncompressed gradient.

Bytes and the codecs' work are those of one leaf of each shape, times the elements of the whole tree over theirs.
"""

import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags, logging
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table

import gradcomp_jax as gcj
from experiments import command, display, plan
from gradcomp_jax.planner import (
    CLOSE,
    DENSE,
    DENSE_OVERLAP,
    DEVICES,
    MARGIN,
    Device,
    Link,
    candidates,
    cost,
    table,
    work,
)
from gradcomp_jax.planner.cost import Cost, Talk

FLAGS = flags.FLAGS

WORKERS = [2**k for k in range(1, 13)]
RATES = np.geomspace(1e8, 4e11, 37)
AMONG = 8  # workers for which a codec's work is counted


class Case(NamedTuple):
    """A model on devices.

    Attributes:
      title: what it is, in words.
      model: its name, for experiments.plan.
      rows: the rows of a device's batch.
      devices: the devices that share a link.
    """

    title: str
    model: str
    rows: int
    devices: int


CASES = (
    Case("ResNet-18, batch 128, a device on each link", "resnet18", 128, 1),
    Case("transformer of 7 billion, 65,536 symbols,\na device on each link", "transformer-7b", 32, 1),
    Case("transformer of 7 billion, 65,536 symbols,\neight devices a host share its link", "transformer-7b", 32, 8),
)


class Method(NamedTuple):
    """What a codec costs, whatever the rate of the link.

    Attributes:
      codec: the seconds of an exchange on a device.
      between: by number of workers, the collectives between them.
      inside: by number of workers, the seconds of those inside a worker.
      overlap: the share that may hide behind the backward pass.
      every: the steps from one exchange to the next.
    """

    codec: float
    between: dict[int, list[Talk]]
    inside: dict[int, float]
    overlap: float
    every: int


class Chart(NamedTuple):
    """The choices for a case.

    Attributes:
      case: the case.
      compute: the seconds of a local step.
      steps: by method, the seconds of a step, [workers, rates].
      best: the chosen methods' names without outer steps and with them, [workers, rates].
      tree: whether the uncompressed all-reduce is a tree, [workers, rates].
    """

    case: Case
    compute: float
    steps: dict[str, np.ndarray]
    best: tuple[np.ndarray, np.ndarray]
    tree: np.ndarray


def method_of(name: str, tx: optax.GradientTransformation, params: Any, case: Case, device: Device) -> Method:
    """A codec's costs, on the shapes of a whole tree."""
    few, times = work.reduced(params)
    meshes = {n: work.absent(n, case.devices, device.platform) for n in WORKERS}
    told = {n: gcj.describe(tx, few, mesh) for n, mesh in meshes.items()}
    larger = lambda talks: [x._replace(bytes=times * x.bytes) for x in talks]  # noqa: E731
    both = {n: [larger(talks) for talks in work.talks(one)] for n, one in told.items()}
    first = told[AMONG]
    buckets = min(part.buckets for part in gcj.describe(tx, params, meshes[AMONG]).parts)
    overlap = 0.0 if first.every > 1 else DENSE_OVERLAP if name == DENSE else 1 - 1 / buckets
    return Method(
        work.codec_seconds(tx, params, meshes[AMONG], device),
        {n: between for n, (between, _) in both.items()},
        {n: cost.total(inside, device.inside) for n, (_, inside) in both.items()},
        0.0 if device.platform == "cpu" else overlap,
        first.every,
    )


def methods_of(case: Case, params: Any, device: Device) -> dict[str, Method]:
    """The uncompressed exchange, the codecs that the planner recommends, and outer steps."""
    layout = gcj.across if case.devices > 1 else lambda codec: codec
    codecs = {name: layout(one.tx) for name, one in candidates.codecs().items() if one.offered}  # type: ignore[arg-type]
    outer = {name: one.tx for name, one in candidates.outer_steps(optax.sgd(0.1), case.devices > 1).items()}
    every = {DENSE: layout(gcj.none())} | codecs | outer
    found: dict[str, Method] = {}
    for name, tx in every.items():
        one = method_of(name, tx, params, case, device)
        # Local steps average the gradients of a worker's devices, like an uncompressed exchange.
        found[name] = one._replace(inside=found[DENSE].inside) if one.every > 1 else one
    return found


def chart_of(case: Case, device: Device, latency: float) -> Chart:
    """The choices for a case."""
    task = plan.task_of(case.model, case.rows, 2048)
    params, batch = jax.eval_shape(task.params), jax.eval_shape(task.batch)
    compute = device.train_seconds(work.operations(task.loss_fn, params, batch))
    methods = methods_of(case, params, device)
    link = functools.partial(Link, latency_seconds=latency)

    def step(one: Method, n: int, rate: float) -> float:
        wire = cost.total(one.between[n], link(rate).shared(case.devices))
        return Cost(compute, one.codec, wire, one.inside[n], one.overlap, one.every).step

    grid = lambda f: np.array([[f(n, rate) for rate in RATES] for n in WORKERS])  # noqa: E731
    steps = {name: grid(functools.partial(step, one)) for name, one in methods.items()}
    plain = [name for name, one in methods.items() if one.every == 1 and name != DENSE]
    rare = [name for name, one in methods.items() if one.every > 1]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) / case.devices

    def is_tree(n: int, rate: float) -> bool:
        shared = link(rate).shared(case.devices)
        return cost.seconds(Talk("all-reduce", size, n), shared) < 2 * (n - 1) * latency + shared.seconds(
            Talk("all-reduce", size, n).sent
        )

    every_step = chosen(steps, plain, DENSE)
    return Chart(case, compute, steps, (every_step, further(steps, rare, every_step)), grid(is_tree))


def chosen(steps: dict[str, np.ndarray], names: list[str], dense: str) -> np.ndarray:
    """The planner's choice among methods at each point, as names."""
    out = np.full(steps[dense].shape, dense, dtype=object)
    for point in np.ndindex(out.shape):
        found = cost.choose(_at(steps, names, point), float(steps[dense][point]), MARGIN, CLOSE)
        out[point] = out[point] if found is None else found.name
    return out


def further(steps: dict[str, np.ndarray], names: list[str], before: np.ndarray) -> np.ndarray:
    """The choice if these methods may be taken too: where one is faster than the choice before by the margin."""
    out = before.copy()
    for point in np.ndindex(out.shape):
        now = float(steps[str(before[point])][point])
        found = cost.choose(_at(steps, names, point), now, MARGIN, 0.0)
        out[point] = out[point] if found is None else found.name
    return out


def _at(steps: dict[str, np.ndarray], names: list[str], point: tuple[int, ...]) -> list[tuple[str, float]]:
    return [(name, float(steps[name][point])) for name in names]


# Output


def colors_of(charts: list[Chart]) -> dict[str, Any]:
    """A color for each method that is chosen anywhere; grey for no compression."""
    chosen_somewhere = {name for chart in charts for best in chart.best for name in best.ravel()}
    names = [name for name in charts[0].steps if name in chosen_somewhere and name != DENSE]
    palette = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442", "#000000", "#7f3c8d"]
    return {DENSE: "#d9d9d9"} | dict(zip(names, palette, strict=False))


def draw(charts: list[Chart], path: pathlib.Path, told: str) -> None:
    """Writes the picture."""
    colors = colors_of(charts)
    figure = Figure(figsize=(5 * len(charts), 8.6), layout="constrained")
    axes = figure.subplots(2, len(charts), squeeze=False, sharex=True, sharey=True)
    for column, chart in enumerate(charts):
        for row in range(2):
            _map(axes[row][column], chart, chart.best[row], colors)
        axes[0][column].set_title(f"{chart.case.title}\n{table.time(chart.compute)} of compute", fontsize=10)
        axes[1][column].set_xlabel("bits a second of each link")
    for row, what in enumerate(("an exchange in each step", "outer steps allowed")):
        axes[row][0].set_ylabel(f"{what}\nworkers (hosts)")
    patches = [Patch(color=color, label="no compression" if name == DENSE else name) for name, color in colors.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(told, fontsize=10)
    figure.savefig(path, dpi=110)


def _map(axes: Axes, chart: Chart, best: np.ndarray, colors: dict[str, Any]) -> None:
    names = list(colors)
    places = np.vectorize(names.index)(best)
    axes.pcolormesh(
        RATES, WORKERS, places, cmap=ListedColormap(list(colors.values())), vmin=-0.5, vmax=len(names) - 0.5
    )
    if chart.tree.any() and not chart.tree.all():
        axes.contour(RATES, WORKERS, chart.tree.astype(float), levels=[0.5], colors="black", linestyles="dashed")
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)


def ends(charts: list[Chart]) -> Table:
    """Up to which rate something pays, by case and number of workers; "all" are those up to 400 Gbit/s."""
    out = Table(title="Compression is recommended on links up to so many Gbit/s")
    out.add_column("case")
    for n in WORKERS[::3]:
        out.add_column(f"{n} workers", justify="right")
    for chart in charts:
        for row, what in enumerate(("", ", outer steps allowed")):
            out.add_row(chart.case.title.replace("\n", " ") + what, *_ends(chart.best[row]))
    return out


def _ends(best: np.ndarray) -> Iterator[str]:
    for row in best[::3]:
        paying = RATES[row != DENSE]
        yield "none" if not paying.size else "all" if paying.max() == RATES[-1] else f"{paying.max() / 1e9:.3g}"


def main() -> None:
    """Prints the table, and writes the picture."""
    logging.set_verbosity(logging.ERROR)
    device = DEVICES[FLAGS.device]
    charts = [chart_of(case, device, 1e-6 * FLAGS.latency_us) for case in CASES]
    screen = display.console()
    screen.print(ends(charts))
    path = pathlib.Path(FLAGS.figure)
    told = f"Predicted, not measured: {FLAGS.device} ({device.source}), {FLAGS.latency_us:g} µs latency"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(charts, path, told)
    except OSError as error:
        sys.exit(f"error: --figure={path} cannot be written ({error.strerror}): give another")
    screen.print(f"Figure: {path}", soft_wrap=True)


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_enum("device", "h100", DEVICES, "The device, by its published figures.")
    flags.DEFINE_float("latency_us", 20.0, "Microseconds of a message between workers.", lower_bound=0)
    flags.DEFINE_string("figure", "out/scale.png", "Where to write the picture.")


if __name__ == "__main__":
    # Not at import: a test of another experiment may define flags with these names.
    define_flags()
    command.run(main)
