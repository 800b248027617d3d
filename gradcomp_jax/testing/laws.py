"""The laws as functions of a codec's results: each returns, or raises a `LawError` that says what is wrong and where.

Most look at a `contexts.Run`: numbers of every worker after every step. Only `contexts.run` computes with jax here, and
its program is compiled already.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from gradcomp_jax.compressor import AnyState, Compressor
from gradcomp_jax.exchange.bits import wire_bits
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.hlo import Collective
from gradcomp_jax.testing import contexts
from gradcomp_jax.testing.contexts import Run

T = TypeVar("T")

LAWS = {
    1: "conservation",
    2: "agreement",
    3: "linearity",
    4: "contexts agree",
    5: "bits are true",
    6: "state is stable",
    7: "nothing poisons",
    8: "bounded",
    9: "only the wire speaks",
}

# Law 8 looks at windows of steps. The first has WINDOW steps, and each further one as many as all before it together.
WINDOW, WINDOWS = 64, 7
# Between windows a residual that has stopped growing may change by this factor; a sum of noise grows by 1.41.
GROWTH = 1.15
# The check stops at a residual that is so many times as large as the gradients.
BLOWN = 1e8


# The likely cause of a NaN that nothing sees.
DROPS = (
    "`jnp.max`, `nan_to_num` and comparisons drop a NaN: add 0 * sum(x) to a scale, and name in `Coder.scales` the "
    "arrays of a message that bound what it stands for"
)


class LawError(AssertionError):
    """A codec breaks a law.

    Attributes:
      law: the law's number, a key of `LAWS`.
      what: what is wrong, with the numbers.
      cause: the likely cause; "" if none is likely.
      leaf: the path of the leaf; "" if no single leaf is wrong.
      place: the way of aggregation and the context.
    """

    def __init__(self, law: int, what: str, cause: str = "", leaf: str = "", place: str = "") -> None:
        super().__init__(law, what, cause, leaf, place)
        self.law, self.what, self.cause, self.leaf, self.place = law, what, cause, leaf, place

    def at(self, place: str) -> "LawError":
        """The same error, with another place."""
        return LawError(self.law, self.what, self.cause, self.leaf, place)

    def __str__(self) -> str:
        of = f", leaf {self.leaf!r}" if self.leaf else ""
        where = f" [{self.place}]" if self.place else ""
        likely = f". Likely cause: {self.cause}" if self.cause else ""
        return f"law {self.law}, {LAWS[self.law]}{of}: {self.what}{likely}{where}"


class _Apart(NamedTuple):
    """The place where two arrays differ most.

    Attributes:
      place: the index.
      got: the first array's number there.
      want: the other array's number there.
    """

    place: tuple[int, ...]
    got: float
    want: float

    def __str__(self) -> str:
        return f"{self.got:.7g} is not {self.want:.7g} at {self.place}"


def apart(got: Any, want: Any, atol: float = 0.0, rtol: float = 0.0) -> _Apart | None:
    """The place where two arrays differ most beyond |got - want| <= atol + rtol |want|; None if nowhere."""
    x, y = np.broadcast_arrays(np.asarray(got, np.float64), np.asarray(want, np.float64))
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.where(x == y, 0, np.abs(x - y))
        wrong = ~(distance <= atol + rtol * np.abs(y)) & ~(np.isnan(x) & np.isnan(y))
    if not wrong.any():
        return None
    most = np.argmax(np.where(wrong, np.nan_to_num(distance, nan=np.inf), -1))
    place = tuple(int(i) for i in np.unravel_index(most, x.shape))
    return _Apart(place, float(x[place]), float(y[place]))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, such as a state, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def at(tree: T, index: Any) -> T:
    """Row `index` of each array."""
    return jax.tree.map(lambda x: x[index], tree)


def _share(x: np.ndarray, y: np.ndarray) -> float:
    """The factor for which factor * y is nearest to x."""
    square = float(np.vdot(y, y))
    return float(np.vdot(x, y)) / square if square else 0.0


def conserves(tx: Compressor) -> bool:
    """Whether law 1 holds over several steps: under error feedback, and without compression."""
    return tx.settings.error_feedback is not None or tx.codec.name == "none"


def require_conserved(tx: Compressor, grads: Any, got: Run, tolerance: float) -> None:
    """Law 1 over steps that were not skipped: the applied updates and the residual add up to the mean gradients.

    Args:
      tx: the codec.
      grads: the gradients, [steps, workers, ...].
      got: the codec's run on them.
      tolerance: the absolute tolerance.
    """
    feedback = tx.settings.error_feedback
    if feedback is not None and not feedback.owes:
        return _require_estimated(grads, got, tolerance)
    decay = getattr(feedback, "decay", 1)
    given, residual = flatten(grads)[0], got.states.residual.value
    for path, update in flatten(got.updates)[0].items():
        applied = update.astype(np.float64).sum(0)[0]
        # The mean residual after each step; dense leaves owe nothing.
        owed = residual[path].astype(np.float64).mean(1) if path in residual else np.zeros((len(update),))
        kept = applied + owed[-1] + (1 - decay) * owed[:-1].sum(0)
        want = given[path].astype(np.float64).mean(1).sum(0)
        if found := apart(kept, want, tolerance):
            workers = update.shape[1]
            raise LawError(
                1,
                f"after {len(update)} steps what was applied and what is still owed, the mean over {workers} workers, "
                f"are not the sum of the mean gradients: {found}",
                _why_lost(applied, owed, want, workers),
                path,
            )


def _why_lost(applied: np.ndarray, owed: np.ndarray, want: np.ndarray, workers: int) -> str:
    """The likely cause of updates that do not add up to the gradients."""
    share = _share(applied, want)
    if not owed.any():
        for times, words in ((1 / workers, "averaged twice"), (workers, "a sum, not a mean")):
            if abs(share / times - 1) < 0.05 and workers > 1:
                return f"the mean is {share:.3g} times what it should be: it is {words}; `Heard.mean` is the mean"
        return (
            "the residual is dropped: it is zero, and a part of the gradients is lost. Return `Result(mean, own)` with "
            "own what became of this worker's numbers, `Heard.own`, not the numbers themselves"
        )
    return "`Result.own` is not what this worker added to the mean, or the feedback's `settle` does not keep the rest"


def _require_estimated(grads: Any, got: Run, tolerance: float) -> None:
    """Law 1 for EF21: each step applies the mean of the estimates, and for dense leaves the mean of the gradients."""
    estimates, mean = got.states.residual.value, got.states.codec.mean
    given, _ = flatten(grads)
    for path, x in flatten(got.updates)[0].items():
        if path in estimates:
            pairs = [(x, mean[path].astype(x.dtype), 0.0), (mean[path][:, 0], estimates[path].mean(1), tolerance)]
        else:
            pairs = [(x[:, 0], given[path].mean(1), tolerance)]
        for one, other, most in pairs:
            if found := apart(one, other, most):
                raise LawError(1, f"what is applied is not the mean of the workers' estimates: {found}", "", path)


def require_own(tensors: dict[str, np.ndarray], steps: Iterable[Any]) -> None:
    """Law 1 for each step of an exchange alone: the mean of the workers' `own` is the mean.

    Args:
      tensors: the tensors that were averaged, by path, [steps, workers, ...].
      steps: an `exchanges.Step` for each step.
    """
    for t, step in enumerate(steps):
        for path, mean in step.mean.items():
            own = step.own[path].astype(np.float64)
            want, workers = own.mean(0), len(own)
            if found := apart(mean[0], want, 1e-5 * max(1, np.abs(own).max(initial=0))):
                raise LawError(
                    1,
                    f"in step {t} the mean is not the mean of the {workers} workers' `own`: {found}",
                    _why_not_own(mean[0], want, own, tensors[path][t]),
                    path,
                )


def _why_not_own(mean: np.ndarray, want: np.ndarray, own: np.ndarray, given: np.ndarray) -> str:
    workers, share = len(own), _share(mean, want)
    if workers > 1 and abs(share * workers - 1) < 0.05:
        return f"the mean is averaged twice, it is {share:.3g} times what it should be: `Heard.mean` is the mean"
    if workers > 1 and abs(share / workers - 1) < 0.05:
        return f"the mean is {share:.3g} times what it should be, a sum: `Heard.mean` is the mean already"
    if apart(own, given, 1e-6) is None:
        return (
            "`own` is what was to be sent, so that the residual is dropped: return what became of it on the wire, "
            "`Heard.own`"
        )
    return "`own` is not what this worker added to the mean, times the number of workers"


def require_agreement(got: Run, again: Callable[[], Run]) -> None:
    """Law 2: updates, and state that is not marked as each worker's own, are bit-identical on all workers.

    Args:
      got: the run.
      again: makes a run in which all workers have the same gradients, to find the cause.
    """
    replicated = contexts.map_state(lambda _: None, lambda x: x, got.states)
    for path, x in flatten(got.updates)[0].items():
        if found := apart(x, x[:, :1]):
            step, worker, *place = found.place
            raise LawError(
                2,
                f"the mean differs between workers: in step {step} worker {worker} has {found.got:.7g}, worker 0 "
                f"{found.want:.7g} at {tuple(place)}",
                _why_differing(path, again),
                path,
            )
    for path, x in named(replicated).items():
        if found := apart(x, x[:, :1]):
            step, worker, *place = found.place
            raise LawError(
                2,
                f"the state {path!r} differs between workers: after step {step} worker {worker} has {found.got:.7g}, "
                f"worker 0 {found.want:.7g} at {tuple(place)}",
                "it is made of a worker's own numbers: what each worker keeps for itself is in `Mine` in `start`",
            )


def _why_differing(path: str, again: Callable[[], Run]) -> str:
    """The cause of a difference between workers: random numbers, or the workers' gradients."""
    same = flatten(again().updates)[0][path]
    if (same != same[:, :1]).any():
        return "random numbers that must agree are drawn with the worker's index"
    return "the mean is made of the worker's own numbers, not of what was heard alone"


