"""Files from their official sites: pooch downloads each once and verifies it; archives are unpacked into a cache."""

import os
import pathlib
import sys
import tarfile
import tempfile
from typing import NamedTuple

import pooch

TIMEOUT = 30.0  # the seconds of silence after which a download fails


class Archive(NamedTuple):
    """A .tar.gz file, and the files to unpack from it.

    Attributes:
      url: the address of the archive.
      sha256: the SHA-256 of the archive, in hexadecimal digits.
      folder: the folder in the archive that holds the files; it has the same name in the cache.
      files: the names of the files to unpack from that folder.
    """

    url: str
    sha256: str
    folder: str
    files: tuple[str, ...]


class File(NamedTuple):
    """A single file.

    Attributes:
      url: the address of the file.
      sha256: its SHA-256, in hexadecimal digits.
      folder: the folder in the cache that it is kept in.
      name: its name there.
    """

    url: str
    sha256: str
    folder: str
    name: str


def cache_dir() -> pathlib.Path:
    """The folder of downloads: gradcomp_jax in $XDG_CACHE_HOME, by default in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gradcomp_jax")


def fetch(archive: Archive, cache: pathlib.Path) -> pathlib.Path:
    """The folder of `archive` in `cache`; if it is not there, the archive is downloaded and unpacked.

    A file or folder gets its name in one step, once it is whole. So runs at the same time do not disturb each other,
    and the rest of a killed run is not taken for whole.

    Returns:
      The folder. If it was there before, its files are not checked.

    Raises:
      OSError: the archive cannot be downloaded or stored.
      ValueError: the archive is not the expected one.
    """
    folder = cache / archive.folder
    if folder.is_dir():
        return folder
    packed = _retrieve(archive.url, archive.sha256, archive.url.rpartition("/")[2], cache)
    with tempfile.TemporaryDirectory(prefix="unpacking-", dir=cache) as temporary, tarfile.open(packed) as tar:
        unpacked = pathlib.Path(temporary, archive.folder)
        unpacked.mkdir()
        for member in tar:
            # Files get our own names: paths and links of the archive are not followed.
            above, _, name = member.name.rpartition("/")
            wanted = member.isreg() and above == archive.folder and name in archive.files
            if wanted and (content := tar.extractfile(member)):
                (unpacked / name).write_bytes(content.read())
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run was first, and its folder is the same
                raise
    return folder


def fetch_file(file: File, cache: pathlib.Path) -> pathlib.Path:
    """The path of `file` in `cache`; if it is not there, or is damaged, it is downloaded.

    Raises:
      OSError: the file cannot be downloaded or stored.
      ValueError: it is not the expected one.
    """
    return _retrieve(file.url, file.sha256, file.name, cache / file.folder)


def _retrieve(url: str, sha256: str, name: str, folder: pathlib.Path) -> pathlib.Path:
    downloader = pooch.HTTPDownloader(sys.stderr.isatty(), 2**18, timeout=TIMEOUT)
    return pathlib.Path(pooch.retrieve(url, sha256, name, folder, downloader=downloader))
