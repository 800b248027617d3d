"""A residual network on small images, trained with one gradient codec after another.

    python -m experiments.cifar --flagfile=experiments/presets/digits.flags
    python -m experiments.cifar --codec=none,qsgd --qsgd_bits=2 --dataset=cifar10 --data_dir=DIR

All codecs start from the same parameters and see the same batches at the same learning rates; they differ in
nothing else. The workers are the accelerators there are, or devices that the CPU emulates.
"""

import contextlib
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import codecs, data, models, report
from gradcomp_jax import Compressor, init, make_mesh, train_step, wire_bits

FLAGS = flags.FLAGS

codecs.define_flags()
flags.adopt_module_key_flags(codecs)  # into --help
flags.DEFINE_enum("dataset", "digits", ["digits", "cifar10"], "What to train on; digits needs no files.")
flags.DEFINE_string(
    "data_dir",
    None,
    "The directory that holds cifar-10-batches-py; by default the environment variable GRADCOMP_DATA_DIR.",
)
flags.DEFINE_enum("model", "resnet8", list(models.BLOCKS), "The network.")
flags.DEFINE_integer("workers", 4, "Workers among which each batch is split.", lower_bound=2)
flags.DEFINE_integer("epochs", 10, "Passes over the training split.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Images a step, over all workers; a multiple of --workers.", lower_bound=1)
flags.DEFINE_float("lr", 0.1, "The highest learning rate, reached after the first tenth of the steps.")
flags.DEFINE_float("momentum", 0.9, "Momentum of SGD.", lower_bound=0, upper_bound=1)
flags.DEFINE_float("weight_decay", 1e-4, "Weight decay, added to the aggregated gradient.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of the initial parameters, the batches and the codecs.", lower_bound=0)
flags.DEFINE_integer("eval_every", 20, "Steps from one evaluation on the test split to the next.", lower_bound=1)
flags.DEFINE_string("out_dir", "out", "The directory of the figure.")


def main(argv: list[str]) -> None:
    """Trains with every codec of --codec, then prints the table and writes the figure."""
    logging.set_verbosity(logging.WARNING)  # else jax tells of each kind of accelerator that is not there
    try:
        if argv[1:]:
            raise ValueError(f"{argv[1]!r} is no flag; all settings are given as --name=value")
        mesh = worker_mesh(FLAGS.workers)
        compressors = {name: codecs.from_flags(name, FLAGS.seed) for name in FLAGS.codec}
        dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
        require_batches(FLAGS.batch_size, FLAGS.workers, len(dataset.train.labels))
        # A codec that refuses this network does so now, not after the ones before it have trained.
        params = jax.eval_shape(lambda: models.create(FLAGS.model, dataset.channels, FLAGS.seed)[1])
        for codec in compressors.values():
            jax.eval_shape(codec.init, params)
    except (ValueError, data.DataError) as error:
        sys.exit(f"error: {error}")

    screen = report.console()
    results = [train(name, codec, dataset, mesh, screen) for name, codec in compressors.items()]

    title = (
        f"{models.TITLES[FLAGS.model]} on {FLAGS.dataset}, {FLAGS.workers} workers, {results[0].curve[-1].step} steps"
    )
    screen.print(report.table(results, title))
    for note in report.notes(results, FLAGS.workers, emulated=jax.default_backend() == "cpu"):
        screen.print(note)
    figure = pathlib.Path(FLAGS.out_dir) / f"{FLAGS.dataset}.png"
    report.plot(results, title, figure)
    screen.print(f"Figure: {figure}", soft_wrap=True)


