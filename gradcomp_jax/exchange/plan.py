"""Decisions from shapes alone: which leaves are compressed, how codes travel, and whether riders join them."""

import collections
import itertools
import logging
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gradcomp_jax.arguments import shown
from gradcomp_jax.coder import Coder, Switched
from gradcomp_jax.contract import AxisName, Bucketing, Codec, Predicate, Uncompressed
from gradcomp_jax.cuts import Cut, Shard, rows, whole
from gradcomp_jax.exchange.collectives import axis_names
from gradcomp_jax.exchange.shards import Group, grouped
from gradcomp_jax.notes import logger, note, summary
from gradcomp_jax.views import HALVES, dtype_of, on_cpus, wide

# The share by which riders may lengthen a gather; if they would add more, they take an all-reduce of their own.
RIDE = 0.01
# The bytes of gradients in a bucket, and the most buckets, where collectives overlap with computations.
BUCKET, MOST_BUCKETS = 2**24, 4


class Settings(NamedTuple):
    """The keywords of every factory that `compressor` serves; see there.

    Attributes:
      axis_name: the workers' axis.
      error_feedback: a `feedback.Feedback`.
      min_size: leaves with fewer elements travel dense.
      compress: which leaves to compress, or None.
      allow_dense: whether a tree may have no compressed leaf.
      aggregate: the way that codes, or numbers, travel; None: the plan decides.
      dense_dtype: the type of 16 bits for numbers that are not compressed; None: float32 or wider.
      buckets: the number of buckets, or a function from a path to its bucket; None: the plan decides.
      fast: for `across`, the axis of the chips of a worker; None: a worker is one device.
      inside: for `across`, whether gradients come whole from each chip and are summed into shards. A predicate answers
        this for each leaf. A dict has, by path, the axis along which the leaf is cut, or None if it comes whole.
      measured: whether the state keeps the norms of `measured`.
    """

    axis_name: AxisName
    error_feedback: Any
    min_size: int
    compress: Predicate | None
    allow_dense: bool
    aggregate: str | None = None
    dense_dtype: Any = None
    buckets: Bucketing = None
    fast: AxisName | None = None
    inside: bool | Predicate | dict[str, int | None] = True
    measured: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes along which gradients differ."""
        return (*axis_names(self.axis_name), *(axis_names(self.fast) if self.fast else ()))

    def cut_along(self, path: str, leaf: Any, codec: Codec) -> int | None:
        """The axis along which a leaf's gradients come in shards; None if they come whole from each chip."""
        if self.fast is None:
            return None
        if isinstance(self.inside, dict):
            return axis_of(self.inside, path)
        return None if comes_whole(self.inside, path, leaf) else codec.arrives(path, leaf) or 0


class Plan(NamedTuple):
    """The plan for the leaves of a tree.

    Attributes:
      treedef: the structure of the tree.
      leaves: the leaves' paths, in order.
      compressed: the leaves that the codec compresses, by path: as it sees them, whole or a shard.
      kept: the leaves that have a state, in the same form: the compressed ones, and those that shrink whole but not as
        shards.
      why: by path, the reason why a leaf is not compressed.
      cuts: for `across`, how each leaf is cut.
      shards: for leaves that come in shards, the axis along which they are cut, and the codec's axis for it.
      buckets: the paths of each bucket; the buckets are in the order in which they are sent.
    """

    treedef: Any
    leaves: tuple[str, ...]
    compressed: dict[str, Any]
    kept: dict[str, Any]
    why: dict[str, str]
    cuts: dict[str, Cut]
    shards: dict[str, tuple[int, int]]
    buckets: tuple[tuple[str, ...], ...]

    @property
    def dense(self) -> tuple[str, ...]:
        """The paths of the leaves that travel as they are."""
        return tuple(path for path in self.leaves if path not in self.compressed)


def comes_whole(inside: bool | Predicate | dict[str, int | None], path: str, leaf: Any) -> bool:
    """Whether `Settings.inside` says that a leaf's gradients come whole from each chip."""
    if isinstance(inside, dict):
        return axis_of(inside, path) is None
    return inside if isinstance(inside, bool) else bool(inside(path, leaf))


