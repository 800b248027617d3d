"""The data-parallel training step over a mesh, and its twin that simulates the workers on one device."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax import beside
from gradcomp_jax.agreement import Shapes, require_agreement, update_of
from gradcomp_jax.arguments import is_whole, own, require_mesh, shown
from gradcomp_jax.compressor import Delivered, compressor_states, is_compressor_state, skipped_steps
from gradcomp_jax.contract import require_whole
from gradcomp_jax.entry import checked, require_rest
from gradcomp_jax.exchange import collectives, ways
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.loss import UntypedError, own_gradients, require_unconstrained
from gradcomp_jax.loss_scale import is_loss_scale, loss_scale, loss_scales
from gradcomp_jax.notes import note
from gradcomp_jax.sharding import (
    automatic,
    global_state,
    in_automatic_axes,
    is_per_worker,
    local_state,
    place,
    require_divisible,
    require_state,
    state_specs,
)
from gradcomp_jax.views import always, on_cpus, others_are_automatic, widen

Step = Callable[..., tuple[Any, ...]]

# The optimiser's state of a parameter of fewer elements is copied in less than it takes to compile what saves that.
LARGE = 2**15


def make_mesh(workers: int | Mapping[str, int] | None = None) -> Mesh:
    """A device mesh for `train_step`.

    Args:
      workers: how many devices to lay along the axis "data"; or axis names with their sizes, such as
        `{"node": 2, "local": 4}`; by default all devices there are, along "data".

    Returns:
      A mesh with automatic axes, which take ordinary arrays.

    Raises:
      ValueError: there are fewer devices.
    """
    available = jax.device_count()
    if not isinstance(workers, Mapping):
        workers = {"data": available if workers is None else workers}
    if not workers:
        raise ValueError("a mesh needs an axis of workers, such as make_mesh({'data': 4})")
    needed = 1
    for name, size in workers.items():
        if not is_whole(size) or size < 1:
            raise ValueError(
                f"axis {name!r} of the mesh has {shown(size)} workers, it needs at least 1, a whole number"
            )
        needed *= size
    if needed > available:
        raise ValueError(
            f"a mesh of {dict(workers)} needs {needed} devices, jax has {available}; a CPU can stand for "
            f"several: jax.config.update('jax_num_cpu_devices', {needed}) before jax is first used, or use "
            "simulate(), which needs one device only"
        )
    devices = jax.devices()[:needed]
    return jax.make_mesh(
        tuple(workers.values()), tuple(workers), axis_types=(AxisType.Auto,) * len(workers), devices=devices
    )


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    has_aux: bool = False,
    has_state: bool = False,
    reduce_aux: Any = None,
    donate: bool = False,
    check_vma: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> Step:
    """A jitted data-parallel step in which each worker's own gradient reaches `tx`.

    Each worker computes the loss and gradient on its part of the batch; `tx`, with a codec first, makes
    them one update; all workers apply it. Where a codec finds a gradient that is not finite on any worker,
    parameters and optimiser state stay as they were on all, and only `skipped`, the count of bits and the scale of
    `loss_scaled` go on. (`average` alone tests nothing.)

    To freeze leaves, put `optax.freeze(mask)` after the codec. As a label of `optax.partition`, beside one that
    has a codec, use `optax.stateless(lambda u, p: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), u))`, which
    sends nothing: the zeros of `optax.set_to_zero` have the type of the worker's own gradients, and are refused.

    Args:
      loss_fn: `(params, batch) -> loss`, a scalar that is this worker's mean over its part of the batch; not
        reduced over the workers. Where `loss_scaled` is in tx, it returns the loss as it is.
      tx: the optimiser, with a codec, or `average`, first. A transformation after the codec that asks for `value`,
        such as `optax.contrib.reduce_on_plateau`, gets the mean loss, which costs a small all-reduce of its own.
      mesh: the workers; the batch is split over all its axes. See `make_mesh`.
      has_aux: loss_fn returns `(loss, aux)`; the step returns aux last.
      has_state: loss_fn is `(params, model_state, batch) -> (loss, model_state)`, or with has_aux
        `(loss, (model_state, aux))`, for batch statistics and the like. Floating leaves of the new model
        state are averaged over the workers; of integer leaves, such as counters, the largest is kept. In a step that
        is skipped the loss has been computed nonetheless: integers, and floating leaves that are finite, go on; a
        floating leaf that is not finite stays as it was.
      reduce_aux: what becomes of aux over the workers, a tree that is a prefix of it: "mean"; "sum", for integers
        exact; or "workers", which keeps each worker's own: [workers, ...], sharded over the mesh, and not sent. By
        default floating leaves are averaged, and integers and truth values summed.
      donate: reuse the memory of params, opt_state and model_state, which cannot be read afterwards.
      check_vma: let shard_map check what differs between workers. A model that cannot be given such types is traced
        without; gradients stay local then too, and tx, which is traced by itself first, is still checked. So it is with
        check_vma=False from the start.
      compiler_options: XLA's, as for `jax.jit`; those of `compiler_options(platform)` let the parts of an exchange
        overlap with the backward pass.

    Returns:
      `step(params, opt_state, batch) -> (params, opt_state, loss)`, where opt_state comes from
      `init(tx, params, mesh)`, every leaf of the batch is split along its first axis, and loss is the mean
      over the workers. With has_state: `step(params, opt_state, model_state, batch) -> (params, opt_state,
      model_state, loss)`. It has jax.jit's `lower`. Parameters and model state that lie elsewhere, such as new ones
      on one device, are placed on the mesh first, see `place`. Where the mesh is of several processes, make each
      process's rows a batch by `shard_batch(rows, mesh)`.

    Raises:
      ValueError: when called with a batch that does not divide among the workers, or is one process's of several, a
        loss that is reduced already, an optimiser state that is not one of tx for params and the mesh, a model that
        constrains shardings over the mesh, or a tx that leaves the workers' updates or its state different, or calls a
        codec in some steps only.
    """
    loss_fn, mesh = checked(loss_fn, tx, has_aux, has_state), require_mesh(mesh, or_workers=False)
    mesh = automatic(mesh)
    axes = tuple(mesh.axis_names)
    with_rest = _with_rest(loss_fn, has_aux, has_state)
    worker = _worker_step(with_rest, tx, mesh.shape, has_aux, has_state, reduce_aux, in_shards=True)
    rest_specs = (*(P(),) * has_state, P(axes))

    def sharded(params, opt_state, rest, check_vma):
        if not check_vma:
            require_agreement(tx, tuple(mesh.shape.items()), Shapes.of(params))
            require_unconstrained(with_rest, params, rest, mesh, rest_specs)
        specs = state_specs(tx, params)
        own = jax.tree.map(lambda how: P(axes) if how == "workers" else P(), reduce_aux)
        out_specs = (P(), specs, *(P(),) * (1 + has_state), *((P() if own is None else own),) * has_aux)
        step = _on_global_state(worker, mesh)
        in_specs = (P(), specs, *rest_specs)
        return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)(
            params, opt_state, *rest
        )

    def step(params, opt_state, *rest):
        require_rest(rest, has_state)
        require_divisible(rest[-1], mesh.size, f"the mesh's {mesh.size} workers")
        require_state(tx, params, opt_state, mesh)
        try:
            return sharded(params, opt_state, rest, check_vma)
        except UntypedError as error:
            note(
                logging.INFO, f"loss_fn is traced without shard_map's types, which it does not take: {error.__cause__}"
            )
        return sharded(params, opt_state, rest, False)

    donated = _donated(donate, has_state)
    options = None if compiler_options is None else dict(compiler_options)
    jitted = jax.jit(step, donate_argnums=donated, compiler_options=options)
    return _Jitted(jitted, mesh, loss=2 + has_state)


def _on_global_state(worker: Step, mesh: Mesh) -> Step:
    """A worker's step inside shard_map, where the state comes and goes in its global form."""

    def on_worker(params, opt_state, *rest):
        with collectives.in_order() if _emulates(mesh) else contextlib.nullcontext():
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
    donate: bool = False,
) -> Step:
    """The twin of `train_step` with all workers on one device, by vmap: the same numbers, no mesh.

    Args:
      loss_fn: as in `train_step`.
      tx: as in `train_step`.
      workers: how many to simulate.
      axis_name: the codec's axis_name.
      has_aux: as in `train_step`.
      has_state: as in `train_step`.
      reduce_aux: as in `train_step`.
      donate: as in `train_step`.

    Returns:
      A step as `train_step` returns it, for an opt_state from `init(tx, params, workers)`.

    Raises:
      ValueError: when called, as in `train_step`; a loss that is reduced already cannot be seen here.
    """
    loss_fn, workers = checked(loss_fn, tx, has_aux, has_state), own("workers", workers)
    require_whole("workers", workers, 1)
    with_rest = _with_rest(loss_fn, has_aux, has_state)
    worker = _worker_step(with_rest, tx, {axis_name: workers}, has_aux, has_state, reduce_aux, in_shards=False)

    def step(params, opt_state, *rest):
        require_rest(rest, has_state)
        require_divisible(rest[-1], workers, f"{workers} workers")
        require_state(tx, params, opt_state, workers)
        require_agreement(tx, ((axis_name, workers),), Shapes.of(params))
        batch = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), rest[-1])
        state_axes = jax.tree.map(lambda spec: 0 if axis_name in spec else None, state_specs(tx, params))
        in_axes = (None, state_axes, *(None,) * has_state, 0)
        own = jax.tree.map(lambda how: 0 if how == "workers" else None, reduce_aux)
        out_axes = (None, state_axes, *(None,) * (1 + has_state), *(own,) * has_aux)
        simulated = jax.vmap(worker, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name)
        return simulated(params, opt_state, *rest[:-1], batch)

    return _Jitted(jax.jit(step, donate_argnums=_donated(donate, has_state)), workers, loss=2 + has_state)