def train(name: str, codec: Compressor, dataset: data.Dataset, mesh: Mesh, screen: report.Console) -> report.Result:
    """Trains a new network with one codec.

    Args:
      name: the codec's, as in `codecs.CODECS`.
      codec: the codec.
      dataset: what to train and test on.
      mesh: the workers.
      screen: where to show progress.
    """
    started = time.perf_counter()
    graphdef, params, stats = models.create(FLAGS.model, dataset.channels, FLAGS.seed)
    steps = FLAGS.epochs * (len(dataset.train.labels) // FLAGS.batch_size)
    tx = optimizer(codec, steps)

    def loss_fn(params, stats, batch):
        # A copy, because statistics from outside this function may not be written to under jax.grad.
        network = nnx.merge(graphdef, params, stats, copy=True)
        logits = network(dataset.normalize(batch.images))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        accuracy = (logits.argmax(-1) == batch.labels).mean()
        return loss, (nnx.state(network, nnx.BatchStat), accuracy)

    step = train_step(loss_fn, tx, mesh, has_state=True, has_aux=True, donate=True)
    opt_state = init(tx, params, mesh)
    # Parameters that lay on one device at the first step would have the second one compiled anew.
    params, stats = jax.device_put((params, stats), NamedSharding(mesh, P()))
    evaluate = evaluation(graphdef, dataset, mesh)
    dense_bytes = 4 * sum(x.size for x in jax.tree.leaves(params)) * 2 * (mesh.size - 1) / mesh.size

    curve, megabytes, seconds, done = [], [], [], 0
    with report.progress(screen) as progress:
        task = progress.add_task(name, total=steps, status="compiling")
        for epoch in range(FLAGS.epochs):
            for batch in data.batches(dataset.train, FLAGS.batch_size, FLAGS.seed, epoch):
                began = time.perf_counter()
                params, opt_state, stats, loss, accuracy = step(params, opt_state, stats, batch)
                jax.block_until_ready(params)
                seconds.append(time.perf_counter() - began)

                done += 1
                bits = wire_bits(opt_state)
                sent = bits.total / 8
                megabytes.append(bits.last / 8e6)
                bytes_so_far = f"{sent / 1e6:.1f} of {done * dense_bytes / 1e6:.1f} MB dense"
                speed = FLAGS.batch_size / seconds[-1]
                status = f"loss {loss:.3f}, {speed:.0f} images/s, {bytes_so_far}"
                progress.update(task, advance=1, status=status)

                if done % FLAGS.eval_every == 0 or done == steps:
                    curve.append(report.Point(done, sent / 1e6, evaluate(params, stats)))
                    screen.print(
                        f"{name}: epoch {epoch + 1}, step {done}/{steps}, loss {loss:.3f}, train accuracy "
                        f"{accuracy:.1%}, test accuracy {curve[-1].accuracy:.1%}, {bytes_so_far}",
                        soft_wrap=True,
                    )

    return report.Result(
        name=name,
        settings=codecs.label(name),
        curve=curve,
        step_megabytes=megabytes,
        dense_megabytes=dense_bytes / 1e6,
        step_ms=1e3 * statistics.median(seconds[1:] or seconds),  # the first one compiles
        seconds=time.perf_counter() - started,
    )


def optimizer(codec: Compressor, steps: int) -> optax.GradientTransformation:
    """The codec, then SGD with momentum and weight decay; a linear warm-up of a tenth of the steps and a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, FLAGS.lr, warmup_steps=steps // 10, decay_steps=steps)
    sgd = optax.sgd(schedule, momentum=FLAGS.momentum)
    return optax.chain(codec, optax.add_decayed_weights(FLAGS.weight_decay), sgd)


def evaluation(graphdef: Any, dataset: data.Dataset, mesh: Mesh) -> Callable[[Any, Any], float]:
    """A function from parameters and batch statistics to the accuracy on the test split, between 0 and 1.

    The test split is split over the workers, and stays on them.
    """
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    test = [jax.device_put(batch, sharding) for batch in data.padded_batches(dataset.test, FLAGS.batch_size)]

    @jax.jit
    def correct(params, stats, batch):
        network = nnx.merge(graphdef, params, stats)
        network.eval()
        return jnp.sum(network(dataset.normalize(batch.images)).argmax(-1) == batch.labels)

    def accuracy(params, stats):
        return sum(int(correct(params, stats, batch)) for batch in test) / len(dataset.test.labels)

    return accuracy


def worker_mesh(workers: int) -> Mesh:
    """A mesh of `workers` accelerators, or of devices that the CPU emulates where there is no accelerator.

    Raises:
      ValueError: there are fewer, and it is too late, or not in place, to emulate them.
    """
    if jax.config.values["jax_num_cpu_devices"] < workers:
        # Refused where jax runs already, perhaps with enough devices.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", workers)
    if jax.device_count() < workers:
        raise ValueError(
            f"--workers={workers}: jax has {jax.device_count()} devices of type {jax.default_backend()!r}; use fewer "
            "workers, or JAX_PLATFORMS=cpu in the environment of a new process to emulate them"
        )
    return make_mesh(workers)


def require_batches(batch_size: int, workers: int, images: int) -> None:
    """Raises ValueError for a batch that does not divide among the workers, or is larger than the data set."""
    if batch_size % workers:
        raise ValueError(
            f"--batch_size={batch_size} does not divide among --workers={workers}: it must be a multiple of them"
        )
    if batch_size > images:
        raise ValueError(f"--batch_size={batch_size} is more than the {images} images to train on")


def flagfiles_first(argv: list[str]) -> list[str]:
    """`argv` with every --flagfile=... moved to the front: what is typed beside a preset wins, in any order."""
    return argv[:1] + sorted(argv[1:], key=lambda arg: not arg.lstrip("-").startswith("flagfile="))


if __name__ == "__main__":
    app.run(main, argv=flagfiles_first(sys.argv))
