"""Steps of `outer`: a program for local steps alone, and one for each way in which exchanges join them.

The host chooses. It counts places beside the state that it last returned, and reads the count in the state only if it
is given another. The program of a local step takes and returns `OuterState.worker` and the place, so nothing else is
copied. Where the count is traced, inside someone's own jit, there is one program with branches.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax.by_parameter import ByParameter
from gradcomp_jax.entry import Form, require_rest
from gradcomp_jax.exchange import collectives
from gradcomp_jax.jitted import Jitted, by_compiler, emulates
from gradcomp_jax.loss import (
    UntypedError,
    accumulated_gradients,
    of_worker,
    own_gradients,
    require_unconstrained,
    with_rest,
)
from gradcomp_jax.mesh import in_automatic_axes
from gradcomp_jax.modules import is_module
from gradcomp_jax.notes import note
from gradcomp_jax.outer import Method, Outer, plus
from gradcomp_jax.outer_state import OuterState
from gradcomp_jax.periods import QUIET, Moment, Period
from gradcomp_jax.placing import is_train_state, require_parts
from gradcomp_jax.sharding import PerWorker, global_state, local_state, require_state, specs_of, state_specs


class Settings(NamedTuple):
    """The settings of a step.

    Attributes:
      form: its arguments and outputs.
      steps: the local steps of a call.
      accumulate: the parts into which a worker's batch is cut.
      donate: whether to reuse the memory of the arguments.
      compiler_options: XLA's options, or None.
    """

    form: Form
    steps: int
    accumulate: int
    donate: bool
    compiler_options: Mapping[str, Any] | None


def outer_step(
    loss_fn: Callable[..., Any],
    tx: Outer,
    mesh: Mesh | int,
    settings: Settings,
    reduce_aux: Any,
    check_vma: bool,
    axis_name: str = "",
) -> "OuterStep":
    """The step of `train_step` for an `outer`; with a number of workers in the place of a mesh, that of `simulate`.

    Raises:
      ValueError: the step has a model state, or reduces auxiliary outputs; or the mesh, or `axis_name` for a number of
        workers, has other axes than the codec.
    """
    if settings.form.has_state:
        raise ValueError(
            "has_state=True: between exchanges of outer(...) a model state would differ from worker to worker. Use a "
            "model without one, such as one with layer or group norms in the place of batch norms"
        )
    if any(how != "workers" for how in jax.tree.leaves(reduce_aux)):
        raise ValueError(
            f"reduce_aux={reduce_aux!r}: local steps of outer(...) send nothing, so auxiliary outputs are each "
            "worker's own, [workers, ...]: leave it out"
        )
    axes = tx.method.axes
    if not isinstance(mesh, Mesh) and axes != (axis_name,):
        raise ValueError(
            f"the codec of outer(...) is between workers along {axes}, and simulate has axis_name={axis_name!r}: give "
            "both the same, one axis"
        )
    if isinstance(mesh, Mesh) and set(axes) != set(mesh.axis_names):
        raise ValueError(
            f"the codec of outer(...) is between workers along {axes}, and the mesh has the axes {mesh.axis_names}: "
            "name them all in the codec's axis_name, or give across(codec, slow=, fast=) as the codec"
        )
    names = settings.form.names
    batch = P(axes) if settings.steps == 1 else P(None, axes)
    rest_specs = tuple(batch if name == "batch" else P() for name in names)
    over = _OnMesh(mesh) if isinstance(mesh, Mesh) else _OnOneDevice(mesh, axis_name)
    programs = _Programs(with_rest(loss_fn, settings.form), tx, settings, over, rest_specs, check_vma)
    return OuterStep(programs, mesh)


def flush_outer(tx: Outer, mesh: Mesh | int, params: Any, opt_state: OuterState) -> tuple[Any, OuterState]:
    """The end of a period before its time; see `gradcomp_jax.flush`."""
    over = _OnMesh(mesh) if isinstance(mesh, Mesh) else _OnOneDevice(mesh, tx.method.axes[0])
    specs = P(), state_specs(tx, params)
    pending = tx.method.period(params).pending(int(opt_state.place))
    return jax.jit(over(functools.partial(tx.method.flush, pending), specs, specs, True))(params, opt_state)


class _Programs:
    """The programs of a step, as functions of global states.

    Args:
      loss_fn: (params, rest) -> (loss, (None, auxiliary outputs)).
      tx: the optimiser.
      settings: the step's settings.
      over: (a function of local states, specs of its arguments and results, whether types are checked) -> a function of
        global ones.
      rest_specs: how the step's arguments after the state are split.
      check_vma: whether to let shard_map check types, unless the model takes none.
    """

    def __init__(self, loss_fn: Any, tx: Outer, settings: Settings, over: Any, rest_specs: Any, check_vma: bool):
        self.tx, self.settings = tx, settings
        self._loss_fn, self._over, self._rest_specs, self._check_vma = loss_fn, over, rest_specs, check_vma

    @property
    def method(self) -> Method:
        return self.tx.method

    def quiet(self, worker: PerWorker, place: jax.Array, *rest: Any) -> Any:
        """Local steps alone: (worker, place, rest) -> (worker, place, auxiliary outputs)."""

        def on_worker(worker: PerWorker, place: jax.Array, *rest: Any) -> Any:
            state, aux = self._steps(_only(worker, place), rest, self.settings.steps)
            return state.worker, state.place, aux

        specs = specs_of(worker), P()
        out_specs = *specs, P(self.method.axes)
        worker, place, aux = self._mapped(on_worker, (*specs, *self._rest_specs), out_specs, worker, place, *rest)
        return ByParameter.of(worker, worker.value.params), place, aux

    def at(self, moments: tuple[Moment, ...], params: Any, state: OuterState, *rest: Any) -> Any:
        """Local steps, and what happens around each: (params, state, rest) -> (params, state, loss, aux. outputs).

        The loss is apart from the state, because callers keep it, and the memory of the state may be given away.
        """

        def on_worker(params: Any, state: OuterState, *rest: Any) -> Any:
            auxs, first = [], 0
            while first < len(moments):
                last = _last_of_run(moments, first)
                state, moves = self.method.begin(moments[first], params, state)
                params = plus(params, moves)
                state, aux = self._steps(state, self._part(rest, first, last + 1), last + 1 - first, first)
                state, moves = self.method.end(moments[last], params, state)
                params, first = plus(params, moves), last + 1
                auxs.append(aux)
            joined = auxs[0] if len(auxs) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *auxs)
            return params, _without_loss(state), state.loss, joined

        exchanges = any(moment.before or moment.after for moment in moments)
        specs = P(), _without_loss(state_specs(self.tx, params))
        out_specs = (*specs, P() if exchanges else None, P(self.method.axes))
        return self._mapped(on_worker, (*specs, *self._rest_specs), out_specs, params, state, *rest)

    def branching(self, params: Any, state: OuterState, *rest: Any) -> Any:
        """Like `at`, for a single step at a place that is known only when the program runs."""

        def on_worker(params: Any, state: OuterState, *rest: Any) -> Any:
            grads, loss, weight, aux = self._gradients(state, of_worker(rest, self.settings.form, self.method.axes))
            moves, state = self.tx.update(grads, state, params, value=loss, weight=weight)
            return jax.tree.map(jnp.add, params, moves), state, aux

        specs = P(), state_specs(self.tx, params)
        return self._mapped(on_worker, (*specs, *self._rest_specs), (*specs, P(self.method.axes)), params, state, *rest)

    def _mapped(self, f: Any, in_specs: Any, out_specs: Any, *args: Any) -> Any:
        """`f` over the workers; the last of its arguments are those of the step after the state."""
        rest = dict(zip(self.settings.form.names, args[2:], strict=True))
        rest["batch"] = self._over.laid(rest["batch"], self.settings.steps)
        args = (*args[:2], *rest.values())
        if self._check_vma:
            try:
                return self._over(f, in_specs, out_specs, True)(*args)
            except UntypedError as error:
                cause = error.__cause__
                note(logging.INFO, f"loss_fn is traced without shard_map's types, which it does not take: {cause}")
        self._require_unconstrained(args)
        return self._over(f, in_specs, out_specs, False)(*args)

    def _require_unconstrained(self, args: Any) -> None:
        """Refuses, before it compiles, a model that constrains shardings over the mesh."""
        if not isinstance(self._over, _OnMesh):
            return
        form, axes = self.settings.form, self.method.axes
        worker = args[0] if isinstance(args[0], PerWorker) else args[1].worker
        without = lambda x, axes: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype)  # noqa: E731
        params = jax.tree.map(lambda x: without(x, len(worker.leading)), worker.value.params)
        rest = dict(zip(form.names, args[2:], strict=True))
        rest["batch"] = jax.tree.map(lambda x: without(x, int(self.settings.steps > 1)), rest["batch"])
        specs = tuple(P(axes) if name == "batch" else P() for name in rest)
        require_unconstrained(self._loss_fn, params, tuple(rest.values()), self._over.mesh, specs)

    def _part(self, rest: Any, start: int, end: int) -> Any:
        """The arguments of the steps from `start` to before `end` of a call."""
        if self.settings.steps == 1:
            return rest
        part = lambda batch: jax.tree.map(lambda x: x[start:end], batch)  # noqa: E731
        return tuple(part(x) if name == "batch" else x for name, x in zip(self.settings.form.names, rest, strict=True))

    def _steps(self, state: OuterState, rest: Any, steps: int, first: int = 0) -> tuple[OuterState, PerWorker]:
        """So many local steps; the auxiliary outputs in their global form, [1, steps, ...] if a call has several."""
        form, axes = self.settings.form, self.method.axes
        rest = of_worker(rest, form, axes)
        if self.settings.steps == 1:
            return self._one(state, rest)

        def turn(carry: Any, which: Any) -> Any:
            place, batch = which
            key = tuple(jax.random.fold_in(key, first + place) for key in rest[1 : 1 + form.rng])
            state, aux = self._one(_only(*carry), (batch, *key, *rest[1 + form.rng :]))
            return (state.worker, state.place), aux

        which = jnp.arange(steps, dtype=jnp.int32), rest[0]
        (worker, place), aux = jax.lax.scan(turn, (state.worker, state.place), which)
        return state._replace(worker=worker, place=place), aux

    def _one(self, state: OuterState, rest: Any) -> tuple[OuterState, Any]:
        grads, loss, weight, aux = self._gradients(state, rest)
        period = self.method.period(state.worker.value.params)
        in_place = self.settings.donate or self.settings.steps > 1
        return self.method.local(state, period, grads, loss, weight, in_place=in_place), aux

    def _gradients(self, state: OuterState, rest: Any) -> tuple[Any, Any, Any, PerWorker]:
        """Gradients, loss and weight of a step, at the worker's own parameters; and its auxiliary outputs."""
        params, axes, settings = state.worker.value.params, self.method.axes, self.settings
        if settings.accumulate == 1:
            (loss, (_, aux)), grads = own_gradients(self._loss_fn, params, rest, axes, None)
        else:
            (loss, (_, aux)), grads = accumulated_gradients(
                self._loss_fn, params, rest, axes, None, settings.form, settings.accumulate
            )
        weigh = self.method.weigh
        return grads, loss, weigh(rest[0]) if callable(weigh) else None, PerWorker(aux, axes)


