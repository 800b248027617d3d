"""A training loop that goes on without the workers that die, in the processes that survive.

Collectives are not atomic: when a worker dies within one, some of the others may get a result and some an error. So no
process takes over a step's result before all say that they have theirs. Until then the state from before the step is
kept. If one has failed, all repeat the step from there.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.lifeline import LOGGER, Lifeline, Met
from gradcomp_jax.mesh import automatic, require_mesh
from gradcomp_jax.survivors import moved, parts_in, processes_of, save_part, turned, without_others


def elastic(
    lifeline: Lifeline,
    make: Callable[[Mesh], Callable[[Any, int], tuple[Any, Any]]],
    state: Any,
    steps: Iterable[int],
    mesh: Mesh | None = None,
    *,
    checkpoint: str | os.PathLike | None = None,
) -> Iterator[tuple[int, Any, Any]]:
    """Trains with the workers that are left: when a process dies, the others drop it and repeat the step.

    The rows of the dead leave the state. The survivors' residuals stay as they are, bit for bit, so from then on the
    workers owe the mean of the survivors' residuals. What the dead owed is lost. If a worker dies between two steps, or
    when all others have a step's result, nothing is repeated.

    If the survivors cannot go on, each ends with a message, with the exit code 75, and saves what it holds of the last
    agreed state first: if process 0 dies, because jax's coordinator dies with it; on GPUs and TPUs; or if a slice loses
    a part of its chips. A process that was stopped, and that the others dropped, ends too.

    Args:
      lifeline: from `initialize_elastic`.
      make: (mesh) -> run, a function that makes the step for a mesh, such as by `train_step(loss_fn, tx, mesh)` with
        donate=False. It is called again for the mesh of the survivors. run(state, step) -> (state, result) does one
        step. By `share_of(mesh)` it knows which share of the step's rows is this process's. It must do the same each
        time it is called with the same arguments.
      state: a tree of arrays on the mesh, such as (params, opt_state). Other leaves must be the same on all processes.
      steps: the numbers of the steps, such as range(1000); the same in all processes.
      mesh: the first mesh, by default of all devices.
      checkpoint: a directory that all processes can write to. Where survivors cannot go on, each writes what it holds
        of the state to the file `step/process.npz` there, step being the one that comes next. `restore(checkpoint,
        like)` reads all of them. It must not have such files of an earlier run. Without a
        directory nothing is saved.

    Yields:
      (step, state, result), once all survivors have done the step.

    Raises:
      ValueError: the mesh is not of all processes of the lifeline, or its loop has ended already; `checkpoint` has
        what an earlier run saved; or the step donates the state.
    """
    mesh = automatic(require_mesh(mesh, or_workers=False))
    if lifeline.left:
        raise ValueError("the loop of this lifeline has ended: run all steps in one elastic(...)")
    if checkpoint is not None and parts_in(checkpoint, None):
        raise ValueError(
            f"checkpoint={os.fspath(checkpoint)!r} has what survivors of an earlier run saved: take it by "
            "restore(checkpoint, like), and give this run an empty directory"
        )
    if processes_of(mesh) != set(lifeline.members):
        raise ValueError(
            f"the mesh is of the processes {sorted(processes_of(mesh))}, and the lifeline of {list(lifeline.members)}: "
            "give a mesh of the devices of all"
        )
    if mesh.devices.flat[0].platform != "cpu":
        LOGGER.warning("on %s the survivors of a dead worker cannot go on: they end", mesh.devices.flat[0].platform)
    crew = _Crew(lifeline, make, mesh, state, checkpoint)
    try:
        for step in steps:
            result = crew.do(step)
            yield step, crew.state, result
    finally:
        lifeline.leave()


class _Crew:
    """The workers that are left, with the state that all of them agree on."""

    def __init__(self, lifeline: Lifeline, make: Callable[[Mesh], Any], mesh: Mesh, state: Any, checkpoint: Any):
        self._lifeline, self._make, self._checkpoint = lifeline, make, checkpoint
        self._mesh, self._run, self.state = mesh, make(mesh), state
        self._broken: set[tuple[int, ...]] = set()
        self._connected: set[tuple[int, ...]] = set()

    def _agree(self, state: Any, upcoming: int) -> None:
        self.state, self._upcoming = state, upcoming
        self._lifeline.watch(functools.partial(_save, self._checkpoint, self._lifeline.process, upcoming, state))

    def do(self, step: int) -> Any:
        """Does a step, as often as it takes until all have done it; returns its result."""
        self._agree(self.state, step)
        while True:
            self._meet(well=True)  # a pause of one worker does not count as time inside a collective
            outcome = _tried(self._run_on_mesh, self.state, step)
            if outcome is not None:
                _require_kept(self.state)
            if self._meet(outcome is not None, outcome) and outcome is not None:
                return outcome[1]

    def _run_on_mesh(self, state: Any, step: int) -> tuple[Any, Any]:
        if _order(self._mesh) not in self._connected:
            _connect(self._mesh)
            self._connected.add(_order(self._mesh))
        return self._run(state, step)

    def _meet(self, well: bool, outcome: tuple[Any, Any] | None = None) -> bool:
        """Whether all are well. If so, the state of the outcome is agreed on. Renews the mesh if need be."""
        met = self._lifeline.meet(well)
        if met.well and outcome is not None:
            self._agree(outcome[0], self._upcoming + 1)
        lost = processes_of(self._mesh) - set(met.members)
        if lost or not met.well:
            self._renew(lost, met)
        return met.well

    def _renew(self, lost: set[int], met: Met) -> None:
        """Another mesh: of the survivors; or in another order, if a collective failed among the living."""
        what = f"processes {sorted(lost)} are dead" if lost else "a collective failed, and no process is dead"
        if self._mesh.devices.flat[0].platform != "cpu":
            self._lifeline.end(f"{what}; only CPUs can go on from here")
        if not met.well:
            self._broken.add(_order(self._mesh))
        try:
            mesh = without_others(self._mesh, met.members)
        except ValueError as error:
            self._lifeline.end(str(error))
        # gloo never connects the same devices in the same order again.
        for _ in met.members:
            if _order(mesh) not in self._broken:
                break
            mesh = turned(mesh)
        else:
            self._lifeline.end(f"{what}, and gloo has connected the devices in each order of their processes already")
        LOGGER.warning("%s: processes %s go on from step %d", what, list(met.members), self._upcoming)
        self._mesh, self._run = mesh, self._make(mesh)
        self._agree(moved(self.state, mesh), self._upcoming)


def _connect(mesh: Mesh) -> None:
    """Lets devices connect, which they do in their first collective, before the step is compiled.

    There gloo waits for the dead without a limit. All have just met, so it is unlikely that one dies meanwhile.
    """
    names = tuple(mesh.axis_names)
    for axes in dict.fromkeys((names, *((name,) for name in names))):  # the same order in each process
        wire = Wire(axes)
        alike = lambda x, wire=wire: wire.total(x)[0]  # noqa: E731
        summed = jax.shard_map(alike, mesh=mesh, in_specs=P(names), out_specs=P(names), check_vma=False)
        ones = jax.make_array_from_callback(
            (mesh.size,), NamedSharding(mesh, P(names)), lambda _: np.ones(1, np.float32)
        )
        jax.block_until_ready(jax.jit(summed)(ones))


def _order(mesh: Mesh) -> tuple[int, ...]:
    return tuple(device.id for device in mesh.devices.flat)


def _save(checkpoint: Any, process: int, upcoming: int, state: Any) -> None:
    if checkpoint is not None:
        LOGGER.critical("process %d saves its part: %s", process, save_part(checkpoint, process, upcoming, state))


def _tried(run: Callable[[Any, int], tuple[Any, Any]], state: Any, step: int) -> tuple[Any, Any] | None:
    """The state and the result of a step; None if a collective failed."""
    try:
        return jax.block_until_ready(tuple(run(state, step)))
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if not any(library in str(error) for library in ("Gloo", "NCCL")):
            raise
        LOGGER.warning("step %s failed: %s", step, str(error).splitlines()[0])
        return None


def _require_kept(state: Any) -> None:
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state)):
        raise ValueError(
            "the step donated the state, which elastic needs until all processes have the next one: make the step "
            "with donate=False"
        )