def _with_rest(loss_fn: Callable[..., Any], has_aux: bool, has_state: bool) -> Callable[..., Any]:
    """`loss_fn` as (params, rest) -> (loss, (model state, auxiliary outputs)), None where there are none."""

    def with_rest(params, rest):
        out = loss_fn(params, *rest)
        if not (has_state or has_aux):
            return out, (None, None)
        loss, more = out
        more = jax.tree.map(jnp.asarray, more)  # Python's numbers too
        if has_state and has_aux:
            return loss, more
        return loss, (more, None) if has_state else (None, more)

    return with_rest


def _worker_step(
    loss_fn: Any, tx: Any, sizes: Mapping[str, int], has_aux: bool, has_state: bool, reduce_aux: Any, in_shards: bool
) -> Step:
    """What one worker does in a step, on local state; in shard_map, or else under vmap."""
    axes, wire = tuple(sizes), Wire(tuple(sizes))
    own = (lambda x: x[None]) if in_shards else (lambda x: x)  # of what each worker keeps, as its specs say

    def step(params, opt_state, *rest):
        scaled = loss_scale(opt_state) if loss_scales(opt_state) else None
        (loss, (model_state, aux)), grads = own_gradients(loss_fn, params, rest, axes, scaled)
        floats, others = beside.model_state_parts(model_state)
        hows = beside.reductions(reduce_aux, aux, {x.shape[0] for x in jax.tree.leaves(rest[-1])})
        riders = [loss, beside.sent(aux, hows, wire.workers), floats]
        updates, new_opt_state, means = _update_beside(tx, sizes, grads, opt_state, params, riders, in_shards)
        others = collectives.after(others, compressor_states(new_opt_state))
        kept = skipped_steps(new_opt_state) == skipped_steps(opt_state)
        new_params = _kept(kept, optax.apply_updates(params, updates), params)
        loss, aux_means, floats = means
        states = []
        if has_state:
            states = [beside.model_state(model_state, rest[0], floats, wire.largest(others)[0], kept)]
        kept = _once_stored(kept, new_params)
        aux = beside.arrived(aux, hows, aux_means, wire.workers, own)
        return new_params, _keep_state(kept, new_opt_state, opt_state), *states, loss, *([aux] if has_aux else [])

    return step


