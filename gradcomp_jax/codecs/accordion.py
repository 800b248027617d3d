"""Accordion: strong compression, but weak where training is in a critical regime.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos, "Accordion: Adaptive Gradient Communication via Critical Learning
Regime Identification", MLSys 2021, arXiv 2010.16248, Algorithm 1. There is a check every `interval` steps. D is the
sum of a layer's gradients over the last `window` steps, and D' is that sum at the check before:

    critical if | |D'| - |D| | / |D'| >= threshold,  or  the learning rate fell
    critical -> low (compression), else -> high

Each layer decides by itself, or the whole tree decides once. All layers are at low before the second check. A layer
whose D' was zero is at low too. If the learning rate falls, all layers go to low at once, until the next check.

The two levels are two strengths of one codec: ranks of PowerSGD, fractions of top-k, bits of QSGD, ratios of GradiVeQ.
They share one state: PowerSGD keeps its warm start and drops or draws columns, GradiVeQ keeps its bases, and there is
one residual. All of it is inside the compiled step. At the high level fewer bytes really travel: the layers' numbers
fill one buffer from its front, and the smallest of some fixed sizes that holds them is sent.

Where sources differ: the printed rule lacks the absolute value, which its definition and the authors' code have. Here D
is each worker's own sum of the gradients before error feedback, and the workers' norms are averaged. In the authors'
code the first worker's norms decide (`norm_source="first_worker"`), a window is one epoch of every ten, and PowerSGD's
Q is drawn anew on each switch (`reset_on_switch=True`). Their top-k reducer sums where the paper averages, and keeps no
residual.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradcomp_jax.arguments import factory
from gradcomp_jax.codecs.switching import Switching, require_strengths
from gradcomp_jax.compressor import Compressor, compressor
from gradcomp_jax.contract import (
    Context,
    First,
    Mine,
    OverShards,
    Say,
    Strength,
    Talk,
    alongside,
    bare,
    require_whole,
)
from gradcomp_jax.sharding import PerWorker
from gradcomp_jax.views import inverse_power, l2_norm

LOW, HIGH = 0, 1
NORM_SOURCES = ("mean", "first_worker")
# Larger norms count as this one.
MOST = 1e30


class AccordionState(NamedTuple):
    """State of `accordion`; the same on all workers, except for `gradients`. Arrays are by leaf path.

    Attributes:
      codec: the codec's state, which serves both levels.
      level: int32, the level of the next step: 0 is low, 1 is high.
      gradients: the sum of this worker's gradients over the window so far, float32.
      previous: the norm |D'| at the check before the last, float32; zero if there was none.
      norm: the norm |D| at the last check; zero if there was none.
      restart: bool, with reset_on_switch, whether the level changed after the last step; else empty.
      step: int32, exchanges done.
      checked: int32, exchanges that were done at the last check; 0 before the first check.
      dropped: int32, exchanges that were done when the learning rate last fell; -1 before that.
      learning_rate: the learning rate of the last step, float32; 0 before the first step, and without a learning rate.
    """

    codec: Any
    level: dict[str, jax.Array]
    gradients: Any
    previous: dict[str, jax.Array]
    norm: dict[str, jax.Array]
    restart: dict[str, jax.Array]
    step: jax.Array
    checked: jax.Array
    dropped: jax.Array
    learning_rate: jax.Array


def next_level(previous: jax.Array, norm: jax.Array, threshold: float) -> jax.Array:
    """The rule, int32: `LOW` if |D'| is zero or |D| differs from |D'| by `threshold` * |D'| or more; else `HIGH`."""
    change = jnp.abs(previous - norm) / jnp.where(previous > 0, previous, 1)
    return jnp.where((previous > 0) & (change < threshold), HIGH, LOW).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Accordion(Switching):
    """The controller around a codec with two strengths; see `accordion`."""

    interval: int
    window: int
    threshold: float
    per_layer: bool
    schedule: optax.Schedule | None
    norm_source: str
    reset_on_switch: bool

    name: ClassVar[str] = "accordion"

    def init(self, path: str, leaf: Any, salt: int) -> dict[str, Any]:
        return super().init(path, leaf, salt) | {"gradients": jnp.zeros(leaf.shape, jnp.float32)}

    def start(self, leaves: dict[str, dict[str, Any]]) -> AccordionState:
        def each(value: Any) -> dict[str, jax.Array]:
            return {path: jnp.asarray(value) for path in leaves}

        return AccordionState(
            codec=self.inner_start(leaves),
            level=each(jnp.int32(LOW)),
            gradients=Mine({path: x["gradients"] for path, x in leaves.items()}),
            previous=each(jnp.float32(0)),
            norm=each(jnp.float32(0)),
            restart=each(False) if self.reset_on_switch else {},
            step=jnp.int32(0),
            checked=jnp.int32(0),
            dropped=jnp.int32(-1),
            learning_rate=jnp.float32(0),
        )

    def leaf(self, state: AccordionState, path: str) -> Any:
        restart = state.restart[path] if self.reset_on_switch else False
        mine = {"level": state.level[path], "gradients": bare(state.gradients)[path], "restart": restart}
        return super().leaf(state, path)._replace(**mine)

    def merge(self, state: AccordionState, news: dict[str, dict[str, Any]]) -> AccordionState:
        norm = {path: x["norm"] for path, x in news.items() if "norm" in x}
        sums = {path: x["gradients"] for path, x in news.items() if "gradients" in x}
        gradients = Mine({**bare(state.gradients), **sums})
        return super().merge(state, news)._replace(norm={**state.norm, **norm}, gradients=gradients)

    def kinds(self, state: AccordionState) -> dict[str, AccordionState]:
        found = {}
        for name, kind in super().kinds(state).items():
            for what, level in (("high", HIGH), ("low", LOW)):
                levels = dict.fromkeys(state.level, jnp.int32(level))
                found[f"{name}, {what}" if name else what] = kind._replace(level=levels)
        return found

    def rate(self, state: AccordionState, learning_rate: Any) -> jax.Array:
        """The learning rate of this step, float32; 0 if it is not known."""
        if learning_rate is None:
            learning_rate = 0.0 if self.schedule is None else self.schedule(state.step)
        return jnp.asarray(learning_rate, jnp.float32)

    def strengths(self, state: AccordionState, paths: Iterable[str], learning_rate: Any) -> dict[str, jax.Array]:
        fell = self.rate(state, learning_rate) < state.learning_rate
        return {path: jnp.where(fell, LOW, state.level[path]) for path in paths}

    def window_sum(self, leaf: Any, gradient: jax.Array) -> jax.Array:
        """The sum of gradients over the window so far, with this gradient."""
        place = leaf.step % self.interval
        more = jnp.where(place == 0, 0, leaf.gradients) + gradient.astype(jnp.float32)
        most = float(jnp.finfo(jnp.float32).max)  # a sum that left the range would never come back
        return jnp.where(place < self.window, jnp.clip(more, -most, most), leaf.gradients)

    def checks(self, state: AccordionState) -> jax.Array:
        """Whether this step checks."""
        return state.step % self.interval == self.window - 1

    def talk(self, phase: int, d: tuple[jax.Array, ...], leaf: Any, ctx: Context) -> Talk:
        if self.reset_on_switch:
            assert ctx.strength is not None
            restart = leaf.restart | (ctx.strength != leaf.level)
            leaf = leaf._replace(codec=self.inner.forget(leaf.codec, restart))
        sums = self.window_sum(leaf, d[0])
        # The norm rides in every step, and means something in those that check: one float a leaf costs less than a
        # conditional. It must be finite if the gradients are, or this step and all later ones would be skipped.
        norm = lax.cond(
            self.checks(leaf),
            lambda: jnp.minimum(l2_norm(sums.reshape(1, -1))[0, 0], MOST),
            lambda: 0 * sums.reshape(-1)[0],
        )
        if ctx.shards > 1:  # the norm of the whole leaf; its squares may leave their type's range
            largest = yield OverShards(norm, largest=True)
            down = inverse_power(largest)
            norm = jnp.minimum(jnp.sqrt((yield OverShards((norm * down) ** 2))) / down, MOST)
        ask = First(norm) if self.norm_source == "first_worker" else Say(norm, exact=True)
        result, heard = yield from alongside(super().talk(phase, d, leaf, ctx), ask)
        agreed = heard if self.norm_source == "first_worker" else heard.mean
        if ctx.shards > 1:  # the same on all chips, but the types of what travels beside shards do not say so
            agreed = yield OverShards(agreed, largest=True)
        return result._replace(news=result.news | {"norm": agreed})

    def absorb(
        self, leaf: Any, d: tuple[jax.Array, ...], mean: jax.Array, ok: jax.Array, ctx: Context
    ) -> dict[str, Any]:
        sums = jnp.where(ok, self.window_sum(leaf, d[0]), leaf.gradients)
        return super().absorb(leaf, d, mean, ok, ctx) | {"gradients": sums}

    def tick(self, state: AccordionState, after: AccordionState, ctx: Context) -> AccordionState:
        rate, level = self.rate(state, ctx.learning_rate), self.strengths(state, state.level, ctx.learning_rate)
        fell, check = rate < state.learning_rate, self.checks(state)
        norm = after.norm  # this step's, on which the workers agree
        if not self.per_layer:
            joint = l2_norm(jnp.stack(list(norm.values()))[None])[0, 0]
            norm = dict.fromkeys(norm, joint)
        decided = {}
        for path, now in norm.items():
            by_norm = jnp.where(fell, LOW, next_level(state.norm[path], now, self.threshold))
            decided[path] = jnp.where(check, by_norm, level[path])
        choose = lambda new, old: {path: jnp.where(check, new[path], old[path]) for path in level}  # noqa: E731
        after = super().tick(state, after, ctx)
        return after._replace(
            level=decided,
            previous=choose(state.norm, state.previous),
            norm=choose(norm, state.norm),
            restart={path: decided[path] != level[path] for path in state.restart},
            checked=jnp.where(check, state.step + 1, state.checked),
            dropped=jnp.where(fell, state.step, state.dropped),
            learning_rate=rate,
        )


