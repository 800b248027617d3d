"""Whether GradiVeQ's way can compress the gradients of a real training: a table and a figure.

    python -m experiments.gradients --dataset=cifar10 --data_dir=DIR --model=resnet20 --noaugment

A network trains uncompressed, at a constant rate after the first tenth of the steps. After --warmup_steps the mean
gradients of a few convolutions are recorded. These gradients, and Gaussian noise, answer four questions:

 - How strongly are the gradients of neighbouring weights correlated?
 - How much of the other slices does the basis of a layer's first slice lose, and how much does each slice's own lose?
 - The rank trap: how much do d columns lose of the samples they are fitted on, and how much of later gradients?
 - How does a basis age?

`bases.analyse` tells which steps answer which question.

With --save=FILE.npz the mean gradients of all leaves in the last 8 steps are written, for `experiments.allreduce`.
"""

import functools
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from experiments import bases, cifar, command, data, display, loop, models, training
from gradcomp_jax import init, none, place, train_step
from gradcomp_jax.codecs.gradiveq import slice_length
from gradcomp_jax.compressor import flatten

FLAGS = flags.FLAGS

# absl lets a flag be defined only once; the training command defines these.
SHARED = (
    "dataset",
    "data_dir",
    "augment",
    "model",
    "workers",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "seed",
    "out_dir",
)
for name in SHARED:
    flags.declare_key_flag(name)
flags.DEFINE_list("layers", [], "Paths of the kernels to record; by default one of each shape [H, W, F, F].")
flags.DEFINE_integer("warmup_steps", 200, "Steps before the first recorded one.", lower_bound=0)
flags.DEFINE_integer("train_steps", 100, "L_t, steps on which a basis is fitted.", lower_bound=2)
flags.DEFINE_integer("compress_steps", 400, "Steps recorded after these; more than --train_steps.", lower_bound=3)

flags.DEFINE_string("save", None, "Write the gradients of all leaves here, of the last steps; for allreduce.")

SAVED = 8  # steps
NOISE = "noise"
NOTES = (
    "Percentages are lost of |gradient|^2, in steps after the L_t on which a basis was fitted.",
    "99 % by d: the columns of the first slice's basis that hold 99 % of the variance of its L_t samples, which is the "
    "paper's rule; they lose: of this slice's later gradients.",
    "K/8, K/4: of all slices, by so many columns of the first slice's basis, or of each slice's own; -: L_t samples "
    "span fewer.",
    "H W mean: without any basis, each kernel [H, W] replaced by its mean, which is H W times fewer floats.",
)