def require_draws(coder: str, one: Any, other: Any, before: Any, after: Any) -> None:
    """Law 2 for an unbiased coder: other keys make other messages, and each step has another key.

    Args:
      coder: the coder's name.
      one: the coder's message of some numbers with one key.
      other: its message of the same numbers with another key.
      before: the workers' `own` in one step.
      after: the workers' `own` in the next step, from the same numbers.
    """
    for x, y, whose in ((one, other, "the keys of two workers"), (before, after, "two steps")):
        if _equal(x, y):
            raise LawError(
                2,
                f"coder {coder!r} says that it is unbiased, and with {whose} it makes the same of the same numbers, to "
                "the bit: the errors add up instead of averaging out",
                "the workers' random numbers are shared, or the steps' are: draw with `Part.key`, which is a worker's "
                "own and another in each step",
            )


def require_linear(many: Run, one: Run) -> None:
    """Law 3, in float64: many workers equal one worker with the mean gradient."""
    want = flatten(one.updates)[0]
    for path, x in flatten(many.updates)[0].items():
        most = 1e-12 * max(1, np.abs(want[path]).max(initial=0))
        if found := apart(x[:, :1], want[path], most):
            raise LawError(
                3,
                f"{x.shape[1]} workers do not equal one with their mean gradient, in float64: {found}",
                "what is said is not a linear function of the gradient, or the codec computes in float32",
                path,
            )


