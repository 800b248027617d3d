"""The time that GradiVeQ takes at different slice lengths K: to compress, to restore, and to fit the bases.

    python -m experiments.slice_length

It uses the convolutions of ResNet-18 (11.2 million elements, 20 leaves) at one ratio K / d, so that every K sends the
same bytes. A longer slice may capture more, and costs 4 d operations an element. K is the bound `k_max`: each layer
takes the longest slice up to it that tiles the layer. Values are random; no network runs. The parts run in turn, round
after round. The table has the median of each, and compares it with an in-place pass over the same memory.
"""

import math
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import command
from experiments.models import resnet18_shapes
from gradcomp_jax.codecs.gradiveq import principal_basis, project, restore, slice_length

FLAGS = flags.FLAGS

flags.DEFINE_list("lengths", ["64", "128", "256", "512", "768"], "The bounds on K to compare.")
flags.register_validator(
    "lengths", lambda got: got and all(k.isdecimal() and int(k) for k in got), "must be whole numbers above 0"
)
flags.DEFINE_integer("ratio", 8, "K / d.", lower_bound=2)
flags.DEFINE_integer("samples", 100, "L_t, the samples of which each basis is fitted.", lower_bound=2)
flags.DEFINE_integer("runs", 9, "Times each part is run; medians are reported.", lower_bound=1)


def parts(shapes: Sequence[tuple[int, ...]], k_max: int) -> dict[str, tuple]:
    """The three parts, each a compiled function and its arguments, for leaves of these shapes."""
    rows, samples, bases, coefficients = [], [], [], []
    for i, shape in enumerate(shapes):
        k = slice_length(shape, k_max)
        slices, d = math.prod(shape) // k, max(1, k // FLAGS.ratio)
        if d >= FLAGS.samples:
            sys.exit(f"error: --lengths={k_max} at --ratio={FLAGS.ratio} keeps d={d}, which takes more --samples")
        keys = jax.random.split(jax.random.key(i), 3)
        rows.append(jax.random.normal(keys[0], (slices, k)))
        samples.append(jax.random.normal(keys[1], (FLAGS.samples, k)))
        bases.append(principal_basis(samples[-1], d)[0][None])
        coefficients.append(jax.random.normal(keys[2], (slices, d)))

    def fit(samples):
        return [principal_basis(x, c.shape[1]) for x, c in zip(samples, coefficients, strict=True)]

    return {
        "compress": (jax.jit(lambda x, u: jax.tree.map(project, x, u)), rows, bases),
        "restore": (jax.jit(lambda c, u, mu: jax.tree.map(restore, c, u, c, mu)), coefficients, bases, rows),
        "fit": (jax.jit(fit), samples),
    }


def main() -> None:
    """Prints the table."""
    shapes = jax.tree.leaves(resnet18_shapes(), is_leaf=lambda x: isinstance(x, tuple))
    shapes = [shape for shape in shapes if len(shape) == 4]
    lengths = [int(k) for k in FLAGS.lengths]
    programs = {(k, part): call for k in lengths for part, call in parts(shapes, k).items()}
    in_place = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    passed = in_place([jnp.ones(shape) for shape in shapes])

    times: dict = {key: [] for key in programs}
    unit = []
    for i in range(FLAGS.runs + 1):
        began = time.perf_counter()
        passed = jax.block_until_ready(in_place(passed))
        unit.append(time.perf_counter() - began)
        for key, (part, *arguments) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(part(*arguments))
            if i:  # the first turn compiles
                times[key].append(time.perf_counter() - began)

    one = statistics.median(unit[1:])
    table = Table(
        title=f"GradiVeQ on ResNet-18's convolutions at ratio {FLAGS.ratio}, one worker on {jax.default_backend()}, "
        f"medians of {FLAGS.runs}; an in-place pass takes {1e3 * one:.1f} ms"
    )
    for heading in ("K at most", "compress ms", "restore ms", "both, passes", "fit ms a cycle"):
        table.add_column(heading, justify="right")
    for k in lengths:
        compress, restored, fit = (statistics.median(times[k, part]) for part in ("compress", "restore", "fit"))
        cells = (1e3 * compress, 1e3 * restored, (compress + restored) / one, 1e3 * fit)
        table.add_row(str(k), *(f"{cell:.1f}" for cell in cells))
    Console(highlight=False, width=100).print(table)


if __name__ == "__main__":
    command.run(main)
