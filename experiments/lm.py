"""A language model of characters, trained with one method of exchange after another.

    python -m experiments.lm --flagfile=experiments/presets/lm.flags
    python -m experiments.lm --method=dense,sparseloco --every=15,30 --tokens=200000
    python -m experiments.lm --runs=out/lm

dense and codecs exchange gradients in each step, and AdamW follows. diloco, streaming_diloco, sparseloco and muloco are
the library's methods with outer steps: each worker trains on its own by AdamW, or Muon, and every --every steps the
workers exchange how far they have moved. averaging takes the plain mean of that, uncompressed. All methods start from
the same parameters, and see the same batches of the same text. One device simulates the workers; started on several
hosts (see docs/processes.md), the workers are the devices of all. With --checkpoint_dir
a stopped run goes on where it was when the same command is given again. With --runs nothing is trained: the table and
the figure are of records that are there already.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx
from jax.sharding import Mesh

import gradcomp_jax as gcj
from experiments import (
    checkpoints,
    cluster,
    codecs,
    command,
    data,
    display,
    figures,
    link,
    loop,
    optimizers,
    records,
    text,
    together,
)
from experiments.models.transformer import Transformer

FLAGS = flags.FLAGS


class Outer(NamedTuple):
    """A method with outer steps.

    Attributes:
      inner: the optimiser of local steps, "adamw" or "muon".
      make: (inner optimiser, every) -> the whole optimiser.
      settings: the flags of its own settings.
    """

    inner: str
    make: Callable[[optax.GradientTransformation, int], optax.GradientTransformation]
    settings: tuple[str, ...] = ()


OUTER = {
    "diloco": Outer("adamw", lambda inner, every: gcj.diloco(inner, every=every)),
    "streaming_diloco": Outer(
        "adamw",
        lambda inner, every: gcj.streaming_diloco(
            inner, every=every, fragments=FLAGS.streaming_fragments, delay=FLAGS.streaming_delay
        ),
        ("streaming_fragments", "streaming_delay"),
    ),
    "sparseloco": Outer(
        "adamw", lambda inner, every: gcj.sparseloco(inner, every=every, codec=chunks()), ("sparseloco_k",)
    ),
    "averaging": Outer("adamw", lambda inner, every: gcj.outer(inner, every=every, codec=gcj.none())),
    "muloco": Outer("muon", lambda inner, every: gcj.muloco(inner, every=every)),
}
BASELINE = "dense"
METHODS = (BASELINE, *OUTER, *(name for name in codecs.CODECS if name != "none"))
# The defaults of flags that other experiments share.
DEFAULTS = {"workers": 8, "every": ["15"], "eval_every": 40, "log_every": 10, "checkpoint_every": 120}

flags.DEFINE_list(
    "method",
    [BASELINE, "sparseloco"],
    f"Methods to train with, one after another: {', '.join(METHODS)}. --method=NAME --help shows a codec's settings.",
)
flags.register_validator(
    "method",
    lambda names: names and all(name in METHODS for name in names),
    message=f"must be some of {', '.join(METHODS)}, with commas between them",
)
flags.DEFINE_string("text", None, "The path of a text of your own, in place of Tiny Shakespeare.")
flags.DEFINE_integer("tokens", 983_040, "Characters to train on, over all workers.", lower_bound=1)
flags.DEFINE_integer("context", 128, "Characters of a sequence.", lower_bound=1)
flags.DEFINE_integer("sequences", 2, "Sequences of a worker in a step.", lower_bound=1)
flags.DEFINE_integer("validation_tokens", 32_768, "Characters of the held-out tenth to evaluate on.", lower_bound=1)
flags.DEFINE_integer("width", 256, "Of the transformer; a multiple of --heads.", lower_bound=1)
flags.DEFINE_integer("blocks", 4, "Layers of the transformer.", lower_bound=1)
flags.DEFINE_integer("heads", 4, "Heads of each attention.", lower_bound=1)
flags.DEFINE_float("adamw_lr", 2e-3, "AdamW's largest learning rate, of per-step methods and of local steps.", 0)
flags.DEFINE_float("muon_lr", 0.02, "Muon's largest learning rate, for the kernels; it trains the rest by AdamW.", 0)
flags.DEFINE_float("adamw_b2", 0.95, "Decay of AdamW's second moments.", 0, 1)
flags.DEFINE_float("adamw_decay", 0.1, "Weight decay of matrices, for AdamW and Muon.", lower_bound=0)
flags.DEFINE_float("warmup", 0.1, "The share of the steps in which the learning rate rises; a cosine follows.", 0, 1)
flags.DEFINE_integer("streaming_fragments", 4, "Fragments of streaming_diloco.", lower_bound=1)
flags.DEFINE_integer("streaming_delay", 1, "Steps from a fragment's exchange to its adoption.", lower_bound=0)
flags.DEFINE_integer("sparseloco_k", 64, "Values that sparseloco sends of each chunk of 4096.", 1, 4096)
flags.DEFINE_string("runs", None, "A directory of records to show, instead of training.")
link.define_flags()

# The flags that --help shows beside this module's own.
for name in ("workers", "every", "seed", "data_dir", "out_dir", "checkpoint_dir"):
    flags.declare_key_flag(name)
cluster.declare_key_flags()
# The settings that a run must share with the checkpoint from which it goes on.
SETTINGS = ("tokens", "warmup", "adamw_lr", "adamw_b2", "adamw_decay", "seed", "eval_every", "log_every")


def main() -> None:
    """Trains with every method of --method, or reads --runs; then prints the table and writes the figure."""
    refusals = (ValueError, data.DataError, checkpoints.CheckpointError, records.RecordsError)
    try:
        runs = link.read(FLAGS.runs) if FLAGS.runs else trained()
    except (*refusals, together.OtherProcessError) as error:
        sys.exit(f"error: {error}")
    except loop.InterruptedRunError as interrupt:
        display.console().print(str(interrupt), soft_wrap=True)
        together.part()
        sys.exit(130)
    if together.is_first():
        show(runs, display.console())


def show(runs: list[records.Run], screen: display.Console) -> None:
    """Prints the table, and writes the figure."""
    header = runs[0].header
    title = f"Transformer of {header['parameters'] / 1e6:.1f} million parameters, {header['workers']} workers"
    rows = link.rows(runs)
    screen.print(link.table(rows, title))
    for note in link.notes(rows):
        screen.print(note, soft_wrap=True)
    figure = command.directory("out_dir", FLAGS.out_dir) / f"{header['task']}.png"
    figures.losses(rows, title, figure)
    screen.print(f"Figure: {figure}", soft_wrap=True)


def trained() -> list[records.Run]:
    """The records of the runs that the flags ask for."""
    mesh = cluster.mesh()
    with together.all_or_none():
        task = language_model(text.load(FLAGS.text, FLAGS.data_dir), mesh)
        everies = sorted(map(int, FLAGS.every))
        plans = [plan for name in FLAGS.method for plan in plans_of(name, everies, mesh)]
        for plan in plans:
            # A refusal comes now, not after the methods before it have trained.
            jax.eval_shape(plan.tx.init, task.params)
        if together.is_first():
            command.directory("out_dir", FLAGS.out_dir)
    return [loop.train(plan, task, display.console()) for plan in plans]


def language_model(source: text.Text, mesh: Mesh | None = None) -> loop.Task:
    """The task of predicting the next character with the transformer of the flags.

    Args:
      source: the text.
      mesh: the mesh of the workers; None if one device simulates --workers of them.
    """
    if FLAGS.width % (2 * FLAGS.heads):
        raise ValueError(f"--width={FLAGS.width} is no even multiple of --heads={FLAGS.heads}")
    size, context = number_of(mesh) * FLAGS.sequences, FLAGS.context
    per_epoch = text.steps_per_epoch(source.train, size, context)
    if FLAGS.tokens < size * context:
        raise ValueError(f"--tokens={FLAGS.tokens} is less than a step, which has {size * context} over all workers")
    held_out = text.pieces(source.validation, max(1, FLAGS.validation_tokens // context), context)
    network = Transformer(source.symbols, FLAGS.width, FLAGS.blocks, FLAGS.heads, nnx.Rngs(FLAGS.seed))
    graphdef, params = nnx.split(network, nnx.Param)

    def judged(params: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(rows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return losses.mean(), (logits.argmax(-1) == rows[:, 1:]).mean()

    def loss_fn(params: Any, model_state: Any, batch: jax.Array) -> Any:
        loss, accuracy = judged(params, batch)
        return loss, (model_state, accuracy)

    @jax.jit
    def evaluated(params: Any) -> tuple[jax.Array, jax.Array]:
        means = jax.lax.map(lambda row: judged(params, row[None]), held_out, batch_size=size)
        return jax.tree.map(jnp.mean, means)

    def evaluate(params: Any, model_state: Any) -> dict[str, float]:
        loss, accuracy = evaluated(params)
        return {"loss": float(loss), "accuracy": float(accuracy)}

    def batches(done: int) -> Iterator[jax.Array]:
        rows = text.batches(source.train, size, context, FLAGS.seed, done)
        return map(jnp.asarray, rows) if mesh is None else (loop.split(batch, mesh) for batch in rows)

    shape = {key: FLAGS[key].value for key in ("context", "width", "blocks", "heads", "validation_tokens")}
    settings = {"text": source.name, "text_sha256": source.sha256, **shape}
    name = f"{source.name}-transformer"
    return loop.Task(name, settings, params, (), loss_fn, batches, per_epoch * size * context, evaluate, "tokens")


def number_of(mesh: Mesh | None) -> int:
    """The number of workers on a mesh, or of those that are simulated."""
    return FLAGS.workers if mesh is None else mesh.size


def plans_of(name: str, everies: list[int], mesh: Mesh | None = None) -> list[loop.Plan]:
    """The trainings with a method: one for each of the given periods, if it has outer steps.

    Args:
      name: the method, one of `METHODS`.
      everies: the periods.
      mesh: the mesh of the workers; None if one device simulates --workers of them.
    """
    workers = number_of(mesh)
    batch_size = workers * FLAGS.sequences * FLAGS.context
    steps = FLAGS.tokens // batch_size
    schedule = cosine(FLAGS.adamw_lr, steps)
    shared = {key: FLAGS[key].value for key in SETTINGS} | {"batch": workers * FLAGS.sequences}

    def plan(label: str, own: dict[str, Any], tx: optax.GradientTransformation) -> loop.Plan:
        for rate in ("adamw_lr", "muon_lr") if f"{name}_muon_lr" in own else ("adamw_lr",):
            label += f" {rate}={FLAGS[rate].value:g}" * (FLAGS[rate].value != FLAGS[rate].default)
        return loop.Plan(name, label, shared | own, tx, schedule, steps, batch_size, mesh or workers)

    if name not in OUTER:
        codec = "none" if name == BASELINE else name
        made = codecs.from_flags(codec, FLAGS.seed, codecs.Course(steps, None))
        label = codecs.label(codec).replace("none", BASELINE)
        return [plan(label, codecs.settings(codec) | {"codec": name}, optax.chain(made, adamw(schedule)))]
    method, found = OUTER[name], []
    inner = adamw(schedule) if method.inner == "adamw" else muon(cosine(FLAGS.muon_lr, steps), schedule)
    own = {key.partition("_")[2]: FLAGS[key] for key in method.settings}
    changed = [f"{key}={flag.value}" for key, flag in own.items() if flag.value != flag.default]
    own_settings = {f"{name}_{key}": flag.value for key, flag in own.items()}
    if method.inner == "muon":
        own_settings |= {f"{name}_muon_lr": FLAGS.muon_lr}
    for every in everies:
        label = " ".join([name, f"every={every}", *changed])
        found.append(plan(label, {"codec": name, f"{name}_every": every, **own_settings}, method.make(inner, every)))
    return found


def chunks() -> gcj.Compressor:
    """SparseLoCo's codec, with --sparseloco_k."""
    return gcj.topk(chunk=4096, k=FLAGS.sparseloco_k, bits=2, aggregate="gather")


