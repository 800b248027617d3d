"""The engine: it listens to what the codecs of all leaves say, and sends it, one message a round.

    tree -- plan --> leaves -- feedback.owe --> terms -- rounds --> results -- feedback.settle --> leaves and memory

A codec's talks are started side by side; in each round what all of them say goes out together, with what rides along,
and the answers are handed back. All of that happens while jax traces: generators leave nothing in the program.
"""

import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax import random
from gradcomp_jax.contract import Ask, Codec, Context, First, Heard, OverShards, Result, Say, Together
from gradcomp_jax.exchange import codes, plan, ways
from gradcomp_jax.exchange.bits import Bits, bit_pair, sum_bits
from gradcomp_jax.exchange.collectives import Wire, after, known_different
from gradcomp_jax.views import HALVES, always, halved, wide, widen

Terms = dict[str, tuple[jax.Array, ...]]


class Exchanged(NamedTuple):
    """What an exchange gave.

    Attributes:
      mean: by path, what every worker will apply, identical on all; zeros if not `ok`.
      own: by path, what this worker added to the mean, times the number of workers; arrays or `Sparse`.
      state: the codec's next state; as it was if not `ok`.
      rode: the means of the riders; of no meaning if not `ok`.
      ok: bool, whether all that arrived was finite, the same on all workers.
      bits: that this worker sent; the same number on all workers.
    """

    mean: dict[str, jax.Array]
    own: dict[str, Any]
    state: Any
    rode: list[jax.Array]
    ok: jax.Array
    bits: Bits


class _Tally(NamedTuple):
    """What adds up from round to round.

    Attributes:
      rounds: how many there were.
      ok: bool, whether all that arrived was finite; None before anything did.
      bits: sent by this worker.
      coder: the coder's state.
    """

    rounds: int
    ok: Any
    bits: Bits
    coder: Any


class _Done(NamedTuple):
    """What the talks of one kind of step gave; small but for `mean` and `own`, as it may pass through a conditional."""

    mean: dict[str, jax.Array]
    own: dict[str, Any]
    news: dict[str, dict[str, Any]]
    rode: list[jax.Array]
    ok: jax.Array
    bits: Bits
    coder: Any


