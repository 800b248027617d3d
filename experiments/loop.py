"""The training loop that the experiments share, and its flags.

The flags and the seed decide a run. All runs of a comparison start from the same parameters, and see the same batches.
A run that was killed and started again ends like one that was not: each checkpoint has its state, its place in the
input, its randomness and its figures.
"""

import contextlib
import datetime
import math
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import checkpoints, codecs, display, records, together
from experiments.interrupts import interruptible
from gradcomp_jax import (
    Outer,
    accordion_log,
    code_bits,
    init,
    metrics,
    place,
    resize_workers,
    simulate,
    skipped,
    train_step,
    wire_bits,
)
from gradcomp_jax.sharding import specs_of

FLAGS = flags.FLAGS

codecs.define_settings()
flags.DEFINE_integer(
    "workers",
    4,
    "Workers among which each batch is split. With several processes: over all of them, by default all their devices.",
    lower_bound=2,
)
flags.DEFINE_list(
    "every",
    ["1"],
    "Steps from one exchange to the next, several with commas between them. Above 1 workers train on their own "
    "meanwhile, and exchange how far they moved.",
)
flags.register_validator(
    "every",
    lambda counts: counts and all(count.isdecimal() and int(count) for count in counts),
    message="must be whole numbers from 1, with commas between them",
)
flags.DEFINE_string(
    "data_dir",
    None,
    "Where the data set's folder is, such as cifar-10-batches-py; by default GRADCOMP_DATA_DIR of the environment, or "
    "else it is downloaded.",
)
flags.DEFINE_integer("seed", 0, "Of the initial parameters, the batches and the codecs.", 0, 2**32 - 1)
flags.DEFINE_integer("eval_every", 100, "Steps from one evaluation on the test split to the next.", lower_bound=1)
flags.DEFINE_integer("log_every", 10, "Steps over which a line of the records is a mean.", lower_bound=1)
flags.DEFINE_string("out_dir", "out", "The directory of the records and the figure.")
flags.DEFINE_string(
    "checkpoint_dir",
    None,
    "Where to keep checkpoints; a run that finds its own there goes on from it. It is on a file system that all "
    "processes see.",
)
flags.DEFINE_integer(
    "checkpoint_every", 500, "Steps from one checkpoint to the next; the last step has one too.", lower_bound=1
)
flags.DEFINE_string("tensorboard_dir", None, "Where to write the figures for TensorBoard too.")

# The figures of `gradcomp_jax.metrics` that are recorded.
LOST = ("error", "residual", "residual_norm")


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
      unit: what examples are, in plural.
    """

    name: str
    settings: dict[str, Any]
    params: Any
    model_state: Any
    loss_fn: Callable[..., Any]
    batches: Callable[[int], Iterator[Any]]
    examples: int
    evaluate: Callable[[Any, Any], dict[str, float]]
    unit: str = "examples"


class Plan(NamedTuple):
    """How a task is trained.

    Attributes:
      name: the name of the codec or of the method, such as "qsgd".
      label: the name with the settings that are not at their defaults, such as "qsgd bits=8".
      settings: the settings that decide the run, beside the task's; JSON. Those of the codec or method begin with its
        name.
      tx: the optimiser, with its codec.
      schedule: the learning rate by steps done.
      steps: the number of steps.
      batch_size: the examples of a step, over all workers.
      workers: their mesh; or their number, to simulate them on one device.
    """

    name: str
    label: str
    settings: dict[str, Any]
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    steps: int
    batch_size: int
    workers: Mesh | int

    @property
    def size(self) -> int:
        """The number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers.size


class State(NamedTuple):
    """The arrays of a run."""

    params: Any
    opt_state: Any
    model_state: Any


class InterruptedRunError(Exception):
    """The user asked to stop, and the run has stopped; the message tells the step, and the way to go on."""


