"""The compiled step of a codec: its memory, its messages, and the time to compile it.

    python -m experiments.programs
    python -m experiments.programs --sections=memory,messages --codecs=none,powersgd,qsgd --markdown
    python -m experiments.programs --sections=compile --layers=25

Programs are compiled and never run, so memory and messages do not depend on the machine's other work. XLA compiles for
its CPU backend, even on a machine with accelerators, and emulates the devices. There are three sections.

`memory` is about one exchange of ResNet-18's gradient (11,173,962 elements, 62 leaves) on meshes of one and of four
devices. An exchange is the codec alone, without a loss or an optimizer. Its state is donated, the gradient is not.

- Temporary: the memory that a device allocates beside arguments and results, as a multiple of the gradient's size.
- Passes: the bytes that XLA expects a device to read and write, as a multiple of an in-place pass over the gradient
  (8 bytes an element). XLA counts the most expensive branch of a conditional. For a measured codec that is the branch
  for magnitudes whose squares leave float32's range.

`messages` is about the collectives of a program on four devices. The programs are that exchange, and two whole
`train_step`s with Adam, a loss, an auxiliary output and a model state. One is of ResNet-18, whose model state is its
batch statistics. The other is of a transformer, which has no statistics.

- Where: collectives in conditionals are listed branch by branch. A branch that is not listed sends nothing. The first
  conditional of GradiVeQ chooses the phase: the branch that sends less is the compressed one.
- Operands: "2 x 1 + 62" means two collectives of one operand each and one of 62. On CPUs an all-to-all has an operand
  for each worker. A collective in a loop counts once, but its operands and bytes count once for each trip.
- MB: 10^6 bytes that one worker sends, by the ring laws of `gradcomp_jax.collective_bytes`.

`compile` is about the transformer's `train_step` with Adam on four devices. It tells the CPU seconds, over all threads,
to trace and to compile it. The first row is a step without this library, with `pmean` and Adam. Each step has a process
of its own and no compilation cache, so their order does not matter.

The transformer has the leaves of GPT-2: 12 in each of `--layers` layers, and 4 more. Compile time depends on the
number of leaves much more than on their sizes, so `--width` is small by default. QSGD compresses all of them here
(`min_size=0`), and GradiVeQ matrices too (its default is convolutions only).
"""

import collections
import concurrent.futures
import functools
import itertools
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import Progress
from rich.table import Table

from experiments import command, display
from experiments.models import create, resnet18_shapes
from gradcomp_jax import (
    Compressor,
    accordion,
    adaptive,
    collective_bytes,
    global_state,
    gradiveq,
    init,
    local_state,
    make_mesh,
    measured,
    none,
    onebit,
    powersgd,
    qsgd,
    randomk,
    signnorm,
    state_specs,
    topk,
    train_step,
    vary,
)

FLAGS = flags.FLAGS

WORKERS = 4
CODECS: dict[str, Callable[[], Compressor]] = {
    "none": none,
    "powersgd": lambda: powersgd(rank=4),
    "gradiveq": lambda: gradiveq(ratio=8, compress=lambda path, leaf: leaf.ndim >= 2),
    "qsgd": lambda: qsgd(bits=4, min_size=0),
    "qsgd-feedback": lambda: qsgd(bits=4, min_size=0, error_feedback=True),
    "qsgd-elias": lambda: qsgd(bits=4, min_size=0, norm="l2", code="elias"),
    "signnorm": signnorm,
    "onebit": onebit,
    "randomk": randomk,
    "topk": topk,
    "adaptive": adaptive,
    "accordion-powersgd": lambda: accordion(powersgd(rank=4), powersgd(rank=1), interval=10),
    "accordion-topk": lambda: accordion(topk(fraction=0.1), topk(fraction=0.01), interval=10),
    "powersgd-measured": lambda: measured(powersgd(rank=4)),
    "qsgd-measured": lambda: measured(qsgd(bits=4, min_size=0)),
}
PLAIN = "pmean and Adam"
# LLVM's passes take most of the time. They come after buffers and collectives are settled.
WITHOUT_LLVM_PASSES: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}
Report = Callable[[str, int], None]
"""(the name of the next program, the number of all programs) -> None."""
_ARRAY = re.compile(r"\b[a-z]\w*\[[\d,]*\]")


class Program(NamedTuple):
    """A jitted function, and the shapes of its arguments with their shardings."""

    function: Any
    arguments: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """Traces the program."""
        return self.function.lower(*self.arguments)


class Message(NamedTuple):
    """One collective of a compiled program.

    Attributes:
      branch: the branches of conditionals around it, like in `gradcomp_jax.Collective`.
      operands: the number of operands; in a loop, over all its trips.
      bytes: the bytes that one worker sends for it, by the ring laws.
    """

    branch: str
    operands: int
    bytes: float


