"""What all programs do alike: where a user has erred, or wants no more, they end in a sentence."""

import pathlib
import sys
import tempfile
from collections.abc import Callable

from absl import app, logging


def run(main: Callable[[], None], argv: list[str] | None = None) -> None:
    """Runs a program, and ends the process.

    Args:
      main: what it does once its flags are read.
      argv: the command line; by default as it was given.
    """

    def program(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # else jax tells of each kind of accelerator that is not there
        if argv[1:]:
            sys.exit(f"error: {argv[1]!r} is no flag; all settings are given as --name=value")
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(program, argv=argv)


def directory(name: str, path: str) -> pathlib.Path:
    """The directory that a flag names, made if it is not there; ends the program if nothing can be written in it."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return pathlib.Path(path)
    except OSError as error:
        sys.exit(f"error: --{name}={path} is no directory to write in ({error.strerror}): give another")
