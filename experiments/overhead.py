"""What a codec adds to a step in compute, and to the first one in compilation, without a network.

    python -m experiments.overhead
    python -m experiments.overhead --codec=powersgd --powersgd_rank=4

For ResNet-18's gradient (11,173,962 parameters, 62 tensors) on one simulated worker: encode, decode and error
feedback, with collectives that move nothing. The codecs run in turn, round after round, and each is reported
by its median and as a multiple of an in-place pass over the same memory, which is the least that any step
over the gradient can cost.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments import codecs
from experiments.models import resnet18_shapes
from gradcomp_jax import Compressor, init, state_specs

FLAGS = flags.FLAGS

codecs.define_flags()
flags.adopt_module_key_flags(codecs)
FLAGS.set_default("codec", ",".join(codecs.CODECS))
flags.DEFINE_integer("rounds", 15, "Times each codec is run; medians are reported.", lower_bound=1)


def compiled(codec: Compressor, grads):
    """The codec's update on one simulated worker, compiled; its first state; and the seconds to compile."""
    params = jax.tree.map(lambda x: x[0], grads)
    state = init(codec, params, 1)
    axes = jax.tree.map(lambda spec: 0 if "data" in spec else None, state_specs(codec, params))
    update = jax.vmap(lambda g, s: codec.update(g, s), in_axes=(0, axes), out_axes=(None, axes), axis_name="data")
    began = time.perf_counter()
    program = jax.jit(update, donate_argnums=1).lower(grads, state).compile()
    return program, state, time.perf_counter() - began


def main(argv: list[str]) -> None:
    """Prints the table."""
    logging.set_verbosity(logging.WARNING)  # else jax tells of each kind of accelerator that is not there
    if argv[1:]:
        sys.exit(f"error: {argv[1]!r} is no flag; all settings are given as --name=value")
    shapes, tree = jax.tree.flatten(resnet18_shapes(), is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    leaves = [jax.random.normal(key, (1, *shape)) for key, shape in zip(keys, shapes, strict=True)]
    grads = jax.tree.unflatten(tree, leaves)

    programs, states, compile_seconds = {}, {}, {}
    for name in FLAGS.codec:
        label = codecs.label(name)
        programs[label], states[label], compile_seconds[label] = compiled(codecs.from_flags(name, seed=0), grads)
    in_place = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    passed = jax.block_until_ready(in_place(jax.tree.map(jnp.copy, grads)))

    times: dict[str, list[float]] = {label: [] for label in ["in-place pass", *programs]}
    for _ in range(FLAGS.rounds):
        began = time.perf_counter()
        passed = jax.block_until_ready(in_place(passed))
        times["in-place pass"].append(time.perf_counter() - began)
        for label, program in programs.items():
            began = time.perf_counter()
            _, states[label] = jax.block_until_ready(program(grads, states[label]))
            times[label].append(time.perf_counter() - began)

    table = Table(title=f"ResNet-18's gradient, one worker on {jax.default_backend()}, medians of {FLAGS.rounds}")
    for heading in ("codec", "ms a step", "in-place passes", "compile s"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    unit = statistics.median(times["in-place pass"])
    for label, seconds in times.items():
        median = statistics.median(seconds)
        compiling = f"{compile_seconds[label]:.1f}" if label in compile_seconds else ""
        table.add_row(label, f"{1e3 * median:.1f}", f"{median / unit:.1f}", compiling)
    Console(highlight=False, width=100).print(table)


if __name__ == "__main__":
    app.run(main)
