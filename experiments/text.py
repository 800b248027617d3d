"""Tiny Shakespeare, or a text of one's own, as symbols; batches by step number."""

import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments import download
from experiments.data import DataError

# 40,000 lines of Shakespeare, put together by Karpathy for char-rnn (2015): 1,115,394 characters, 65 different ones.
SHAKESPEARE = download.File(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    folder="tinyshakespeare",
    name="input.txt",
)
HELD_OUT = 0.1


class Text(NamedTuple):
    """A text in symbols, which are its bytes that occur, numbered in order.

    Attributes:
      name: the name of the text.
      symbols: the number of symbols.
      train: the text to train on, int32 [length].
      validation: the last tenth of the text, int32 [length].
      sha256: the SHA-256 of the whole text.
    """

    name: str
    symbols: int
    train: np.ndarray
    validation: np.ndarray
    sha256: str


def load(file: str | None, data_dir: str | None) -> Text:
    """The text to train on.

    Args:
      file: the path of a text of one's own; None for Tiny Shakespeare.
      data_dir: the folder that holds tinyshakespeare/input.txt. The default is the environment variable
        GRADCOMP_DATA_DIR. Without either it is the folder in the cache, see `download.cache_dir`; if the file is not
        there, it is downloaded.

    Raises:
      DataError: the file is missing or wrong, or the download fails.
    """
    path = pathlib.Path(os.path.expanduser(file)) if file else _shakespeare(data_dir)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from error
    symbols, places = np.unique(np.frombuffer(content, np.uint8), return_inverse=True)
    if len(symbols) < 2:
        raise DataError(f"{path} has {len(symbols)} different bytes, and a text has at least two")
    ids = places.astype(np.int32)
    length = round(len(ids) * (1 - HELD_OUT))
    digest = hashlib.sha256(content).hexdigest()
    return Text(path.stem if file else SHAKESPEARE.folder, len(symbols), ids[:length], ids[length:], digest)


def _shakespeare(data_dir: str | None) -> pathlib.Path:
    """The path of Tiny Shakespeare, whose content is what it should be."""
    source, cache = SHAKESPEARE, download.cache_dir()
    by_hand = (
        f"download {source.url} (sha256 {source.sha256}) by hand to {cache / source.folder}, or give the directory "
        f"that holds {source.folder}/{source.name} as --data_dir or in the environment variable GRADCOMP_DATA_DIR; or "
        "give a text of your own as --text"
    )
    given = data_dir or os.environ.get("GRADCOMP_DATA_DIR")
    if not given:
        try:
            return download.fetch_file(source, cache)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot bring {source.url} to {cache} ({error}): {by_hand}") from error
    path = pathlib.Path(os.path.expanduser(given)).absolute()
    path = path / source.name if path.name == source.folder else path / source.folder / source.name
    way_out = f"without --data_dir and GRADCOMP_DATA_DIR it is downloaded; else {by_hand}"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): {way_out}") from error
    if digest != source.sha256:
        raise DataError(f"{path} is not the file of {source.url}, its sha256 is {digest}: {way_out}")
    return path


def batches(text: np.ndarray, size: int, context: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Batches without end, beginning with batch number `first`: int32 [size, context + 1].

    An epoch cuts the text into pieces of `context` symbols, from a place that is drawn anew, and goes through them in
    an order that is drawn anew. Each row has one more symbol, because the loss is of what follows. A last partial
    batch is dropped. Both draws depend only on `seed` and the epoch's number, so the number of the step is the place in
    the input.

    Args:
      text: the text, at least `size * context + context` symbols.
      size: the rows of a batch.
      context: the symbols to predict in a row.
      seed: a seed that is not negative.
      first: the number of the first batch; batches before it are not read.
    """
    steps = steps_per_epoch(text, size, context)
    skipped = first % steps
    for epoch in itertools.count(first // steps):
        rng = np.random.default_rng((seed, epoch))
        begins = rng.integers(context) + context * np.arange(_pieces(text, context))
        order = rng.permutation(begins)
        for start in range(skipped * size, steps * size, size):
            yield text[order[start : start + size, None] + np.arange(context + 1)]
        skipped = 0


def steps_per_epoch(text: np.ndarray, size: int, context: int) -> int:
    """The number of batches that `batches` cuts of the text once.

    Raises:
      ValueError: there is not one.
    """
    if not (steps := _pieces(text, context) // size):
        raise ValueError(f"a batch has {size} pieces of {context} symbols, and the text has {len(text)} to train on")
    return steps


def _pieces(text: np.ndarray, context: int) -> int:
    """The number of pieces that fit into the text, wherever they begin."""
    return max(0, (len(text) - context) // context)


def pieces(text: np.ndarray, count: int, context: int) -> np.ndarray:
    """At most `count` pieces of a text at equal distances, int32 [count, context + 1].

    Raises:
      ValueError: there is none.
    """
    whole = (len(text) - 1) // context
    if not whole:
        raise ValueError(f"there is no piece of {context} symbols in the {len(text)} that are held out")
    begins = context * np.unique(np.linspace(0, whole - 1, min(count, whole)).astype(np.int64))
    return text[begins[:, None] + np.arange(context + 1)]