def require_same(tx: Compressor, grads: Any, context: str, got: Run, reference: Run) -> None:
    """Law 4: a context gives the numbers of the reference, a run under vmap.

    The last bits of a sum may differ and round a code the other way, and later steps then differ. So each step is done
    again from the reference's state. At most one step may differ, by less than a twentieth.
    """
    first = _first_apart(got, reference, scaled=True)
    if first is None:
        return
    steps = len(reference.states.skipped)
    shares = [step_differs(tx, grads, context, reference, t, scaled=True) for t in range(steps)]
    if np.count_nonzero(shares) <= 1 and max(shares) < 0.05:
        return
    raise LawError(
        4,
        f"{first[0]!r} is not what it is under vmap: {first[1]} of [step, worker, ...]; begun from the same state, "
        f"{np.count_nonzero(shares)} of {steps} steps differ, at most {max(shares):.2g} of a norm",
        "random numbers of a generator that draws others under vmap, such as jax's rbg, or code that asks in which "
        "context it is",
    )


def step_differs(tx: Compressor, grads: Any, context: str, reference: Run, t: int, *, scaled: bool = False) -> float:
    """Does one step again from the reference's state: the largest difference of a leaf, over its norm; else 0.

    Args:
      tx: the codec.
      grads: the gradients, [steps, workers, ...].
      context: the context in which the step is done again.
      reference: a run on these gradients.
      t: the index of the step.
      scaled: whether the tolerance for rounding follows the leaf's largest magnitude, if that is above 1.
    """
    state = at(reference.states, t - 1) if t else None
    state = state and contexts.map_state(lambda x: x, lambda x: x[0], state)
    got = contexts.run(tx, at(grads, slice(t, t + 1)), context, state)
    pairs = zip(jax.tree.leaves(at(got, 0)), jax.tree.leaves(at(reference, t)), strict=True)
    far = [(np.float64(x), np.float64(y)) for x, y in pairs if _first_apart(x, y, scaled)]
    return max((float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in far), default=0.0)


