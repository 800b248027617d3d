"""The flags of image classification: codecs, and the papers' optimisers behind them; and the plan of a training."""

import re
from typing import Any

import jax
import optax
from absl import flags
from jax.sharding import Mesh

from experiments import cluster, codecs, loop, optimizers
from gradcomp_jax import delayed, make_mesh, measured, outer

FLAGS = flags.FLAGS

codecs.define_choice()
flags.DEFINE_boolean("delayed", False, "Exchange in each step the gradients of the one before.")
flags.DEFINE_boolean("measured", True, "Record what codecs lose and owe; a step takes a little longer for it.")
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

# The flags that --help shows. A first run does not need the others; --helpfull shows them.
SHOWN = (
    "codec",
    "delayed",
    "every",
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
    "data_dir",
)
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


def codec(name: str, task: loop.Task, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """The codec `name` with its flags.

    Args:
      name: a key of `codecs.CODECS`.
      task: the task.
      every: the steps from one exchange to the next.

    Raises:
      ValueError: the factory refuses a value.
    """
    steps_per_epoch = task.examples // FLAGS.batch_size
    # A cosine falls in every step, so accordion would compress in none.
    schedule = learning_rate(steps_per_epoch) if FLAGS.schedule == "step" else None
    made = codecs.from_flags(
        name, FLAGS.seed, codecs.Course(steps_per_epoch // every, schedule if every == 1 else None)
    )
    if FLAGS.measured and name != "none":  # none loses nothing
        made = measured(made)
    return delayed(made) if FLAGS.delayed else made


def label(name: str, every: int = 1) -> str:
    """The codec's name, with the settings that are not at their defaults."""
    return codecs.label(name) + " delayed" * FLAGS.delayed + f" every={every}" * (every > 1)


def require_outer(task: loop.Task, model: str) -> None:
    """Raises ValueError for flags that ask for outer steps where there can be none.

    Args:
      task: the task.
      model: the flag that gave its network, such as "--model=resnet8".
    """
    several = [every for every in FLAGS.every if int(every) > 1]
    if several and jax.tree.leaves(task.model_state):
        raise ValueError(
            f"--every={several[0]}: between exchanges the batch statistics of {model} would differ from worker to "
            "worker; --model=resnet8gn has none, nor has --model=vgg12, for images of 15x15 or more"
        )
    if several and FLAGS.delayed:
        raise ValueError(f"--delayed is for exchanges in each step, and not for --every={several[0]}")


def plan(name: str, codec: Any, task: loop.Task, mesh: Mesh, every: int = 1) -> loop.Plan:
    """The training of a task with one codec, as the flags say.

    Args:
      name: the codec's name, a key of `codecs.CODECS`.
      codec: the codec.
      task: the task.
      mesh: the mesh of the workers.
      every: the steps from one exchange to the next. Above 1 the flags' optimiser makes the local steps of `outer`.
    """
    steps_per_epoch = task.examples // FLAGS.batch_size
    schedule = learning_rate(steps_per_epoch)
    first = codec if every == 1 else optax.identity()
    tx = optimizers.optimizer(FLAGS.optimizer, first, schedule, FLAGS.momentum, FLAGS.weight_decay)
    if every > 1:
        tx = outer(tx, every=every, codec=codec)
    settings = {key: FLAGS[key].value for key in SETTINGS} | codecs.settings(name)
    # In a comparison these are settings of the codec, like the others.
    settings |= {f"{name}_delayed": FLAGS.delayed, f"{name}_every": every}
    steps = FLAGS.epochs * steps_per_epoch
    return loop.Plan(name, label(name, every), settings, tx, schedule, steps, FLAGS.batch_size, mesh)


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


def worker_mesh(workers: int) -> Mesh:
    """A mesh of `workers` accelerators; without accelerators, of devices that the CPU emulates.

    Raises:
      ValueError: there are fewer devices, and it is too late to emulate more, or there are accelerators.
    """
    cluster.emulate(workers)
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
