"""Times one exchange between hosts of several devices: `across`, each device all, and the platform's all-reduce.

    python -m experiments.hosts --codec=qsgd,signnorm,powersgd
    python -m experiments.hosts --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0 --mbit=100

It exchanges ResNet-18's gradient (11,173,962 parameters, 62 tensors); each device has its own. One process stands for
two hosts, whose link is then memory. Started on several hosts, with the address of the first and the number of each, it
measures the links between them. The ways run in turn, round after round. The table has the median of each, the bytes
that a host sends (from wire_bits), and with --mbit the time that these bytes take on such a link.
"""

import functools
import statistics
import sys
from typing import Any, NamedTuple

import jax
from absl import flags, logging
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import gradcomp_jax as gc
from experiments import cluster, codecs, command, timing
from experiments.models import resnet18_shapes
from gradcomp_jax.compressor import compressor

FLAGS = flags.FLAGS

codecs.define_flags()
flags.declare_key_flag("codec")  # in --help
FLAGS.set_default("codec", "none,qsgd,signnorm,powersgd,topk")
WAYS = ("all-reduce", "across", "each device all")
flags.DEFINE_multi_enum("way", WAYS, WAYS, "Which ways to run.")
flags.DEFINE_multi_integer(
    "buckets", None, "In how many parts: each is a way of its own. Default: as the codec has it."
)
flags.DEFINE_integer("rounds", 7, "Times each way is run; medians are reported.", lower_bound=1)
flags.DEFINE_integer("devices", 4, "Devices of a host; CPUs stand for several.", lower_bound=1)
cluster.declare_key_flags()
flags.DEFINE_float("mbit", None, "Mbit/s of the link of each host, to tell the least time that its bytes take.")


class Way(NamedTuple):
    """An exchange that is timed.

    Attributes:
      step: (gradients, state) -> (means, state); it consumes the state.
      state: the state to start from.
      bits: a function from the state to the bits that a host sent in its last step.
    """

    step: Any
    state: Any
    bits: Any


def ways(name: str, grads: Any, mesh: Mesh) -> dict[str, Way]:
    """The ways of a codec, by their names."""
    course = codecs.Course(steps_per_epoch=1_000_000, learning_rate=None)
    codec, label = codecs.from_flags(name, 0, course), codecs.label(name)
    found = {}
    for buckets in FLAGS.buckets or [codec.settings.buckets]:
        said = f", {buckets} parts" if FLAGS.buckets else ""
        settings = codec.settings._replace(axis_name="node", buckets=buckets)
        on_node = compressor(codec.codec, settings)
        if "across" in FLAGS.way:
            found[f"{label}, across{said}"] = exchanged_by(gc.across(on_node), grads, mesh, alone=False)
        if "each device all" in FLAGS.way:
            found[f"{label}, each device all{said}"] = exchanged_by(on_node, grads, mesh, alone=True)
    return found


def exchanged_by(tx: gc.Compressor, grads: Any, mesh: Mesh, alone: bool) -> Way:
    """An exchange with `tx`; if `alone`, the devices of a host average before it, and each then exchanges all."""
    params, devices = timing.zeros_like(grads, mesh), mesh.shape["local"]
    specs = gc.state_specs(tx, params)

    def worker(grads: Any, state: Any) -> tuple[Any, Any]:
        mine = jax.tree.map(lambda x: x[0, 0], grads)
        mine = lax.pmean(mine, "local") if alone else mine
        means, state = tx.update(mine, gc.local_state(state))
        return means, gc.global_state(state)

    in_specs, out_specs = (P("node", "local"), specs), (P(), specs)
    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=in_specs, out_specs=out_specs), donate_argnums=1)
    return Way(step, gc.init(tx, params, mesh), lambda state: devices * gc.wire_bits(state).last)


def all_reduced(grads: Any, mesh: Mesh) -> Way:
    """The platform's all-reduce over both axes."""
    mean = lambda grads: lax.pmean(jax.tree.map(lambda x: x[0, 0], grads), ("node", "local"))  # noqa: E731
    step = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=P("node", "local"), out_specs=P()))
    hosts, size = mesh.shape["node"], sum(x.nbytes // mesh.size for x in jax.tree.leaves(grads))
    return Way(lambda grads, state: (step(grads), state), (), lambda _: 8 * 2 * (hosts - 1) * size // hosts)


def main() -> None:
    """Prints the table."""
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_num_cpu_devices", FLAGS.devices * (2 if cluster.join() == 1 else 1))
    mesh = gc.make_mesh({"node": max(2, jax.process_count()), "local": FLAGS.devices})
    grads = timing.random_gradients(resnet18_shapes(), mesh)
    timed = {"all-reduce": all_reduced(grads, mesh)} if "all-reduce" in FLAGS.way else {}
    for name in FLAGS.codec:
        timed |= ways(name, grads, mesh)
    steps = {label: timing.Way(functools.partial(way.step, grads), way.state) for label, way in timed.items()}
    done = timing.in_turn(steps, FLAGS.rounds, mesh)
    if jax.process_index() == 0:
        show(mesh, done.seconds, {label: way.bits(done.states[label]) // 8 for label, way in timed.items()})


def show(mesh: Mesh, times: dict[str, list[float]], sent: dict[str, int]) -> None:
    """Prints the table."""
    hosts, devices = mesh.devices.shape
    joined = "joined by memory" if jax.process_count() == 1 else "joined by their links"
    table = Table(title=f"ResNet-18's gradient, {hosts} hosts of {devices} devices {joined}, medians of {FLAGS.rounds}")
    headings = ["way", "ms an exchange", "MB a host sends", *(["ms on the link"] if FLAGS.mbit else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for label, seconds in times.items():
        link = [f"{8 * sent[label] / FLAGS.mbit / 1000:.1f}"] if FLAGS.mbit else []
        table.add_row(label, f"{1e3 * statistics.median(seconds):.1f}", f"{sent[label] / 1e6:.3f}", *link)
    Console(highlight=False, width=110).print(table)


if __name__ == "__main__":
    codecs.show_settings(sys.argv)
    command.run(main)
