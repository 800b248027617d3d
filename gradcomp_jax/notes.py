"""What the library tells of itself: in the log, each thing once in a process; to those who listen to a trace."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

logger = logging.getLogger("gradcomp_jax")

MOST_KINDS = 16
MOST_PATHS = 2
ALONE = (
    "gradients are compressed for a single worker: nothing is sent (wire_bits says 0), so a step is slower and less "
    "exact for nothing. Give the mesh more devices, or try it on one: jax.config.update('jax_num_cpu_devices', 8) "
    "before jax is first used, or simulate(loss_fn, tx, workers=8)"
)

Leaf = tuple[str, Any, str]
"""A path, the leaf with shape and dtype, and what is said of it."""


_said: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("said", default=None)


@contextlib.contextmanager
def listening() -> Iterator[list[Any]]:
    """Here the list that this gives collects what is remarked while a program is traced, in its order."""
    said: list[Any] = []
    token = _said.set(said)
    try:
        yield said
    finally:
        _said.reset(token)


def remark(what: Callable[[], Any]) -> None:
    """Tells those who listen what `what` returns; where nobody does it is not called."""
    if (said := _said.get()) is not None:
        said.append(what())


def note(level: int, text: str) -> None:
    """Logs a text that has not been logged before."""
    if logger.isEnabledFor(level):
        _once(level, text)


@functools.lru_cache(maxsize=1024)
def _once(level: int, text: str) -> None:
    logger.log(level, "%s", text)


def alone() -> None:
    """Warns of a codec among one worker."""
    # No warning of Python's, which ends a test where warnings are errors; one worker may be meant there.
    note(logging.WARNING, ALONE)


def summary(codec: str, compressed: Sequence[Leaf], dense: Sequence[Leaf]) -> str:
    """Which leaves a codec compresses, and which travel as they are.

    Args:
      codec: its name.
      compressed: the leaves with what the codec takes each for.
      dense: the leaves with the reason of each.

    Returns:
      A line with the share, and one for each kind of leaves, those of most elements first, which a large tree does not
      make longer.
    """
    size, rest = (sum(leaf.size for _, leaf, _ in leaves) for leaves in (compressed, dense))
    count = len(compressed) + len(dense)
    head = (
        f"{codec} compresses {len(compressed)} of {count} leaves, {size / max(1, size + rest):.1%} of "
        f"{size + rest:,} elements"
    )
    kinds = _by_kind([(path, leaf, f"{_type(leaf)}{view and ' as '}{view}") for path, leaf, view in compressed])
    if len(kinds) > MOST_KINDS:
        kinds[MOST_KINDS:] = [f"and {len(kinds) - MOST_KINDS} more kinds, of fewer elements"]
    kinds += _by_kind([(path, leaf, f"dense, {why}") for path, leaf, why in dense])
    return "\n  ".join([head, *kinds])


def _by_kind(leaves: Sequence[Leaf]) -> list[str]:
    """A line for each text, with the paths of its leaves; by the number of their elements."""
    kinds: dict[str, list[Leaf]] = {}
    for one in leaves:
        kinds.setdefault(one[2], []).append(one)
    ordered = sorted(kinds.items(), key=lambda kind: -sum(leaf.size for _, leaf, _ in kind[1]))
    return [f"{_paths([path for path, *_ in alike])}: {text}" for text, alike in ordered]


def _paths(paths: Sequence[str]) -> str:
    more = len(paths) - MOST_PATHS
    return ", ".join(paths[:MOST_PATHS]) + f" and {more} more" * (more > 0)


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
