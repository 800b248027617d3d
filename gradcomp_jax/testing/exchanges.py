"""A codec's exchange by itself: on values, under vmap; and on shapes, for its bits alone."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax import random
from gradcomp_jax.coder import Coder
from gradcomp_jax.compressor import Compressor, _marked, _unmarked
from gradcomp_jax.contract import Say, dense
from gradcomp_jax.exchange.bits import bit_pair
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.exchange.plan import flatten, plan, salt
from gradcomp_jax.exchange.rounds import Bucket, Exchange
from gradcomp_jax.exchange.shards import encode_all, grouped
from gradcomp_jax.testing import contexts, trees
from gradcomp_jax.testing.recorder import Recorder, Replay
from gradcomp_jax.wire.packing import pack_arrays


class Got(NamedTuple):
    """The results of an exchange, as numpy arrays by path.

    Attributes:
      mean: the first worker's mean.
      own: the workers' `own`, [workers, ...].
      state: each worker's state.
    """

    mean: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    state: Any


class Step(NamedTuple):
    """One step of an exchange by itself, as numpy arrays.

    Attributes:
      state: the global state before the step.
      after: the global state after the step.
      mean: each worker's mean, by path.
      own: each worker's `own`, by path.
      rode: the mean of the riders on each worker; None without riders.
      bits: the declared bits, a (high, low) pair for each worker.
      given: the operands that each worker handed to the collectives, as a `Recorder` keeps them.
    """

    state: Any
    after: Any
    mean: Any
    own: Any
    rode: Any
    bits: Any
    given: Any


def first_state(tx: Compressor, tensors: dict[str, Any]) -> Any:
    """The codec's first state for tensors by path, in the form for an exchange; the codec compresses all of them."""
    return tx.codec.start({path: tx.codec.init(path, x, salt(path)) for path, x in tensors.items()})


def marked(tx: Compressor, state: Any) -> Any:
    """The state of an exchange, with marks on the parts that differ between workers."""
    return _marked(tx.codec, state, tx.settings, None)


def whole(tensors: dict[str, Any], riders: Any = ()) -> Bucket:
    """Tensors by path, and riders, as one bucket."""
    return Bucket.of({path: (x,) for path, x in tensors.items()}, riders)


def exchanged(
    tx: Compressor,
    tensors: dict[str, np.ndarray],
    state: Any = None,
    feedback: bool = False,
    learning_rate: Any = None,
) -> Got:
    """Exchanges tensors [workers, ...] by path, without a residual."""
    exchange = Exchange(tx.codec, tx.settings.aggregate, Wire("data"), feedback)

    def worker(tensors):
        local = first_state(tx, tensors) if state is None else _unmarked(state, tx.settings)
        got = exchange([whole(tensors)], local, learning_rate)
        return got.mean, {path: dense(x) for path, x in got.own.items()}, marked(tx, got.state)

    mean, own, state = jax.device_get(jax.jit(jax.vmap(worker, axis_name="data"))(tensors))
    return Got({path: x[0] for path, x in mean.items()}, own, state)


def means(tx: Compressor, x: np.ndarray, states: Any) -> np.ndarray:
    """The mean of x [workers, ...] from each of some states [draws, ...]; without feedback."""
    exchange = Exchange(tx.codec, tx.settings.aggregate, Wire("data"))

    def step(state):
        worker = lambda x: exchange([whole({"w": x})], state).mean["w"]  # noqa: E731
        return jax.vmap(worker, axis_name="data")(x)[0]

    return np.asarray(jax.jit(jax.vmap(step))(states), np.float64)


def declared(tx: Compressor, shapes: Any, workers: int) -> int:
    """The bits that a worker sends for a tree of shapes, with dense leaves; gradients are not computed."""
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=trees.is_shape)
    leaves, the = flatten(params)[0], plan(tx.codec, tx.settings, params)
    exchange = Exchange(tx.codec, tx.settings.aggregate, Wire("data"), tx.settings.error_feedback is not None)
    told: list[Any] = []

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


