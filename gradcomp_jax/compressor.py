"""A codec as an optax transformation: plan, owe, exchange, settle. This is where the parts come together.

    tree -- plan --> leaves -- feedback.owe --> terms -- rounds --> means -- feedback.settle --> tree and memory

It refuses gradients that must not be summed, sends uncompressed leaves along, keeps out numbers that are not finite,
and counts the bits. No codec does any of that.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradcomp_jax.coder import Coding
from gradcomp_jax.contract import Codec, Mine, Uncompressed, require_whole
from gradcomp_jax.cuts import Shard, whole
from gradcomp_jax.exchange import collectives
from gradcomp_jax.exchange.bits import add_bits, no_bits, sum_bits
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.exchange.parcels import Parcels, pack, unpack
from gradcomp_jax.exchange.plan import Plan, Settings, flatten, half, plan, salt, tell
from gradcomp_jax.exchange.rounds import Bucket, Exchange, Exchanged, Terms
from gradcomp_jax.norms import no_norms, of_lost, of_terms
from gradcomp_jax.notes import alone, remark
from gradcomp_jax.sharding import PerWorker, Shards, is_per_worker
from gradcomp_jax.views import always, narrow, wide, widen

BY_PATH = "by path"


def _placeholder_type() -> type:
    seen: list[type] = []
    optax.tree_map_params(lambda placeholder: seen.append(type(placeholder)), lambda x: x, None)
    return seen[0]


# The type of the placeholder that `optax.tree_map_params` gives to init instead of parameters.
PLACEHOLDER = _placeholder_type()


class CompressorState(NamedTuple):
    """The state of every codec's transformation.

    Attributes:
      codec: the codec's own state, such as a warm start; the same on all workers, except for leaves in `PerWorker`.
        Under EF21 an `Estimated`.
      residual: what error feedback still owes, for each compressed leaf by path; empty without error feedback.
      wire: bits sent, see `wire_bits`; under `across` a `Links`.
      skipped: int32, the number of steps in which some worker's gradient was not finite. Such a step yields zeros and
        leaves `codec` and `residual` as they were. `wire` counts the bits that it sent.
    """

    codec: Any
    residual: PerWorker
    wire: Any
    skipped: jax.Array


class MeasuredState(NamedTuple):
    """The state of a codec's transformation under `measured`: a `CompressorState` with one field more.

    It is a type of its own, so that checkpoints of codecs that are not measured have no such field.

    Attributes:
      codec: as in `CompressorState`.
      residual: as there.
      wire: as there.
      skipped: as there.
      norms: what `metrics` reads. By path, float32 [3]: three 2-norms of this worker in the last compressed step. They
        are the norms of the gradient, of the tensor to be sent, and of the part of that tensor that was not sent. They
        are zeros before the first step.
    """

    codec: Any
    residual: PerWorker
    wire: Any
    skipped: jax.Array
    norms: PerWorker


AnyState = CompressorState | MeasuredState
"""The state of a codec's transformation."""


class Estimated(NamedTuple):
    """A codec's state under EF21, which keeps estimates instead of a residual.

    Attributes:
      codec: the codec's own state.
      mean: the mean of the workers' estimates by path. It is applied, and is the same on all workers.
    """

    codec: Any
    mean: dict[str, jax.Array]


class Delivered(NamedTuple):
    """What update returns instead of its state if it was given `beside`.

    Attributes:
      state: the state.
      beside: the means over the workers of what rode along, leaves in float32 or wider. They mean nothing in a skipped
        step.
    """

    state: Any
    beside: Any


class Called(NamedTuple):
    """The remark that init and update of a codec's transformation make when they are called.

    Attributes:
      made: the function that was called.
      tree: parameters, or updates.
      plan: the plan of update; None in init.
      state: the state that update returns; None in init.
    """

    made: Any
    tree: Any
    plan: Plan | None = None
    state: AnyState | None = None


class Kind(NamedTuple):
    """A kind of step.

    Attributes:
      state: the state before such a step, in local form.
      phase: the phase for `Codec.talk`.
      strengths: each leaf's place among the codec's strengths, if it has several.
    """

    state: AnyState
    phase: int
    strengths: dict[str, int]


