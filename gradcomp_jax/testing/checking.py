"""`check`: checks that a codec, wherever it lives, obeys all laws."""

import contextlib
import functools
import inspect
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradcomp_jax import random
from gradcomp_jax.agreement import differing, on_no_devices
from gradcomp_jax.arguments import is_whole, shown
from gradcomp_jax.coder import Part
from gradcomp_jax.compressor import Compressor
from gradcomp_jax.contract import UnheardError
from gradcomp_jax.exchange import collectives
from gradcomp_jax.exchange.bits import wire_bits
from gradcomp_jax.exchange.plan import flatten, legal_ways, plan
from gradcomp_jax.hlo import RING_LAW, collective_bytes
from gradcomp_jax.notes import logger
from gradcomp_jax.testing import contexts, exchanges, laws, trees
from gradcomp_jax.testing.contexts import CONTEXTS, Run
from gradcomp_jax.testing.laws import LAWS, LawError, at
from gradcomp_jax.testing.recorder import Branches, sent

Decode = Callable[[list[np.ndarray], Any, dict[str, tuple[int, ...]]], dict[str, np.ndarray]]

# The number of workers with one device, and the largest number with several devices.
ALONE, MOST = 4, 8
LARGE = (1e20, 1e30, 1.6e38, 3e38)
POWERS = (2.0**-104, 2.0**90)


class Report(NamedTuple):
    """The laws that `check` has found to hold; `str` of a report reads well.

    Attributes:
      codec: the codec's name.
      ways: the ways of aggregation that were checked.
      laws: the numbers of the laws that hold.
      contexts: the contexts in which they were checked, with the numbers of workers.
      left_out: the laws that were not checked, each with the reason.
      seconds: the seconds that the check took.
    """

    codec: str
    ways: tuple[str, ...]
    laws: tuple[int, ...]
    contexts: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        held = ", ".join(f"{law} {LAWS[law]}" for law in self.laws)
        lines = [
            f"codec {self.codec!r} holds {len(self.laws)} laws, in {self.seconds:.1f} s",
            f"  laws: {held}",
            f"  ways: {', '.join(self.ways)}",
            f"  contexts: {', '.join(self.contexts)}",
            *(f"  not checked: {why}" for why in self.left_out),
        ]
        return "\n".join(lines)


