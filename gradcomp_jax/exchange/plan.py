"""What is decided from shapes alone: which leaves are compressed, by which way codes travel, what rides with them."""

import collections
import logging
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax.arguments import shown
from gradcomp_jax.coder import Coder, Switched
from gradcomp_jax.contract import AxisName, Codec, Predicate, Uncompressed
from gradcomp_jax.exchange.shards import Group, grouped
from gradcomp_jax.notes import logger, note, summary
from gradcomp_jax.views import HALVES, dtype_of, wide

# By how much riders may lengthen a gather; else they take an all-reduce of their own.
RIDE = 0.01


class Settings(NamedTuple):
    """The keywords of every factory that `compressor` serves; see there.

    Attributes:
      axis_name: the workers' axis.
      error_feedback: a `feedback.Feedback`.
      min_size: leaves of fewer elements travel dense.
      compress: which leaves to compress, or None.
      allow_dense: whether none may be.
      aggregate: the way codes, or numbers, travel; None leaves it to the plan.
      dense_dtype: the type of 16 bits in which what is not compressed travels; None: float32 or wider.
    """

    axis_name: AxisName
    error_feedback: Any
    min_size: int
    compress: Predicate | None
    allow_dense: bool
    aggregate: str | None = None
    dense_dtype: Any = None


class Plan(NamedTuple):
    """The leaves of a tree.

    Attributes:
      treedef: its structure.
      leaves: their paths, in order.
      compressed: paths of those that the codec compresses.
    """

    treedef: Any
    leaves: tuple[str, ...]
    compressed: tuple[str, ...]

    @property
    def dense(self) -> tuple[str, ...]:
        """Paths of those that travel as they are."""
        return tuple(path for path in self.leaves if path not in self.compressed)


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by path, in the tree's order, and its structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    below = collections.Counter(path[:depth] for path, _ in leaves for depth in range(len(path)))

    def name(path: tuple) -> str:
        # An nnx.Variable wraps its array as its only attribute, "value"; nnx.Optimizer initialises from
        # variables and updates from arrays, and both must give the same names.
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value") and below[path[:-1]] == 1:
            path = path[:-1]
        return jax.tree_util.keystr(path, simple=True, separator="/")

    by_path = {name(path): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        raise ValueError("two leaves of the gradients have the same path: a key holds a '/', rename it")
    return by_path, treedef


def plan(codec: Codec, settings: Settings, tree: Any) -> Plan:
    """Which leaves of a tree are compressed.

    Raises:
      TypeError: a leaf is not of real floating type.
      ValueError: none would be compressed, and that is not allowed; or what the codec refuses.
    """
    leaves, treedef = flatten(tree)
    compressed = []
    for path, leaf in leaves.items():
        _require_real(codec.name, path, leaf)
        if not _why_dense(codec, settings, path, leaf):
            compressed.append(path)
    if leaves and not compressed and not settings.allow_dense:
        path, leaf = max(leaves.items(), key=lambda item: item[1].size)
        raise ValueError(
            f"codec {codec.name!r} would compress none of the {len(leaves)} leaves: each is below "
            f"min_size={settings.min_size}, would not shrink, or is left out by "
            f"{'compress=' if settings.compress else 'the rule for its shape'} (the largest is {path!r} of shape "
            f"{leaf.shape}); lower min_size, change compress= or the codec's settings, or pass "
            "allow_dense=True to mean it"
        )
    return Plan(treedef, tuple(leaves), tuple(compressed))


def _why_dense(codec: Codec, settings: Settings, path: str, leaf: Any) -> str:
    """Why a leaf travels as it is; nothing if it is compressed."""
    chosen = (settings.compress or codec.default)(path, leaf)
    if isinstance(chosen, str | np.ndarray | jax.Array):
        raise ValueError(f"compress= returned {shown(chosen)} for leaf {path!r}, it must return True or False")
    if not chosen:
        return "left out by compress=" if settings.compress else "left out by the codec's rule for its shape"
    if leaf.size < settings.min_size:
        return f"fewer elements than min_size={settings.min_size}"
    uncompressed = leaf.size * (settings.dense_dtype or wide(leaf.dtype)).itemsize
    return "" if codec.shrinks(path, leaf, uncompressed) else "would not shrink"


def tell(codec: Codec, settings: Settings, the: Plan, leaves: dict[str, Any]) -> None:
    """Logs which of the leaves are compressed, and as what, and why the others are not; at level INFO, once."""
    if leaves and logger.isEnabledFor(logging.INFO) and not isinstance(codec, Uncompressed):
        compressed = [(path, leaves[path], codec.view(path, leaves[path])) for path in the.compressed]
        dense = [(path, leaves[path], _why_dense(codec, settings, path, leaves[path])) for path in the.dense]
        note(logging.INFO, summary(codec.name, compressed, dense))


def _require_real(codec: str, path: str, leaf: Any) -> None:
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"codec {codec!r} takes arrays, leaf {path!r} is {shown(leaf)}: make it one, or leave it out")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"codec {codec!r} takes gradients of real floating type, leaf {path!r} is {leaf.dtype}: keep it "
            "out of the gradients (jax.grad with allow_int=False, optax.masked) or split complex ones into "
            "real and imaginary parts"
        )


