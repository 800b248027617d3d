"""How numbers become bytes: the base of coders, which quantise or select, and their messages.

A coder sees a tensor in the form that `lay` gives it, float32 [..., length]. The form is flat, or a matrix whose last
axis counts columns. With aggregate="shuffle" or "ring" among n workers the last axis is cut into n shards. A message is
a dict of arrays, which are as narrow as they travel. A coder knows neither workers nor how its messages are sent.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradcomp_jax.contract import Codec, Context, Mine, Result, Say, Sparse, Talk, dense, require_indexable, total
from gradcomp_jax.views import cut_as_written, filled
from gradcomp_jax.wire.packing import pack_arrays, unpack_arrays

Message = Any
"""A dict of arrays."""


class Part(NamedTuple):
    """Which part of a tensor is encoded.

    Attributes:
      index: int32, the index of the shard.
      shards: the number of shards; 1: the part is the whole tensor.
      length: the length of the whole tensor's last axis; the last shards are filled up with zeros beyond it.
      key: a random key that no other part and no other worker has; None if nothing is drawn.
      strength: int32, like `Context.strength`, or None.
    """

    index: Any
    shards: int
    length: int
    key: Any
    strength: jax.Array | None = None

    def valid(self, each: int) -> jax.Array:
        """int32, how many of this part's `each` places along the last axis are inside the tensor."""
        if self.length == self.shards * each:
            return jnp.int32(each)
        return jnp.clip(self.length - self.index * each, 0, each)


class Compact(NamedTuple):
    """A shorter form of messages, which not every message has.

    Attributes:
      size: the form's size in bytes.
      pack: message -> (bytes uint8 [size], whether the message fits, the true length of its code in bits as a pair).
      unpack: bytes -> message.
    """

    size: int
    pack: Callable[[Message], tuple[jax.Array, jax.Array, jax.Array]]
    unpack: Callable[[jax.Array], Message]


class CodeLength(NamedTuple):
    """The true length of one worker's codes in the last step, a part of a codec's state; `code_bits` reads it.

    Attributes:
      last: bits, a uint32 (high, low) pair, [2]; in the global form [workers, 2].
    """

    last: jax.Array


def no_length() -> CodeLength:
    """The length before the first step."""
    return CodeLength(jnp.zeros(2, jnp.uint32))