@factory
def accordion(
    low: Compressor,
    high: Compressor,
    *,
    interval: int,
    window: int | None = None,
    threshold: float = 0.5,
    per_layer: bool = True,
    learning_rate: optax.Schedule | None = None,
    norm_source: str = "mean",
    reset_on_switch: bool = False,
) -> Compressor:
    """Accordion (Agarwal et al., MLSys 2021, Algorithm 1) over two strengths of one codec.

    low and high give the keywords of all codecs (`axis_name`, `error_feedback`, `min_size`, `compress`, `allow_dense`),
    and must agree in them. Beside the codec's state, each worker keeps a float32 sum of gradients of the size of the
    compressed leaves. Each step sends one float more for each compressed leaf.

    Args:
      low: the codec at weak compression, such as `powersgd(rank=4)`. Which leaves are compressed is decided at `high`.
        At `low` a leaf may even take more bytes than uncompressed, as with the authors' `topk(0.99)`.
      high: the same codec at strong compression, such as `powersgd(rank=1)`.
      interval: steps from check to check. In the authors' code ten epochs.
      window: the number of steps at the beginning of each interval over which gradients are summed. The check follows
        them. By default the whole interval. In the authors' code one epoch.
      threshold: eta. A layer is critical if its norm changes by this share or more.
      per_layer: each leaf decides by its own norm; if False, all leaves decide together by the norm over all.
      learning_rate: the schedule of the optimiser that follows; or give `learning_rate=` to the transformation's update
        in each step. Without either, the second part of the rule does not exist. It is meant for schedules that fall
        in steps: under one that falls all the time, such as a cosine, everything stays low.
      norm_source: whose norm decides: the "mean" of the workers' norms, or that of the "first_worker", as in the
        authors' code.
      reset_on_switch: draw PowerSGD's Q anew when the level changes, as in the authors' code.

    Returns:
      A `Compressor`. See `accordion_log` for its decisions and their reasons.

    Raises:
      ValueError: low and high are not two strengths of one codec, the weaker first, with otherwise the same settings;
        or an argument is out of range.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> steps = 390  # an epoch
    >>> codec = gcj.accordion(low=gcj.powersgd(rank=2), high=gcj.powersgd(rank=1), interval=10 * steps, window=steps)
    >>> tx = optax.chain(codec, optax.sgd(0.1, momentum=0.9))
    """
    require_whole("interval", interval, 1)
    window = interval if window is None else window
    require_whole("window", window, 1)
    if window > interval:
        raise ValueError(f"window={window} must be at most interval={interval}, of which it is the beginning")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be above 0, it is a relative change")
    if norm_source not in NORM_SOURCES:
        raise ValueError(f"norm_source={norm_source!r} must be one of {', '.join(map(repr, NORM_SOURCES))}")
    weak, strong = _weak_and_strong(low, high)
    inner = weak.at((weak.value, strong.value))
    codec = Accordion(inner, interval, window, threshold, per_layer, learning_rate, norm_source, reset_on_switch)
    return compressor(codec, low.settings)