def cosine(lr: float, steps: int) -> optax.Schedule:
    """The learning rate by steps done: up from 0 to lr in --warmup, then half a cosine to 0."""
    return optimizers.schedule("cosine", lr, 1.0, steps, 1, FLAGS.warmup, [])


def adamw(schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, as the flags say."""
    return optax.adamw(schedule, b2=FLAGS.adamw_b2, weight_decay=FLAGS.adamw_decay, mask=optimizers.decayed)


def muon(schedule: optax.Schedule, rest: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks; AdamW, with its own learning rate, for all else."""

    def kernels(params: Any) -> Any:
        kernel = optax.contrib.MuonDimensionNumbers()
        of_block = lambda path, x: kernel if "kernel" in jax.tree_util.keystr(path) else None  # noqa: E731
        return jax.tree_util.tree_map_with_path(of_block, params)

    return optax.contrib.muon(
        schedule,
        weight_decay=FLAGS.adamw_decay,
        adam_b2=FLAGS.adamw_b2,
        adam_weight_decay=FLAGS.adamw_decay,
        adam_learning_rate=rest,
        muon_weight_dimension_numbers=kernels,
    )


def set_defaults() -> None:
    """Sets this experiment's defaults of the flags that it shares with others."""
    for name, value in DEFAULTS.items():
        FLAGS.set_default(name, value)


if __name__ == "__main__":
    set_defaults()
    command.run(main, argv=loop.command_line(sys.argv))
