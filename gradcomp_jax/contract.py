"""The contract between codecs and the engine: the types that the author of a codec needs.

A *codec* is the algorithm of one paper, for one tensor (a leaf of the gradients). Its `talk` is a generator. Round
by round the talk yields numbers to be averaged over the workers, and it is handed the answers. At its end it returns
the mean of its tensor. It knows no other leaf, no axis, no bit and no collective. PowerSGD's talk, shortened:

    def talk(self, phase, d, leaf, ctx):
        p = yield Say(d Q)                       the engine sends all leaves' numbers in one message
        q = yield Say(d^T orthonormalize(p.mean))
        return Result(P q.mean^T, P q.own^T, {"q": q.mean})

A *coder* (`gradcomp_jax.coder`) turns the numbers that a codec says into bytes. Without a coder the numbers travel as
they are and are summed on the way. Codecs and coders are frozen dataclasses: two with the same settings are equal.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax.arguments import is_whole, shown
from gradcomp_jax.cuts import Cut, rows
from gradcomp_jax.views import add_window

AxisName = str | tuple[str, ...]

Tensors = dict[str, jax.Array]
"""Leaves by path ("conv1/kernel"), in float32 or wider."""

MOST = 2.0**100
"""Under error feedback, gradients of larger magnitude count as not finite."""

Predicate = Callable[[str, Any], bool]
"""(path, leaf with shape and dtype) -> bool."""


Bucketing = int | Callable[[str], int] | None
"""The number of buckets, or a function from a path to its bucket; None: the plan decides."""


class Say(NamedTuple):
    """A request for the mean of numbers over the workers.

    Attributes:
      x: the numbers. With `fronts`, the numbers that matter most come first in C order. Numbers of 16 bits, made with
        `views.halved`, are for a sum in 16 bits and need `exact`; the answer to them is float32.
      fronts: how many of the first elements count at each strength of `Context.strength`; None: all, always.
      exact: whether to send the numbers as they are, whatever the coder: for steps before a codec compresses, or for a
        norm.
      apart: whether the numbers are a whole gradient, which travels in `dense_dtype` if there is one. A large one gets
        a message of its own, which needs no copy and can overlap.
      growth: the factor by which the codec's result may exceed the mean in magnitude. A mean whose result could leave
        the type's range counts as not finite.
      second: this worker's residual of the second stage of aggregate="shuffle", with the shape of x, or None. On this
        worker's shard x contains it n times.
      partial: whether x is one shard's part of a sum over the shards, for a talk that sees a shard of its leaf. The
        answer is the mean of that sum. On the way x is cut along its last axis, and `fronts` count whole rows of it.
    """

    x: jax.Array
    fronts: tuple[int, ...] | None = None
    exact: bool = False
    apart: bool = False
    growth: float = 1.0
    second: jax.Array | None = None
    partial: bool = False


class Heard(NamedTuple):
    """The answer to `Say`.

    Attributes:
      mean: the mean over the workers, bit-identical on all. It is zero beyond a front. It is all zeros in a step in
        which any worker had a number that was not finite.
      own: this worker's x after the wire; its mean over the workers is `mean`. It is x itself if nothing is lost.
      second: this worker's new residual of the second stage; None if the `Say` had none.
    """

    mean: jax.Array
    own: Any
    second: jax.Array | None = None


class First(NamedTuple):
    """A request for the first worker's arrays, on all workers; only in `Codec.refresh`.

    Attributes:
      x: the arrays.
      of_first_shard: whether every shard gets the first shard's arrays, where a talk sees a shard of its leaf.
    """

    x: Any
    of_first_shard: bool = False


class Together(NamedTuple):
    """A request to compute something for all leaves at once, compiled once and not for each leaf; it sends nothing.

    Attributes:
      function: [x of each leaf that asks for this function] -> [answer for each].
      x: this leaf's argument, any tree.
    """

    function: Callable[[list[Any]], list[Any]]
    x: Any


class OverShards(NamedTuple):
    """A request for the sum over the shards of a leaf, for a talk that sees one shard.

    The sum stays inside a slice or node. If a talk sees the whole leaf, the answer is x.

    Attributes:
      x: the numbers.
      largest: whether to answer the elementwise maximum instead of the sum.
    """

    x: jax.Array
    largest: bool = False


# What a talk can ask, by itself or several in a tuple.
Ask = Say | First | Together | OverShards


@functools.partial(jax.tree_util.register_dataclass, data_fields=["indices", "values", "window"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Sparse:
    """A tensor that is zero except at some places, and in a window of neighbours.

    Attributes:
      indices: int32 [k], different places in C order; places beyond the end are ignored.
      values: [k].
      shape: the tensor's shape.
      window: None, or a place in C order and the values [w] that are added from there on. Values may lie outside the
        tensor, and then count for nothing.
    """

    indices: jax.Array
    values: jax.Array
    shape: tuple[int, ...]
    window: tuple[jax.Array, jax.Array] | None = None

    def added_to(self, x: jax.Array, share: Any = 1) -> jax.Array:
        """`x`, which has as many elements as the tensor, plus `share` times the tensor."""
        if self.window is not None:
            start, values = self.window
            x = x + add_window(jnp.zeros(x.size, x.dtype), values * share, start).reshape(x.shape)
        # In the shape of x, because XLA's CPU backend then reuses its buffer. The first of several places shows that an
        # index is beyond the end.
        places: list[jax.Array] = []
        rest = self.indices.astype(jnp.uint32)  # unsigned: no index counts from the end
        for size in map(jnp.uint32, reversed(x.shape[1:])):
            places, rest = [jax.lax.rem(rest, size), *places], jax.lax.div(rest, size)
        return x.at[(rest, *places)].add(self.values * share, mode="drop", unique_indices=True)

    def dense(self) -> jax.Array:
        """The tensor itself."""
        return self.added_to(jnp.zeros(self.shape, self.values.dtype))


def dense(x: Any) -> jax.Array:
    """`x`, a tensor or `Sparse`, as a tensor."""
    return x.dense() if isinstance(x, Sparse) else x


class Result(NamedTuple):
    """What a talk returns.

    Attributes:
      mean: the update that every worker will apply, of the leaf's shape; made of heard numbers and state only.
      own: this worker's share of the mean, times the number of workers; an array or `Sparse`.
      news: the fields of the leaf's state that change, by name. Keep them small: they may pass through a conditional.
      affine: whether the mean may differ from zero when all heard numbers are zero.
    """

    mean: jax.Array
    own: Any
    news: dict[str, Any] = {}  # noqa: RUF012, never changed
    affine: bool = False


Talk = Generator[Any, Any, Result]


class Context(NamedTuple):
    """Everything a talk is told beside its tensor and state.

    Attributes:
      step: int32, the number of exchanges done, without skipped ones; the same on all workers.
      salt: a whole number that is this leaf's own, the same on all workers and in every run.
      feedback: whether the part that is left out comes back in a later step.
      fresh: whether the first term is a gradient that this program computes.
      strength: the index of the leaf's strength among the codec's strengths, int32, or a whole number if it never
        changes; None if the codec has one strength.
      learning_rate: the learning rate given to the transformation's update, or None.
      shards: the number of shards in which the leaf lies; the talk sees one of them.
      shard: int32, the index of the shard that the talk sees, so that its random draws can differ; None if there is
        one shard.
      whole: the shape of the whole leaf.
    """

    step: jax.Array
    salt: int
    feedback: bool
    fresh: bool = False
    strength: Any = None
    learning_rate: Any = None
    shards: int = 1
    shard: jax.Array | None = None
    whole: tuple[int, ...] = ()


class Mine(NamedTuple):
    """Marks a part of a codec's state that differs between the workers.

    Attributes:
      value: that part.
    """

    value: Any


class Strength(NamedTuple):
    """A codec's offer to those who switch its strength, such as `accordion`.

    Attributes:
      setting: the name of the setting that makes the strength, such as "rank".
      value: the setting's value in this codec.
      more_sends_more: whether a larger value sends more.
      others: the codec's other settings, by name.
      at: several values of the setting -> one codec with these strengths, which share one state.
    """

    setting: str
    value: Any
    more_sends_more: bool
    others: dict[str, Any]
    at: Callable[[tuple[Any, ...]], "Codec"]


class Gain(NamedTuple):
    """What a codec gains from its view of a leaf.

    Attributes:
      ratio: how many times fewer numbers it says.
      advice: what to look at if the ratio is small; else empty.
    """

    ratio: float
    advice: str


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """An algorithm for one tensor. Subclasses are frozen dataclasses whose fields are the settings.

    A codec's state is a NamedTuple. The fields that `by_leaf` names are dicts by path, perhaps in `Mine`, and a talk
    sees its leaf's entry. The other fields belong to the whole tree. If there is a field `step`, it counts exchanges;
    if there is a field `quantizer`, it is the coder's state.
    """

    name: ClassVar[str]
    by_leaf: ClassVar[tuple[str, ...]] = ()

    @property
    def coder(self) -> Any:
        """The `Coder` that turns numbers into bytes; None: they travel as they are, and are summed on the way."""
        return None

    @property
    def phases(self) -> int:
        """The number of kinds of steps; `phase` chooses one."""
        return 1

    @property
    def strength(self) -> Strength | None:
        """The setting of the codec that can be switched; None if there is none."""
        return None

    def require_leaves(self, paths: Sequence[str]) -> None:
        """Raises ValueError, by name, for a tree of leaves that this codec cannot be meant for."""
        del paths

    def of_part(self) -> "Codec":
        """The codec for a part of the tree that it is meant for."""
        return self

    def default(self, path: str, leaf: Any) -> bool:
        """Whether the paper compresses such a leaf; by default a leaf with two axes or more."""
        del path
        return leaf.ndim > 1

    @abc.abstractmethod
    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        """Whether the codec can send such a leaf in fewer bytes than `uncompressed`."""

    def cut(self, path: str, leaf: Any) -> Cut:
        """How such a leaf is cut into shards; each is compressed on its own, except where `talk` asks all shards."""
        del path
        return rows(leaf)

    def arrives(self, path: str, leaf: Any) -> int | None:
        """The axis along which such a leaf must be cut if gradients come in shards; None: any axis will do."""
        del path, leaf
        return None

    def view(self, path: str, leaf: Any) -> str:
        """The codec's view of such a leaf, in words; empty if the codec takes the leaf as it is."""
        del path, leaf
        return ""

    def gain(self, path: str, leaf: Any) -> Gain | None:
        """What that view gains; None if the gain depends on nothing that a user could change."""
        del path, leaf
        return None

    def init(self, path: str, leaf: Any, salt: int) -> dict[str, Any]:
        """The first state of one leaf, the fields of `by_leaf`.

        It may depend only on the leaf's shape and dtype. The leaf may be a `Shard`.
        """
        del path, leaf, salt
        return {}

    def start(self, leaves: dict[str, dict[str, Any]]) -> Any:
        """The first state of the whole tree, around the fields by leaf, which are dicts by path."""
        del leaves
        return ()

    def leaf(self, state: Any, path: str) -> Any:
        """The part of the state that a talk sees."""
        entries = {name: bare(getattr(state, name)) for name in self.by_leaf}
        entries = {name: x[path] for name, x in entries.items() if isinstance(x, dict) and path in x}
        return state._replace(**entries) if entries else state

    def of_shards(self, state: Any, f: Callable[[Any, str], Any]) -> Any:
        """The state with f(field, its name) in place of each field by leaf that describes a shard, not the leaf."""
        del f
        return state

    def shard_cut(self, name: str, path: str, leaf: Any) -> Cut | None:
        """How the shards' entries of a field join to the whole leaf's entry; None: the first entry stands for all."""
        del name, path, leaf
        return None

    def merge(self, state: Any, news: dict[str, dict[str, Any]]) -> Any:
        """The state with its leaves' new fields, by path and then by field."""
        for name in self.by_leaf:
            old, new = getattr(state, name), {path: x[name] for path, x in news.items() if name in x}
            if new:
                state = state._replace(
                    **{name: Mine({**old.value, **new}) if isinstance(old, Mine) else {**old, **new}}
                )
        return state

    def coder_state(self, state: Any) -> Any:
        """The coder's part of the state: the field `quantizer`, if there is one."""
        return getattr(state, "quantizer", ())

    def with_coder_state(self, state: Any, coder_state: Any) -> Any:
        """The state with `coder_state` as the coder's part."""
        return state._replace(quantizer=coder_state) if hasattr(state, "quantizer") else state

    def step(self, state: Any) -> jax.Array:
        """int32, the number of exchanges done."""
        return state.step if hasattr(state, "step") else jnp.int32(0)

    def phase(self, state: Any) -> jax.Array:
        """int32, the kind of the step, less than `phases`."""
        del state
        return jnp.int32(0)

    def kinds(self, state: Any) -> dict[str, Any]:
        """The kinds of steps that may send different amounts, by name; the first is the kind that the codec is for.

        Each kind maps to the state before such a step, made from `state`, the codec's first. Its large arrays may be
        shapes.
        """
        return {"": state}

    def strengths(self, state: Any, paths: Iterable[str], learning_rate: Any) -> dict[str, Any]:
        """The index of each leaf's strength, int32, or a whole number if it never changes; empty if there is one."""
        del state, paths, learning_rate
        return {}

    @abc.abstractmethod
    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        """The algorithm: a generator that yields `Say` or a tuple of them, is sent `Heard`, and returns a `Result`.

        Args:
          phase: the kind of the step.
          d: terms whose sum is to be averaged: the gradient, and the residual of error feedback. They come apart
            because some algorithms need no sum of the gradient's size.
          leaf: the state, with this leaf's entries of the fields `by_leaf`.
          ctx: everything else that the talk is told.
        """

    def absorb(
        self, leaf: Any, d: tuple[jax.Array, ...], mean: jax.Array, ok: jax.Array, ctx: Context
    ) -> dict[str, Any]:
        """The large fields of the leaf's state that change.

        They change outside of any conditional, because a conditional would copy them. They must stay as they are if
        not `ok`, that is, if something was not finite on some worker.
        """
        del leaf, d, mean, ok, ctx
        return {}

    def adopt(self, leaf: Any, mean: jax.Array, ok: jax.Array) -> dict[str, Any]:
        """Like `absorb`, for fields that `refresh` reads as they were before the step."""
        del leaf, mean, ok
        return {}

    def due(self, state: Any) -> jax.Array | None:
        """Whether `refresh` runs in this step, the same on all workers; None: never."""
        del state
        return None

    def refresh(self, before: Any, after: Any, mean: jax.Array, ctx: Context) -> Generator[First, Any, dict[str, Any]]:
        """Renews fields of a leaf's state when `due`, from the state before and after the step.

        It may ask for the first worker's arrays with `First`.
        """
        del before, after, mean, ctx
        yield from ()
        return {}

    def kept(self, leaf: Any) -> dict[str, Any]:
        """The fields that `refresh` renews, unchanged."""
        del leaf
        return {}

    def tick(self, state: Any, after: Any, ctx: Context) -> Any:
        """The state at the end of a step: `after`, whose leaves are renewed, with the whole tree's fields renewed too.

        By default it adds one to `step`, if there is such a field.
        """
        del ctx
        return after._replace(step=state.step + 1) if hasattr(state, "step") else after

    def flushed(self, state: Any) -> Any:
        """The state once the residual has been sent, for codecs whose state repeats a part of the residual."""
        return state

    def forget(self, leaf: Any, where: jax.Array) -> Any:
        """A leaf's state, reset to know nothing where `where` is true."""
        del where
        return leaf