def recorded(tx: Compressor) -> Callable[..., Any]:
    """An exchange that returns the operands of its collectives: (tensors by path, riders, state) -> `Step`."""

    def worker(tensors: Any, riders: Any, state: Any) -> Step:
        wire = Recorder("data")
        got = _exchange(tx, wire)([whole(tensors, riders)], _unmarked(state, tx.settings))
        own = {path: dense(x) for path, x in got.own.items()}
        rode = got.rode[0][0] if riders else None
        return Step((), marked(tx, got.state), got.mean, own, rode, bit_pair(got.bits), wire.given)

    return worker


def replayed(tx: Compressor) -> Callable[..., Any]:
    """An exchange that replays another's operands: (given, tensors by path, state) -> mean, state."""

    def worker(given: list, tensors: Any, state: Any) -> Any:
        wire = Replay("data", given=list(given))
        got = _exchange(tx, wire)([whole(tensors)], _unmarked(state, tx.settings))
        assert not wire.given, "less was asked for than before"
        return got.mean, marked(tx, got.state)

    return worker


def _exchange(tx: Compressor, wire: Wire) -> Exchange:
    return Exchange(tx.codec, tx.settings.aggregate, wire, tx.settings.error_feedback is not None)


class Size(NamedTuple):
    """The declared and the real size of one message.

    Attributes:
      shape: the shape of the encoded part.
      said: the bytes that `Coder.size` declares.
      packed: the bytes of the message.
    """

    shape: tuple[int, ...]
    said: int
    packed: int


def sizes_of(tx: Compressor, shapes: dict[str, tuple[int, ...]], workers: int) -> list[Size]:
    """The sizes of the messages of one step's codes; none where messages have fronts of several sizes."""
    found: list[Size] = []

    class Listening(Exchange):
        __slots__ = ()

        def _codes(self, says: list[Say], route: Any, *rest: Any) -> Any:
            if route is not None:
                shards = 1 if route.way == "gather" else workers
                found.extend(_sizes(self.codec.coder.under(self.feedback), says, shards))
            return super()._codes(says, route, *rest)

    def worker(tensors: Any) -> None:
        Listening(*_exchange(tx, Wire("data")))([whole(tensors)], first_state(tx, tensors))

    tensors = {path: jax.ShapeDtypeStruct((workers, *shape), jnp.float32) for path, shape in shapes.items()}
    jax.eval_shape(jax.vmap(worker, axis_name="data"), tensors)
    return found


def _sizes(coder: Coder, says: list[Say], shards: int) -> Iterator[Size]:
    key = random.step_key(0, 0)
    ys = coder.lay_all([say.x for say in says])
    for group in grouped(coder, ys, shards, key, [None] * len(ys)):
        if coder.fronts(group.shape) is None:
            packed = jax.eval_shape(lambda group=group: pack_arrays([encode_all(group)], 1))
            yield Size(group.shape, coder.size(group.shape), packed.shape[-1])


def steps_of(tx: Compressor, tensors: dict[str, np.ndarray], riders: np.ndarray | None = None) -> list[Step]:
    """The steps of a codec alone, on tensors [steps, workers, ...] by path; riders: [steps, workers, ...], or None."""
    steps, workers = next(iter(tensors.values())).shape[:2]
    zeros = {path: np.zeros(x.shape[2:], x.dtype) for path, x in tensors.items()}
    state = jax.device_get(jax.jit(lambda x: marked(tx, first_state(tx, x)))(zeros))
    axes = contexts.worker_axes(state)
    state = contexts.map_state(lambda x: np.broadcast_to(x, (workers, *x.shape)), lambda x: x, state)
    step = jax.jit(jax.vmap(recorded(tx), (0, 0, axes), Step(0, axes, 0, 0, 0, 0, 0), axis_name="data"))
    done = []
    for t in range(steps):
        riding = [] if riders is None else [riders[t]]
        got = jax.device_get(step({path: x[t] for path, x in tensors.items()}, riding, state))
        done.append(got._replace(state=state))
        state = got.after
    return done