def train(plan: Plan, task: Task, screen: display.Console) -> records.Run:
    """Trains, from the start or from the newest checkpoint.

    Args:
      plan: how.
      task: the task.
      screen: the console to show progress on.

    Returns:
      The records, which are also in `--out_dir`.

    Raises:
      CheckpointError: `--checkpoint_dir` has checkpoints of this run, but none to go on from; or another process is
        at this run; or not all processes of this run see that directory.
      InterruptedRunError: the user interrupted with Ctrl-C or SIGTERM.
      RecordsError: the records cannot be written.
      OtherProcessError: one of these errors happened in another process.
    """
    run_name = f"{task.name}-{plan.label.replace(' ', '_')}-seed{FLAGS.seed}"
    folder = pathlib.Path(FLAGS.checkpoint_dir) / run_name if FLAGS.checkpoint_dir else None
    plan, steps = plan._replace(settings=plan.settings | task.settings), plan.steps

    own = checkpoints.owned(folder) if folder else contextlib.nullcontext()
    with own, interruptible() as interrupted, display.progress(screen) as progress:
        start, done, figures = begin(plan, task, folder, screen)
        with together.all_or_none():
            recorder = recorded(run_name, header(plan, task), figures)
        if 0 < done < steps:
            recorder.write("resumed", workers=plan.size)

        bar = progress.add_task(run_name, total=steps, completed=done, status="compiling")
        first, since = done, time.perf_counter()
        for done, state, lr, status in stepped(plan, task, recorder, start):
            progress.update(bar, advance=1, status=status)
            if done % FLAGS.log_every == 0 or done == steps:
                average(plan, recorder)
                log(recorder, state.opt_state, lr, run_name, screen)
            if done % FLAGS.eval_every == 0 or done == steps:
                judged = judge(recorder, task, state)
                epoch = math.ceil(done / (task.examples // plan.batch_size))
                left = (time.perf_counter() - since) / (done - first) * (steps - done)
                screen.print(
                    f"{run_name}: epoch {epoch}, step {done}/{steps}, {status}, {judged}, "
                    f"{datetime.timedelta(seconds=round(left))} left",
                    soft_wrap=True,
                )
            if done == steps:
                recorder.end(skipped=int(skipped(state.opt_state)))
            stop = interrupted()
            if folder and (done % FLAGS.checkpoint_every == 0 or done == steps or stop):
                checkpoint(folder, plan, state, recorder, screen)
            if stop:
                break
        run = recorder.close()
        if interrupted():
            kept = f"the same command goes on from {folder}" if folder else "nothing is kept without --checkpoint_dir"
            raise InterruptedRunError(f"{run_name} was interrupted at step {done} of {steps}; {kept}")
    return run


def recorded(run_name: str, header: records.Record, figures: dict[str, Any] | None) -> records.Recorder:
    """The recorder of a run; of several processes only the first one's writes files."""
    if not together.is_first():
        return records.Recorder(None, header, None, figures)
    board = pathlib.Path(FLAGS.tensorboard_dir) / run_name if FLAGS.tensorboard_dir else None
    return records.Recorder(pathlib.Path(FLAGS.out_dir) / f"{run_name}.jsonl", header, board, figures)


def begin(
    plan: Plan, task: Task, folder: pathlib.Path | None, screen: display.Console
) -> tuple[State, int, dict[str, Any] | None]:
    """The state to go on from, the number of steps done, and the records so far, or None."""
    # Copies, because a step consumes its arguments, and the next run starts from the same parameters. On the host,
    # because jax spreads an array of one device over several processes so that Orbax cannot read it.
    params, model_state = jax.device_get(jax.tree.map(jnp.copy, (task.params, task.model_state)))
    opt_state, done, figures = init(plan.tx, params, plan.workers), 0, None
    if folder and (saved := restore(folder, plan, task, screen)):
        done, figures = saved.step, saved.figures
        params, model_state = saved.arrays["params"], saved.arrays["model_state"]
        opt_state = carried_over(saved.arrays["opt_state"], saved.workers, plan, screen)
    params, model_state = placed((params, model_state), plan.workers)
    return State(params, opt_state, model_state), done, figures


def stepped(
    plan: Plan, task: Task, recorder: records.Recorder, state: State
) -> Iterator[tuple[int, State, float, str]]:
    """Takes the steps that are left, and counts each in the records.

    Yields:
      The number of steps done, the state, the learning rate, and figures in words.
    """
    done = recorder.state["step"]
    step, dense_bits = step_of(plan, task), bits_of_pmean(task, plan.size)
    batches = task.batches(done)
    work = "compile"  # the first step of a process compiles
    while done < plan.steps:
        with recorder.timed("input"):
            # The loop waits for the batch: on emulated devices a second program can take the threads that a step waits
            # for.
            batch = jax.block_until_ready(next(batches))
        began, lr = time.perf_counter(), float(plan.schedule(done))
        with recorder.timed(work):
            state, loss, accuracy = jax.block_until_ready(step(state, batch))
        done, work, seconds = done + 1, "step", time.perf_counter() - began
        recorder.count(wire_bits(state.opt_state), dense_bits, float(loss), float(accuracy), 1e3 * seconds)
        speed = f"{plan.batch_size / seconds:.0f} {task.unit}/s"
        yield done, state, lr, f"loss {loss:.3f}, {speed}, {recorder.sent}, train accuracy {accuracy:.1%}"


def step_of(plan: Plan, task: Task) -> Callable[[State, Any], tuple[State, Any, Any]]:
    """(state, batch) -> (state, loss, accuracy): the means over the workers, of this step.

    Under `outer` each worker's loss and accuracy are read where they are, because a local step sends nothing. So the
    means are over the workers of this process.
    """
    make: Any = train_step if isinstance(plan.workers, Mesh) else simulate
    if not isinstance(plan.tx, Outer):
        whole = make(task.loss_fn, plan.tx, plan.workers, has_state=True, has_aux=True, donate=True)

        def step(state: State, batch: Any) -> tuple[State, Any, Any]:
            params, opt_state, model_state, loss, accuracy = whole(*state, batch)
            return State(params, opt_state, model_state), loss, accuracy

        return step

    def loss_fn(params: Any, batch: Any) -> Any:
        loss, (_, accuracy) = task.loss_fn(params, task.model_state, batch)
        return loss, (loss, accuracy)

    local = make(loss_fn, plan.tx, plan.workers, has_aux=True, donate=True)

    def local_step(state: State, batch: Any) -> tuple[State, Any, Any]:
        params, opt_state, _, told = local(state.params, state.opt_state, batch)
        return State(params, opt_state, state.model_state), *(np.mean(own(x)) for x in told)

    return local_step


def own(x: jax.Array) -> np.ndarray:
    """The rows of an array that are on this process's devices."""
    return np.concatenate([shard.data for shard in x.addressable_shards])


def average(plan: Plan, recorder: records.Recorder) -> None:
    """Takes the means over all processes of what each has counted of its own workers, as `step_of` tells it."""
    recent = recorder.state["recent"]
    if isinstance(plan.tx, Outer) and jax.process_count() > 1 and recent:
        recorder.state["recent"] = multihost_utils.process_allgather(np.float32(recent)).mean(0).tolist()


def bits_of_pmean(task: Task, workers: int) -> int:
    """The bits that a worker sends without compression: the gradients in their own type, and the floats beside them."""
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task.params))
    return -(-8 * (gradients + 4 * beside(task)) * 2 * (workers - 1) // workers)


def beside(task: Task) -> int:
    """The number of floats that a step averages beside the gradients: batch statistics, the loss and the accuracy."""
    averaged = [x for x in jax.tree.leaves(task.model_state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(x.size for x in averaged) + 2


def log(recorder: records.Recorder, opt_state: Any, lr: float, run_name: str, screen: display.Console) -> None:
    """Writes a line "train", and says whether accordion has changed a level."""
    recorder.train(lr=lr, skipped=int(skipped(opt_state)), **code_length(opt_state), **lost(opt_state))
    decisions = accordion_log(opt_state)
    if recorder.levels(decisions):
        low = sum(": low" in decision for decision in decisions)
        step = recorder.state["step"]
        note = f"{run_name}: step {step}, {low} of {len(decisions)} leaves at low compression"
        screen.print(note, soft_wrap=True)


def judge(recorder: records.Recorder, task: Task, state: State) -> str:
    """Evaluates, and writes the lines "test" and "leaves"; the figures in words."""
    with recorder.timed("evaluate"):
        judged = task.evaluate(state.params, state.model_state)
    recorder.write("test", **judged)
    if leaves := lost_by_leaf(state.opt_state):
        recorder.write("leaves", **leaves)
    return f"test loss {judged['loss']:.4f}, test accuracy {judged['accuracy']:.1%}"


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
    folder: pathlib.Path, plan: Plan, state: State, recorder: records.Recorder, screen: display.Console
) -> None:
    """Writes a checkpoint; if that fails, it prints the error, and the training goes on."""
    average(plan, recorder)
    with recorder.timed("checkpoint"):
        try:
            step, arrays = recorder.state["step"], state._asdict()
            checkpoints.save(folder, step, plan.size, plan.settings, arrays, recorder.state)
        except checkpoints.CheckpointError as error:
            screen.print(str(error), style="bold red", soft_wrap=True)


def header(plan: Plan, task: Task) -> records.Record:
    """The first line of the records."""
    device = jax.devices()[0] if isinstance(plan.workers, int) else plan.workers.devices.flat[0]
    return {
        "kind": "run",
        "task": task.name,
        "codec": plan.name,
        "label": plan.label,
        "seed": FLAGS.seed,
        "workers": plan.size,
        "processes": jax.process_count(),
        "emulated": isinstance(plan.workers, int) or (device.platform == "cpu" and len(plan.workers.local_devices) > 1),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(task.params)),
        "beside": beside(task),
        "settings": plan.settings,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
    }


def restore(folder: pathlib.Path, plan: Plan, task: Task, screen: display.Console) -> checkpoints.Saved | None:
    """The newest whole checkpoint of this run."""

    def like(workers: int) -> Any:
        opt_state = jax.eval_shape(lambda: init(plan.tx, task.params, workers))
        arrays = State(task.params, opt_state, task.model_state)._asdict()

        def target(x: Any, spec: P) -> Any:
            # One of several processes reads its own rows; if they are of another number of workers, it reads all.
            if isinstance(plan.workers, Mesh) and jax.process_count() > 1 and (spec == P() or workers == plan.size):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(plan.workers, spec))
            return np.empty(x.shape, x.dtype)

        return jax.tree.map(target, arrays, specs_of(arrays))

    return checkpoints.restore(
        folder, plan.settings, like, lambda text: screen.print(text, style="bold red", soft_wrap=True)
    )


