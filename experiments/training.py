"""The training loop that all experiments share, and its flags.

The flags and the seed decide a run. All codecs start from the same parameters, and see the same batches at the same
learning rates. Nothing else differs. A run that was killed and started again ends like one that was not: each
checkpoint has its state, its place in the input, its randomness and its figures.
"""

import contextlib
import datetime
import math
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh

from experiments import checkpoints, codecs, display, optimizers, records
from experiments.interrupts import interruptible
from gradcomp_jax import (
    accordion_log,
    code_bits,
    delayed,
    init,
    make_mesh,
    measured,
    metrics,
    place,
    resize_workers,
    skipped,
    train_step,
    wire_bits,
)

FLAGS = flags.FLAGS

codecs.define_flags()
flags.DEFINE_boolean("delayed", False, "Exchange in each step the gradients of the one before, with every codec.")
flags.DEFINE_boolean("measured", True, "Record what codecs lose and owe; a step takes a little longer for it.")
flags.DEFINE_integer("workers", 4, "Workers among which each batch is split.", lower_bound=2)
flags.DEFINE_integer("epochs", 10, "Passes over the training split.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Examples a step, over all workers; a multiple of --workers.", lower_bound=1)
flags.DEFINE_enum(
    "optimizer",
    "sgd",
    optimizers.OPTIMIZERS,
    "What follows the codec; ef_momentum is PowerSGD's, adagrad 1-bit SGD's, adam's decay is adamw's.",
)
flags.DEFINE_float("lr", 0.1, "The learning rate before it is scaled.", lower_bound=0)
flags.DEFINE_float("lr_scale", 1.0, "By which the warm-up raises it; PowerSGD and Accordion take the workers.")
flags.DEFINE_enum(
    "schedule", "cosine", optimizers.SCHEDULES, "cosine: from 0 up and back to 0; step: from lr up, then down tenfold."
)
flags.DEFINE_float("warmup_epochs", 1.0, "Epochs in which the learning rate rises.", lower_bound=0)
flags.DEFINE_list(
    "decay_epochs", ["150", "250"], "Of --schedule=step: epochs at which the learning rate falls tenfold."
)
flags.register_validator(
    "decay_epochs",
    lambda epochs: all(re.fullmatch(r"\d+(\.\d+)?", epoch) for epoch in epochs),
    message="must be numbers with commas between them",
)
flags.DEFINE_float("momentum", 0.9, "Of all optimizers but adam.", lower_bound=0, upper_bound=1)
flags.DEFINE_float("weight_decay", 1e-4, "Of kernels, added to the aggregated gradient.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of the initial parameters, the batches and the codecs.", 0, 2**32 - 1)
flags.DEFINE_integer("eval_every", 100, "Steps from one evaluation on the test split to the next.", lower_bound=1)
flags.DEFINE_integer("log_every", 10, "Steps over which a line of the records is a mean.", lower_bound=1)
flags.DEFINE_string("out_dir", "out", "The directory of the records and the figure.")
flags.DEFINE_string(
    "checkpoint_dir", None, "Where to keep checkpoints; a run that finds its own there goes on from it."
)
flags.DEFINE_integer(
    "checkpoint_every", 500, "Steps from one checkpoint to the next; the last step has one too.", lower_bound=1
)
flags.DEFINE_string("tensorboard_dir", None, "Where to write the figures for TensorBoard too.")

# The flags that --help shows. A first run does not need the others; --helpfull shows them.
SHOWN = (
    "codec",
    "delayed",
    "workers",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "lr_scale",
    "schedule",
    "warmup_epochs",
    "decay_epochs",
    "momentum",
    "weight_decay",
    "seed",
    "out_dir",
    "checkpoint_dir",
)
# The figures of `gradcomp_jax.metrics` that are recorded.
LOST = ("error", "residual", "residual_norm")
NO_REORDERING = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# The settings that a run must share with the checkpoint from which it goes on, beside the experiment's own flags.
SETTINGS = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "lr_scale",
    "schedule",
    "warmup_epochs",
    "decay_epochs",
    "momentum",
    "weight_decay",
    "seed",
    "eval_every",
    "log_every",
    "measured",
)