class Exchange(NamedTuple):
    """An exchange to be: who talks, over which wire.

    Attributes:
      codec: the codec.
      aggregate: the way its numbers travel, or None.
      wire: the link.
      feedback: whether what is left out comes back.
      want_own: whether to tell `own`.
      checked: how many of the first riders must be finite; None: all.
      fresh: as `Context.fresh`.
      dense: a type of 16 bits, in which whole gradients that are not compressed travel; None: as they are.
    """

    codec: Codec
    aggregate: str | None
    wire: Wire
    feedback: bool = False
    want_own: bool = True
    checked: int | None = None
    fresh: bool = False
    dense: Any = None

    def __call__(
        self, terms: Terms, state: Any, riders: Sequence[jax.Array] = (), learning_rate: Any = None
    ) -> Exchanged:
        """Averages tensors by the codec, and riders exactly.

        Args:
          terms: by path, what is to be averaged: the sum of these.
          state: the codec's state.
          riders: arrays that travel along.
          learning_rate: for codecs that ask.
        """
        codec, whole = self.codec, Context(self.codec.step(state), 0, self.feedback, self.fresh, None, learning_rate)
        strengths = codec.strengths(state, learning_rate)
        contexts = {path: whole._replace(salt=plan.salt(path), strength=strengths.get(path)) for path in terms}
        run = functools.partial(self._run, terms, state, contexts, riders)
        if codec.phases == 1 or not terms:
            done = run(0)
        else:
            done = self.wire.switch(codec.phase(state), [functools.partial(run, i) for i in range(codec.phases)])
        if not terms:
            return Exchanged({}, {}, state, done.rode, done.ok, done.bits)
        absorbed = {
            path: codec.absorb(codec.leaf(state, path), d, done.mean[path], done.ok, contexts[path])
            for path, d in terms.items()
        }
        after = codec.merge(codec.merge(codec.with_coder_state(state, done.coder), done.news), absorbed)
        renewed, bits = self._refresh(state, after, done)
        # Known only once it has read the old ones, so that these can be overwritten where they lie.
        ok = done.ok & always(bits)
        adopted = {path: codec.adopt(codec.leaf(state, path), done.mean[path], ok) for path in terms}
        after = codec.tick(state, codec.merge(after, renewed), whole)
        after = jax.tree.map(lambda new, old: jnp.where(done.ok, new, old), after, state)
        after = codec.merge(codec.merge(after, absorbed), adopted)  # which are selected already
        return Exchanged(done.mean, done.own, after, done.rode, done.ok, sum_bits(done.bits, bits))

    def _run(self, terms: Terms, state: Any, contexts: dict[str, Context], riders: Any, phase: int) -> _Done:
        """The talks of all leaves in one kind of step, from the first round to the last."""
        codec = self.codec
        talks = {path: codec.talk(phase, d, codec.leaf(state, path), contexts[path]) for path, d in terms.items()}
        results: dict[str, Result] = {}
        early: set[str] = set()  # leaves that ended before the last flag was known
        asked, rode = _advance(talks, dict.fromkeys(talks), results), list(riders)
        tally = _Tally(0, None, 0, codec.coder_state(state))
        while asked or (rode and not tally.rounds):
            answers, came, tally = self._round(asked, [] if tally.rounds else rode, contexts, tally)
            rode = came or rode
            asked = _advance(talks, answers, results)
            early |= results.keys() if asked else set()
        ok = jnp.array(True) if tally.ok is None else tally.ok
        mean = {p: jnp.where(ok, r.mean, 0) if r.affine or p in early else r.mean for p, r in results.items()}
        for path in terms:
            if known_different(mean[path], self.wire.axis):
                raise TypeError(f"codec {codec.name!r} made the mean of leaf {path!r} of more than what was heard")
        own = {path: results[path].own for path in terms} if self.want_own else {}
        bits = tally.bits if codec.phases == 1 else bit_pair(tally.bits)
        news = {path: results[path].news for path in terms}
        return _Done({path: mean[path] for path in terms}, own, news, rode, ok, bits, tally.coder)

    def _round(
        self, asked: dict[str, Any], riders: list[jax.Array], contexts: dict[str, Context], tally: _Tally
    ) -> tuple[dict[str, Any], list[jax.Array], _Tally]:
        """Answers what the leaves ask, in one message."""
        answers: dict[tuple[str, int], Any] = {}
        together = {key: ask for key, ask in _each(asked) if isinstance(ask, Together)}
        for function in dict.fromkeys(ask.function for ask in together.values()):
            mine = [key for key, ask in together.items() if ask.function is function]
            answers |= zip(mine, function([together[key].x for key in mine]), strict=True)
        answers |= {key: ask.x for key, ask in _each(asked) if isinstance(ask, OverShards)}
        says = {key: ask for key, ask in _each(asked) if isinstance(ask, Say)}
        firsts = {key: ask.x for key, ask in _each(asked) if isinstance(ask, First)}
        rode: list[jax.Array] = []
        if says or firsts or not asked:  # else nothing is sent in this turn
            heard, rode, tally = self._mean(says, riders, contexts, tally)
            answers |= heard
        if firsts:
            got, bits = _from_first(firsts, self.wire)
            answers, tally = answers | got, tally._replace(bits=sum_bits(tally.bits, bits))
        assert answers.keys() == {key for key, _ in _each(asked)}, "an ask was left without an answer"
        return _gathered(asked, answers), rode, tally

    def _mean(
        self, says: dict[Any, Say], riders: list[jax.Array], contexts: dict[str, Context], tally: _Tally
    ) -> tuple[dict[Any, Heard], list[jax.Array], _Tally]:
        """The means of all that is said: exact numbers and codes, each kind in one message if they cannot share one."""
        coder = self.codec.coder
        coded = {key: say for key, say in says.items() if coder is not None and not say.exact}
        exact = {key: self._narrowed(say) for key, say in says.items() if key not in coded}
        count, ride = len(riders), None
        heard: dict[Any, Heard] = {}
        checked = count if self.checked is None else min(count, self.checked)
        if coded and not coder.shares_scale:
            riding = sum(x.size * x.dtype.itemsize for x in (*riders, *(say.x for say in exact.values())))
            xs = [(path, say.x) for (path, _), say in coded.items()]
            ride = plan.route(coder, xs, riding, self.aggregate, self.wire.workers)
        if not (ride and ride.ride) and (exact or riders):
            ring = self.aggregate == "ring" and coder is None
            strengths = [contexts[path].strength for path, _ in exact]
            got = ways.exact(
                list(exact.values()), riders, self.wire, strengths, ring=ring, before=tally.ok, checked=checked
            )
            heard |= zip(exact, got.heard, strict=True)
            riders, tally = got.rode, tally._replace(ok=got.ok, bits=sum_bits(tally.bits, got.bits))
        if coded:
            beside = [*(say.x for say in exact.values()), *riders] if ride and ride.ride else []
            strengths = [contexts[path].strength for path, _ in coded]
            waiting = after([say.x for say in coded.values()], tally.ok)
            said = [say._replace(x=x) for say, x in zip(coded.values(), waiting, strict=True)]
            got = self._codes(said, ride, beside, strengths, tally, len(exact) + checked)
            heard |= zip(coded, got.heard, strict=True)
            if beside:
                riders = got.rode[len(exact) :]
                heard |= {key: Heard(x, widen(exact[key].x)) for key, x in zip(exact, got.rode, strict=False)}
            renewed = coder.after(tally.coder, got.length)
            tally = tally._replace(ok=got.ok, bits=sum_bits(tally.bits, got.bits), coder=renewed)
        for key in exact:
            dtype = wide(says[key].x.dtype)
            heard[key] = Heard(heard[key].mean.astype(dtype), heard[key].own.astype(dtype))
        return heard, riders, tally._replace(rounds=tally.rounds + 1)

    def _narrowed(self, say: Say) -> Say:
        """What is said, a whole gradient in the type in which those travel."""
        if self.dense is None or not say.apart or say.x.dtype in HALVES:
            return say
        return say._replace(x=halved(say.x, self.dense))

    def _codes(
        self,
        says: list[Say],
        route: plan.Route | None,
        riders: list[jax.Array],
        strengths: list[Any],
        tally: _Tally,
        checked: int,
    ) -> ways.Sent:
        """What became of codes, and of riders with them."""
        coder = self.codec.coder.under(self.feedback)
        key = random.step_key(0, 0)
        if coder.draws:
            key = jax.random.fold_in(random.step_key(coder.seed, tally.coder.step), self.wire.index)
        if route is None:
            return codes.shared(says, coder, self.aggregate or "psum", self.wire, key, tally.ok)
        return codes.coded(says, coder, route.way, riders, self.wire, key, strengths, before=tally.ok, checked=checked)

    def _refresh(self, state: Any, after: Any, done: _Done) -> tuple[dict[str, dict[str, Any]], Bits]:
        """What `Codec.refresh` renews of each leaf, where it is due."""
        codec, due = self.codec, self.codec.due(state)
        if due is None:
            return {}, 0
        leaves = {path: (codec.leaf(state, path), codec.leaf(after, path)) for path in done.mean}

        def renew() -> tuple[dict[str, Any], jax.Array]:
            talks = {path: codec.refresh(*leaves[path], done.mean[path]) for path in leaves}
            news: dict[str, Any] = {}
            asked, sent = _advance(talks, dict.fromkeys(talks), news), bit_pair(0)
            while asked:
                got, bits = _from_first({key: ask.x for key, ask in _each(asked)}, self.wire)
                asked, sent = _advance(talks, _gathered(asked, got), news), bit_pair(sum_bits(sent, bits))
            return {path: news[path] for path in leaves}, sent

        def keep() -> tuple[dict[str, Any], jax.Array]:
            return {path: codec.kept(after) for path, (_, after) in leaves.items()}, bit_pair(0)

        return self.wire.switch(due.astype(jnp.int32), [keep, renew])


