"""One exchange of a whole gradient between hosts, by every codec: its time, and where the time goes.

    python -m experiments.allreduce --codec=none,powersgd,qsgd --powersgd_rank=4 --out=out/resnet18.jsonl
    sudo python -m experiments.lab --hosts=4 --rate=100mbit -- python -m experiments.allreduce {join} --out=out/4.jsonl
    python -m experiments.allreduce --runs=out/resnet18.jsonl --figure=out/allreduce.png

Started on several hosts, with the address of the first and the number of each, it measures the links between them. One
process stands for `--devices` hosts, whose links are then memory. All ways run in turn, round after round. All hosts
begin each of them together, and the time of a round is that of the slowest host:

- psum: the platform's own mean, of one flat buffer and of all leaves; the faster one is the baseline;
- whole: an exchange by a codec, as in a step: error feedback and state are part of it;
- codec: the same program on a wire where nothing is sent (loopback.py), on all hosts at the same time;
- encode: the part of that program that leads to what is said;
- empty collectives of one float, whose time is the latency.

So decode is codec - encode, with residual and state; wire is whole - codec. The floor is the time of the bytes that
wire_bits counts at the rate of the link. The bound is what an exchange can be expected to take: the floor with 4.6 % of
headers (66 bytes in frames of 1514), a latency for each message, and codec. "carried/MB" has the bytes that the first
host's interface counted, without 66 for each packet, over those of wire_bits. GradiVeQ is held in its compressed steps,
accordion at each of its levels. `--aggregations` runs each codec with every way of aggregation that it takes.

Recorded gradients come from a file of `numpy.savez`, such as `experiments.gradients --save` writes: by path, arrays
[steps, ...]; host i takes step i.
"""

import datetime
import functools
import pathlib
import platform
import shlex
import statistics
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import gradcomp_jax as gcj
from experiments import cluster, codecs, command, exchange_records, figures, host, lab, loopback, models, timing
from experiments.exchange_records import BASELINES, Record, Records
from experiments.models.perceptron import perceptron
from experiments.models.transformer import Transformer
from gradcomp_jax.exchange.collectives import in_order
from gradcomp_jax.jitted import emulates

FLAGS = flags.FLAGS

AXIS = "data"
AGGREGATIONS = ("psum", "gather", "shuffle", "ring")


# Gradients


def transformer() -> dict[str, Any]:
    """The shapes of a transformer of 8 blocks of width 512, for 256 symbols; 25,305,600 parameters."""
    return models.shapes(lambda: nnx.state(Transformer(256, 512, 8, 8, nnx.Rngs(0)), nnx.Param))


MODELS: dict[str, Callable[[], Any]] = {
    "resnet18": models.resnet18_shapes,
    "vgg19": lambda: models.shapes(lambda: models.create("vgg19", (32, 32, 3), 10, 0)[1]),
    "perceptron": lambda: models.shapes(lambda: nnx.state(perceptron(), nnx.Param)),
    "transformer": transformer,
    "square": lambda: {"kernel": (FLAGS.size, FLAGS.size)},
}


def recorded_gradients(path: str, mesh: Mesh) -> dict[str, jax.Array]:
    """Gradients from a file, [hosts, ...] by path; host i has step i, modulo the number of steps."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: --gradients={path} cannot be read ({error}): give a file of numpy.savez")
    sharding = NamedSharding(mesh, P(AXIS))

    def on_hosts(x: np.ndarray) -> jax.Array:
        rows = lambda index: x[np.arange(mesh.size)[index[0]] % len(x)].astype(np.float32)  # noqa: E731
        return jax.make_array_from_callback((mesh.size, *x.shape[1:]), sharding, rows)

    return {name: on_hosts(x) for name, x in arrays.items()}


# Ways


def baselines(grads: Any, mesh: Mesh) -> dict[str, timing.Way]:
    """The platform's mean of gradients [hosts, ...]; one flat buffer lies ready, so that it costs no copies."""
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(AXIS))

    @jax.jit
    @functools.partial(mapped, out_specs=P())
    def mean(tree: Any) -> Any:
        return lax.pmean(jax.tree.map(lambda x: x[0], tree), AXIS)

    joined = mapped(
        lambda tree: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])[None], out_specs=P(AXIS)
    )
    flat = jax.jit(joined)(grads)
    of = lambda tree: timing.Way(lambda state: (mean(tree), state))  # noqa: E731
    return dict(zip(BASELINES, (of(flat), of(grads)), strict=True))


