"""Settings by the leaves' paths: the first pattern that is found in a leaf's path chooses its codec."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import optax

from gradcomp_jax.arguments import as_written, factory, shown
from gradcomp_jax.codecs.switching import Switching, alike
from gradcomp_jax.compressor import PLACEHOLDER, Compressor, compressor
from gradcomp_jax.contract import Codec, Context, Predicate, Uncompressed
from gradcomp_jax.exchange import collectives
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.sharding import map_per_worker


class PerLayerState(NamedTuple):
    """State of `per_layer` if all compressed leaves have one codec.

    Attributes:
      codec: the codec's state.
    """

    codec: Any


@dataclasses.dataclass(frozen=True)
class Patterns:
    """Regular expressions; the first that is found in a leaf's path decides.

    Attributes:
      texts: the expressions, in order.
    """

    texts: tuple[str, ...]

    def place(self, path: str) -> int:
        """The place of the pattern that decides; ValueError if none does."""
        for place, text in enumerate(self.texts):
            if re.search(text, path):
                return place
        raise ValueError(
            f"per_layer: no pattern matches leaf {path!r}, there are {', '.join(map(repr, self.texts))}: add one for "
            f"it, such as {'^' + re.escape(path) + '$'!r}, or '' as the last, for all other leaves"
        )

    def require(self, paths: Sequence[str]) -> None:
        """Raises ValueError for a leaf that no pattern matches, and for a pattern that decides about no leaf.

        A tree without leaves is not checked, and neither is the pattern "", which stands for all other leaves.
        """
        used = {self.place(path) for path in paths}
        for place, text in enumerate(self.texts):
            if not paths or not text or place in used:
                continue
            taken = [path for path in paths if re.search(text, path)]
            if taken:
                earlier = self.texts[self.place(taken[0])]
                why = f"for leaf {taken[0]!r} the earlier {earlier!r} does: put {text!r} before that"
            else:
                some = ", ".join(map(repr, paths[:4])) + ", ..." * (len(paths) > 4)
                why = f"it is found in no path, there are {some}: correct it, or leave it out"
            raise ValueError(f"per_layer: pattern {text!r} decides about no leaf; {why}")


@dataclasses.dataclass(frozen=True)
class PerLayer(Switching):
    """Strengths of one codec; each leaf has the same strength in all steps; see `per_layer`.

    Attributes:
      each: the codec at each strength alone.
      patterns: the patterns that decide.
      places: the strength of each pattern; None: its leaves are sent dense, or belong to another codec.
      all_leaves: whether it sees the whole tree, so each pattern must be found in it.
    """

    each: tuple[Codec, ...]
    patterns: Patterns
    places: tuple[int | None, ...]
    all_leaves: bool

    name: ClassVar[str] = "per_layer"

    def require_leaves(self, paths: Sequence[str]) -> None:
        if self.all_leaves:
            self.patterns.require(paths)

    def of_part(self) -> "PerLayer":
        return dataclasses.replace(self, all_leaves=False)

    def place(self, path: str) -> int | None:
        """The place of a leaf's strength; None: the leaf is sent dense."""
        return self.places[self.patterns.place(path)]

    def of(self, path: str) -> Codec:
        place = self.place(path)
        assert place is not None, "a dense leaf has no codec"
        return self.each[place]

    def to(self, ctx: Context) -> tuple[Codec, Context]:
        if len(self.each) == 1:
            return self.inner, ctx
        return self.each[ctx.strength], ctx._replace(strength=None)

    def start(self, leaves: dict[str, dict[str, Any]]) -> PerLayerState:
        return PerLayerState(self.inner_start(leaves))

    def strengths(self, state: PerLayerState, paths: Iterable[str], learning_rate: Any) -> dict[str, Any]:
        if len(self.each) == 1:
            return self.inner.strengths(state.codec, paths, learning_rate)
        return {path: self.place(path) for path in paths}


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Which leaves `PerLayer` compresses. It is a value, so compressors can be compared.

    Attributes:
      codec: the codec.
      compress: the user's choice, or None.
    """

    codec: PerLayer
    compress: Predicate | None

    def __call__(self, path: str, leaf: Any) -> bool:
        if self.codec.place(path) is None:
            return False
        return (self.compress or self.codec.default)(path, leaf)


@factory
def per_layer(codecs: Mapping[str, Compressor]) -> optax.GradientTransformationExtraArgs:
    """Another codec, or another strength, for each kind of leaf: `{pattern: codec}`.

    A pattern is a regular expression that is searched in the leaf's path, such as "layer1/kernel". The first pattern of
    the dict that is found decides. The pattern "" stands for all other leaves.

    Strengths of one codec with otherwise the same settings are a family. Its leaves share the codec's messages, and
    leaves of `none()` ride with them. A leaf sends what it sends alone. With a single family the outcome is a codec
    like others, which `delayed` and `across` take too. Several families exchange one after another, each in messages
    of its own; `wire_bits` and `skipped` add up over them. If a gradient is not finite, its family skips;
    `train_step` and `simulate` skip the whole step.

    Args:
      codecs: a codec for each pattern, such as `topk(0.01)` or `none()`.

    Returns:
      A transformation to put first in `optax.chain`; a `Compressor`, if there is one family.

    Raises:
      ValueError: codecs is no such dict, or a pattern no regular expression; in init and update, no pattern matches a
        leaf, or a pattern other than "" decides about none.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> by_path = {"embed": gcj.topk(0.01), "head|bias": gcj.none(), "": gcj.powersgd(4)}
    >>> tx = optax.chain(gcj.per_layer(by_path), optax.adam(1e-3))
    """
    _require_codecs(codecs)
    patterns, given = Patterns(tuple(codecs)), list(codecs.values())
    families = _families(given)
    made = [_made(patterns, given, family, len(families) == 1) for family in families]
    if len(made) == 1:
        return made[0]
    return _one_after_another(patterns, families, made)


class _Family(NamedTuple):
    """Codecs that exchange together.

    Attributes:
      places: the places, among all given codecs, of the strengths of one codec.
      dense: the places of those none() whose leaves ride with them.
    """

    places: list[int]
    dense: list[int]


def _require_codecs(codecs: Any) -> None:
    if not isinstance(codecs, Mapping) or not codecs:
        raise ValueError(
            f"codecs={shown(codecs)} must be a dict of patterns and codecs, such as {{'bias': none(), '': powersgd(4)}}"
        )
    for text, codec in codecs.items():
        if not isinstance(text, str):
            raise ValueError(f"pattern {shown(text)} must be a string, which is searched in the leaves' paths")
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"pattern {text!r} is no regular expression: {error}") from error
        if not isinstance(codec, Compressor):
            raise ValueError(f"the value of pattern {text!r} is {shown(codec)}, it must be a codec such as topk(0.01)")


def _families(given: list[Compressor]) -> list[_Family]:
    """Which codecs exchange together; none() rides with others, preferably if their numbers are summed as they are."""
    families: list[_Family] = []
    by_coder = sorted(range(len(given)), key=lambda place: isinstance(given[place].codec, Uncompressed))
    for place in by_coder:
        one = given[place]
        like = next((family for family in families if alike([given[family.places[0]], one])), None)
        by_sum = sorted(families, key=lambda family: given[family.places[0]].codec.coder is not None)
        with_it = next((family for family in by_sum if _rides(one, given[family.places[0]])), None)
        if like is not None:
            like.places.append(place)
        elif with_it is not None:
            with_it.dense.append(place)
        else:
            families.append(_Family([place], []))
    return families


def _rides(dense: Compressor, codec: Compressor) -> bool:
    """Whether `dense` is a none() whose leaves another codec may send with its own dense ones."""
    mine, theirs = dense.settings, codec.settings
    if not isinstance(dense.codec, Uncompressed) or mine.error_feedback is not None:
        return False
    same = all(
        getattr(mine, x) == getattr(theirs, x) for x in ("axis_name", "dense_dtype", "buckets", "fast", "inside")
    )
    return same and mine.aggregate in ("psum", theirs.aggregate)


def _made(patterns: Patterns, given: list[Compressor], family: _Family, all_leaves: bool) -> Compressor:
    """The codec of a family."""
    values = list(dict.fromkeys(given[place] for place in family.places))
    first = values[0]
    if len(values) == 1 and not family.dense and not all_leaves:
        return first
    places = tuple(values.index(x) if place in family.places else None for place, x in enumerate(given))
    strengths = [x.codec.strength for x in values if x.codec.strength is not None]
    inner = strengths[0].at(tuple(x.value for x in strengths)) if len(values) > 1 else first.codec
    codec = PerLayer(inner, tuple(x.codec for x in values), patterns, places, all_leaves)
    compress = first.settings.compress
    chosen = _Chosen(codec, compress) if family.dense or compress else None
    mine = {patterns.texts[place]: given[place] for place in sorted(family.places + family.dense)}
    return compressor(codec, first.settings._replace(compress=chosen)).named(f"per_layer({as_written(mine)})")


def _one_after_another(
    patterns: Patterns, families: list[_Family], made: list[Compressor]
) -> optax.GradientTransformationExtraArgs:
    """Each family's codec on its own leaves; exchanges do not run side by side, see `collectives.in_order`."""

    def mask(tree: Any, family: _Family) -> Any:
        leaves, treedef = flatten(tree)
        return jax.tree.unflatten(treedef, [patterns.place(path) in family.places + family.dense for path in leaves])

    masked = [
        optax.masked(tx, functools.partial(mask, family=family)) for family, tx in zip(families, made, strict=True)
    ]
    parts = [optax.with_extra_args_support(tx) for tx in masked]

    def init_fn(params: Any) -> tuple[Any, ...]:
        if not isinstance(params, PLACEHOLDER):
            patterns.require(tuple(flatten(params)[0]))
        return tuple(part.init(params) for part in parts)

    def update_fn(updates: Any, state: tuple[Any, ...], params: Any = None, **extra_args: Any):
        after: list[Any] = []
        for part, before in zip(parts, state, strict=True):
            # Each worker's own state would make the next family's updates look like each worker's own.
            shared = [map_per_worker(lambda _: (), one, lambda x: x) for one in after]
            updates, one = part.update(collectives.after(updates, shared), before, params, **extra_args)
            after.append(one)
        return updates, tuple(after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
