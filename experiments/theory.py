"""Bounds from theorems on QSGD, on best rank r and on top-k, beside measurements: a table and a figure.

    python -m experiments.theory

QSGD with the 2-norm rounds normal values with the codec's own functions. Its variance, its nonzeros and the lengths of
its codes stand beside the bounds of Lemma 3.1, Theorem 3.2 and Corollary 3.3 of the paper (Alistarh et al., NeurIPS
2017) and of the authors' slides. The slides' s² + √n nonzeros do not hold for s > 1. The sparse code reaches the 2.8
bits a coordinate at s = √n. The dense code does not; as we read it, the 2.8 bits are about this code (the paper's
appendix was not at hand). An o(1) in a bound is taken as 0. Bits do not count the norm. Points are measured; the lines
through them are `elias.expected_bits`.

Best rank r and top-k contract: |x - C(x)|² <= (1 - r / min(n, m)) |x|² and (1 - k / n) |x|². How much further they
contract depends on the matrix. Here there are three: noise, a matrix with singular values 1 / i, and a gradient of the
hidden layer of a perceptron that learns digits. Both methods get the same bits: 32 for each number of two factors, 64
for a value and its place.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter
from rich.table import Table

from experiments import command, data, display, loop
from experiments.figures import HUES, STYLE
from gradcomp_jax.codecs.qsgd import NORMS, quantize
from gradcomp_jax.wire import elias

FLAGS = flags.FLAGS

# absl lets a flag be defined only once; the training loop defines these.
for name in ("seed", "out_dir"):
    flags.declare_key_flag(name)
flags.DEFINE_integer("draws", 4, "Vectors of --dimension values that are rounded.", lower_bound=1)
flags.DEFINE_integer("dimension", 200_000, "n, the largest vector; a multiple of 4.", lower_bound=4)

BUCKETS = (128, 512, 8192)  # values of d, besides n
LEVELS = (1, 2, 4, 7, 16, 32, 64, 127, 256)  # values of s, besides √n
CODES = {"sparse": ("sparse", False), "dense": ("dense", False), "dense, all signs": ("dense", True)}
PACKED = {1: 2, 7: 4, 127: 8}  # s: bits
SIDE = 256  # rows, and columns, of the matrices
RANKS = tuple(2**i for i in range(8))
HOLDS = {True: "holds", False: "does NOT hold"}


class Rounded(NamedTuple):
    """QSGD's averages over buckets of d values.

    Attributes:
      variance: |Q(v) - v|² / |v|².
      nonzeros: the nonzeros in a bucket.
      bits: the bits a coordinate, by name of the code; the norm's bits do not count.
    """

    variance: float
    nonzeros: float
    bits: Mapping[str, float]


class Claim(NamedTuple):
    """A bound, and the measured quantity that it should bound."""

    what: str
    source: str
    setting: str
    bound: float
    measured: float


# The bounds


def variance_bound(d: int, s: int) -> float:
    """Lemma 3.1 (ii): the bound of |Q(v) - v|² / |v|²."""
    return min(d / s**2, math.sqrt(d) / s)


def nonzeros_bound(n: int, s: int) -> float:
    """Lemma 3.1 (iii): the bound of nonzeros."""
    return s * (s + math.sqrt(n))


def slides_nonzeros_bound(n: int, s: int) -> float:
    """The bound of nonzeros in the authors' slides; it is false for s > 1."""
    return s**2 + math.sqrt(n)


def sparse_bound(n: int, s: int) -> float:
    """Theorem 3.2: the bound of Code_s, in bits a coordinate."""
    nonzeros = nonzeros_bound(n, s)
    return (3 + 1.5 * math.log2(2 * (s**2 + n) / nonzeros)) * nonzeros / n


def dense_bound(n: int, s: int) -> float:
    """The bound of Code'_s in the authors' slides, in bits a coordinate."""
    return (math.log2(1 + (s**2 + min(n, s * math.sqrt(n))) / n) + 1) / 2 + 2


# Measurements


def rounded(d: int, levels: Sequence[int], rows: int, seed: int, norm: str = "l2") -> dict[int, Rounded]:
    """QSGD's averages by s: for `rows` buckets of d normal values, divided by their norm and rounded."""
    keys = jax.random.split(jax.random.key(seed))
    v = jax.random.normal(keys[0], (rows, d))
    scale = NORMS[norm](v)

    @jax.jit
    def one(s: jax.Array) -> tuple[jax.Array, ...]:
        q = quantize(v, scale, s, keys[1])  # type: ignore[arg-type]  # traced, so that all s share a program
        error = jnp.sum((q * (scale / s) - v) ** 2, axis=1) / jnp.sum(v**2, axis=1)
        integers = q.astype(jnp.int32)
        bits = [elias.lengths(integers, form, sign_for_zeros=signs) for form, signs in CODES.values()]
        return error, jnp.sum(q != 0, axis=1), *bits

    found = {}
    for s in levels:
        variance, nonzeros, *bits = (float(np.mean(x)) for x in one(jnp.float32(s)))
        found[s] = Rounded(variance, nonzeros, {code: x / d for code, x in zip(CODES, bits, strict=True)})
    return found