def _update_beside(
    tx: Any, sizes: Mapping[str, int], grads: Any, opt_state: Any, params: Any, riders: Any, fresh: bool
) -> tuple[Any, Any, Any]:
    """Updates, the next state, and the means of the riders, which travel in the messages of tx's codec."""
    axes = tuple(sizes)
    states = compressor_states(opt_state)
    # Of several codecs each would send it; one on a part of the axes would not reach all workers.
    rides = len(states) == 1 and set(collectives.axis_names(states[0].residual.axis)) == set(axes)
    extra = {"beside": riders, "fresh": fresh} if rides else {}
    updates, state = update_of(tx, sizes, grads, opt_state, params, riders[0], **extra)
    arrived = [x for x in jax.tree.leaves(state, is_leaf=_is_delivered) if _is_delivered(x)]
    if arrived:
        state = jax.tree.map(lambda x: x.state if _is_delivered(x) else x, state, is_leaf=_is_delivered)
        return updates, state, arrived[0].beside
    leaves, treedef = jax.tree.flatten(collectives.after(riders, compressor_states(state)))
    sent = ways.exact([], [widen(x) for x in leaves], Wire(axes), [], ring=False, before=None)
    return updates, state, jax.tree.unflatten(treedef, sent.rode)


def _is_delivered(x: Any) -> bool:
    return isinstance(x, Delivered)


def _kept(kept: jax.Array, new: Any, old: Any) -> Any:
    """`new`, or `old` in a step that was skipped."""
    return jax.tree.map(lambda n, o: jnp.where(kept, n, o), new, old)