def _advance(
    talks: Mapping[str, Generator[Any, Any, Any]], answers: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """Hands each talk its answer: gives what they ask next, and puts what those that end return into `results`."""
    asked = {}
    for path, answer in answers.items():
        try:
            asked[path] = talks[path].send(answer)
        except StopIteration as end:
            results[path] = end.value
    return asked


def _each(asked: dict[str, Any]) -> list[tuple[tuple[str, int], Any]]:
    """Every single ask, by leaf and place."""
    one = lambda ask: isinstance(ask, Ask)  # noqa: E731
    return [((path, i), x) for path, ask in asked.items() for i, x in enumerate([ask] if one(ask) else ask)]


def _gathered(asked: dict[str, Any], answers: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """The answers by leaf, in the form of what each asked: one, or several."""
    by_leaf: dict[str, Any] = {}
    for path, ask in asked.items():
        by_leaf[path] = answers[path, 0] if isinstance(ask, Ask) else tuple(answers[path, i] for i in range(len(ask)))
    return by_leaf


def _from_first(asked: dict[Any, Any], wire: Wire) -> tuple[dict[Any, Any], Bits]:
    """The first worker's trees, on all; one buffer a type."""
    leaves, treedef = jax.tree.flatten(asked)
    got, sent = list(leaves), 0
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat, bits = wire.from_first(jnp.concatenate([leaves[i].reshape(-1) for i in places]))
        sent += bits
        for i, x in zip(places, ways.parts_of(flat, [leaves[i] for i in places]), strict=True):
            got[i] = x
    return jax.tree.unflatten(treedef, got), sent
