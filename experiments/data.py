"""Image data sets, in memory: scikit-learn's handwritten digits, and CIFAR-10 from its official files."""

import os
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_FILE_ROWS = 10_000
CIFAR10_TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR10_TEST_FILE = "test_batch"
DIGITS_TEST_ROWS = 360


class DataError(Exception):
    """The data are not where, or not what, they should be."""


class Split(NamedTuple):
    """Images with their classes.

    Attributes:
      images: uint8 [rows, height, width, channels].
      labels: int32 [rows].
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set of images in ten classes.

    Attributes:
      name: of the data set.
      train: the split to learn from.
      test: the split to be judged by.
      mean: of the training split, by channel, float32 [channels].
      std: likewise.
    """

    name: str
    train: Split
    test: Split
    mean: np.ndarray
    std: np.ndarray

    @property
    def channels(self) -> int:
        return self.train.images.shape[-1]

    def normalize(self, images: Any) -> Any:
        """Images of pixels, as float32 of mean 0 and standard deviation 1 in each channel."""
        return (images.astype(np.float32) - self.mean) / self.std


def load(name: str, data_dir: str | None) -> Dataset:
    """The data set `name`, "digits" or "cifar10".

    Args:
      name: of the data set.
      data_dir: where CIFAR-10's files are, see `cifar10`; digits need none.

    Raises:
      DataError: a file is missing or wrong.
    """
    train, test = digits() if name == "digits" else cifar10(data_dir)
    # numpy's default, float64: float32 would lose digits in sums over millions of pixels.
    mean, std = (np.asarray(f(train.images, axis=(0, 1, 2)), np.float32) for f in (np.mean, np.std))
    return Dataset(name, train, test, mean, std)


def digits() -> tuple[Split, Split]:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: 1,437 to train, 360 to test.

    The split is always the same, and has the classes in equal shares.
    """
    source: Any = load_digits()
    images = source.images.astype(np.uint8)[..., None]
    labels = source.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST_ROWS, random_state=0, stratify=labels)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def cifar10(data_dir: str | None) -> tuple[Split, Split]:
    """CIFAR-10 (Krizhevsky 2009) from the files of its official "python version".

    Args:
      data_dir: the folder cifar-10-batches-py, or the one that holds it; by default the environment
        variable GRADCOMP_DATA_DIR.

    Returns:
      50,000 images [32, 32, 3] to train and 10,000 to test.

    Raises:
      DataError: a file is missing or not what it should be.
    """
    given = data_dir or os.environ.get("GRADCOMP_DATA_DIR")
    if not given:
        raise DataError(f"no directory given for cifar10: {_WAYS_OUT}")
    folder = pathlib.Path(given)
    if folder.name != CIFAR10_FOLDER:
        folder /= CIFAR10_FOLDER
    parts = [_cifar10_file(folder / name) for name in CIFAR10_TRAIN_FILES]
    train = Split(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))
    return train, _cifar10_file(folder / CIFAR10_TEST_FILE)


_WAYS_OUT = (
    "unpack cifar-10-python.tar.gz, from https://www.cs.toronto.edu/~kriz/cifar.html, and give the directory "
    f"that holds {CIFAR10_FOLDER} as --data_dir or in the environment variable GRADCOMP_DATA_DIR; or use "
    "--dataset=digits, which needs no files"
)


def _cifar10_file(path: pathlib.Path) -> Split:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): {_WAYS_OUT}") from error
    # A damaged stream of pickle opcodes can raise nearly anything.
    except Exception as error:
        raise DataError(f"{path} is not a whole batch file of CIFAR-10 ({error}): {_WAYS_OUT}") from error

    images: Any
    labels: Any
    images, labels = (content.get(key) if isinstance(content, dict) else None for key in (b"data", b"labels"))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (CIFAR10_FILE_ROWS, 3072):
        raise DataError(
            f"{path}: expected b'data' to be uint8 [{CIFAR10_FILE_ROWS}, 3072], got {_describe(images)}; {_WAYS_OUT}"
        )
    known = isinstance(labels, list) and all(isinstance(label, int) and 0 <= label <= 9 for label in labels)
    if not known or len(labels) != CIFAR10_FILE_ROWS:
        raise DataError(
            f"{path}: expected b'labels' to be a list of {CIFAR10_FILE_ROWS} ints from 0 to 9, got "
            f"{_describe(labels)}; {_WAYS_OUT}"
        )
    # Rows are the red, then the green, then the blue plane.
    return Split(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, np.int32))


class _ArraysOnly(pickle.Unpickler):
    """Reads plain containers and numpy arrays; any other name in the file is refused, not imported.

    A pickle may name any function and have it called. The official files were written by Python 2, newer
    copies by whatever made them, and name what makes an array as the numpy of their day did.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in _ARRAY_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")


_ARRAY_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
}


def _latin1(text: str, encoding: str) -> bytes:
    """How the older pickle protocols write bytes; only with this encoding."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are encoded as {encoding!r}, not latin1")
    return text.encode("latin1")


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list) else "nothing" if value is None else repr(type(value))


def batches(split: Split, size: int, seed: int, epoch: int) -> Iterator[Split]:
    """The batches of an epoch, in an order that `seed` and `epoch` alone decide; a last partial one is dropped."""
    order = np.random.default_rng((seed, epoch)).permutation(len(split.labels))
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield Split(split.images[rows], split.labels[rows])


def padded_batches(split: Split, size: int) -> Iterator[Split]:
    """All of a split in order; the last batch is filled up with blank images of class -1, which nobody guesses."""
    for start in range(0, len(split.labels), size):
        images, labels = split.images[start : start + size], split.labels[start : start + size]
        missing = size - len(labels)
        rows = [(0, missing)]
        yield Split(np.pad(images, rows + [(0, 0)] * 3), np.pad(labels, rows, constant_values=-1))