class Task(NamedTuple):
    """A task to train, with all that the loop does not know itself.

    Attributes:
      name: the name for files and titles, such as "cifar10-resnet8".
      settings: the settings of the task, by name; JSON.
      params: the initial parameters.
      model_state: the initial batch statistics.
      loss_fn: (params, model_state, batch) -> (loss, (model_state, accuracy)), on one worker's part of a batch.
      batches: a function from the number of steps done to the batches after it, without end.
      examples: the number of examples in an epoch.
      evaluate: (params, model_state) -> {"loss": ..., "accuracy": ...} on the test split.
    """

    name: str
    settings: dict[str, Any]
    params: Any
    model_state: Any
    loss_fn: Callable[..., Any]
    batches: Callable[[int], Iterator[Any]]
    examples: int
    evaluate: Callable[[Any, Any], dict[str, float]]


class InterruptedRunError(Exception):
    """The user asked to stop, and the run has stopped; the message tells the step, and the way to go on."""


def codec(name: str, task: Task) -> optax.GradientTransformationExtraArgs:
    """The codec `name` with its flags.

    Raises:
      ValueError: the factory refuses a value.
    """
    steps_per_epoch = task.examples // FLAGS.batch_size
    # A cosine falls in every step, so accordion would compress in none.
    schedule = learning_rate(steps_per_epoch) if FLAGS.schedule == "step" else None
    made = codecs.from_flags(name, FLAGS.seed, codecs.Course(steps_per_epoch, schedule))
    if FLAGS.measured and name != "none":  # none loses nothing
        made = measured(made)
    return delayed(made) if FLAGS.delayed else made


def label(name: str) -> str:
    """The codec's name, with the settings that are not at their defaults."""
    return codecs.label(name) + " delayed" * FLAGS.delayed


def train(
    name: str,
    codec: optax.GradientTransformationExtraArgs,
    task: Task,
    mesh: Mesh,
    screen: display.Console,
) -> records.Run:
    """Trains with one codec, from the start or from the newest checkpoint.

    Args:
      name: the codec's name, a key of `codecs.CODECS`.
      codec: the codec.
      task: the task.
      mesh: the mesh of the workers.
      screen: the console to show progress on.

    Returns:
      The records, which are also in `--out_dir`.

    Raises:
      CheckpointError: `--checkpoint_dir` has checkpoints of this run, but none to go on from; or another process is
        at this run.
      InterruptedRunError: the user interrupted with Ctrl-C or SIGTERM.
      RecordsError: the records cannot be written.
    """
    run_name = f"{task.name}-{label(name).replace(' ', '_')}-seed{FLAGS.seed}"
    folder = pathlib.Path(FLAGS.checkpoint_dir) / run_name if FLAGS.checkpoint_dir else None
    board = pathlib.Path(FLAGS.tensorboard_dir) / run_name if FLAGS.tensorboard_dir else None
    steps_per_epoch = task.examples // FLAGS.batch_size
    steps = FLAGS.epochs * steps_per_epoch
    settings = {key: FLAGS[key].value for key in SETTINGS} | task.settings | codecs.settings(name)
    settings |= {f"{name}_delayed": FLAGS.delayed}  # in a comparison it is a setting of the codec, like the others

    schedule = learning_rate(steps_per_epoch)
    tx = optimizers.optimizer(FLAGS.optimizer, codec, schedule, FLAGS.momentum, FLAGS.weight_decay)
    step = train_step(task.loss_fn, tx, mesh, has_state=True, has_aux=True, donate=True)
    dense_bits = bits_of_pmean(task, mesh.size)

    own = checkpoints.owned(folder) if folder else contextlib.nullcontext()
    with own, interruptible() as interrupted, display.progress(screen) as progress:
        done, figures = 0, None
        # Copies, because a step consumes its arguments, and the next codec starts from the same parameters.
        params, model_state = jax.tree.map(jnp.copy, (task.params, task.model_state))
        opt_state = init(tx, params, mesh)
        if folder and (saved := restore(folder, settings, tx, task, screen)):
            done, figures = saved.step, saved.figures
            params, model_state = saved.arrays["params"], saved.arrays["model_state"]
            opt_state = carried_over(saved.arrays["opt_state"], saved.workers, mesh, screen)
        params, model_state = place((params, model_state), mesh)

        path = pathlib.Path(FLAGS.out_dir) / f"{run_name}.jsonl"
        recorder = records.Recorder(path, header(name, task, settings, steps, mesh), board, figures)
        if 0 < done < steps:
            recorder.write("resumed", workers=mesh.size)

        bar = progress.add_task(run_name, total=steps, completed=done, status="compiling")
        batches = task.batches(done)
        work, first, since = "compile", done, time.perf_counter()  # the first step of a process compiles
        stop = False
        while done < steps and not stop:
            with recorder.timed("input"):
                # The loop waits for the batch: on emulated devices a second program can take the threads that a step
                # waits for.
                batch = jax.block_until_ready(next(batches))
            began, lr = time.perf_counter(), float(schedule(done))
            with recorder.timed(work):
                params, opt_state, model_state, loss, accuracy = step(params, opt_state, model_state, batch)
                jax.block_until_ready(params)
            done, work, seconds = done + 1, "step", time.perf_counter() - began
            recorder.count(wire_bits(opt_state), dense_bits, float(loss), float(accuracy), 1e3 * seconds)

            status = f"loss {loss:.3f}, {FLAGS.batch_size / seconds:.0f} examples/s, {recorder.sent}"
            progress.update(bar, advance=1, status=status)
            if done % FLAGS.log_every == 0 or done == steps:
                recorder.train(lr=lr, skipped=int(skipped(opt_state)), **code_length(opt_state), **lost(opt_state))
                decisions = accordion_log(opt_state)
                if recorder.levels(decisions):
                    low = sum(": low" in decision for decision in decisions)
                    note = f"{run_name}: step {done}, {low} of {len(decisions)} leaves at low compression"
                    screen.print(note, soft_wrap=True)
            if done % FLAGS.eval_every == 0 or done == steps:
                with recorder.timed("evaluate"):
                    judged = task.evaluate(params, model_state)
                recorder.write("test", **judged)
                if leaves := lost_by_leaf(opt_state):
                    recorder.write("leaves", **leaves)
                left = (time.perf_counter() - since) / (done - first) * (steps - done)
                screen.print(
                    f"{run_name}: epoch {math.ceil(done / steps_per_epoch)}, step {done}/{steps}, {status}, train "
                    f"accuracy {accuracy:.1%}, test accuracy {judged['accuracy']:.1%}, "
                    f"{datetime.timedelta(seconds=round(left))} left",
                    soft_wrap=True,
                )
            if done == steps:
                recorder.end(skipped=int(skipped(opt_state)))
            stop = interrupted()
            if folder and (done % FLAGS.checkpoint_every == 0 or done == steps or stop):
                arrays = {"params": params, "model_state": model_state, "opt_state": opt_state}
                with recorder.timed("checkpoint"):
                    checkpoint(folder, mesh.size, settings, arrays, recorder, screen)
        run = recorder.close()
        if interrupted():
            kept = f"the same command goes on from {folder}" if folder else "nothing is kept without --checkpoint_dir"
            raise InterruptedRunError(f"{run_name} was interrupted at step {done} of {steps}; {kept}")
    return run


