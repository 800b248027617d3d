"""The data: how they are split, read, checked, downloaded and kept; and every way in which they can be wrong."""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import itertools
import os
import pathlib
import pickle
import re
import shutil
import socket
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments import data, download

# Of each CIFAR: a training file, and how many images it has here.
TRAIN_FILES = [("cifar10", "data_batch_3", 20), ("cifar100", "train", 200)]


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


# Splits and batches


def test_digits_are_split_the_same_way_every_time():
    dataset, again = data.load("digits", None), data.load("digits", None)
    assert dataset.train.images.shape == (1437, 8, 8, 1)
    assert dataset.test.images.shape == (360, 8, 8, 1)
    assert np.bincount(dataset.test.labels).min() >= 34
    assert (dataset.classes, dataset.channels, dataset.augment) == (10, 1, False)
    assert_same(dataset.test, again.test)


@pytest.mark.parametrize("name", data.DATASETS)
def test_images_are_normalized_by_the_training_split(name, tmp_path):
    if name != "digits":
        write_files(name, tmp_path)
    dataset = data.load(name, str(tmp_path))
    assert dataset.mean.dtype == dataset.std.dtype == np.float32
    normal = dataset.normalize(dataset.train.images)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean((0, 1, 2), np.float64), 0, atol=1e-4)
    np.testing.assert_allclose(normal.std((0, 1, 2), np.float64), 1, atol=1e-4)


def test_settings_are_validated_on_a_tenth_of_the_training_images(tmp_path):
    write_files("cifar10", tmp_path)
    whole = data.load("cifar10", str(tmp_path))
    dataset, again = (data.load("cifar10", str(tmp_path), validation=True) for _ in range(2))
    assert dataset.train.images.shape == (90, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1] * 10)
    assert_same(dataset.test, again.test)
    assert_same(dataset.train, again.train)
    parts = [{image.tobytes() for image in split.images} for split in (dataset.train, dataset.test, whole.train)]
    assert parts[0] | parts[1] == parts[2]
    assert not parts[0] & parts[1]
    np.testing.assert_allclose(dataset.mean, dataset.train.images.mean((0, 1, 2)), rtol=1e-6)
    assert len(data.load("digits", None, validation=True).test.labels) == 143


def test_an_unknown_data_set_is_told_which_there_are():
    with pytest.raises(ValueError, match="name='mnist' is none of digits, cifar10, cifar100"):
        data.load("mnist", None)


TEN = data.Split(np.arange(10)[:, None, None, None], np.arange(10))


def test_the_order_of_the_batches_depends_on_seed_and_epoch_alone():
    def epoch(seed, epoch):
        batches = list(itertools.islice(data.batches(TEN, 4, seed, 2 * epoch), 2))
        for batch in batches:
            np.testing.assert_array_equal(batch.images.ravel(), batch.labels)
        return [*batches[0].labels, *batches[1].labels]

    assert len(set(epoch(0, 0))) == 8
    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 0) != epoch(0, 1) != epoch(1, 1)


@pytest.mark.parametrize("first", range(6))
def test_batches_go_on_where_an_interrupted_training_stopped(first):
    """Two batches an epoch, so that seven cross three borders."""
    whole = list(itertools.islice(data.batches(TEN, 4, 5), 7))
    resumed = itertools.islice(data.batches(TEN, 4, 5, first), 7 - first)
    for batch, expected in zip(resumed, whole[first:], strict=True):
        assert_same(batch, expected)


def test_skipped_batches_are_not_read():
    class Counted(np.ndarray):
        read = 0

        def __getitem__(self, index):
            Counted.read += len(index)
            return super().__getitem__(index)

    batches = data.batches(data.Split(TEN.images.view(Counted), TEN.labels), 2, 0, first=1003)
    next(batches)
    assert Counted.read == 2


def test_a_batch_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="size=11 is more than the 10 images"):
        next(data.batches(TEN, 11, 0))


def test_the_last_test_batch_is_filled_up_with_images_of_no_class():
    split = data.Split(np.ones((5, 2, 2, 1), np.uint8), np.arange(5))
    full = list(data.padded_batches(split, 4))
    assert [batch.images.shape for batch in full] == [(4, 2, 2, 1)] * 2
    np.testing.assert_array_equal(full[1].labels, [4, -1, -1, -1])


