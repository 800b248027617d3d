"""Downloads: verified, unpacked under names of our own, kept; and every way in which they can fail."""

import contextlib
import hashlib
import http.server
import io
import os
import pathlib
import resource
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments import data, download
from tests.cifar_files import small_and_offline, write_files  # noqa: F401, used by every test here

FILES = {"one": np.random.default_rng(0).bytes(60_000), "two": b"2"}
MEMBERS = [(tarfile.TarInfo(f"folder/{name}"), content) for name, content in {"readme": b"0", **FILES}.items()]


@pytest.fixture
def serve():
    """Puts an archive on a site; gives what to fetch, and the paths that were asked for so far."""
    with contextlib.ExitStack() as servers:

        def start(members=MEMBERS, change=lambda body: body, status=200, wait=lambda: None):
            file, asked = io.BytesIO(), []
            with tarfile.open(fileobj=file, mode="w:gz") as tar:
                for member, content in members:
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            packed = file.getvalue()

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    asked.append(self.path)
                    wait()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(packed)))
                    self.end_headers()
                    self.wfile.write(change(packed))

            server = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            server.daemon_threads = False  # waited for, so that what they print is this test's
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.callback(server.shutdown)
            url = f"http://127.0.0.1:{server.server_port}/a.tar.gz"
            return download.Archive(url, hashlib.sha256(packed).hexdigest(), "folder", tuple(FILES)), asked

        yield start


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_download_is_unpacked_and_kept(tmp_path, serve):
    """So that an archive brought by hand will do, and a folder that was deleted is unpacked anew."""
    archive, asked = serve()
    for _ in range(2):
        assert content(download.fetch(archive, tmp_path / "cache")) == FILES
    assert {*os.listdir(tmp_path / "cache")} == {"a.tar.gz", "folder"}
    shutil.rmtree(tmp_path / "cache" / "folder")
    assert content(download.fetch(archive, tmp_path / "cache")) == FILES
    assert asked == ["/a.tar.gz"]


def test_two_downloads_at_once_do_not_disturb_each_other(tmp_path, serve):
    """Both are under way before either is answered, next to what killed ones left."""
    archive, _ = serve(wait=threading.Barrier(2, timeout=10).wait)
    (tmp_path / "unpacking-killed" / "folder").mkdir(parents=True)
    (tmp_path / "a.tar.gz").write_bytes(b"half")
    with ThreadPoolExecutor() as pool:
        assert [*map(content, pool.map(download.fetch, [archive] * 2, [tmp_path] * 2))] == [FILES] * 2
    assert {*os.listdir(tmp_path)} == {"a.tar.gz", "folder", "unpacking-killed"}


REPLIES = {
    "expected [0-9a-f]{64} but got [0-9a-f]{64}": {"change": lambda packed: packed[:-1] + b"x"},
    "IncompleteRead": {"change": lambda packed: packed[:-9]},
    "404": {"status": 404},
    "timed out": {"wait": lambda: time.sleep(0.6)},
}


@pytest.mark.parametrize("message", REPLIES)
def test_a_wrong_download_is_not_kept_and_not_repeated(message, tmp_path, serve, monkeypatch):
    archive, asked = serve(**REPLIES[message])
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    with pytest.raises((OSError, ValueError), match=message):
        download.fetch(archive, tmp_path)
    assert (len(asked), os.listdir(tmp_path)) == (1, [])


def test_paths_and_links_of_an_archive_are_not_followed(tmp_path, serve):
    links = [tarfile.TarInfo(f"folder/{name}") for name in ("out", "one")]
    for link in links:
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    names = ["../evil", "folder/../../evil", str(tmp_path / "evil"), "/folder/evil", "folder/out/evil", "folder/evil"]
    evil = [(tarfile.TarInfo(name), b"evil") for name in [*names, "two"]]
    archive, _ = serve([*((link, b"") for link in links), *MEMBERS, *evil])
    assert content(download.fetch(archive, tmp_path / "cache")) == FILES
    assert not [*tmp_path.rglob("evil")]


def test_a_disk_that_is_full(tmp_path, serve):
    """The kernel refuses a file of more than 30 kB, in the words that it has for that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            download.fetch(serve()[0], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_take_its_name(tmp_path, serve):
    """Only a directory of that name is taken for another run's."""
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(NotADirectoryError):
        download.fetch(serve()[0], tmp_path)
    assert (tmp_path / "folder").read_text() == "a file"


# As the data sets tell of them


def test_without_a_network_all_ways_are_named():
    ways = r"by hand to .*gradcomp_jax.*--data_dir.*GRADCOMP_DATA_DIR.*--dataset=digits"
    with pytest.raises(data.DataError, match=r"cannot bring http\S+ to .*Connection refused.*" + ways):
        data.cifar("cifar10", None)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_bytes(b"half")])
def test_a_damaged_cache_says_how_to_renew_it(damage):
    folder = write_files("cifar10", download.cache_dir())
    damage(folder / "data_batch_3")
    with pytest.raises(data.DataError, match=rf"{folder}/data_batch_3 .*delete {folder} to have it unpacked anew"):
        data.cifar("cifar10", None)


def test_the_cache_is_in_the_home_directory_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert download.cache_dir() == pathlib.Path("/home/someone/.cache/gradcomp_jax")