def bits_of_pmean(task: Task, workers: int) -> int:
    """The bits that a worker sends without compression: the gradients in their own type, and the floats beside them."""
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task.params))
    return -(-8 * (gradients + 4 * beside(task)) * 2 * (workers - 1) // workers)


def beside(task: Task) -> int:
    """The number of floats that a step averages beside the gradients: batch statistics, the loss and the accuracy."""
    averaged = [x for x in jax.tree.leaves(task.model_state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(x.size for x in averaged) + 2


def code_length(opt_state: Any) -> dict[str, float]:
    """The true length of codes that vary in length, as "code_bits"; empty without such a codec."""
    try:
        return {"code_bits": code_bits(opt_state)}
    except ValueError:
        return {}


def lost(opt_state: Any) -> dict[str, float]:
    """The figures of `LOST`; empty if codecs are not measured."""
    figures = jax.device_get(metrics(opt_state))
    return {} if figures.error is None else {name: float(getattr(figures, name)) for name in LOST}


def lost_by_leaf(opt_state: Any) -> dict[str, dict[str, float]]:
    """The figures of `lost` by path."""
    leaves = {path: x for path, x in jax.device_get(metrics(opt_state).leaves).items() if x.error is not None}
    return {name: {path: float(getattr(x, name)) for path, x in leaves.items()} for name in LOST if leaves}


def checkpoint(
    folder: pathlib.Path,
    workers: int,
    settings: dict[str, Any],
    arrays: Any,
    recorder: records.Recorder,
    screen: display.Console,
) -> None:
    """Writes a checkpoint; if that fails, it prints the error, and the training goes on."""
    try:
        checkpoints.save(folder, recorder.state["step"], workers, settings, arrays, recorder.state)
    except checkpoints.CheckpointError as error:
        screen.print(str(error), style="bold red", soft_wrap=True)


def learning_rate(steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by steps done, from the flags.

    Raises:
      ValueError: it would not do what the flags say.
    """
    decay_epochs = [float(epoch) for epoch in FLAGS.decay_epochs]
    if FLAGS.schedule == "step" and decay_epochs and min(decay_epochs) >= FLAGS.epochs:
        raise ValueError(
            f"--decay_epochs={','.join(FLAGS.decay_epochs)} are not reached in --epochs={FLAGS.epochs}: give earlier "
            "ones, or --decay_epochs= for none"
        )
    return optimizers.schedule(
        FLAGS.schedule, FLAGS.lr, FLAGS.lr_scale, steps_per_epoch, FLAGS.epochs, FLAGS.warmup_epochs, decay_epochs
    )


def header(name: str, task: Task, settings: dict[str, Any], steps: int, mesh: Mesh) -> records.Record:
    """The first line of the records."""
    device = mesh.devices.flat[0]
    return {
        "kind": "run",
        "task": task.name,
        "codec": name,
        "label": label(name),
        "seed": FLAGS.seed,
        "workers": mesh.size,
        "emulated": device.platform == "cpu",
        "steps": steps,
        "parameters": sum(x.size for x in jax.tree.leaves(task.params)),
        "beside": beside(task),
        "settings": settings,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
    }


def restore(
    folder: pathlib.Path,
    settings: dict[str, Any],
    tx: optax.GradientTransformation,
    task: Task,
    screen: display.Console,
) -> checkpoints.Saved | None:
    """The newest whole checkpoint of this run."""

    def like(workers: int) -> Any:
        opt_state = jax.eval_shape(lambda: init(tx, task.params, workers))
        arrays = {"params": task.params, "model_state": task.model_state, "opt_state": opt_state}
        return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), arrays)

    return checkpoints.restore(
        folder, settings, like, lambda text: screen.print(text, style="bold red", soft_wrap=True)
    )


def carried_over(opt_state: Any, workers: int, mesh: Mesh, screen: display.Console) -> Any:
    """The optimiser's state, which is on the host, placed on the current workers."""
    if workers == mesh.size:
        return place(opt_state, mesh)
    screen.print(
        f"The checkpoint is of {workers} workers, now there are {mesh.size}. Carried over as they were: parameters, "
        "batch statistics, the optimiser's and the codec's state, the place in the input. Of the residuals: their mean "
        "over the workers. Each worker's part of a batch, and so its batch statistics, are of another size now.",
        soft_wrap=True,
    )
    return resize_workers(opt_state, mesh)


def worker_mesh(workers: int) -> Mesh:
    """A mesh of `workers` accelerators; without accelerators, of devices that the CPU emulates.

    Raises:
      ValueError: there are fewer devices, and it is too late to emulate more, or there are accelerators.
    """
    # With reordering, emulated devices may meet in the collectives of a conditional, and in those beside it, in
    # different orders, and accordion's training crashes. jax reads the flag when it first runs.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_REORDERING}"
    if jax.config.values["jax_num_cpu_devices"] < workers:
        # jax refuses this if it runs already, perhaps with enough devices.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", workers)
    if jax.device_count() < workers:
        raise ValueError(
            f"--workers={workers}: jax has {jax.device_count()} devices of type {jax.default_backend()!r}; use fewer "
            "workers, or JAX_PLATFORMS=cpu in the environment of a new process to emulate them"
        )
    return make_mesh(workers)


def require_batches(batch_size: int, workers: int, examples: int) -> None:
    """Raises ValueError for a batch that does not divide among the workers, or is larger than the data set."""
    if batch_size % workers:
        raise ValueError(
            f"--batch_size={batch_size} does not divide among --workers={workers}: it must be a multiple of them"
        )
    if batch_size > examples:
        raise ValueError(f"--batch_size={batch_size} is more than the {examples} examples to train on")


def command_line(argv: list[str]) -> list[str]:
    """`argv` with every --flagfile=... moved to the front, so that flags beside a preset win, in any order.

    --help shows the settings of the codecs that `argv` names.
    """
    codecs.show_settings(argv)
    return argv[:1] + sorted(argv[1:], key=lambda arg: not arg.lstrip("-").startswith("flagfile="))