# Files


@pytest.mark.parametrize("dumps", [python2, *(functools.partial(pickle.dumps, protocol=p) for p in (2, 4, 5))])
@pytest.mark.parametrize("name", data.CIFAR)
def test_cifar_is_read_as_it_was_written(name, dumps, tmp_path):
    folder = write_files(name, tmp_path, dumps=dumps)
    layout = data.CIFAR[name]
    dataset = data.load(name, str(folder))
    assert dataset.train.images.shape == (layout.train_rows, 32, 32, 3)
    assert (dataset.classes, dataset.channels, dataset.augment) == (layout.classes, 3, True)
    contents = [pickle.loads((folder / file).read_bytes(), encoding="bytes") for file in layout.archive.files]
    labels = np.concatenate([content[layout.label_key] for content in contents])
    np.testing.assert_array_equal(np.concatenate([dataset.train.labels, dataset.test.labels]), labels)
    assert dataset.train.labels.dtype == np.int32
    # Planes of 1,024 pixels in the file: the first pixel's green is number 1,024.
    raw = contents[-1][b"data"]
    np.testing.assert_array_equal(dataset.test.images[1, 0, :2, 1], raw[1, 1024:1026])
    assert dataset.test.images[1, 2, 3, 2] == raw[1, 2 * 1024 + 2 * 32 + 3]


def test_files_are_found_in_the_folder_or_the_one_above(tmp_path, monkeypatch):
    folder = write_files("cifar10", tmp_path)
    train, _ = data.cifar("cifar10", str(tmp_path))
    assert_same(data.cifar("cifar10", str(folder))[0], train)
    monkeypatch.chdir(folder)
    assert_same(data.cifar("cifar10", ".")[0], train)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(data.cifar("cifar10", "~")[0], train)


def test_the_directory_given_goes_before_the_environment_before_the_cache(tmp_path, monkeypatch):
    places = [tmp_path / "given", tmp_path / "environment", tmp_path / "cache" / "gradcomp_jax"]
    folders = [write_files("cifar10", above, seed) for seed, above in enumerate(places)]
    given, environment, cached = (data.cifar("cifar10", str(folder))[0] for folder in folders)
    assert_same(data.cifar("cifar10", None)[0], cached)
    monkeypatch.setenv("GRADCOMP_DATA_DIR", str(places[1]))
    assert_same(data.cifar("cifar10", None)[0], environment)
    assert_same(data.cifar("cifar10", str(places[0]))[0], given)
    assert not (given.images == environment.images).all()
    assert not (environment.images == cached.images).all()


def test_files_missing_where_they_were_said_to_be_are_not_looked_for_elsewhere(tmp_path, monkeypatch):
    write_files("cifar10", tmp_path / "cache" / "gradcomp_jax")
    message = r"cannot read .*nowhere/cifar-10-batches-py/data_batch_1 \(No such file.*without --data_dir and "
    message += r"GRADCOMP_DATA_DIR it is downloaded.*--dataset=digits"
    with pytest.raises(data.DataError, match=message):
        data.cifar("cifar10", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GRADCOMP_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataError, match=message):
        data.cifar("cifar10", None)


def changed(**changes):
    def damage(whole):
        content = pickle.loads(whole, encoding="bytes")
        labels = b"labels" if b"labels" in content else b"fine_labels"
        keys = {"images": b"data", "labels": labels}
        return pickle.dumps({**content, **{keys[key]: change(content[keys[key]]) for key, change in changes.items()}})

    return damage


