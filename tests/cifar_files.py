"""Small files in the layouts of CIFAR-10 and CIFAR-100, and a machine without network or cache."""

import io
import pickle
import socket

import numpy as np
import pytest

from experiments import data


@pytest.fixture(autouse=True)
def small_and_offline(tmp_path, monkeypatch):
    """Ten or two images a class to train, two or one to test; an empty cache; the site does not answer."""
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{not_listening.getsockname()[1]}/archive.tar.gz"
        for name, train_rows, test_rows in (("cifar10", 100, 20), ("cifar100", 200, 100)):
            replace(monkeypatch, name, url=url)
            layout = data.CIFAR[name]._replace(train_rows=train_rows, test_rows=test_rows)
            monkeypatch.setitem(data.CIFAR, name, layout)
        monkeypatch.delenv("GRADCOMP_DATA_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield


def replace(monkeypatch, name, **changes):
    layout = data.CIFAR[name]
    monkeypatch.setitem(data.CIFAR, name, layout._replace(archive=layout.archive._replace(**changes)))


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 did, and so the official files: bytes and text are one."""

    def save_string(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def python2(content):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(content)
    # Before numpy 2 the same function had another address.
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def write_files(name, above, seed=0, dumps=python2):
    """A small data set in its official layout; the classes in equal numbers, but not in each file."""
    layout = data.CIFAR[name]
    folder = above / layout.archive.folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for files, rows in ((layout.train_files, layout.train_rows), ((layout.test_file,), layout.test_rows)):
        labels = draw.permutation(np.arange(rows) % layout.classes)
        for file, part in zip(files, labels.reshape(len(files), -1), strict=True):
            images = draw.integers(0, 256, (len(part), 3072), np.uint8)
            content = {b"data": images, layout.label_key: part.tolist(), b"coarse_labels": [0] * len(part)}
            (folder / file).write_bytes(dumps(content))
    return folder


def assert_same(split, other):
    np.testing.assert_array_equal(split.images, other.images)
    np.testing.assert_array_equal(split.labels, other.labels)
