"""Another codec in the middle of a run: residuals and the state of the rest of the chain go on."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gradcomp_jax.arguments import require_transformation
from gradcomp_jax.codecs.powersgd import PowerSGDState, of_rank
from gradcomp_jax.compressor import AnyState, Estimated, MeasuredState, compressor_states, is_compressor_state
from gradcomp_jax.cuts import Cut
from gradcomp_jax.exchange.bits import total_bits
from gradcomp_jax.mesh import in_automatic_axes, require_mesh
from gradcomp_jax.notes import note
from gradcomp_jax.outer import Outer
from gradcomp_jax.placing import global_init, init_parts, place
from gradcomp_jax.sharding import is_per_worker, require_state

# The number of leaves that a message names.
MOST_NAMED = 4


def swap(
    tx: optax.GradientTransformation,
    new_tx: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    mesh: Mesh | int | None = None,
) -> Any:
    """The optimiser's state for another codec, or another strength, in the middle of a run.

    The rest of the chain goes on as it is: moments, counts, schedules, what is pending under `delayed`. From the codec
    these are kept:

    - residuals, leaf by leaf: what every worker still owes;
    - counts of bits and skipped steps;
    - its own state, if the state of new_tx has the same type and shapes, also inside `accordion`, `scheduled` and
      `per_layer`. From one rank of `powersgd` to another the common columns of Q are kept, and more are drawn. State
      that does not fit begins anew, such as the bases of `gradiveq` at another ratio.

    The new state has no place for a residual if its leaf is now sent dense, if the new codec has no error feedback, or
    if it keeps EF21's estimates. Then the swap is refused, unless the residuals are zero, as after `flush`. The
    estimates of EF21 owe nothing: they go on under EF21, and otherwise they are dropped, which is logged.

    Under `outer` the codec may change, and also the period; with a delay the period only right after `flush`.

    Values that the state holds stay, whatever new_tx says, such as a learning rate under `optax.inject_hyperparams`.
    Make a new step with new_tx. The new state shares the memory of the old one, which a step with donate=True reuses.

    Args:
      tx: the optimiser with which opt_state was made.
      new_tx: the same chain with another codec.
      params: the parameters.
      opt_state: the optimiser's state, in its global form.
      mesh: the workers, by default all devices; or, for an opt_state of `simulate`, their number.

    Returns:
      The state for new_tx, in its global form, like that of `init`.

    Raises:
      ValueError: opt_state is not one of tx for params and the mesh; tx and new_tx differ beside the codec; or a
        residual, or what is on its way under `outer`, would be lost. Nothing is changed then.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx, new_tx = (optax.chain(codec, optax.adam(1e-3)) for codec in (gcj.powersgd(4), gcj.topk(0.01)))
    >>> opt_state = gcj.init(tx, params, 4)
    >>> opt_state = gcj.swap(tx, new_tx, params, opt_state, 4)
    """
    require_transformation(new_tx)
    mesh = require_mesh(mesh)
    require_state(tx, params, opt_state, mesh)
    if isinstance(tx, Outer) and isinstance(new_tx, Outer):
        _require_same_plan(tx, new_tx, params, int(opt_state.place))
    return in_automatic_axes(mesh, functools.partial(_swap, new_tx, mesh))(params, opt_state)


def _require_same_plan(tx: Outer, new_tx: Outer, params: Any, place: int) -> None:
    """Raises ValueError if fragments that were exchanged would not be adopted by new_tx, or others would."""
    if not place:
        return
    (old, of), (new, of_new) = ((x.method.period(params), x.method.fragment_of(params)) for x in (tx, new_tx))
    flushed = "Call flush(tx, params, opt_state, mesh) first. Nothing was changed"
    if old != new and (old.delay or new.delay):
        raise ValueError(
            f"opt_state is at place {place} of {_written(old)}, and new_tx has {_written(new)}: with a delay new_tx "
            f"would not know what is on its way. {flushed}"
        )
    if moved := [path for path, fragment in of.items() if of_new[path] != fragment]:
        raise ValueError(
            f"leaf {moved[0]!r} is in fragment {of[moved[0]]} of tx, and in {of_new[moved[0]]} of new_tx. {flushed}"
        )


def _written(plan: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in plan._asdict().items())


def _swap(new_tx: optax.GradientTransformation, mesh: Mesh | int, params: Any, opt_state: Any) -> Any:
    want = jax.eval_shape(functools.partial(global_init, new_tx, mesh), params)
    pairs, treedef = _paired(opt_state, want)
    parts = [_Part.of(old, new) for old, new in pairs if _is_codecs(new)]
    _require_nothing_lost(parts)
    carried = iter([part.carried() for part in parts])
    state = jax.tree.unflatten(treedef, [next(carried) if _is_codecs(new) else old for old, new in pairs])
    leaves, structure = jax.tree.flatten(state)
    missing = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct | _OfRank)]
    made = init_parts(new_tx, params, mesh, lambda state: [jax.tree.leaves(state)[i] for i in missing])
    for i, fresh in zip(missing, made, strict=True):
        leaves[i] = _of_rank(leaves[i].old, fresh) if isinstance(leaves[i], _OfRank) else fresh
    state = jax.tree.unflatten(structure, leaves)
    return state if isinstance(mesh, int) else place(state, mesh)


@dataclasses.dataclass(frozen=True)
class _OfRank:
    """Stands for an array of the new state: columns of Q from another rank, and the missing ones drawn anew."""

    old: Any


_of_rank = jax.jit(of_rank)


def _is_codecs(x: Any) -> bool:
    """Whether it is the state of codecs' transformations alone: of one, or of several, as under `per_layer`."""
    leaves = jax.tree.leaves(x, is_leaf=is_compressor_state)
    return bool(leaves) and all(is_compressor_state(leaf) for leaf in leaves)


