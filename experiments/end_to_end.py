"""Milliseconds a step of whole training between hosts, by method, with PyTorch on the same hosts in the same run.

    python -m experiments.end_to_end --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0
    python -m experiments.end_to_end --method=none,powersgd,sparseloco --model=resnet18 --rounds=3
    python -m experiments.end_to_end --runs='out/end_to_end/*.jsonl'

Started on several hosts, with the address of the first and the number of each, every host is a worker. With --torch
each host also starts PyTorch's side, see `experiments.torch_ddp`; --torch_python is the Python that has torch, from
`pip install -e '.[torch]'`. Its port is the coordinator's next one. Without these flags one process stands for
--devices workers, whose links are then memory.

All train one model from the same weights, by SGD with momentum, on random data: each host its own batch, in every step
the same. Batch normalization takes the statistics of the batch, and keeps none. Each method of --method is a case, and
so are local steps, without any exchange; PyTorch has three: local steps, DistributedDataParallel, and with its
powerSGD_hook. In each round all cases take their turn, first ours, then PyTorch's, while the other side waits. A turn
is --steps steps, or --dense_steps without compression, or a whole period with outer steps. The table has medians over
the rounds.

On CPUs XLA and PyTorch ask for large buffers anew in each step, and glibc gives them back to the system, which costs
page faults. These variables in the environment of both sides keep them; the records have them:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_ARENA_MAX=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1

Without MALLOC_ARENA_MAX=1 buffers above 64 MB are still given back. The last one asks for pages of 2 MB.

--out writes records as JSON lines: a header, then a line for each case. With --runs nothing is measured: the tables and
the figure are of records that are there already.
"""

import contextlib
import datetime
import functools
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from jax.sharding import Mesh

import gradcomp_jax as gcj
from experiments import cluster, codecs, command, display, host, lab, step_times, timing, torch_side, turns
from experiments.models import resnet
from experiments.models.perceptron import perceptron
from experiments.models.transformer import Transformer
from experiments.step_times import Record

FLAGS = flags.FLAGS

CONTEXT, SYMBOLS = 64, 256
OUTER: dict[str, Callable[..., gcj.Outer]] = {
    "diloco": gcj.diloco,
    "sparseloco": gcj.sparseloco,
    "streaming_diloco": gcj.streaming_diloco,
}
METHODS = (*codecs.CODECS, *OUTER)
MOMENTUM = 0.9


class Network(NamedTuple):
    """A kind of model.

    Attributes:
      width: its usual width.
      make: width -> the module.
      x: rows -> the shape of its input; symbols, if `labels` has the same shape, otherwise numbers.
      labels: rows -> the shape of its labels.
      classes: the number of labels.
    """

    width: int
    make: Callable[[int], nnx.Module]
    x: Callable[[int], tuple[int, ...]]
    labels: Callable[[int], tuple[int, ...]]
    classes: int


def resnet18(width: int) -> nnx.Module:
    """ResNet-18 in its CIFAR form; its usual width is 64."""
    block, widths = functools.partial(resnet.Block, project=True), [width * 2**stage for stage in range(4)]
    return resnet.ResNet(block, widths, 2, (32, 32, 3), 10, nnx.Rngs(0))


def transformer(width: int) -> nnx.Module:
    """Six layers of six heads."""
    return Transformer(SYMBOLS, width, layers=6, heads=6, rngs=nnx.Rngs(0))


MODELS = {
    "perceptron": Network(2048, perceptron, lambda n: (n, 3072), lambda n: (n,), 10),
    "resnet18": Network(64, resnet18, lambda n: (n, 32, 32, 3), lambda n: (n,), 10),
    "transformer": Network(384, transformer, lambda n: (n, CONTEXT), lambda n: (n, CONTEXT), SYMBOLS),
}


