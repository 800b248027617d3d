"""The bytes that a chip sends between slices or nodes, by codec and by way of writing a step; compiled only.

    JAX_PLATFORMS=cpu python -m experiments.slices --target=v5e:2x4 --slices=2 --powersgd_rank=4
    JAX_PLATFORMS=cpu python -m experiments.slices --target=h100:2x8 --codec=qsgd --qsgd_buckets=4 --leaves=8

The step is SGD on square weights. It is written in four ways: with a plain all-reduce; with the codec under `across`;
with weights in shards over a slice's chips, which the loss gathers; and with weights and gradients in shards by
constraints that are left to the compiler. The slices need not be there. Bytes follow from the compiled program and the
ring laws, see `gradcomp_jax.certify`. Exchanges between slices or nodes count as overlapped if they have other work
between start and end. The options of `compiler_options` are used.
"""

import functools
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import gradcomp_jax as gc
from experiments import codecs, command
from gradcomp_jax.certify import Report, absent_mesh, certify, shapes
from gradcomp_jax.compressor import compressor
from gradcomp_jax.picture import picture

FLAGS = flags.FLAGS

codecs.define_flags()
flags.declare_key_flag("codec")  # in --help
FLAGS.set_default("codec", "none,powersgd,randomk,onebit,qsgd,signnorm,topk")
flags.DEFINE_string("target", "cpu:2x4", "Such as v5e:2x4, h100:2x8 or cpu:2x4; see gradcomp_jax.certify.")
flags.DEFINE_integer("slices", 1, "Slices of a TPU.", lower_bound=1)
flags.DEFINE_string("plot", None, "A folder for pictures of the schedules, by codec and way.")
flags.DEFINE_integer("width", 2048, "Rows and columns of a weight.", lower_bound=1)
flags.DEFINE_integer("leaves", 4, "How many weights.", lower_bound=1)
flags.DEFINE_integer("rows", 64, "Rows of a batch on each chip.", lower_bound=1)

AXES = ("node", "local")
Step = tuple[Any, tuple[Any, ...]]


def params_of() -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the weights."""
    return {f"w{i}": jax.ShapeDtypeStruct((FLAGS.width, FLAGS.width), jnp.float32) for i in range(FLAGS.leaves)}


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
    """The loss of a network of layers without biases."""
    for path in sorted(params):
        batch = jax.nn.relu(batch @ params[path])
    return jnp.mean(batch**2)


def laid(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Shapes that lie on the mesh by these specs."""
    on = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(on, tree, specs)


