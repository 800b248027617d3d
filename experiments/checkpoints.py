"""Checkpoints of a run, written with Orbax: a run that goes on from one reaches the same bits as without a stop.

A checkpoint is a directory with its step as the name. Orbax gives it that name once it is complete. It has two parts:
"state", the arrays; and "run", JSON with the settings, the figures so far, and digests of both parts, because a damaged
file may still be readable. If a checkpoint is damaged, the one before it is used.
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
      step: the number of steps done.
      workers: the number of workers that the state was split among.
      arrays: the state, on the host.
      figures: the records of the run so far, as they were given to `save`.
    """

    step: int
    workers: int
    arrays: Any
    figures: Any


@contextlib.contextmanager
def owned(folder: pathlib.Path) -> Iterator[None]:
    """In this context the folder is this process's: two that write the same checkpoints would undo each other's work.

    Raises:
      CheckpointError: the folder is another process's, or it cannot be written to.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is at this run, whose checkpoints are in {folder}: wait for it, or give another "
                "--checkpoint_dir"
            ) from error
        except OSError as error:
            raise CheckpointError(f"no checkpoints can be kept in {folder}: {error.strerror}") from error
        yield


def _manager(folder: pathlib.Path, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager; the training waits while it writes, so that a failure shows when it happens."""
    settings = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    return ocp.CheckpointManager(folder.absolute(), options=settings)


def save(folder: pathlib.Path, step: int, workers: int, settings: dict[str, Any], arrays: Any, figures: Any) -> None:
    """Writes a checkpoint. The last two are kept; earlier ones stay until this one is complete.

    Args:
      folder: the folder of the run's checkpoints.
      step: the number of steps done.
      workers: the number of workers that the state is split among.
      settings: the settings that another run must share to go on from this checkpoint.
      arrays: the state.
      figures: the records of the run so far, JSON.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    host = jax.device_get(arrays)
    run = {"workers": workers, "settings": settings, "figures": figures, "layout": _layout(host)}
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(host),
        run=ocp.args.JsonSave({"run": run, "run_sha256": _json_sha256(run), "state_sha256": _state_sha256(host)}),
    )
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # Orbax logs failures in its threads, and raises them here as well
    try:
        # Checked beforehand, for an error of one sentence: Orbax's threads would print hundreds of lines.
        needed, free = sum(np.asarray(x).nbytes for x in jax.tree.leaves(host)), shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"it takes up to {needed / 1e6:.1f} MB, of which the disk has {free / 1e6:.1f}")
        # The manager removes the half-written checkpoint of a killed run.
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
                shutil.rmtree(aside, ignore_errors=True)  # from an earlier time
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


def _state_sha256(arrays: Any) -> str:
    digest = hashlib.sha256()
    for x in jax.tree.leaves(arrays):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