DAMAGES = {
    "truncated": (lambda whole: whole[:1000], "FILE is not a whole file of CIFAR"),
    "last byte lost": (lambda whole: whole[:-1], "FILE is not a whole file of CIFAR"),
    "empty": (lambda whole: b"", "FILE is not a whole file of CIFAR"),
    "a page of the web": (lambda whole: b"<!DOCTYPE html>", "FILE is not a whole file of CIFAR"),
    "no dictionary": (lambda whole: pickle.dumps([1]), r"FILE: expected b'data' to be uint8 \[N, 3072\], got nothing"),
    "too few images": (
        changed(images=lambda images: images[:-1]),
        r"FILE: expected b'data' to be uint8 \[N, 3072\], got uint8 \[\d+, 3072\]",
    ),
    "other pixels": (
        changed(images=lambda images: images.astype(np.float32)),
        r"FILE: expected b'data' to be uint8 \[N, 3072\], got float32 \[N, 3072\]",
    ),
    "no labels": (changed(labels=lambda labels: None), "to be a list of N ints from 0 to LAST, got nothing"),
    "too few labels": (changed(labels=lambda labels: labels[:-1]), "to be a list of N ints from 0 to LAST, got a list"),
    "unknown class": (changed(labels=lambda labels: [*labels[:-1], len(labels)]), "ints from 0 to LAST, got a list"),
    "negative class": (changed(labels=lambda labels: [*labels[:-1], -1]), "ints from 0 to LAST, got a list of N"),
    "ragged labels": (changed(labels=lambda labels: [*labels[:-1], [1]]), "ints from 0 to LAST, got a list of N"),
    "labels of one class": (
        changed(labels=lambda labels: [0] * len(labels)),
        r"FILE.* in FOLDER: expected \d+ images of each class, got \{0: .*1: .*\(class: images\)",
    ),
}


@pytest.mark.parametrize(("name", "file", "rows"), TRAIN_FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_with_what_was_expected(name, file, rows, damage, tmp_path):
    folder = write_files(name, tmp_path)
    function, message = DAMAGES[damage]
    (folder / file).write_bytes(function((folder / file).read_bytes()))
    for word, value in {"FILE": file, "FOLDER": folder, "N": rows, "LAST": data.CIFAR[name].classes - 1}.items():
        message = re.sub(rf"\b{word}\b", str(value), message)
    with pytest.raises(data.DataError, match=message) as error:
        data.cifar(name, str(folder))
    assert "--dataset=digits" in str(error.value)


@pytest.mark.parametrize(
    ("name", "source", "target", "message"),
    [
        ("cifar10", "data_batch_1", "data_batch_2", r"data_batch_1, data_batch_2, .*expected 10 images .*a copy"),
        ("cifar10", "test_batch", "data_batch_2", r"data_batch_1, data_batch_2, .*expected 10 images .*a copy"),
        ("cifar10", "data_batch_1", "test_batch", r"test_batch in .*expected 2 images of each class.*a copy"),
        ("cifar100", "test", "train", r"train: expected b'data' to be uint8 \[200, 3072\], got uint8 \[100, 3072\]"),
        ("cifar100", "train", "test", r"test: expected b'data' to be uint8 \[100, 3072\], got uint8 \[200, 3072\]"),
    ],
)
def test_a_file_copied_under_the_name_of_another_is_noticed(name, source, target, message, tmp_path):
    folder = write_files(name, tmp_path)
    shutil.copy(folder / source, folder / target)
    with pytest.raises(data.DataError, match=message):
        data.cifar(name, str(folder))


def test_files_of_the_other_cifar_are_refused(tmp_path):
    ten, hundred = (write_files(name, tmp_path) for name in data.CIFAR)
    content = pickle.loads((hundred / "train").read_bytes(), encoding="bytes")
    content[b"labels"] = content.pop(b"fine_labels")
    (hundred / "train").write_bytes(pickle.dumps(content))
    with pytest.raises(data.DataError, match=r"train: expected b'fine_labels' to be .* from 0 to 99, got nothing"):
        data.cifar("cifar100", str(hundred))
    with pytest.raises(data.DataError, match=r"cannot read .*cifar-10-batches-py/cifar-100-python/train"):
        data.cifar("cifar100", str(ten))


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval])
@pytest.mark.parametrize(("name", "file", "rows"), TRAIN_FILES)
def test_a_hostile_file_is_refused_and_not_executed(name, file, rows, function, tmp_path):
    folder = write_files(name, tmp_path)
    mark = tmp_path / "mark"
    argument = str(mark) if function is os.mkdir else f"__import__('os').mkdir({str(mark)!r})"
    (folder / file).write_bytes(pickle.dumps({b"data": Hostile(function, argument)}))
    with pytest.raises(data.DataError, match=rf"{file} .*which no array needs"):
        data.cifar(name, str(folder))
    assert not mark.exists()
    pickle.loads((folder / file).read_bytes())
    assert mark.exists()


# Downloads


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "gradcomp_jax"