def _first_apart(got: Any, reference: Any, scaled: bool) -> tuple[str, _Apart] | None:
    """The first leaf that differs by more than rounding."""
    want = named(reference)
    for name, x in named(got).items():
        y = np.asarray(want[name], np.float64)
        scale = max(1.0, float(np.abs(y).max(initial=0))) if scaled else 1.0
        if found := apart(x, y, 2e-5 * scale, 1e-5):
            return name, found
    return None


def possible(collectives: list[Collective], what: Callable[[Collective], Any], nothing: Any, prefix: Any = ()) -> set:
    """Sums of `what` over the collectives that run, one sum for each choice of branches.

    Only conditionals below `prefix`, (name, index, ...), are counted.
    """
    here = nothing
    below: dict[str, set[str]] = {}
    for c in collectives:
        branch = tuple(filter(None, c.branch.split("/")))
        if branch == prefix:
            here += what(c)
        elif branch[: len(prefix)] == prefix:
            below.setdefault(branch[len(prefix)], set()).add(branch[len(prefix) + 1])
    totals = {here}
    for name, branches in below.items():
        choices = set() if len(branches) > 1 else {nothing}  # if one branch alone sends, another may be taken
        for index in branches:
            choices |= possible(collectives, what, nothing, (*prefix, name, index))
        totals = {total + choice for total in totals for choice in choices}
    return totals


def require_true_bits(collectives: list[Collective], states: AnyState) -> None:
    """Law 5: the bits that each step declares are those of the compiled program's collectives, for some branches.

    Args:
      collectives: the collectives of the compiled step.
      states: the states, [steps, workers, ...].
    """
    sent = {8 * sent for sent in possible(collectives, lambda c: c.ring_bytes, 0)}
    declared = [wire_bits(at(states.wire, t)) for t in range(len(states.skipped))]
    for t, bits in enumerate(declared):
        if bits.last not in sent:
            kinds = collections.Counter(f"{c.kind} of {c.operand_bytes} bytes" for c in collectives)
            raise LawError(
                5,
                f"in step {t} the state declares {bits.last} bits, and the compiled program sends "
                f"{' or '.join(f'{x:.0f}' for x in sorted(sent))}: {', '.join(kinds)}",
                "a collective of jax.lax is called in the codec, and is not counted: ask for means by `Say` alone",
            )
    totals = list(itertools.accumulate(bits.last for bits in declared))
    if totals != [bits.total for bits in declared]:
        raise LawError(5, f"the totals are {[bits.total for bits in declared]}, and the steps add up to {totals}")


def require_kept(before: Any, after: Any) -> None:
    """Law 6: the state keeps its types, shapes and structure.

    Args:
      before: a state, or its shapes and types.
      after: the state, or its shapes and types, after a step.
    """
    old, new = named(before), named(after)
    for name in [*old, *(name for name in new if name not in old)]:
        kinds = [f"{x.dtype}{list(x.shape)}" if x is not None else "missing" for x in (old.get(name), new.get(name))]
        if kinds[0] != kinds[1]:
            raise LawError(
                6,
                f"the state {name!r} is {kinds[0]} before a step and {kinds[1]} after it",
                "`Result.news`, `absorb` or `adopt` gives a field another type than `init` or `start`: cast it to the "
                "old one's, `.astype(old.dtype)`",
            )
    structures = [str(jax.tree.structure(state)) for state in (before, after)]
    if structures[0] != structures[1]:
        raise LawError(6, f"the state is {structures[0]} before a step and {structures[1]} after it")


