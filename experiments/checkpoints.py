"""Checkpoints of a run, written with Orbax: a run that goes on from one reaches the same bits as without a stop.

A checkpoint is a directory with its step as the name. Orbax gives it that name once it is complete. It has two parts:
"state", the arrays; and "run", JSON with the settings, the figures so far, and digests of both parts, because a damaged
file may still be readable. If a checkpoint is damaged, the one before it is used.

Of several processes each writes and reads the rows of its own workers, and the first one all else.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import PartitionSpec as P

from experiments import together
from experiments.records import differences
from gradcomp_jax.sharding import specs_of

Say = Callable[[str], None]


class CheckpointError(Exception):
    """A checkpoint cannot be written, or there is none that this run can go on from."""


class Saved(NamedTuple):
    """A checkpoint.

    Attributes:
      step: the number of steps done.
      workers: the number of workers that the state was split among.
      arrays: the state, where it was asked for.
      figures: the records of the run so far, as they were given to `save`.
      digest: what the digest of the whole state should be.
    """

    step: int
    workers: int
    arrays: Any
    figures: Any
    digest: str


@contextlib.contextmanager
def owned(folder: pathlib.Path) -> Iterator[None]:
    """In this context the folder is this run's: two that write the same checkpoints would undo each other's work.

    Raises:
      CheckpointError: the folder is another run's, or it cannot be written to, or this process does not see what the
        first one writes there.
      OtherProcessError: one of these happened in another process.
    """
    with contextlib.ExitStack() as held:
        mark = ""
        with together.all_or_none():
            if together.is_first():
                mark = _locked(folder, held)
        mark, *_ = together.told(mark)
        with together.all_or_none():
            _require_mark(folder, mark)
        yield


def _locked(folder: pathlib.Path, held: contextlib.ExitStack) -> str:
    """Locks the folder, and returns what its file "lock" holds now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((folder / "lock").open("a"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        lock.truncate(0)
        lock.write(mark := uuid.uuid4().hex)
        lock.flush()
        os.fsync(lock.fileno())  # so that other hosts read it too, on a file system over a network
        return mark
    except BlockingIOError as error:
        raise CheckpointError(
            f"another process is at this run, whose checkpoints are in {folder}: wait for it, or give another "
            "--checkpoint_dir"
        ) from error
    except OSError as error:
        raise CheckpointError(f"no checkpoints can be kept in {folder}: {error.strerror}") from error


def _require_mark(folder: pathlib.Path, mark: str) -> None:
    try:
        seen = (folder / "lock").read_text() == mark
    except OSError:
        seen = False
    if not seen:
        raise CheckpointError(
            f"{folder} is not the directory in which the first process keeps its checkpoints: --checkpoint_dir must be "
            "on a file system that all processes see, and the same for all"
        )


class _Manager(ocp.CheckpointManager):
    """Orbax's manager; the training waits while it writes, so that a failure shows when it happens."""

    def __init__(self, folder: pathlib.Path, **options: Any):
        settings = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
        super().__init__(folder.absolute(), options=settings)

    def reached_preemption(self, step: int) -> bool:
        """False: `interruptible` asks jax, which expects one series of growing numbers, and these are others."""
        return False


def save(folder: pathlib.Path, step: int, workers: int, settings: dict[str, Any], arrays: Any, figures: Any) -> None:
    """Writes a checkpoint. The last two are kept; earlier ones stay until this one is complete.

    Args:
      folder: the folder of the run's checkpoints.
      step: the number of steps done.
      workers: the number of workers that the state is split among.
      settings: the settings that another run must share to go on from this checkpoint.
      arrays: the state.
      figures: the records of the run so far, JSON.

    Ends the program if one of several processes cannot write, because the others wait for it.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    arrays = jax.device_get(arrays) if jax.process_count() == 1 else arrays
    run = {"workers": workers, "settings": settings, "figures": figures, "layout": _layout(arrays)}
    digests = {"run_sha256": _json_sha256(run), "state_digest": _whole_digest(_digest(arrays))}
    args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), run=ocp.args.JsonSave({"run": run, **digests}))
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # Orbax logs failures in its threads, and raises them here as well
    writing = False
    try:
        # Checked beforehand, for an error of one sentence: Orbax's threads would print hundreds of lines.
        needed, writing = sum(x.nbytes for x in jax.tree.leaves(arrays)), jax.process_count() > 1
        free = int(together.told(str(shutil.disk_usage(folder).free))[0])
        if free < needed:
            writing = False  # all know it
            raise OSError(f"it takes up to {needed / 1e6:.1f} MB, of which the disk has {free / 1e6:.1f}")
        writing = jax.process_count() > 1
        # The manager removes the half-written checkpoint of a killed run.
        with _Manager(folder, max_to_keep=2, cleanup_tmp_directories=True) as manager:
            if not manager.save(step, args=args):
                raise OSError("there is one of that step, or of a later one")
    except (OSError, ValueError, RuntimeError) as error:  # Orbax's errors of files are of many types
        told = f"The checkpoint of step {step} cannot be written to {folder}, earlier ones are as they were: "
        told += _first_line(error)
        if writing:
            sys.exit(f"error: {told}")
        raise CheckpointError(told) from error
    finally:
        logging.set_verbosity(before)


def restore(folder: pathlib.Path, settings: dict[str, Any], like: Callable[[int], Any], say: Say) -> Saved | None:
    """The newest checkpoint that is whole.

    Checkpoints after it are damaged. They are reported, and their directories get names that end in ".damaged".

    Args:
      folder: the folder of the run's checkpoints.
      settings: the settings of this run.
      like: a function from a number of workers to a tree of arrays like the saved ones.
      say: a function that is called with sentences for the user.

    Returns:
      The checkpoint; None if there is none at all.

    Raises:
      CheckpointError: the checkpoint has other settings or another structure, or it cannot be read, or no checkpoint is
        whole. Then all are left as they are.
      OtherProcessError: one of these happened in another process.
    """
    damaged: dict[int, str] = {}
    # Each process reads alone: if one finds damage, the others do not wait for it inside Orbax.
    alone = jax.process_index()
    apart = ocp.options.MultiprocessingOptions(
        primary_host=alone, active_processes={alone}, barrier_sync_key_prefix=str(alone)
    )
    with _Manager(folder, multiprocessing_options=apart, create=False) as manager:
        # What the first process sees, for all: file systems over a network may show some hosts a new directory later.
        steps = json.loads(together.told(json.dumps(sorted(manager.all_steps(), reverse=True)[:20]))[0])
        for step in steps:
            with together.all_or_none():
                saved, own_digest, reason = _read_whole(manager, folder, step, settings, like)
            digest = _whole_digest(own_digest)
            reason = next(filter(None, together.told(reason)), "")
            if saved and not reason and digest != saved.digest:
                reason = "its arrays do not match their digest"
            if saved and not reason:
                if together.is_first():
                    _set_aside(folder, damaged, say)
                return saved
            damaged[step] = reason
    if damaged:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(f"no checkpoint in {folder} is whole ({reasons}): remove that directory to start anew")
    return None


def _read_whole(
    manager: _Manager, folder: pathlib.Path, step: int, settings: dict[str, Any], like: Callable[[int], Any]
) -> tuple[Saved | None, int, str]:
    """A checkpoint, the digest of what this process read of its arrays, and "", or the reason why it is damaged."""
    try:
        found = _read(manager, step, "run", ocp.args.JsonRestore())
        run = found["run"]
        if _json_sha256(run) != found["run_sha256"]:
            raise ValueError("its figures do not match their digest")
    except Exception as error:
        return None, 0, _damage(folder, step, error)
    if "state_digest" not in found:
        raise CheckpointError(f"the checkpoints in {folder} are of an earlier version: give another --checkpoint_dir")
    _require_same(folder, settings, run["settings"])
    target = like(run["workers"])
    _require_layout(folder, _layout(target), run["layout"])
    try:
        arrays = _read(manager, step, "state", ocp.args.StandardRestore(target))
        return Saved(step, run["workers"], arrays, run["figures"], found["state_digest"]), _digest(arrays), ""
    except Exception as error:
        return None, 0, _damage(folder, step, error)


def _set_aside(folder: pathlib.Path, damaged: dict[int, str], say: Say) -> None:
    """Gives damaged checkpoints other names."""
    for step, reason in damaged.items():
        aside = folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)  # from an earlier time
        (folder / str(step)).rename(aside)
        say(f"The checkpoint of step {step} is damaged ({reason}): it is now {aside}, and not used.")


def _read(manager: ocp.CheckpointManager, step: int, part: str, args: Any) -> Any:
    return manager.restore(step, args=ocp.args.Composite(**{part: args}))[part]


def _damage(folder: pathlib.Path, step: int, error: Exception) -> str:
    """The reason why a checkpoint is damaged; a damaged file can raise nearly any error.

    Raises:
      CheckpointError: the error is not the files' fault: they may be whole, but cannot be read.
    """
    other_fault = isinstance(error, PermissionError | MemoryError)
    if other_fault or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
        raise CheckpointError(f"the checkpoint of step {step} in {folder} cannot be read: {error}") from error
    return _first_line(error)


def _require_same(folder: pathlib.Path, settings: dict[str, Any], saved: dict[str, Any]) -> None:
    if difference := differences(saved, settings):
        raise CheckpointError(
            f"the checkpoints in {folder} are of a run with {difference}: give the settings of that run to go on with "
            "it, or another --checkpoint_dir and --out_dir"
        )


def _require_layout(folder: pathlib.Path, layout: list[str], saved: list[str]) -> None:
    if layout != saved:
        here, there = sorted(set(layout) - set(saved)), sorted(set(saved) - set(layout))
        raise CheckpointError(
            f"the checkpoints in {folder} are of a state of another structure, as another version of a library may "
            f"have: {', '.join(there[:3]) or 'nothing'} there, {', '.join(here[:3]) or 'nothing'} here; go on with the "
            "versions that the records name, or give another --checkpoint_dir"
        )


def _layout(arrays: Any) -> list[str]:
    """The path, type and shape of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return [f"{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)}" for path, x in leaves]


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(arrays: Any) -> int:
    """The sum of the SHA-256 of the parts that this process has, each with its name.

    What all workers share is a part, and so is each worker's row of the rest. So the sum over the processes does not
    depend on how the workers are spread over them.
    """
    leaves, specs = jax.tree_util.tree_leaves_with_path(arrays), jax.tree.leaves(specs_of(arrays))
    total = 0
    for (path, x), spec in zip(leaves, specs, strict=True):
        for row, part in _parts(x, shared=spec == P()):
            digest = hashlib.sha256(f"{jax.tree_util.keystr(path)} {row} ".encode())
            digest.update(np.asarray(part).tobytes())
            total += int.from_bytes(digest.digest())
    return total % 2**256


def _parts(x: Any, shared: bool) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of an array that count for this process, with their numbers. The first one has what all share."""
    if shared and together.is_first():
        yield 0, np.asarray(x)
    elif not shared and isinstance(x, jax.Array):
        for shard in x.addressable_shards:
            yield from enumerate(np.asarray(shard.data), shard.index[0].start or 0)
    elif not shared and together.is_first():  # each process has all rows
        yield from enumerate(x)


def _whole_digest(digest: int) -> str:
    """The digest of the whole state, from each process's own."""
    return f"{sum(int(own, 16) for own in together.told(f'{digest:x}')) % 2**256:064x}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