def empty_collectives(mesh: Mesh) -> dict[str, timing.Way]:
    """A collective of each kind, of one float for each host."""
    n = mesh.size
    bodies: dict[str, Callable[[jax.Array], jax.Array]] = {
        "all-reduce": lambda x: lax.psum(x, AXIS),
        "all-gather": lambda x: lax.all_gather(x, AXIS),
        "all-to-all": lambda x: lax.all_to_all(jnp.broadcast_to(x, (n, *x.shape)), AXIS, 0, 0),
        "collective-permute": lambda x: lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)]),
    }
    ones = jax.jit(lambda: jnp.ones(n), out_shardings=NamedSharding(mesh, P(AXIS)))()

    def way(body: Callable[[jax.Array], jax.Array]) -> timing.Way:
        summed = lambda x: jnp.sum(body(x), keepdims=True).reshape(1)  # noqa: E731
        run = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False))
        return timing.Way(lambda state: (run(ones), state))

    return {f"empty {kind}": way(bodies[kind]) for kind in loopback.KINDS}


class Exchange(NamedTuple):
    """The programs of a codec on gradients [hosts, ...].

    Attributes:
      whole: state -> means, state; it consumes the state.
      codec: the same, on a wire where nothing is sent.
      encode: state -> what is said, of each host.
      state: the first state.
    """

    whole: Callable[[Any], tuple[Any, Any]]
    codec: Callable[[Any], tuple[Any, Any]]
    encode: Callable[[Any], loopback.Said]
    state: Any

    @classmethod
    def of(cls, tx: gcj.Compressor, grads: Any, mesh: Mesh) -> "Exchange":
        """The programs of a codec."""
        params = timing.zeros_like(grads, mesh)
        specs = gcj.state_specs(tx, params)

        def update(grads: Any, state: Any) -> tuple[Any, Any]:
            means, state = tx.update(jax.tree.map(lambda x: x[0], grads), gcj.local_state(state))
            return means, gcj.global_state(state)

        def ordered(grads: Any, state: Any) -> tuple[Any, Any]:
            if not emulates(mesh):
                return update(grads, state)
            with in_order():
                return update(grads, state)

        def alone(grads: Any, state: Any) -> tuple[Any, Any]:
            with loopback.nothing_sent():
                return update(grads, state)

        def said(grads: Any, state: Any) -> loopback.Said:
            with loopback.nothing_sent() as words:
                update(grads, state)
                return jax.tree.map(lambda x: x[None], loopback.in_all(words))

        mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(AXIS), specs))
        whole = jax.jit(mapped(ordered, out_specs=(P(), specs)), donate_argnums=1)
        codec = jax.jit(mapped(alone, out_specs=(P(), specs), check_vma=False), donate_argnums=1)
        encode = jax.jit(mapped(said, out_specs=P(AXIS), check_vma=False))
        on = functools.partial
        return cls(on(whole, grads), on(codec, grads), on(encode, grads), gcj.init(tx, params, mesh))

    def ways(self, label: str, hold: Callable[[Any], Any] | None) -> dict[str, timing.Way]:
        """The ways to time, with `hold` for the codec's own state before each step."""
        held = (
            jax.jit(functools.partial(timing.changed, change=hold), donate_argnums=0) if hold else lambda state: state
        )
        return {
            label: timing.Way(self.whole, jax.tree.map(jnp.copy, self.state), held),
            f"{label}: codec": timing.Way(self.codec, copies=label),
            f"{label}: encode": timing.Way(lambda state: (self.encode(state), ()), copies=label),
        }


def phases(name: str, label: str) -> dict[str, Callable[[Any], Any] | None]:
    """How the codec's own state is held before each step, by label; None leaves it as it is."""
    if name == "accordion":
        return {f"{label}, {what}": functools.partial(timing.at_level, i) for i, what in enumerate(("low", "high"))}
    if name == "gradiveq":
        return {f"{label}, compressed": functools.partial(timing.at_position, FLAGS.gradiveq_train_steps)}
    return {label: None}


