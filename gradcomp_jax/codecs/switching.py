"""Several strengths of one codec: the settings in which they must agree, and the base of codecs that switch them.

The strengths share one state and one residual, and all of it is inside one compiled step; see `contract.Strength`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gradcomp_jax.arguments import shown
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.contract import Codec, Context, Gain, Strength, Talk
from gradcomp_jax.cuts import Cut
from gradcomp_jax.feedback import as_given


@dataclasses.dataclass(frozen=True)
class Switching(Codec):
    """Base of codecs around an inner codec with several strengths; the field `codec` of their state is its state.

    Attributes:
      inner: the inner codec, as `Strength.at` makes it, with the weakest compression first.
    """

    inner: Any

    def of(self, path: str) -> Codec:
        """The codec of one leaf, for what depends on its shape."""
        del path
        return self.inner

    def to(self, ctx: Context) -> tuple[Codec, Context]:
        """The codec that talks for one leaf, and its context."""
        return self.inner, ctx

    @property
    def coder(self) -> Any:
        return self.inner.coder

    @property
    def phases(self) -> int:
        return self.inner.phases

    def default(self, path: str, leaf: Any) -> bool:
        return self.of(path).default(path, leaf)

    def shrinks(self, path: str, leaf: Any, uncompressed: int) -> bool:
        return self.of(path).shrinks(path, leaf, uncompressed)  # it judges by its strongest compression

    def cut(self, path: str, leaf: Any) -> Cut:
        return self.of(path).cut(path, leaf)

    def arrives(self, path: str, leaf: Any) -> int | None:
        return self.of(path).arrives(path, leaf)

    def of_shards(self, state: Any, f: Callable[[Any, str], Any]) -> Any:
        return state._replace(codec=self.inner.of_shards(state.codec, f))

    def shard_cut(self, name: str, path: str, leaf: Any) -> Cut | None:
        return self.of(path).shard_cut(name, path, leaf)

    def view(self, path: str, leaf: Any) -> str:
        return self.of(path).view(path, leaf)

    def gain(self, path: str, leaf: Any) -> Gain | None:
        return self.of(path).gain(path, leaf)

    def init(self, path: str, leaf: Any, salt: int) -> dict[str, Any]:
        return {"codec": self.of(path).init(path, leaf, salt)}

    def inner_start(self, leaves: dict[str, dict[str, Any]]) -> Any:
        """The first state of the inner codec, from the results of `init`."""
        return self.inner.start({path: x["codec"] for path, x in leaves.items()})

    def leaf(self, state: Any, path: str) -> Any:
        return state._replace(codec=self.inner.leaf(state.codec, path))

    def merge(self, state: Any, news: dict[str, dict[str, Any]]) -> Any:
        return state._replace(codec=self.inner.merge(state.codec, {p: x.get("codec", {}) for p, x in news.items()}))

    def coder_state(self, state: Any) -> Any:
        return self.inner.coder_state(state.codec)

    def with_coder_state(self, state: Any, coder_state: Any) -> Any:
        return state._replace(codec=self.inner.with_coder_state(state.codec, coder_state))

    def step(self, state: Any) -> jax.Array:
        return state.step if hasattr(state, "step") else self.inner.step(state.codec)

    def phase(self, state: Any) -> jax.Array:
        return self.inner.phase(state.codec)

    def kinds(self, state: Any) -> dict[str, Any]:
        return {name: state._replace(codec=inner) for name, inner in self.inner.kinds(state.codec).items()}

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        codec, ctx = self.to(ctx)
        result = yield from codec.talk(phase, d, leaf.codec, ctx)
        return result._replace(news={"codec": result.news})

    def absorb(
        self, leaf: Any, d: tuple[jax.Array, ...], mean: jax.Array, ok: jax.Array, ctx: Context
    ) -> dict[str, Any]:
        codec, ctx = self.to(ctx)
        return {"codec": codec.absorb(leaf.codec, d, mean, ok, ctx)}

    def adopt(self, leaf: Any, mean: jax.Array, ok: jax.Array) -> dict[str, Any]:
        return {"codec": self.inner.adopt(leaf.codec, mean, ok)}

    def due(self, state: Any) -> jax.Array | None:
        return self.inner.due(state.codec)

    def refresh(self, before: Any, after: Any, mean: jax.Array, ctx: Context) -> Any:
        codec, ctx = self.to(ctx)
        news = yield from codec.refresh(before.codec, after.codec, mean, ctx)
        return {"codec": news}

    def kept(self, leaf: Any) -> dict[str, Any]:
        return {"codec": self.inner.kept(leaf.codec)}

    def tick(self, state: Any, after: Any, ctx: Context) -> Any:
        return super().tick(state, after._replace(codec=self.inner.tick(state.codec, after.codec, ctx)), ctx)

    def flushed(self, state: Any) -> Any:
        return state._replace(codec=self.inner.flushed(state.codec))


def require_strengths(by: str, given: Mapping[str, Any]) -> list[Strength]:
    """The strengths of some codecs.

    Args:
      by: the name, for messages, of the codec that switches between them.
      given: the codecs' transformations, by their names in messages.

    Raises:
      ValueError: one is no codec, or has only one strength; or two are not strengths of one codec with otherwise the
        same settings.
    """
    for name, one in given.items():
        if not isinstance(one, Compressor):
            raise ValueError(f"{name}={shown(one)} must be a codec such as powersgd(rank=2)")
        if one.codec.strength is None:
            raise ValueError(
                f"{name}: codec {one.codec.name!r} in these settings has one strength only; {by} switches the rank of "
                "powersgd, the fraction of topk, randomk and randomblock, the bits of qsgd (code='packed', without "
                "levels= and shared_scale), the proportion of adaptive, the ratio of gradiveq (select='ratio'), "
                "without a quantizer inside"
            )
    first, *others = given.items()
    for other in others:
        if difference := _difference(by, first, other):
            raise ValueError(difference)
    return [one.codec.strength for one in given.values()]


def alike(codecs: Sequence[Compressor]) -> bool:
    """Whether these are strengths of one codec with otherwise the same settings; without strengths, whether equal."""
    first, *others = codecs
    if any(one.codec.strength is None for one in codecs):
        return all(other == first for other in others)
    return not any(_difference("", ("", first), ("", other)) for other in others)


def _difference(by: str, one: tuple[str, Compressor], other: tuple[str, Compressor]) -> str:
    """The first difference of two codecs, with their names, beside their strength; empty if there is none."""
    (first, a), (second, b) = one, other
    mine, theirs = a.codec.strength, b.codec.strength
    assert mine is not None
    assert theirs is not None
    if a.codec.name != b.codec.name or mine.setting != theirs.setting:
        return (
            f"{first} is {a.codec.name} by {mine.setting}, {second} is {b.codec.name} by {theirs.setting}: {by} "
            "switches between strengths of one codec, which share its state"
        )
    for name, x, y in [
        *((name, x, theirs.others[name]) for name, x in mine.others.items()),
        *zip(a.settings._fields, a.settings, b.settings, strict=True),
    ]:
        if x != y:
            x, y = (as_given(z) if name == "error_feedback" else z for z in (x, y))
            return (
                f"{first} has {name}={x!r}, {second} has {name}={y!r}: they must agree in all but {mine.setting} (pass "
                "one function object to both)"
            )
    return ""
