"""What an optimiser's codecs would do with each parameter: nothing is sent, placed or allocated.

    params, workers -- dry.py --> a traced step -- shares.py, wire_bits --> rows, totals -- table.py --> text

`python -m gradcomp_jax.describe` takes shapes on the command line.
"""

import collections
import functools
import json
import math
from typing import Any, NamedTuple

import jax
import optax

from gradcomp_jax import known
from gradcomp_jax.compressor import AnyState, Called, Kind, compressor_states, kinds
from gradcomp_jax.cuts import whole
from gradcomp_jax.delayed import DelayedState
from gradcomp_jax.describe import table
from gradcomp_jax.describe.dry import DO_NOT_FIT, FIT, Dry, Workers, dry_run, shapes_of
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.exchange.shares import Round, Shares, shares
from gradcomp_jax.outer import Outer


class Row(NamedTuple):
    """The description of one leaf.

    Attributes:
      path: the leaf's path, such as "layer_0/kernel".
      shape: the leaf's shape; for a leaf in shards, the shape of the whole.
      dtype: the leaf's type.
      codec: the call that made the codec that compresses the leaf; empty if none does.
      view: the codec's view of the leaf, such as "64 x 16 at rank 1"; empty if the codec takes the leaf as it is, or if
        the leaf is dense.
      why: the reason why the leaf is dense; empty if it is compressed.
      advice: what to look at if the view gains little; else empty.
      sent: the bytes that one worker sends for the leaf in a step, by the ring laws; with `across`, the bytes that one
        device sends to other nodes.
      ratio: how many times fewer bytes these are than those of an uncompressed all-reduce in the leaf's own type; None
        if the leaf sends nothing.
      residual: the bytes that error feedback keeps for the leaf on one worker; with `across`, on one device.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    view: str
    why: str
    advice: str
    sent: float
    ratio: float | None
    residual: int


class Part(NamedTuple):
    """The description of one codec of the optimiser.

    Attributes:
      codec: the call that made the codec.
      way: how its numbers travel, "psum", "gather", "shuffle" or "ring".
      why: the reason for this way.
      kind: the kind of step that the rows describe, such as "compressed"; empty if the codec has one kind.
      kinds: the bytes that one worker sends in a step of each kind, by name; the first is `kind`.
      sent: the bytes that one worker sends in a step of `kind`. They are the sum of the leaves' bytes, `flags` and
        `packing`.
      flags: the bytes of flags with which the workers agree whether codes fit their buffer.
      packing: the bytes that no leaf sends alone: they fill up shards, words and buffers of fixed sizes. Less than 0 if
        the codes of several leaves share bytes.
      inside: with `across`, the bytes that one device sends to others of its node.
      residual: the bytes of residuals on one worker; with `across`, on one device.
      state: the bytes of the codec's other state, and of the mean that waits for the next step under `delayed`.
      buckets: the number of parts of the exchange.
    """

    codec: str
    way: str
    why: str
    kind: str
    kinds: dict[str, float]
    sent: float
    flags: float
    packing: float
    inside: float
    residual: int
    state: int
    buckets: int


class Totals(NamedTuple):
    """The totals of all codecs of the optimiser, in steps of the kinds that the rows describe.

    Attributes:
      elements: the number of elements in the parameters.
      sent: the bytes that one worker sends in a step; the count of `wire_bits`, in bytes.
      ratio: how many times fewer bytes these are than those of uncompressed all-reduces in the leaves' own types; None
        if nothing is sent.
      flags: the sum of `Part.flags`.
      packing: the sum of `Part.packing`.
      inside: the sum of `Part.inside`.
      residual: the sum of `Part.residual`.
      state: the sum of `Part.state`.
      messages: the number of operands of collectives in a step, by kind such as "all-reduce"; with `across`, of those
        between nodes.
    """

    elements: int
    sent: float
    ratio: float | None
    flags: float
    packing: float
    inside: float
    residual: int
    state: int
    messages: dict[str, int]


class Description(NamedTuple):
    """What an optimiser's codecs would do with each parameter; `str` of a description is a table.

    Attributes:
      workers: the number of workers along each axis of the mesh.
      platform: the platform that the description holds for: "cpu", "gpu" or "tpu".
      every: under `outer`, the local steps of a period, in which all of this is sent once; else 1.
      rows: the leaves, in the order of the parameters.
      parts: the codecs, in the order of their states.
      totals: the totals of all codecs.
      collectives: the collectives of such a step, in its order; with `across`, also those inside a node.
    """

    workers: dict[str, int]
    platform: str
    every: int
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]
    totals: Totals
    collectives: tuple[known.Message, ...]

    def __str__(self) -> str:
        return table.text(self)

    def as_json(self) -> str:
        """The description as JSON, for programs."""
        plain = {name: [x._asdict() for x in getattr(self, name)] for name in ("rows", "parts", "collectives")}
        return json.dumps(self._asdict() | plain | {"totals": self.totals._asdict()})


def describe(tx: optax.GradientTransformation, params: Any, workers: Workers) -> Description:
    """Describes what the codecs of an optimiser would do with each parameter; nothing is sent, placed or allocated.

    It traces the optimiser's update for so many workers, and reads the messages and the counts of its codecs. So the
    bytes are those that `wire_bits` counts after such a step of `tx.update`. (`train_step` also sends the loss in the
    same messages, and its 4 bytes count too.) The bytes hold for the platform that jax runs on, or for the mesh's
    devices. Like `wire_bits`, it does not count `average`.

    Some codecs have steps that send different amounts: gradiveq, accordion, and qsgd with Elias' code. Rows describe
    the kind of step that the codec is for: compressed, at the high level, with codes that fit their buffer.
    `Part.kinds` has the bytes of the other kinds.

    Of an `outer` it describes one exchange of all fragments. The bytes of a step are these over `every`.

    Args:
      tx: the optimiser, with one or more codecs anywhere in it.
      params: the parameters, or their shapes; always whole, even if they will lie in shards.
      workers: the number of workers; or the number along each axis, such as {"node": 2, "local": 4} for `across`; or a
        mesh, whose devices need not be there, such as `jax.sharding.AbstractMesh`.

    Returns:
      Rows, parts and totals; `str` of the description is a table of at most 110 columns.

    Raises:
      ValueError: tx holds no codec, or calls a codec in some steps only; `workers` lacks an axis of the codecs; or a
        codec refuses the parameters.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import gradcomp_jax as gcj
    >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32), "b": jax.ShapeDtypeStruct((1024,), jnp.float32)}
    >>> told = gcj.describe(optax.chain(gcj.powersgd(rank=4), optax.sgd(0.1)), params, workers=8)
    >>> told.rows[1].view, told.rows[1].sent, told.totals.messages
    ('512 x 1024 at rank 4', 43008.0, {'all-reduce': 2})
    """
    params = shapes_of(params)
    dry = dry_run(tx, params, workers)
    leaves, _ = flatten(params)
    rows: dict[str, Row] = {}
    parts = []
    strongest = {}
    for place, state in enumerate(compressor_states(dry.state)):
        of = _kinds(dry, place, state)
        strongest[place] = next(iter(of.values())).kind.state
        mine, part = _part(dry, place, of, state, leaves)
        rows |= mine
        parts.append(part)
    ordered = tuple(rows[path] if path in rows else _unsent(path, x) for path, x in leaves.items())
    uncompressed = math.fsum(x.ratio * x.sent for x in ordered if x.ratio)
    messages = collections.Counter[str]()
    collectives = tuple(x for x in dry.messages(strongest) if any(dry.mesh.shape[axis] > 1 for axis in x.axes))
    for message in collectives:
        if any(axis in dry.axes and dry.mesh.shape[axis] > 1 for axis in message.axes):
            messages[message.kind] += message.times
    sums = {name: math.fsum(getattr(part, name) for part in parts) for name in ("sent", "flags", "packing", "inside")}
    totals = Totals(
        elements=sum(x.size for x in leaves.values()),
        ratio=uncompressed / sums["sent"] if sums["sent"] else None,
        residual=sum(part.residual for part in parts),
        state=sum(part.state for part in parts),
        messages=dict(messages),
        **sums,
    )
    every = tx.method.every if isinstance(tx, Outer) else 1
    return Description(dict(dry.mesh.shape), dry.platform, every, ordered, tuple(parts), totals, collectives)


class _Counted(NamedTuple):
    """A kind of step, with its bits.

    Attributes:
      kind: the kind.
      bits: the bits that a worker sends.
      inside: with `across`, the bits that a device sends to others of its node.
    """

    kind: Kind
    bits: int
    inside: int


def _kinds(dry: Dry, place: int, state: AnyState) -> dict[str, _Counted]:
    """The kinds of steps of one codec; the first is the kind that the codec is for."""
    made, plan = dry.called[place].made, dry.called[place].plan
    assert plan is not None
    found = {}
    for name, kind in kinds(made.codec, made.settings, plan, state).items():
        count = functools.partial(dry.bits, place, kind.state)
        try:
            found[name] = _Counted(kind, count(), count("inside"))
        except known.Unknown:
            for what, otherwise in (("codes fit", FIT), ("codes do not fit", DO_NOT_FIT)):
                both = f"{name}, {what}" if name else what
                found[both] = _Counted(kind, count(otherwise=otherwise), count("inside", otherwise))
    return found


def _part(
    dry: Dry, place: int, of: dict[str, _Counted], state: AnyState, leaves: dict[str, Any]
) -> tuple[dict[str, Row], Part]:
    """The rows of one codec's leaves, and the description of the codec."""
    called = dry.called[place]
    assert called.plan is not None
    name, (kind, bits, inside) = next(iter(of.items()))
    rounds = [x for x in dry.rounds[place] if x[0].phase == kind.phase]
    sent = shares(rounds, dry.workers_of(called), kind.strengths)
    way, why = _way(called, [x for _, x in rounds])
    memory, waits = state.residual.value, _waiting(dry.state, state)
    rows = {path: _row(dry, called, path, leaves[path], sent, memory.get(path)) for path in called.plan.leaves}
    part = Part(
        codec=called.made.name,
        way=way,
        why=why,
        kind=name,
        kinds={each: counted.bits / 8 for each, counted in of.items()},
        sent=bits / 8,
        flags=sent.flags,
        packing=bits / 8 - sent.flags - math.fsum(sent.leaves.values()),
        inside=inside / 8,
        residual=_bytes(memory),
        state=_bytes(state) - _bytes(memory) + _bytes(waits),
        buckets=len(called.plan.buckets),
    )
    return rows, part