def _paired(opt_state: Any, want: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Pairs the old and the new states of codecs, and arrays beside them; also the new structure around them.

    Raises:
      ValueError: old and new are not alike beside the codecs.
    """
    for is_leaf in (_is_codecs, is_compressor_state):
        (old, around), (new, treedef) = (jax.tree.flatten(x, is_leaf=is_leaf) for x in (opt_state, want))
        if around == treedef:  # type: ignore[operator]
            break
    else:
        _refuse_chain(opt_state, want)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(want, is_leaf=is_leaf)]
    for path, a, b in zip(paths, old, new, strict=True):
        if not _is_codecs(b) and (jnp.shape(a), jnp.result_type(a)) != (b.shape, b.dtype):
            raise ValueError(
                f"tx and new_tx differ beside the codec: state leaf {jax.tree_util.keystr(path)} is "
                f"{jnp.result_type(a)}{list(jnp.shape(a))} and {b.dtype}{list(b.shape)}; give both the same chain "
                "around the codec. Nothing was changed"
            )
    return list(zip(old, new, strict=True)), treedef


def _refuse_chain(opt_state: Any, want: Any) -> None:
    paths = [
        {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x, is_leaf=is_compressor_state)}
        for x in (opt_state, want)
    ]
    differing = sorted(paths[0] ^ paths[1])
    what = "in the types of their states"
    if differing:
        what = f"state leaf {differing[0]} is of {'tx' if differing[0] in paths[0] else 'new_tx'} alone"
    pending = any(".pending" in path for path in differing)
    hint = "put both codecs in delayed(...), or neither" if pending else "give both the same chain around the codec"
    raise ValueError(f"tx and new_tx differ beside the codec: {what}; {hint}. Nothing was changed")


class _Memory(NamedTuple):
    """What a worker keeps for a leaf.

    Attributes:
      rows: [workers, ...]; for shards [workers, chips, ...]; without the axis of workers if it is the same on all.
      cut: how shards are cut, or None.
      axes: the number of leading axes, which count workers and chips.
    """

    rows: Any
    cut: Cut | None
    axes: int

    def as_cut(self, cut: Cut | None) -> Any:
        """The rows, cut into shards in another way."""
        if self.cut == cut or cut is None or self.cut is None:
            return self.rows
        before = self.cut
        one = lambda parts: cut.split(before.join(parts), len(parts))  # noqa: E731
        return jax.jit(one if self.axes == 1 else jax.vmap(one))(self.rows)


Key = tuple[str, Any, str]
"""The role of what is kept, the axes along which it differs, and the leaf's path."""


def _by_path(x: Any) -> dict[str, _Memory]:
    """The entries of a dict of arrays by path, which may be marked as per worker, or as shards."""
    value, shards, axes = (x.value, x.shards, len(x.leading)) if is_per_worker(x) else (x, None, 0)
    cuts = [None] * len(value) if shards is None else shards.cuts
    return {path: _Memory(value[path], cut, axes) for path, cut in zip(sorted(value), cuts, strict=True)}


def _memories(states: Sequence[AnyState]) -> dict[Key, _Memory]:
    """Residuals and estimates."""
    return {
        (state.residual.role, state.residual.leading, path): memory
        for state in states
        for path, memory in _by_path(state.residual).items()
    }


class _Part(NamedTuple):
    """The states of codecs at one place of the chain.

    Attributes:
      old: the old states.
      new: the new states, as shapes.
      around: the structure of the new ones.
    """

    old: list[AnyState]
    new: list[AnyState]
    around: Any

    @classmethod
    def of(cls, old: Any, new: Any) -> "_Part":
        return cls(compressor_states(old), *jax.tree.flatten(new, is_leaf=is_compressor_state))

    def left(self, role: str) -> dict[Key, Any]:
        """The old memories with this role that have no place in the new states."""
        places = _memories(self.new)
        return {key: x.rows for key, x in _memories(self.old).items() if key[0] == role and key not in places}

    def why(self, key: Key) -> str:
        """Why a debt has no place."""
        _, axes, path = key
        places = _memories(self.new)
        if ("estimate", axes, path) in places:
            return "under EF21 it keeps estimates in their place"
        if not places:
            return "it keeps no residuals"
        if any(path == other for *_, other in places):
            return "its codec is on other axes"
        return "it sends them dense"

    def carried(self) -> Any:
        """The new states, made of old arrays; without an old array, of shapes or `_OfRank`."""
        if dropped := self.left("estimate"):
            names = _named([path for *_, path in dropped])
            note(logging.INFO, f"swap drops EF21's estimates of {names}, which owe nothing")
        return jax.tree.unflatten(self.around, [self._state(place_, new) for place_, new in enumerate(self.new)])

    def _state(self, place_: int, new: AnyState) -> AnyState:
        memories, residual = _memories(self.old), {}
        for path, fresh in _by_path(new.residual).items():
            old = memories.get((new.residual.role, new.residual.leading, path))
            residual[path] = fresh.rows if old is None else old.as_cut(fresh.cut)
        like = len(self.old) == len(self.new)
        wire, skipped = new.wire, new.skipped
        if like:
            wire, skipped = self.old[place_].wire, self.old[place_].skipped
        elif place_ == 0:  # the first gets the sums of all
            wire = jax.tree.map(_sum_of_pairs, *(state.wire for state in self.old))
            skipped = functools.reduce(jnp.add, [state.skipped for state in self.old])
        first = self.old[place_ : place_ + 1] if like else []
        nested = [x for state in [*first, *self.old] for x in _nested(state.codec)]
        owed, codec = new.residual._replace(value=residual), self._codec(new, nested)
        new = new._replace(codec=codec, residual=owed, wire=wire, skipped=skipped)
        return self._measured(place_, new) if isinstance(new, MeasuredState) else new

    def _measured(self, place_: int, new: MeasuredState) -> MeasuredState:
        """The norms of the last step go on where a measured codec stood in this place."""
        old = self.old[place_] if len(self.old) == len(self.new) else None
        kept = old.norms.value if isinstance(old, MeasuredState) else {}
        norms = {path: kept.get(path, fresh) for path, fresh in new.norms.value.items()}
        return new._replace(norms=new.norms._replace(value=norms))

    def _codec(self, new: AnyState, nested: list[Any]) -> Any:
        if not isinstance(new.codec, Estimated):
            return _resumed(new.codec, nested)
        # Each mean goes with its estimates.
        kept = {
            (state.residual.leading, path): memory
            for state in self.old
            if isinstance(state.codec, Estimated)
            for path, memory in _by_path(state.codec.mean).items()
        }
        mean: Any = {}
        for path, fresh in _by_path(new.codec.mean).items():
            old = kept.get((new.residual.leading, path))
            mean[path] = fresh.rows if old is None else old.as_cut(fresh.cut)
        like: Any = new.codec.mean
        mean = like._replace(value=mean) if is_per_worker(like) else mean
        return Estimated(_resumed(new.codec.codec, nested), mean)


def _sum_of_pairs(*pairs: jax.Array) -> jax.Array:
    return total_bits(jnp.stack(pairs))


def _nested(state: Any) -> Iterator[Any]:
    """A codec's state and the states inside it, such as that of the codec that `accordion` switches."""
    if not isinstance(state, Estimated):
        yield state
    if hasattr(state, "codec"):
        yield from _nested(state.codec)


def _alike(a: Any, b: Any) -> bool:
    """Whether two states have one type, and arrays of the same shapes and types."""
    of = lambda x: jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), x)  # noqa: E731
    same = jax.tree.structure(a) == jax.tree.structure(b)  # type: ignore[operator]
    return same and of(a) == of(b)