class _Case(NamedTuple):
    """One case to check: a codec with one way of aggregation.

    Attributes:
      tx: the codec.
      make: a function that makes the same codec again.
      shapes: the shapes of the gradients, a tree.
      steps: the number of steps of each run.
      workers: the number of workers: one for each device, or `ALONE`.
      devices: whether there are several devices.
    """

    tx: Compressor
    make: Callable[[], Compressor]
    shapes: trees.Shapes
    steps: int
    workers: int
    devices: bool

    @property
    def compressed(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the leaves that the codec compresses, by path."""
        the = plan(self.tx.codec, self.tx.settings, trees.zeros(self.shapes))
        return {path: x.shape for path, x in the.compressed.items()}

    def noise(self, seed: int, workers: int | None = None, dtype: Any = np.float32) -> Any:
        """Gradients [steps, workers, ...]."""
        return trees.noise(self.shapes, seed, (self.steps, workers or self.workers), dtype)

    def vmap(self, grads: Any) -> Run:
        """Runs the codec over gradients under vmap."""
        return contexts.run(self.tx, grads, "vmap")


def check(
    factory: Callable[..., Compressor],
    *,
    tree: trees.Shapes | None = None,
    steps: int = 8,
    linear: bool = False,
    decode: Decode | None = None,
) -> Report:
    """Checks that a codec obeys the laws of `gradcomp_jax`.

    WORKSPACE.md states the laws, and docs/extending.md tells what a failure of each means. Under vmap one device stands
    for 1, 3 and up to 8 workers. pmap and `shard_map`, checked and unchecked, run on 2, 4 or 8 of the devices. Laws 4
    and 5 compare these runs and their compiled programs. With one device check leaves them out, and the report says so.
    Call `jax.config.update("jax_num_cpu_devices", 8)` before jax is first used to emulate eight devices.

    Args:
      factory: a function that returns a `Compressor`, such as `lambda: my_codec(0.1)`. If it has a keyword `aggregate`,
        each way that goes with the codec is checked.
      tree: the shapes of the gradients, a tree such as {"kernel": (64, 32), "bias": (32,)}. The codec must compress at
        least one leaf. The default is a matrix, a convolution, a vector and a scalar, with up to 1152 elements.
      steps: the number of steps of each run, at least 4. Give enough for every kind of step of the codec.
      linear: whether to check law 3 too: many workers equal one worker with their mean gradient.
      decode: a function that reads the messages in numpy, for law 9: (arrays that the workers handed to the collectives
        of a step, in order, each [workers, ...]; the codec's state before the step; shapes of the compressed leaves by
        path) -> the mean by path. With or without `decode`, check also does each step again with other gradients and
        with the old operands of all collectives; the mean must be the same.

    Returns:
      A `Report`.

    Raises:
      LawError: an AssertionError that names the law, the leaf, the numbers and the likely cause.
      ValueError: an argument is out of range, or the codec compresses no leaf of the tree.

    >>> import gradcomp_jax as gcj
    >>> codec = lambda: gcj.cast("bfloat16", aggregate="gather")
    >>> report = gcj.testing.check(codec, tree={"w": (16, 8)}, steps=4)
    >>> report.laws
    (1, 2, 4, 5, 6, 7, 9)
    """
    began = time.perf_counter()
    shapes = trees.MIXED if tree is None else tree
    _require_arguments(shapes, steps)
    devices = 2 ** (min(MOST, jax.local_device_count()).bit_length() - 1)
    makes = _ways(factory)
    for way, make in makes.items():
        tx = make()
        case = _Case(tx, make, shapes, steps, devices if devices > 1 else ALONE, devices > 1)
        _require_checkable(case)
        try:
            with _at(f"codec {tx.codec.name!r}, way {way}"), _silent():
                _check(case, linear, decode)
        finally:
            contexts.forget()
    name, workers = tx.codec.name, case.workers
    places = [f"vmap of 1, 3 and {workers} workers"]
    left_out = [] if linear else ["law 3, linearity, which is claimed by linear=True"]
    if devices > 1:
        places += [f"pmap and shard_map checked and unchecked of {workers} devices"]
    else:
        left_out += ["laws 4 and 5, which need several devices for pmap and shard_map (see jax_num_cpu_devices)"]
    held = [law for law in LAWS if (law != 3 or linear) and (law not in (4, 5) or devices > 1)]
    if tx.settings.error_feedback is None:
        held.remove(8)
        left_out += ["law 8, which is about error feedback"]
    return Report(name, tuple(makes), tuple(held), tuple(places), tuple(left_out), time.perf_counter() - began)


def _require_arguments(shapes: Any, steps: Any) -> None:
    if not is_whole(steps) or steps < 4:
        raise ValueError(f"steps={shown(steps)} must be a whole number of at least 4")
    leaves = jax.tree.leaves(shapes, is_leaf=trees.is_shape)
    for shape in leaves:
        if not trees.is_shape(shape) or not all(is_whole(size) for size in shape):
            raise ValueError(
                f"tree={shown(shapes)} must be a tree of shapes, such as {{'kernel': (64, 32)}}: {shown(shape)} is none"
            )
    if not leaves:
        raise ValueError(f"tree={shown(shapes)} has no leaf")


def _ways(factory: Any) -> dict[str, Callable[[], Compressor]]:
    """For each way of aggregation, a function that makes the codec."""
    if not callable(factory):
        raise ValueError(
            f"factory={shown(factory)} must be a function that makes a codec, such as lambda: powersgd(rank=2)"
        )
    tx = factory()
    if not isinstance(tx, Compressor):
        raise ValueError(
            f"factory made {shown(tx)}, which is no Compressor: return what `compressor(codec, ...)` gives"
        )
    if "aggregate" not in inspect.signature(factory).parameters:
        return {tx.settings.aggregate or "the default": factory}
    return {way: functools.partial(factory, aggregate=way) for way in legal_ways(tx.codec.coder)}


def _require_checkable(case: _Case) -> None:
    settings = case.tx.settings
    if settings.axis_name != "data" or settings.fast is not None:
        raise ValueError(
            f"the codec is along {settings.axes}, and is checked along 'data': make it with axis_name='data', and "
            "without `across`"
        )
    try:
        compressed = case.compressed
    except ValueError as error:
        raise ValueError(f"of tree={shown(case.shapes)}: {error}; or give check(..., tree=) other leaves") from error
    if not compressed:
        raise ValueError(f"the codec compresses no leaf of tree={shown(case.shapes)}: give larger ones")


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Adds a place to each `LawError` that leaves this context, outermost first."""
    try:
        yield
    except LawError as error:
        raise error.at(f"{place}, {error.place}" if error.place else place) from error.__cause__


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silences the library's own log lines, such as that one worker sends nothing."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check(case: _Case, linear: bool, decode: Decode | None) -> None:
    with _at("traced"):
        _types_stay(case)
        doubt = _types_agree(case)
    alone, grads = f"vmap of {case.workers} workers", case.noise(1)
    with _at(alone):
        reference = case.vmap(grads)
        laws.require_agreement(reference, lambda: case.vmap(_alike(grads)))
        if doubt is not None:
            raise LawError(9, str(doubt), "make the mean of `Heard.mean` and of state: nothing else has travelled")
        tensors, steps = _exchange_alone(case)
        laws.require_own(tensors, steps)
        _conserved(case, grads, reference)
        _draws(case, tensors, steps)
    devices = CONTEXTS[1:] if case.devices else ()
    for context in devices:
        with _at(_place(context, case.workers)):
            _in_context(case, context, grads, reference)
    with _at(f"the exchange alone, {alone}"):
        _only_the_wire(case, tensors, steps, decode)
    with _at(alone):
        _nothing_poisons(case, grads, reference)
        _bounded(case)
    for context in devices:
        with _at(_place(context, case.workers)), collectives.in_order():
            bad, what = _spoiled(grads, case.steps // 2)
            laws.require_skipped(contexts.run(case.tx, bad, context), case.steps // 2, what)
    for workers in (1, 3):
        with _at(f"vmap of {workers} worker{'s' * (workers > 1)}"):
            _among(case, workers)
    if linear:
        with _at("vmap in float64"):
            _linear(case)


def _place(context: str, devices: int) -> str:
    return f"{'pmap' if context == 'pmap' else f'shard_map {context}'} of {devices} devices"


def _alike(grads: Any) -> Any:
    """Gradients [steps, workers, ...], with the first worker's on all workers."""
    return jax.tree.map(lambda x: np.broadcast_to(x[:, :1], x.shape), grads)


def _types_stay(case: _Case) -> None:
    """Law 6: for the tree, for one without leaves, for leaves without elements, and with 64 bits."""
    hollow = {"tree": case.shapes, "none": (0,), "nothing": (0, 3)}
    for shapes, wide in ((case.shapes, False), ({}, False), (hollow, False), (case.shapes, True)):
        # jax's default, under which a codec that mixes types changes them.
        with jax.enable_x64(wide or jax.config.read("jax_enable_x64")), jax.numpy_dtype_promotion("standard"):
            params = trees.zeros(shapes, np.float64 if wide else np.float32)
            before, after = _traced(case.tx, params, case.workers)
            with _at("in 64 bits" if wide else f"of the tree {shown(shapes)}"):
                laws.require_kept(before, after)


def _traced(tx: Compressor, params: Any, workers: int) -> tuple[Any, Any]:
    """The shapes of a worker's state before a step and after it."""
    before = jax.eval_shape(tx.init, params)
    of_workers = lambda x: jax.ShapeDtypeStruct((workers, *x.shape), x.dtype)  # noqa: E731
    axes = contexts.worker_axes(before)
    state = contexts.map_state(of_workers, lambda x: x, before)
    update = jax.vmap(lambda _, *args: tx.update(*args)[1], in_axes=(0, 0, axes), axis_name="data")
    index = jax.ShapeDtypeStruct((workers,), np.float32)  # a tree may have no leaves
    try:
        after = jax.eval_shape(update, index, jax.tree.map(of_workers, params), state)
    except (TypeError, ValueError) as error:
        error.add_note(f"raised while check traced a step of codec {tx.codec.name!r} on {shown(params)}, for law 6")
        raise
    return before, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), after)


def _types_agree(case: _Case) -> UnheardError | None:
    """Law 2, as far as types tell it: they show which state differs between workers.

    An error of the types about the mean is returned, for law 9.
    """
    found: list[str] = []

    def update(grads: Any, state: Any, params: Any) -> None:
        _, after = case.tx.update(grads, state)
        found.extend(differing(after, ("data",)))

    try:
        on_no_devices(update, case.tx, {"data": case.workers}, trees.zeros(case.shapes))
    except UnheardError as error:
        return error
    if found:
        grads = at(case.noise(1), 0)
        state = contexts.first_state(case.tx, grads)
        axes = contexts.worker_axes(state)
        step = jax.jit(jax.vmap(case.tx.update, in_axes=(0, axes), axis_name="data"))
        one = lambda grads: Run(*jax.tree.map(lambda x: np.asarray(x)[None], step(grads, state)))  # noqa: E731
        laws.require_agreement(one(grads), lambda: one(at(_alike(case.noise(1)), 0)))
        raise LawError(
            2,
            f"the state {found[0]!r} is made of a worker's own numbers",
            "what each worker keeps for itself is in `Mine` in `start`; the rest is made of what was heard",
        )
    return None


def _conserved(case: _Case, grads: Any, got: Run) -> None:
    """Law 1, up to the rounding of the largest number."""
    if laws.conserves(case.tx):
        magnitude = max(float(np.abs(x).max(initial=1)) for x in jax.tree.leaves((grads, got.states.residual)))
        laws.require_conserved(case.tx, grads, got, 2e-5 * case.steps * magnitude)


def _exchange_alone(case: _Case) -> tuple[dict[str, np.ndarray], list[exchanges.Step]]:
    """Tensors, equal in the last two steps, and the steps of an exchange on them."""
    tensors = trees.noise(case.compressed, 2, (case.steps, case.workers))
    for x in tensors.values():
        x[-1] = x[-2]
    return tensors, exchanges.steps_of(case.tx, tensors)


def _draws(case: _Case, tensors: dict[str, np.ndarray], steps: list[exchanges.Step]) -> None:
    """Law 2 for an unbiased coder: its errors average out, because each worker draws other numbers in each step."""
    coder = case.tx.codec.coder
    if coder is None or not coder.under(case.tx.settings.error_feedback is not None).unbiased:
        return

    @jax.jit
    def message(x: jax.Array, key: jax.Array) -> Any:
        y = coder.lay(x)
        return coder.encode(y, Part(jnp.int32(0), 1, y.shape[-1], key))

    x = max((x[0, 0] for x in tensors.values()), key=np.size)
    one, other = (message(x, random.step_key(seed, 0)) for seed in (1, 2))
    laws.require_draws(coder.name, one, other, steps[-2].own, steps[-1].own)


def _among(case: _Case, workers: int) -> None:
    """The laws that hold for any number of workers."""
    grads = case.noise(3, workers)
    got = case.vmap(grads)
    laws.require_agreement(got, lambda: case.vmap(_alike(grads)))
    laws.require_finite(got, "ordinary gradients", "in all steps")
    _conserved(case, grads, got)
    if workers == 1 and (bits := wire_bits(at(got.states, -1))) != (0, 0):
        raise LawError(5, f"one worker alone declares {bits.last} bits in a step, {bits.total} in all: it sends none")


def _linear(case: _Case) -> None:
    with jax.enable_x64(True):
        case = case._replace(tx=case.make())
        grads = case.noise(4, dtype=np.float64)
        mean = jax.tree.map(lambda x: x.mean(1, keepdims=True), grads)
        laws.require_linear(case.vmap(grads), case.vmap(mean))


def _in_context(case: _Case, context: str, grads: Any, reference: Run) -> None:
    """Laws 2 and 4 on devices; also law 5 where types are checked."""
    with collectives.in_order():
        got = contexts.run(case.tx, grads, context)
        laws.require_agreement(got, lambda: contexts.run(case.tx, _alike(grads), context))
        laws.require_same(case.tx, grads, context, got, reference)
        if context == "checked":
            compiled, _ = contexts.program(case.tx, grads, context)
            laws.require_true_bits(collective_bytes(compiled), got.states)


def _spoiled(grads: Any, step: int, turn: int = 0) -> tuple[Any, str]:
    """Gradients with one element that is not finite, on one worker or on all, and its description.

    Each turn spoils another element.
    """
    bad = jax.tree.map(np.copy, grads)
    path, leaf = list(flatten(bad)[0].items())[turn % len(jax.tree.leaves(bad))]
    value = (np.nan, np.inf, -np.inf)[turn % 3]
    workers = leaf.shape[1]
    who = slice(None) if turn % 4 == 3 else (turn + 1) % workers
    leaf[step, who].reshape(-1, max(1, leaf[0, 0].size))[..., (7 * turn) % max(1, leaf[0, 0].size)] = value
    of = "all workers" if turn % 4 == 3 else f"worker {who}"
    return bad, f"a gradient of {of} has {value} in leaf {path!r}"


def _nothing_poisons(case: _Case, grads: Any, reference: Run) -> None:
    """Law 7."""
    leaves = len(jax.tree.leaves(grads))
    without = functools.cache(lambda step: case.vmap(jax.tree.map(lambda x: np.delete(x, step, 0), grads)))
    for turn in range(max(case.steps, 3 * leaves)):
        step = turn % case.steps
        bad, what = _spoiled(grads, step, turn)
        laws.require_skipped(case.vmap(bad), step, what, without(step))
    zeros = jax.tree.map(np.copy, grads)
    for leaf in jax.tree.leaves(zeros):
        leaf[:2] = 0
    laws.require_zeros(case.vmap(zeros), 2)
    for magnitude, who in itertools.product(LARGE, (slice(None), 1)):
        large = jax.tree.map(np.copy, grads)
        for leaf in jax.tree.leaves(large):
            leaf[2, who] = np.copysign(np.float32(magnitude), leaf[2, 0])
        laws.require_skipped_or_right(case.tx, large, case.vmap(large), 2)
    votes = case.tx.codec.coder is not None and case.tx.codec.coder.votes
    for power in POWERS:
        scaled = case.vmap(jax.tree.map(lambda x, power=power: x * np.float32(power), grads))
        laws.require_scaled(scaled, reference, power, case.compressed, votes)


def _bounded(case: _Case) -> None:
    """Law 8, for unit noise."""
    if case.tx.settings.error_feedback is None:
        return
    noise = lambda t: trees.noise(case.shapes, t, (case.workers,))  # noqa: E731
    step, state = contexts.program(case.tx, jax.tree.map(lambda x: x[None], noise(0)), "vmap")

    def steps() -> Iterator[dict[str, float]]:
        nonlocal state
        for t in itertools.count(100):
            _, _, state = step(noise(t), state)
            residual = jax.device_get(state.residual.value)
            yield {path: float(np.abs(x).max(initial=0)) for path, x in residual.items()}

    def answers(path: str) -> bool:
        owed = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state.residual)
        updates, *_ = step(jax.tree.map(np.zeros_like, noise(0)), state._replace(residual=owed))
        return bool(np.asarray(flatten(updates)[0][path]).any())

    laws.require_bounded(laws.grown(steps()), answers)