def _row(dry: Dry, called: Called, path: str, leaf: Any, sent: Shares, residual: Any) -> Row:
    """The row of one leaf."""
    made, the = called.made, called.plan
    assert the is not None
    dense = path not in the.compressed
    seen = None if dense else whole(the.compressed[path])
    gain = None if dense else made.codec.gain(path, seen)
    mine, n = sent.leaves.get(path, 0.0), dry.workers_of(called)
    uncompressed = 2 * (n - 1) / n * leaf.size * leaf.dtype.itemsize / dry.chips_of(called)
    return Row(
        path=path,
        shape=leaf.shape,
        dtype=str(leaf.dtype),
        codec="" if dense else made.name,
        view="" if dense else made.codec.view(path, seen),
        why=the.why.get(path, ""),
        advice=gain.advice if gain else "",
        sent=mine,
        ratio=uncompressed / mine if mine else None,
        residual=_bytes(residual),
    )


def _unsent(path: str, leaf: Any) -> Row:
    """The row of a leaf that reaches no codec."""
    return Row(path, leaf.shape, str(leaf.dtype), "", "", "reaches no codec", "", 0.0, None, 0)


def _way(called: Called, rounds: list[Round]) -> tuple[str, str]:
    """How a codec's numbers travel, and the reason."""
    routes = [x.route for x in rounds if x.route is not None]
    if routes:
        return routes[0].way, routes[0].why
    coded = any(x.coded for x in rounds)
    why = "integers of a scale that all workers share are summed" if coded else "numbers are summed on their way"
    return "ring" if called.made.settings.aggregate == "ring" else "psum", why


def _waiting(opt_state: Any, state: AnyState) -> Any:
    """The mean that `delayed`, around the codec with this state, keeps for the next step."""
    is_delayed = lambda x: isinstance(x, DelayedState)  # noqa: E731
    found = jax.tree.leaves(opt_state, is_leaf=is_delayed)
    return [x.pending for x in found if is_delayed(x) and x.codec is state]


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
