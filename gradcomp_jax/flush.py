"""The end of training: applies the gradients that residuals still hold."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gradcomp_jax.agreement import update_of
from gradcomp_jax.compressor import is_compressor_state, skipped
from gradcomp_jax.exchange.collectives import axis_names
from gradcomp_jax.exchange.plan import flatten
from gradcomp_jax.mesh import in_automatic_axes, require_mesh
from gradcomp_jax.outer import Outer
from gradcomp_jax.outer_step import flush_outer
from gradcomp_jax.placing import place, shard_batch
from gradcomp_jax.resizing import alone, whole_of
from gradcomp_jax.sharding import PerWorker, is_per_worker, require_state
from gradcomp_jax.step import simulate, train_step
from gradcomp_jax.views import widen

# Points of the run so far, from now back to its beginning, at which schedules are read.
POINTS = tuple(1 - i / 16 for i in range(17))
# Gradient sizes, as shares of the debt, whose results through the rest of the chain are compared with the full size's.
SMALLER = (1.0, 2.0**-4, 2.0**-8)


def flush(
    tx: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    mesh: Mesh | int | None = None,
    *,
    learning_rate: float | jax.Array | None = None,
    at_least: float = 0.9,
) -> tuple[Any, Any]:
    """Applies the gradients that residuals still hold, and those pending under `delayed`, at the end of training.

    Every codec sends its residual uncompressed; the bits are counted. Then there are two ways:

    - By default the rest of the chain sees the mean like any other gradient, in one step of `tx` in which the workers'
      own gradients are zero. Momentum, weight decay and schedules go on by a step; state that follows the loss stays.
      Some chains shrink gradients, and would shrink this one too: clipping, a schedule near its end, Adam's division by
      earlier gradients. So the share that would be applied is computed first. It compares with the chain's result for a
      gradient up to 256 times smaller, and with earlier values of its schedules. A share below `at_least` is refused.
      Adam's steps hardly depend on the size of a gradient, so under Adam it is mostly refused.
    - With `learning_rate` all of it is applied: the parameters move by learning_rate times the mean residual, and the
      rest of the chain stays as it was.

    If no codec keeps residuals, nothing happens.

    Under `outer` a flush ends the period early. With a delay, workers first adopt what is on its way, as ever. Then
    their differences and residuals travel uncompressed, and go through the outer optimiser. All workers begin a new
    period from the anchor.

    Args:
      tx: the optimiser, like in `train_step`.
      params: the parameters.
      opt_state: the optimiser state, in its global form.
      mesh: the workers, by default all devices; or, for an opt_state of `simulate`, their number.
      learning_rate: the factor for the mean residual, past the rest of the chain; None goes through the chain.
      at_least: the least share of the mean residual that the chain may apply.

    Returns:
      The new parameters and opt_state, whose residuals are zero. With 16-bit gradients their mean is rounded.

    Raises:
      ValueError: opt_state is not one of tx for the mesh; learning_rate is given for an `outer`; a transformation of tx
        does not pass extra arguments on to the codec inside it; the chain would apply less than `at_least` of the mean
        residual; no parameter changed, because of a learning rate of zero or `optax.MultiSteps`; or what the workers
        of an `outer` owe is not finite.
    """
    mesh = require_mesh(mesh)
    require_state(tx, params, opt_state, mesh)
    if isinstance(tx, Outer):
        if learning_rate is not None:
            raise ValueError("learning_rate= is for other optimisers: what outer(...) owes goes through its outer one")
        given = (params, opt_state) if isinstance(mesh, int) else place((params, opt_state), mesh)
        flushed = in_automatic_axes(mesh, functools.partial(flush_outer, tx, mesh))(*given)
        if skipped(flushed[1]) > skipped(opt_state):
            raise ValueError(
                "what the workers owe is not finite, so the exchange of flush was void. Nothing was changed. If params "
                "are good, go on from them: init(tx, params, mesh)"
            )
        return flushed
    if not jax.tree.leaves(_owed(opt_state)):
        return params, opt_state
    flushed = functools.partial(_flush, optax.with_extra_args_support(tx), mesh, learning_rate, at_least)
    return in_automatic_axes(mesh, flushed)(params, opt_state)


def _flush(
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh | int,
    learning_rate: Any,
    at_least: float,
    params: Any,
    opt_state: Any,
) -> tuple[Any, Any]:
    residuals = _owed(opt_state)
    flushing = optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, flush=True))
    step, batch = _step(flushing, residuals[0].axis, mesh)
    if not isinstance(mesh, int):
        params, opt_state = place((params, opt_state), mesh)
    axes = axis_names(residuals[0].axis) if isinstance(mesh, int) else tuple(mesh.axis_names)
    least = at_least if learning_rate is None else 0.0
    _require_share(tx, axes, params, opt_state, least)
    before = opt_state
    flushed, opt_state, _ = step(params, opt_state, batch)
    if skipped(opt_state) > skipped(before):  # the pending gradient was not finite, and is gone now
        residuals = _owed(opt_state)
        _require_share(tx, axes, params, opt_state, least)
        flushed, opt_state, _ = step(flushed, opt_state, batch)
    if _any_nonzero(_owed(opt_state)):
        raise ValueError(
            "residuals are left after flush: a transformation around the codec takes no extra arguments, by which "
            "flush reaches it; make that one an optax.GradientTransformationExtraArgs that passes them on"
        )
    owed = jax.jit(_mean_owed)(residuals, params)
    if learning_rate is not None:
        return _moved(params, owed, learning_rate), _kept(opt_state, before, lambda x: not _of_codec(x))
    if _any_nonzero(owed) and not _any_nonzero(jax.tree.map(jnp.subtract, flushed, params)):
        raise ValueError(
            "flush changed no parameter, though residuals held something: the learning rate is zero here, or a "
            "transformation after the codec (optax.MultiSteps, optax.apply_every) keeps the step back; flush before "
            "that, or give learning_rate="
        )
    return flushed, _kept(opt_state, before, _of_losses)


def _step(flushing: optax.GradientTransformation, axis_name: Any, mesh: Mesh | int) -> tuple[Any, jax.Array]:
    """A step whose gradients are zero, and its batch."""

    def loss_fn(params, batch):
        del params
        return jnp.sum(batch)

    if not isinstance(mesh, int):
        return train_step(loss_fn, flushing, mesh), shard_batch(np.zeros(len(mesh.local_devices), np.float32), mesh)
    names = axis_names(axis_name)
    if len(names) > 1:
        raise ValueError(f"mesh={mesh}: workers along {axis_name} are those of a mesh, pass that")
    return simulate(loss_fn, flushing, mesh, axis_name=names[0]), jax.device_put(np.zeros(mesh, np.float32))


def _owed(opt_state: Any) -> list[PerWorker]:
    """Residuals, and pending gradients."""
    marked = [x for x in jax.tree.leaves(opt_state, is_leaf=is_per_worker) if is_per_worker(x)]
    return [x for x in marked if x.role in ("owed", "pending")]


def _any_nonzero(tree: Any) -> bool:
    return any(jax.device_get([jnp.any(x) for x in jax.tree.leaves(tree)]))


def _mean_owed(residuals: list[PerWorker], params: Any) -> dict[str, jax.Array]:
    """The mean over the workers of the whole debt, by path."""
    owed: dict[str, jax.Array] = {}
    like = flatten(params)[0]
    for x in residuals:
        for path, rows in zip(flatten(x.value)[0], whole_of(x), strict=True):
            mean = jnp.mean(rows, axis=0).reshape(like[path].shape)
            owed[path] = owed[path] + mean.astype(owed[path].dtype) if path in owed else mean
    return owed


@jax.jit
def _moved(params: Any, owed: dict[str, jax.Array], learning_rate: Any) -> Any:
    """The parameters minus learning_rate times the debt."""
    leaves, treedef = flatten(params)
    moved = [
        (widen(x) - learning_rate * widen(owed[path])).astype(x.dtype) if path in owed else x
        for path, x in leaves.items()
    ]
    return jax.tree.unflatten(treedef, moved)


def _kept(after: Any, before: Any, stays: Callable[[Any], bool]) -> Any:
    """`after`, but states for which `stays` holds are as they were before."""
    whole = lambda x: _of_codec(x) or _of_losses(x)  # noqa: E731
    return jax.tree.map(lambda new, old: old if stays(new) else new, after, before, is_leaf=whole)


def _of_codec(x: Any) -> bool:
    return is_compressor_state(x) or is_per_worker(x)


def _of_losses(x: Any) -> bool:
    """Whether a state follows the loss; a flush has no loss."""
    return isinstance(x, optax.contrib.ReduceLROnPlateauState)


def _require_share(
    tx: optax.GradientTransformationExtraArgs, axes: tuple[str, ...], params: Any, opt_state: Any, at_least: float
) -> None:
    """Refuses a flush if the rest of the chain would apply too small a share of it.

    If the pending gradient is not finite, nothing is refused, because such a flush is skipped.
    """
    if at_least <= 0:
        return
    sizes, points = np.meshgrid(np.array(SMALLER, np.float32), np.array(POINTS, np.float32))

    @jax.jit
    def responses(params, opt_state):
        return jax.lax.map(
            lambda at: _response(tx, axes, params, opt_state, *at), (sizes.reshape(-1), points.reshape(-1))
        )

    got = jax.device_get(responses(params, opt_state))
    got = got * np.sign(got[np.argmax(np.abs(got))])  # a chain without a learning rate moves up along the debt
    now, most = float(got[0]), float(np.max(got))
    if now < at_least * most:
        share = max(now, 0.0) / most
        raise ValueError(
            f"flush would apply {share:.1%} of what residuals hold, less than at_least={at_least}: the rest of tx "
            "shrinks it more than smaller or earlier gradients. Clipping does that, a learning rate that has fallen, "
            "or Adam's division. Nothing was changed. To apply all of it, past the rest of tx, give flush a "
            "learning_rate=, the factor for it; to accept the share give at_least=0"
        )


def _response(
    tx: optax.GradientTransformationExtraArgs,
    axes: tuple[str, ...],
    params: Any,
    opt_state: Any,
    size: Any,
    point: Any,
) -> Any:
    """How far a step moves the parameters in the direction of the debt, for each unit of debt.

    Args:
      tx: the optimiser.
      axes: the axes of the workers.
      params: the parameters.
      opt_state: its state, in the global form.
      size: the debt in this step, as a share of the real debt.
      point: where schedules are, from 0, their beginning, to 1, now.
    """
    owed = _mean_owed(_owed(opt_state), params)
    updates = functools.partial(_updates, tx, axes, params, _earlier(opt_state, point))
    steps = flatten(jax.tree.map(jnp.subtract, updates(jnp.float32(0)), updates(size)))[0]
    along = [jnp.sum(x * steps[path].astype(x.dtype)).astype(jnp.float32) for path, x in owed.items()]
    return jnp.sum(jnp.stack(along)) / size


def _updates(
    tx: optax.GradientTransformationExtraArgs, axes: tuple[str, ...], params: Any, opt_state: Any, size: Any
) -> Any:
    """The updates of a flush on a single worker, which owes the share `size` of the debt."""
    state = _as_of_one_worker(opt_state, size)
    zeros, loss = jax.tree.map(jnp.zeros_like, params), jnp.float32(0)

    def worker(_):
        return update_of(tx, dict.fromkeys(axes, 1), zeros, state, params, loss, flush=True)[0]

    for axis in axes:
        worker = jax.vmap(worker, axis_name=axis)
    return jax.tree.map(lambda x: jnp.squeeze(x, tuple(range(len(axes)))), worker(jnp.zeros((1,) * len(axes))))


def _as_of_one_worker(opt_state: Any, size: Any) -> Any:
    """The local form of the state of a single worker, which owes `size` times the mean debt of all."""

    def one(x: Any) -> Any:
        if not is_per_worker(x):
            return x
        share = size if x.role in ("owed", "pending") else jnp.float32(1)
        leaves, treedef = jax.tree.flatten(alone(x))
        return jax.tree.unflatten(treedef, [rows * share.astype(rows.dtype) for rows in leaves])

    return jax.tree.map(one, opt_state, is_leaf=is_per_worker)


def _earlier(opt_state: Any, point: Any) -> Any:
    """The state with its schedules, but no other counts, set back to a point of the run so far."""
    at = lambda tree: jax.tree.map(lambda n: jnp.floor(n.astype(jnp.float32) * point).astype(jnp.result_type(n)), tree)  # noqa: E731
    injects = lambda x: isinstance(x, optax.InjectStatefulHyperparamsState)  # noqa: E731
    schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731

    def set_back(x: Any) -> Any:
        if schedule(x):
            return at(x)
        if injects(x):
            back = _earlier(x.inner_state, point)
            return x._replace(hyperparams_states=at(x.hyperparams_states), inner_state=back)
        return x

    return jax.tree.map(set_back, opt_state, is_leaf=lambda x: schedule(x) or injects(x))
