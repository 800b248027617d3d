"""Trains a transformer whose parameters lie in shards over the chips of a slice, with codecs between the slices.

    python -m experiments.sharded
    python -m experiments.sharded --codecs=none,powersgd --slices=4 --chips=2 --steps=300

This is hybrid sharding, written out: each slice holds all parameters once, and each of its chips holds a shard of them
and of AdamW's moments. The loss gathers the weights of a layer when it needs them, so gradients arrive in shards, from
a reduce-scatter. `across(codec, inside=specs)` exchanges these shards between the slices, and gathers nothing. Leaves
that do not divide among the chips lie whole on each. The images are the handwritten digits that come with scikit-learn,
each 16 patches of 2 x 2 pixels. A CPU emulates the devices.

The table has the bytes that a chip sends in a step, by link. The bytes inside a slice are the codec's own.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

import gradcomp_jax as gc
from experiments import command, data, display

FLAGS = flags.FLAGS

SLOW, FAST = AXES = ("node", "local")
HEADS, PATCH, CLASSES = 4, 2, 10
Params = dict[str, Any]


def stacked(path: str, leaf: Any) -> bool:
    """Whether a leaf's first axis counts layers."""
    del leaf
    return path.startswith("layers")


CODECS: dict[str, Callable[[], gc.Compressor]] = {
    "none": gc.none,
    "powersgd": lambda: gc.powersgd(rank=4, stacked=stacked),
    "qsgd": lambda: gc.qsgd(bits=4, min_size=0),
    "topk": lambda: gc.topk(fraction=0.01),
    "signnorm": gc.signnorm,
}


class Trained(NamedTuple):
    """The results of a training.

    Attributes:
      losses: the losses by step.
      accuracy: the accuracy on the test images.
      between: the bytes that a chip sends to other slices in a step.
      inside: the bytes that the codec sends inside a slice.
      weights: the bytes that go inside a slice to gather weights and reduce gradients.
    """

    losses: dict[int, float]
    accuracy: float
    between: int
    inside: int
    weights: int


