"""The data-parallel training step over a mesh, and its twin that simulates the workers on one device."""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax import beside
from gradcomp_jax.agreement import Shapes, require_agreement, update_of
from gradcomp_jax.arguments import own
from gradcomp_jax.compressor import Delivered, compressor_states, is_compressor_state, skipped_steps
from gradcomp_jax.contract import require_whole
from gradcomp_jax.entry import Form, checked, require_rest
from gradcomp_jax.exchange import collectives, ways
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.jitted import Step, emulates
from gradcomp_jax.loss import (
    UntypedError,
    accumulated_gradients,
    of_worker,
    own_gradients,
    require_unconstrained,
    with_rest,
)
from gradcomp_jax.loss_scale import is_loss_scale, loss_scale, loss_scales
from gradcomp_jax.mesh import automatic, require_mesh
from gradcomp_jax.modules import ModuleStep
from gradcomp_jax.notes import note
from gradcomp_jax.outer import Outer
from gradcomp_jax.outer_state import require_whole_optimiser
from gradcomp_jax.outer_step import OuterStep, Settings, outer_step
from gradcomp_jax.placing import require_parts
from gradcomp_jax.sharding import global_state, is_per_worker, local_state, require_state, state_specs
from gradcomp_jax.views import once_stored, widen


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    has_aux: bool = False,
    has_state: bool = False,
    reduce_aux: Any = None,
    accumulate: int = 1,
    steps: int = 1,
    rng: bool = False,
    shared: bool = False,
    donate: bool = False,
    check_vma: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> Step | OuterStep:
    """A jitted data-parallel step in which each worker's own gradient reaches `tx`.

    Each worker computes the loss and gradient on its part of the batch. `tx`, with a codec first, makes one update of
    them, and all workers apply it. If a codec finds a gradient that is not finite on any worker, parameters and
    optimiser state stay as they were on all. Only `skipped`, the count of bits, the scale of `loss_scaled`
    and the pending gradient of `delayed` go on. (`average` alone tests nothing.)

    To freeze leaves, put `optax.freeze(mask)` after the codec. As a label of `optax.partition`, beside one that
    has a codec, use `optax.stateless(lambda u, p: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), u))`, which
    sends nothing: the zeros of `optax.set_to_zero` have the type of the worker's own gradients, and are refused.

    Args:
      loss_fn: `(params, batch) -> loss`. The loss is a scalar, this worker's mean over its part of the batch. It is not
        reduced over the workers, and not scaled, even if `loss_scaled` is in tx. The settings below give loss_fn more
        arguments, in the order `(params, model_state, batch, key, shared)`.
      tx: the optimiser, with a codec, or `average`, first. A transformation after the codec that asks for `value`,
        such as `optax.contrib.reduce_on_plateau`, gets the mean loss, which costs a small all-reduce of its own.
      mesh: the workers; the batch is split over all its axes. By default all devices, see `make_mesh`.
      has_aux: loss_fn returns `(loss, aux)`; the step returns aux last.
      has_state: loss_fn is `(params, model_state, batch) -> (loss, model_state)`, or with has_aux
        `(loss, (model_state, aux))`, for batch statistics and the like. Floating leaves of the new model state are
        averaged over the workers. Of integer leaves, such as counters, the largest is kept. A skipped step has computed
        the loss nonetheless, so integers and finite floating leaves go on; a floating leaf that is not finite stays as
        it was.
      reduce_aux: how aux is reduced over the workers, a tree that is a prefix of aux. "mean" averages; "sum" adds, and
        is exact for integers; "workers" keeps each worker's own: [workers, ...], sharded over the mesh, and not sent.
        By default floating leaves are averaged, and integers and truth values are summed.
      accumulate: into how many parts each worker cuts its part of the batch. It computes their gradients one after
        another, in the memory of one part. There is one exchange, of the mean. A model state passes from part to part.
        aux is averaged, or summed, over the parts as over the workers; under "workers" it is [workers, parts, ...].
      steps: for an `outer`, the local steps of a call. The batch is then [steps, rows, ...], split along its second
        axis. One program scans them, so an exchange with a delay overlaps with them. A key is folded for each.
      rng: the step and loss_fn take a random key after the batch. Give the step one key, a new one each time. Each
        worker folds its index into the key, and each part of an accumulated batch folds in its own index.
      shared: the step and loss_fn take a last argument, any tree that is the same on all workers, such as the number of
        the step or a temperature.
      donate: reuse the memory of params, opt_state and model_state, which cannot be read afterwards.
      check_vma: let shard_map check which values differ between workers. If a model cannot be given such types, it is
        traced without them. Gradients stay local then too, and tx is still checked, because it is traced by itself
        first. check_vma=False does the same from the start.
      compiler_options: XLA's options, as for `jax.jit`. The options of `compiler_options(platform)` let the parts of an
        exchange overlap with the backward pass.

    Returns:
      `step(params, opt_state, batch) -> (params, opt_state, loss)`. The opt_state comes from `init(tx, params, mesh)`,
      every leaf of the batch is split along its first axis, and loss is the mean over the workers. With has_state:
      `step(params, opt_state, model_state, batch) -> (params, opt_state, model_state, loss)`. The step has jax.jit's
      `lower`. Parameters and model state that lie elsewhere, such as new ones on one device, are placed on the mesh
      first, see `place`. If the mesh has several processes, make one batch of each process's rows with
      `shard_batch(rows, mesh)`.

      A Flax `TrainState`, fresh too, may replace params and opt_state, and so may another object with params,
      opt_state, tx, step and replace: `step(state, batch) -> (state, loss)`. Its step counts the steps that are not
      skipped. A module of Flax's NNX and its `nnx.Optimizer` may replace them too, for a loss_fn of the module:
      `step(model, optimizer, batch) -> loss`, or (loss, aux), changes both in place.

    Raises:
      ValueError: when called. The batch does not divide among the workers, or is one process's of several. The loss is
        reduced already. The optimiser state is not one of tx for params and the mesh. The model constrains shardings
        over the mesh. Or tx leaves the workers' updates or its state different, or calls a codec in some steps only.
    """
    form = Form(has_state, has_aux, rng, shared)
    own_loss, mesh = checked(loss_fn, tx, form, accumulate), automatic(require_mesh(mesh, or_workers=False))
    require_whole("steps", steps, 1)
    if isinstance(tx, Outer):
        settings = Settings(form, steps, accumulate, donate, compiler_options)
        return outer_step(own_loss, tx, mesh, settings, reduce_aux, check_vma)
    if steps > 1:
        raise ValueError(f"steps={steps} is for outer(...): with other optimisers each call is one step")
    axes = tuple(mesh.axis_names)
    taking = with_rest(own_loss, form)
    worker = _worker_step(taking, tx, mesh.shape, form, accumulate, reduce_aux, in_shards=True)
    rest_specs = tuple(P(axes) if name == "batch" else P() for name in form.names)

    def sharded(params, opt_state, rest, check_vma):
        if not check_vma:
            require_agreement(tx, tuple(mesh.shape.items()), Shapes.of(params))
            require_unconstrained(taking, params, rest, mesh, rest_specs)
        specs = state_specs(tx, params)
        own = jax.tree.map(lambda how: P(axes) if how == "workers" else P(), reduce_aux)
        out_specs = (P(), specs, *(P(),) * (1 + has_state), *((P() if own is None else own),) * has_aux)
        step = _on_global_state(worker, mesh)
        in_specs = (P(), specs, *rest_specs)
        return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)(
            params, opt_state, *rest
        )

    def step(params, opt_state, *rest):
        require_rest(rest, form)
        require_parts(rest[has_state], mesh.size, accumulate, f"the mesh's {mesh.size} workers")
        require_whole_optimiser(opt_state)
        require_state(tx, params, opt_state, mesh)
        try:
            return sharded(params, opt_state, rest, check_vma)
        except UntypedError as error:
            note(
                logging.INFO, f"loss_fn is traced without shard_map's types, which it does not take: {error.__cause__}"
            )
        return sharded(params, opt_state, rest, False)

    again = functools.partial(
        train_step, tx=tx, mesh=mesh, reduce_aux=reduce_aux, check_vma=check_vma, compiler_options=compiler_options
    )
    options = None if compiler_options is None else dict(compiler_options)
    return Step(step, mesh, has_state, donate, options, _on_modules(again, loss_fn, axes, form, accumulate, donate))


