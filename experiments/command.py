"""The common part of all programs: after a user's error, or after Ctrl-C, they end with one sentence."""

import contextlib
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

import jax
from absl import app, logging


def run(main: Callable[..., None], argv: list[str] | None = None, words: bool = False) -> None:
    """Runs a program, and ends the process.

    Args:
      main: the function to call once the flags are read.
      argv: the command line; by default that of the process.
      words: whether `main` is given the words that are no flags, such as all those after --.
    """

    def program(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # otherwise jax reports each kind of accelerator that is missing
        if argv[1:] and not words:
            sys.exit(f"error: {argv[1]!r} is no flag; all settings are given as --name=value")
        with _ended_at_once():
            try:
                main(argv[1:]) if words else main()
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.exit(130)

    app.run(program, argv=argv)


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """Ends a process that fails while others wait for it, as Python would, but at once: jax would wait for the others.

    After `together.part` nobody waits.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def directory(name: str, path: str) -> pathlib.Path:
    """The directory that a flag names, made if it does not exist; ends the program if it cannot be written to."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return pathlib.Path(path)
    except OSError as error:
        sys.exit(f"error: --{name}={path} is no directory to write in ({error.strerror}): give another")