def perceptron_gradient(seed: int, steps: int = 100, batch_size: int = 128) -> np.ndarray:
    """The gradient of the hidden weights [SIDE, SIDE] of a perceptron after some steps of SGD on digits."""
    split, _ = data.digits()
    images = np.asarray(split.images, np.float32).reshape(len(split.labels), -1)
    x, y = jnp.asarray(images / images.max()), jnp.asarray(split.labels)
    widths = (x.shape[1], SIDE, SIDE, 10)
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = zip(keys, widths[:-1], widths[1:], strict=True)
    weights = [jax.random.normal(key, (m, n)) * math.sqrt(2 / m) for key, m, n in sizes]

    def loss(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        for w in weights[:-1]:
            x = jax.nn.relu(x @ w)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ weights[-1]), y[:, None], axis=1))

    gradient = jax.jit(jax.grad(loss))
    order = np.random.default_rng(seed)
    for _ in range(steps):
        batch = order.choice(len(x), batch_size, replace=False)
        gradients = gradient(weights, x[batch], y[batch])
        weights = [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]
    return np.asarray(gradients[1])


def matrices(seed: int) -> dict[str, np.ndarray]:
    """The compared matrices [SIDE, SIDE], by name."""
    noise = np.random.default_rng(seed).standard_normal((3, SIDE, SIDE))
    left, right = (np.linalg.qr(x)[0] for x in noise[1:])
    return {
        "noise": noise[0],
        "singular values 1 / i": left / np.arange(1, SIDE + 1) @ right,
        "a gradient": perceptron_gradient(seed),
    }


def rank_loss(x: np.ndarray, r: int) -> float:
    """|x - C(x)|² / |x|² for the best approximation of rank r."""
    squares = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    return float(squares[r:].sum() / squares.sum())


def top_loss(x: np.ndarray, k: int) -> float:
    """|x - C(x)|² / |x|² for the k largest magnitudes."""
    squares = np.sort(x.astype(np.float64).ravel() ** 2)
    return float(squares[: x.size - k].sum() / squares.sum())


def same_bits(r: int, shape: tuple[int, ...]) -> int:
    """The k for which values and places take as many bits as factors of rank r."""
    return r * sum(shape) // 2


# The table and the figure


def claims(by_size: Mapping[int, Mapping[int, Rounded]], n: int, compared: Mapping[str, np.ndarray]) -> list[Claim]:
    """The table's rows."""
    root, whole = round(math.sqrt(n)), by_size[n]
    rows = []
    for s in PACKED:
        bound = variance_bound(512, s)
        rows.append(Claim("|Q(v) - v|² / |v|²", "Lemma 3.1", f"d = 512, s = {s}", bound, by_size[512][s].variance))
    sparsity: dict[str, Callable[[int, int], float]] = {
        "Lemma 3.1: s (s + √n)": nonzeros_bound,
        "slides: s² + √n": slides_nonzeros_bound,
    }
    for source, nonzeros in sparsity.items():
        for s in (1, 2, 4, 16):
            rows.append(Claim("nonzeros", source, f"n = {n}, s = {s}", nonzeros(n, s), whole[s].nonzeros))
    for s in (2, 16, 64):
        bits = whole[s].bits["sparse"]
        rows.append(Claim("bits, sparse", "Theorem 3.2, o(1) as 0", f"n = {n}, s = {s}", sparse_bound(n, s), bits))
    for code in CODES:
        if code != "sparse":
            bits = whole[root].bits[code]
            rows.append(Claim(f"bits, {code}", "slides, o(1) as 0", f"n = {n}, s = √n", dense_bound(n, root), bits))
    for code in CODES:
        rows.append(Claim(f"bits, {code}", "Corollary 3.3", f"n = {n}, s = √n", 2.8, whole[root].bits[code]))
    for name, x in compared.items():
        k = same_bits(4, x.shape)
        rows.append(Claim("lost by best rank", "1 - r / n", f"{name}; r = 4", 1 - 4 / SIDE, rank_loss(x, 4)))
        rows.append(Claim("lost by top-k", "1 - k / n²", f"{name}; k = {k}", 1 - k / x.size, top_loss(x, k)))
    return rows


