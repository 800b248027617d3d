"""The wire: every collective the library runs, each returning what it cost beside its result.

This is the only file that calls `jax.lax`'s collectives. Each function below that moves data returns
`(result, bits)`, where `bits` is what one worker sends for it by the ring laws, computed from the very
operands handed to the collective, so that a codec cannot declare less than it sends:

| collective | bits one worker sends, operand of p bits, n workers |
|---|---|
| `mean`, `mean_front`, `from_first` (all-reduce) | 2 (n - 1) / n p |
| `gather` (all-gather) | (n - 1) p |

All of it works unchanged under `vmap(axis_name=...)`, `pmap` and `shard_map`, with `check_vma` on or off.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.metrics import bit_pair

AxisName = str | tuple[str, ...]
T = TypeVar("T")

# What `mean_front` rounds up by at most: 17 sizes from 1/32 to 1, each with a collective to compile.
FRONT_STEP = 1.25


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """`axis_name` as a tuple of mesh axis names."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def workers(axis_name: AxisName) -> int:
    """How many workers there are along `axis_name`; raises ValueError where no such axis is bound."""
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: call this inside shard_map, pmap or "
            f"vmap(axis_name={axis_name!r}), or through train_step or simulate, with the codec's axis_name "
            "equal to the mesh's axis"
        ) from error


def worker_index(axis_name: AxisName) -> jax.Array:
    """This worker's index along `axis_name`, int32."""
    return lax.axis_index(axis_name)


def _varying(x: Any) -> frozenset[str]:
    """The mesh axes along which `x` may differ, where shard_map tracks that; else empty."""
    return jax.typeof(x).mat.varying


def tracked(axis_name: AxisName) -> bool:
    """Whether types here tell what differs along `axis_name`: inside `shard_map(check_vma=True)` only."""
    return set(axis_names(axis_name)) <= _varying(lax.axis_index(axis_name))


def known_equal(x: Any, axis_name: AxisName) -> bool:
    """Whether the types prove that `x` is the same along one of the axes of `axis_name`."""
    return tracked(axis_name) and not set(axis_names(axis_name)) <= _varying(x)


def known_different(x: Any, axis_name: AxisName) -> bool:
    """Whether the types say that `x` may differ along one of the axes of `axis_name`."""
    return bool(set(axis_names(axis_name)) & _varying(x))


def vary(tree: T, axis_name: AxisName) -> T:
    """Marks every leaf of `tree` as this worker's own, so that `jax.grad` with respect to it stays local.

    Under `shard_map(check_vma=True)` the gradient with respect to a replicated parameter is summed over
    the workers before anyone sees it. `jax.grad(loss)(vary(params, "data"), batch)` gives the worker's own
    gradient in every context; where types are not tracked this function returns `tree` as it is.

    Args:
      tree: arrays, usually the parameters.
      axis_name: the mesh axis, or axes, over which the batch is split.

    Returns:
      The same values, of a type that varies along `axis_name`.

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


def require_local(leaves: Sequence[tuple[str, Any]], axis_name: AxisName) -> None:
    """Raises ValueError, by name of the leaf, for a gradient that the types show to be reduced already.

    Types are tracked under `shard_map(check_vma=True)` only; elsewhere nothing can be seen here.
    """
    for path, leaf in leaves:
        if known_equal(leaf, axis_name):
            raise ValueError(
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


def mean(tree: T, axis_name: AxisName) -> tuple[T, int]:
    """All-reduces every leaf of `tree` to its mean over the workers; see the module for the bits."""
    n = workers(axis_name)
    return lax.pmean(tree, axis_name), _all_reduce_bits(tree, n)


def _all_reduce_bits(tree: Any, n: int) -> int:
    payload = sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return -(-2 * (n - 1) * payload // n)


def mean_front(
    buffer: jax.Array, length: jax.Array, least: int, most: int, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """All-reduces the first `length` elements of `buffer` to their mean, and little more than those.

    Shapes are static, so one of some fixed sizes from `least` to `most` is sent, the smallest that holds them;
    each is at most `FRONT_STEP` times the one before.

    Args:
      buffer: a vector of at least `most` elements.
      length: int32, the same on all workers, from `least` to `most`.
      least: the smallest length there can be, at least 1.
      most: the largest.
      axis_name: the axis of the workers.

    Returns:
      A vector of the buffer's size, zero beyond what was sent; and the bits this worker sent, as a pair.
    """
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, int(sizes[-1] * FRONT_STEP))))

    def send(size: int):
        received, bits = mean(buffer[:size], axis_name)
        return jnp.pad(received, (0, buffer.size - size)), bit_pair(bits)

    smallest = jnp.searchsorted(jnp.array(sizes, jnp.int32), length)
    return lax.switch(smallest, [functools.partial(send, size) for size in sizes])


def from_first(tree: T, axis_name: AxisName) -> tuple[T, int]:
    """The first worker's `tree`, on all; by an all-reduce, with its bits."""
    n = workers(axis_name)
    first = worker_index(axis_name) == 0
    mine = jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), tree)
    return lax.psum(mine, axis_name), _all_reduce_bits(tree, n)


def gather(x: jax.Array, axis_name: AxisName) -> tuple[jax.Array, int]:
    """All-gathers `x` [...] into [n, ...], the same on all workers; see the module for the bits."""
    n = workers(axis_name)
    # vmap knows no `to`; what it gathers is the same everywhere by itself.
    to = "invarying" if tracked(axis_name) else "varying"
    return lax.all_gather(x, axis_name, to=to), 8 * (n - 1) * x.size * x.dtype.itemsize


def gather_mean(payload: jax.Array, decode: Callable[[jax.Array], T], axis_name: AxisName) -> tuple[T, int]:
    """Gathers every worker's `payload` and averages what they decode to.

    The payloads are decoded one after another, so memory holds one decoded copy however many workers
    there are.

    Args:
      payload: this worker's bytes, uint8 [p].
      decode: payload [p] -> tensors.
      axis_name: the axis of the workers.

    Returns:
      The mean of the decoded tensors, and the bits this worker sent.
    """
    payloads, bits = gather(payload, axis_name)

    def add(total, received):
        return jax.tree.map(jnp.add, total, decode(received)), None

    total, _ = lax.scan(add, decode(payloads[0]), payloads[1:])
    return jax.tree.map(lambda x: x / payloads.shape[0], total), bits


def max_(tree: T, axis_name: AxisName) -> T:
    """The elementwise maximum of every leaf over the workers, the same on all.

    For the step's model state, which `wire_bits` leaves out; hence alone here without bits.
    """
    return lax.pmax(tree, axis_name)


AGGREGATIONS = {"gather": gather_mean}


def aggregation(codec: str, aggregate: str) -> Callable[..., tuple[Any, int]]:
    """The function that averages encoded payloads as `aggregate` says; ValueError where it cannot.

    Args:
      codec: the name of a codec that encodes and decodes, hence is not linear.
      aggregate: a key of `AGGREGATIONS`.
    """
    if aggregate in AGGREGATIONS:
        return AGGREGATIONS[aggregate]
    known = ", ".join(map(repr, AGGREGATIONS))
    if aggregate == "psum":
        raise ValueError(f"codec {codec!r} is not linear: aggregate='psum' would add packed codes; use {known}")
    raise ValueError(f"aggregate={aggregate!r} is not known for codec {codec!r}; use {known}")
