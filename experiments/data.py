"""Image data sets in memory: scikit-learn's handwritten digits; CIFAR-10 and CIFAR-100 from their official files."""

import itertools
import os
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments import download

DATASETS = ("digits", "cifar10", "cifar100")
DIGITS_TEST_ROWS = 360


class Cifar(NamedTuple):
    """The layout of the "python version" of a CIFAR data set (Krizhevsky 2009).

    Attributes:
      classes: the number of classes, which have equal shares.
      label_key: the key of the list of classes in each file.
      train_files: the files that together hold the training split, in equal parts.
      test_file: the file that holds the test split.
      train_rows: the number of images in the training split.
      test_rows: the number of images in the test split.
      archive: the official archive.
    """

    classes: int
    label_key: bytes
    train_files: tuple[str, ...]
    test_file: str
    train_rows: int
    test_rows: int
    archive: download.Archive


_CIFAR10_TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))

# The site publishes MD5 sums, c58f30108f718f92721af3b95e74349a and eb9058c3a382ffc7106e4002c42a8d85. The stronger
# SHA-256 sums of the same archives are from Keras (keras/src/datasets/cifar10.py, cifar100.py).
CIFAR = {
    "cifar10": Cifar(
        classes=10,
        label_key=b"labels",
        train_files=_CIFAR10_TRAIN_FILES,
        test_file="test_batch",
        train_rows=50_000,
        test_rows=10_000,
        archive=download.Archive(
            url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            folder="cifar-10-batches-py",
            files=(*_CIFAR10_TRAIN_FILES, "test_batch"),
        ),
    ),
    "cifar100": Cifar(
        classes=100,
        label_key=b"fine_labels",
        train_files=("train",),
        test_file="test",
        train_rows=50_000,
        test_rows=10_000,
        archive=download.Archive(
            url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            folder="cifar-100-python",
            files=("train", "test"),
        ),
    ),
}


class DataError(Exception):
    """The data are missing, or they are not what they should be."""


class Split(NamedTuple):
    """Images with their classes.

    Attributes:
      images: uint8 [rows, height, width, channels].
      labels: int32 [rows].
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set of images in classes.

    Attributes:
      name: the name of the data set.
      classes: the number of classes; labels are 0 to classes - 1.
      train: the split to train on.
      test: the split to test on.
      mean: the mean of the training split by channel, float32 [channels].
      std: its standard deviation by channel, float32 [channels].
      augment: whether an image keeps its class if it is shifted by a few pixels, or mirrored.
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: np.ndarray
    std: np.ndarray
    augment: bool

    @property
    def channels(self) -> int:
        return self.train.images.shape[-1]

    def normalize(self, images: Any) -> Any:
        """Images as float32, normalized with the training split's mean and standard deviation of each channel."""
        return (images.astype(np.float32) - self.mean) / self.std


def load(name: str, data_dir: str | None, validation: bool = False) -> Dataset:
    """The data set `name`.

    Args:
      name: one of DATASETS.
      data_dir: the folder of CIFAR's files, see `cifar`; digits need none.
      validation: whether `test` is a tenth of the training images instead of the test split; `train` then lacks them.
        They are always the same, with the classes in equal shares. Use it to choose settings without the test images.

    Raises:
      DataError: a file is missing or wrong, or cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"name={name!r} is none of {', '.join(DATASETS)}")
    train, test = digits() if name == "digits" else cifar(name, data_dir)
    if validation:
        train, test = _held_out(train, len(train.labels) // 10)
    mean, std = _moments(train.images)
    return Dataset(name, 10 if name == "digits" else CIFAR[name].classes, train, test, mean, std, name != "digits")


def _held_out(split: Split, rows: int) -> tuple[Split, Split]:
    """The split without `rows` of its images, and these images; always the same, with the classes in equal shares."""
    parts = train_test_split(np.arange(len(split.labels)), test_size=rows, random_state=0, stratify=split.labels)
    rest, held_out = (Split(split.images[part], split.labels[part]) for part in parts)
    return rest, held_out


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation by channel, float32 [channels].

    They come from exact integer sums: np.std would copy all pixels as float64, 1.2 GB for CIFAR.
    """
    count = images[..., 0].size
    mean = images.sum(axis=(0, 1, 2), dtype=np.int64) / count
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64, casting="unsafe") / count
    return mean.astype(np.float32), np.sqrt(squares - mean**2).astype(np.float32)