def _on_modules(
    make: Callable[..., Any], loss_fn: Any, axes: tuple[str, ...], form: Form, accumulate: int, donate: bool
) -> Callable[[], Callable[..., Any]]:
    """Returns a function that makes a step of modules of Flax's NNX; `make` makes a step of parameters."""

    def made() -> Callable[..., Any]:
        if form.has_state:
            raise ValueError("has_state=True is for a state beside parameters; a module holds its own: leave it out")
        settings = {"has_aux": form.has_aux, "has_state": True, "accumulate": accumulate, "rng": form.rng}
        of_params = functools.partial(make, shared=True, donate=donate, **settings)
        return ModuleStep(of_params, loss_fn, axes, form.has_aux, form.shared)

    return made


def _on_global_state(worker: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A worker's step inside shard_map; the state comes and goes in its global form."""

    def on_worker(params, opt_state, *rest):
        with collectives.in_order() if emulates(mesh) else contextlib.nullcontext():
            params, opt_state, *others = worker(params, local_state(opt_state), *rest)
        return params, global_state(opt_state), *others

    return on_worker


def simulate(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    workers: int,
    *,
    axis_name: str = "data",
    has_aux: bool = False,
    has_state: bool = False,
    reduce_aux: Any = None,
    accumulate: int = 1,
    steps: int = 1,
    rng: bool = False,
    shared: bool = False,
    donate: bool = False,
) -> Step | OuterStep:
    """The twin of `train_step` with all workers on one device, by vmap: the same numbers, no mesh.

    On several devices it is data parallelism, partitioned by XLA itself, under plain `jax.jit`. Give it a batch that
    lies on them, from `shard_batch(batch)`, and `place((params, opt_state))`. A codec that sums sends there what
    `wire_bits` counts, or less: GradiVeQ's bases are counted, but XLA need not send them. A codec that gathers,
    shuffles or goes round a ring is refused there.

    Args:
      loss_fn: as in `train_step`.
      tx: as in `train_step`.
      workers: how many to simulate.
      axis_name: the codec's axis_name.
      has_aux: as in `train_step`.
      has_state: as in `train_step`.
      reduce_aux: as in `train_step`.
      accumulate: as in `train_step`.
      steps: as in `train_step`.
      rng: as in `train_step`.
      shared: as in `train_step`.
      donate: as in `train_step`.

    Returns:
      A step like that of `train_step`, for an opt_state from `init(tx, params, workers)`.

    Raises:
      ValueError: when called, as in `train_step`, except that a loss that is reduced already cannot be seen here. Or
        the codec does not sum, and the batch lies on several devices.
    """
    form = Form(has_state, has_aux, rng, shared)
    own_loss, workers = checked(loss_fn, tx, form, accumulate), own("workers", workers)
    require_whole("workers", workers, 1)
    require_whole("steps", steps, 1)
    if isinstance(tx, Outer):
        settings = Settings(form, steps, accumulate, donate, None)
        return outer_step(own_loss, tx, workers, settings, reduce_aux, check_vma=False, axis_name=axis_name)
    if steps > 1:
        raise ValueError(f"steps={steps} is for outer(...): with other optimisers each call is one step")
    taking = with_rest(own_loss, form)
    worker = _worker_step(taking, tx, {axis_name: workers}, form, accumulate, reduce_aux, in_shards=False)

    def step(params, opt_state, *rest):
        require_rest(rest, form)
        require_parts(rest[has_state], workers, accumulate, f"{workers} workers")
        require_whole_optimiser(opt_state)
        require_state(tx, params, opt_state, workers)
        require_agreement(tx, ((axis_name, workers),), Shapes.of(params))
        batch = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), rest[has_state])
        state_axes = jax.tree.map(lambda spec: 0 if axis_name in spec else None, state_specs(tx, params))
        in_axes = (None, state_axes, *(0 if name == "batch" else None for name in form.names))
        own = jax.tree.map(lambda how: 0 if how == "workers" else None, reduce_aux)
        out_axes = (None, state_axes, *(None,) * (1 + has_state), *(own,) * has_aux)
        simulated = jax.vmap(worker, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name)
        return simulated(params, opt_state, *rest[:has_state], batch, *rest[has_state + 1 :])

    again = functools.partial(simulate, tx=tx, workers=workers, axis_name=axis_name, reduce_aux=reduce_aux)
    modules = _on_modules(again, loss_fn, (axis_name,), form, accumulate, donate)
    return Step(step, workers, has_state, donate, None, modules)


