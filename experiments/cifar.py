"""Image classification, trained with one gradient codec after another.

    python -m experiments.cifar --flagfile=experiments/presets/digits.flags
    python -m experiments.cifar --codec=none,qsgd --qsgd_bits=2 --dataset=cifar10 --model=resnet20

All codecs start from the same parameters, and see the same batches at the same learning rates. Nothing else differs.
With --every=1,10 each codec exchanges gradients in each step, and then, every 10 steps, how far the workers have moved.
The workers are the accelerators of the machine, or devices that the CPU emulates. With --checkpoint_dir a stopped run
(by Ctrl-C or by anything else) goes on where it was when the same command is given again.

Started on several hosts, the workers are the devices of all; docs/processes.md tells how:

    python -m experiments.cifar --cluster
    python -m experiments.cifar --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0
"""

import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import (
    checkpoints,
    cluster,
    command,
    data,
    display,
    figures,
    loop,
    models,
    records,
    together,
    training,
)

FLAGS = flags.FLAGS

for name in training.SHOWN:  # in --help
    flags.declare_key_flag(name)
cluster.declare_key_flags()
flags.DEFINE_enum("dataset", "digits", data.DATASETS, "What to train on; digits needs no files and no network.")
flags.DEFINE_enum("model", "resnet8", list(models.NAMES), "The network.")
flags.DEFINE_boolean(
    "augment", None, "Random crops and flips of the images to train on; by default those of CIFAR, not the digits."
)
flags.DEFINE_boolean(
    "validation", False, "Test on a tenth of the training images, and train on the others: to choose settings by."
)

CROP_PADDING = 4


class Batch(NamedTuple):
    """The batch of a step.

    Attributes:
      images: uint8 [batch, height, width, channels].
      labels: int32 [batch].
      keys: the random keys of the workers' dropout, [workers].
    """

    images: jax.Array
    labels: jax.Array
    keys: jax.Array


def main() -> None:
    """Trains with every codec of --codec, then prints the table and writes the figure."""
    try:
        mesh = cluster.mesh() or training.worker_mesh(FLAGS.workers)
        with together.all_or_none():
            task, plans = prepared(mesh)
            if together.is_first():
                command.directory("out_dir", FLAGS.out_dir)
    except (ValueError, data.DataError, together.OtherProcessError) as error:
        sys.exit(f"error: {error}")
    screen = display.console()
    if FLAGS.warmup_epochs >= FLAGS.epochs:
        told = f"--epochs={FLAGS.epochs} ends within --warmup_epochs={FLAGS.warmup_epochs:g}"
        screen.print(f"{told}: the learning rate only rises", soft_wrap=True)
    try:
        runs = [loop.train(plan, task, screen) for plan in plans]
    except (checkpoints.CheckpointError, records.RecordsError, together.OtherProcessError) as error:
        sys.exit(f"error: {error}")
    except loop.InterruptedRunError as interrupt:
        screen.print(str(interrupt), soft_wrap=True)
        together.part()
        sys.exit(130)
    if together.is_first():
        show(runs, task, mesh.size, screen)


