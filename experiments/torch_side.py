"""The process of `experiments.torch_ddp` on this host: started, asked, and ended."""

import contextlib
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

WAYS = ("local", "powersgd", "ddp")  # dense steps come last: what follows their long messages is slower
PROGRAM = pathlib.Path(__file__).with_name("torch_ddp.py")


class TorchError(Exception):
    """PyTorch's process has ended by itself."""


class Process:
    """PyTorch's process, which waits while it is not asked.

    Attributes:
      told: what it told of itself: "torch", its version; "threads"; "parameters"; "loss", of the first step.
    """

    def __init__(self, child: "subprocess.Popen[str]"):
        self._child = child
        self.told = self._heard()

    def timed(self, way: str, steps: int) -> dict[str, float]:
        """The "seconds" of a step, and the bytes that were "counted" in it; every host has to ask for the same."""
        assert self._child.stdin
        with contextlib.suppress(BrokenPipeError):  # its end is told when nothing is heard
            print(way, steps, file=self._child.stdin, flush=True)
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise TorchError(f"PyTorch's process ended with exit code {self._child.wait()}; it printed the reason")
        return json.loads(line)


@contextlib.contextmanager
def started(
    python: str, params: Any, rows: tuple[np.ndarray, np.ndarray], settings: Mapping[str, Any]
) -> Iterator[Process]:
    """Starts PyTorch's process, and ends it afterwards.

    Args:
      python: the Python that has torch.
      params: the weights to start from.
      rows: this host's batch, x and labels.
      settings: its flags.

    Raises:
      TorchError: it has ended, such as where torch is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        arrays = pathlib.Path(folder) / "arrays.npz"
        found: Any = by_path(params) | {"x": rows[0], "labels": rows[1]}
        np.savez(arrays, **found)
        flags = [f"--{name}={value}" for name, value in settings.items()]
        # -P: the folder of the program has modules whose names torch or Python may want for its own.
        command = [python, "-P", str(PROGRAM), f"--arrays={arrays}", *flags]
        try:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise TorchError(f"--torch_python={python} cannot be run ({error.strerror})") from error
        with child:
            try:
                yield Process(child)
            finally:
                child.kill()


def by_path(params: Any) -> dict[str, np.ndarray]:
    """The arrays of a module's parameters by path, such as "blocks/0/qkv/kernel"."""
    text = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")  # noqa: E731
    return {text(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
