"""The data-parallel training step over a mesh, and its twin that simulates the workers on one device."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax.agreement import Shapes, require_agreement, update_of
from gradcomp_jax.compressor import Delivered, compressor_states, is_compressor_state, skipped, skipped_steps
from gradcomp_jax.exchange import collectives, ways
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.sharding import (
    PerWorker,
    automatic,
    global_state,
    is_per_worker,
    local_state,
    require_workers,
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
    needed = 1
    for name, size in workers.items():
        if size < 1:
            raise ValueError(f"axis {name!r} of the mesh has {size} workers, it needs at least 1")
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
    donate: bool = False,
    check_vma: bool = True,
) -> Step:
    """A jitted data-parallel step in which each worker's own gradient reaches `tx`.

    Each worker computes the loss and gradient on its part of the batch; `tx`, with a codec first, makes
    them one update; all workers apply it. Where a codec finds a gradient that is not finite on any worker,
    parameters, model state and optimiser state stay as they were on all, and only `skipped` and the count
    of bits go on. (`average` alone tests nothing.)

    To freeze leaves, put `optax.freeze(mask)` after the codec. As a label of `optax.partition`, beside one that
    has a codec, use `optax.stateless(lambda u, p: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), u))`, which
    sends nothing: the zeros of `optax.set_to_zero` have the type of the worker's own gradients, and are refused.

    Args:
      loss_fn: `(params, batch) -> loss`, a scalar that is this worker's mean over its part of the batch; not
        reduced over the workers.
      tx: the optimiser, with a codec, or `average`, first.
      mesh: the workers; the batch is split over all its axes. See `make_mesh`.
      has_aux: loss_fn returns `(loss, aux)`; the step returns aux last, averaged over the workers.
      has_state: loss_fn is `(params, model_state, batch) -> (loss, model_state)`, or with has_aux
        `(loss, (model_state, aux))`, for batch statistics and the like. Floating leaves of the new model
        state are averaged over the workers; of integer leaves, such as counters, the largest is kept.
      donate: reuse the memory of params, opt_state and model_state, which cannot be read afterwards.
      check_vma: let shard_map check what differs between workers. Switch it off only for a model that it
        cannot check; gradients stay local then too, and tx, which is traced by itself first, is still checked.

    Returns:
      `step(params, opt_state, batch) -> (params, opt_state, loss)`, where opt_state comes from
      `init(tx, params, mesh)`, every leaf of the batch is split along its first axis, and loss is the mean
      over the workers. With has_state: `step(params, opt_state, model_state, batch) -> (params, opt_state,
      model_state, loss)`. It has jax.jit's `lower`. Parameters that lie on one device at the first call have
      the second one compiled anew; `jax.device_put(params, NamedSharding(mesh, PartitionSpec()))` spares that.

    Raises:
      ValueError: when called with a batch that does not divide among the workers, a loss that is reduced
        already, or a tx that leaves the workers' updates or its state different, or calls a codec in some
        steps only.
    """
    mesh = automatic(mesh)
    axes = tuple(mesh.axis_names)
    worker = _worker_step(loss_fn, tx, mesh.shape, has_aux, has_state, fresh=True)

    def step(params, opt_state, *rest):
        _require_divisible(rest[-1], mesh.size, f"the mesh's {mesh.size} workers")
        if not check_vma:
            require_agreement(tx, tuple(mesh.shape.items()), Shapes.of(params))
        specs = state_specs(tx, params)
        in_specs = (P(), specs, *(P(),) * has_state, P(axes))
        out_specs = (P(), specs, *(P(),) * (1 + has_state + has_aux))
        sharded = jax.shard_map(
            _on_global_state(worker, mesh), mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )
        return sharded(params, opt_state, *rest)

    jitted = jax.jit(step, donate_argnums=_donated(donate, has_state))
    return _OneAtATime(jitted, loss=2 + has_state) if _emulates(mesh) else jitted


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
      donate: as in `train_step`.

    Returns:
      A step as `train_step` returns it, for an opt_state from `init(tx, params, workers)`.

    Raises:
      ValueError: when called, as in `train_step`; a loss that is reduced already cannot be seen here.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    worker = _worker_step(loss_fn, tx, {axis_name: workers}, has_aux, has_state, fresh=False)

    def step(params, opt_state, *rest):
        _require_divisible(rest[-1], workers, f"{workers} workers")
        require_agreement(tx, ((axis_name, workers),), Shapes.of(params))
        batch = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), rest[-1])
        state_axes = jax.tree.map(lambda spec: 0 if axis_name in spec else None, state_specs(tx, params))
        in_axes = (None, state_axes, *(None,) * has_state, 0)
        out_axes = (None, state_axes, *(None,) * (1 + has_state + has_aux))
        simulated = jax.vmap(worker, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name)
        return simulated(params, opt_state, *rest[:-1], batch)

    return jax.jit(step, donate_argnums=_donated(donate, has_state))


def flush(tx: optax.GradientTransformation, params: Any, opt_state: Any, mesh: Mesh | int) -> tuple[Any, Any]:
    """Applies what residuals still hold, and what is pending under `delayed`, as at the end of training.

    One step of `tx` with gradients of zero, in which every codec sends its residual uncompressed; the bits are
    counted. The rest of the chain sees the mean as a gradient like any other: momentum, weight decay and
    schedules go on by a step. So it must be a step in which the chain applies what it is given. Where no codec
    keeps residuals nothing happens.

    Args:
      tx: the optimiser, as in `train_step`.
      params: the parameters.
      opt_state: the optimiser state, in its global form.
      mesh: the workers; or, for an opt_state of `simulate`, how many there are.

    Returns:
      The new parameters and opt_state, whose residuals are zero. With 16-bit gradients their mean is rounded.

    Raises:
      ValueError: the mesh is not that of opt_state; a transformation of tx does not pass extra arguments on to
        the codec inside it; or no parameter changed, as under a learning rate of zero or in `optax.MultiSteps`.
    """
    residuals = _owed(opt_state)
    if not jax.tree.leaves(residuals):
        return params, opt_state
    require_workers(opt_state, mesh)
    tx = optax.with_extra_args_support(tx)
    flushing = optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, flush=True))

    def loss_fn(params, batch):
        del params
        return jnp.sum(batch)

    if isinstance(mesh, int):
        axis_name = residuals[0].axis
        if not isinstance(axis_name, str):
            raise ValueError(f"mesh={mesh}: workers along {axis_name} are those of a mesh, pass that")
        step, workers = simulate(loss_fn, flushing, mesh, axis_name=axis_name), mesh
    else:
        step, workers = train_step(loss_fn, flushing, mesh), mesh.size
    skipped_before = skipped(opt_state)
    flushed, opt_state, _ = step(params, opt_state, jnp.zeros(workers))
    if skipped(opt_state) > skipped_before:  # what was pending was not finite, and is gone now
        residuals = _owed(opt_state)
        flushed, opt_state, _ = step(flushed, opt_state, jnp.zeros(workers))
    if _any_nonzero(_owed(opt_state)):
        raise ValueError(
            "residuals are left after flush: a transformation around the codec takes no extra arguments, by which "
            "flush reaches it; make that one an optax.GradientTransformationExtraArgs that passes them on"
        )
    held = jax.tree.map(lambda x: jnp.mean(x, axis=0), residuals)
    if _any_nonzero(held) and not _any_nonzero(jax.tree.map(jnp.subtract, flushed, params)):
        raise ValueError(
            "flush changed no parameter, though residuals held something: the learning rate is zero here, or what "
            "comes after the codec (optax.MultiSteps, optax.apply_every) keeps the step back; flush before that"
        )
    return flushed, opt_state


def _owed(opt_state: Any) -> list[PerWorker]:
    """Residuals, and gradients that are pending."""
    marked = [x for x in jax.tree.leaves(opt_state, is_leaf=is_per_worker) if is_per_worker(x)]
    return [x for x in marked if x.role in ("owed", "pending")]


def _any_nonzero(tree: Any) -> bool:
    return any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(tree))


def _worker_step(loss_fn: Any, tx: Any, sizes: Mapping[str, int], has_aux: bool, has_state: bool, fresh: bool) -> Step:
    """What one worker does in a step, on local state."""
    axes = tuple(sizes)

    def loss_and_rest(params, rest):
        out = loss_fn(params, *rest)
        if not (has_state or has_aux):
            return out, (None, None)
        loss, more = out
        if has_state and has_aux:
            return loss, more
        return loss, (more, None) if has_state else (None, more)

    def step(params, opt_state, *rest):
        grad_fn = jax.value_and_grad(loss_and_rest, has_aux=True)
        (loss, (model_state, aux)), grads = grad_fn(collectives.vary(params, axes), rest)
        if collectives.known_equal(loss, axes):
            raise ValueError(
                f"loss_fn's loss is already reduced over the workers along {axes}, which would divide its "
                "gradients: return the worker's own mean, the step averages the loss it returns"
            )
        floats, others = _model_state_parts(model_state)
        beside = [loss, aux, floats]
        updates, new_opt_state, means = _update_beside(tx, sizes, grads, opt_state, params, beside, fresh)
        others = collectives.after(others, compressor_states(new_opt_state))
        kept = skipped_steps(new_opt_state) == skipped_steps(opt_state)
        new_params = _kept(kept, optax.apply_updates(params, updates), params)
        kept = _once_stored(kept, new_params)
        loss, aux, floats = means
        states = []
        if has_state:
            states = [_kept(kept, _model_state(model_state, floats, others, Wire(axes)), rest[0])]
        return new_params, _keep_state(kept, new_opt_state, opt_state), *states, loss, *([aux] if has_aux else [])

    return step


def _update_beside(
    tx: Any, sizes: Mapping[str, int], grads: Any, opt_state: Any, params: Any, beside: Any, fresh: bool
) -> tuple[Any, Any, Any]:
    """Updates, the next state, and the means of what is beside, which rides in the messages of tx's codec."""
    axes = tuple(sizes)
    states = compressor_states(opt_state)
    # Of several codecs each would send it; one on a part of the axes would not reach all workers.
    rides = len(states) == 1 and collectives.axis_names(states[0].residual.axis) == axes
    extra = {"beside": beside, "fresh": fresh} if rides else {}
    updates, state = update_of(tx, sizes, grads, opt_state, params, **extra)
    arrived = [x for x in jax.tree.leaves(state, is_leaf=_is_delivered) if _is_delivered(x)]
    if arrived:
        state = jax.tree.map(lambda x: x.state if _is_delivered(x) else x, state, is_leaf=_is_delivered)
        return updates, state, arrived[0].beside
    leaves, treedef = jax.tree.flatten(collectives.after(beside, compressor_states(state)))
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
        return _kept(kept, new, old)

    return jax.tree.map(part, new, old, is_leaf=lambda x: is_compressor_state(x) or pending(x))


