"""A whole step that was written for one device: all workers run it, each on its part of the batch."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gradcomp_jax import varying
from gradcomp_jax.arguments import shown
from gradcomp_jax.entry import is_key, require_key
from gradcomp_jax.exchange import collectives
from gradcomp_jax.jitted import Jitted, emulates
from gradcomp_jax.mesh import automatic, in_automatic_axes, require_mesh
from gradcomp_jax.modules import is_module
from gradcomp_jax.placing import require_divisible
from gradcomp_jax.returned import Returned, along, returned
from gradcomp_jax.sharding import local_state, marked, specs_of

_PARTS = (
    "the step has a collective in a branch or loop that some workers may take and others not, by what differs between "
    "them: they would wait for each other for ever. Let jax.lax.pmean, or pmax, make the same on all what decides"
)


def data_parallel(
    step: Callable[..., Any] | None = None,
    *,
    mesh: Mesh | None = None,
    batch: str | Sequence[str] = "batch",
    rng: str | Sequence[str] = (),
    donate: str | Sequence[str] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> Any:
    """Turns a training step for one device into one for all workers; use it instead of `jax.jit`.

    Each worker runs the whole step on its part of the batch. So its gradients are its own when they reach the codec,
    which is first in the optimiser's chain. The outputs of the step are sorted when it is traced:

    - An output with the structure of an argument, or of a tree in an argument, is passed on: a TrainState, parameters,
      an optimiser's state. It must be the same on all workers, or it is refused by name; so nothing is trained without
      a codec by mistake. (A single number has no structure.) In a step in which a gradient is not finite on any worker
      it stays as it was. Only `skipped`, the count of bits, the scale of `loss_scaled` and the pending
      gradient of `delayed` go on.
    - All other outputs, such as the loss and metrics, are reduced over the workers in one small message: floating
      arrays are averaged, whole numbers are summed. `wire_bits` counts the codec's bits, not that message.

    `train_step` sends the loss in the codec's own message, and takes auxiliary outputs and model state.

    Args:
      step: a function of arrays and trees of them, such as `step(state, batch, key) -> (state, loss)`; None for use as
        a decorator with settings.
      mesh: the workers, by default all devices, taken when the step is first called.
      batch: the names of the arguments whose leaves are split over the workers along their first axis.
      rng: the names of the arguments that are random keys; each worker folds its index into them. A key that is not
        named draws the same numbers on all workers, with a warning.
      donate: the names of the arguments whose memory is reused; they cannot be read afterwards.
      compiler_options: as in `train_step`.

    Returns:
      The step over all workers. It is called as before, and has `lower` and `trace` like jax.jit. It takes a fresh
      TrainState; an optimiser's state by itself must come from `init(tx, params, mesh)`.

    Raises:
      ValueError: the step has no such arguments. When called: an output is refused, see above; or the batch does not
        divide among the workers, or is one process's of several.

    >>> import jax, jax.numpy as jnp, optax
    >>> import gradcomp_jax as gcj
    >>> tx = optax.chain(gcj.powersgd(rank=2), optax.sgd(0.1))
    >>> @gcj.data_parallel(mesh=gcj.make_mesh(1))
    ... def step(params, opt_state, batch):
    ...     loss, grads = jax.value_and_grad(lambda p: jnp.mean((batch @ p) ** 2))(params)
    ...     updates, opt_state = tx.update(grads, opt_state, params)
    ...     return optax.apply_updates(params, updates), opt_state, loss
    >>> params = jnp.ones((16, 16))
    >>> params, opt_state, loss = step(params, gcj.init(tx, params, gcj.make_mesh(1)), jnp.ones((4, 16)))
    """
    settings: dict[str, Any] = {
        "mesh": mesh,
        "batch": batch,
        "rng": rng,
        "donate": donate,
        "compiler_options": compiler_options,
    }
    if step is None:
        return functools.partial(data_parallel, **settings)
    if not callable(step):
        raise ValueError(f"step={shown(step)} must be a function, such as step(state, batch) -> (state, loss)")
    return Parallel(step, **settings)


class Parallel:
    """A step made by `data_parallel`."""

    def __init__(self, step: Any, mesh: Any, batch: Any, rng: Any, donate: Any, compiler_options: Any):
        functools.update_wrapper(self, step)
        self._step, self._given_mesh = step, mesh
        self._signature = inspect.signature(step)
        names = list(self._signature.parameters)
        places = functools.partial(_places, names)
        self._batches, self._keys = places("batch", batch), places("rng", rng)
        if not self._batches:
            raise ValueError("batch=() names no argument: each worker would compute the same")
        options = None if compiler_options is None else dict(compiler_options)
        self._jitted = jax.jit(self._on_mesh, donate_argnums=places("donate", donate), compiler_options=options)

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return automatic(require_mesh(self._given_mesh, or_workers=False))

    @functools.cached_property
    def _caller(self) -> Jitted:
        return Jitted(self._mesh)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = list(self._bound(args, kwargs))
        if any(map(is_module, given)):
            raise ValueError(
                "data_parallel takes steps of arrays, and a module of Flax's NNX is changed in place: use "
                "train_step(loss_fn, tx), whose step takes (model, optimizer, batch)"
            )
        for k, x in enumerate(given):
            if k in self._batches:
                self._caller.require_of_all(x)
            elif k not in self._keys and any(np.ndim(leaf) for leaf in jax.tree.leaves(x)):
                given[k] = self._caller.placed(x)
        return self._caller.run(self._jitted, given, lambda out: (jax.tree.leaves(out) or [None])[-1])

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return in_automatic_axes(self._mesh, self._jitted.trace)(*self._bound(args, kwargs))

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return in_automatic_axes(self._mesh, self._jitted.lower)(*self._bound(args, kwargs))

    def _bound(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise ValueError(f"the step's argument {next(iter(bound.kwargs))!r} is keyword-only: make it one by place")
        return bound.args

    def _on_mesh(self, *args: Any) -> Any:
        axes = tuple(self._mesh.axis_names)
        specs = []
        for k, x in enumerate(args):
            if k in self._batches:
                require_divisible(x, self._mesh.size, f"the mesh's {self._mesh.size} workers")
            name = list(self._signature.parameters)[k]
            if k in self._keys:
                require_key(f"the step's argument {name!r}", x)
            elif k not in self._batches and is_key(x):
                warnings.warn(
                    f"the step's argument {name!r} is a random key, and all workers draw the same numbers from it: "
                    f"name it in data_parallel(rng={name!r}), so that each worker folds its index into it",
                    stacklevel=2,
                )
            specs.append(P(axes) if k in self._batches else specs_of(x))
        leads = sorted({x.leading for x in marked(args)}, key=str)
        made: list[Returned] = []

        def worker(*args: Any) -> Any:
            with collectives.in_order() if emulates(self._mesh) else contextlib.nullcontext():
                made.append(self._worker(args, axes))
            leaves, _ = jax.tree.flatten(made[-1].out)
            of = lambda lead: [x for x, its in zip(leaves, made[-1].leads, strict=True) if its == lead]  # noqa: E731
            return of(()), tuple(map(of, leads))

        out_specs = (P(), tuple(P(*lead) for lead in leads))
        same, apart = jax.shard_map(
            worker, mesh=self._mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False
        )(*args)
        queues = {(): iter(same), **{lead: iter(xs) for lead, xs in zip(leads, apart, strict=True)}}
        leaves = [next(queues[lead]) for lead in made[-1].leads]
        return jax.tree.unflatten(jax.tree.structure(made[-1].out), leaves)

    def _worker(self, args: Sequence[Any], axes: tuple[str, ...]) -> Returned:
        """Runs the step on one worker's arguments; in shard_map, without types."""
        index, own = collectives.worker_index(axes), self._batches + self._keys
        mine = [jax.random.fold_in(x, index) if k in self._keys else local_state(x) for k, x in enumerate(args)]
        given = [along(x, axes if k in own else ()) for k, x in enumerate(mine)]
        closed, shapes = jax.make_jaxpr(self._step, return_shape=True)(*mine)
        try:
            differs = varying.outputs(closed, jax.tree.leaves(given))
        except varying.PartingError as error:
            raise ValueError(_PARTS) from error
        treedef = jax.tree.structure(shapes)
        out = jax.tree.unflatten(treedef, jax.extend.core.jaxpr_as_fun(closed)(*jax.tree.leaves(mine)))
        passed = [x for k, x in enumerate(mine) if k not in own]
        rows = {x.shape[0] for k in self._batches for x in jax.tree.leaves(mine[k])}
        keys = [mine[k] for k in self._keys]
        return returned(out, jax.tree.unflatten(treedef, differs), passed, keys, rows)


def _places(names: Sequence[str], setting: str, given: str | Sequence[str]) -> tuple[int, ...]:
    """The places of arguments that a setting names."""
    given = (given,) if isinstance(given, str) else tuple(given)
    if missing := [name for name in given if name not in names]:
        raise ValueError(
            f"{setting}={missing[0]!r} is no argument of the step, which has {', '.join(names)}: name the right one by "
            f"data_parallel({setting}=...)"
        )
    return tuple(map(names.index, given))