def axis_of(axes: dict[str, int | None], path: str) -> int | None:
    """The axis along which a leaf is cut, from the result of `axes_of`."""
    if path not in axes:
        raise ValueError(f"inside= has no PartitionSpec for gradient leaf {path!r}: give a tree like the parameters'")
    return axes[path]


def axes_of(specs: Any, slow: AxisName, fast: AxisName) -> dict[str, int | None]:
    """By path, the axis along which a parameter's PartitionSpec cuts it over `fast`; None: the parameter is not cut.

    Raises:
      ValueError: a leaf is not a PartitionSpec, or `across` cannot use it.
    """
    axes = {}
    for path, spec in flatten(specs)[0].items():
        if not isinstance(spec, PartitionSpec):
            raise ValueError(
                f"inside={shown(specs)} must be True, False, or a function of 2 arguments, (path, leaf) -> bool, or a "
                "tree of PartitionSpecs like the parameters"
            )
        names = [axis_names(entry) if entry else () for entry in spec]
        cut = [i for i, entry in enumerate(names) if set(entry) & set(axis_names(fast))]
        over = set(axis_names(slow)) & {name for entry in names for name in entry}
        if over or len(cut) > 1 or (cut and names[cut[0]] != axis_names(fast)):
            raise ValueError(
                f"leaf {path!r} lies by {spec}: across(..., slow={slow!r}, fast={fast!r}) takes leaves that each slice "
                f"holds whole, cut along one axis over {fast!r}, like PartitionSpec({fast!r}), or not at all"
            )
        axes[path] = cut[0] if cut else None
    return axes


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


def plan(codec: Codec, settings: Settings, tree: Any, shards: int = 1) -> Plan:
    """Decides which leaves of a tree are compressed.

    The choice looks at the whole leaf. A shard of it must shrink too.

    Args:
      codec: the codec.
      settings: its settings.
      tree: gradients, or their shapes.
      shards: the number of chips of a worker.

    Raises:
      TypeError: a leaf is not of real floating type.
      ValueError: no leaf would be compressed, and that is not allowed; or the codec refuses the tree.
    """
    leaves, treedef = flatten(tree)
    codec.require_leaves(tuple(leaves))
    compressed, kept, cuts, arriving, why = {}, {}, {}, {}, {}
    for path, leaf in leaves.items():
        _require_real(codec.name, path, leaf)
        full, seen, cuts[path] = leaf, leaf, rows(leaf)
        axis = settings.cut_along(path, leaf, codec)
        if axis is not None:
            seen, turn = _arriving(codec, path, leaf, axis, shards)
            full, cuts[path], arriving[path] = seen.whole, Cut(seen.whole.shape, turn[1]), turn
        if reason := _why_dense(codec, settings, path, full):
            why[path] = reason
            continue
        if settings.fast is not None and axis is None:
            cuts[path] = codec.cut(path, leaf)
            seen = Shard(cuts[path].shape(shards), leaf.dtype, leaf, shards)
        kept[path] = seen
        if seen is full or codec.shrinks(path, seen, _bytes(settings, rows(full).shape(shards), leaf.dtype)):
            compressed[path] = seen
        else:
            why[path] = "its shards would not shrink"
    if leaves and not compressed and not settings.allow_dense:
        path, leaf = max(leaves.items(), key=lambda item: item[1].size)
        raise ValueError(
            f"codec {codec.name!r} would compress none of the {len(leaves)} leaves: each is below "
            f"min_size={settings.min_size}, would not shrink, or is left out by "
            f"{'compress=' if settings.compress else 'the rule for its shape'} (the largest is {path!r} of shape "
            f"{leaf.shape}); lower min_size, change compress= or the codec's settings, or pass "
            "allow_dense=True to mean it"
        )
    sizes = {path: leaf.size for path, leaf in leaves.items()}
    buckets = in_buckets(sizes, default_buckets(leaves) if settings.buckets is None else settings.buckets)
    return Plan(treedef, tuple(leaves), compressed, kept, why, cuts, arriving, buckets)


