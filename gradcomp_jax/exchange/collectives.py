"""The wire: every collective that the library runs. Each returns its cost beside its result.

This is the only file that calls `jax.lax`'s collectives. Each method of `Wire` that moves data returns
`(result, bits)`. `bits` is the number of bits that one worker sends for it under the ring laws. It is computed from
the very operands of the collective, so that no method can declare less than it sends:

| collective | bits that one worker sends, operand of p bits, n workers |
|---|---|
| `total`, `largest`, `all_`, `from_first` (all-reduce) | 2 (n - 1) / n p |
| `ring_total` (n - 1 permutes of p / n, an all-gather of p / n) | 2 (n - 1) / n p |
| `gather` (all-gather) | (n - 1) p |
| `scatter` (all-to-all) | (n - 1) / n p |
| `around_ring` (n - 1 permutes) | (n - 1) p |
| `sum_shards` (reduce-scatter) | (n - 1) / n p |
| `join_shards` (all-gather) | (n - 1) p |

All of it works unchanged under `vmap(axis_name=...)`, `pmap` and `shard_map`, with `check_vma` on or off.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.contract import AlreadyReducedError, AxisName
from gradcomp_jax.exchange.bits import Bits, bit_pair
from gradcomp_jax.views import always, filled, platform

T = TypeVar("T")

# On TPUs vectors lie in tiles of TILE elements, short ones in lanes of LANES. A gather of a vector that fills no whole
# number of tiles becomes an all-reduce of the gathered vector, which sends twice as much, or it puts each byte into a
# word of its own. The compiler itself fills up vectors that are summed between slices.
TILE, LANES = 1024, 128

_ordering = contextvars.ContextVar("ordering", default=False)


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """In this context `after` makes collectives wait for one another, for workers that are CPU devices of one process.

    Each device starts its collectives in the order of the schedule, but a conditional or loop counts as started with
    its first operation. The next collective may run beside those inside, and on another device before them. All meet
    under one key, so they take each other's messages: the process dies, hangs, or goes on with wrong numbers (jax 0.10
    to 0.12). Only data can order them. No flag of XLA's scheduler does, and `lax.optimization_barrier` is gone before
    there is a schedule.
    """
    token = _ordering.set(True)
    try:
        yield
    finally:
        _ordering.reset(token)


_sums_only = contextvars.ContextVar("sums_only", default=False)


@contextlib.contextmanager
def sums_only() -> Iterator[None]:
    """In this context gathers, shuffles and rings are refused: the compiler makes vmap's send more than is counted."""
    token = _sums_only.set(True)
    try:
        yield
    finally:
        _sums_only.reset(token)


def _require_free() -> None:
    if _sums_only.get():
        raise ValueError(
            "simulate is given a batch that lies on several devices, and a codec in tx gathers codes, shuffles them, "
            "or passes them in a ring: XLA would send more than that, up to the whole gradients. Use "
            "train_step(loss_fn, tx, mesh), which is called alike, or a codec that sums, such as powersgd, randomk, "
            "or qsgd(shared_scale=True)"
        )


def after(tree: T, results: Any) -> T:
    """`tree`, so that collectives that send it wait for `results`; outside `in_order` nothing waits.

    Use it for collectives after a conditional or loop that contains collectives, and for those before one, if no data
    leads from one to the other.

    Args:
      tree: arrays; their values do not change.
      results: the results of the earlier collectives. Leaves that differ between workers are ignored.
    """
    first = [jnp.ravel(x)[0] for x in jax.tree.leaves(results) if x.size and not _varying(x)]
    if not _ordering.get() or not first:
        return tree
    done = always(first)
    return jax.tree.map(lambda x: jnp.where(done, x, jnp.zeros_like(x)), tree)


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """`axis_name` as a tuple of mesh axis names."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def workers(axis_name: AxisName) -> int:
    """The number of workers along `axis_name`; raises ValueError if no such axis is bound."""
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: call this inside shard_map, pmap or "
            f"vmap(axis_name={axis_name!r}), or through train_step, data_parallel or simulate, with the codec's "
            "axis_name equal to the mesh's axis"
        ) from error


def worker_index(axis_name: AxisName) -> jax.Array:
    """This worker's index along `axis_name`, int32."""
    return lax.axis_index(axis_name)


def _varying(x: Any) -> frozenset[str]:
    """The mesh axes along which `x` may differ, where shard_map tracks that; else empty."""
    return jax.typeof(x).mat.varying


