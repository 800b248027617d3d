"""The bytes that one worker sends in a step for ResNet-18's gradient: by codec, aggregation and number of workers.

    python -m experiments.wire
    python -m experiments.wire --markdown

The bytes come from `describe`, for 11,173,962 parameters in 62 tensors, with uncompressed ones; no step is run.
GradiVeQ is shown in its compressed steps. The table leaves out codecs whose bytes depend on the data. These are
accordion, which sends the bytes of one of its two levels and a float for each layer, and QSGD's Elias code, which
travels in its buffer if it fits and otherwise in the packed form.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

import gradcomp_jax as gc
from experiments import command
from experiments.models import resnet18_shapes

FLAGS = flags.FLAGS

WORKERS = (2, 4, 8, 64)
TWO_WAYS = ("gather", "shuffle")
CODECS: dict[str, tuple[Callable[..., gc.Compressor], Sequence[str]]] = {
    "none": (gc.none, ("psum",)),
    "cast, bfloat16": (gc.cast, TWO_WAYS),
    "cast, float8_e4m3fn": (lambda aggregate: gc.cast("float8_e4m3fn", aggregate=aggregate), TWO_WAYS),
    "gradiveq, ratio 8": (gc.gradiveq, ("psum",)),
    "powersgd, rank 2": (gc.powersgd, ("psum",)),
    "powersgd, rank 2, in qsgd's 8 bits": (
        lambda aggregate: gc.powersgd(quantizer=gc.qsgd(8, aggregate=aggregate)),
        TWO_WAYS,
    ),
    "randomk, 1 %": (gc.randomk, ("psum",)),
    "randomblock, 1 %": (gc.randomblock, ("psum",)),
    "qsgd, 4 bits": (gc.qsgd, (*TWO_WAYS, "ring")),
    "qsgd, 4 bits, shared scale": (lambda aggregate: gc.qsgd(shared_scale=True, aggregate=aggregate), ("psum",)),
    "onebit": (gc.onebit, TWO_WAYS),
    "signnorm": (gc.signnorm, TWO_WAYS),
    "topk, 1 %": (gc.topk, TWO_WAYS),
    "topk, 64 of 4096": (lambda aggregate: gc.topk(chunk=4096, k=64, aggregate=aggregate), TWO_WAYS),
    "float4": (gc.float4, TWO_WAYS),
    "statistical": (gc.statistical, TWO_WAYS),
    "adaptive, 1 of 32": (gc.adaptive, TWO_WAYS),
}
NOTE = (
    "MB: 10^6 bytes that one worker sends in a step. psum: an all-reduce; ring is another form of it, and sends as "
    "much. *: what the codec chooses by itself, where it has a choice; cast in bfloat16 chooses psum where the backend "
    "sums in 16 bits, which sends as much as shuffle."
)


def sent(tx: gc.Compressor, shapes: Any, workers: int) -> float:
    """The MB that one of so many workers sends in a step, for tensors of a tree of shapes."""
    like = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = jax.tree.map(like, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return gc.describe(tx, params, workers).totals.sent / 1e6


def rows(shapes: Any, counts: Sequence[int]) -> list[list[str]]:
    """The table's cells: codec, aggregation, and MB at each number of workers."""
    found = []
    for name, (make, aggregations) in CODECS.items():
        chosen = [False] * len(counts)
        # A codec with a choice takes the first of the ways that send equally little.
        default = (
            [sent(make(aggregate=None), shapes, n) for n in counts]
            if len(aggregations) > 1
            else [math.nan] * len(counts)
        )
        for way in aggregations:
            each = [sent(make(aggregate=way), shapes, n) for n in counts]
            stars = [x == y and not before for x, y, before in zip(each, default, chosen, strict=True)]
            chosen = [before or star for before, star in zip(chosen, stars, strict=True)]
            found.append([name, way, *(f"{x:.2f}{' *' * star}" for x, star in zip(each, stars, strict=True))])
    return found


def main() -> None:
    """Prints the table."""
    heading = ["codec", "aggregate", *(f"{workers} workers" for workers in WORKERS)]
    cells = rows(resnet18_shapes(), WORKERS)
    if FLAGS.markdown:
        lines = [heading, ["---", "---", *["---:"] * len(WORKERS)], *cells]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines), NOTE, sep="\n\n")
        return
    table = Table(title="MB that one worker sends in a step, for ResNet-18's gradient")
    for place, name in enumerate(heading):
        table.add_column(name, justify="left" if place < 2 else "right")
    for line in cells:
        table.add_row(*line)
    screen = Console(highlight=False, width=100)
    screen.print(table)
    screen.print(NOTE)


if __name__ == "__main__":
    # Not at import: a test of another experiment may define a flag with this name.
    flags.DEFINE_boolean("markdown", False, "Print the table in Markdown.")
    command.run(main)
