"""The engine: it collects what the codecs of all leaves say, and sends it, one message a round.

    tree -- plan --> leaves -- feedback.owe --> terms -- rounds --> results -- feedback.settle --> leaves and memory

A codec's talks are started side by side. In each round the numbers that they say go out together, with the riders, and
each talk gets its answer. All of that happens while jax traces: generators leave nothing in the program.
"""

import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradcomp_jax import random
from gradcomp_jax.coder import CodeLength
from gradcomp_jax.contract import (
    Ask,
    Codec,
    Context,
    First,
    Heard,
    Mine,
    OverShards,
    Result,
    Say,
    Together,
    UnheardError,
    bare,
)
from gradcomp_jax.exchange import codes, inside, plan, ways
from gradcomp_jax.exchange.bits import Bits, bit_pair, sum_bits, total_bits
from gradcomp_jax.exchange.collectives import Wire, after, known_different, vary_as
from gradcomp_jax.exchange.shares import Began, Round
from gradcomp_jax.notes import remark
from gradcomp_jax.views import HALVES, always, halved, wide, widen

Terms = dict[str, tuple[jax.Array, ...]]


class Bucket(NamedTuple):
    """Leaves that are exchanged together.

    Attributes:
      terms: by path, the terms whose sum is to be averaged.
      riders: arrays that travel along.
      checked: how many of the first riders must be finite.
      whole: by path, the shapes of the whole leaves; the terms may be shards of them.
      dense: the paths of the first riders, which are leaves that travel as they are.
    """

    terms: Terms
    riders: Sequence[jax.Array]
    checked: int
    whole: dict[str, tuple[int, ...]]
    dense: tuple[str, ...] = ()

    @classmethod
    def of(cls, terms: Terms, riders: Sequence[jax.Array] = (), checked: int | None = None) -> "Bucket":
        """A bucket of whole leaves; all riders must be finite, unless `checked` says how many."""
        checked = len(riders) if checked is None else checked
        return cls(terms, riders, checked, {path: d[0].shape for path, d in terms.items()})


class Exchanged(NamedTuple):
    """The results of an exchange.

    Attributes:
      mean: by path, the update that every worker will apply, identical on all. With one bucket and no fast axis it is
        zero if not `ok`.
      own: by path, this worker's share of the mean, times the number of workers; arrays or `Sparse`.
      state: the codec's next state; the old state if not `ok`.
      rode: the means of the riders of each bucket; without meaning if not `ok`.
      ok: bool, whether everything that arrived was finite, the same on all workers and their chips.
      bits: the bits that this worker sent; the same number on all workers.
      inside: the bits that this chip sent to other chips of its worker.
    """

    mean: dict[str, jax.Array]
    own: dict[str, Any]
    state: Any
    rode: list[list[jax.Array]]
    ok: jax.Array
    bits: Bits
    inside: Bits


class _Tally(NamedTuple):
    """Values that go from round to round.

    Attributes:
      rounds: the number of rounds so far.
      ok: bool, whether everything that arrived was finite; None before anything arrived.
      bits: the bits that this worker sent.
      inside: the bits that this chip sent to other chips of its worker.
      coder: the coder's state.
    """

    rounds: int
    ok: Any
    bits: Bits
    inside: Bits
    coder: Any

    def after(self, sent: ways.Sent) -> "_Tally":
        """The tally after one more message."""
        bits, inside = sum_bits(self.bits, sent.bits), sum_bits(self.inside, sent.inside)
        return self._replace(ok=sent.ok, bits=bits, inside=inside)


class _Done(NamedTuple):
    """The results of the talks of one kind of step.

    They may pass through a conditional, so all except `mean` and `own` are small.
    """

    mean: dict[str, jax.Array]
    own: dict[str, Any]
    news: dict[str, dict[str, Any]]
    rode: list[Any]
    ok: jax.Array
    bits: Bits
    inside: Bits
    coder: Any