def half(dtype: Any) -> Any:
    """The type that a factory's `dense_dtype` stands for; None: float32 or wider.

    Raises:
      ValueError: it is neither bfloat16 nor float16.
    """
    if dtype is None or (found := dtype_of(dtype)) in HALVES:
        return dtype if dtype is None else found
    raise ValueError(
        f"dense_dtype={dtype!r} must be 'bfloat16' or 'float16': leave it out, and what is not compressed travels in "
        "float32 or wider; narrower types cannot be summed, see cast"
    )


def salt(path: str) -> int:
    """A number that is a leaf's own, whatever other leaves there are."""
    return zlib.crc32(path.encode()) & 0x7FFFFFFF


class Route(NamedTuple):
    """How a round of codes travels.

    Attributes:
      way: "gather", "shuffle" or "ring".
      ride: whether riders travel in the codes' messages; else they are one all-reduce beside them.
    """

    way: str
    ride: bool


def route(coder: Coder, xs: Sequence[tuple[str, Any]], riding: int, aggregate: str | None, workers: int) -> Route:
    """How codes of some tensors travel, beside so many bytes of riders; by default in whichever way sends less.

    That is "gather" for two workers, which encodes once and where both send the same, but for rounding. What is chosen
    among more is logged, at level INFO.

    Args:
      coder: the coder.
      xs: the tensors with their names, of which only shapes count.
      riding: bytes that ride.
      aggregate: the way, or None.
      workers: how many there are.

    Raises:
      ValueError: tensors of two strengths that share a buffer which an int32 cannot count.
    """
    chosen = _choose(coder, [x for _, x in xs], riding, aggregate, workers)
    shards = 1 if chosen.way == "gather" else workers
    _require_countable(coder, xs, shards, -(-riding // shards) if chosen.ride else 0)
    return chosen


def _choose(coder: Coder, xs: Sequence[Any], riding: int, aggregate: str | None, workers: int) -> Route:
    if aggregate not in (None, "gather"):
        return Route(aggregate, aggregate == "shuffle")
    alone = -(-2 * (workers - 1) * riding // workers)
    gathered = payload_bytes(coder, xs, 1)
    ride = workers <= 2 or (workers - 1) * riding - alone <= RIDE * ((workers - 1) * gathered + alone)
    by_gather = Route("gather", ride)
    if aggregate is not None or workers <= 2:
        return by_gather
    sent = {
        "gather": (workers - 1) * gathered + ((workers - 1) * riding if ride else alone),
        "shuffle": 2 * (workers - 1) * (payload_bytes(coder, xs, workers) + -(-riding // workers)),
    }
    chosen = min(sent, key=lambda way: sent[way])
    note(logging.INFO, f"aggregate={chosen!r} among {workers} workers: a worker sends {sent} bytes in a step")
    return by_gather if chosen == "gather" else Route("shuffle", True)


def payload_bytes(coder: Coder, xs: Sequence[Any], shards: int) -> int:
    """The bytes of one shard's payload, of some tensors cut into so many; in a shorter form if there is one."""
    groups = _groups(coder, xs, shards)
    compact = coder.compact(groups[0].each // coder.unit)
    return sum(coder.size(group.shape) for group in groups) if compact is None else compact.size


def _groups(coder: Coder, xs: Sequence[Any], shards: int) -> list[Group]:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    ys = [jax.eval_shape(coder.lay, jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in xs]
    return grouped(coder, ys, shards, key, [None] * len(ys), draws=False)


def _require_countable(coder: Coder, xs: Sequence[tuple[str, Any]], shards: int, riding: int) -> None:
    """Raises ValueError, by name, for tensors of two strengths whose buffer an int32 cannot count."""
    if not isinstance(coder, Switched):
        return
    sizes = [coder.size(group.shape) for group in _groups(coder, [x for _, x in xs], shards)]
    if (most := sum(sizes) + riding) >= 2**31:
        path = xs[sizes.index(max(sizes))][0]
        raise ValueError(
            f"leaves at two levels share one buffer, here of up to {most} bytes, which an int32 cannot count: "
            f"leave the largest, {path!r}, out by compress=, or send less of it at the low level"
        )


def require_aggregate(codec: str, coder: Coder | None, aggregate: str | None) -> None:
    """Raises ValueError for a way to aggregate that a codec cannot use; None, which stands for a choice, is legal.

    Args:
      codec: its name.
      coder: its coder, or None.
      aggregate: the way.
    """
    legal = ("psum", "ring") if coder is None or coder.shares_scale else coder.ways
    if aggregate is None or aggregate in legal:
        return
    reasons = {
        "psum": f"codec {codec!r} is not linear: aggregate='psum' would add packed codes",
        "gather": f"codec {codec!r} is linear: aggregate='gather' would send each payload to all, where a sum will do",
        "shuffle": f"codec {codec!r} is linear: aggregate='shuffle' would decode before the sum, for nothing",
        "ring": f"codec {codec!r} loses too much at once: aggregate='ring' would encode the sum anew at each hop",
    }
    reason = reasons.get(aggregate, f"aggregate={aggregate!r} is not known for codec {codec!r}")
    raise ValueError(f"{reason}; use {', '.join(map(repr, legal))}")