def created(layers: int, width: int) -> Params:
    """New parameters; those of all layers are stacked."""
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 3))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])  # noqa: E731
    kernels = {name: normal(layers, *shape) for name, shape in shapes.items()}
    return {
        "layers": kernels | {"norms": jnp.ones((layers, 2, width))},
        "patches": normal(PATCH * PATCH, width),
        "positions": 0.1 * normal((8 // PATCH) ** 2, width),
        "head": {"kernel": normal(width, CLASSES), "bias": jnp.zeros(CLASSES)},
    }


def specs_of(params: Params, chips: int) -> Params:
    """How parameters lie: cut along the first axis, or the axis after the layers, if it divides among the chips."""

    def spec(path: Any, x: Any) -> P:
        axis = int(stacked(jax.tree_util.keystr(path, simple=True, separator="/"), x))
        return P(*(None,) * axis, FAST) if x.ndim > 1 and x.shape[axis] % chips == 0 else P()

    return jax.tree_util.tree_map_with_path(spec, params)


def layer(w: Params, x: jax.Array) -> jax.Array:
    """A layer of a transformer, x [batch, places, width]."""
    q, k, v = jnp.split(normed(x, w["norms"][0]) @ w["qkv"], 3, axis=-1)
    heads = lambda x: x.reshape(*x.shape[:2], HEADS, -1)  # noqa: E731
    x = x + jax.nn.dot_product_attention(heads(q), heads(k), heads(v)).reshape(x.shape) @ w["out"]
    return x + jax.nn.gelu(normed(x, w["norms"][1]) @ w["up"]) @ w["down"]


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x`, normalized to a mean square of 1 and scaled."""
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def logits_of(params: Params, images: jax.Array, gather: Callable[[Any, Any], Any], specs: Params) -> jax.Array:
    """The logits of images [batch, 8, 8, 1]; weights are gathered where they are needed."""
    rest = gather({name: params[name] for name in specs if name != "layers"}, specs)
    side = images.shape[1] // PATCH
    pixels = images.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3) / 16 - 0.5
    x = pixels.reshape(len(images), side * side, -1) @ rest["patches"] + rest["positions"]
    # Not in a scan: in its collectives and those after it, emulated devices take each other's messages.
    for i in range(params["layers"]["qkv"].shape[0]):
        mine = {name: w[i] for name, w in params["layers"].items()}
        x = layer(gather(mine, {name: P(*spec[1:]) for name, spec in specs["layers"].items()}), x)
    return jnp.mean(normed(x, jnp.float32(1)), axis=1) @ rest["head"]["kernel"] + rest["head"]["bias"]


def gathered(tree: Any, specs: Any) -> Any:
    """Whole leaves, gathered from the chips' shards."""
    whole = lambda x, spec: lax.all_gather(x, FAST, axis=spec.index(FAST), tiled=True) if FAST in spec else x  # noqa: E731
    return {name: jax.tree.map(whole, x, specs[name]) for name, x in tree.items()}


def step_of(tx: optax.GradientTransformation, params: Params, specs: Params, mesh: Mesh) -> Any:
    """(parameters, state, batch) -> (parameters, state, mean loss); each chip has a shard of parameters and state."""
    state_specs, chips = gc.state_specs(tx, params, specs), mesh.shape[FAST]

    def loss_fn(params: Params, batch: data.Split) -> jax.Array:
        logits = logits_of(params, jnp.asarray(batch.images, jnp.float32), gathered, specs)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))
        return loss / chips  # its gradient is summed over a slice's chips, and becomes the gradient of their mean loss

    def worker(params: Params, state: Any, batch: data.Split) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(gc.vary(params, AXES), batch)
        updates, state = tx.update(grads, gc.local_state(state), params)
        return optax.apply_updates(params, updates), gc.global_state(state), chips * lax.pmean(loss, AXES)

    lies = (specs, state_specs, P())
    return jax.jit(
        jax.shard_map(worker, mesh=mesh, in_specs=(specs, state_specs, P(AXES)), out_specs=lies), donate_argnums=(0, 1)
    )


def train(name: str, mesh: Mesh, dataset: data.Dataset) -> Trained:
    """Trains with a codec."""
    params = created(FLAGS.layers, FLAGS.width)
    specs = specs_of(params, mesh.shape[FAST])
    tx = optax.chain(
        gc.across(CODECS[name](), slow=SLOW, fast=FAST, inside=specs),
        gc.clip_by_global_norm(1.0, FAST, inside=specs),
        optax.adamw(FLAGS.lr),
    )
    state = gc.init(tx, params, mesh, specs)
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
    batches = placed(data.batches(dataset.train, FLAGS.batch_size, seed=0), mesh)
    step = step_of(tx, params, specs, mesh).lower(params, state, next(batches)).compile()
    losses = {}
    for number in range(1, FLAGS.steps + 1):
        params, state, loss = step(params, state, next(batches))
        loss = float(loss)  # also so that emulated devices do one step at a time
        if number in (1, FLAGS.steps) or number % FLAGS.log_every == 0:
            losses[number] = loss
    between, inside = (gc.wire_bits(state, link).last // 8 for link in ("between", "inside"))
    sent = sum(x.ring_bytes for x in gc.collective_bytes(step))
    test = accuracy(jax.device_get(params), specs, dataset.test)
    return Trained(losses, test, between, inside, round(sent) - between - inside)


def placed(batches: Iterator[data.Split], mesh: Mesh) -> Iterator[data.Split]:
    """Batches, placed so that each chip has a part."""
    return (gc.shard_batch(batch, mesh) for batch in batches)


def accuracy(params: Params, specs: Params, split: data.Split) -> float:
    """The share of images that whole parameters classify correctly."""
    logits = jax.jit(lambda params, images: logits_of(params, images, lambda tree, _: tree, specs))
    guesses = jnp.argmax(logits(params, split.images.astype(np.float32)), axis=-1)
    return float(np.mean(np.asarray(guesses) == split.labels))


def main() -> None:
    """Trains with each codec, and shows the bytes and the results of each."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", FLAGS.slices * FLAGS.chips)
    if FLAGS.batch_size % (FLAGS.slices * FLAGS.chips):
        sys.exit(f"error: --batch_size={FLAGS.batch_size} is to be a multiple of the chips, slices x chips")
    mesh, dataset = gc.make_mesh({SLOW: FLAGS.slices, FAST: FLAGS.chips}), data.load("digits", None)
    screen, trained = display.console(), {}
    with display.progress(screen) as progress:
        bar = progress.add_task("sharded", total=len(FLAGS.codecs), status="")
        for name in FLAGS.codecs:
            progress.update(bar, status=name)
            trained[name] = train(name, mesh, dataset)
            progress.advance(bar)
    screen.print(table_of(trained))
    leaves = jax.tree.leaves(created(FLAGS.layers, FLAGS.width))
    screen.print(
        f"{sum(x.size for x in leaves):,} parameters. KB: 10^3 bytes that a chip sends in a step. Ratio: those of a "
        f"dense all-reduce of shards between slices, over these. Beside the codec, weights that are gathered and "
        f"gradients that are reduced take {trained[FLAGS.codecs[0]].weights / 1e3:,.1f} KB inside a slice."
    )


def table_of(trained: dict[str, Trained]) -> Table:
    """The table of each codec's bytes and results."""
    table = Table(title=f"{FLAGS.steps} steps of AdamW on {FLAGS.slices} slices of {FLAGS.chips} chips")
    table.add_column("codec")
    steps = next(iter(trained.values())).losses
    for heading in (*(f"loss, {step}" for step in steps), "test accuracy", "KB between", "ratio", "KB inside"):
        table.add_column(heading, justify="right")
    size = sum(x.nbytes for x in jax.tree.leaves(created(FLAGS.layers, FLAGS.width)))
    dense = 2 * (FLAGS.slices - 1) * size / FLAGS.slices / FLAGS.chips
    for name, got in trained.items():
        losses = [f"{loss:.4f}" for loss in got.losses.values()]
        figures = (f"{got.between / 1e3:.2f}", f"{dense / got.between:.2f}", f"{got.inside / 1e3:.2f}")
        table.add_row(name, *losses, f"{got.accuracy:.2%}", *figures)
    return table


def define_flags() -> None:
    """Defines the flags of the command."""
    known = ", ".join(CODECS)
    flags.DEFINE_list("codecs", [*CODECS], f"Codecs to train with, of: {known}.")
    flags.register_validator("codecs", lambda got: got and set(got) <= CODECS.keys(), f"must be of {known}")
    flags.DEFINE_integer("slices", 2, "Slices.", lower_bound=2)
    flags.DEFINE_integer("chips", 4, "Chips of a slice.", lower_bound=1)
    flags.DEFINE_integer("layers", 2, "Layers of the transformer.", lower_bound=1)
    flags.DEFINE_integer("width", 64, "Its width, a multiple of 4, which is the number of heads.", lower_bound=4)
    flags.register_validator("width", lambda got: got % HEADS == 0, f"must be a multiple of {HEADS}")
    flags.DEFINE_integer("steps", 150, "Steps of each codec.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Images in a batch, of all slices.", lower_bound=1)
    flags.DEFINE_integer("log_every", 50, "Steps from one loss that is shown to the next.", lower_bound=1)
    flags.DEFINE_float("lr", 2e-3, "Learning rate.", lower_bound=0.0)


if __name__ == "__main__":
    # Not at import: a test of another experiment may define flags with these names.
    define_flags()
    command.run(main)