def _only(worker: PerWorker, place: jax.Array) -> Any:
    """A state of the parts alone that a local step reads and changes."""
    return OuterState(worker, place, (), (), {}, None)  # type: ignore[arg-type]


def _without_loss(state: OuterState) -> OuterState:
    return state._replace(loss=None)  # type: ignore[arg-type]


def _last_of_run(moments: tuple[Moment, ...], first: int) -> int:
    """The last of the steps from `first` on that nothing happens between."""
    last = first
    while last + 1 < len(moments) and not (moments[last].after or moments[last].adopted or moments[last + 1].before):
        last += 1
    return last


@dataclasses.dataclass(frozen=True)
class _OnMesh:
    """Workers that are devices of a mesh, or slices of it."""

    mesh: Mesh

    def laid(self, batch: Any, steps: int) -> Any:
        """The batch, with its rows by worker where the workers are an axis of their own."""
        del steps
        return batch

    def __call__(self, f: Any, in_specs: Any, out_specs: Any, check_vma: bool) -> Any:
        def on_worker(*args: Any) -> Any:
            with collectives.in_order() if emulates(self.mesh) else contextlib.nullcontext():
                return global_state(f(*map(local_state, args)))

        return jax.shard_map(on_worker, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


@dataclasses.dataclass(frozen=True)
class _OnOneDevice:
    """Workers that are simulated on one device."""

    workers: int
    axis_name: str

    def laid(self, batch: Any, steps: int) -> Any:
        """As in `_OnMesh`."""
        lead = () if steps == 1 else (steps,)
        rows = lambda x: x.reshape(*lead, self.workers, -1, *x.shape[len(lead) + 1 :])  # noqa: E731
        return jax.tree.map(rows, batch)

    def __call__(self, f: Any, in_specs: Any, out_specs: Any, check_vma: bool) -> Any:
        del check_vma

        def axis(spec: P) -> int | None:
            split = [place for place, names in enumerate(spec) if names]
            return split[0] if split else None

        in_axes, out_axes = jax.tree.map(axis, (in_specs, out_specs))
        return jax.vmap(f, in_axes, out_axes, axis_name=self.axis_name, axis_size=self.workers)


class OuterStep(Jitted):
    """The step of an `outer`: called as that of `train_step` or `simulate`, with a program for each kind of call."""

    def __init__(self, programs: _Programs, mesh: Mesh | int):
        super().__init__(mesh)
        self._programs, self._settings = programs, programs.settings
        self._seen: Any = None
        self._place, self._period = 0, Period(1)
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """(params, opt_state, batch, ...) -> (params, opt_state, loss, ...); a TrainState may replace the first two."""
        if args and is_module(args[0]):
            raise ValueError(
                "outer(...) keeps parameters for each worker, and a module has one set of them: take the module apart "
                "by nnx.split, and give step(params, opt_state, batch)"
            )
        if args and is_train_state(args[0]):
            state = self.placed(args[0])
            params, opt_state, *others = self(state.params, state.opt_state, *args[1:])
            count = jnp.asarray(state.step)
            count = count + jnp.asarray(self._settings.steps, count.dtype)
            return state.replace(step=count, params=params, opt_state=opt_state), *others
        self._require(args)
        params, opt_state, *rest = args
        self.require_of_all(rest[0])
        if isinstance(opt_state.place, jax.core.Tracer):
            params = self.placed(params)
            program = self._program(None, self.by_compiler(rest))
            params, opt_state, aux = in_automatic_axes(self._mesh, program)(params, opt_state, *rest)
        else:
            params, opt_state, aux = self._done(params, opt_state, rest)
        return params, opt_state, opt_state.loss, *([aux.value] if self._settings.form.has_aux else [])

    def _done(self, params: Any, opt_state: OuterState, rest: list[Any]) -> tuple[Any, OuterState, Any]:
        """What the program of this call gives."""
        if opt_state.place is not self._seen:  # a first call, or a state from elsewhere
            params = self.placed(params)
            require_state(self._programs.tx, params, opt_state, self._mesh)
            self._period, self._place = self._programs.method.period(params), int(opt_state.place)
            if self.by_compiler(rest):  # a codec that XLA would spread badly is refused now, not after a period
                exchange, given = self._of((params, opt_state, *rest), exchange=True)
                exchange.eval_shape(*given)
        moments = self._period.moments(self._place, self._settings.steps)
        program = self._program(moments, self.by_compiler(rest))
        if {*moments} == {QUIET}:
            given = opt_state.worker, opt_state.place
            alone = self._programs.method.codec.settings.fast is None
            worker, place, aux = self.run(program, (*given, *rest), lambda results: results[1], alone)
            opt_state = opt_state._replace(worker=worker.tree, place=place)
        else:
            both = self.placed(params), _without_loss(opt_state)
            params, after, loss, aux = self.run(program, (*both, *rest), lambda results: results[1].place)
            opt_state = after._replace(loss=opt_state.loss if loss is None else loss)
        self._seen = opt_state.place
        for _ in moments:
            self._place = self._period.after(self._place)
        return params, opt_state, aux

    def _require(self, args: tuple[Any, ...]) -> None:
        """Raises ValueError for arguments that the step cannot take."""
        if len(args) < 2:
            raise ValueError("a step takes (params, opt_state, batch), or a TrainState in the place of the first two")
        if not isinstance(args[1], OuterState):
            raise ValueError(
                f"opt_state is {type(args[1]).__name__}, and tx is an outer(...): make the state by init(tx, params, "
                "mesh); the order is step(params, opt_state, batch)"
            )
        require_rest(args[2:], self._settings.form)
        steps, workers = self._settings.steps, self._mesh if isinstance(self._mesh, int) else self._mesh.size
        for path, x in jax.tree_util.tree_leaves_with_path(args[2]) if steps > 1 else []:
            if np.ndim(x) < 2 or x.shape[0] != steps:
                raise ValueError(
                    f"batch leaf {jax.tree_util.keystr(path)!r} of shape {np.shape(x)} does not begin with an axis of "
                    f"steps={steps}: stack the batches of the call's local steps, [steps, rows, ...]"
                )
        rows = args[2]
        if steps > 1:
            rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
        require_parts(rows, workers, self._settings.accumulate, f"{workers} workers")

    def _program(self, moments: tuple[Moment, ...] | None, spread: bool) -> Any:
        """The compiled function for a call at whose steps this happens; None: what happens is not known yet.

        `spread` is for simulated workers that XLA spreads over devices.
        """
        if (moments, spread) not in self._compiled:
            programs = self._programs
            if moments is None:
                if self._settings.steps > 1:
                    raise ValueError(
                        f"train_step(..., steps={self._settings.steps}) is called inside a jit, where the place in the "
                        "period is not known: call it outside, or make the step without steps="
                    )
                called: Any = programs.branching
            else:
                called = programs.quiet if {*moments} == {QUIET} else functools.partial(programs.at, moments)
            options = self._settings.compiler_options
            self._compiled[moments, spread] = jax.jit(
                by_compiler(called) if spread else called,
                donate_argnums=(0, 1) if self._settings.donate else (),
                compiler_options=None if options is None else dict(options),
            )
        return self._compiled[moments, spread]

    def lower(self, *args: Any, exchange: bool = True) -> Any:
        """As jax.jit's `lower`, of the program of a call with an exchange, or of local steps alone.

        Args:
          *args: the step's arguments, or their shapes.
          exchange: whether the call has an exchange; False: it is of local steps alone, and adopts nothing either.

        Raises:
          ValueError: there is no such call; or the arguments do not fit.
        """
        program, given = self._of(args, exchange)
        return in_automatic_axes(self._mesh, program.lower)(*given)

    def trace(self, *args: Any, exchange: bool = True) -> Any:
        """As jax.jit's `trace`; see `lower`."""
        program, given = self._of(args, exchange)
        return in_automatic_axes(self._mesh, program.trace)(*given)

    def _of(self, args: tuple[Any, ...], exchange: bool) -> tuple[Any, tuple[Any, ...]]:
        """The program of a call with an exchange, or without, and its arguments."""
        if args and is_train_state(args[0]):
            args = (args[0].params, args[0].opt_state, *args[1:])
        self._require(args)
        params, opt_state, *rest = args
        period = self._programs.method.period(params)
        calls = [period.moments(place, self._settings.steps) for place in list(period.places)[period.every :]]
        exchanges = lambda found: any(x.before or x.after for x in found)  # noqa: E731
        wanted = [found for found in calls if (exchanges(found) if exchange else {*found} == {QUIET})]
        if not wanted:
            kind = "has an exchange" if exchange else "is of local steps alone"
            raise ValueError(f"exchange={exchange}: no call {kind}, at every={period.every}")
        program = self._program(wanted[0], self.by_compiler(rest))
        if {*wanted[0]} == {QUIET}:
            return program, (opt_state.worker, opt_state.place, *rest)
        return program, (params, _without_loss(opt_state), *rest)