class Task(NamedTuple):
    """What is trained.

    Attributes:
      weights: () -> the parameters to start from; traceable.
      loss_fn: (parameters, batch) -> loss.
      rows: (number of a worker, number of rows) -> its batch, arrays of numpy's: x and labels.
    """

    weights: Callable[[], Any]
    loss_fn: Callable[[Any, Any], jax.Array]
    rows: Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def task_of(model: str, width: int) -> Task:
    """The task of a model in `MODELS`, of any width."""
    network = MODELS[model]

    def split() -> Any:
        return nnx.split(network.make(width), nnx.Param, ...)

    structure, _, rest = split()

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        # A copy, because statistics from outside this function may not be written to under jax.grad.
        logits = nnx.merge(structure, params, rest, copy=True)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def rows(worker: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(worker)
        labels = rng.integers(network.classes, size=network.labels(count), dtype=np.int32)
        if network.x(count) == labels.shape:
            return rng.integers(network.classes, size=labels.shape, dtype=np.int32), labels
        return rng.standard_normal(network.x(count), np.float32), labels

    return Task(lambda: split()[1], loss_fn, rows)


def define_flags() -> None:
    """Defines the flags. Not at import: a test of another experiment may define flags with these names."""
    codecs.define_settings()
    FLAGS.set_default("powersgd_rank", 4)
    flags.DEFINE_list(
        "method",
        ["none", "powersgd"],
        f"What to time: {', '.join(METHODS)}. --method=NAME --help shows a codec's settings.",
    )
    flags.register_validator(
        "method",
        lambda names: names and all(name in METHODS for name in names),
        message=f"must be some of {', '.join(METHODS)}, with commas between them",
    )
    flags.DEFINE_enum("model", "perceptron", MODELS, "What to train, of ten million parameters, or eleven.")
    flags.DEFINE_integer("width", None, "The width of the model; by default its usual one.", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "Rows of a worker.", lower_bound=1)
    flags.DEFINE_float("lr", 0.01, "The learning rate; of outer methods, that of local steps.", lower_bound=0)
    flags.DEFINE_integer("every", 30, "The local steps of a period, of methods with outer steps.", lower_bound=2)
    flags.DEFINE_integer("rounds", 7, "Times each case is run; medians are reported.", lower_bound=1)
    flags.DEFINE_integer("steps", 5, "Steps of a turn.", lower_bound=1)
    flags.DEFINE_integer("dense_steps", 2, "Steps of a turn without compression.", lower_bound=1)
    flags.DEFINE_integer("warmup", 5, "Steps before the first turn, at least; they are not timed.", lower_bound=3)
    flags.DEFINE_boolean("donate", False, "Let steps with a codec reuse the memory of their arguments.")
    flags.DEFINE_integer("devices", 2, "Workers, if there is one process.", lower_bound=1)
    flags.DEFINE_boolean("torch", False, "Measure PyTorch too.")
    flags.DEFINE_string("torch_python", sys.executable, "The Python that has torch.")
    flags.DEFINE_string("interface", None, "The interface whose bytes are counted; by default the only one.")
    flags.DEFINE_float("mbit", None, "Mbit/s of each host's link; in the lab, by default its rate.", lower_bound=0.0)
    flags.DEFINE_string("out", None, "A file for the records.")
    flags.DEFINE_list("runs", [], "Files of records to show, instead of measuring; patterns may stand for several.")
    flags.DEFINE_string("figure", None, "A PNG for the figure of the records.")
    cluster.declare_key_flags()


def cases(names: list[str], task: Task, mesh: Mesh) -> dict[str, turns.Case]:
    """A case for each method, by its name with its settings, after one for local steps."""
    inner = optax.sgd(FLAGS.lr, momentum=MOMENTUM)
    course = codecs.Course(steps_per_epoch=1_000_000, learning_rate=None)
    trained = lambda tx, steps: turns.trained(task.loss_fn, tx, task.weights, mesh, steps, FLAGS.donate)  # noqa: E731
    found = {step_times.LOCAL: turns.alone(task.loss_fn, inner, task.weights, mesh, FLAGS.steps)}
    for name in sorted(names, key=lambda name: name == "none"):  # last: what follows its long messages is slower
        if name in OUTER:
            found[f"{name} every={FLAGS.every}"] = trained(OUTER[name](inner, every=FLAGS.every), FLAGS.every)
            continue
        tx = optax.chain(codecs.from_flags(name, 0, course), inner)
        found[codecs.label(name)] = trained(tx, FLAGS.dense_steps if name == "none" else FLAGS.steps)
    return found


def measured(names: list[str], task: Task, mesh: Mesh, torch: torch_side.Process | None) -> list[Record]:
    """The records of all cases, ours and PyTorch's.

    Args:
      names: the methods.
      task: what is trained.
      mesh: the workers.
      torch: PyTorch's process, or None.
    """
    meet, batch, counter = timing.beginning(mesh), batch_of(task, mesh), host.counter_of(interface())
    ours = cases(names, task, mesh)
    theirs = {way: FLAGS.dense_steps if way == "ddp" else FLAGS.steps for way in torch_side.WAYS} if torch else {}
    found = {("jax", name): step_times.case("jax", name) for name in ours}
    found |= {("torch", name): step_times.case("torch", name) for name in theirs}
    for number in range(FLAGS.rounds + 1):
        least = 1 if number else FLAGS.warmup  # the first turn compiles, and is not kept
        for name, case in ours.items():
            steps = max(case.steps, least)
            before = counter()
            ours[name], seconds, sent = turns.turn(case, batch, meet, steps)
            counted = next((y - x for x, y in zip(before, counter(), strict=True)), 0) / steps
            step_times.add(found["jax", name], seconds, counted, sent)
        for name, steps in theirs.items():
            assert torch
            told = torch.timed(name, max(steps, least))
            step_times.add(found["torch", name], told["seconds"], told["counted"], None)
    return [step_times.without_first(record) for record in found.values()]


def interface() -> str | None:
    """The interface whose bytes are counted; None in one process, which sends none."""
    return FLAGS.interface or host.only_interface() if jax.process_count() > 1 else None


def batch_of(task: Task, mesh: Mesh) -> Any:
    """The batch of all workers, of which each process makes the rows of its own."""
    first = jax.process_index() * len(mesh.local_devices)
    mine = [task.rows(first + i, FLAGS.batch) for i in range(len(mesh.local_devices))]
    return gcj.shard_batch(jax.tree.map(lambda *rows: np.concatenate(rows), *mine), mesh)


@contextlib.contextmanager
def torch_process(task: Task, width: int) -> Iterator[torch_side.Process | None]:
    """PyTorch's process on this host, or None without --torch.

    Ends the program if it is not the same model: of another size, or of another loss.
    """
    if not FLAGS.torch:
        yield None
        return
    rows, params = task.rows(jax.process_index(), FLAGS.batch), jax.jit(task.weights)()
    loss = float(jax.jit(task.loss_fn)(params, rows))
    address, _, port = (FLAGS.coordinator_address or "localhost:29500").rpartition(":")
    settings = {
        "model": FLAGS.model,
        "width": width,
        "address": f"{address}:{int(port) + 1}",
        "processes": jax.process_count(),
        "process": jax.process_index(),
        "rank": FLAGS.powersgd_rank,
        "lr": FLAGS.lr,
        "momentum": MOMENTUM,
        "interface": interface() or "",
    }
    with torch_side.started(FLAGS.torch_python, params, rows, settings) as process:
        told, size = process.told, sum(x.size for x in jax.tree.leaves(params))
        if told["parameters"] != size or not np.isclose(told["loss"], loss, rtol=1e-3):
            sys.exit(
                f"error: PyTorch's model has {told['parameters']} parameters and the loss {told['loss']}, not "
                f"{size} and {loss}"
            )
        yield process


def main() -> None:
    """Measures, or reads records; prints the tables, and draws the figure."""
    logging.set_verbosity(logging.ERROR)
    try:
        runs = step_times.read(FLAGS.runs) if FLAGS.runs else run()
    except (ValueError, step_times.RecordsError, torch_side.TorchError) as error:
        sys.exit(f"error: {error}")
    if not FLAGS.runs and jax.process_index():
        return
    screen = display.console()
    for one in runs:
        screen.print(step_times.table(one))
        for note in step_times.notes(one):
            screen.print(note, soft_wrap=True)
    if FLAGS.figure:
        step_times.figure(runs, pathlib.Path(FLAGS.figure))
        screen.print(f"Figure: {FLAGS.figure}", soft_wrap=True)


def run() -> list[step_times.Run]:
    """Measures, and writes the records."""
    if FLAGS.torch and FLAGS.cluster:
        raise ValueError("--torch needs --coordinator_address, not --cluster: its processes meet at the next port")
    if cluster.join() == 1:
        if FLAGS.torch and FLAGS.devices > 1:
            raise ValueError(f"--torch with one process needs --devices=1, not {FLAGS.devices}: it has one a process")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    if FLAGS.out:
        command.directory("out", str(pathlib.Path(FLAGS.out).parent))  # an error now, not after the measurement
    width = FLAGS.width or MODELS[FLAGS.model].width
    task, mesh = task_of(FLAGS.model, width), gcj.make_mesh()
    with torch_process(task, width) as torch:
        told = torch.told if torch else {}
        found = step_times.Run(header(mesh, task, width, told), measured(FLAGS.method, task, mesh, torch))
    if FLAGS.out and not jax.process_index():
        step_times.write(found, pathlib.Path(FLAGS.out))
    return [found]


def header(mesh: Mesh, task: Task, width: int, torch: dict[str, Any]) -> Record:
    """The first line of the records."""
    params = jax.eval_shape(task.weights)
    return {
        "kind": "end_to_end",
        "model": FLAGS.model,
        "width": width,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "batch": FLAGS.batch,
        "workers": mesh.size,
        "hosts": jax.process_count(),
        "mbit": FLAGS.mbit or lab.mbit_here(),
        **host.hardware(),
        "rounds": FLAGS.rounds,
        "donate": FLAGS.donate,
        "jax": jax.__version__,
        "torch": torch.get("torch"),
        "torch_threads": torch.get("threads"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "experiments.end_to_end", *sys.argv[1:]]),
        "environment": host.settings(),
    }


if __name__ == "__main__":
    define_flags()
    codecs.show_settings(sys.argv)
    command.run(main)