class Figures(NamedTuple):
    """Figures that are read from a compiled program.

    Attributes:
      temporary: the bytes that a device allocates beside arguments and results.
      accessed: the bytes that a device reads and writes, as XLA estimates.
      messages: the messages, in the order of the program.
    """

    temporary: int
    accessed: float
    messages: list[Message]


class Seconds(NamedTuple):
    """CPU seconds, over all threads, to trace a step and to compile it."""

    trace: float
    compile: float


class Sheet(NamedTuple):
    """A table to print: the first `left` columns are text, the others numbers."""

    title: str
    heading: Sequence[str]
    left: int
    rows: list[list[str]]


def resnet18() -> tuple[Any, Any]:
    """ResNet-18's parameters and batch statistics, as shapes with types."""
    statistics = jax.eval_shape(lambda: create("resnet18", (32, 32, 3), 10, 0)[2])
    shapes = {tuple(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(statistics)}
    return arrays(resnet18_shapes()), arrays(traverse_util.unflatten_dict(shapes))


def transformer(layers: int, width: int) -> tuple[Any, Any]:
    """A tree like GPT-2's, with 12 leaves in each layer and 4 more; and a model state without leaves."""

    def linear(inputs: int, outputs: int) -> dict[str, Any]:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    norm = {"scale": (width,), "bias": (width,)}
    block = {
        "norm1": norm,
        "attention": linear(width, 3 * width),
        "projection": linear(width, width),
        "norm2": norm,
        "up": linear(width, 4 * width),
        "down": linear(4 * width, width),
    }
    embeddings = {"tokens": (4096, width), "positions": (1024, width)}
    return arrays({**embeddings, "norm": norm, **{f"block{i}": block for i in range(layers)}}), {}


def arrays(shapes: Any) -> Any:
    """Float32 arrays of these shapes, without values."""
    make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def laid(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """`tree` with shardings: one `PartitionSpec` for all of it, or a tree of them."""
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, tree)

    def leaf(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, tree, specs)


def state_of(tx: Any, params: Any, mesh: Mesh) -> Any:
    """The optimizer's state in its global form, without values."""
    state = jax.eval_shape(lambda params: init(tx, params, mesh.size), params)
    return laid(state, mesh, state_specs(tx, params))


def exchange(codec: Compressor, params: Any, workers: int) -> Program:
    """The codec alone: (gradients, state) -> (state, updates); the state is donated."""
    mesh, specs = make_mesh(workers), state_specs(codec, params)

    def worker(grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = codec.update(jax.tree.map(lambda x: x[0], grads), local_state(state))
        # The state first: XLA gives a donated buffer to the first result of its size.
        return global_state(state), updates

    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct((workers, *x.shape), x.dtype), params)
    update = jax.shard_map(worker, mesh=mesh, in_specs=(P("data"), specs), out_specs=(specs, P()))
    step = jax.jit(update, donate_argnums=1)
    return Program(step, (laid(grads, mesh, P("data")), state_of(codec, params, mesh)))


def loss(params: Any, batch: jax.Array) -> jax.Array:
    """A loss that adds little to compile; its gradients nevertheless differ between workers."""
    return sum(jnp.sum(x * x) for x in jax.tree.leaves(params)) * jnp.mean(batch)


def codec_step(codec: Compressor, params: Any, statistics: Any = None) -> Program:
    """`train_step` with Adam; with statistics it also has a model state and an auxiliary output."""
    mesh, tx = make_mesh(WORKERS), optax.chain(codec, optax.adam(1e-3))

    def loss_with_more(params: Any, statistics: Any, batch: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
        mean = jnp.mean(batch)
        running = jax.tree.map(lambda x: 0.9 * x + 0.1 * mean, statistics)
        return loss(params, batch), (running, {"accuracy": mean})

    arguments = laid(params, mesh, P()), state_of(tx, params, mesh)
    batch = laid(arrays((WORKERS,)), mesh, P("data"))
    if statistics is None:
        return Program(train_step(loss, tx, mesh), (*arguments, batch))
    step = train_step(loss_with_more, tx, mesh, has_state=True, has_aux=True)
    return Program(step, (*arguments, laid(statistics, mesh, P()), batch))


def plain_step(params: Any) -> Program:
    """The same training without this library."""
    mesh, tx = make_mesh(WORKERS), optax.adam(1e-3)

    def worker(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(vary(params, "data"), batch)
        value, grads = jax.lax.pmean((value, grads), "data")
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))
    opt_state = jax.eval_shape(tx.init, params)
    batch = laid(arrays((WORKERS,)), mesh, P("data"))
    return Program(step, (laid(params, mesh, P()), laid(opt_state, mesh, P()), batch))


def figures(program: Program) -> Figures:
    """Compiles a program, and reads its memory and its messages."""
    compiled = program.lower().compile(compiler_options=WITHOUT_LLVM_PASSES)
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return Figures(memory.temp_size_in_bytes, costs["bytes accessed"], messages(compiled.as_text() or ""))


def messages(text: str) -> list[Message]:
    """The collectives of a compiled HLO module."""
    sent = collective_bytes(text)
    # If every array is one byte, the bytes of a collective count its operands.
    counted = collective_bytes(_ARRAY.sub("u8[1]", text))
    return [Message(x.branch, n.operand_bytes, x.ring_bytes) for x, n in zip(sent, counted, strict=True)]


def step_figures(params: Any, statistics: Any, name: str) -> Figures:
    """The figures of a whole step."""
    return figures(codec_step(CODECS[name](), params, statistics))


@functools.cache
def exchange_figures(name: str, workers: int) -> Figures:
    """The figures of one exchange of ResNet-18's gradient; two sections need them."""
    return figures(exchange(CODECS[name](), resnet18()[0], workers))


def compile_seconds(name: str, layers: int, width: int) -> Seconds:
    """The seconds to trace and compile the transformer's step in this process, which should be a new one."""
    emulate()
    jax.config.update("jax_enable_compilation_cache", False)
    params, _ = transformer(layers, width)
    program = plain_step(params) if name == PLAIN else codec_step(CODECS[name](), params)
    jax.jit(jnp.negative).lower(0.0).compile()  # work that a process does once does not count
    began = time.process_time()
    lowered = program.lower()
    traced = time.process_time()
    lowered.compile()
    return Seconds(traced - began, time.process_time() - traced)


def emulate() -> None:
    """Makes the CPU of this process stand for several devices; call it before jax is first used."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", WORKERS)


def memory_sheets(names: Sequence[str], report: Report) -> list[Sheet]:
    """The section `memory`."""
    elements = sum(math.prod(x.shape) for x in jax.tree.leaves(resnet18()[0]))
    rows = []
    for name in names:
        report(name, len(names))
        found = [exchange_figures(name, workers=workers) for workers in (1, WORKERS)]
        temporary = [f"{x.temporary / (4 * elements):.2f}" for x in found]
        rows.append([name, *temporary, *(f"{x.accessed / (8 * elements):.2f}" for x in found)])
    devices = ("1 device", f"{WORKERS} devices")
    heading = ["codec", *(f"temporary, {n}" for n in devices), *(f"passes, {n}" for n in devices)]
    title = "Memory of one exchange of ResNet-18's gradient, on each device; temporary in gradients"
    return [Sheet(title, heading, 1, rows)]


def message_sheets(names: Sequence[str], layers: int, width: int, report: Report) -> list[Sheet]:
    """The section `messages`: a table for each program."""
    trees = {
        "train_step of ResNet-18, with batch statistics": resnet18(),
        transformer_title(layers, width): transformer(layers, width),
    }
    programs: dict[str, Callable[[str], Figures]] = {
        "One exchange of ResNet-18's gradient": functools.partial(exchange_figures, workers=WORKERS),
        **{title: functools.partial(step_figures, *tree) for title, tree in trees.items()},
    }
    heading = ("codec", "where", "collectives", "operands", "MB sent")
    sheets = [Sheet(f"{title}: messages of one of {WORKERS} workers", heading, 2, []) for title in programs]
    for name in names:
        for sheet, (title, program) in zip(sheets, programs.items(), strict=True):
            report(f"{name}: {title}", len(names) * len(programs))
            sheet.rows.extend(message_rows(name, program(name).messages))
    return sheets


def compile_sheets(names: Sequence[str], layers: int, width: int, report: Report) -> list[Sheet]:
    """The section `compile`; each step has a process of its own, one after another."""
    times = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name in (PLAIN, *names):
            report(name, len(names) + 1)
            times[name] = pool.submit(compile_seconds, name, layers, width).result()
    plain = sum(times[PLAIN])
    rows = [
        [name, f"{x.trace:.1f}", f"{x.compile:.1f}", f"{sum(x):.1f}", f"{sum(x) / plain:.1f}"]
        for name, x in times.items()
    ]
    title = f"{transformer_title(layers, width)}: CPU seconds to compile it for {WORKERS} devices"
    return [Sheet(title, ("step", "trace", "compile", "both", "times plain"), 1, rows)]


def transformer_title(layers: int, width: int) -> str:
    """The tables' name for the transformer's step."""
    return f"train_step of a transformer of {len(jax.tree.leaves(transformer(layers, width)[0]))} leaves"


def message_rows(name: str, found: Sequence[Message]) -> list[list[str]]:
    """A row for the messages that are always sent, and one for each run of branches that differ at most in bytes."""
    places: dict[str, list[Message]] = {"": []}
    for message in found:
        places.setdefault(message.branch, []).append(message)
    if not places[""] and len(places) > 1:
        del places[""]
    names = [conditional for branch in places for conditional in branch.split("/")[::2] if conditional]
    numbers = {conditional: f"conditional {i}" for i, conditional in enumerate(dict.fromkeys(names), 1)}

    def alike(numbered: tuple[int, str]) -> tuple[str, int, list[int]]:
        # Neighbours stay in one run, because both numbers rise by one.
        conditional, _, k = numbered[1].rpartition("/")
        return conditional, int(k or 0) - numbered[0], sorted(message.operands for message in places[numbered[1]])

    rows = []
    for (_, _, operands), group in itertools.groupby(enumerate(places), alike):
        run = [branch for _, branch in group]
        sent = [f"{sum(message.bytes for message in places[branch]) / 1e6:.2f}" for branch in (run[0], run[-1])]
        where = place(run[0], run[-1], numbers)
        rows.append([name, where, str(len(operands)), sizes(operands), " to ".join(dict.fromkeys(sent))])
    return rows


def place(first: str, last: str, numbers: dict[str, str]) -> str:
    """Branches in words: "conditional 1, branch 1; conditional 2, branches 0 to 9" for such as "cond.3/1/cond.5/0"."""
    if not first:
        return "always"
    conditionals, branches = first.split("/")[::2], first.split("/")[1::2]
    parts = [f"{numbers[name]}, branch {k}" for name, k in zip(conditionals, branches, strict=True)]
    if last != first:
        parts[-1] = f"{numbers[conditionals[-1]]}, branches {branches[-1]} to {last.rpartition('/')[2]}"
    return "; ".join(parts)


def sizes(operands: Sequence[int]) -> str:
    """Operands in words: "2 x 1 + 62" for two collectives of one operand each and one of 62."""
    counts = sorted(collections.Counter(operands).items())
    return " + ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in counts)


def show(screen: display.Console, sheet: Sheet, markdown: bool) -> None:
    """Prints a table."""
    if markdown:
        marks = ["---"] * sheet.left + ["---:"] * (len(sheet.heading) - sheet.left)
        lines = [f"| {' | '.join(line)} |" for line in (sheet.heading, marks, *sheet.rows)]
        print(f"{sheet.title}:\n", *lines, "", sep="\n", flush=True)
        return
    table = Table(title=sheet.title)
    for i, name in enumerate(sheet.heading):
        table.add_column(name, justify="left" if i < sheet.left else "right")
    for row in sheet.rows:
        table.add_row(*row)
    screen.print(table)


SECTIONS: dict[str, Callable[[Sequence[str], int, int, Report], list[Sheet]]] = {
    "memory": lambda names, layers, width, report: memory_sheets(names, report),
    "messages": message_sheets,
    "compile": compile_sheets,
}


def reporter(progress: Progress, section: str) -> Report:
    """A function that shows the progress of a section on a bar of its own."""
    bar, done = progress.add_task(section, total=None, status=""), itertools.count()
    return lambda status, total: progress.update(bar, total=total, completed=next(done), status=status)


def main() -> None:
    """Prints the tables, section after section."""
    logging.set_verbosity(logging.ERROR)  # jax reports missing accelerators, and the library reports a single worker
    emulate()
    screen = display.console()
    for section in FLAGS.sections:
        with display.progress(screen) as progress:
            sheets = SECTIONS[section](FLAGS.codecs, FLAGS.layers, FLAGS.width, reporter(progress, section))
        for sheet in sheets:
            show(screen, sheet, FLAGS.markdown)


def define_flags() -> None:
    """Defines the flags of the command."""
    for name, known, what in (
        ("codecs", list(CODECS), "Codecs to compile"),
        ("sections", list(SECTIONS), "What to tell of them"),
    ):
        listed = ", ".join(known)
        flags.DEFINE_list(name, known, f"{what}, of: {listed}.")
        flags.register_validator(name, lambda got, known=known: got and set(got) <= set(known), f"must be of {listed}")
    flags.DEFINE_integer("layers", 12, "Layers of the transformer, of 12 leaves each.", lower_bound=1)
    flags.DEFINE_integer("width", 64, "Width of the transformer; GPT-2's is 768.", lower_bound=1)
    flags.DEFINE_boolean("markdown", False, "Print the tables in Markdown.")


if __name__ == "__main__":
    # Not at import: a test of another experiment may define flags with these names.
    define_flags()
    command.run(main)