def table(rows: Sequence[Claim], title: str) -> Table:
    """A table with one row for each claim."""
    out = Table(title=title)
    for heading in ("what", "bound by", "where"):
        out.add_column(heading)
    for heading in ("bound", "measured", ""):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = (f"{x:.0f}" if x >= 100 else f"{x:.3f}" for x in (row.bound, row.measured))
        out.add_row(row.what, row.source, row.setting, *numbers, HOLDS[row.measured <= row.bound])
    return out


def _plot_variance(axes: Axes, by_size: Mapping[int, Mapping[int, Rounded]]) -> None:
    for color, (d, found) in zip(HUES, by_size.items(), strict=False):
        axes.plot(list(found), [x.variance for x in found.values()], "o", color=color, markersize=4, label=f"d = {d:,}")
        s = np.geomspace(1, max(found), 100)
        axes.plot(s, [variance_bound(d, x) for x in s], "--", color=color, linewidth=1)
    axes.set(title="(a) Variance, and Lemma 3.1", ylabel="|Q(v) - v|² / |v|²", yscale="log")
    handles, _ = axes.get_legend_handles_labels()
    bound = Line2D([], [], color="k", linestyle="--", linewidth=1, label="min(d / s², √d / s)")
    axes.legend(handles=[*handles, bound], loc="lower left")


def _plot_nonzeros(axes: Axes, whole: Mapping[int, Rounded], n: int) -> None:
    s = np.geomspace(1, max(whole), 100)
    axes.plot(s, [min(n, nonzeros_bound(n, x)) for x in s], "--", color=HUES[0], label="Lemma 3.1: s (s + √n)")
    axes.plot(s, [slides_nonzeros_bound(n, x) for x in s], "--", color=HUES[1], label="slides: s² + √n")
    axes.plot(list(whole), [x.nonzeros for x in whole.values()], "ok", markersize=4, label="measured")
    false = [(s, x.nonzeros) for s, x in whole.items() if x.nonzeros > slides_nonzeros_bound(n, s)]
    rings: dict[str, Any] = {
        "color": HUES[1],
        "markersize": 9,
        "fillstyle": "none",
        "label": "more than the slides allow",
    }
    axes.plot(*np.transpose(false or np.empty((0, 2))), "o", **rings)
    axes.set(title=f"(b) Nonzeros of n = {n:,}", ylabel="nonzeros", yscale="log")
    axes.legend(loc="upper left")