def prepared(mesh: Mesh) -> tuple[loop.Task, list[loop.Plan]]:
    """The task, and the plans of training on it, which the flags ask for.

    Raises:
      DataError: the data are missing or wrong.
      ValueError: the flags do not go together.
    """
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.validation)
    training.require_batches(FLAGS.batch_size, mesh.size, len(dataset.train.labels))
    task = classification(dataset, mesh)
    training.learning_rate(task.examples // FLAGS.batch_size)  # it may be refused, and then it is refused now
    training.require_outer(task, f"--model={FLAGS.model}")
    ways = [(name, every) for name in FLAGS.codec for every in map(int, FLAGS.every)]
    plans = [training.plan(name, training.codec(name, task, every), task, mesh, every) for name, every in ways]
    for plan in plans:
        # A codec that refuses this network does so now, not after the codecs before it have trained.
        jax.eval_shape(plan.tx.init, task.params)
    return task, plans


def show(runs: list[records.Run], task: loop.Task, workers: int, screen: display.Console) -> None:
    """Prints the table, and writes the figure."""
    title = f"{models.NAMES[FLAGS.model]} on {FLAGS.dataset}, {workers} workers, {runs[0].step} steps"
    screen.print(display.table(runs, title))
    for note in display.notes(runs):
        screen.print(note)
    figure = pathlib.Path(FLAGS.out_dir) / f"{task.name}.png"
    figures.accuracy(runs, title, figure)
    screen.print(f"Figure: {figure}; the records are beside it", soft_wrap=True)


def classification(dataset: data.Dataset, mesh: Mesh) -> loop.Task:
    """The task of classifying the images of a data set with the network of --model."""
    train, workers = dataset.train, NamedSharding(mesh, P(mesh.axis_names))
    augment = dataset.augment if FLAGS.augment is None else FLAGS.augment
    graphdef, params, stats = models.create(FLAGS.model, train.images.shape[1:], dataset.classes, FLAGS.seed)
    key = jax.random.fold_in(jax.random.key(FLAGS.seed), 1)  # the codecs draw from the seed itself

    def loss_fn(params, stats, batch):
        # A copy, because statistics from outside this function may not be written to under jax.grad.
        network = nnx.merge(graphdef, params, stats, copy=True)
        logits = network(dataset.normalize(batch.images), nnx.Rngs(batch.keys[0]))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        accuracy = (logits.argmax(-1) == batch.labels).mean()
        return loss, (nnx.state(network, nnx.BatchStat), accuracy)

    def prepare(split: Any, step: Any) -> Batch:
        crops, dropout = jax.random.split(jax.random.fold_in(key, step))
        images = crop_and_flip(crops, split.images) if augment else split.images
        return Batch(images, split.labels, jax.random.split(dropout, mesh.size))

    prepare = jax.jit(prepare, out_shardings=workers)

    def batches(done: int) -> Iterator[Batch]:
        for step, split in enumerate(data.batches(train, FLAGS.batch_size, FLAGS.seed, done), done):
            yield prepare(loop.split(split, mesh), step)

    settings = {
        "dataset": FLAGS.dataset,
        "data_crc32": f"{zlib.crc32(train.images.tobytes()):08x}",
        "model": FLAGS.model,
        "augment": augment,
        "validation": FLAGS.validation,
    }
    name = f"{FLAGS.dataset}-{FLAGS.model}"
    evaluate = evaluation(graphdef, dataset, mesh)
    return loop.Task(name, settings, params, stats, loss_fn, batches, len(train.labels), evaluate)


def crop_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by up to four pixels, into zeros, and mirrors it or not; both at random.

    He et al., CVPR 2016, section 4.2. The draws depend only on the key and on the place in the batch, not on how the
    batch is split.

    Args:
      key: the key of the draws.
      images: the images, [N, H, W, C].

    Returns:
      Images of the same shape and type.
    """
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (len(images), 2), 0, 2 * CROP_PADDING + 1)
    flips = jax.random.bernoulli(flip_key, shape=(len(images),))
    padding = [(CROP_PADDING, CROP_PADDING)] * 2 + [(0, 0)]

    def one(image, corner, flip):
        crop = jax.lax.dynamic_slice(jnp.pad(image, padding), (*corner, 0), image.shape)
        return jnp.where(flip, crop[:, ::-1], crop)

    return jax.vmap(one)(images, corners, flips)


def evaluation(graphdef: Any, dataset: data.Dataset, mesh: Mesh) -> Callable[[Any, Any], dict[str, float]]:
    """A function from parameters and batch statistics to the loss and the accuracy on the test split.

    The test images are split over the workers, and stay on them.
    """
    test = [loop.split(batch, mesh) for batch in data.padded_batches(dataset.test, FLAGS.batch_size)]

    @jax.jit
    def judge(params, stats, batch):
        network = nnx.merge(graphdef, params, stats)
        network.eval()
        logits = network(dataset.normalize(batch.images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
        # Images of class -1 fill up the last batch.
        return jnp.sum(losses * (batch.labels >= 0)), jnp.sum(logits.argmax(-1) == batch.labels)

    def evaluate(params, stats):
        # Read one by one: on emulated devices, programs that run at the same time can wait for each other's threads
        # for ever.
        sums = [[float(x) for x in judge(params, stats, batch)] for batch in test]
        loss, accuracy = (sum(column) / len(dataset.test.labels) for column in zip(*sums, strict=True))
        return {"loss": loss, "accuracy": accuracy}

    return evaluate


if __name__ == "__main__":
    command.run(main, argv=loop.command_line(sys.argv))
