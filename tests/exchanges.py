"""A codec's exchange by itself: on values, by vmap, and on shapes, of which only the bits are of interest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradcomp_jax as gc
from gradcomp_jax.compressor import flatten
from gradcomp_jax.metrics import bit_pair
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


def exchanged(tx: gc.Compressor, tensors: dict[str, np.ndarray], state: Any = None, **extra_args: Any) -> Got:
    """The exchange of tensors [workers, ...] by path; without a residual."""

    def worker(tensors):
        local = tx.codec.init(tensors) if state is None else state
        return tx.codec.exchange(tensors, local, "data", **extra_args)._replace(bits=())

    got = jax.device_get(jax.jit(jax.vmap(worker, axis_name="data"))(tensors))
    return Got({path: x[0] for path, x in got.mean.items()}, got.own, got.state)


def declared(tx: gc.Compressor, shapes: Any, workers: int) -> int:
    """The bits that a worker sends for a tree of shapes, dense leaves included; gradients are not computed.

    Of a codec under error feedback, whose residual tells what it compresses.
    """
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=trees.is_shape)
    leaves, _ = flatten(params)
    compressed = jax.eval_shape(tx.init, params).residual.value
    dense = sum(x.size for path, x in leaves.items() if path not in compressed)
    told = []

    def bits(rows):
        got = tx.codec.exchange(rows, tx.codec.init(rows), "data")
        told.append(got.bits)
        return bit_pair(got.bits)

    each = jax.vmap(bits, axis_name="data")
    rows = {path: jax.ShapeDtypeStruct((workers, *x.shape), jnp.float32) for path, x in compressed.items()}
    jax.eval_shape(each, rows)
    if not isinstance(told[0], int):  # then all but the bits is left out of the program
        high, low = jax.jit(each)({path: np.zeros(x.shape, x.dtype) for path, x in rows.items()})[0]
        told[0] = int(high) << 32 | int(low)
    return told[0] + -(-2 * (workers - 1) * 32 * dense // workers)
