"""A codec's exchange by itself: on values, by vmap, and on shapes, of which only the bits are of interest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradcomp_jax as gc
from gradcomp_jax.compressor import _marked, _unmarked
from gradcomp_jax.contract import dense
from gradcomp_jax.exchange.bits import bit_pair
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.exchange.plan import flatten, plan, salt
from gradcomp_jax.exchange.rounds import Bucket, Exchange
from tests import trees


class Got(NamedTuple):
    """What an exchange gave, as numpy arrays by path.

    Attributes:
      mean: of the first worker.
      own: [workers, ...].
      state: of each worker.
    """

    mean: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    state: Any


def first_state(tx: gc.Compressor, tensors: dict[str, Any]) -> Any:
    """The codec's first state for tensors by path, all of which it compresses, as an exchange has it."""
    return tx.codec.start({path: tx.codec.init(path, x, salt(path)) for path, x in tensors.items()})


def marked(tx: gc.Compressor, state: Any) -> Any:
    """The state of an exchange, where what differs between workers is marked."""
    return _marked(tx.codec, state, tx.settings, None)


def whole(tensors: dict[str, Any], riders: Any = ()) -> Bucket:
    """Tensors by path, and riders, as one bucket."""
    return Bucket.of({path: (x,) for path, x in tensors.items()}, riders)


def exchanged(
    tx: gc.Compressor,
    tensors: dict[str, np.ndarray],
    state: Any = None,
    feedback: bool = False,
    learning_rate: Any = None,
) -> Got:
    """The exchange of tensors [workers, ...] by path; without a residual."""
    exchange = Exchange(tx.codec, tx.settings.aggregate, Wire("data"), feedback)

    def worker(tensors):
        local = first_state(tx, tensors) if state is None else _unmarked(state, tx.settings)
        got = exchange([whole(tensors)], local, learning_rate)
        return got.mean, {path: dense(x) for path, x in got.own.items()}, marked(tx, got.state)

    mean, own, state = jax.device_get(jax.jit(jax.vmap(worker, axis_name="data"))(tensors))
    return Got({path: x[0] for path, x in mean.items()}, own, state)


def means(tx: gc.Compressor, x: np.ndarray, states: Any) -> np.ndarray:
    """The mean of x [workers, ...] by each of some states [draws, ...]; without feedback."""
    exchange = Exchange(tx.codec, tx.settings.aggregate, Wire("data"))

    def step(state):
        worker = lambda x: exchange([whole({"w": x})], state).mean["w"]  # noqa: E731
        return jax.vmap(worker, axis_name="data")(x)[0]

    return np.asarray(jax.jit(jax.vmap(step))(states), np.float64)


def declared(tx: gc.Compressor, shapes: Any, workers: int) -> int:
    """The bits that a worker sends for a tree of shapes, dense leaves included; gradients are not computed."""
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=trees.is_shape)
    leaves, the = flatten(params)[0], plan(tx.codec, tx.settings, params)
    exchange = Exchange(tx.codec, tx.settings.aggregate, Wire("data"), tx.settings.error_feedback is not None)
    told = []

    def bits(leaves):
        tensors = {path: leaves[path] for path in the.compressed}
        riders = [leaves[path] for path in the.dense]
        got = exchange([whole(tensors, riders)], first_state(tx, tensors))
        told.append(got.bits)
        return bit_pair(got.bits)

    each = jax.vmap(bits, axis_name="data")
    leaves = {path: jax.ShapeDtypeStruct((workers, *x.shape), jnp.float32) for path, x in leaves.items()}
    jax.eval_shape(each, leaves)
    if not isinstance(told[0], int):  # then all but the bits is left out of the program
        high, low = jax.jit(each)({path: np.zeros(x.shape, x.dtype) for path, x in leaves.items()})[0]
        told[0] = int(high) << 32 | int(low)
    return told[0]
