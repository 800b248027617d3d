"""A jitted step that checks its arguments before jax does."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gradcomp_jax.compressor import skipped_steps
from gradcomp_jax.exchange import collectives
from gradcomp_jax.mesh import in_automatic_axes
from gradcomp_jax.modules import is_module
from gradcomp_jax.placing import in_global_form, is_train_state, place


class Jitted:
    """Calls a function of jax.jit on a mesh, or for a number of workers.

    With several processes, it refuses a batch of one of them. With several CPU devices, it begins when the step before
    is done. Each device may have 32 programs in flight. One more program waits on a thread of the pool that the
    programs before it need. If there are no more threads than devices, a loop that reads no results would hang.
    """

    def __init__(self, mesh: Mesh | int):
        self._mesh = mesh
        self._last: jax.Array | None = None
        devices = [] if isinstance(mesh, int) else list(mesh.devices.flat)
        self._devices = len(devices)
        self._processes = len({device.process_index for device in devices})
        self._one_at_a_time = not isinstance(mesh, int) and emulates(mesh)

    def run(self, step: Any, args: Sequence[Any], awaited: Callable[[Any], Any], alone: bool = False) -> Any:
        """The results of a step; `awaited` picks the result that the next step waits for.

        A step in which no device waits for another is `alone`, and need not wait itself.
        """
        last, self._last = self._last, None
        if last is not None and not alone and not last.is_deleted():
            jax.block_until_ready(last)
        try:
            results = in_automatic_axes(self._mesh, step)(*args)
        except ValueError as error:
            if "incompatible devices" not in str(error):
                raise
            raise ValueError(
                "some of the step's arrays are committed to other devices than its mesh, as a state that was restored "
                "from a checkpoint may be: place(opt_state, mesh) moves it, shard_batch(batch, mesh) a batch; see also "
                f"restore. {error}"
            ) from error
        last = awaited(results)
        if self._one_at_a_time and isinstance(last, jax.Array) and not isinstance(last, jax.core.Tracer):
            self._last = last
        return results

    def placed(self, tree: Any) -> Any:
        """Puts a tree that the workers share on the mesh; its first array tells where the tree is.

        Without this a step would compile twice: for the place of its argument, and for the place of its result.
        """
        first = next(iter(jax.tree.leaves(tree)), None)
        if isinstance(first, jax.core.Tracer | None):
            return tree
        tree = in_global_form(tree, self._mesh)
        if isinstance(self._mesh, int) or self._devices == 1:
            return tree
        tree = jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x, jnp.result_type(x)), tree)
        lies = isinstance(first, jax.Array) and first.sharding.num_devices == self._devices
        return tree if lies else place(tree, self._mesh)

    def by_compiler(self, rest: Any) -> bool:
        """Whether XLA spreads simulated workers over devices, on which the step's arguments after the state lie."""
        return isinstance(self._mesh, int) and any(map(_lies_on_several, jax.tree.leaves(rest)))

    def require_of_all(self, batch: Any) -> None:
        """Raises ValueError for a batch that one process holds alone, if there are several processes."""
        if self._processes > 1:
            _require_of_all(batch, self._processes)


class Step(Jitted):
    """A jitted step of `train_step` or `simulate`; other attributes are those of jax.jit's function."""

    def __init__(
        self,
        step: Callable[..., tuple[Any, ...]],
        mesh: Mesh | int,
        has_state: bool,
        donate: bool,
        compiler_options: dict[str, Any] | None,
        on_modules: Callable[[], Callable[..., Any]],
    ):
        super().__init__(mesh)
        self._on_modules = functools.cache(on_modules)
        self._has_state = has_state
        jitted = lambda f, count: jax.jit(  # noqa: E731
            f, donate_argnums=tuple(range(count + has_state)) if donate else (), compiler_options=compiler_options
        )
        self._apart, self._held = jitted(step, 2), jitted(held(step), 1)
        spread = by_compiler(step)
        self._spread = jitted(spread, 2), jitted(held(spread), 1)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if args and is_module(args[0]):
            return self._on_modules()(*args)
        own = 1 if args and is_train_state(args[0]) else 2
        rest = args[own:]
        if len(rest) > self._has_state:
            self.require_of_all(rest[self._has_state])
        args = (
            self.placed(args[0]),
            *args[1:own],
            *map(self.placed, rest[: self._has_state]),
            *rest[self._has_state :],
        )
        return self.run(self._of(args), args, lambda results: results[own + self._has_state])

    def _of(self, args: Sequence[Any]) -> Any:
        holds = bool(args) and is_train_state(args[0])
        if self.by_compiler(args[2 - holds :]):
            return self._spread[holds]
        return self._held if holds else self._apart

    def trace(self, *args: Any) -> Any:
        return in_automatic_axes(self._mesh, self._of(args).trace)(*args)

    def lower(self, *args: Any) -> Any:
        return in_automatic_axes(self._mesh, self._of(args).lower)(*args)

    def __getattr__(self, name: str) -> Any:
        if name == "_apart":  # an object that is being copied has none yet
            raise AttributeError(name)
        return getattr(self._apart, name)


def by_compiler(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of `simulate` whose workers XLA spreads over devices."""

    def only_sums(*args: Any) -> Any:
        with collectives.sums_only():
            return step(*args)

    return only_sums


def _lies_on_several(x: Any) -> bool:
    lies = getattr(x, "sharding", None)
    return lies is not None and lies.num_devices > 1 and not lies.is_fully_replicated


def held(step: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A step (params, opt_state, ...) -> (params, opt_state, ...) as (state, ...) -> (state, ...)."""

    def of_state(state: Any, *rest: Any) -> tuple[Any, ...]:
        params, opt_state, *others = step(state.params, state.opt_state, *rest)
        done = skipped_steps(opt_state) == skipped_steps(state.opt_state)
        count = jnp.asarray(state.step)
        return state.replace(step=count + done.astype(count.dtype), params=params, opt_state=opt_state), *others

    return of_state


def _require_of_all(batch: Any, processes: int) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if not isinstance(x, jax.core.Tracer) and not (isinstance(x, jax.Array) and not x.is_fully_addressable):
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path)!r} is {type(x).__name__} of this process alone, and the mesh "
                f"is of {processes} processes: a part of each one's rows would be dropped. Make it one array of all: "
                "shard_batch(batch, mesh), where each process gives its own rows"
            )


def emulates(mesh: Mesh) -> bool:
    """Whether several devices of the mesh are CPU devices of this process."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return len(local) > 1 and local[0].platform == "cpu"