def tracked(axis_name: AxisName) -> bool:
    """Whether types tell which values differ along `axis_name`: only inside `shard_map(check_vma=True)`."""
    return set(axis_names(axis_name)) <= _varying(lax.axis_index(axis_name))


def known_equal(x: Any, axis_name: AxisName) -> bool:
    """Whether the types prove that `x` is the same along one of the axes of `axis_name`."""
    return tracked(axis_name) and not set(axis_names(axis_name)) <= _varying(x)


def known_different(x: Any, axis_name: AxisName) -> bool:
    """Whether the types say that `x` may differ along one of the axes of `axis_name`."""
    return bool(set(axis_names(axis_name)) & _varying(x))


def vary(tree: T, axis_name: AxisName) -> T:
    """Marks every leaf of `tree` as this worker's own, so that `jax.grad` with respect to it stays local.

    Under `shard_map(check_vma=True)` jax sums the gradient with respect to a replicated parameter over the workers.
    `jax.grad(loss)(vary(params, "data"), batch)` gives the worker's own gradient in every context. If types are not
    tracked, this function returns `tree` as it is.

    Args:
      tree: arrays, usually the parameters.
      axis_name: the mesh axis, or axes, over which the batch is split.

    Returns:
      The same values, with a type that varies along `axis_name`.

    Raises:
      ValueError: no such axis is bound.
    """
    workers(axis_name)
    if not tracked(axis_name):
        return tree

    def leaf(x):
        missing = tuple(name for name in axis_names(axis_name) if name not in _varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree)