@dataclasses.dataclass(frozen=True)
class Coder(abc.ABC):
    """The base of coders, which are frozen dataclasses whose fields are the settings.

    Class attributes:
      name: the coder's name in error messages.
      ways: the values of aggregate= that it goes with.
      rowwise: whether each unit is encoded on its own, and a message's arrays can be cut between units. A tensor is
        then encoded whole, and its message is cut.
      unit_axis: the axis of a message's arrays that counts units, for a rowwise coder: 0 or -1.
      pooled: whether the units of all tensors count as one tensor's, so that shards may cross tensors; rowwise only.
      draws: whether it uses random keys.
      votes: whether the mean of decoded tensors is encoded itself, like in a majority vote.
      tells_length: whether messages have unused room, so that `code_length` gives their true length.
      shares_scale: whether its codes are integers in a scale that all workers share, and are summed; see
        `codes.shared`.
      unbiased: whether the decoded tensor is on average the encoded one.
      joins: whether all tensors are coded as one; then `lay_all` gives one tensor.
      indexes: whether it numbers a tensor's elements with int32.
      scales: the names of a message's arrays that bound the decoded tensor in magnitude. If such an array is not
        finite, the tensor was not. If all of them are zero, the message decodes to zeros.
    """

    name: ClassVar[str] = "coder"
    ways: ClassVar[tuple[str, ...]] = ("gather", "shuffle")
    rowwise: ClassVar[bool] = False
    unit_axis: ClassVar[int] = 0
    pooled: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    votes: ClassVar[bool] = False
    tells_length: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    shares_scale: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    indexes: ClassVar[bool] = True
    scales: ClassVar[tuple[str, ...]] = ()

    @property
    def unit(self) -> int:
        """How many neighbouring places of the last axis belong together; a shard holds whole units."""
        return 1

    def lay(self, x: jax.Array) -> jax.Array:
        """The tensor in the form in which it is coded, float32 [..., length]."""
        return x.reshape(-1).astype(jnp.float32)

    def unlay(self, y: jax.Array, like: Any) -> jax.Array:
        """The inverse of `lay`, in the shape and type of `like`."""
        return y.reshape(like.shape).astype(like.dtype)

    def lay_all(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """All tensors of a message in the forms in which they are coded: each by itself, unless the coder `joins`."""
        return [self.lay(x) for x in xs]

    def unlay_all(self, ys: Sequence[jax.Array], likes: Sequence[Any]) -> list[jax.Array]:
        """The inverse of `lay_all`."""
        return [self.unlay(y, like) for y, like in zip(ys, likes, strict=True)]

    def branches(self, shape: tuple[int, ...]) -> bool:
        """Whether encoding a part of this shape chooses between branches; then shards are encoded one by one."""
        del shape
        return False

    def under(self, feedback: bool) -> "Coder":
        """The coder to use with error feedback (`feedback` is true) or without."""
        del feedback
        return self

    def at(self, strength: Any) -> "Coder":
        """The coder for a tensor of this strength; if the strength never changes, that strength's coder alone."""
        del strength
        return self

    @abc.abstractmethod
    def encode(self, y: jax.Array, part: Part) -> Message:
        """The message that encodes a part [..., length]."""

    @abc.abstractmethod
    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        """The tensor that a message stands for, float32 of `shape`."""

    def add(self, to: jax.Array, message: Message, part: Part, share: float) -> jax.Array:
        """`to` plus `share` times the tensor that the message stands for."""
        return to + self.restore(message, to.shape, part) * share

    def sparse(self, message: Message, shape: tuple[int, ...]) -> Sparse | None:
        """The decoded message of a flat part, for a coder that keeps few of its elements; else None."""
        del message, shape
        return None

    def bounds(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        """Numbers that bound the decoded message in magnitude; some are not finite if anything encoded was not."""
        del shape, part
        return jnp.concatenate([message[name].reshape(-1) for name in self.scales])

    @property
    def silences(self) -> bool:
        """Whether `silenced` makes messages of zeros."""
        return bool(self.scales)

    def silenced(self, message: Message, ok: jax.Array) -> Message:
        """The message; if not `ok`, a message that stands for zeros."""
        return {**message, **{name: jnp.where(ok, message[name], 0) for name in self.scales}}

    @abc.abstractmethod
    def size(self, shape: tuple[int, ...]) -> int:
        """The size in bytes of the message of a part of this shape."""

    def fronts(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """How many bytes count at each strength, if a message is bytes and only its front counts; else None."""
        del shape
        return None

    def compact(self, units: int) -> Compact | None:
        """The shorter form of messages of so many units; None if there is none."""
        del units
        return None

    def code_length(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        """The true length of a message's codes in bits, as a pair; by default that of the whole message."""
        del message, part
        return jnp.array(divmod(8 * self.size(shape), 2**32), jnp.uint32)

    def start(self) -> Any:
        """The coder's first state: () if it draws nothing; else it has a field `step` that counts rounds."""
        return ()

    def after(self, state: Any, length: jax.Array | None) -> Any:
        """The state after a round.

        `length` is the true length of this worker's messages; None if the coder does not tell it.
        """
        if state == ():
            return ()
        state = state._replace(step=state.step + 1)
        return state if length is None else state._replace(length=Mine(CodeLength(length)))


@dataclasses.dataclass(frozen=True)
class Switched(Coder):
    """A coder of several strengths; each tensor has one of them.

    A message is bytes, and only a front of them counts.

    Attributes:
      coders: the coder of each strength; all lay a tensor alike.
    """

    coders: tuple[Coder, ...] = ()

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return any(coder.draws for coder in self.coders)

    @property
    def seed(self) -> int:
        """The seed of the random keys, where any are used; all coders have the same."""
        return getattr(self.coders[0], "seed", 0)

    @property
    def tells_length(self) -> bool:  # type: ignore[override]
        return all(coder.tells_length for coder in self.coders)

    def lay(self, x: jax.Array) -> jax.Array:
        return self.coders[0].lay(x)

    def unlay(self, y: jax.Array, like: Any) -> jax.Array:
        return self.coders[0].unlay(y, like)

    @property
    def unit(self) -> int:
        return self.coders[0].unit

    def branches(self, shape: tuple[int, ...]) -> bool:
        return True

    def under(self, feedback: bool) -> "Switched":
        return dataclasses.replace(self, coders=tuple(coder.under(feedback) for coder in self.coders))

    def at(self, strength: Any) -> Coder:
        return self.coders[strength] if isinstance(strength, int) else self

    def fronts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(coder.size(shape) for coder in self.coders)

    def size(self, shape: tuple[int, ...]) -> int:
        return max(self.fronts(shape))

    def encode(self, y: jax.Array, part: Part) -> Message:
        def encoded(coder: Coder) -> jax.Array:
            return filled(pack_arrays(coder.encode(y, part)), self.size(y.shape))

        return {"data": lax.switch(part.strength, [functools.partial(encoded, coder) for coder in self.coders])}

    def _read(self, message: Message, shape: tuple[int, ...], part: Part, what: Callable[[Coder, Message], Any]) -> Any:
        def branch(coder: Coder) -> Callable[[], Any]:
            keyed = lambda: part._replace(key=jax.random.key(0))  # noqa: E731, any will do for a shape
            like = jax.eval_shape(lambda: coder.encode(jnp.zeros(shape, jnp.float32), keyed()))
            return lambda: what(coder, unpack_arrays(message["data"][: coder.size(shape)], like, cut_as_written))

        return lax.switch(part.strength, [branch(coder) for coder in self.coders])

    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return self._read(message, shape, part, lambda coder, one: coder.restore(one, shape, part))

    def bounds(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        def largest(coder: Coder, one: Message) -> jax.Array:
            bounds = coder.bounds(one, shape, part)
            return jnp.max(jnp.abs(bounds)) + jnp.sum(0 * bounds)  # a maximum may drop a NaN

        return self._read(message, shape, part, largest)

    def code_length(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        return self._read(message, shape, part, lambda coder, one: coder.code_length(one, shape, part))

    def start(self) -> Any:
        return self.coders[0].start()

    def after(self, state: Any, length: jax.Array | None) -> Any:
        return self.coders[0].after(state, length)


@functools.cache
def laid(coder: Coder, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a coder sees a tensor."""
    return jax.eval_shape(coder.lay, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coding(Codec):
    """A codec that only codes: the tensor itself travels, and the state is the coder's.

    Attributes:
      transform: a `transform.Transform` that is applied before the coder, or None.
    """

    transform: Any = None

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        coder = self.coder.coders[-1] if isinstance(self.coder, Switched) else self.coder
        if coder.indexes:
            require_indexable(self.name, path, leaf)
        if not leaf.size:
            return False
        shape = leaf.shape if self.transform is None else (self.transform.length(leaf.size),)
        return coder.size(laid(coder, shape)) < uncompressed

    def view(self, path: str, leaf: Any) -> str:
        shape = laid(self.coder, leaf.shape)
        return f"{shape[1]} columns of {shape[0]}" if len(shape) > 1 else ""

    def coder_state(self, state: Any) -> Any:
        return state

    def with_coder_state(self, state: Any, coder_state: Any) -> Any:
        return coder_state

    def start(self, leaves: dict[str, dict[str, Any]]) -> Any:
        return self.coder.start()

    def tick(self, state: Any, after: Any, ctx: Context) -> Any:
        return after  # the coder counts

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        x, turn = total(d), self.transform
        if turn is None:
            heard = yield Say(x)
            return Result(heard.mean, heard.own)
        heard = yield Say(turn(x), growth=turn.growth)
        return Result(*(turn.inverse(dense(y), x.shape) for y in (heard.mean, heard.own)))