def _resumed(new: Any, nested: list[Any]) -> Any:
    """A codec's new state, filled with old states that fit; earlier ones go first."""
    for old in nested:
        if _alike(new, old):
            return old
    if isinstance(new, PowerSGDState):
        return _of_ranks(new, [old for old in nested if isinstance(old, PowerSGDState)])
    if hasattr(new, "codec"):
        beside = lambda x: x._replace(codec=())  # noqa: E731
        fits = (old for old in nested if type(old) is type(new) and _alike(beside(new), beside(old)))
        return next(fits, new)._replace(codec=_resumed(new.codec, nested))
    return new


def _of_ranks(new: PowerSGDState, olds: list[PowerSGDState]) -> PowerSGDState:
    """PowerSGD's state, filled with the Q of other ranks."""
    if not olds:
        return new
    q: dict[str, Any] = dict(new.q)
    for path, fresh in new.q.items():
        found = next((old.q[path] for old in olds if path in old.q), None)
        if found is not None and (found.shape[0], found.shape[2]) == (fresh.shape[0], fresh.shape[2]):
            q[path] = found if found.shape == fresh.shape else _OfRank(found)
    quantizer = olds[0].quantizer if _alike(olds[0].quantizer, new.quantizer) else new.quantizer
    return PowerSGDState(q, olds[0].step, quantizer)


