"""How numbers become bytes: the base of coders, which quantise or select, and their messages.

A coder sees a tensor in the form of `lay`, float32 [..., length]: flat, or a matrix whose columns the last axis counts.
With aggregate="shuffle" or "ring" among n workers the last axis is cut into n shards. Its messages are dicts of arrays
as narrow as they travel. A coder knows nothing of workers or of how its messages are sent.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
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
      index: int32, the place of the shard.
      shards: how many there are; 1: the part is the whole.
      length: that of the whole tensor's last axis; the last shards are filled up with zeros beyond it.
      key: a random key that no other part and no other worker has; None if nothing is drawn.
      strength: int32, like `Context.strength`, or None.
    """

    index: Any
    shards: int
    length: int
    key: Any
    strength: jax.Array | None = None

    def valid(self, each: int) -> jax.Array:
        """How many of this part's `each` places along the last axis the tensor has, int32."""
        if self.length == self.shards * each:
            return jnp.int32(each)
        return jnp.clip(self.length - self.index * each, 0, each)


class Compact(NamedTuple):
    """A shorter form of messages, which not every message has.

    Attributes:
      size: its bytes.
      pack: message -> (bytes uint8 [size], whether the message fits, the true length of its code in bits as a pair).
      unpack: bytes -> message.
    """

    size: int
    pack: Callable[[Message], tuple[jax.Array, jax.Array, jax.Array]]
    unpack: Callable[[jax.Array], Message]


class CodeLength(NamedTuple):
    """True length of one worker's codes in the last step, a part of a codec's state; `code_bits` reads it.

    Attributes:
      last: bits, a uint32 (high, low) pair, [2]; in the global form [workers, 2].
    """

    last: jax.Array


def no_length() -> CodeLength:
    """The length before the first step."""
    return CodeLength(jnp.zeros(2, jnp.uint32))


@dataclasses.dataclass(frozen=True)
class Coder(abc.ABC):
    """Base of coders, frozen dataclasses whose fields are the settings.

    Class attributes:
      name: for messages.
      ways: the aggregations that it goes with.
      rowwise: each unit is encoded on its own, and a message's arrays can be cut between units. A tensor is then
        encoded whole, and its message is cut.
      unit_axis: the axis of a message's arrays that counts units, for a rowwise coder: 0 or -1.
      pooled: the units of all tensors count as one tensor's, and shards may cross tensors; rowwise only.
      draws: whether it uses random keys.
      votes: the mean of decoded tensors is encoded itself, like in a majority vote.
      tells_length: whether messages have unused room, and `code_length` tells of it.
      shares_scale: its codes are integers of a scale that all workers share, and are summed; see `codes.shared`.
      unbiased: whether the decoded tensor is on average the encoded one.
      indexes: whether it numbers a tensor's elements with int32.
      scales: the arrays of a message that bound the decoded tensor in magnitude. If one is not finite, the tensor was
        not; if all are zero, the message decodes to zeros.
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
    indexes: ClassVar[bool] = True
    scales: ClassVar[tuple[str, ...]] = ()

    @property
    def unit(self) -> int:
        """How many places of the last axis belong together: shards are whole units."""
        return 1

    def lay(self, x: jax.Array) -> jax.Array:
        """The tensor in the form in which it is coded, float32 [..., length]."""
        return x.reshape(-1).astype(jnp.float32)

    def unlay(self, y: jax.Array, like: Any) -> jax.Array:
        """The inverse of `lay`, in the shape and type of `like`."""
        return y.reshape(like.shape).astype(like.dtype)

    def branches(self, shape: tuple[int, ...]) -> bool:
        """Whether it chooses between branches to encode a part of this shape: then shards are encoded one by one."""
        del shape
        return False

    def under(self, feedback: bool) -> "Coder":
        """The coder to use with error feedback, or without."""
        del feedback
        return self

    def at(self, strength: Any) -> "Coder":
        """The coder of a tensor of this strength, of which a message may be of that alone."""
        del strength
        return self

    @abc.abstractmethod
    def encode(self, y: jax.Array, part: Part) -> Message:
        """The message of a part [..., length]."""

    @abc.abstractmethod
    def restore(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        """What a message stands for, float32 of `shape`."""

    def add(self, to: jax.Array, message: Message, part: Part, share: float) -> jax.Array:
        """`to` plus `share` times what the message stands for."""
        return to + self.restore(message, to.shape, part) * share

    def sparse(self, message: Message, shape: tuple[int, ...]) -> Sparse | None:
        """The decoded message of a flat part, for a coder that keeps few of its elements."""
        del message, shape
        return None

    def bounds(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        """Numbers that bound the decoded message in magnitude; not all finite if anything was not."""
        del shape, part
        return jnp.concatenate([message[name].reshape(-1) for name in self.scales])

    @property
    def silences(self) -> bool:
        """Whether `silenced` makes messages of zeros."""
        return bool(self.scales)

    def silenced(self, message: Message, ok: jax.Array) -> Message:
        """The message, or if not `ok` one that stands for zeros."""
        return {**message, **{name: jnp.where(ok, message[name], 0) for name in self.scales}}

    @abc.abstractmethod
    def size(self, shape: tuple[int, ...]) -> int:
        """The bytes of the message of a part of this shape."""

    def fronts(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """If a message is bytes and only a front counts: how many bytes, at each strength. Else None."""
        del shape
        return None

    def compact(self, units: int) -> Compact | None:
        """The shorter form of messages of so many units, if there is one."""
        del units
        return None

    def code_length(self, message: Message, shape: tuple[int, ...], part: Part) -> jax.Array:
        """The true length of a message's codes, in bits, as a pair; by default all of it."""
        del message, part
        return jnp.array(divmod(8 * self.size(shape), 2**32), jnp.uint32)

    def start(self) -> Any:
        """The coder's own state: () if it draws nothing, and else with a field `step` that counts rounds."""
        return ()

    def after(self, state: Any, length: jax.Array | None) -> Any:
        """The state after a round in which this worker's messages had this true length, if that is told."""
        if state == ():
            return ()
        state = state._replace(step=state.step + 1)
        return state if length is None else state._replace(length=Mine(CodeLength(length)))


@dataclasses.dataclass(frozen=True)
class Switched(Coder):
    """A coder of several strengths, one for each tensor: a message is bytes, and only a front of them counts.

    Attributes:
      coders: by strength; all lay a tensor alike.
    """

    coders: tuple[Coder, ...] = ()

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return any(coder.draws for coder in self.coders)

    @property
    def seed(self) -> int:
        """Of the random keys, where any are used; all have one."""
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
    """A codec that only codes: the tensor itself travels. Its state is the coder's.

    Attributes:
      transform: a `transform.Transform` that goes before the coder, or None.
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