def _model_state_parts(model_state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """Its floating leaves, which are averaged, and its others, of which the largest is kept.

    Raises:
      TypeError: a leaf is a random key.
    """
    floats: list[jax.Array] = []
    others: list[jax.Array] = []
    for path, x in jax.tree_util.tree_leaves_with_path(model_state):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"leaf {jax.tree_util.keystr(path)} of the model state is a random key, of which there is no "
                "mean: pass the workers' keys in the batch"
            )
        (floats if jnp.issubdtype(x.dtype, jnp.inexact) else others).append(x)
    return floats, others


def _model_state(like: Any, floats: list[jax.Array], others: list[jax.Array], wire: Wire) -> Any:
    """The model state, from the means of its floating leaves and this worker's others."""
    leaves, treedef = jax.tree.flatten(like)
    means, largest = iter(floats), iter(wire.largest(others)[0])
    floating = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    merged = [next(means).astype(x.dtype) if f else next(largest) for x, f in zip(leaves, floating, strict=True)]
    return jax.tree.unflatten(treedef, merged)


def _require_divisible(batch: Any, workers: int, whom: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not leaf.ndim or leaf.shape[0] % workers:
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path)!r} of shape {leaf.shape} does not divide among {whom}: its "
                "first axis must be a multiple of them"
            )


class _OneAtATime:
    """A jitted step that begins when the one before is done, else as jax.jit made it.

    Each CPU device may have 32 programs in flight; one more waits on a thread of the pool that the programs before it
    need, and where there are no more threads than devices, a loop that reads no results ends so.
    """

    def __init__(self, step: Any, loss: int):
        self._step, self._loss, self._last = step, loss, None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        last, self._last = self._last, None
        if last is not None and not last.is_deleted():
            jax.block_until_ready(last)
        results = self._step(*args, **kwargs)
        if not isinstance(results[self._loss], jax.core.Tracer):
            self._last = results[self._loss]
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def _emulates(mesh: Mesh) -> bool:
    """Whether several devices of the mesh are CPU devices of this process."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return len(local) > 1 and local[0].platform == "cpu"


def _donated(donate: bool, has_state: bool) -> tuple[int, ...]:
    return tuple(range(2 + has_state)) if donate else ()