def vary_as(x: jax.Array, like: Any) -> jax.Array:
    """`x`, with a type that varies over the mesh like the type of `like`."""
    missing = tuple(sorted(_varying(like) - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def require_local(leaves: Sequence[tuple[str, Any]], axis_name: AxisName) -> None:
    """Raises AlreadyReducedError, by name of the leaf, for a gradient that the types show to be reduced already.

    Types are tracked only under `shard_map(check_vma=True)`; elsewhere this check sees nothing.
    """
    for path, leaf in leaves:
        if known_equal(leaf, axis_name):
            raise AlreadyReducedError(
                f"gradient leaf {path!r} is already reduced over axis {axis_name!r}: shard_map sums the "
                "gradients of replicated parameters, and reducing them again would multiply them by the "
                f"number of workers; use jax.grad(loss)(vary(params, {axis_name!r}), batch), or train_step, and "
                "put wrappers such as optax.MultiSteps after the codec, not around it"
            )


def require_same_elsewhere(leaves: Sequence[tuple[str, Any]], axis_name: AxisName) -> None:
    """Raises ValueError, by name of the leaf, for a gradient that differs along a mesh axis beside `axis_name`.

    A codec's state would then differ along it too, and be stored as if it did not.
    """
    for path, leaf in leaves:
        further = sorted(_varying(leaf) - set(axis_names(axis_name)))
        if further:
            names = ", ".join(map(repr, further))
            raise ValueError(
                f"gradient leaf {path!r} differs along mesh axis {names} too, beside axis_name={axis_name!r}, and the "
                "codec's state would differ along it and be stored as if it did not: for an axis of workers, name it "
                f"in axis_name or put average({names}) before the codec, or the updates still differ between the "
                "workers; for an axis of sharded parameters, leave it to the compiler, with shard_map's axis_names= "
                "the workers' axes alone"
            )


def _size_bits(tree: Any) -> int:
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _all_reduce_bits(tree: Any, n: int) -> int:
    return -(-2 * (n - 1) * _size_bits(tree) // n)


@dataclasses.dataclass(frozen=True)
class Wire:
    """The link between the workers along an axis. All data goes through its methods.

    Attributes:
      axis: the mesh axis, or axes, of the workers.
      fast: the axis of the chips of a worker (a slice or node), where each chip sees a shard; None: a worker is one
        device.
    """

    axis: AxisName
    fast: AxisName | None = None

    @property
    def workers(self) -> int:
        """The number of workers; raises ValueError if no such axis is bound."""
        return workers(self.axis)

    @property
    def index(self) -> jax.Array:
        """This worker's index, int32."""
        return lax.axis_index(self.axis)

    @property
    def inside(self) -> "Wire":
        """The link between the chips of a worker."""
        assert self.fast is not None
        return dataclasses.replace(self, axis=self.fast, fast=None)

    @property
    def shards(self) -> int:
        """The number of chips of a worker."""
        return 1 if self.fast is None else workers(self.fast)

    def own_key(self, key: jax.Array) -> jax.Array:
        """A random key that no other worker or chip has."""
        key = jax.random.fold_in(key, self.index)
        return key if self.fast is None else jax.random.fold_in(key, self.inside.index)

    def total(self, tree: T) -> tuple[T, int]:
        """All-reduces every leaf to its sum. Integers wrap: their type must hold the sum."""
        return self._all_reduce(self._sum, tree)

    def ring_total(self, x: jax.Array) -> tuple[jax.Array, int]:
        """The sum of a vector, added hop by hop in a ring of our own instead of the platform's all-reduce."""
        n = self.workers
        if n == 1 or not x.size:
            return self._sum(x), 0  # for its type
        parts = jnp.pad(x, (0, -x.size % n)).reshape(n, -1)
        mine, _, passing = self.around_ring(parts, lambda part: (part, ()), lambda got, part: (got + part, ()))
        sums, gathering = self.gather(mine)
        return of_ring(sums).reshape(-1)[: x.size], passing + gathering

    def around_ring(
        self, parts: Any, first: Callable[[Any], tuple[T, Any]], hop: Callable[[T, Any], tuple[T, Any]]
    ) -> tuple[T, Any, int]:
        """The first half of a ring all-reduce (GradiVeQ's Algorithm 1): each part passes all workers once.

        Worker w begins with part w. Then n - 1 times it receives a message from its neighbour w - 1, applies `hop` to
        it, and sends the result on. So it ends with part w + 1, which has passed all workers.

        Args:
          parts: arrays [n, ...], this worker's own n parts.
          first: this worker's part -> (message, output).
          hop: (message received, this worker's part) -> (message, output).

        Returns:
          The message of part w + 1, see `of_ring`; the outputs of all parts, [n, ...]; the bits that this worker sent.
        """
        _require_free()
        n = self.workers
        # Part (w - i) mod n is the i-th in this order; the map is its own inverse.
        order = (self.index - jnp.arange(n, dtype=jnp.int32)) % n
        ordered = jax.tree.map(lambda x: x[order], parts)
        message, output = first(jax.tree.map(lambda x: x[0], ordered))

        def turn(message, part):
            return hop(self._pass_on(message), part)

        message, outputs = self.scan(turn, message, jax.tree.map(lambda x: x[1:], ordered))
        outputs = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more])[order], output, outputs)
        return message, outputs, (n - 1) * _size_bits(message)

    def gather(self, x: jax.Array) -> tuple[jax.Array, int]:
        """All-gathers a vector `x` [k] into [n, k], the same on all workers."""
        _require_free()
        sent = filled(x, -(-x.size // TILE) * TILE) if platform() == "tpu" else x
        return self._all_gather(sent)[:, : x.size], (self.workers - 1) * _size_bits(sent)

    def scatter(self, x: jax.Array) -> tuple[jax.Array, int]:
        """Sends row j of `x` [n, ...] to worker j: gives the rows that all sent to this worker, [n, ...] by sender."""
        _require_free()
        n = self.workers
        return self._all_to_all(x), (n - 1) * _size_bits(x) // n

    def largest(self, tree: T) -> tuple[T, int]:
        """The elementwise maximum of every leaf over the workers, the same on all; an all-reduce."""
        return self._all_reduce(self._max, tree)

    def _all_reduce(self, reduce: Callable[[T], T], tree: T) -> tuple[T, int]:
        sent = jax.tree.map(self._as_sent, tree)
        got = jax.tree.map(lambda x, like: x[: like.size] if x.shape != like.shape else x, reduce(sent), tree)
        return got, _all_reduce_bits(jax.tree.map(self._tiled, sent), self.workers)

    @property
    def _fills(self) -> bool:
        """Whether the compiler fills up the operands of sums: between the slices of TPUs."""
        return self.fast is not None and platform() == "tpu"

    def _as_sent(self, x: jax.Array) -> jax.Array:
        """A vector to be summed, filled up like the compiler does it, so that it counts as the bits that travel."""
        if not self._fills or x.ndim != 1:
            return x
        unit = TILE if x.size > LANES else LANES
        return filled(x, -(-x.size // unit) * unit)

    def _tiled(self, x: jax.Array) -> Any:
        """An array to be summed, in the shape to which the compiler will fill it up."""
        if not self._fills or x.ndim < 2:
            return x
        *lead, r, c = x.shape
        rows = TILE // LANES
        return jax.ShapeDtypeStruct((*lead, -(-r // rows) * rows, -(-c // LANES) * LANES), x.dtype)

    def all_(self, flag: jax.Array) -> tuple[jax.Array, int]:
        """Whether `flag`, a truth value, holds on all workers; an all-reduce of an int32."""
        fails, bits = self.largest(1 - flag.astype(jnp.int32))
        return fails == 0, bits

    def widest(self, number: jax.Array) -> tuple[jax.Array, int]:
        """The largest number of a worker's chips, so that all choose one branch; and the bits a chip sent inside."""
        return (number, 0) if self.fast is None else self.inside.largest(number)

    def sum_shards(self, x: jax.Array, axis: int = 0) -> tuple[jax.Array, int]:
        """This worker's part, along an axis, of the sum of `x`; a reduce-scatter."""
        n = self.workers
        return self._sum_scatter(x, axis), (n - 1) * _size_bits(x) // n

    def join_shards(self, x: jax.Array, axis: int = 0) -> tuple[jax.Array, int]:
        """The inverse of `sum_shards`, without a sum: all workers' parts joined along an axis, the same on all."""
        return self._join(x, axis), (self.workers - 1) * _size_bits(x)

    def from_first(self, x: jax.Array) -> tuple[jax.Array, int]:
        """The first worker's array, on all workers; an all-reduce."""
        return self.total(jnp.where(self.index == 0, x, jnp.zeros_like(x)))

    def front(
        self,
        collective: Callable[[jax.Array], tuple[jax.Array, Bits]],
        buffer: jax.Array,
        length: jax.Array,
        sizes: Sequence[int],
    ) -> tuple[jax.Array, jax.Array, int]:
        """Sends the first `length` elements of `buffer`'s last axis through a collective, and little more than those.

        Shapes are static, so the collective sends one of a few fixed sizes: the smallest that holds the elements.

        Args:
          collective: the function that sends: an array -> (an array with the same last axis, bits).
          buffer: an array whose last axis is at least as long as the largest size.
          length: int32, the same on all workers, at most the largest size.
          sizes: the fixed sizes, rising, each at least 1.

        Returns:
          The collective's result, its last axis as long as the buffer's and zero beyond the sent size; the bits that
          this worker sent, as a pair; and the bits that a chip of it sent inside.
        """

        def send(size: int):
            received, bits = collective(buffer[..., :size])
            padding = [(0, 0)] * (received.ndim - 1) + [(0, buffer.shape[-1] - size)]
            return jnp.pad(received, padding), bit_pair(bits)

        longest, inside = self.widest(length)
        smallest = jnp.sum(jnp.array(sizes, jnp.int32) < longest, dtype=jnp.int32)
        return *self.switch(smallest, [functools.partial(send, size) for size in sizes]), inside

    # Each method below calls one function of jax, and no other method calls it: a recorder overrides these.

    def switch(self, index: jax.Array, branches: Sequence[Callable[[], T]]) -> T:
        """Runs one of several branches with collectives; the index is the same on all workers."""
        return lax.switch(index, branches)

    def scan(self, turn: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        """A loop whose turns run collectives."""
        return lax.scan(turn, carry, xs)

    def _sum(self, tree: T) -> T:
        return lax.psum(tree, self.axis)

    def _max(self, tree: T) -> T:
        return lax.pmax(tree, self.axis)

    def _all_gather(self, x: jax.Array) -> jax.Array:
        # vmap knows no `to`; its gathered arrays are the same everywhere by themselves.
        return lax.all_gather(x, self.axis, to="invarying" if tracked(self.axis) else "varying")

    def _sum_scatter(self, x: jax.Array, axis: int) -> jax.Array:
        return lax.psum_scatter(x, self.axis, scatter_dimension=axis, tiled=True)

    def _join(self, x: jax.Array, axis: int) -> jax.Array:
        to = "invarying" if tracked(self.axis) else "varying"
        return lax.all_gather(x, self.axis, axis=axis, tiled=True, to=to)

    def _all_to_all(self, x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, self.axis, 0, 0)

    def _pass_on(self, tree: T) -> T:
        """Each worker's arrays to the next worker."""
        to_next = [(worker, (worker + 1) % self.workers) for worker in range(self.workers)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, to_next), tree)


def of_ring(gathered: jax.Array) -> jax.Array:
    """The workers' messages after `around_ring`, gathered [n, ...] by worker, put in the order of parts."""
    return jnp.roll(gathered, 1, axis=0)