def _require_nothing_lost(parts: Sequence[_Part]) -> None:
    """Raises ValueError, with the leaves' names, if a debt, or a count of bits, has no place in the new states."""
    for part in parts:
        kinds = {type(state.wire) for state in [*part.old, *part.new]}
        if len(kinds) > 1:
            raise ValueError(
                "the codec is across slices in one of tx and new_tx only, which count bits by other links: put both "
                "in across(...), or neither. Nothing was changed"
            )
    left = [(part, key, rows) for part in parts for key, rows in part.left("owed").items()]
    owed = jax.device_get([jnp.any(jnp.asarray(rows) != 0) for *_, rows in left])
    reasons: dict[str, list[str]] = {}
    for (part, key, _), any_ in zip(left, owed, strict=True):
        if any_:
            reasons.setdefault(part.why(key), []).append(key[-1])
    if reasons:
        lost = "; and for that of ".join(f"{_named(paths)}: {reason}" for reason, paths in reasons.items())
        raise ValueError(
            f"new_tx has no place for what is owed of {lost}. Apply it first, by params, opt_state = flush(tx, params, "
            "opt_state, mesh). Nothing was changed"
        )


def _named(paths: Sequence[str]) -> str:
    more = len(paths) - MOST_NAMED
    return "leaves " + ", ".join(map(repr, paths[:MOST_NAMED])) + f" and {more} more" * (more > 0)
