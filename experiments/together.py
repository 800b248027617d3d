"""What the processes of a run do together: all get through a part of the program, or all end."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

TOLD_BYTES = 500


class OtherProcessError(Exception):
    """Another process of this run cannot go on; the message tells which, and why."""


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def told(text: str) -> list[str]:
    """What each process tells, in their order: as much of its text as 500 bytes hold. All call it at the same point."""
    if jax.process_count() == 1:
        return [text]
    line = text.encode()[:TOLD_BYTES].ljust(TOLD_BYTES, b"\0")
    lines = multihost_utils.process_allgather(np.frombuffer(line, np.uint8))
    return [bytes(line).rstrip(b"\0").decode(errors="ignore") for line in lines]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A part of the program, without collectives, that all processes get through, or none.

    Raises:
      OtherProcessError: another process failed in it. A process that failed itself raises its own error.
    """
    failure: BaseException | None = None
    try:
        yield
    except (Exception, SystemExit) as error:
        failure = error
    reasons = told("" if failure is None else str(failure) or type(failure).__name__)
    failed = [f"process {number}: {reason}" for number, reason in enumerate(reasons) if reason]
    if failed:
        part()
    if failure is not None:
        raise failure
    if failed:
        raise OtherProcessError(failed[0])


def part() -> None:
    """The processes end together: each waits until all are here. Otherwise `command.run` ends a process at once."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
