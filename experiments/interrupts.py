"""Ctrl-C as a request to stop at the next good moment."""

import contextlib
import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# One process of several asks jax with numbers that only grow, from one run to the next too: jax stops all of them at
# the number after the largest that it knows.
QUESTIONS = itertools.count(1)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """In this context Ctrl-C (or SIGTERM) makes the function that it yields true; a second one interrupts at once.

    With several processes a signal to one of them makes it true in all, at the same call: each calls it as often as the
    others. There jax catches SIGTERM, and tells the others about it.
    """
    several = jax.process_count() > 1
    asked: list[int] = []
    agreed: list[int] = []

    def ask(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        print("Stopping where it can go on later; once more stops at once.", file=sys.stderr)
        if several:
            signal.raise_signal(signal.SIGTERM)

    def interrupted() -> bool:
        if several and not agreed and multihost_utils.reached_preemption_sync_point(next(QUESTIONS)):
            agreed.append(signal.SIGTERM)
        return bool(agreed if several else asked)

    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