def _only_the_wire(
    case: _Case, tensors: dict[str, np.ndarray], steps: list[exchanges.Step], decode: Decode | None
) -> None:
    """Law 9."""
    for size in exchanges.sizes_of(case.tx, case.compressed, case.workers):
        if size.said != size.packed:
            raise LawError(
                9,
                f"the coder's message of a tensor that is laid as {size.shape} takes {size.packed} bytes, and its "
                f"`size` declares {size.said}",
                "`Coder.size` does not count all arrays of the message, in the types in which they travel",
            )
    for t, step in enumerate(steps):
        messages = list(sent(step.given, _taken))
        handed = sum(RING_LAW[m.kind](case.workers, _bytes(m.operands)) for m in messages)
        declared = int(step.bits[0, 0]) << 32 | int(step.bits[0, 1])
        if abs(declared - 8 * handed) > len(messages):
            raise LawError(9, f"in step {t} {declared} bits are declared, and {8 * handed} were handed to collectives")
    _replayed(case, tensors, steps)
    for t, step in enumerate(steps if decode is not None else ()):
        operands = [x for m in sent(step.given, _taken) for x in jax.tree.leaves(m.operands)]
        assert decode is not None
        laws.require_rebuilt(
            decode(operands, step.state, case.compressed),
            at(step.mean, 0),
            f"in step {t} the mean is not what `decode` reads from what was handed to the collectives",
            "`decode`, or the mean is made of more than what travelled",
        )