class Exchange(NamedTuple):
    """The settings of an exchange: the codec and the wire.

    Attributes:
      codec: the codec.
      aggregate: the way its numbers travel, or None.
      wire: the link.
      feedback: whether the part that is left out comes back in a later step.
      want_own: whether to return `own`.
      fresh: the value of `Context.fresh`.
      dense: a type of 16 bits for whole gradients that are not compressed; None: they travel as they are.
    """

    codec: Codec
    aggregate: str | None
    wire: Wire
    feedback: bool = False
    want_own: bool = True
    fresh: bool = False
    dense: Any = None

    def __call__(self, buckets: Sequence[Bucket], state: Any, learning_rate: Any = None) -> Exchanged:
        """Averages tensors with the codec, and riders exactly.

        Args:
          buckets: the tensors and riders; each bucket has its own messages.
          state: the codec's state.
          learning_rate: the learning rate, for codecs that ask for it.
        """
        codec, wire = self.codec, self.wire
        terms = {path: d for bucket in buckets for path, d in bucket.terms.items()}
        told = Context(codec.step(state), 0, self.feedback, self.fresh, None, learning_rate, wire.shards)
        told = told._replace(shard=wire.inside.index if wire.fast is not None else None)
        strengths = codec.strengths(state, terms, learning_rate)
        contexts = {
            path: told._replace(salt=plan.salt(path), strength=strengths.get(path), whole=bucket.whole[path])
            for bucket in buckets
            for path in bucket.terms
        }
        done = self._all(buckets, state, contexts)
        if not terms:
            return Exchanged({}, {}, state, done.rode, done.ok, done.bits, done.inside)
        absorbed = {
            path: codec.absorb(codec.leaf(state, path), d, done.mean[path], done.ok, contexts[path])
            for path, d in terms.items()
        }
        after = codec.merge(codec.merge(codec.with_coder_state(state, done.coder), done.news), absorbed)
        renewed, bits, sent = self._refresh(state, after, done, contexts)
        # `ok` waits until `_refresh` has read the old arrays, so that these can be overwritten where they lie.
        ok = done.ok & always(bits)
        adopted = {path: codec.adopt(codec.leaf(state, path), done.mean[path], ok) for path in terms}
        after = codec.tick(state, codec.merge(after, renewed), told)
        after = jax.tree.map(lambda new, old: jnp.where(done.ok, new, old), after, state)
        after = codec.merge(codec.merge(after, absorbed), adopted)  # these two are selected already
        bits, sent = sum_bits(done.bits, bits), sum_bits(done.inside, sent)
        return Exchanged(done.mean, done.own, after, done.rode, done.ok, bits, sent)

    def _all(self, buckets: Sequence[Bucket], state: Any, contexts: dict[str, Context]) -> _Done:
        """Exchanges all buckets, each as soon as its gradients are there; one flag covers all of them."""
        codec, coder = self.codec, self.codec.coder_state(state)
        dones: list[_Done] = []
        for bucket in buckets:
            # Each bucket begins with the coder's state that the bucket before it left, and draws from there.
            state = codec.with_coder_state(state, _without_length(coder) if len(buckets) > 1 else coder)
            if dones:
                terms, riders = after((bucket.terms, bucket.riders), dones[-1].ok)
                bucket = bucket._replace(terms=terms, riders=riders)
            run = functools.partial(self._run, bucket, state, contexts)
            if codec.phases == 1 or not bucket.terms:
                done = run(0)
            else:
                done = self.wire.switch(codec.phase(state), [functools.partial(run, i) for i in range(codec.phases)])
            coder = done.coder
            dones.append(done)
        ok, sent = ways.agreed([done.ok for done in dones]) if len(dones) > 1 else dones[0].ok, 0
        if self.wire.fast is not None:
            ok, sent = self.wire.inside.all_(ok)
        bits, passed = dones[0].bits, sum_bits(dones[0].inside, sent)
        for done in dones[1:]:
            bits, passed = sum_bits(bits, done.bits), sum_bits(passed, done.inside)
        by_path = lambda name: {path: x for done in dones for path, x in getattr(done, name).items()}  # noqa: E731
        return _Done(
            by_path("mean"),
            by_path("own"),
            by_path("news"),
            [done.rode for done in dones],
            ok,
            bits,
            passed,
            _of_all([done.coder for done in dones]),
        )

    def _run(self, bucket: Bucket, state: Any, contexts: dict[str, Context], phase: int) -> _Done:
        """Runs the talks of all leaves of a bucket in one kind of step, from the first round to the last."""
        codec, (terms, riders, checked, _, dense) = self.codec, bucket
        remark(lambda: Began(phase, dense))
        talks = {path: codec.talk(phase, d, codec.leaf(state, path), contexts[path]) for path, d in terms.items()}
        results: dict[str, Result] = {}
        early: set[str] = set()  # leaves that ended before the last flag was known
        asked, rode = _advance(talks, dict.fromkeys(talks), results), list(riders)
        tally = _Tally(0, None, 0, 0, codec.coder_state(state))
        while asked or (rode and not tally.rounds):
            sending = ([], 0) if tally.rounds else (rode, checked)
            answers, came, tally = self._round(asked, *sending, contexts, tally)
            rode = came or rode
            asked = _advance(talks, answers, results)
            early |= results.keys() if asked else set()
        ok = jnp.array(True) if tally.ok is None else tally.ok
        mean = {p: jnp.where(ok, r.mean, 0) if r.affine or p in early else r.mean for p, r in results.items()}
        for path in terms:
            if known_different(mean[path], self.wire.axis):
                raise UnheardError(f"codec {codec.name!r} made the mean of leaf {path!r} of more than heard numbers")
        own = {path: results[path].own for path in terms} if self.want_own else {}
        bits, sent = (x if codec.phases == 1 else bit_pair(x) for x in (tally.bits, tally.inside))
        news = {path: results[path].news for path in terms}
        return _Done({path: mean[path] for path in terms}, own, news, rode, ok, bits, sent, tally.coder)

    def _round(
        self, asked: dict[str, Any], riders: list[jax.Array], checked: int, contexts: dict[str, Context], tally: _Tally
    ) -> tuple[dict[str, Any], list[jax.Array], _Tally]:
        """Answers the leaves' asks of one round, in one message."""
        answers: dict[tuple[str, int], Any] = {}
        together = {key: ask for key, ask in _each(asked) if isinstance(ask, Together)}
        for function in dict.fromkeys(ask.function for ask in together.values()):
            mine = [key for key, ask in together.items() if ask.function is function]
            answers |= zip(mine, function([together[key].x for key in mine]), strict=True)
        got, sent = inside.over_shards({k: ask for k, ask in _each(asked) if isinstance(ask, OverShards)}, self.wire)
        answers |= got
        says = {key: ask for key, ask in _each(asked) if isinstance(ask, Say)}
        firsts = {key: ask for key, ask in _each(asked) if isinstance(ask, First)}
        rode: list[jax.Array] = []
        if says or firsts or not asked:  # else nothing is sent in this turn
            parts, cutting = inside.in_parts(says, self.wire, tally.ok)
            heard, rode, tally = self._mean(parts, riders, checked, contexts, tally)
            heard, joining = inside.of_parts(heard, says, self.wire, self.want_own)
            answers, sent = answers | heard, sent + cutting + joining
        if firsts:
            remark(lambda: Round.of({key: Say(ask.x) for key, ask in firsts.items()}, {}, [], None, None, contexts))
            get = functools.partial(_from_first, wire=self.wire)
            got, bits, joining = inside.from_first_shard(firsts, get, self.wire)
            answers, tally, sent = answers | got, tally._replace(bits=sum_bits(tally.bits, bits)), sent + joining
        tally = tally._replace(inside=sum_bits(tally.inside, sent))
        assert answers.keys() == {key for key, _ in _each(asked)}, "an ask was left without an answer"
        return _gathered(asked, answers), rode, tally

    def _mean(
        self,
        says: dict[Any, Say],
        riders: list[jax.Array],
        checked: int,
        contexts: dict[str, Context],
        tally: _Tally,
    ) -> tuple[dict[Any, Heard], list[jax.Array], _Tally]:
        """The means of all numbers that are said.

        Exact numbers and codes share one message, or each kind has a message of its own.
        """
        coder = self.codec.coder
        coded = {key: say for key, say in says.items() if coder is not None and not say.exact}
        exact = {key: self._narrowed(say) for key, say in says.items() if key not in coded}
        ride = None
        heard: dict[Any, Heard] = {}
        if coded and not coder.shares_scale:
            riding = sum(x.size * x.dtype.itemsize for x in (*riders, *(say.x for say in exact.values())))
            xs = [(path, say.x) for (path, _), say in coded.items()]
            each = [contexts[path].strength for path, _ in xs]
            ride = plan.route(coder, xs, each, riding, self.aggregate, self.wire.workers)
        remark(lambda: Round.of(exact, coded, riders, coder, ride, contexts))
        if not (ride and ride.ride) and (exact or riders):
            ring = self.aggregate == "ring" and coder is None
            strengths = [contexts[path].strength for path, _ in exact]
            got = ways.exact(
                list(exact.values()), riders, self.wire, strengths, ring=ring, before=tally.ok, checked=checked
            )
            heard |= zip(exact, got.heard, strict=True)
            riders, tally = got.rode, tally.after(got)
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
            tally = tally.after(got)._replace(coder=renewed)
        for key in exact:
            dtype = wide(says[key].x.dtype)
            heard[key] = Heard(heard[key].mean.astype(dtype), heard[key].own.astype(dtype))
        return heard, riders, tally._replace(rounds=tally.rounds + 1)

    def _narrowed(self, say: Say) -> Say:
        """An ask; a whole gradient becomes the type in which whole gradients travel."""
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
        """Sends codes, with riders beside them."""
        coder = self.codec.coder.under(self.feedback)
        key = random.step_key(0, 0)
        if coder.draws:
            key = self.wire.own_key(random.step_key(coder.seed, tally.coder.step))
        if route is None:
            return codes.shared(says, coder, self.aggregate or "psum", self.wire, key, tally.ok)
        return codes.coded(says, coder, route.way, riders, self.wire, key, strengths, before=tally.ok, checked=checked)

    def _refresh(
        self, state: Any, after: Any, done: _Done, contexts: dict[str, Context]
    ) -> tuple[dict[str, dict[str, Any]], Bits, Bits]:
        """Runs `Codec.refresh` if it is due: gives each leaf's fields, and bits sent to other workers and inside."""
        codec, due = self.codec, self.codec.due(state)
        if due is None:
            return {}, 0, 0
        leaves = {path: (codec.leaf(state, path), codec.leaf(after, path)) for path in done.mean}
        get = functools.partial(_from_first, wire=self.wire)
        old = lambda: {path: codec.kept(after) for path, (_, after) in leaves.items()}  # noqa: E731

        def renew() -> tuple[dict[str, Any], jax.Array, jax.Array]:
            talks = {path: codec.refresh(*leaves[path], done.mean[path], contexts[path]) for path in leaves}
            news: dict[str, Any] = {}
            asked, sent = _advance(talks, dict.fromkeys(talks), news), [bit_pair(0), bit_pair(0)]
            while asked:
                got, bits, passed = inside.from_first_shard(dict(_each(asked)), get, self.wire)
                sent = [bit_pair(sum_bits(x, y)) for x, y in zip(sent, (bits, passed), strict=True)]
                asked = _advance(talks, _gathered(asked, got), news)
            # The first shard's arrays are the same on all chips, but the fields that they renew may differ by type.
            fields = {path: jax.tree.map(vary_as, news[path], kept) for path, kept in old().items()}
            return fields, sent[0], sent[1]

        def keep() -> tuple[dict[str, Any], jax.Array, jax.Array]:
            return old(), bit_pair(0), bit_pair(0)

        return self.wire.switch(due.astype(jnp.int32), [keep, renew])