def fitted(exchange: Exchange) -> Exchange:
    """GradiVeQ's exchange with the bases of noise, from the last dense step of its cycle."""

    def ready(own: Any) -> Any:
        return timing.at_position(FLAGS.gradiveq_train_steps - 1, timing.with_samples(own))

    lies = jax.tree.map(lambda x: x.sharding, exchange.state)
    state = jax.jit(functools.partial(timing.changed, change=ready), out_shardings=lies)(exchange.state)
    return exchange._replace(state=exchange.whole(state)[1])


def chosen(names: Sequence[str], aggregations: bool) -> Iterator[tuple[str, str, gcj.Compressor]]:
    """Each codec's name, label and transformation, from its flags; with every aggregation that it takes, if asked."""
    course = codecs.Course(steps_per_epoch=1_000_000, learning_rate=None)
    for name in names:
        key = f"{name}_aggregate"
        if not aggregations or key not in FLAGS:
            yield name, codecs.label(name), codecs.from_flags(name, 0, course)
            continue
        for way in AGGREGATIONS:
            FLAGS[key].value = way
            try:
                tx = codecs.from_flags(name, 0, course)
            except ValueError:
                continue  # the codec does not take this one
            label, said = codecs.label(name), f"aggregate={way}"
            yield name, label if said in label else f"{label} {said}", tx  # said even if it is the default
        FLAGS[key].unparse()


# Measuring


def measured(
    exchanges: dict[str, tuple[str, gcj.Compressor]],
    grads: Any,
    mesh: Mesh,
    rounds: int,
    counter: Callable[[], Sequence[int]],
) -> tuple[dict[str, list[float]], list[Record]]:
    """Times everything.

    Args:
      exchanges: by label, a codec's name and transformation.
      grads: gradients [hosts, ...].
      mesh: all hosts along one axis.
      rounds: times that each way is run.
      counter: the bytes and packets that this host has sent so far, by its interface; or nothing.

    Returns:
      The latencies in ms, by kind of collective, and the records of the ways.
    """
    ways = empty_collectives(mesh) | baselines(grads, mesh)
    names, said = {}, {}
    for label, (name, tx) in exchanges.items():
        exchange = Exchange.of(tx, grads, mesh)
        exchange = fitted(exchange) if name == "gradiveq" else exchange
        for shown, hold in phases(name, label).items():
            ways |= exchange.ways(shown, hold)
            names[shown], said[shown] = name, exchange.encode
    done = timing.in_turn(ways, rounds, mesh, counter)
    latency = {kind: ms(done.seconds[f"empty {kind}"]) for kind in loopback.KINDS}
    leaves = jax.tree.leaves(grads)
    size = sum(x.nbytes for x in leaves) // mesh.size
    dense = -(-2 * (mesh.size - 1) * size // mesh.size)
    records = [
        way_record(label, "none", done, dense, {"all-reduce": count})
        for label, count in zip(BASELINES, (1, len(leaves)), strict=True)
    ]
    for label, name in names.items():
        sent = gcj.wire_bits(done.states[label]).last // 8
        counts = said[label](ways[label].hold(done.states[label])).messages  # the hold consumes the state
        mine = np.asarray(counts.addressable_shards[0].data)[0]
        messages = {kind: int(x) for kind, x in zip(loopback.KINDS, mine, strict=True) if x}
        records.append(way_record(label, name, done, sent, messages))
    return latency, records


def way_record(label: str, name: str, done: timing.Timed, sent: int, messages: dict[str, int]) -> Record:
    """The record of a way.

    It has the ms of each round, of the whole exchange and of codec and encode; the bytes that a host sends by
    wire_bits; the bytes and packets that the first host's interface counted in each round; and its messages by kind.
    """
    parts = {part: ms(done.seconds.get(f"{label}: {part}", [])) for part in ("codec", "encode")}
    what = {"kind": "way", "way": label, "codec": name, "bytes": sent, "counted": done.counted[label]}
    return what | {"messages": messages, "whole_ms": ms(done.seconds[label])} | {f"{k}_ms": x for k, x in parts.items()}


def ms(seconds: Sequence[float]) -> list[float]:
    """Seconds as milliseconds, to the microsecond."""
    return [round(1e3 * x, 3) for x in seconds]


def header_of(grads: Any, mesh: Mesh, mbit: float | None) -> Record:
    """The first line of the records."""
    leaves = jax.tree.leaves(grads)
    return {
        "kind": "allreduce",
        "model": FLAGS.gradients or (f"square{FLAGS.size}" if FLAGS.model == "square" else FLAGS.model),
        "parameters": sum(x.size for x in leaves) // mesh.size,
        "tensors": len(leaves),
        "hosts": mesh.size,
        "processes": jax.process_count(),
        "mbit": mbit,
        "backend": jax.default_backend(),
        **host.hardware(),
        "environment": host.settings(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "experiments.allreduce", *sys.argv[1:]]),
    }