def _worker_step(
    loss_fn: Any, tx: Any, sizes: Mapping[str, int], form: Form, accumulate: int, reduce_aux: Any, in_shards: bool
) -> Callable[..., Any]:
    """One worker's part of a step, on local state; in shard_map if `in_shards`, else under vmap."""
    axes, wire = tuple(sizes), Wire(tuple(sizes))
    own = (lambda x: x[None]) if in_shards else (lambda x: x)  # for what each worker keeps, as its specs say

    def step(params, opt_state, *rest):
        scaled = loss_scale(opt_state) if loss_scales(opt_state) else None
        rest = of_worker(rest, form, axes)
        (loss, (model_state, aux)), grads = (
            own_gradients(loss_fn, params, rest, axes, scaled)
            if accumulate == 1
            else accumulated_gradients(loss_fn, params, rest, axes, scaled, form, accumulate)
        )
        floats, others = beside.model_state_parts(model_state)
        hows, aux = _reductions(reduce_aux, aux, rest[form.has_state], accumulate)
        riders = [loss, beside.sent(aux, hows, wire.workers), floats]
        updates, new_opt_state, means = _update_beside(tx, sizes, grads, opt_state, params, riders, in_shards)
        others = collectives.after(others, compressor_states(new_opt_state))
        kept = skipped_steps(new_opt_state) == skipped_steps(opt_state)
        new_params = keep(kept, optax.apply_updates(params, updates), params)
        loss, aux_means, floats = means
        states = []
        if form.has_state:
            states = [beside.model_state(model_state, rest[0], floats, wire.largest(others)[0], kept)]
        kept = once_stored(kept, new_params)
        aux = beside.arrived(aux, hows, aux_means, wire.workers, own)
        return new_params, keep_state(kept, new_opt_state, opt_state), *states, loss, *([aux] if form.has_aux else [])

    return step