def accordion_log(opt_state: Any) -> list[str]:
    """The last decisions of `accordion` and their reasons, one line for each leaf.

    Args:
      opt_state: an optimiser state that holds the state of one or more accordions, in any form.

    Returns:
      Lines such as "conv1/kernel: high from step 780 on, as the norm changed from 3.1 to 2.9, by 0.06"; empty without
      an accordion.
    """
    is_accordion = lambda x: isinstance(x, AccordionState)  # noqa: E731
    lines = []
    for state in jax.tree.leaves(opt_state, is_leaf=is_accordion):
        if is_accordion(state):
            read = jax.tree.map(_first, state._replace(codec=(), gradients=PerWorker((), "")))
            lines += [f"{path}: {_reason(read, path)}" for path in read.level]
    return lines


def _first(x: Any) -> Any:
    # pmap keeps one copy on each device; all are the same.
    return np.asarray(jax.device_get(x)).reshape(-1)[0]


def _reason(state: AccordionState, path: str) -> str:
    if state.dropped >= state.checked or (state.checked and state.dropped == state.checked - 1):
        return f"low from step {state.dropped} on, as the learning rate fell to {state.learning_rate:.3g}"
    previous, norm = state.previous[path], state.norm[path]
    if not state.checked or not previous:
        return f"low, as there is no norm before the {'next' if not state.checked else 'last'} check to compare with"
    change = abs(previous - norm) / previous if math.isfinite(previous) else math.nan
    level = ("low", "high")[int(state.level[path])]
    return (
        f"{level} from step {state.checked} on, as the norm changed from {previous:.3g} to {norm:.3g}, by {change:.2f}"
    )


def _weak_and_strong(low: Compressor, high: Compressor) -> tuple[Strength, Strength]:
    """Their strengths; raises ValueError unless low and high are two strengths of one codec, the weaker first."""
    weak, strong = require_strengths("accordion", {"low": low, "high": high})
    if (weak.value > strong.value) != weak.more_sends_more or weak.value == strong.value:
        order = "above" if weak.more_sends_more else "below"
        raise ValueError(
            f"low has {weak.setting}={weak.value}, which must be {order} high's {weak.setting}={strong.value}: low is "
            "the weak compression, which sends more"
        )
    return weak, strong