# The command


def show(found: Sequence[Records]) -> None:
    """Prints the tables, and writes the figure if asked."""
    screen = Console(highlight=False, markup=False, width=150)
    for records in found:
        screen.print(exchange_records.table(records))
        latency = ", ".join(f"{kind} {statistics.median(times):.2f}" for kind, times in records.latency.items())
        screen.print(f"ms of an empty collective: {latency}.")
        for label, why in records.header["refused"].items():
            screen.print(f"{label} is left out: {why}.")
    if FLAGS.figure:
        figures.exchanges([exchange_records.panel(records) for records in found], pathlib.Path(FLAGS.figure))
        screen.print(f"Figure: {FLAGS.figure}", soft_wrap=True)


def run() -> Records:
    """Measures, as the flags say."""
    if cluster.join() == 1:
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    if FLAGS.out:
        command.directory("out", str(pathlib.Path(FLAGS.out).parent))  # an error now, not after the measurement
    mesh = gcj.make_mesh()
    if FLAGS.gradients:
        grads = recorded_gradients(FLAGS.gradients, mesh)
    else:
        grads = timing.random_gradients(MODELS[FLAGS.model](), mesh)
    mbit = FLAGS.mbit or lab.mbit_here()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), grads)
    exchanges, refused = {}, {}
    for name, label, tx in chosen(FLAGS.codec, FLAGS.aggregations):
        try:
            jax.eval_shape(tx.init, like)
            exchanges[label] = name, tx
        except ValueError as error:
            refused[label] = str(error)
    counter = host.counter_of(FLAGS.interface or host.only_interface() if jax.process_count() > 1 else None)
    latency, ways = measured(exchanges, grads, mesh, FLAGS.rounds, counter)
    return Records(header_of(grads, mesh, mbit) | {"refused": refused}, latency, ways)


def main() -> None:
    """Measures or reads, prints the table, and writes records and figure."""
    logging.set_verbosity(logging.ERROR)
    if FLAGS.runs:
        try:
            show([exchange_records.read(path) for path in FLAGS.runs])
        except exchange_records.RecordsError as error:
            sys.exit(f"error: {error}")
        return
    try:
        records = run()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        if FLAGS.out:
            exchange_records.write(FLAGS.out, records)
        show([records])


def define_flags() -> None:
    """Defines the flags of the command."""
    codecs.define_flags()
    flags.declare_key_flag("codec")
    FLAGS.set_default("codec", [name for name in codecs.CODECS if name != "accordion"])
    cluster.declare_key_flags()
    flags.DEFINE_enum("model", "resnet18", MODELS, "Whose gradient: of its shapes, with random values.")
    flags.DEFINE_integer("size", 4096, "Rows and columns of --model=square.", lower_bound=1)
    flags.DEFINE_string("gradients", None, "A file of recorded gradients, which takes the place of --model.")
    flags.DEFINE_integer("rounds", 7, "Times each way is run; medians are reported.", lower_bound=1)
    flags.DEFINE_integer("devices", 2, "How many hosts one process stands for.", lower_bound=1)
    flags.DEFINE_boolean("aggregations", False, "Run each codec with every way of aggregation that it takes.")
    flags.DEFINE_float("mbit", None, "Mbit/s of each host's link; in the lab, by default its rate.", lower_bound=0.0)
    flags.DEFINE_string("interface", None, "The interface whose bytes are counted; by default the only one.")
    flags.DEFINE_string("out", None, "Write the records to this file, as JSON lines.")
    flags.DEFINE_list("runs", [], "Files of records: show these, and measure nothing.")
    flags.DEFINE_string("figure", None, "Write a figure to this file.")


if __name__ == "__main__":
    # Not at import: a test of another experiment may define flags with these names.
    define_flags()
    codecs.show_settings(sys.argv)
    command.run(main)
