"""Outer steps: each worker trains on its own, and once in a period the workers exchange how far they have moved.

For worker w with parameters theta_w, the *anchor* theta that all share, H local steps a period, and codec C:

    theta_w <- inner optimiser, H times on this worker's own gradients
    Delta_w = theta - theta_w
    theta  <- outer optimiser on the mean of Delta_w, exchanged by C with its error feedback
    theta_w <- theta

That is DiLoCo (Douillard et al., arXiv 2311.08105) if C sends all, and SparseLoCo (arXiv 2508.15706), Streaming DiLoCo
(arXiv 2501.18512) or MuLoCo (arXiv 2505.23725) with other codecs, see `gradcomp_jax.methods`. `params`, as the user
sees them, are the anchor. Each worker's own parameters are part of the optimiser's state.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradcomp_jax.arguments import factory, is_transformation, shown, takes
from gradcomp_jax.compressor import PLACEHOLDER, Compressor, compressor, compressor_states, skipped_steps
from gradcomp_jax.contract import MOST, AxisName, require_whole
from gradcomp_jax.exchange import collectives, ways
from gradcomp_jax.exchange.bits import further_bits
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.feedback import Feedback
from gradcomp_jax.outer_state import OuterState, Worker, on_schedule
from gradcomp_jax.periods import QUIET, Moment, Period, in_fragments
from gradcomp_jax.sharding import OWN, PerWorker
from gradcomp_jax.views import halved, narrow, once_stored, wide, widen

Weigh = Callable[[Any], Any]
Moves = dict[str, jax.Array]
# The weight of a worker that did no step since the last exchange: if no worker did any, all count alike.
LEAST = 1e-20


class Outer(optax.GradientTransformationExtraArgs):
    """An optax transformation that is a whole optimiser; see `outer`.

    Attributes:
      method: its settings, and its parts.
    """

    @property
    def method(self) -> "Method":
        return self.update.__self__


@dataclasses.dataclass(frozen=True)
class Method:
    """The settings of `outer`, and its parts; all of them see the state's local form."""

    inner: optax.GradientTransformationExtraArgs
    codec: Compressor
    outer: optax.GradientTransformationExtraArgs
    every: int
    fragments: int | Callable[[str], int]
    delay: int
    alpha: float
    weigh: Weigh | str | None

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes over which the batch is split."""
        return self.codec.settings.axes

    @property
    def axis(self) -> AxisName:
        """The axis, or axes, of the workers."""
        return self.codec.settings.axis_name

    @property
    def wire(self) -> Wire:
        """The link between the workers."""
        return Wire(self.axis, self.codec.settings.fast)

    def period(self, params: Any) -> Period:
        """The plan of a period."""
        return Period(self.every, self._count(params), self.delay)

    def _count(self, params: Any) -> int:
        return max(self.fragment_of(params).values(), default=0) + 1

    def fragment_of(self, params: Any) -> dict[str, int]:
        """The fragment of each leaf, by path."""
        paths = list(flatten(params)[0])
        if self.fragments == 1:
            return dict.fromkeys(paths, 0)
        found = in_fragments(paths, self.fragments)
        if (count := max(found.values(), default=0) + 1) > self.every:
            raise ValueError(f"{count} fragments do not fit into a period of every={self.every} steps: give fewer")
        return found

    def _codec_of(self, params: Any) -> Compressor:
        """The codec for a fragment, in which nothing may be worth compressing, if there is in the whole tree."""
        if isinstance(params, PLACEHOLDER) or self._count(params) == 1:
            return self.codec
        jax.eval_shape(self.codec.init, params)  # may refuse
        settings = self.codec.settings._replace(allow_dense=True)
        return compressor(self.codec.codec.of_part(), settings).named(self.codec.name)

    def _part(self, tree: Any, fragment: int) -> Any:
        """A tree with the leaves of one fragment; the others are None, which jax takes for no leaf."""
        leaves, treedef = flatten(tree)
        of = self.fragment_of(tree)
        return jax.tree.unflatten(treedef, [x if of[path] == fragment else None for path, x in leaves.items()])

    def init(self, params: Any) -> OuterState:
        """The first state, in local form."""
        if isinstance(params, PLACEHOLDER):
            parts, own, halves = [params], params, {}
        else:
            parts = [jax.tree.map(widen, self._part(params, f)) for f in range(self._count(params))]
            own = jax.tree.map(lambda x: jnp.array(x, copy=True), params)  # because each may be donated
            halves = {path: x for path, x in flatten(params)[0].items() if wide(x.dtype) != x.dtype}
        inner, outers = self.inner.init(params), tuple(map(self.outer.init, parts))
        for name, state in (("inner", inner), ("outer=", outers)):
            if compressor_states(state):
                raise ValueError(
                    f"{name} holds a codec, and only the codec of outer(...) exchanges anything: give optimisers "
                    "without one, as in outer(optax.adamw(4e-4), every=30, codec=topk(0.01))"
                )
        none, zero = jnp.int32(0), jnp.float32(0)
        worker = Worker(own, inner, none, none, jnp.zeros(len(parts), jnp.float32), zero, zero)
        return OuterState(
            PerWorker(worker, self.axis, OWN),
            none,
            tuple(map(self._codec_of(params).init, parts)),
            outers,
            {path: jnp.zeros(x.shape, jnp.float32) for path, x in halves.items()},
            jnp.float32(jnp.nan),
        )

    def update(
        self,
        updates: Any,
        state: OuterState,
        params: Any = None,
        *,
        place: int | None = None,
        value: Any = None,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, OuterState]:
        """A local step, and what else happens at its place; gives the change of the anchor."""
        if params is None:
            raise ValueError("outer needs the anchor: call tx.update(grads, opt_state, params)")
        collectives.workers(self.axes)
        leaves, treedef = flatten(params)
        period = self.period(params)
        zeros = {path: jnp.zeros_like(x) for path, x in leaves.items()}
        if place is not None:
            require_whole("place", place, 0)
            moment = period.at(place)
            state, first = self.begin(moment, params, state)
            state = self.local(state, period, updates, value, weight, extra_args)
            state, then = self.end(moment, plus(params, first), state)
            return jax.tree.unflatten(treedef, (zeros | first | then).values()), state
        at, moments = period.folded(state.place), [period.at(one) for one in period.places]
        begin = lambda moment, state: self.begin(moment, params, state)  # noqa: E731
        state, first = self._at(at, [m._replace(after=(), adopted=()) for m in moments], begin, state, zeros)
        anchor = plus(params, first)
        end = lambda moment, state: self.end(moment, anchor, state)  # noqa: E731
        state = self.local(state, period, collectives.after(updates, first), value, weight, extra_args)
        state, then = self._at(at, [m._replace(before=()) for m in moments], end, state, first)
        return jax.tree.unflatten(treedef, then.values()), state

    def _at(
        self, place: jax.Array, moments: list[Moment], happens: Any, state: OuterState, moves: Moves
    ) -> tuple[OuterState, Moves]:
        """Does what happens at a place that is known only when the program runs; all moves so far go on."""
        kinds = list(dict.fromkeys(moments))
        if kinds == [QUIET]:
            return state, moves

        def branch(kind: Moment) -> tuple[OuterState, Moves]:
            new, more = happens(kind, state)
            return new, moves | more

        table = jnp.array([kinds.index(moment) for moment in moments], jnp.int32)
        return self.wire.switch(table[place], [functools.partial(branch, kind) for kind in kinds])

    def local(
        self,
        state: OuterState,
        period: Period,
        grads: Any,
        loss: Any,
        weight: Any,
        extra_args: Any = None,
        in_place: bool = True,
    ) -> OuterState:
        """A local step: the inner optimiser moves the worker's own parameters, unless a gradient is not finite.

        Args:
          state: the state, of which only `worker` and `place` are read and changed.
          period: the plan of the period.
          grads: the gradients at the worker's own parameters; under `across` a chip's.
          loss: the loss, or None.
          weight: the weight of the step, or None for 1.
          extra_args: further arguments for the inner optimiser's update.
          in_place: whether the new state may take the memory of the old one.
        """
        mine = state.worker.value
        loss, weight = jnp.nan if loss is None else loss, 1 if weight is None else weight
        if jnp.shape(weight):
            raise ValueError(f"the weight of a step has shape {jnp.shape(weight)}: weigh= must return one number")
        grads, loss, weight = self._of_worker((grads, jnp.float32(loss), jnp.float32(weight)))
        finite = ways.agreed([ways.within(x, 1) for x in jax.tree.leaves(grads)])
        changes, inner = self.inner.update(grads, mine.inner, mine.params, value=loss, **(extra_args or {}))
        counts, weighs = finite & jnp.isfinite(loss), finite & (weight >= 0) & (weight < jnp.inf)
        params = _where(finite, optax.apply_updates(mine.params, changes), mine.params)
        kept = once_stored(finite, params) if in_place else finite
        worker = mine._replace(
            params=params,
            inner=_where(kept, inner, on_schedule(mine.inner, inner)),
            held=mine.held + jnp.where(finite, 0, 1),
            weight=mine.weight + jnp.where(weighs, weight, 0),
            loss=mine.loss + jnp.where(counts, loss, 0),
            steps=mine.steps + jnp.where(counts, jnp.float32(1), 0),
        )
        return state._replace(worker=state.worker._replace(value=worker), place=period.after(state.place))

    def _of_worker(self, tree: Any) -> Any:
        """The arrays of a worker: under `across` the means over its chips."""
        if self.codec.settings.fast is None:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        sent = ways.exact([], [widen(x) for x in leaves], self.wire.inside, [], ring=False, before=None, checked=0)
        return jax.tree.unflatten(treedef, [m.astype(x.dtype) for m, x in zip(sent.rode, leaves, strict=True)])

    def begin(self, moment: Moment, anchor: Any, state: OuterState) -> tuple[OuterState, Moves]:
        """What happens before a step; as `end`."""
        return self.exchanged(moment.before, anchor, state, self._alive(anchor, state))

    def exchanged(
        self, fragments: Sequence[int], anchor: Any, state: OuterState, alive: jax.Array, flush: bool = False
    ) -> tuple[OuterState, Moves]:
        """The exchanges of some fragments, one after another; see `_exchange`."""
        moves: Moves = {}
        for fragment in fragments:
            state, more = self._exchange(fragment, plus(anchor, moves), state, alive, flush)
            moves |= more
        return state, moves

    def end(self, moment: Moment, anchor: Any, state: OuterState) -> tuple[OuterState, Moves]:
        """What happens after a step; beside it are the exchanges of `moment.before`.

        Args:
          moment: the moment.
          anchor: the anchor.
          state: the state.

        Returns:
          The state, and by path what is to be added to the anchor, for the leaves that move.
        """
        alive = self._alive(anchor, state)
        state, moves = self.exchanged(moment.after, anchor, state, alive)
        if moment.adopted:
            state = self._adopt(moment.adopted, plus(anchor, moves), state, alive, self.alpha)
        return state, moves

    def _alive(self, anchor: Any, state: OuterState) -> jax.Array:
        """Whether a worker's difference is finite, and small enough for error feedback at any weight."""
        differences = jax.tree.leaves(_difference(anchor, state.worker.value.params))
        return ways.agreed([jnp.all(jnp.abs(x) <= MOST / self.wire.workers) for x in differences])

    def _exchange(
        self, fragment: int, anchor: Any, state: OuterState, alive: jax.Array, flush: bool
    ) -> tuple[OuterState, Moves]:
        """The workers exchange their differences from the anchor, and the outer optimiser moves it.

        A worker whose difference is not finite is absent: it hands zeros to the codec. Differences count by weight: the
        codec is given n w_i / sum(w) Delta_i. So residuals keep the weight that they had.

        Args:
          fragment: the index of the fragment.
          anchor: the anchor.
          state: the state.
          alive: whether this worker takes part.
          flush: whether the codec sends all that is owed, uncompressed.

        Returns:
          As `end`.
        """
        wire, mine = self.wire, state.worker.value
        delta = _difference(anchor, mine.params)
        weight = mine.weight[fragment] if self.weigh else jnp.float32(1)
        weight = jnp.where(alive, jnp.maximum(weight, LEAST), 0)
        everyone, bits = wire.total(weight)
        share = jnp.where(everyone > 0, wire.workers * weight / everyone, 0)
        given = jax.tree.map(lambda d: jnp.where(share > 0, d * share.astype(d.dtype), 0), delta)
        given, told = collectives.after((self._part(given, fragment), [mine.loss, mine.steps]), everyone)
        mean, delivered = self._codec_of(anchor).update(given, state.codec[fragment], beside=told, flush=flush)
        codec = delivered.state._replace(wire=further_bits(delivered.state.wire, bits))
        ok = skipped_steps(codec) == skipped_steps(state.codec[fragment])
        leaves, treedef = flatten(self._part(anchor, fragment))
        whole = {
            path: widen(x) + state.rest.get(path, jnp.float32(0)).astype(wide(x.dtype)) for path, x in leaves.items()
        }
        changes, outer = self.outer.update(mean, state.outer[fragment], jax.tree.unflatten(treedef, whole.values()))
        changes = flatten(changes)[0]
        steps = {path: _step(x, state.rest.get(path), changes[path], ok) for path, x in leaves.items()}
        losses, count = delivered.beside
        loss = jnp.where(ok, narrow(losses / count, jnp.float32), jnp.nan)
        none = collectives.vary(jnp.float32(0), self.axis)
        worker = mine._replace(weight=mine.weight.at[fragment].set(0), loss=none, steps=none)
        # Local steps after this wait for the short message only. So the long one begins before them, not after.
        worker, _ = jax.lax.optimization_barrier((worker, everyone))
        state = state._replace(
            worker=state.worker._replace(value=worker),
            codec=_with(state.codec, fragment, codec),
            outer=_with(state.outer, fragment, _where(ok, outer, state.outer[fragment])),
            rest=state.rest | {path: rest for path, (_, rest) in steps.items() if path in state.rest},
            # A flush may come right after an exchange, and those of several fragments come at once.
            loss=jnp.where(count > 0, loss, state.loss) if flush else loss,
        )
        return state, {path: step for path, (step, _) in steps.items()}

    def _adopt(
        self, fragments: tuple[int, ...], anchor: Any, state: OuterState, alive: jax.Array, alpha: float
    ) -> OuterState:
        """Each worker goes on from the anchor, or from a mix of its own parameters and the anchor.

        Args:
          fragments: the fragments of which it does so.
          anchor: the anchor.
          state: the state.
          alive: whether this worker does. Otherwise it begins anew: all of its parameters are the anchor's, and its
            inner optimiser's state is fresh, except that schedules and injected values go on.
          alpha: the share of a worker's own parameters.
        """
        mine, of = state.worker.value, self.fragment_of(anchor)

        def adopted(path: str, own: jax.Array, of_all: jax.Array) -> jax.Array:
            if of[path] not in fragments:
                return jnp.where(alive, own, of_all)
            if not alpha:
                return collectives.vary(of_all, self.axis)
            return jnp.where(alive, narrow(alpha * widen(own) + (1 - alpha) * widen(of_all), own.dtype), of_all)

        leaves, treedef = flatten(anchor)
        own = flatten(mine.params)[0]
        params = jax.tree.unflatten(treedef, [adopted(path, own[path], x) for path, x in leaves.items()])
        inner = _where(alive, mine.inner, on_schedule(self.inner.init(anchor), mine.inner))
        worker = mine._replace(
            params=params,
            inner=inner,
            absent=mine.absent + jnp.where(alive, 0, 1),
            weight=jnp.where(alive, mine.weight, 0),
        )
        return state._replace(worker=state.worker._replace(value=worker))

    def flush(self, pending: tuple[int, ...], anchor: Any, state: OuterState) -> tuple[Any, OuterState]:
        """Ends a period early: exchanges all that is owed, uncompressed; gives the anchor and the state.

        What is on its way is adopted first, by alpha as ever. Otherwise all of it that the codec did not send would be
        in the difference as well as in the residual.

        Args:
          pending: the fragments that have been exchanged, and not adopted.
          anchor: the anchor.
          state: the state.
        """
        every = tuple(range(self.period(anchor).fragments))
        alive = begins = self._alive(anchor, state)
        if pending:
            state = self._adopt(pending, anchor, state, alive, self.alpha)
            begins = self._alive(anchor, state)  # all: who was ruined has begun anew, but still takes no part below
        state, moves = self.exchanged(every, anchor, state, alive, flush=True)
        anchor = plus(anchor, moves)
        return anchor, self._adopt(every, anchor, state, begins, 0.0)._replace(place=jnp.zeros_like(state.place))


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` if the condition holds, else `old`.

    Between steps, what a worker has of its own has an axis for the workers, [1, ...] on each. The selection is in that
    shape, because XLA's CPU backend reuses a given buffer only for results of its own shape.
    """
    return jax.tree.map(lambda n, o: jnp.where(condition, n[None], jnp.asarray(o, n.dtype)[None])[0], new, old)


def _with(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def plus(params: Any, moves: Moves) -> Any:
    """The anchor after a move."""
    leaves, treedef = flatten(params)
    return jax.tree.unflatten(treedef, [x + moves[path] if path in moves else x for path, x in leaves.items()])


def _difference(anchor: Any, own: Any) -> Any:
    return jax.tree.map(lambda a, b: widen(a) - widen(b), anchor, own)


def _step(x: jax.Array, rest: jax.Array | None, change: jax.Array, ok: jax.Array) -> tuple[jax.Array, Any]:
    """What is to be added to a leaf of the anchor, in its type, and what that type cannot hold of it."""
    if rest is None:
        return jnp.where(ok, change.astype(x.dtype), 0), None
    whole = widen(x) + rest + change
    step = jnp.where(ok, halved(whole - widen(x), x.dtype), 0)
    return step, jnp.where(ok, whole - widen(halved(widen(x) + widen(step), x.dtype)), rest)


@factory
def outer(
    inner: optax.GradientTransformation,
    *,
    every: int,
    codec: Compressor,
    outer: optax.GradientTransformation | None = None,
    residual_decay: float | None = None,
    fragments: int | Callable[[str], int] = 1,
    delay: int = 0,
    alpha: float = 0.0,
    weigh: Weigh | str | None = None,
) -> Outer:
    """Local steps, and once in a period an exchange of how far the workers have moved, compressed; see the module.

    It is a whole optimiser: nothing may be chained after it. `params` are the anchor, the same on all workers; evaluate
    and save these. They change at exchanges only. Each worker's own parameters are in the state, and `train_step` and
    `simulate` take gradients there. In a shard_map of your own take them yourself:

        grads = jax.grad(loss)(gcj.local_params(opt_state), batch)
        updates, opt_state = tx.update(grads, opt_state, params)

    A local step exchanges nothing: `train_step` runs a program of its own for it, without a collective between workers,
    which reads and writes only what the step changes. A worker leaves out a local step whose gradient is not finite,
    see `held`; only its schedules and injected values go on. A worker whose difference is not finite at an exchange is
    absent from it, see `absent`; then it goes on from the new anchor with an inner state that is fresh but for these
    two. If the mean is not finite, the exchange is void, see `skipped`: the anchor, the outer optimiser and the codec
    stay as they were, and every worker goes on from the anchor. The residual does not decay then.

    Under `across` a worker is a slice of several chips: gradients are averaged inside it in each step, and differences
    are exchanged between slices.

    Args:
      inner: the optimiser of local steps. Its state is each worker's own and never averaged. It gets the worker's loss
        as `value`.
      every: the local steps of a period.
      codec: what compresses the differences, such as `topk(0.01)` or `none()`, with its error feedback.
      outer: the optimiser that moves the anchor along the mean of the differences, such as `optax.sgd(0.7, 0.9,
        nesterov=True)`. By default `optax.sgd(1.0)`, which moves it to the mean of the workers. Its state is float32 or
        wider, and the same on all workers.
      residual_decay: the share of a residual that an exchange leaves, in the place of the codec's own.
      fragments: the number of parts of the tree that are exchanged in turn, spread evenly over the period; or (path) ->
        the index of a leaf's part. By number, layer l is in part l mod fragments.
      delay: the number of local steps between the moment when a fragment's difference is taken and the one when its
        new anchor is adopted. The exchange can overlap with these steps only inside one program, which
        `train_step(..., steps=delay)` makes; with one step in a call it overlaps with one step at most. The anchor
        itself changes at once.
      alpha: the share of a worker's own parameters in those it goes on with, own <- alpha own + (1 - alpha) anchor. At
        0 the steps done during the delay are lost; above 0 this share of them is in the next difference. So is the
        same share of what the codec did not send. Under error feedback that is in the residual too, and is sent twice.
      weigh: how much a worker counts in the mean: "steps", by the steps that it did not leave out; or (batch) -> the
        weight of a step, one number, such as its tokens; in a shard_map of your own give update `weight=`. A weight
        that is negative or not finite counts as 0. None: all alike.

    Returns:
      An `Outer`, whose state is an `OuterState`. Its update takes further arguments: `value`, the loss; `weight`; and
      `place`, which is int(opt_state.place) if that is known when traced. The program then holds only what happens
      there. Otherwise it branches, by the count in the state.

    Raises:
      ValueError: an argument is out of range; codec is not a codec, or inner or outer hold one. Later, in init, a
        refusal of the codec.

    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> tx = gcj.outer(optax.adamw(4e-4), every=30, codec=gcj.topk(0.01), outer=optax.sgd(1.0))
    """
    codec = _require_settings(inner, codec, outer, every, delay, alpha, weigh, residual_decay)
    if not callable(fragments):
        require_whole("fragments", fragments, 1)
    method = Method(
        optax.with_extra_args_support(inner),
        codec,
        optax.with_extra_args_support(optax.sgd(1.0) if outer is None else outer),
        every,
        fragments,
        delay,
        alpha,
        weigh,
    )
    return Outer(method.init, method.update)


def _require_settings(
    inner: Any, codec: Any, outer: Any, every: Any, delay: Any, alpha: Any, weigh: Any, residual_decay: Any
) -> Compressor:
    require_whole("every", every, 1)
    require_whole("delay", delay, 0)
    for name, tx in (("inner", inner), ("outer", optax.identity() if outer is None else outer)):
        if isinstance(tx, Compressor | Outer):
            raise ValueError(f"{name}={shown(tx)} exchanges gradients: give an optimiser, and the codec as codec=")
        if not is_transformation(tx):
            raise ValueError(f"{name}={shown(tx)} must be an optax optimiser, such as optax.adamw(4e-4)")
    if not isinstance(codec, Compressor):
        raise ValueError(
            f"codec={shown(codec)} must be a codec, such as topk(0.01) or none(); chains, delayed(...), and per_layer "
            "of several codecs are none"
        )
    if codec.settings.inside is not True:
        raise ValueError(
            f"codec={codec.name} is for parameters in shards, and outer keeps whole ones: leave out inside= of across"
        )
    if delay >= every:
        raise ValueError(f"delay={delay} must be below every={every}: a fragment is adopted before it is taken again")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be from 0 to 1, the share of a worker's own parameters")
    if not (weigh in (None, "steps") or takes(weigh, 1)):
        raise ValueError(f"weigh={shown(weigh)} must be None, 'steps', or a function (batch) -> weight")
    if residual_decay is None:
        return codec
    if not isinstance(codec.settings.error_feedback, Feedback):
        raise ValueError(
            f"residual_decay={residual_decay} is for a codec with error feedback, and codec={codec.name} keeps no "
            "residuals: give residual_decay=None, or a codec with error_feedback=True"
        )
    changed = codec.settings._replace(error_feedback=Feedback(residual_decay))
    return compressor(codec.codec, changed).named(codec.name)