def record(task: loop.Task, mesh: Mesh, layers: Sequence[str], screen: display.Console) -> dict[str, np.ndarray]:
    """Trains, and returns the mean gradients of the kernels `layers` in the steps after the warm-up, by path."""
    recorded = FLAGS.train_steps + FLAGS.compress_steps
    steps = FLAGS.warmup_steps + recorded
    # The state of this transformation is the mean gradient.
    keep = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, *_: (g, g))
    rate = optax.warmup_constant_schedule(0.0, FLAGS.lr, steps // 10)
    sgd = optax.sgd(rate, FLAGS.momentum)
    tx = optax.chain(none(), keep, optax.add_decayed_weights(FLAGS.weight_decay), sgd)
    step = train_step(task.loss_fn, tx, mesh, has_state=True, has_aux=True, donate=True)
    opt_state = init(tx, task.params, mesh)
    shapes = {path: x.shape for path, x in flatten(task.params)[0].items()}
    # If the parameters lay on one device at the first step, the second step would be compiled anew.
    params, stats = place((task.params, task.model_state), mesh)

    gradients = {path: np.empty((recorded, *shapes[path]), np.float32) for path in layers}
    saved: list[dict[str, np.ndarray]] = []
    with display.progress(screen) as progress:
        bar = progress.add_task("training", total=steps, status="compiling")
        for done, batch in enumerate(itertools.islice(task.batches(0), steps)):
            params, opt_state, stats, loss, _ = step(params, opt_state, stats, batch)
            if done >= FLAGS.warmup_steps:
                mean, _ = flatten(opt_state[1])
                for path in layers:
                    gradients[path][done - FLAGS.warmup_steps] = mean[path]
                if FLAGS.save and done >= steps - SAVED:
                    saved.append(jax.device_get(mean))
            progress.update(bar, advance=1, status=f"loss {loss:.3f}")
            if (done + 1) % 100 == 0:
                screen.print(f"step {done + 1}/{steps}, loss {loss:.3f}")
    if saved:
        together: dict[str, Any] = {path: np.stack([mean[path] for mean in saved]) for path in saved[0]}
        np.savez(FLAGS.save, **together)
    return gradients


def default_layers(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The paths of default kernels: of each shape [H, W, F, F] the middle one; `shapes` has all shapes by path."""
    square: dict[tuple[int, ...], list[str]] = {}
    for path, shape in shapes.items():
        if shape[2] == shape[3]:
            square.setdefault(shape, []).append(path)
    return [paths[len(paths) // 2] for paths in square.values()]


def times(shape: tuple[int, ...]) -> str:
    """A shape as text: (3, 3, 16, 16) is "3x3x16x16"."""
    return "x".join(map(str, shape))


def table(findings: dict[str, bases.Findings], title: str) -> Table:
    """A table with two rows for each layer, one for each number of samples."""
    out = Table(title=title)
    for heading in ("layer", "kernel"):
        out.add_column(heading, no_wrap=True)
    headings = ["slices", "L_t", "99 % by d", "they lose", "K/8 first", "K/8 own", "K/4 first", "K/4 own", "H W mean"]
    for heading in headings:
        out.add_column(heading, justify="right")
    for layer, found in findings.items():
        k = slice_length(found.shape)
        for window, fit in found.fits.items():
            d = int(np.argmax(fit.samples <= 0.01)) + 1
            cells = [f"{len(fit.first)}", f"{window}", f"{d}", f"{fit.first[0, d - 1]:.1%}"]
            for width, losses in itertools.product((k // 8, k // 4), (fit.first, fit.own)):
                known = 0 < width <= losses.shape[1]
                cells.append(f"{fit.weights @ losses[:, width - 1]:.1%}" if known else "-")
            out.add_row(layer, times(found.shape), *cells, f"{found.mean_loss:.1%}")
    return out


def plot(findings: dict[str, bases.Findings], title: str, path: pathlib.Path) -> None:
    """Writes the four panels as a PNG; the third shows only the first layer and noise."""
    figure, ((near, shared), (trap, aged)) = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    (one, first), *_ = findings.items()
    short, long = first.fits
    bars = 0.8 / len(findings)
    layers = []
    for i, (layer, found) in enumerate(findings.items()):
        color = "0.55" if layer == NOISE else f"C{i}"
        layers.append(Line2D([], [], color=color, linewidth=5, label=f"{layer}, {times(found.shape)}"))

        at = np.arange(len(found.correlations)) + (i + 0.5) * bars - 0.4
        near.bar(at, list(found.correlations.values()), bars, color=color)

        fit = found.fits[short]
        d = bases.columns(slice_length(found.shape), short)
        row = np.arange(len(fit.first)) / len(fit.first) * found.shape[0]
        shared.plot(row, fit.first[:, d - 1], "o", color=color, markersize=5)
        shared.plot(row, fit.own[:, d - 1], "o", color=color, markersize=5, fillstyle="none")

        if layer in (one, NOISE):
            for window, alpha in ((short, 1.0), (long, 0.45)):
                fit = found.fits[window]
                d_axis = np.arange(1, len(fit.samples) + 1)
                trap.plot(d_axis, fit.first[0], color=color, alpha=alpha)
                trap.plot(d_axis, fit.samples, "--", color=color, alpha=alpha)

        aged.plot(np.arange(1, len(found.aging) + 1), found.aging, color=color, linewidth=0.8)
        aged.axhline(found.mean_loss, color=color, linestyle=":")

    black = functools.partial(Line2D, [], [], color="k")
    dots = [black(marker="o", linestyle="", fillstyle=fill) for fill in ("full", "none")]
    shared.legend(dots, ["the first slice's basis", "each slice's own"], loc="lower right")
    lines = [black(), black(alpha=0.45), black(linestyle="--")]
    later = [f"later gradients, L_t = {window}" for window in (short, long)]
    trap.legend(lines, [*later, "the samples themselves"], loc="upper right")
    lines = [black(linewidth=0.8), black(linestyle=":")]
    aged.legend(lines, ["the first slice's basis", "no basis, mean over H W"], loc="lower right")

    ticks = zip(first.correlations, ("1", "F", "D F", "W D F", ""), strict=True)
    near.set_xticks(range(len(first.correlations)), ["\n".join(tick) for tick in ticks])
    near.set(title="(a) Gradients of neighbouring weights", xlabel="neighbour, and its distance in a slice")
    near.set(ylabel=f"mean |correlation| over {short} steps", ylim=(0, 1.05))
    shared.set(title=f"(b) Slices, by d = K/8 columns of L_t = {short}", xlabel="kernel row where the slice begins")
    trap.set(title="(c) First slice, by all numbers of columns", xlabel="columns kept, d; fewer than L_t")
    aged.set(title=f"(d) All slices, by d = K/8 columns of L_t = {short}", xlabel="steps after the fit")
    for axes in (shared, trap, aged):
        axes.set(ylabel="lost, of |gradient|²", ylim=(0, max(1.05, axes.get_ylim()[1])))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    for axes in (near, shared, trap, aged):
        axes.grid(alpha=0.3)
    figure.legend(handles=layers, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Records, analyses, prints the table and writes the figure."""
    try:
        if FLAGS.compress_steps <= FLAGS.train_steps:
            raise ValueError(
                f"--compress_steps={FLAGS.compress_steps} must be more than --train_steps={FLAGS.train_steps}"
            )
        mesh = training.worker_mesh(FLAGS.workers)
        dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
        training.require_batches(FLAGS.batch_size, FLAGS.workers, len(dataset.train.labels))
        task = cifar.classification(dataset, mesh)
        kernels = {path: x.shape for path, x in flatten(task.params)[0].items() if x.ndim == 4}
        layers = FLAGS.layers or default_layers(kernels)
        for path in layers:
            if path not in kernels:
                raise ValueError(f"--layers: no convolution has the path {path!r}; they are {', '.join(kernels)}")
    except (ValueError, data.DataError) as error:
        sys.exit(f"error: {error}")

    out_dir = command.directory("out_dir", FLAGS.out_dir)

    screen = display.console()
    gradients = record(task, mesh, layers, screen)
    noise = np.random.default_rng(FLAGS.seed).standard_normal(gradients[layers[0]].shape, np.float32)
    named = {path.removesuffix("/kernel"): x for path, x in gradients.items()} | {NOISE: noise}
    findings = {name: bases.analyse(x, FLAGS.train_steps) for name, x in named.items()}

    first, last = FLAGS.warmup_steps + 1, FLAGS.warmup_steps + len(noise)
    title = f"{models.NAMES[FLAGS.model]} on {FLAGS.dataset}, mean gradients of steps {first} to {last}"
    screen.print(table(findings, title))
    for note in NOTES:
        screen.print(note)
    figure = out_dir / "gradients.png"
    plot(findings, title, figure)
    screen.print(f"Figure: {figure}", soft_wrap=True)


if __name__ == "__main__":
    command.run(main, argv=loop.command_line(sys.argv))