def kinds(codec: Codec, settings: Settings, the: Plan, state: AnyState) -> dict[str, Kind]:
    """The kinds of steps that may send different amounts, by name; the codec's main kind comes first.

    Args:
      codec: the codec.
      settings: its settings.
      the: the plan.
      state: the first state in local form; its large arrays may be shapes.
    """
    estimated = isinstance(state.codec, Estimated)
    first = _unmarked(state.codec.codec if estimated else state.codec, settings)
    found = {}
    for name, own in codec.kinds(first).items():
        after = _marked(codec, own, settings, the)
        after = state.codec._replace(codec=after) if estimated else after
        strengths = {path: int(place) for path, place in codec.strengths(own, the.compressed, None).items()}
        found[name] = Kind(state._replace(codec=after), int(codec.phase(own)), strengths)
    return found


class Compressor(optax.GradientTransformationExtraArgs):
    """An optax transformation that carries its codec: local gradients go in, aggregated gradients come out.

    Two of them are equal if their codecs and settings are equal. If `_replace` exchanges one of the two functions, the
    outcome is a plain optax transformation.

    Attributes:
      codec: the codec.
      settings: the settings that `compressor` was given.
    """

    @property
    def codec(self) -> Codec:
        return self.update.codec

    @property
    def settings(self) -> Settings:
        return self.update.settings

    @property
    def name(self) -> str:
        """The call that made it, such as "powersgd(rank=2)", or the codec's name."""
        return self.update.name

    def named(self, call: str) -> "Compressor":
        """The same transformation, under the name of this call."""
        return Compressor(*(dataclasses.replace(function, said=call) for function in self))

    def __repr__(self) -> str:
        return f"Compressor(codec={self.codec}, settings={self.settings})"

    @classmethod
    def _make(cls, fields: Iterable[Any]) -> optax.GradientTransformationExtraArgs:
        init, update = fields
        own = isinstance(update, _Update) and init == _Init(update.codec, update.settings)
        return cls(init, update) if own else optax.GradientTransformationExtraArgs(init, update)


def compressor(codec: Codec, settings: Settings) -> Compressor:
    """Turns a codec into an optax transformation.

    Args:
      codec: the codec.
      settings: the keywords of every public factory:
        axis_name: the mesh axis, or axes, of the workers.
        error_feedback: a `Feedback`, which keeps a float32 residual for each compressed leaf; `EF21`; or None.
        min_size: leaves with fewer elements are sent dense.
        compress: (path, leaf) -> whether to compress the leaf, such as `lambda path, leaf: "embed" not in path`; None
          leaves it to the codec. A leaf is sent dense in any case if it is below min_size, or if its payload would not
          be smaller than the leaf. (If small leaves are cut among many workers, the payloads of the shards may still
          add up to more.)
        allow_dense: accept a tree in which no leaf is compressed.
        aggregate: how the codec's numbers travel.
        dense_dtype: the type in which uncompressed numbers travel and are summed: "bfloat16", or "float16", which clips
          them to its range. It holds for leaves that are sent dense and for the gradients of a codec's own
          uncompressed steps. Error feedback keeps the rounding error of the latter, not of the former. None is float32,
          or float64 for float64 leaves. CPUs sum bfloat16 in float32; then float32 travels and is counted.
        buckets: the number of parts of the exchange. The parts are of about one size, and each has messages of its own.
          A part can be on its way while the backward pass still computes the gradients of the next. Parts go in the
          reverse of the paths' natural order, because a backward pass is taken to finish them in that order. Or
          (path) -> the number of a leaf's part; lower numbers go first. Whether all is finite is decided for all parts
          at once. Random codecs draw other numbers in another number of parts. The default is 1 on CPUs, whose
          collectives do not overlap; elsewhere it is up to 4 parts of 16 MiB of gradients or more.

    Returns:
      A transformation to put first in `optax.chain`. Its update takes this worker's own gradients and must run where
      `axis_name` is bound. If a gradient is not finite on any worker, it returns zeros on all. `train_step` and
      `simulate` then keep parameters and optimiser state; in a bare `optax.chain` the zeros reach the next
      transformation. A gradient also counts as not finite if a number computed from it would leave its type's range,
      and, under error feedback, if it is above 2^100. Means are rounded to the gradient's type and kept within its
      range; error feedback sends the difference later. Extra arguments of update:
        flush: True, as `gradcomp_jax.flush` gives, sends gradients and residuals dense; the codec's state stays.
        beside: a tree of floating arrays that are to be averaged over the workers too. They travel in the codec's own
          messages, and update returns `Delivered` instead of its state.
        learning_rate: the learning rate of this step, for codecs that ask for it.
        fresh: True, as `train_step` gives, if the same program computes the gradients. They are then read in the order
          in which their backend computed them, which may change last bits.

      Gradients that are already reduced are refused by name if types are tracked, which is under
      `shard_map(check_vma=True)`. Under vmap, pmap and `check_vma=False` they cannot be seen.
    """
    require_whole("min_size", settings.min_size, 0)
    if settings.buckets is not None and not callable(settings.buckets):
        require_whole("buckets", settings.buckets, 1)
    settings = settings._replace(dense_dtype=half(settings.dense_dtype))
    return Compressor(_Init(codec, settings), _Update(codec, settings))