def _arriving(codec: Codec, path: str, leaf: Any, axis: int, shards: int) -> tuple[Shard, tuple[int, int]]:
    """A leaf that comes in shards, as the codec sees it; and from which axis to which one the cut axis moves."""
    if axis >= leaf.ndim:
        raise ValueError(
            f"gradient leaf {path!r} of shape {leaf.shape} has no axis {axis} along which it is a shard: say with "
            "across(..., inside=) that it comes whole"
        )
    shape = list(leaf.shape)
    shape[axis] *= shards
    wanted = codec.arrives(path, jax.ShapeDtypeStruct(tuple(shape), leaf.dtype))
    to = axis if wanted is None else wanted
    if axis < to:
        raise ValueError(
            f"gradient leaf {path!r} is cut along axis {axis}, which counts its layers: cut it along another, or leave "
            f"it out of codec {codec.name!r} with compress="
        )
    full = jax.ShapeDtypeStruct(_moved(shape, axis, to), leaf.dtype)
    return Shard(_moved(leaf.shape, axis, to), leaf.dtype, full, shards), (axis, to)


def _moved(shape: Sequence[int], axis: int, to: int) -> tuple[int, ...]:
    """A shape with one axis moved."""
    rest = [size for i, size in enumerate(shape) if i != axis]
    return (*rest[:to], shape[axis], *rest[to:])