def _of_all(states: list[Any]) -> Any:
    """A coder's state after several buckets, from the state after each: the last one, with the sum of all lengths."""
    if len(states) == 1 or not _tells_length(states[-1]):
        return states[-1]
    length = total_bits(jnp.stack([bare(state.length).last for state in states]))
    return states[-1]._replace(length=Mine(CodeLength(length)))


def _without_length(state: Any) -> Any:
    """A coder's state before one of several buckets: the length is zero, for a bucket without anything to encode."""
    if not _tells_length(state):
        return state
    return state._replace(length=Mine(CodeLength(0 * bare(state.length).last)))  # of the same type


def _tells_length(state: Any) -> bool:
    return isinstance(bare(getattr(state, "length", None)), CodeLength)


def _advance(
    talks: Mapping[str, Generator[Any, Any, Any]], answers: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """Hands each talk its answer: gives their next asks, and puts the results of talks that end into `results`."""
    asked = {}
    for path, answer in answers.items():
        try:
            asked[path] = talks[path].send(answer)
        except StopIteration as end:
            results[path] = end.value
    return asked


def _each(asked: dict[str, Any]) -> list[tuple[tuple[str, int], Any]]:
    """Every single ask, with its leaf's path and its place."""
    one = lambda ask: isinstance(ask, Ask)  # noqa: E731
    return [((path, i), x) for path, ask in asked.items() for i, x in enumerate([ask] if one(ask) else ask)]


def _gathered(asked: dict[str, Any], answers: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """The answers by leaf: one answer, or a tuple if the leaf asked a tuple."""
    by_leaf: dict[str, Any] = {}
    for path, ask in asked.items():
        by_leaf[path] = answers[path, 0] if isinstance(ask, Ask) else tuple(answers[path, i] for i in range(len(ask)))
    return by_leaf


def _from_first(asked: Any, wire: Wire) -> tuple[Any, Bits]:
    """The first worker's tree, on all workers; one buffer a type."""
    leaves, treedef = jax.tree.flatten(asked)
    got, sent = list(leaves), 0
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat, bits = wire.from_first(jnp.concatenate([leaves[i].reshape(-1) for i in places]))
        sent += bits
        for i, x in zip(places, ways.parts_of(flat, [leaves[i] for i in places]), strict=True):
            got[i] = x
    return jax.tree.unflatten(treedef, got), sent