def _reductions(reduce_aux: Any, aux: Any, batch: Any, accumulate: int) -> tuple[Any, Any]:
    """How auxiliary outputs are reduced over the workers; and the outputs over all parts of an accumulated batch."""
    rows = {x.shape[0] // accumulate for x in jax.tree.leaves(batch)}
    if accumulate == 1:
        return beside.reductions(reduce_aux, aux, rows), aux
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), aux)
    hows = beside.reductions(reduce_aux, part, rows)
    return hows, beside.over_parts(aux, hows)


def _update_beside(
    tx: Any, sizes: Mapping[str, int], grads: Any, opt_state: Any, params: Any, riders: Any, fresh: bool
) -> tuple[Any, Any, Any]:
    """Updates, the next state, and the means of the riders, which travel in the messages of tx's codec."""
    axes = tuple(sizes)
    states = compressor_states(opt_state)
    # Several codecs would each send them; a codec on a part of the axes would not reach all workers.
    rides = len(states) == 1 and set(collectives.axis_names(states[0].residual.axis)) == set(axes)
    extra = {"beside": riders, "fresh": fresh} if rides else {}
    updates, state = update_of(tx, sizes, grads, opt_state, params, riders[0], **extra)
    arrived = [x for x in jax.tree.leaves(state, is_leaf=_is_delivered) if _is_delivered(x)]
    if arrived:
        state = jax.tree.map(lambda x: x.state if _is_delivered(x) else x, state, is_leaf=_is_delivered)
        return updates, state, arrived[0].beside
    return updates, state, apart(collectives.after(riders, compressor_states(state)), Wire(axes))


def apart(riders: Any, wire: Wire) -> Any:
    """The means over the workers of floating arrays, in a message of their own."""
    leaves, treedef = jax.tree.flatten(riders)
    sent = ways.exact([], [widen(x) for x in leaves], wire, [], ring=False, before=None, checked=0)
    return jax.tree.unflatten(treedef, sent.rode)


def _is_delivered(x: Any) -> bool:
    return isinstance(x, Delivered)


def keep(kept: jax.Array, new: Any, old: Any) -> Any:
    """`new`, or `old` if the step was skipped."""
    return jax.tree.map(lambda n, o: jnp.where(kept, n, o if o.dtype == n.dtype else o.astype(n.dtype)), new, old)


def keep_state(kept: jax.Array, new: Any, old: Any) -> Any:
    """The optimiser's state as in `keep`, but counts go on, and a pending gradient is of this step anyway."""
    pending = lambda x: is_per_worker(x) and x.role == "pending"  # noqa: E731

    def part(new: Any, old: Any) -> Any:
        if pending(new):
            return new
        if is_compressor_state(new):
            # Another codec of the chain may have seen nothing wrong.
            return keep(kept, new, old)._replace(wire=new.wire, skipped=new.skipped)
        if is_loss_scale(new):
            return new._replace(inner=keep_state(kept, new.inner, old.inner))
        return keep(kept, new, old)

    return jax.tree.map(part, new, old, is_leaf=lambda x: is_compressor_state(x) or pending(x) or is_loss_scale(x))