def require_skipped(bad: Run, step: int, what: str, without: Run | None = None) -> None:
    """Law 7: a step with a gradient that is not finite gives zeros, and later steps are as if it had not been there.

    Args:
      bad: a run in which some worker's gradient is not finite in one step.
      step: the index of that step.
      what: the description of the gradient.
      without: the run without that step.
    """
    when = f"{what} in step {step}"
    require_finite(bad, what, f"in step {step}")
    for path, x in flatten(bad.updates)[0].items():
        if x[step].any():
            raise LawError(
                7, f"{when}, and the mean is not zero on all workers but up to {np.abs(x[step]).max():.3g}", DROPS, path
            )
    if (count := bad.states.skipped[:, 0].tolist()) != [int(t >= step) for t in range(len(count))]:
        raise LawError(7, f"{when}, and `skipped` counts {count}", DROPS)
    sent = [wire_bits(at(bad.states, t)).total for t in range(len(count))]
    if step and sent[step] == sent[step - 1] != 0:
        raise LawError(7, f"{when}, and its bits are not counted, though they travelled")
    seen = bad._replace(states=bad.states._replace(wire=None, skipped=None))
    if step:
        old, new = (named(at(seen.states, t)) for t in (step - 1, step))
        _require_equal(new, old, f"{when}, and %r is not as it was before")
    if without is not None:
        rest = at(seen, np.delete(np.arange(len(count)), step))
        want = without._replace(states=without.states._replace(wire=None, skipped=None))
        _require_equal(named(rest), named(want), f"{when}, and later %r is not what it is without that step")


def _require_equal(got: dict[str, Any], want: dict[str, Any], what: str) -> None:
    for name, x in got.items():
        if found := apart(x, want[name]):
            raise LawError(7, f"{what % name}: {found}", "`absorb` or `adopt` renews state where not `ok`")


def require_finite(got: Run, what: str, when: str) -> None:
    """Law 7: all results of a run are finite; what, when: the run's gradients, for the message."""
    for name, x in named(got).items():
        if not np.isfinite(x).all():
            t = int(np.argmin(np.isfinite(x).reshape(len(x), -1).all(1)))
            raise LawError(
                7,
                f"{what} {when}, and {name!r} is not finite from step {t} on",
                "it stays in what is owed, or in state, and is not seen in what is sent; or the codec divides by zero. "
                "Where a part is not sent, add 0 * sum(x) to what is. " + DROPS,
            )


def require_zeros(got: Run, steps: int) -> None:
    """Law 7: zero gradients in the first steps give zero means and are not skipped, and later means are not zero."""
    require_finite(got, "zero gradients", f"in steps 0 to {steps - 1}")
    for path, x in flatten(got.updates)[0].items():
        if x[:steps].any():
            raise LawError(7, f"zero gradients give a mean of up to {np.abs(x[:steps]).max():.7g}", "", path)
        if not x[steps:].any():
            raise LawError(7, "after zero gradients all means stay zero, though the gradients are not", "", path)
    if got.states.skipped.any():
        raise LawError(7, f"of zero gradients {int(got.states.skipped.max())} steps are skipped", "0 / 0")


def require_skipped_or_right(tx: Compressor, grads: Any, got: Run, step: int) -> None:
    """Law 7: a step with large finite gradients is as exact as the codec is, or it is skipped; nothing is lost.

    Later steps are not skipped, however large the gradient was.

    Args:
      tx: the codec.
      grads: the gradients, [steps, workers, ...].
      got: the codec's run on them.
      step: the index of the step with large gradients.
    """
    largest = max(float(np.abs(x[step].astype(np.float64)).max(initial=0)) for x in jax.tree.leaves(grads))
    what = f"finite gradients of up to {largest:.2g}"
    require_finite(got, what, f"in step {step}")
    skipped = got.states.skipped[:, 0]
    if apart(skipped, skipped[step] * (np.arange(len(skipped)) >= step)):
        raise LawError(7, f"{what} in step {step}, and later steps are skipped: counts are {skipped.tolist()}")
    if skipped[step]:
        before, after = (at(got.states, t)._replace(skipped=None, wire=None) for t in (step - 1, step))
        moved = {"mean": any(x[step].any() for x in jax.tree.leaves(got.updates)), "state": not _equal(before, after)}
        for name, wrong in moved.items():
            if wrong:
                raise LawError(7, f"{what} in step {step}, which is skipped, and the {name} is not as it was")
        return
    happened = at((grads, got), slice(step + 1))
    if conserves(tx):
        given, made = jax.tree.map(lambda x: x.astype(np.float64), happened)
        magnitude = max(np.abs(x).max() for x in jax.tree.leaves((given, made)))
        return require_conserved(tx, given, made, max(1e-5 * magnitude, 1e-36))
    for path, x in flatten(happened[1].updates)[0].items():
        if flatten(grads)[0][path][step].any() and not x[step].any():
            raise LawError(7, f"{what} in step {step} give a mean of zeros, and the step is not skipped", "", path)


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def require_scaled(got: Run, reference: Run, power: float, paths: Iterable[str], votes: bool) -> None:
    """Law 7: gradients that are a power of two times as large give means that are as many times as large.

    Args:
      got: the run on the scaled gradients.
      reference: the run on the others.
      power: the power of two.
      paths: the paths of the compressed leaves.
      votes: whether the means have no magnitude, so that they stay the same.
    """
    new, old = flatten(got.updates)[0], flatten(reference.updates)[0]
    for path in paths:
        want = old[path].astype(np.float64)
        most = 1e-5 * max(1, np.abs(want).max(initial=0))
        if found := apart(new[path] / (1.0 if votes else power), want, most, 1e-6):
            raise LawError(
                7,
                f"gradients {power:.3g} times as large are not answered by means as many times as large: divided by "
                f"that, {found} of [step, worker, ...]",
                "a constant magnitude in the codec, such as an epsilon or a threshold, or squares that leave the range",
                path,
            )