def default_buckets(leaves: dict[str, Any]) -> int:
    """The default number of buckets for these leaves."""
    return 1 if on_cpus() else max(1, min(MOST_BUCKETS, sum(_size(x) for x in leaves.values()) // BUCKET))


def in_buckets(sizes: dict[str, int], buckets: Bucketing) -> tuple[tuple[str, ...], ...]:
    """The paths in buckets; the buckets are in the order in which they are sent.

    Args:
      sizes: the leaves' sizes, by path.
      buckets: the number of buckets, or a function from a path to its bucket. Buckets with lower numbers are sent
        first. Buckets by number have about the same size. They follow the order in which a backward pass finishes the
        leaves, taken to be the reverse of the paths' natural order ("layer_10" after "layer_9").
    """
    if callable(buckets):
        number = {path: buckets(path) for path in sizes}
        for path, found in number.items():
            if isinstance(found, bool) or not isinstance(found, int | np.integer):
                raise ValueError(f"buckets= returned {shown(found)} for leaf {path!r}, it must return a whole number")
    else:
        number = _even(sizes, 1 if buckets is None else buckets)
    used = sorted(set(number.values()))
    return tuple(tuple(path for path in sizes if number[path] == one) for one in used) or ((),)


def natural(path: str) -> list[Any]:
    """The key by which paths sort naturally: "layer_10" comes after "layer_9"."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)]  # every second piece is digits


def _even(sizes: dict[str, int], buckets: int) -> dict[str, int]:
    """The bucket of each path: runs of about the same size, in the reverse of the paths' natural order."""
    number: dict[str, int] = {}
    total, before = max(1, sum(sizes.values())), 0.0
    for path in sorted(sizes, key=natural, reverse=True):
        number[path] = min(buckets - 1, math.floor(buckets * (before + sizes[path] / 2) / total))
        before += sizes[path]
    return number


def _why_dense(codec: Codec, settings: Settings, path: str, leaf: Any) -> str:
    """The reason why a leaf travels as it is; empty if it is compressed."""
    chosen = (settings.compress or codec.default)(path, leaf)
    if isinstance(chosen, str | np.ndarray | jax.Array):
        raise ValueError(f"compress= returned {shown(chosen)} for leaf {path!r}, it must return True or False")
    if not chosen:
        return "left out by compress=" if settings.compress else "left out by the codec's rule for its shape"
    if leaf.size < settings.min_size:
        return f"fewer elements than min_size={settings.min_size}"
    return "" if codec.shrinks(path, leaf, _bytes(settings, leaf.shape, leaf.dtype)) else "would not shrink"


def _size(leaf: Any) -> int:
    return leaf.size * wide(leaf.dtype).itemsize


def _bytes(settings: Settings, shape: tuple[int, ...], dtype: Any) -> int:
    """The bytes of an uncompressed array of this shape."""
    return math.prod(shape) * (settings.dense_dtype or wide(dtype)).itemsize


def tell(codec: Codec, the: Plan, leaves: dict[str, Any]) -> None:
    """Logs the compressed leaves with the codec's view, and the others with the reason; at level INFO, once."""
    if leaves and logger.isEnabledFor(logging.INFO) and not isinstance(codec, Uncompressed):
        compressed = [(path, leaves[path], _taken_for(codec, path, whole(x))) for path, x in the.compressed.items()]
        dense = [(path, leaves[path], reason) for path, reason in the.why.items()]
        note(logging.INFO, summary(codec.name, compressed, dense))


def _taken_for(codec: Codec, path: str, leaf: Any) -> str:
    """The codec's view of a leaf, and the gain from it, in words."""
    view, gain = codec.view(path, leaf), codec.gain(path, leaf)
    if gain is None:
        return view
    return f"{view}, {gain.ratio:.1f} times fewer numbers" + (f" only: {gain.advice}" if gain.advice else "")


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
      ValueError: the type is neither bfloat16 nor float16.
    """
    if dtype is None or (found := dtype_of(dtype)) in HALVES:
        return dtype if dtype is None else found
    raise ValueError(
        f"dense_dtype={dtype!r} must be 'bfloat16' or 'float16': leave it out, and uncompressed numbers travel in "
        "float32 or wider; narrower types cannot be summed, see cast"
    )


def salt(path: str) -> int:
    """A number that is a leaf's own; it depends on the path alone."""
    return zlib.crc32(path.encode()) & 0x7FFFFFFF


class Route(NamedTuple):
    """How a round of codes travels.

    Attributes:
      way: "gather", "shuffle" or "ring".
      ride: whether riders travel in the codes' messages; else an all-reduce beside them takes the riders.
      why: the reason for this way.
    """

    way: str
    ride: bool
    why: str


def route(
    coder: Coder,
    xs: Sequence[tuple[str, Any]],
    strengths: Sequence[Any],
    riding: int,
    aggregate: str | None,
    workers: int,
) -> Route:
    """How the codes of some tensors travel, beside so many bytes of riders; by default in the way that sends less.

    For two workers that is "gather": both ways send the same, up to rounding, and gather encodes once. For more workers
    the choice is logged, at level INFO.

    Args:
      coder: the coder.
      xs: the tensors with their names; only the shapes count.
      strengths: the strength of each, as in its `Context`.
      riding: the bytes of riders.
      aggregate: the way, or None.
      workers: the number of workers.

    Raises:
      ValueError: tensors of two strengths share a buffer that is too large for an int32 to count.
    """
    chosen = _choose(coder, [x for _, x in xs], strengths, riding, aggregate, workers)
    shards = 1 if chosen.way == "gather" else workers
    _require_countable(coder, xs, strengths, shards, -(-riding // shards) if chosen.ride else 0)
    return chosen


def _choose(
    coder: Coder, xs: Sequence[Any], strengths: Sequence[Any], riding: int, aggregate: str | None, workers: int
) -> Route:
    given = f"aggregate={aggregate!r} is given"
    if aggregate not in (None, "gather"):
        return Route(aggregate, aggregate == "shuffle", given)
    alone = -(-2 * (workers - 1) * riding // workers)
    gathered = _payload_bytes(coder, xs, strengths, 1)
    ride = workers <= 2 or (workers - 1) * riding - alone <= RIDE * ((workers - 1) * gathered + alone)
    if aggregate is not None:
        return Route("gather", ride, given)
    if workers <= 2:
        return Route("gather", ride, "up to two workers send as much by either way, and gather encodes once")
    sent = {
        "gather": (workers - 1) * gathered + ((workers - 1) * riding if ride else alone),
        "shuffle": 2 * (workers - 1) * (_payload_bytes(coder, xs, strengths, workers) + -(-riding // workers)),
    }
    chosen = min(sent, key=lambda way: sent[way])
    why = f"a worker sends {sent['shuffle']:,} bytes by shuffle, {sent['gather']:,} by gather"
    note(logging.INFO, f"aggregate={chosen!r} among {workers} workers: {why}")
    return Route(chosen, chosen == "shuffle" or ride, why)


def _payload_bytes(coder: Coder, xs: Sequence[Any], strengths: Sequence[Any], shards: int) -> int:
    """The bytes of one shard's payload, for tensors cut into so many shards; in the shorter form if there is one."""
    groups = _groups(coder, xs, strengths, shards)
    compact = coder.compact(groups[0].each // coder.unit)
    return sum(group.coder.size(group.shape) for group in groups) if compact is None else compact.size


def payloads(
    coder: Coder, xs: Sequence[Any], strengths: Sequence[Any], shards: int, places: Sequence[int]
) -> list[float]:
    """Each tensor's bytes in a shard's payload; the zeros that fill up the last shards of several tensors are left out.

    Args:
      coder: the coder.
      xs: the tensors.
      strengths: for each tensor, the index of its strength if that never changes, else None.
      shards: the number of shards into which each is cut.
      places: for each tensor, the index of its strength in the step.
    """
    groups = _groups(coder, xs, strengths, shards)
    if coder.joins:
        (group,) = groups
        payload = group.coder.size(group.ys[0].shape) / shards
        total = sum(math.prod(x.shape) for x in xs)
        return [payload * math.prod(x.shape) / total for x in xs]
    if not coder.pooled:
        each = [
            (x.coder.fronts(x.shape) or (x.coder.size(x.shape),), place)
            for x, place in zip(groups, places, strict=True)
        ]
        return [sizes[min(place, len(sizes) - 1)] for sizes, place in each]
    unit = _payload_bytes(coder, xs, strengths, shards) / groups[0].each / shards
    return [unit * (end - start) for start, end in itertools.pairwise(groups[0].starts())]


def shortens(coder: Coder, xs: Sequence[Any], strengths: Sequence[Any], shards: int) -> bool:
    """Whether a shard's payload has a shorter form; then the workers must agree whether their codes fit it."""
    return coder.compact(_groups(coder, xs, strengths, shards)[0].each // coder.unit) is not None


def _groups(coder: Coder, xs: Sequence[Any], strengths: Sequence[Any], shards: int) -> list[Group]:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    ys = jax.eval_shape(coder.lay_all, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs])
    return grouped(coder, ys, shards, key, strengths, draws=False)


def _require_countable(
    coder: Coder, xs: Sequence[tuple[str, Any]], strengths: Sequence[Any], shards: int, riding: int
) -> None:
    """Raises ValueError, by name, for tensors of two strengths whose shared buffer an int32 cannot count."""
    groups = _groups(coder, [x for _, x in xs], strengths, shards) if isinstance(coder, Switched) else []
    if not any(isinstance(group.coder, Switched) for group in groups):
        return
    sizes = [group.coder.size(group.shape) for group in groups]
    if (most := sum(sizes) + riding) >= 2**31:
        path = xs[sizes.index(max(sizes))][0]
        raise ValueError(
            f"leaves at two levels share one buffer, here of up to {most} bytes, which an int32 cannot count: "
            f"leave the largest, {path!r}, out with compress=, or send less of it at the low level"
        )


def legal_ways(coder: Coder | None) -> tuple[str, ...]:
    """The ways on which a codec's numbers can travel; coder: the codec's coder, or None."""
    return ("psum", "ring") if coder is None or coder.shares_scale else coder.ways


def require_aggregate(codec: str, coder: Coder | None, aggregate: str | None) -> None:
    """Raises ValueError for a way of aggregation that a codec cannot use.

    Args:
      codec: the codec's name.
      coder: the codec's coder, or None.
      aggregate: the way; None, which leaves the choice to the plan, is legal.
    """
    legal = legal_ways(coder)
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