def _plot_codes(axes: Axes, whole: Mapping[int, Rounded], n: int) -> None:
    s = np.unique(np.geomspace(1, max(whole), 60).round().astype(int))
    for color, (code, (form, signs)) in zip((HUES[0], HUES[2], HUES[3]), CODES.items(), strict=True):
        axes.plot(list(whole), [x.bits[code] for x in whole.values()], "o", color=color, markersize=4)
        expected = [elias.expected_bits(n, int(x), form, sign_for_zeros=signs) for x in s]
        axes.plot(s, expected, color=color, linewidth=1, label=code)
    below = s[s <= max(whole) / 4]  # where the bound has a meaning
    axes.plot(below, [sparse_bound(n, x) for x in below], "--", color=HUES[0], linewidth=1, label="Theorem 3.2, sparse")
    axes.plot(s, [dense_bound(n, x) for x in s], "--", color=HUES[3], linewidth=1, label="slides, dense")
    root = round(math.sqrt(n))
    axes.plot(root, 2.8, "*", color=HUES[1], markersize=12, fillstyle="none", label="Corollary 3.3, dense: 2.8")
    for reached in whole[root].bits.values():
        axes.annotate(f"{reached:.2f}", (root, reached), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(title=f"(c) Codes of n = {n:,}", ylabel="bits a coordinate", xlim=(0.8, 2 * root), ylim=(0, 5.2))
    axes.legend(loc="upper left", ncols=2, fontsize=8)


def _plot_buckets(axes: Axes, by_size: Mapping[int, Mapping[int, Rounded]], largest: Mapping[int, Rounded]) -> None:
    s = np.unique(np.geomspace(1, 127, 40).round().astype(int))
    for color, (d, found) in zip(HUES, by_size.items(), strict=False):
        shorter = [min(elias.expected_bits(d, int(x), form) for form in elias.FORMS) for x in s]
        axes.plot(s, shorter, color=color, linewidth=1)
        shown = {s: x for s, x in found.items() if s <= 127}
        axes.plot(list(shown), [min(x.bits.values()) for x in shown.values()], "o", color=color, markersize=4)
    begin = 0.8
    for end, bits in PACKED.items():
        axes.plot([begin, end + 0.4], [bits, bits], color="k", linewidth=2.5, solid_capstyle="butt")
        begin = end + 0.4
    least = [min(x.bits.values()) for x in largest.values()]
    axes.plot(list(largest), least, "s", color=HUES[1], markersize=7, fillstyle="none")
    handles = [Line2D([], [], color=color, label=f"d = {d:,}") for color, d in zip(HUES, by_size, strict=False)]
    square: dict[str, Any] = {"color": HUES[1], "marker": "s", "fillstyle": "none", "linestyle": ""}
    handles += [
        Line2D([], [], **square, label="d = 512, divided by the maximum"),
        Line2D([], [], color="k", linewidth=2.5, label="packed: 2, 4 and 8 bits"),
    ]
    axes.set(title="(d) The shorter code of a bucket", ylabel="bits a coordinate", ylim=(0, 13.5))
    axes.legend(handles=handles, loc="upper left", fontsize=8)


def _plot_contraction(best: Axes, top: Axes, compared: Mapping[str, np.ndarray]) -> None:
    sent = [r * 2 / SIDE for r in RANKS]
    for color, (name, x) in zip(("0.5", *HUES), compared.items(), strict=False):
        best.plot(sent, [rank_loss(x, r) for r in RANKS], "o-", color=color, markersize=4, label=name)
        top.plot(sent, [top_loss(x, same_bits(r, x.shape)) for r in RANKS], "o-", color=color, markersize=4)
    best.plot(sent, [1 - r / SIDE for r in RANKS], "k--", label="bound")
    top.plot(sent, [1 - same_bits(r, (SIDE, SIDE)) / SIDE**2 for r in RANKS], "k--")
    best.set(title=f"(e) Best rank r of {SIDE} x {SIDE}; 1 - r / n")
    top.set(title="(f) The k largest, with their places; 1 - k / n²")
    best.legend(loc=(0.03, 0.46))
    for axes in (best, top):
        axes.set(ylim=(0, 1.03), xlabel="bits sent, of those of the matrix", ylabel="lost, of |x|²")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: "1" if x == 1 else f"1/{1 / x:g}")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


@matplotlib.rc_context(STYLE)
def plot(
    by_size: Mapping[int, Mapping[int, Rounded]],
    largest: Mapping[int, Rounded],
    n: int,
    compared: Mapping[str, np.ndarray],
    path: pathlib.Path,
) -> None:
    """Writes the six panels as a PNG.

    Args:
      by_size: the averages by d and s, for values divided by the 2-norm.
      largest: the averages by s, for d = 512 and values divided by the largest magnitude.
      n: the largest d.
      compared: the matrices by name.
      path: the path of the file.
    """
    figure = Figure(figsize=(11, 12.5), layout="constrained")
    (variance, nonzeros), (codes, buckets), (best, top) = figure.subplots(3, 2)
    _plot_variance(variance, by_size)
    _plot_nonzeros(nonzeros, by_size[n], n)
    _plot_codes(codes, by_size[n], n)
    _plot_buckets(buckets, by_size, largest)
    _plot_contraction(best, top, compared)
    for axes in (variance, nonzeros):
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in (variance, nonzeros, codes, buckets):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="levels, s")
    figure.suptitle("QSGD of normal values divided by their 2-norm (a to d), and two contractions (e, f)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the table and writes the figure."""
    n, seed = FLAGS.dimension, FLAGS.seed
    if n % 4 or n <= max(BUCKETS) or n > elias.LARGEST:
        sys.exit(f"error: --dimension={n} must be a multiple of 4, above {max(BUCKETS)} and at most {elias.LARGEST}")
    out_dir = command.directory("out_dir", FLAGS.out_dir)
    screen = display.console()
    levels = sorted({*LEVELS, round(math.sqrt(n))})
    by_size = {d: rounded(d, levels, FLAGS.draws * n // d, seed) for d in (*BUCKETS, n)}
    largest = rounded(512, list(PACKED), FLAGS.draws * n // 512, seed, "max")
    compared = matrices(seed)
    screen.print(
        table(claims(by_size, n, compared), f"Bounds and what is measured, {FLAGS.draws} draws of normal values")
    )
    figure = out_dir / "theory.png"
    plot(by_size, largest, n, compared, figure)
    screen.print(f"Figure: {figure}", soft_wrap=True)


if __name__ == "__main__":
    command.run(main, argv=loop.command_line(sys.argv))
