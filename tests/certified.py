"""Programs for `gradcomp_jax.certify`: a step, and one for each thing that it finds."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.certify import shapes

SIZE = 256
PARAMS = {f"w{i}": jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32) for i in range(4)}


def loss_fn(params, batch):
    for path in sorted(params):
        batch = jnp.tanh(batch @ params[path])
    return jnp.mean(batch**2)


CYCLE = gc.gradiveq(16, train_steps=3, compress_steps=3, warmup_steps=1, compress=lambda path, leaf: True)
IN_CYCLES = optax.chain(gc.across(CYCLE), optax.sgd(0.1))


def trained(mesh, codec):
    return stepping(mesh, optax.chain(codec, optax.sgd(0.1)))


def stepping(mesh, tx):
    batch = jax.ShapeDtypeStruct((4 * mesh.size, SIZE), jnp.float32)
    return gc.train_step(loss_fn, tx, mesh), shapes(tx, PARAMS, batch, mesh)


def across(mesh):
    return trained(mesh, gc.across(gc.qsgd(4, min_size=0)))


def in_cycles(mesh):
    return stepping(mesh, IN_CYCLES)


def in_buckets(mesh):
    return trained(mesh, gc.across(gc.none(buckets=4)))


def each_device_all(mesh):
    return trained(mesh, optax.chain(gc.average("local"), gc.qsgd(4, min_size=0, axis_name="node")))


def collective(mesh, dtype, function):
    step = jax.shard_map(
        function, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names), check_vma=False
    )
    lies = NamedSharding(mesh, P(mesh.axis_names))
    return jax.jit(step), (jax.ShapeDtypeStruct((mesh.size * 2**16,), dtype, sharding=lies),)


def int4(mesh):
    return collective(mesh, jnp.int4, lambda x: lax.all_gather(x, "node"))


def int16(mesh):
    return collective(mesh, jnp.int16, lambda x: lax.psum(x, "node"))


def vector(mesh):
    return collective(mesh, jnp.float32, lambda x: lax.psum_scatter(x, "local", tiled=True))


def several(mesh):
    def sums(x):
        return sum(lax.psum(x[i::4] * (i + 1), "node").sum() for i in range(4))[None]

    return collective(mesh, jnp.float32, sums)


def streaming(mesh, codec):
    """A call of local steps beside an exchange of what was moved before them, long enough to be worth overlapping."""
    params = {f"w{i}": jax.ShapeDtypeStruct((2 * SIZE, 2 * SIZE), jnp.float32) for i in range(8)}
    tx = gc.streaming_diloco(optax.sgd(1e-3, momentum=0.9), every=20, fragments=2, delay=5, codec=codec)
    params, state, _ = shapes(tx, params, (), mesh)
    lies = NamedSharding(mesh, P(None, mesh.axis_names))
    batch = jax.ShapeDtypeStruct((5, 4 * mesh.size, 2 * SIZE), jnp.float32, sharding=lies)
    return gc.train_step(loss_fn, tx, mesh, steps=5), (params, state, batch)
