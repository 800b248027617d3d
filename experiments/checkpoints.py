"""Checkpoints of a run, by Orbax: all that it needs to go on to the bits it would have reached.

A checkpoint is a directory, named by its step, that Orbax renames to that name once it is complete, and has two
parts: "state", the arrays, and "run", JSON: the settings, the figures so far, and digests of both, since not every
damaged file is unreadable. Where a checkpoint is damaged, the one before it is used.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from experiments.records import differences

Say = Callable[[str], None]


class CheckpointError(Exception):
    """A checkpoint cannot be written, or there is none that this run can go on from."""


class Saved(NamedTuple):
    """A checkpoint.

    Attributes:
      step: the steps done.
      workers: among which the state was split.
      arrays: the state, on the host.
      figures: what the run has recorded so far, as it was given to `save`.
    """

    step: int
    workers: int
    arrays: Any
    figures: Any


@contextlib.contextmanager
def owned(folder: pathlib.Path) -> Iterator[None]:
    """Within it the folder is this process's: two that write the same checkpoints would undo each other's work.

    Raises:
      CheckpointError: it is another's, or cannot be written to.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up when the process ends, however it ends
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is at this run, whose checkpoints are in {folder}: wait for it, or give another "
                "--checkpoint_dir"
            ) from error
        except OSError as error:
            raise CheckpointError(f"no checkpoints can be kept in {folder}: {error.strerror}") from error
        yield


def _manager(folder: pathlib.Path, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager, which writes while the training waits, so that a failure is known when it happens."""
    settings = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    return ocp.CheckpointManager(folder.absolute(), options=settings)


def save(folder: pathlib.Path, step: int, workers: int, settings: dict[str, Any], arrays: Any, figures: Any) -> None:
    """Writes a checkpoint. The last two are kept; earlier ones stay until this one is complete.

    Args:
      folder: of the run's checkpoints.
      step: the steps done.
      workers: among which the state is split.
      settings: what another run must have in common to go on from it.
      arrays: the state.
      figures: what the run has recorded so far, JSON.

    Raises:
      CheckpointError: it cannot be written.
    """
    host = jax.device_get(arrays)
    run = {"workers": workers, "settings": settings, "figures": figures, "layout": _layout(host)}
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(host),
        run=ocp.args.JsonSave({"run": run, "run_sha256": _json_sha256(run), "state_sha256": _state_sha256(host)}),
    )
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # what fails in Orbax's threads is logged there, and raised here as well
    try:
        # Known beforehand in one sentence, where Orbax's threads would print hundreds of lines.
        needed, free = sum(np.asarray(x).nbytes for x in jax.tree.leaves(host)), shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"it takes up to {needed / 1e6:.1f} MB, of which the disk has {free / 1e6:.1f}")
        # What a killed run left half written is removed.
        with _manager(folder, max_to_keep=2, cleanup_tmp_directories=True) as manager:
            if not manager.save(step, args=args):
                raise OSError("there is one of that step, or of a later one")
    except (OSError, ValueError, RuntimeError) as error:  # Orbax's errors of files are of many types
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written to {folder}, earlier ones are as they were: "
            f"{_first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(before)


def restore(folder: pathlib.Path, settings: dict[str, Any], like: Callable[[int], Any], say: Say) -> Saved | None:
    """The newest checkpoint that is whole.

    Those after it are damaged: they are named, and their directories renamed to end in ".damaged".

    Args:
      folder: of the run's checkpoints.
      settings: of this run.
      like: from a number of workers to a tree of arrays like those saved.
      say: called with what the user should know.

    Returns:
      None where there is no checkpoint at all.

    Raises:
      CheckpointError: the checkpoint is of other settings or of another structure, or cannot be read, or none is
        whole. Then all are left as they are.
    """
    damaged: dict[int, str] = {}
    with _manager(folder) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                found = _read(manager, step, "run", ocp.args.JsonRestore())
                run = found["run"]
                if _json_sha256(run) != found["run_sha256"]:
                    raise ValueError("its figures do not match their digest")
            except Exception as error:
                damaged[step] = _damage(folder, step, error)
                continue
            _require_same(folder, settings, run["settings"])
            target = like(run["workers"])
            _require_layout(folder, _layout(target), run["layout"])
            try:
                arrays = _read(manager, step, "state", ocp.args.StandardRestore(target))
                if _state_sha256(arrays) != found["state_sha256"]:
                    raise ValueError("its arrays do not match their digest")
            except Exception as error:
                damaged[step] = _damage(folder, step, error)
                continue
            for later, reason in damaged.items():
                aside = folder / f"{later}.damaged"
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
                (folder / str(later)).rename(aside)
                say(f"The checkpoint of step {later} is damaged ({reason}): it is now {aside}, and not used.")
            return Saved(step, run["workers"], arrays, run["figures"])
    if damaged:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(f"no checkpoint in {folder} is whole ({reasons}): remove that directory to start anew")
    return None


def _read(manager: ocp.CheckpointManager, step: int, part: str, args: Any) -> Any:
    return manager.restore(step, args=ocp.args.Composite(**{part: args}))[part]


def _damage(folder: pathlib.Path, step: int, error: Exception) -> str:
    """What is wrong with a checkpoint; a damaged file can fail in any way, save by what is not its own fault.

    Raises:
      CheckpointError: the files may be whole, but cannot be read.
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
    """Path, type and shape of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return [f"{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)}" for path, x in leaves]


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _state_sha256(arrays: Any) -> str:
    digest = hashlib.sha256()
    for x in jax.tree.leaves(arrays):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
