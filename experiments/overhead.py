"""The compute that a codec adds to a step, and the compilation that it adds to the first step, without a network.

    python -m experiments.overhead
    python -m experiments.overhead --codec=powersgd --powersgd_rank=4

It times encode, decode and error feedback for ResNet-18's gradient (11,173,962 parameters, 62 tensors) on one worker,
with collectives that move nothing. The codecs run in turn, round after round. The table has the median of each, and the
median as a multiple of an in-place pass over the same memory, which is the least cost of any step over the gradient.
GradiVeQ has a row for each of its phases, accordion for each of its levels. `--nopowersgd_error_feedback` times a codec
without its error feedback.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags, logging
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments import codecs, command
from experiments.models import resnet18_shapes
from experiments.timing import Way, at_level, at_position, changed, in_turn, with_samples
from gradcomp_jax import Compressor, CompressorState, global_state, init, local_state, make_mesh, state_specs

FLAGS = flags.FLAGS

codecs.define_flags()
flags.declare_key_flag("codec")  # in --help
FLAGS.set_default("codec", "none,gradiveq,powersgd,qsgd,onebit,signnorm,topk,adaptive,randomk,accordion")
flags.DEFINE_integer("rounds", 15, "Times each codec is run; medians are reported.", lower_bound=1)


class Case(NamedTuple):
    """One timed case.

    Attributes:
      program: (gradients, state) -> (updates, state); it consumes the state.
      state: the state to start from.
      hold: the codec's own state -> the same in the phase, or at the levels, to be timed.
      seconds: the seconds to compile the program; None if another case has the same program.
    """

    program: Any
    state: CompressorState
    hold: Callable[[Any], Any]
    seconds: float | None


def made(name: str) -> Compressor:
    """The codec with its flags; accordion checks in no step, because a check belongs to neither level."""
    return codecs.from_flags(name, 0, codecs.Course(steps_per_epoch=1_000_000, learning_rate=None))


def cases(name: str, grads: Any) -> dict[str, Case]:
    """A codec's update on one worker, one case for each of its phases, by name."""
    codec, label = made(name), codecs.label(name)
    params = jax.tree.map(lambda x: x[0], grads)
    specs = state_specs(codec, params)

    def worker(grads: Any, state: CompressorState) -> tuple[Any, CompressorState]:
        updates, state = codec.update(jax.tree.map(lambda x: x[0], grads), local_state(state))
        return updates, global_state(state)

    # Not `simulate`: under its vmap both branches of a conditional are computed.
    update = jax.shard_map(worker, mesh=make_mesh(1), in_specs=(P("data"), specs), out_specs=(P(), specs))
    began = time.perf_counter()
    program = jax.jit(update, donate_argnums=1).lower(grads, init(codec, params, 1)).compile()
    seconds = time.perf_counter() - began
    if name == "accordion":
        levels = {}
        for level, what in enumerate(("low", "high")):
            hold = functools.partial(at_level, level)
            levels[f"{label}, {what}"] = Case(program, init(codec, params, 1), hold, None if level else seconds)
        return levels
    if name != "gradiveq":
        return {label: Case(program, init(codec, params, 1), lambda own: own, seconds)}

    last = FLAGS.gradiveq_train_steps - 1

    def at(position: int, state: CompressorState | None = None) -> Case:
        state = changed(init(codec, params, 1), with_samples) if state is None else state
        return Case(program, state, functools.partial(at_position, position), None)

    first = at(last)
    _, fitted = program(grads, changed(first.state, first.hold))
    return {
        f"{label}, training": at(0)._replace(seconds=seconds),
        "... fitting": at(last),
        "... compressed": at(last + 1, fitted),
    }


def main() -> None:
    """Prints the table."""
    logging.set_verbosity(logging.ERROR)  # jax reports missing accelerators, and the library reports a single worker
    shapes, tree = jax.tree.flatten(resnet18_shapes(), is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    leaves = [jax.random.normal(key, (1, *shape)) for key, shape in zip(keys, shapes, strict=True)]
    grads = jax.tree.unflatten(tree, leaves)

    try:
        for name in FLAGS.codec:
            jax.eval_shape(made(name).init, jax.tree.map(lambda x: x[0], grads))
    except ValueError as error:
        sys.exit(f"error: {error}")
    timed = {label: case for name in FLAGS.codec for label, case in cases(name, grads).items()}
    in_place = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    ways = {"in-place pass": Way(lambda tree: (None, in_place(tree)), jax.tree.map(jnp.copy, grads))}
    for label, case in timed.items():
        ways[label] = Way(
            functools.partial(case.program, grads), case.state, functools.partial(changed, change=case.hold)
        )
    times = in_turn(ways, FLAGS.rounds).seconds

    table = Table(title=f"ResNet-18's gradient, one worker on {jax.default_backend()}, medians of {FLAGS.rounds}")
    for heading in ("codec", "ms a step", "in-place passes", "compile s"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    unit = statistics.median(times["in-place pass"])
    for label, seconds in times.items():
        median = statistics.median(seconds)
        seconds_to_compile = timed[label].seconds if label in timed else None
        compiling = "" if seconds_to_compile is None else f"{seconds_to_compile:.1f}"
        table.add_row(label, f"{1e3 * median:.1f}", f"{median / unit:.1f}", compiling)
    Console(highlight=False, width=100).print(table)


if __name__ == "__main__":
    codecs.show_settings(sys.argv)
    command.run(main)