def _once_stored(kept: jax.Array, params: Any) -> jax.Array:
    """`kept`, on CPUs known only once there are the new parameters.

    These are computed from the optimiser's state as it was before the step, and what selects by this flag overwrites
    that. Without such an order XLA's CPU backend begins each step with a copy of the state; of small parameters it may.
    """
    large = [x for x in jax.tree.leaves(params) if x.size >= LARGE]
    if not large or not on_cpus() or others_are_automatic():
        return kept
    return jax.lax.cond(kept, always, lambda _: jnp.array(False), large)


def _keep_state(kept: jax.Array, new: Any, old: Any) -> Any:
    """The optimiser's state as `_kept`, but counts go on, and what is pending is of this step anyway."""
    pending = lambda x: is_per_worker(x) and x.role == "pending"  # noqa: E731

    def part(new: Any, old: Any) -> Any:
        if pending(new):
            return new
        if is_compressor_state(new):
            # Another codec of the chain may have seen nothing wrong.
            return new._replace(
                codec=_kept(kept, new.codec, old.codec), residual=_kept(kept, new.residual, old.residual)
            )
        if is_loss_scale(new):
            return new._replace(inner=_keep_state(kept, new.inner, old.inner))
        return _kept(kept, new, old)

    return jax.tree.map(part, new, old, is_leaf=lambda x: is_compressor_state(x) or pending(x) or is_loss_scale(x))


class _Jitted:
    """A jitted step, of `train_step` or `simulate`, that looks at what it is called with, else as jax.jit made it.

    It places parameters and model state on the mesh: it would compile once for where they lie and once for where it
    returns them. Of several processes, it refuses a batch of one of them. Of several CPU devices, it begins when the
    step before is done: each may have 32 programs in flight; one more waits on a thread of the pool that the programs
    before it need, and where there are no more threads than devices, a loop that reads no results ends so.
    """

    def __init__(self, step: Any, mesh: Mesh | int, loss: int):
        self._step, self._mesh, self._loss, self._last = step, mesh, loss, None
        devices = [] if isinstance(mesh, int) else list(mesh.devices.flat)
        self._devices = len(devices)
        self._processes = len({device.process_index for device in devices})
        self._one_at_a_time = not isinstance(mesh, int) and _emulates(mesh)

    def __call__(self, params: Any, opt_state: Any, *rest: Any) -> tuple[Any, ...]:
        if self._processes > 1 and rest:
            _require_of_all(rest[-1], self._processes)
        params, *model_state = map(self._placed, (params, *rest[:-1]))
        last, self._last = self._last, None
        if last is not None and not last.is_deleted():
            jax.block_until_ready(last)
        try:
            results = in_automatic_axes(self._mesh, self._step)(params, opt_state, *model_state, *rest[-1:])
        except ValueError as error:
            if "incompatible devices" not in str(error):
                raise
            raise ValueError(
                "some of the step's arrays are committed to other devices than its mesh, as a state that was restored "
                "from a checkpoint may be: place(opt_state, mesh) moves it, shard_batch(batch, mesh) a batch; see also "
                f"restore. {error}"
            ) from error
        if self._one_at_a_time and not isinstance(results[self._loss], jax.core.Tracer):
            self._last = results[self._loss]
        return results

    def _placed(self, tree: Any) -> Any:
        """What is the same on all workers, on the mesh; where it lies is told by its first array."""
        first = next(iter(jax.tree.leaves(tree)), None)
        if isinstance(self._mesh, int) or self._devices == 1 or isinstance(first, jax.core.Tracer | None):
            return tree
        tree = jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x, jnp.result_type(x)), tree)
        lies = isinstance(first, jax.Array) and first.sharding.num_devices == self._devices
        return tree if lies else place(tree, self._mesh)

    def trace(self, *args: Any) -> Any:
        return in_automatic_axes(self._mesh, self._step.trace)(*args)

    def lower(self, *args: Any) -> Any:
        return in_automatic_axes(self._mesh, self._step.lower)(*args)

    def __getattr__(self, name: str) -> Any:
        if name == "_step":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self._step, name)


def _require_of_all(batch: Any, processes: int) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if not isinstance(x, jax.core.Tracer) and not (isinstance(x, jax.Array) and not x.is_fully_addressable):
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path)!r} is {type(x).__name__} of this process alone, and the mesh "
                f"is of {processes} processes: a part of each one's rows would be dropped. Make it one array of all: "
                "shard_batch(batch, mesh), where each process gives its own rows"
            )


def _emulates(mesh: Mesh) -> bool:
    """Whether several devices of the mesh are CPU devices of this process."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return len(local) > 1 and local[0].platform == "cpu"


def _donated(donate: bool, has_state: bool) -> tuple[int, ...]:
    return tuple(range(2 + has_state)) if donate else ()