def packed(members):
    """A .tar.gz of `members`, each a file's content by its name, or a TarInfo and the content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def official(name, above):
    """What the archive of the data set should hold, and what else the official one holds."""
    folder = write_files(name, above)
    return [(f"{folder.name}/readme.html", b"hello")] + [
        (f"{folder.name}/{p.name}", p.read_bytes()) for p in folder.iterdir()
    ]


@pytest.fixture
def serve(monkeypatch):
    """Answers for the official site of `name`; gives the list of requests so far."""
    with contextlib.ExitStack() as servers:

        def start(name, body, status=200, length=None, wait=lambda: None):
            requests = []

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    requests.append(self.path)
                    wait()
                    if status:
                        self.send_response(status)
                        self.send_header("Content-Length", str(length or len(body)))
                        self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *args):
                    pass

            server = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.callback(server.shutdown)
            url = f"http://127.0.0.1:{server.server_port}/archive.tar.gz"
            replace(monkeypatch, name, url=url, size=len(body), sha256=hashlib.sha256(body).hexdigest())
            return requests

        yield start


@pytest.mark.parametrize("name", data.CIFAR)
def test_a_download_is_unpacked_and_kept(name, tmp_path, cache, serve, monkeypatch):
    # Only within a file system is a folder renamed in one step.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another file system"))
    requests = serve(name, packed(official(name, tmp_path)))
    archive = data.CIFAR[name].archive
    for _ in range(2):
        for split, expected in zip(data.cifar(name, None), data.cifar(name, str(tmp_path)), strict=True):
            assert_same(split, expected)
    assert requests == ["/archive.tar.gz"]
    assert os.listdir(cache) == [archive.folder]
    assert sorted(os.listdir(cache / archive.folder)) == sorted(archive.files)


def test_two_downloads_at_once_do_not_disturb_each_other(tmp_path, cache, serve):
    """Both are under way before either is answered, next to what a killed one left."""
    requests = serve("cifar10", packed(official("cifar10", tmp_path)), wait=threading.Barrier(2, timeout=10).wait)
    left = cache / "download-killed" / "cifar-10-batches-py"
    left.mkdir(parents=True)
    (left / "data_batch_1").write_bytes(b"half")
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: data.cifar("cifar10", None), range(2))
    assert_same(first[0], second[0])
    assert_same(first[0], data.cifar("cifar10", str(tmp_path))[0])
    assert len(requests) == 2
    assert sorted(os.listdir(cache)) == ["cifar-10-batches-py", "download-killed"]


WAYS = r".*by hand.*--data_dir.*GRADCOMP_DATA_DIR.*move cifar-10-batches-py to .*gradcomp_jax.*--dataset=digits"


def test_without_a_network_all_ways_are_named(cache):
    with pytest.raises(data.DataError, match=r"cannot download http\S+ \(.*Connection refused.*\)" + WAYS):
        data.cifar("cifar10", None)
    assert os.listdir(cache) == []


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda body: {"body": body[:-1] + b"x"}, r"has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
        (lambda body: {"body": body[:-9]}, r"ended after \d+ of \d+ bytes"),
        (lambda body: {"body": body[:-9], "length": len(body)}, r"ended after \d+ of \d+ bytes"),
        (lambda body: {"body": body + b"x"}, r"has more than the expected \d+ bytes"),
        (lambda body: {"body": b"gone", "status": 404}, "cannot download .*404"),
        (lambda body: {"body": body, "status": 503}, "cannot download .*503"),
        (lambda body: {"body": b"hello\r\n\r\n", "status": None}, "cannot download .*BadStatusLine"),
        (lambda body: {"body": body, "wait": lambda: time.sleep(0.6)}, "cannot download .*timed out"),
    ],
    ids=["another file", "short", "broken off", "long", "not found", "overloaded", "no http", "silent"],
)
def test_a_wrong_download_is_not_kept_and_not_repeated(reply, message, tmp_path, cache, serve, monkeypatch):
    body = packed(official("cifar10", tmp_path))
    requests = serve("cifar10", **reply(body))
    replace(monkeypatch, "cifar10", size=len(body), sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    with pytest.raises(data.DataError, match=message + WAYS):
        data.cifar("cifar10", None)
    assert len(requests) == 1
    assert os.listdir(cache) == []


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_paths_of_an_archive_are_not_trusted(tmp_path, cache, serve):
    inside = "cifar-10-batches-py"
    evil = [
        *[(path, b"evil") for path in ("../evil", f"{inside}/../../evil", str(tmp_path / "evil"), f"/{inside}/evil")],
        (link(f"{inside}/out", str(tmp_path), tarfile.SYMTYPE), b""),
        (f"{inside}/out/evil", b"evil"),
    ]
    serve("cifar10", packed(evil + official("cifar10", tmp_path / "source")))
    data.cifar("cifar10", None)
    assert not list(tmp_path.rglob("evil"))
    assert os.listdir(cache) == [inside]
    assert sorted(os.listdir(cache / inside)) == sorted(data.CIFAR["cifar10"].archive.files)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_regular_file_is_refused(kind, tmp_path, cache, serve):
    member = link("cifar-10-batches-py/data_batch_1", "/etc/passwd", kind)
    serve("cifar10", packed([(member, b""), *official("cifar10", tmp_path)]))
    with pytest.raises(data.DataError, match="cifar-10-batches-py/data_batch_1 is not a regular file" + WAYS):
        data.cifar("cifar10", None)
    assert os.listdir(cache) == []


def test_a_member_of_an_absurd_size_is_refused(tmp_path, cache, serve, monkeypatch):
    monkeypatch.setattr(download, "MEMBER_BYTES", 1000)
    serve("cifar10", packed(official("cifar10", tmp_path)))
    with pytest.raises(data.DataError, match=r"not a regular file of at most 1000 bytes .*, \d+ bytes\)" + WAYS):
        data.cifar("cifar10", None)
    assert os.listdir(cache) == []


def test_a_member_that_is_missing_is_named(tmp_path, cache, serve):
    members = [(name, content) for name, content in official("cifar10", tmp_path) if not name.endswith("_4")]
    serve("cifar10", packed(members))
    with pytest.raises(data.DataError, match="lacks cifar-10-batches-py/data_batch_4:" + WAYS):
        data.cifar("cifar10", None)
    assert os.listdir(cache) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full_while_downloading(tmp_path, cache, serve, monkeypatch):
    class Full(tempfile.TemporaryDirectory):
        def __enter__(self):
            os.symlink("/dev/full", os.path.join(self.name, "archive"))
            return self.name

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Full)
    serve("cifar10", packed(official("cifar10", tmp_path)))
    with pytest.raises(data.DataError, match=r"cannot store .* in .*gradcomp_jax \(.*No space left" + WAYS):
        data.cifar("cifar10", None)
    assert os.listdir(cache) == []


def test_a_disk_that_is_full_while_unpacking(tmp_path, cache, serve, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    serve("cifar10", packed(official("cifar10", tmp_path)))
    with pytest.raises(data.DataError, match=r"cannot store .* in .*gradcomp_jax \(.*No space left" + WAYS):
        data.cifar("cifar10", None)
    assert os.listdir(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(data.DataError, match=r"cannot store .* in .*gradcomp_jax \(.*Not a directory" + WAYS):
        data.cifar("cifar10", None)


def test_a_folder_that_cannot_take_its_name(tmp_path, cache, serve):
    """Only a directory of that name is taken for another run's."""
    cache.mkdir(parents=True)
    (cache / "cifar-10-batches-py").symlink_to(tmp_path / "nowhere")
    serve("cifar10", packed(official("cifar10", tmp_path)))
    with pytest.raises(data.DataError, match=r"cannot store .* in .*gradcomp_jax \(.*Not a directory" + WAYS):
        data.cifar("cifar10", None)
    assert os.listdir(cache) == ["cifar-10-batches-py"]


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_bytes(b"half")])
def test_a_damaged_cache_says_how_to_renew_it(damage, tmp_path, cache, serve):
    requests = serve("cifar10", packed(official("cifar10", tmp_path)))
    train, _ = data.cifar("cifar10", None)
    folder = cache / "cifar-10-batches-py"
    damage(folder / "data_batch_3")
    with pytest.raises(data.DataError, match=rf"{folder}/data_batch_3 .*delete {folder} to have it downloaded anew"):
        data.cifar("cifar10", None)
    assert len(requests) == 1
    shutil.rmtree(folder)
    assert_same(data.cifar("cifar10", None)[0], train)


def test_the_cache_is_in_the_home_directory_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert download.cache_dir() == pathlib.Path("/home/someone/.cache/gradcomp_jax")