def digits() -> tuple[Split, Split]:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: 1,437 to train on, 360 to test on.

    The split is always the same, with the classes in equal shares.
    """
    source: Any = load_digits()
    return _held_out(Split(source.images.astype(np.uint8)[..., None], source.target.astype(np.int32)), DIGITS_TEST_ROWS)


def cifar(name: str, data_dir: str | None) -> tuple[Split, Split]:
    """CIFAR-10, or CIFAR-100 with its hundred fine classes, from the files of the official "python version".

    Args:
      name: "cifar10" or "cifar100".
      data_dir: the folder of the files (cifar-10-batches-py, cifar-100-python), or the folder that holds it. The
        default is the environment variable GRADCOMP_DATA_DIR. Without either it is the folder in the cache, see
        `download.cache_dir`; if it is not there, it is downloaded.

    Returns:
      50,000 images [32, 32, 3] to train on and 10,000 to test on.

    Raises:
      DataError: a file is missing or wrong, or the download fails.
    """
    layout = CIFAR[name]
    archive, cache = layout.archive, download.cache_dir()
    by_hand = (
        f"download {archive.url} (sha256 {archive.sha256}) by hand to {cache}, or unpack it and give the directory "
        f"that holds {archive.folder} as --data_dir or in the environment variable GRADCOMP_DATA_DIR; or use "
        "--dataset=digits, which needs no files"
    )
    given = data_dir or os.environ.get("GRADCOMP_DATA_DIR")
    if given:
        folder = pathlib.Path(os.path.expanduser(given)).absolute()
        folder = folder if folder.name == archive.folder else folder / archive.folder
        way_out = f"without --data_dir and GRADCOMP_DATA_DIR it is downloaded; else {by_hand}"
    else:
        try:
            folder = download.fetch(archive, cache)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot bring {archive.url} to {cache} ({error}): {by_hand}") from error
        way_out = f"delete {folder} to have it unpacked anew"
    try:
        train = _cifar_split(folder, layout.train_files, layout.train_rows, layout)
        return train, _cifar_split(folder, (layout.test_file,), layout.test_rows, layout)
    except DataError as error:
        raise DataError(f"{error}: {way_out}") from error


def _cifar_split(folder: pathlib.Path, files: tuple[str, ...], rows: int, layout: Cifar) -> Split:
    parts = [_cifar_file(folder / file, rows // len(files), layout) for file in files]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    share = rows // layout.classes
    counts = np.bincount(labels, minlength=layout.classes)
    wrong = {label: count for label, count in enumerate(counts.tolist()) if count != share}
    if wrong:
        # Each file alone is fine, so one of them is probably a copy of another.
        raise DataError(
            f"{', '.join(files)} in {folder}: expected {share} images of each class, got {wrong} (class: images); "
            "is one a copy of another file?"
        )
    return Split(images, labels)


def _cifar_file(path: pathlib.Path, rows: int, layout: Cifar) -> Split:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from error
    # A damaged stream of pickle opcodes can raise nearly anything.
    except Exception as error:
        raise DataError(f"{path} is not a whole file of CIFAR ({error})") from error

    images: Any
    labels: Any
    images, labels = (content.get(key) if isinstance(content, dict) else None for key in (b"data", layout.label_key))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (rows, 3072):
        raise DataError(f"{path}: expected b'data' to be uint8 [{rows}, 3072], got {_describe(images)}")
    last = layout.classes - 1
    known = isinstance(labels, list) and all(isinstance(label, int) and 0 <= label <= last for label in labels)
    if not known or len(labels) != rows:
        raise DataError(
            f"{path}: expected {layout.label_key!r} to be a list of {rows} ints from 0 to {last}, "
            f"got {_describe(labels)}"
        )
    # Rows are the red, then the green, then the blue plane.
    return Split(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, np.int32))


class _ArraysOnly(pickle.Unpickler):
    """Reads plain containers and numpy arrays; any other name in the file is refused, not imported.

    A pickle may name any function and have it called. Python 2 wrote the official files, and other versions wrote newer
    copies. They use the names of their numpy for the functions that make an array.
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
    """The bytes of a text in latin1, which is how the older pickle protocols write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are encoded as {encoding!r}, not latin1")
    return text.encode("latin1")


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list) else "nothing" if value is None else repr(type(value))


def batches(split: Split, size: int, seed: int, first: int = 0) -> Iterator[Split]:
    """Batches without end, beginning with batch number `first`.

    An epoch is all images, in an order that depends only on `seed` and the epoch's number. A last partial batch is
    dropped. A stateful input pipeline would need its position in each checkpoint. Here the number of the step is the
    position, and a training that resumes sees the same batches as without a stop.

    Args:
      split: the split to draw from.
      size: the number of images in a batch, at most that of the split.
      seed: a seed that is not negative.
      first: the number of the first batch; batches before it are not read.
    """
    rows = len(split.labels)
    if size > rows:
        raise ValueError(f"size={size} is more than the {rows} images of the split")
    steps = rows // size
    skipped = first % steps
    for epoch in itertools.count(first // steps):
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        for start in range(skipped * size, steps * size, size):
            batch = order[start : start + size]
            yield Split(split.images[batch], split.labels[batch])
        skipped = 0


def padded_batches(split: Split, size: int) -> Iterator[Split]:
    """All of a split in order; blank images of class -1 fill up the last batch, and no network predicts that class."""
    for start in range(0, len(split.labels), size):
        images, labels = split.images[start : start + size], split.labels[start : start + size]
        missing = size - len(labels)
        rows = [(0, missing)]
        yield Split(np.pad(images, rows + [(0, 0)] * 3), np.pad(labels, rows, constant_values=-1))
