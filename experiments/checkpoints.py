"""Checkpoints of a run, by Orbax: all that it needs to go on to the bits it would have reached.

A checkpoint is a directory, named by its step, that Orbax renames to that name once it is complete, and has two
parts: "state", the arrays, and "run", JSON: the settings, the figures so far, and a digest of both parts, since
not every damaged file is unreadable. Where a checkpoint is damaged, the one before it is used.
"""

import contextlib
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


def manager(folder: pathlib.Path) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in a folder, the last two of which are kept.

    It writes while the training waits, so that a failure is known when it happens. What a killed run left half
    written is removed.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(folder: pathlib.Path, step: int, workers: int, settings: dict[str, Any], arrays: Any, figures: Any) -> None:
    """Writes a checkpoint; earlier ones stay until it is complete.

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
    run = {"workers": workers, "settings": settings, "figures": figures}
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # what fails in Orbax's threads is logged there, and raised here as well
    try:
        # Known beforehand in one sentence, where Orbax's threads would print hundreds of lines.
        needed, free = sum(np.asarray(x).nbytes for x in jax.tree.leaves(host)), shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"it takes {needed / 1e6:.1f} MB, of which the disk has {free / 1e6:.1f}")
        with manager(folder) as writer:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(host), run=ocp.args.JsonSave(run | {"digest": _digest(host, run)})
            )
            writer.save(step, args=args)
    except (OSError, ValueError, RuntimeError) as error:
        # Orbax's errors of files are of many types, and of many lines.
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written to {folder}, earlier ones are as they were: {reason}"
        ) from error
    finally:
        logging.set_verbosity(before)


def restore(folder: pathlib.Path, settings: dict[str, Any], like: Callable[[int], Any], say: Say) -> Saved | None:
    """The newest checkpoint that is whole.

    A damaged one is named, and its directory renamed to end in ".damaged".

    Args:
      folder: of the run's checkpoints.
      settings: of this run.
      like: from a number of workers to a tree of arrays like those saved.
      say: called with what the user should know.

    Returns:
      None where there is no checkpoint at all.

    Raises:
      CheckpointError: the checkpoint is of other settings, or none is whole.
    """
    with manager(folder) as reader:
        steps = sorted(reader.all_steps(), reverse=True)
        for step in steps:
            try:
                run = _read(reader, step, "run", ocp.args.JsonRestore())
                digest = run.pop("digest")
                workers, figures, saved_settings = run["workers"], run["figures"], run["settings"]
            except Exception as error:  # a damaged file can fail in any way
                _put_aside(folder, step, error, say)
                continue
            _require_same(folder, settings, saved_settings)
            target = like(workers)
            try:
                arrays = _read(reader, step, "state", ocp.args.StandardRestore(target))
                if _digest(arrays, run) != digest:
                    raise ValueError("its content does not match its digest")
            except Exception as error:
                _put_aside(folder, step, error, say)
                continue
            return Saved(step, workers, arrays, figures)
    if steps:
        raise CheckpointError(f"no checkpoint in {folder} is whole: remove that directory to start anew")
    return None


def _put_aside(folder: pathlib.Path, step: int, error: Exception, say: Say) -> None:
    aside = folder / f"{step}.damaged"
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
    (folder / str(step)).rename(aside)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    say(f"The checkpoint of step {step} is damaged ({reason}): it is now {aside}, and not used.")


def _read(reader: ocp.CheckpointManager, step: int, part: str, args: Any) -> Any:
    return reader.restore(step, args=ocp.args.Composite(**{part: args}))[part]


def _require_same(folder: pathlib.Path, settings: dict[str, Any], saved: dict[str, Any]) -> None:
    differing = [
        f"{key}={saved.get(key)!r}, not {settings.get(key)!r}"
        for key in {**saved, **settings}
        if saved.get(key) != settings.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoints in {folder} are of a run with {'; '.join(differing)}: give the settings of that run to "
            "go on with it, or another --checkpoint_dir"
        )


def _digest(arrays: Any, run: dict[str, Any]) -> str:
    """SHA-256 of what the arrays hold, by path, and of the JSON."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode())
    for path, x in jax.tree_util.tree_leaves_with_path(arrays):
        x = np.ascontiguousarray(x)
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
        digest.update(x.data)
    return digest.hexdigest()