@dataclasses.dataclass(frozen=True)
class Uncompressed(Codec):
    """No compression: the mean of each tensor as it is."""

    name: ClassVar[str] = "none"

    def default(self, path: str, leaf: Any) -> bool:
        return True

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        return True

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        heard = yield Say(total(d), apart=True)
        return Result(heard.mean, heard.own)


def alongside(talk: Talk, more: Any) -> Generator[Any, Any, tuple[Result, Any]]:
    """Runs a talk and asks one more thing in its first message: gives the talk's result, and the answer to `more`."""
    answer = extra = None
    while True:
        try:
            ask = talk.send(answer)
        except StopIteration as end:
            return end.value, extra
        single = isinstance(ask, Ask)
        asks = [ask] if single else list(ask)
        if extra is None and any(isinstance(x, Say) for x in asks):
            *answers, extra = yield (*asks, more)
            answer = answers[0] if single else tuple(answers)
        else:
            answer = yield ask


def bare(x: Any) -> Any:
    """`x` without its mark, if it has one."""
    return x.value if isinstance(x, Mine) else x


class UnheardError(TypeError):
    """A codec made a mean of more than heard numbers, as the types show."""


class AlreadyReducedError(ValueError):
    """A gradient is summed over the workers already, as the types show."""


def total(d: tuple[jax.Array, ...]) -> jax.Array:
    """The sum of the terms of a talk's tensor.

    With two terms it is NaN where the gradient, the first term, is not `moderate`.
    """
    return d[0] if len(d) == 1 else moderate(d[0]) + d[1]


def moderate(x: jax.Array) -> jax.Array:
    """A gradient under error feedback: NaN where its magnitude is above `MOST`, so that the step is skipped.

    Otherwise a finite gradient could leave a residual so large that all later steps would be skipped.
    """
    return jnp.where(jnp.abs(x) <= MOST, x, jnp.nan)


def require_whole(name: str, value: Any, least: int) -> None:
    """Raises ValueError for an argument that is not a whole number of at least `least`."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name}={shown(value)} must be a whole number of at least {least}")


def require_fraction(fraction: Any) -> None:
    """Raises ValueError for a share of a leaf's elements that is not above 0 and at most 1."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 1")


def require_indexable(codec: str, path: str, leaf: Any) -> None:
    """Raises ValueError for a leaf with more elements than an int32 can number."""
    if leaf.size >= 2**31:
        raise ValueError(
            f"leaf {path!r} of shape {leaf.shape} has 2^31 elements or more, which codec {codec!r} cannot number: "
            "leave it out with compress=, or split it"
        )