def _taken(branches: Branches) -> int:
    return int(branches.index[0])


def _bytes(operands: Any) -> int:
    """The bytes of one worker's part of arrays [workers, ...]."""
    return sum(x.nbytes // len(x) for x in jax.tree.leaves(operands))


def _replayed(case: _Case, tensors: dict[str, np.ndarray], steps: list[exchanges.Step]) -> None:
    """Checks that other gradients give the same mean if the collectives get their old operands."""
    axes = contexts.worker_axes(steps[0].state)
    again = jax.jit(jax.vmap(exchanges.replayed(case.tx), (0, 0, axes), axis_name="data"))
    others = trees.noise(case.compressed, 6, (case.steps, case.workers))
    for t, step in enumerate(steps):
        mean, after = jax.device_get(again(step.given, at(others, t), step.state))
        what = f"of step {t}, done again with other gradients, and with what had been handed to the collectives"
        laws.require_rebuilt(
            mean,
            step.mean,
            f"{what}: the mean is another",
            "the mean is made of numbers that were not said, but sent with a collective of jax.lax, or not at all",
        )
        shared = [laws.named(contexts.map_state(lambda _: None, lambda x: x, state)) for state in (after, step.after)]
        for name, x in shared[1].items():
            y = np.asarray(x, np.float64)
            if found := laws.apart(shared[0][name], y, 2e-5 * max(1, float(np.abs(y).max(initial=0)))):
                raise LawError(9, f"{what}: the state {name!r} is another: {found}")