@dataclasses.dataclass(frozen=True)
class _Made:
    """One of the two functions of a codec's transformation. It is a value, so it can be copied and compared."""

    codec: Codec
    settings: Settings
    said: str = dataclasses.field(default="", compare=False)

    @property
    def name(self) -> str:
        """The call that made it, or the codec's name."""
        return self.said or self.codec.name

    def __hash__(self) -> int:
        return hash((type(self), type(self.codec)))  # users' predicates may have no hash


class _Init(_Made):
    def __call__(self, params: Any) -> AnyState:
        if isinstance(params, PLACEHOLDER):
            return _placeholders(self.codec, self.settings, params)
        remark(lambda: Called(self, params))
        return _init(self.codec, self.settings, params)


class _Update(_Made):
    def __call__(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        flush: bool = False,
        beside: Any = None,
        learning_rate: Any = None,
        fresh: bool = False,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del params, extra_args
        codec, settings = self.codec, self.settings
        wire = Wire(settings.axis_name, settings.fast)
        leaves, _ = flatten(updates)
        _require_local(settings, leaves)
        if wire.workers == 1 and not flush and not isinstance(codec, Uncompressed):
            alone()
        the = plan(codec, settings, updates, wire.shards)
        _require_state_of(codec.name, state, jax.eval_shape(_Init(codec, settings), updates))
        narrower, extra = None if flush else settings.dense_dtype, jax.tree.leaves(beside)
        parcels = pack(the, leaves, extra, wire, settings.inside is not True, narrower)
        feeds = settings.error_feedback is not None
        wants_own = feeds or settings.measured
        exchange = Exchange(codec, settings.aggregate, wire, feeds, wants_own, fresh is True, narrower)
        if flush:
            exchange = exchange._replace(codec=Uncompressed(), aggregate=None)
        done, state = _exchange(exchange, codec, settings, the, leaves, state, parcels, learning_rate, flush)
        means, more, sent = unpack(the, leaves, extra, done.mean, done.rode, done.ok, wire)
        applied = [narrow(means[path], leaves[path].dtype) for path in the.leaves]
        updates = jax.tree.unflatten(the.treedef, applied)
        count = add_bits(state.wire, done.bits, sum_bits(done.inside, parcels.bits + sent))
        state = state._replace(wire=count)
        remark(lambda: Called(self, updates, the, state))
        if beside is None:
            return updates, state
        return updates, Delivered(state, jax.tree.unflatten(jax.tree.structure(beside), more))


def _shards(settings: Settings) -> int | None:
    """How many chips a worker has; None if the fast axis is not bound."""
    try:
        return 1 if settings.fast is None else collectives.workers(settings.fast)
    except ValueError:
        return None


def _init(codec: Codec, settings: Settings, params: Any) -> AnyState:
    if compressor_states(params):
        raise ValueError(
            "params hold an optimiser's state: the order is step(params, opt_state, batch). Of a TrainState give "
            "state.params"
        )
    shards = _shards(settings)
    the = plan(codec, settings, params, shards or 1)
    leaves, _ = flatten(params)
    if shards is not None:  # otherwise init is asked for types alone
        tell(codec, the, leaves)
    tensors = {path: _widened(seen) for path, seen in the.kept.items()}
    state = codec.start({path: codec.init(path, leaf, salt(path)) for path, leaf in tensors.items()})
    zeros = lambda: {path: jnp.zeros(x.shape, x.dtype) for path, x in tensors.items()}  # noqa: E731
    norms = {path: no_norms() for path in tensors}
    return _first_state(_marked(codec, state, settings, the), settings, zeros, norms, the)


def _widened(leaf: Any) -> Any:
    """The shape of a leaf, or of a shard, float32 or wider."""
    if isinstance(leaf, Shard):
        return leaf._replace(dtype=wide(leaf.dtype), whole=_widened(leaf.whole))
    return jax.ShapeDtypeStruct(leaf.shape, wide(leaf.dtype))


def _first_state(state: Any, settings: Settings, zeros: Callable[[], Any], norms: Any, the: Plan | None) -> AnyState:
    feedback = settings.error_feedback
    if feedback is not None and not feedback.owes:
        state = Estimated(state, _of_chip(zeros(), settings, the, "estimate"))
    role = "owed" if feedback is None or feedback.owes else "estimate"
    memory = _of_worker(zeros() if feedback is not None else {}, settings, the, role)
    first = CompressorState(state, memory, no_bits(settings.fast is not None), jnp.int32(0))
    if not settings.measured:
        return first
    return MeasuredState(*first, _of_worker(norms, settings, the, "norms", cut=False))


def _of_worker(value: Any, settings: Settings, the: Plan | None, role: str, cut: bool = True) -> Any:
    """Marks state that differs between the workers; if leaves are cut into shards, it differs between chips too.

    If `cut`, the entries by path are shards of the leaves. Without a plan, sharded state is one leaf.
    """
    if settings.fast is None:
        return PerWorker(value, settings.axis_name, role)
    if the is None:
        return value if isinstance(value, PLACEHOLDER) else BY_PATH
    cuts = tuple(the.cuts.get(path) if cut else None for path in sorted(value)) if isinstance(value, dict) else (None,)
    along = {path: the.shards[path][0] if path in the.shards else None for path in the.leaves}
    lie = tuple(sorted(along.items())) if the.shards else ()
    return PerWorker(value, settings.axes, role, Shards((settings.axis_name, settings.fast), cuts, lie))


def _of_chip(value: Any, settings: Settings, the: Plan | None, role: str) -> Any:
    """Marks state of a shard that is the same on all workers."""
    if settings.fast is None or the is None:
        return value
    return PerWorker(value, settings.fast, role, Shards((settings.fast,), tuple(map(the.cuts.get, sorted(value)))))


def _placeholders(codec: Codec, settings: Settings, placeholder: Any) -> AnyState:
    """The state as `optax.tree_map_params` asks for it: the placeholder stands for copies of the parameters.

    The codec's state by path is one leaf here, because there are no paths.
    """
    by_path = lambda x: isinstance(x, dict)  # noqa: E731
    state = jax.tree.map(lambda x: BY_PATH if by_path(x) else x, codec.start({}), is_leaf=by_path)
    return _first_state(_marked(codec, state, settings, None), settings, lambda: placeholder, BY_PATH, None)


def _exchange(
    exchange: Exchange,
    codec: Codec,
    settings: Settings,
    the: Plan,
    leaves: dict[str, Any],
    state: Any,
    parcels: Parcels,
    learning_rate: Any,
    flush: bool,
) -> tuple[Exchanged, Any]:
    """Exchanges the compressed leaves; returns the exchange, with the means to be applied, and the next state."""
    feedback, memory = settings.error_feedback, state.residual.value
    estimated = isinstance(state.codec, Estimated)
    own = _unmarked(state.codec.codec if estimated else state.codec, settings)
    terms: Terms = {path: (x,) for path, x in parcels.terms.items()}
    if feedback is not None and not flush:
        terms = {path: feedback.owe(x, memory[path]) for path, (x,) in terms.items()}
    elif feedback is not None and feedback.owes:
        terms = {path: (x, memory[path]) for path, (x,) in terms.items()}
    owing = {path: memory[path] for path in memory.keys() - terms.keys() if feedback is not None and feedback.owes}
    done = exchange(_buckets(the, terms, parcels, owing), () if flush else own, learning_rate)
    after = codec.flushed(own) if flush else done.state
    after = jax.tree.map(lambda new, old: jnp.where(done.ok, new, old), after, own) if flush else after
    mean, estimates = done.mean, _estimates(state.codec.mean) if estimated else {}
    if estimated and not flush:
        # The sum is the output of a conditional: if each use computed it, applied and kept last bits could differ.
        old = dict(estimates)
        moved = lambda: {**old, **{path: x + old[path] for path, x in done.mean.items()}}  # noqa: E731
        estimates = jax.lax.cond(done.ok, moved, lambda: old)
        mean = {path: jnp.where(done.ok, estimates[path], 0) for path in terms}
    residual = memory | {path: jnp.where(done.ok, 0, x) for path, x in owing.items()}
    given = {path: of_terms(x) for path, x in terms.items()} if settings.measured and not flush else {}
    for path in terms.keys() & memory.keys():
        old = memory[path]
        lost = _lost(mean[path], leaves[path].dtype) if feedback.owes else 0  # estimates are wide, and lose nothing
        if flush:
            residual[path] = jnp.where(done.ok, 0, old) if feedback.owes else old
        else:
            # Known only once the old memory has been read: so the new memory can overwrite it in place.
            ok = done.ok & always(given[path]) if given else done.ok
            residual[path] = feedback.settle(terms[path], old, done.own[path], ok)
            residual[path] = residual[path] if isinstance(lost, int) else residual[path] + jnp.where(done.ok, lost, 0)
    after = _marked(codec, after, settings, the)
    state = state._replace(
        codec=Estimated(after, _of_chip(estimates, settings, the, "estimate")) if estimated else after,
        residual=state.residual._replace(value=residual),
        skipped=state.skipped + jnp.where(done.ok, 0, 1),
    )
    return done._replace(mean=mean), _measured(state, feedback, terms, done, given) if given else state


def _measured(
    state: MeasuredState, feedback: Any, terms: Terms, done: Exchanged, given: dict[str, jax.Array]
) -> MeasuredState:
    """The state with the norms of a step; `given` holds the norms of its terms."""
    norms = dict(state.norms.value)
    for path, norm in given.items():
        lost = of_lost(feedback, terms[path][0], state.residual.value.get(path), done.own[path], norm)
        now = narrow(jnp.concatenate([norm, lost]), jnp.float32)
        norms[path] = jnp.where(done.ok, now, norms[path])
    return state._replace(norms=state.norms._replace(value=norms))


def _buckets(the: Plan, terms: Terms, parcels: Parcels, owing: dict[str, jax.Array]) -> list[Bucket]:
    """The parts of the exchange; `owing`: the residuals of leaves that are dense now, but were not on fewer chips."""
    buckets = []
    for paths, riders, checked in zip(the.buckets, parcels.riders, parcels.checked, strict=True):
        mine = {path: terms[path] for path in paths if path in terms}
        dense = [path for path in paths if path not in terms]
        sent = [x + owing[path].astype(x.dtype) if path in owing else x for path, x in zip(dense, riders, strict=False)]
        sent += riders[len(dense) :]
        shapes = {path: whole(the.compressed[path]).shape for path in mine}
        buckets.append(Bucket(mine, sent, checked, shapes, tuple(dense)))
    return buckets


def _estimates(mean: Any) -> dict[str, jax.Array]:
    return mean.value if is_per_worker(mean) else mean


def _lost(mean: jax.Array, dtype: Any) -> Any:
    """The part of the mean that a narrower type cannot hold."""
    return 0 if mean.dtype == dtype else mean - widen(narrow(mean, dtype))


def _marked(codec: Codec, state: Any, settings: Settings, the: Plan | None) -> Any:
    """The codec's state with its marks turned into `PerWorker`: what differs between workers, or between chips."""
    if settings.fast is not None and the is not None:
        state = codec.of_shards(state, lambda field, name: _field(codec, field, name, settings, the))
    is_mine = lambda x: isinstance(x, Mine)  # noqa: E731
    mark = lambda x: _of_worker(x.value, settings, the, "state") if is_mine(x) else x  # noqa: E731
    return jax.tree.map(mark, state, is_leaf=is_mine)


def _field(codec: Codec, field: dict[str, Any], name: str, settings: Settings, the: Plan) -> PerWorker:
    """A codec's field by leaf; each chip has the entries of its shards."""
    fast = settings.fast
    assert fast is not None
    cuts = tuple(codec.shard_cut(name, path, whole(the.kept[path])) for path in sorted(field))
    return PerWorker(field, fast, "state", Shards((fast,), cuts))


def _unmarked(state: Any, settings: Settings) -> Any:
    def bare(x: Any) -> Any:
        if not is_per_worker(x):
            return x
        return x.value if settings.fast is not None and x.axis == settings.fast else Mine(x.value)

    return jax.tree.map(bare, state, is_leaf=is_per_worker)


def quantizing(codec: str, quantizer: Compressor | None, aggregate: str, axis_name: Any) -> tuple[Any, str | None]:
    """The coder that encodes a linear codec's numbers, and how they travel.

    Returns:
      The quantizer's coder, and its way of aggregation; None and `aggregate` without a quantizer.

    Raises:
      ValueError: the quantizer is not unbiased, is transformed, is on another axis, or keeps residuals of its own; or
        it is given beside aggregate="ring".
    """
    if quantizer is None:
        return None, aggregate
    inside = quantizer.codec if isinstance(quantizer, Compressor) else None
    if not isinstance(inside, Coding) or not inside.coder.unbiased:
        name = quantizer if inside is None else inside.name
        raise ValueError(f"quantizer={name!r} of codec {codec!r} must be a qsgd(...), which rounds without bias")
    if inside.transform is not None:
        raise ValueError(
            f"quantizer of codec {codec!r} has a transform, which goes before tensors of a codec of its own: give the "
            "qsgd without it"
        )
    if quantizer.settings.fast is not None:
        raise ValueError(
            f"quantizer of codec {codec!r} is across slices: give across the whole, as in across({codec}(..., "
            "quantizer=qsgd(4)))"
        )
    if quantizer.settings.axis_name != axis_name:
        raise ValueError(
            f"quantizer=qsgd(axis_name={quantizer.settings.axis_name!r}) is on another axis than codec {codec!r}, "
            f"axis_name={axis_name!r}: give both the same"
        )
    if quantizer.settings.error_feedback:
        raise ValueError(
            f"quantizer=qsgd(error_feedback=True) of codec {codec!r} would keep residuals of its own: leave it out "
            f"there; {codec}'s own error feedback holds for both"
        )
    if quantizer.settings.dense_dtype is not None:
        raise ValueError(
            f"quantizer=qsgd(dense_dtype='{quantizer.settings.dense_dtype}') of codec {codec!r} sends nothing dense: "
            f"give dense_dtype to {codec}"
        )
    if quantizer.settings.measured:
        raise ValueError(
            f"quantizer of codec {codec!r} is measured, and loses nothing by itself: measure the whole, as in "
            f"measured({codec}(..., quantizer=qsgd(4)))"
        )
    if aggregate != "psum":
        raise ValueError(
            f"aggregate={aggregate!r} beside a quantizer, with which codec {codec!r} is not linear: say there how "
            "its codes are aggregated, as in qsgd(aggregate='ring')"
        )
    return inside.coder, quantizer.settings.aggregate


def skipped(opt_state: Any) -> int:
    """How many steps the codecs in `opt_state` skipped because some worker's gradient was not finite.

    Args:
      opt_state: an optimiser state that holds the state of one codec, or of several, which are added up. It may be
        the local form, the global form, or one replicated for pmap.

    Raises:
      ValueError: `opt_state` holds no codec's state.
    """
    states = compressor_states(opt_state)
    if not states:
        raise ValueError(f"opt_state holds no codec's state, so no steps were counted: got {type(opt_state).__name__}")
    return sum(int(np.asarray(jax.device_get(state.skipped)).reshape(-1)[0]) for state in states)


def skipped_steps(opt_state: Any) -> jax.Array:
    """`skipped` inside a step: int32, from the local form."""
    return jnp.sum(jnp.stack([jnp.int32(0), *(state.skipped for state in compressor_states(opt_state))]))


def compressor_states(opt_state: Any) -> list[AnyState]:
    """The states of all codecs' transformations in an optimiser state."""
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_compressor_state) if is_compressor_state(x)]


def is_compressor_state(x: Any) -> bool:
    """Whether `x` is the state of a codec's transformation."""
    return isinstance(x, AnyState)


def _require_local(settings: Settings, leaves: dict[str, Any]) -> None:
    collectives.workers(settings.axis_name)
    collectives.require_local(list(leaves.items()), settings.axis_name)
    collectives.require_same_elsewhere(list(leaves.items()), settings.axes)


def _require_state_of(codec: str, state: Any, expected: Any) -> None:
    """Raises ValueError, and names the leaf, if a state was not made for gradients like these."""

    def shapes(tree):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path): (x.shape, str(x.dtype)) for path, x in leaves}

    got, want = shapes(state), shapes(expected)
    for path in sorted(got.keys() | want.keys()):
        if got.get(path) != want.get(path):
            raise ValueError(
                f"the state of codec {codec!r} is not one of these gradients: {path} is "
                f"{_describe(got.get(path))}, expected {_describe(want.get(path))}; make the state by "
                "init(tx, params, mesh) from parameters like these, and inside your own shard_map pass it "
                "through local_state first"
            )


def _describe(leaf: tuple | None) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