class Growth(NamedTuple):
    """The growth of a residual.

    Attributes:
      steps: the number of steps done.
      means: for each window of steps, by leaf, the mean of the residual's largest magnitude.
      blown: the leaf whose residual left all bounds, or None.
    """

    steps: int
    means: list[dict[str, float]]
    blown: str | None

    @property
    def grows(self) -> list[str]:
        """The leaves that still grow."""
        if self.blown is not None:
            return [self.blown]
        before, last = self.means[-2:]
        return [path for path in last if last[path] > GROWTH * before[path] + 1e-6]


def grown(steps: Iterator[dict[str, float]]) -> Growth:
    """Follows a residual's largest magnitude by leaf, step by step, until no leaf's residual grows any more."""
    seen = Growth(0, [], None)
    for window in range(WINDOWS):
        count = WINDOW * 2 ** max(0, window - 1)
        sums: collections.Counter[str] = collections.Counter()
        for most in itertools.islice(steps, count):
            seen = seen._replace(steps=seen.steps + 1)
            blown = next((path for path, x in most.items() if not x < BLOWN), None)
            if blown is not None:
                return seen._replace(means=[*seen.means, most], blown=blown)
            sums.update(most)
        seen = seen._replace(means=[*seen.means, {path: x / count for path, x in sums.items()}])
        if window and not seen.grows:
            break
    return seen


def require_bounded(seen: Growth, answers: Callable[[str], bool]) -> None:
    """Law 8: on unit noise the residual of error feedback stops growing.

    Args:
      seen: the growth of the residual.
      answers: (path) -> whether a residual alone gives a mean, with zero gradients.
    """
    if not seen.grows:
        return
    path = seen.grows[0]
    means = ", ".join(f"{means[path]:.4g}" for means in seen.means)
    if seen.blown is not None:
        cause = (
            "the codec is no contraction: it makes the residual larger than what it was given. Unbiased quantisers and "
            "samples do so, and must be scaled down under error feedback, see `Coder.under` and `Context.feedback`"
        )
    elif not answers(path):
        cause = "what is owed is never sent: the tensor is the sum of all terms, `total(d)`, not the first one alone"
    else:
        cause = "some elements are never sent, or the codec sends so little that it needs more steps than these"
    raise LawError(
        8,
        f"the residual grows without bound: over {seen.steps} steps of unit noise the mean of its largest element, in "
        f"windows each as long as all before, is {means}",
        cause,
        path,
    )


def require_rebuilt(mean: Any, want: Any, what: str, cause: str) -> None:
    """Law 9: means that were computed again equal those of a step.

    Args:
      mean: the means computed again, by path.
      want: the means of the step, by path.
      what: how they were computed again.
      cause: the likely cause of a difference.
    """
    for path, x in want.items():
        if path not in mean:
            raise LawError(9, f"{what}: there is no mean of it", cause, path)
        if found := apart(mean[path], x, 2e-5 * max(1, np.abs(x).max(initial=0))):
            raise LawError(9, f"{what}: {found}", cause, path)
