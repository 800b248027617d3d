"""Downloads: verified, unpacked under names of our own, kept; and every way in which they can fail."""

import contextlib
import errno
import hashlib
import http.server
import io
import os
import pathlib
import resource
import shutil
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments import data, download
from tests.cifar_files import (
    assert_same,
    replace,
    small_and_offline,  # noqa: F401, used by every test here
    write_files,
)


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


def test_a_disk_that_is_full_while_downloading(tmp_path, cache, serve):
    """The kernel refuses a file of more than a few bytes, in the words that it has for that."""
    serve("cifar10", packed(official("cifar10", tmp_path)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(data.DataError, match=r"cannot store .* in .*gradcomp_jax \(.*File too large" + WAYS):
            data.cifar("cifar10", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
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