def batch_of(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape of a batch."""
    return laid(mesh, jax.ShapeDtypeStruct((FLAGS.rows * mesh.size, FLAGS.width), jnp.float32), P(AXES))


def plain(mesh: Mesh) -> Step:
    """The step with an all-reduce over all chips."""

    def worker(params: Any, batch: jax.Array) -> Any:
        grads = lax.pmean(jax.grad(loss_fn)(gc.vary(params, AXES), batch), AXES)
        return jax.tree.map(lambda x, g: x - 0.1 * g, params, grads)

    step = jax.shard_map(worker, mesh=mesh, in_specs=(P(), P(AXES)), out_specs=P())
    params = params_of()
    return jax.jit(step, donate_argnums=0), (laid(mesh, params, dict.fromkeys(params, P())), batch_of(mesh))


def across(mesh: Mesh, codec: gc.Compressor) -> Step:
    """The step with `across`, for gradients that each chip has whole."""
    tx = optax.chain(gc.across(codec), optax.sgd(0.1))
    return gc.train_step(loss_fn, tx, mesh, donate=True), shapes(tx, params_of(), batch_of(mesh), mesh)


def in_shards(mesh: Mesh, codec: gc.Compressor) -> Step:
    """The step with `across`, for weights in shards."""
    params = params_of()
    in_shards = dict.fromkeys(params, P("local"))
    tx = optax.chain(gc.across(codec, inside=in_shards), optax.sgd(0.1))
    specs = gc.state_specs(tx, params, in_shards)

    def gathering(params: Any, batch: jax.Array) -> jax.Array:
        whole = {path: lax.all_gather(x, "local", tiled=True) for path, x in params.items()}
        return loss_fn(whole, batch) / mesh.shape["local"]

    def worker(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(gathering)(gc.vary(params, AXES), batch)
        updates, state = tx.update(grads, gc.local_state(state), params)
        return optax.apply_updates(params, updates), gc.global_state(state)

    first = lambda params: gc.global_state(tx.init(params))  # noqa: E731
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    state = jax.eval_shape(on_mesh(first, in_specs=(in_shards,), out_specs=specs), params)
    lie = in_shards, specs
    step = jax.shard_map(worker, mesh=mesh, in_specs=(*lie, P(AXES)), out_specs=lie)
    arguments = laid(mesh, params, in_shards), laid(mesh, state, specs), batch_of(mesh)
    return jax.jit(step, donate_argnums=(0, 1)), arguments


def by_compiler(mesh: Mesh, codec: gc.Compressor) -> Step:
    """The step with weights, gradients and residuals in shards by constraints; the compiler has the inner axis."""
    tx = optax.chain(compressor(codec.codec, codec.settings._replace(axis_name="node")), optax.sgd(0.1))
    params = params_of()
    specs = gc.state_specs(tx, params)
    state = jax.eval_shape(lambda params: gc.init(tx, params, mesh.shape["node"]), params)
    square = (FLAGS.width, FLAGS.width)
    residual = lambda x, spec: P(*spec, "local") if x.shape[-2:] == square else spec  # noqa: E731
    state = laid(mesh, state, jax.tree.map(residual, state, specs))
    arguments = laid(mesh, params, dict.fromkeys(params, P("local"))), state, batch_of(mesh)

    def worker(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        inside = lambda tree: lax.with_sharding_constraint(tree, P("local"))  # noqa: E731
        grads = inside(jax.grad(loss_fn)(gc.vary(params, "node"), inside(batch)))
        updates, state = tx.update(grads, gc.local_state(state), params)
        return optax.apply_updates(params, updates), gc.global_state(state)

    lie = P(), specs
    step = jax.shard_map(worker, mesh=mesh, in_specs=(*lie, P("node")), out_specs=lie, axis_names={"node"})
    out = jax.tree.map(lambda x: x.sharding, arguments[:2])
    return jax.jit(step, out_shardings=out, donate_argnums=(0, 1)), arguments


WAYS: dict[str, Callable[[Mesh, gc.Compressor], Step]] = {
    "across": across,
    "across, weights in shards": in_shards,
    "weights in shards by the compiler": by_compiler,
}


def main() -> None:
    """Prints the table."""
    logging.set_verbosity(logging.ERROR)
    if FLAGS.target.startswith("cpu:"):
        sizes = [int(x) for x in FLAGS.target.removeprefix("cpu:").split("x")]
        jax.config.update("jax_num_cpu_devices", sizes[0] * sizes[-1])
    if FLAGS.plot:
        pathlib.Path(FLAGS.plot).mkdir(parents=True, exist_ok=True)
    try:
        mesh = absent_mesh(FLAGS.target, FLAGS.slices)
    except (ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    table = Table(title=f"MB a chip sends in a step, on {FLAGS.target}, {FLAGS.slices} slice(s)")
    for heading in ("codec", "way", "between", "overlapped", "inside", "temporaries"):
        table.add_column(heading, justify="left" if heading in ("codec", "way") else "right")
    course = codecs.Course(steps_per_epoch=1_000_000, learning_rate=None)
    rows: list[tuple[str, str, Callable[[], Step]]] = [("", "all-reduce", lambda: plain(mesh))]
    for name in FLAGS.codec:
        codec = codecs.from_flags(name, 0, course)
        rows += [(codecs.label(name), what, functools.partial(way, mesh, codec)) for what, way in WAYS.items()]
    options = gc.compiler_options(mesh.devices.flat[0].platform)
    for label, what, make in rows:
        try:
            report = certify(*make(), mesh, compiler_options=options)
        except ValueError as error:  # such as a loop whose length the compiler does not state
            table.add_row(label, what, "", f"not told: {error}")
            continue
        table.add_row(label, what, *told(report))
        if FLAGS.plot:
            name = re.sub(r"\W+", "-", f"{label} {what}".strip())
            picture(report).savefig(pathlib.Path(FLAGS.plot) / f"{name}.png", dpi=110)
    Console(highlight=False, width=110).print(table)


def told(report: Report) -> list[str]:
    """The figures of a report."""
    exchanges = [x.span for x in report.sent if x.link == "between"]
    overlapped = f"{sum(bool(span and span.work) for span in exchanges)} of {len(exchanges)}"
    between, inside = (f"{report.totals[link] / 1e6:.2f}" for link in ("between", "inside"))
    return [between, overlapped, inside, f"{report.temporaries / 1e6:.2f}"]


if __name__ == "__main__":
    codecs.show_settings(sys.argv)
    command.run(main)
