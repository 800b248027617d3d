"""Times training with outer steps between hosts, beside local steps alone and dense data parallelism.

    python -m experiments.local_steps
    python -m experiments.local_steps --coordinator_address=10.0.0.1:1234 --num_processes=4 --process_id=0 --mbit=100

One process stands for `--devices` workers, whose links are then memory. Started on several hosts, with the address of
the first and the number of each, every host is a worker. All train one model of about three million parameters, by
AdamW. The cases run in turn, round after round, each for a period of `--every` local steps, until all hosts are done:

- plain: local steps by optax alone, without any exchange and without a test for finite gradients;
- local steps: those of `outer`, in whose program there is no exchange;
- a method: a whole period with its exchange;
- dense: steps that all-reduce every gradient; `--dense_steps` of them.

The table has the median of each in milliseconds a step, and its speed as a share of the plain step's. It also has the
bytes that a worker sends in a period, by wire_bits.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import gradcomp_jax as gcj
from experiments import cluster, command, timing, turns

FLAGS = flags.FLAGS

METHODS: dict[str, Callable[..., gcj.Outer]] = {
    "diloco": gcj.diloco,
    "sparseloco": gcj.sparseloco,
    "muloco": gcj.muloco,
    "streaming_diloco": gcj.streaming_diloco,
}
flags.DEFINE_multi_enum("method", ["sparseloco"], METHODS, "Which methods to time.")
flags.DEFINE_integer("every", 30, "The local steps of a period.", lower_bound=2)
flags.DEFINE_integer("dense_steps", 3, "Steps of a round of dense data parallelism; 0 leaves it out.", lower_bound=0)
flags.DEFINE_integer("rounds", 5, "Times each case is run; medians are reported.", lower_bound=1)
flags.DEFINE_integer("width", 448, "Of the model's 16 layers; 448 makes 3.2 million parameters.", lower_bound=8)
flags.DEFINE_integer("rows", 64, "Rows of a worker's batch.", lower_bound=1)
flags.DEFINE_integer("devices", 4, "Workers, if there is one process.", lower_bound=1)
cluster.declare_key_flags()
flags.DEFINE_float("mbit", None, "Mbit/s of the link of each host, to tell the least time that its bytes take.")
LAYERS = 16


def weights() -> dict[str, jax.Array]:
    """The parameters: as many layers as there are, with biases and gains."""
    width, keys = FLAGS.width, jax.random.split(jax.random.key(0), LAYERS)
    params = {f"layer_{i}/kernel": jax.random.normal(key, (width, width)) / width**0.5 for i, key in enumerate(keys)}
    params |= {f"layer_{i}/bias": jnp.zeros(width) for i in range(LAYERS)}
    return params | {f"layer_{i}/gain": jnp.ones(width) for i in range(LAYERS)}


def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
    """The mean square of what a residual network makes of its input, and the input reversed."""
    x = rows
    for i in range(LAYERS):
        y = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-6) * params[f"layer_{i}/gain"]
        x = x + jax.nn.gelu(y @ params[f"layer_{i}/kernel"] + params[f"layer_{i}/bias"])
    return jnp.mean((x - rows[:, ::-1]) ** 2)


def cases(mesh: Mesh) -> dict[str, turns.Case]:
    """All cases by name."""
    adamw = optax.adamw(1e-4)
    # A period that no round fills: no step of it exchanges anything.
    alone = gcj.outer(adamw, every=10 * FLAGS.every * (FLAGS.rounds + 1), codec=gcj.none())
    trained = lambda tx, steps: turns.trained(loss_fn, tx, weights, mesh, steps)  # noqa: E731
    found = {
        "plain": turns.alone(loss_fn, adamw, weights, mesh, FLAGS.every),
        "local steps": trained(alone, FLAGS.every),
    }
    for name in FLAGS.method:
        inner = optax.contrib.muon(1e-4) if name == "muloco" else adamw
        found[name] = trained(METHODS[name](inner, every=FLAGS.every), FLAGS.every)
    if FLAGS.dense_steps:
        found["dense"] = trained(optax.chain(gcj.none(), adamw), FLAGS.dense_steps)
    return found


def main() -> None:
    """Prints the table."""
    logging.set_verbosity(logging.ERROR)
    if cluster.join() == 1:
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    mesh = gcj.make_mesh()
    rows = jax.jit(
        jax.shard_map(
            lambda: jax.random.normal(jax.random.fold_in(jax.random.key(1), jax.lax.axis_index("data")), shape()),
            mesh=mesh,
            in_specs=(),
            out_specs=P("data"),
        )
    )()
    times, sent = timings(cases(mesh), rows, timing.beginning(mesh))
    if jax.process_index() == 0:
        show(mesh.size, times, sent)


def timings(
    timed: dict[str, turns.Case], rows: jax.Array, meet: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The seconds that a step of each case took, round by round; and the bytes that a worker sends in a period."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    sent: dict[str, float] = {}
    # Dense steps come last: what follows their long messages is slower. Every other round has the reverse order.
    order = [[name for name in timed if (name == "dense") == last] for last in (False, True)]
    order_of_turns = [
        (turn, name) for names in order for turn in range(FLAGS.rounds + 1) for name in names[:: (-1) ** turn]
    ]
    for turn, name in order_of_turns:
        timed[name], seconds, sent_in_step = turns.turn(timed[name], rows, meet)
        sent[name] = sent_in_step * FLAGS.every
        if turn:  # the first turn compiles
            times[name].append(seconds)
    return times, sent


def shape() -> tuple[int, int]:
    """The shape of a worker's batch."""
    return FLAGS.rows, FLAGS.width


def show(workers: int, times: dict[str, list[float]], sent: dict[str, float]) -> None:
    """Prints the table."""
    joined = "joined by memory" if jax.process_count() == 1 else "joined by their links"
    title = f"{LAYERS} layers of {FLAGS.width}, {workers} workers {joined}, a period of {FLAGS.every} steps"
    table = Table(title=f"{title}, medians of {FLAGS.rounds}")
    headings = [
        "",
        "ms a step",
        "of plain speed",
        "MB a worker sends in a period",
        *(["s on the link"] * bool(FLAGS.mbit)),
    ]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    least = statistics.median(times["plain"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        link = [f"{8 * sent[name] / FLAGS.mbit / 1e6:.3f}"] if FLAGS.mbit else []
        table.add_row(name, f"{1e3 * middle:.1f}", f"{least / middle:.3f}", f"{sent[name] / 1e6:.3f}", *link)
    Console(highlight=False, width=110).print(table)


if __name__ == "__main__":
    command.run(main)