def carried_over(opt_state: Any, workers: int, plan: Plan, screen: display.Console) -> Any:
    """The optimiser's state as it was saved, placed on the current workers."""
    if workers == plan.size:
        return placed(opt_state, plan.workers)
    screen.print(
        f"The checkpoint is of {workers} workers, now there are {plan.size}. Carried over as they were: parameters, "
        "batch statistics, the optimiser's and the codec's state, the place in the input. Of the residuals: their mean "
        "over the workers. Each worker's part of a batch, and so its batch statistics, are of another size now.",
        soft_wrap=True,
    )
    return resize_workers(opt_state, plan.workers)


def placed(tree: Any, workers: Mesh | int) -> Any:
    """Arrays where a step takes them."""
    return place(tree, workers) if isinstance(workers, Mesh) else jax.tree.map(jnp.asarray, tree)


def split(tree: Any, workers: Mesh) -> Any:
    """Arrays [rows, ...] that every process has, split over the workers: each process gives only its own rows."""
    lies = NamedSharding(workers, P(workers.axis_names))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, lies, lambda rows: x[rows]), tree)


def command_line(argv: list[str]) -> list[str]:
    """`argv` with every --flagfile=... moved to the front, so that flags beside a preset win, in any order.

    --help shows the settings of the codecs that `argv` names.
    """
    codecs.show_settings(argv)
    return argv[:1] + sorted(argv[1:], key=lambda arg: not arg.lstrip("-").startswith("flagfile="))
