"""What one worker sends in a step for ResNet-18's gradient: by codec, aggregation and number of workers.

    python -m experiments.wire
    python -m experiments.wire --markdown

Counted by the library itself, for 11,173,962 parameters in 62 tensors, uncompressed ones included: each codec's
exchange is traced for that many workers, of which none is there, and tells its bits. GradiVeQ is shown in its
compressed steps. Left out is what data decide: accordion, which sends what its two levels do and a float a layer at
each check, and QSGD's Elias code, whose buffer is sent where the code fits, and the packed form else.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments.models import resnet18_shapes
from gradcomp_jax import (
    Compressor,
    adaptive,
    collectives,
    gradiveq,
    none,
    onebit,
    powersgd,
    qsgd,
    randomblock,
    randomk,
    signnorm,
    topk,
)
from gradcomp_jax.compressor import Exchanged, compressor, flatten

FLAGS = flags.FLAGS

WORKERS = (2, 4, 8, 64)
TWO_WAYS = ("gather", "shuffle")
CODECS: dict[str, tuple[Callable[..., Compressor], Sequence[str]]] = {
    "none": (none, ("psum",)),
    "gradiveq, ratio 8": (gradiveq, ("psum",)),
    "powersgd, rank 2": (powersgd, ("psum",)),
    "powersgd, rank 2, in qsgd's 8 bits": (
        lambda aggregate: powersgd(quantizer=qsgd(8, min_size=0, aggregate=aggregate)),
        TWO_WAYS,
    ),
    "randomk, 1 %": (randomk, ("psum",)),
    "randomblock, 1 %": (randomblock, ("psum",)),
    "qsgd, 4 bits": (qsgd, (*TWO_WAYS, "ring")),
    "qsgd, 4 bits, shared scale": (lambda aggregate: qsgd(shared_scale=True, aggregate=aggregate), ("psum",)),
    "onebit": (onebit, TWO_WAYS),
    "signnorm": (signnorm, TWO_WAYS),
    "topk, 1 %": (topk, TWO_WAYS),
    "adaptive, 1 of 32": (adaptive, TWO_WAYS),
}
FAR = 2**30  # in GradiVeQ's cycle: beyond the training steps
NOTE = (
    "MB: 10^6 bytes that one worker sends in a step. psum: an all-reduce; ring is another form of it, and sends as "
    "much. *: what the codec chooses by itself, where it has a choice."
)


def sent(tx: Compressor, shapes: Any, workers: int) -> float:
    """MB that one of so many workers sends in a step, for tensors of a tree of shapes."""
    leaves, _ = flatten(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)))
    told: list[Any] = []

    def exchange(tensors: dict[str, jax.Array], state: Any, axis_name: Any, **extra_args: Any) -> Exchanged:
        got = tx.codec.exchange(tensors, state, axis_name, **extra_args)
        _, dense = collectives.mean({path: x for path, x in leaves.items() if path not in tensors}, axis_name)
        told[:] = [got.bits, dense]
        return got

    heard = compressor(tx.codec._replace(exchange=exchange), **tx.settings._asdict())

    def worker() -> tuple[Any, jax.Array]:
        state = heard.init(leaves)
        if tx.codec.name == "gradiveq":
            state = state._replace(codec=state.codec._replace(position=jnp.int32(FAR)))
        mean, state = heard.update(leaves, state)
        return mean, state.wire.last

    mesh = AbstractMesh((workers,), ("data",))
    jax.make_jaxpr(jax.shard_map(worker, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False))()
    if all(isinstance(bits, int) for bits in told):
        return sum(told) / 8e6
    # The state decides. Of a program that returns the count alone, nothing but the branches' choice is left to run.
    count = jax.jit(jax.vmap(lambda _: worker()[1], axis_name="data", out_axes=None))
    high, low = np.asarray(count(jnp.zeros(workers)), np.float64)
    return float(high * 2.0**32 + low) / 8e6


def rows(shapes: Any, counts: Sequence[int]) -> list[list[str]]:
    """The table's cells: codec, aggregation, and MB at each number of workers."""
    found = []
    for name, (make, aggregations) in CODECS.items():
        chosen = [False] * len(counts)
        # By itself a codec with a choice takes the first of those that send as much.
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


def main(argv: list[str]) -> None:
    """Prints the table."""
    logging.set_verbosity(logging.WARNING)  # else jax tells of each kind of accelerator that is not there
    if argv[1:]:
        sys.exit(f"error: {argv[1]!r} is no flag; all settings are given as --name=value")
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
    # Not at import: a test of another experiment may have a flag of this name.
    flags.DEFINE_boolean("markdown", False, "Print the table in Markdown.")
    app.run(main)
