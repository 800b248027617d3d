"""Whether compression will pay for a model on some workers and links: predicted steps, and what to do.

    python -m experiments.plan --model=resnet18 --workers=8 --link=1gbit --step_ms=400
    python -m experiments.plan --model=transformer-7b --workers=8 --devices=8 --link=25gbit --device=h100 --rows=4
    python -m experiments.plan --model=perceptron --measure --workers=4
    python -m experiments.plan --model=perceptron --measure --coordinator_address=... --num_processes=2 --process_id=0

It is `gradcomp_jax.plan` for the models of these experiments, and for transformers of several sizes. The seconds of a
local step are given by --step_ms, or follow from its operations and the published rate of --device, or are timed here.
With --measure local step and codecs are timed here, and so is the link, without --link: by sums of one number and of 4
million. Started
as one of several processes, that is the link between them. One process alone has only memory to measure, among two
emulated devices, and says so. Without --codec the planner's own list is compared.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gcj
from experiments import cluster, codecs, command, models, together
from experiments.models.perceptron import perceptron
from experiments.models.transformer import Transformer
from gradcomp_jax.planner import DEVICES, Link, cost

FLAGS = flags.FLAGS

CLASSES, SYMBOLS = 10, 32_000
# By name: layers, width, heads, in GPT's proportions.
TRANSFORMERS = {
    "transformer-25m": (8, 512, 8),
    "transformer-300m": (24, 1024, 16),
    "transformer-1b": (24, 2048, 16),
    "transformer-7b": (32, 4096, 32),
}
MODELS = (*models.NAMES, "perceptron", *TRANSFORMERS)
LARGE = 2**22  # numbers, in the sum that tells a link's rate


class Task(NamedTuple):
    """What would be trained.

    Attributes:
      params: () -> the parameters; traceable.
      loss_fn: (parameters, batch) -> loss.
      batch: () -> the batch of one device, inputs and labels; traceable.
    """

    params: Callable[[], Any]
    loss_fn: Callable[[Any, Any], jax.Array]
    batch: Callable[[], Any]


def task_of(model: str, rows: int, context: int) -> Task:
    """The task of a model, with so many rows on each device, of so many symbols each."""
    labels = lambda: jnp.zeros(rows, jnp.int32)  # noqa: E731
    if model in TRANSFORMERS:
        depth, width, heads = TRANSFORMERS[model]
        symbols = lambda: jnp.zeros((rows, context), jnp.int32)  # noqa: E731
        return _task(lambda: Transformer(SYMBOLS, width, depth, heads, nnx.Rngs(0)), lambda: (symbols(), symbols()))
    if model == "perceptron":
        return _task(perceptron, lambda: (jnp.ones((rows, 3072)), labels()))
    images = lambda: (jnp.ones((rows, 32, 32, 3)), labels())  # noqa: E731
    return _task(lambda: nnx.merge(*models.create(model, (32, 32, 3), CLASSES, 0)), images)


def _task(make: Callable[[], nnx.Module], batch: Callable[[], Any]) -> Task:
    """The task of classifying a batch; nothing of the module's size is allocated before its parameters are made."""
    # Typed as a tuple of any length.
    parts: Any = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    structure, _, rest = parts
    statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        # A copy, because statistics from outside this function may not be written to under jax.grad.
        logits = nnx.merge(structure, params, statistics, copy=True)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return Task(lambda: nnx.state(make(), nnx.Param), loss_fn, batch)


def measured_link(mesh: Mesh, rounds: int) -> Link:
    """The link between the devices of a mesh: its latency from sums of one number, its rate from sums of many."""
    n = mesh.size
    summed = jax.jit(jax.shard_map(lambda x: lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))

    def seconds(size: int) -> float:
        split = NamedSharding(mesh, P("data"))
        x = jax.jit(lambda: jnp.ones(n * size, jnp.float32), out_shardings=split)()
        times = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            jax.block_until_ready(summed(x))
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])  # the first one compiles

    return cost.fitted_link(n, seconds(1), seconds(LARGE), 4 * LARGE)


def plan() -> gcj.Plan | None:
    """The plan that the flags ask for; None in the other ones of several processes, which have done their part.

    Raises:
      ValueError: flags do not go together.
    """
    several = cluster.join() > 1
    if FLAGS.measure and not several:
        jax.config.update("jax_num_cpu_devices", 2)
    if not (FLAGS.measure or FLAGS.link):
        raise ValueError("--link=1gbit tells the link between workers, and --measure measures it: give one")
    link: Link | str = FLAGS.link or measured_link(gcj.make_mesh(), FLAGS.rounds)
    if several:
        first = together.is_first()
        together.part()  # the others need not wait while the first one plans
        if not first:
            return None
    task = task_of(FLAGS.model, FLAGS.rows, FLAGS.context)
    here = not (FLAGS.device or FLAGS.step_ms) or FLAGS.measure
    made = (lambda f: jax.jit(f)()) if here else jax.eval_shape
    return gcj.plan(
        task.loss_fn,
        made(task.params),
        made(task.batch),
        workers=FLAGS.workers or jax.process_count(),
        link=link,
        devices_per_worker=FLAGS.devices,
        device=FLAGS.device,
        step_seconds=FLAGS.step_ms and FLAGS.step_ms / 1e3,
        codecs=chosen(),
        repeats=FLAGS.rounds,
    )


def chosen() -> dict[str, gcj.Compressor] | None:
    """The codecs of --codec with their flags, by label; None without --codec."""
    if not FLAGS["codec"].present:
        return None
    course = codecs.Course(steps_per_epoch=1_000_000, learning_rate=None)
    return {codecs.label(name): codecs.from_flags(name, 0, course) for name in FLAGS.codec}


def main() -> None:
    """Prints the plan."""
    logging.set_verbosity(logging.ERROR)
    try:
        found = plan()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if found is None:
        return
    print(f"{FLAGS.model}, {FLAGS.rows} rows a device\n\n{found}")
    if FLAGS.measure and not FLAGS.link and jax.process_count() == 1:
        print("The link that was measured is memory, between two devices of one process: give --link for another.")


def define_flags() -> None:
    """Defines the flags."""
    codecs.define_flags()
    flags.declare_key_flag("codec")
    flags.DEFINE_enum("model", "resnet18", MODELS, "What would be trained.")
    flags.DEFINE_integer("rows", 8, "Rows of a device's batch.", lower_bound=1)
    flags.DEFINE_integer("context", 2048, "Symbols in a row, of transformers.", lower_bound=1)
    flags.DEFINE_integer("workers", None, "Workers, each with a link; by default the processes.", lower_bound=1)
    flags.DEFINE_integer("devices", 1, "Devices of a worker, which share its link.", lower_bound=1)
    flags.DEFINE_string("link", None, 'The link of each worker, such as 1gbit, or "1gbit 20ms" with its latency.')
    flags.DEFINE_enum("device", None, DEVICES, "A device that need not be here, by its published rates.")
    flags.DEFINE_float("step_ms", None, "Milliseconds of a local step.", lower_bound=1e-6)
    flags.DEFINE_boolean("measure", False, "Time the link, the local step and the codecs, on what runs this.")
    flags.DEFINE_integer("rounds", 5, "Times each is run; medians are taken.", lower_bound=1)
    cluster.declare_key_flags()


if __name__ == "__main__":
    # Not at import: a test of another experiment may define flags with these names.
    define_flags()
    codecs.show_settings(sys.argv)
    command.run(main)
