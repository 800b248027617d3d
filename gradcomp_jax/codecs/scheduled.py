"""A codec whose strength follows a schedule of the exchanges done.

One example is the warm-up of Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887,
section 3.3: it sends 25, 6.25, 1.5625, 0.4 and 0.1 per cent of the gradients, for an epoch each. Another is a rank that
grows. The given values are v_0, v_1, ..., those that send more first, and w is the wanted value of the schedule.
The value in use is

    the first v_i that sends no more than w does, else the last

So w is rounded to the next value that sends less. A w that would send less than all of them gets the last.

The strengths share one state, and all of it is inside the compiled step, as with `accordion`. Fewer bytes
really travel at a strength that sends less.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradcomp_jax.arguments import factory, shown
from gradcomp_jax.codecs.switching import Switching, require_strengths
from gradcomp_jax.compressor import Compressor, compressor

# The share by which a wanted value may miss a codec's value: schedules multiply in float32.
ROUNDING = 1e-5
# The schedule is asked at this many first steps, and at as many more up to 2^30, which strengths it uses.
LOOKS = 1024


class ScheduledState(NamedTuple):
    """State of `scheduled`, the same on all workers.

    Attributes:
      codec: the codec's state, which serves all strengths.
      step: int32, exchanges done; the schedule is asked at it.
    """

    codec: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Scheduled(Switching):
    """The controller around a codec with several strengths; see `scheduled`.

    Attributes:
      values: the values of the strengths; those that send more come first.
      schedule: exchanges done -> the wanted value.
    """

    values: tuple[float, ...]
    schedule: optax.Schedule

    name: ClassVar[str] = "scheduled"

    def start(self, leaves: dict[str, dict[str, Any]]) -> ScheduledState:
        return ScheduledState(self.inner_start(leaves), jnp.int32(0))

    def strengths(self, state: ScheduledState, paths: Iterable[str], learning_rate: Any) -> dict[str, jax.Array]:
        return dict.fromkeys(paths, self.place(self.schedule(state.step)))

    def kinds(self, state: ScheduledState) -> dict[str, ScheduledState]:
        # Each strength, at the first step of those looked at that uses it.
        steps = np.unique(np.concatenate([np.arange(LOOKS), np.geomspace(1, 2**30, LOOKS)]).astype(np.int32))
        places = np.asarray(jax.vmap(lambda step: self.place(self.schedule(step)))(steps))
        used = {place: steps[np.argmax(places == place)] for place in sorted(set(places.tolist()), reverse=True)}
        setting = self.inner.strength.setting
        return {
            f"{name}, {setting}={self.values[place]}" if name else f"{setting}={self.values[place]}": kind._replace(
                step=step
            )
            for name, kind in super().kinds(state).items()
            for place, step in used.items()
        }

    def place(self, wanted: Any) -> jax.Array:
        """The place, among the values, of the one that is in use for a wanted value, int32."""
        wanted, values = jnp.asarray(wanted).astype(jnp.float32), jnp.array(self.values, jnp.float32)
        falls = self.values[0] > self.values[-1]
        enough = values <= wanted * (1 + ROUNDING) if falls else values >= wanted * (1 - ROUNDING)
        return jnp.minimum(jnp.sum(~enough, dtype=jnp.int32), len(self.values) - 1)


@factory
def scheduled(codecs: Sequence[Compressor], schedule: optax.Schedule) -> Compressor:
    """A codec whose strength follows a schedule: a warm-up of top-k's fraction, a rank that grows.

    The schedule gives the wanted value of the setting that makes the codec's strength, such as the rank of powersgd,
    the fraction of topk, the bits of qsgd. The codec in use is the one that sends the most, among those that send no
    more than the wanted value would. If all send more, it is the one that sends the least. So with ranks 1, 2 and 4 a
    wanted 3.9 is rank 2, and a wanted 0.5 is rank 1. Larger proportions or ratios send less, so with them a wanted
    value is rounded up. A wanted value that misses a codec's value by less than a share of 1e-5 counts as that value.

    The strengths share one state and one residual, and switching compiles nothing. The codecs give the keywords of all
    codecs, and must agree in them. The codec that sends the least decides which leaves are compressed; at another
    strength a leaf may take more bytes than uncompressed. Each strength has a collective of its own size.

    Args:
      codecs: two strengths of one codec or more, in any order, such as `[powersgd(1), powersgd(2), powersgd(4)]`.
      schedule: exchanges done -> the wanted value, one number; any of optax's schedules. Skipped steps are not counted.
        Under `delayed` the first exchange, which is of zeros, is counted. jax computes it: use `jnp.where`, no if.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: codecs is no list of two or more strengths of one codec with otherwise the same settings; or the
        schedule does not give one real number.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> ranks, epoch = (1, 2, 4), 390
    >>> wanted = optax.join_schedules([optax.constant_schedule(rank) for rank in ranks], [10 * epoch, 20 * epoch])
    >>> codec = gcj.scheduled([gcj.powersgd(rank) for rank in ranks], wanted)
    >>> tx = optax.chain(codec, optax.sgd(0.1, momentum=0.9))
    """
    if isinstance(codecs, Compressor) or not isinstance(codecs, list | tuple) or len(codecs) < 2:
        raise ValueError(
            f"codecs={shown(codecs)} must be a list of two strengths of one codec or more, such as [powersgd(1), "
            "powersgd(4)]; a single one needs no schedule"
        )
    given = {f"codecs[{i}]": codec for i, codec in enumerate(codecs)}
    strengths = require_strengths("scheduled", given)
    values = tuple(sorted((one.value for one in strengths), reverse=strengths[0].more_sends_more))
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"codecs has {strengths[0].setting}={twice[0]} more than once: give each strength once")
    _require_number_of(schedule)
    return compressor(Scheduled(strengths[0].at(values), values, schedule), codecs[0].settings)


def _require_number_of(schedule: optax.Schedule) -> None:
    """Raises ValueError if a schedule does not give one real number."""
    given = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    number = isinstance(given, jax.ShapeDtypeStruct) and given.shape == ()
    if not number or not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        described = f"{given.dtype}{list(given.shape)}" if isinstance(given, jax.ShapeDtypeStruct) else shown(given)
        raise ValueError(
            f"schedule gives {described}, and must give one real number, the wanted value of the setting: the leaves "
            "share one schedule; for other settings by leaf see per_layer"
        )
