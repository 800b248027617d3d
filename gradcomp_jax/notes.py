"""Messages of the library: to the log, each once in a process; and to listeners of a trace."""

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
    """Within this context the list collects, in order, what is remarked while a program is traced."""
    said: list[Any] = []
    token = _said.set(said)
    try:
        yield said
    finally:
        _said.reset(token)


def remark(what: Callable[[], Any]) -> None:
    """Gives listeners the result of `what`; without a listener `what` is not called."""
    if (said := _said.get()) is not None:
        said.append(what())


_quiet = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In this context nothing is logged, because what is traced is no step of the user's."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def note(level: int, text: str) -> None:
    """Logs a text that has not been logged before."""
    if logger.isEnabledFor(level) and not _quiet.get():
        _once(level, text)


@functools.lru_cache(maxsize=1024)
def _once(level: int, text: str) -> None:
    logger.log(level, "%s", text)


def alone() -> None:
    """Warns that a codec has only one worker."""
    # Not a warning of Python's, which ends a test if warnings are errors; one worker may be intended there.
    note(logging.WARNING, ALONE)


def summary(codec: str, compressed: Sequence[Leaf], dense: Sequence[Leaf]) -> str:
    """Which leaves a codec compresses, and which travel as they are.

    Args:
      codec: its name.
      compressed: the leaves, each with the codec's view of it.
      dense: the leaves, each with its reason.

    Returns:
      A line with the share, and one line for each kind of leaves. Kinds with the most elements come first. A large tree
      does not make the text longer.
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
    """A line for each text, with the paths of its leaves; texts with the most elements come first."""
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
