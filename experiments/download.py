"""Archives from their official sites: downloaded once, verified, then unpacked into a cache."""

import hashlib
import http.client
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

TIMEOUT = 30.0  # seconds of silence after which a server is given up
CHUNK_BYTES = 2**18
MEMBER_BYTES = 2 * 10**8  # the largest true one, the training images of CIFAR-100, has 1.6e8


class DownloadError(Exception):
    """An archive could not be had, is not the one expected, or cannot be stored."""


class Archive(NamedTuple):
    """A .tar.gz file and what is wanted of it.

    Attributes:
      url: where it is.
      size: in bytes.
      sha256: of the archive, in hexadecimal digits.
      folder: in the archive, which holds the files; also its name in the cache.
      files: the names in that folder of those to unpack.
    """

    url: str
    size: int
    sha256: str
    folder: str
    files: tuple[str, ...]


def cache_dir() -> pathlib.Path:
    """Where downloads are kept: gradcomp_jax in $XDG_CACHE_HOME, by default in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gradcomp_jax")


def fetch(archive: Archive, cache: pathlib.Path) -> pathlib.Path:
    """The folder of `archive` in `cache`; downloaded, in one attempt, if it is not there.

    Each run downloads and unpacks in a temporary directory of its own in `cache`, and gives the folder its name
    in one step at the very end. So a folder of that name is whole, and runs at the same time do not meet.

    Returns:
      The folder. Its files are not looked at if it was there before.

    Raises:
      DownloadError: the archive does not come, is not the one expected, or cannot be stored.
    """
    folder = cache / archive.folder
    try:
        if folder.exists():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as temporary:
            packed, unpacked = pathlib.Path(temporary, "archive"), pathlib.Path(temporary, archive.folder)
            _download(archive, packed)
            _unpack(archive, packed, unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                # Another run was first. Its folder is the same, and may already be in use.
    except OSError as error:
        raise DownloadError(f"cannot store {archive.url} in {cache} ({error})") from error
    return folder


def _download(archive: Archive, path: pathlib.Path) -> None:
    """Writes the archive to `path`, and verifies it."""
    print(f"Downloading {archive.url} ({archive.size / 1e6:.0f} MB)", file=sys.stderr)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file, _progress() as progress:
        task = progress.add_task(archive.folder, total=archive.size)
        for chunk in _body(archive.url):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            progress.update(task, completed=size)
            if size > archive.size:  # whatever it is, it need not fill the disk
                break
    if size < archive.size:
        raise DownloadError(f"{archive.url} ended after {size} of {archive.size} bytes")
    if size > archive.size:
        raise DownloadError(f"{archive.url} has more than the expected {archive.size} bytes")
    if digest.hexdigest() != archive.sha256:
        raise DownloadError(f"{archive.url} has sha256 {digest.hexdigest()}, expected {archive.sha256}")


def _body(url: str) -> Iterator[bytes]:
    # Only errors of the network are caught here: those of whoever takes the chunks do not pass through.
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK_BYTES):
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot download {url} ({error!r})") from error


def _unpack(archive: Archive, path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the expected files, under names of our own: what else the archive holds, and where, does not matter."""
    folder.mkdir()
    missing = {f"{archive.folder}/{name}": name for name in archive.files}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if member.name not in missing:
                continue
            if not member.isreg() or member.size > MEMBER_BYTES:
                raise DownloadError(
                    f"{archive.url}: {member.name} is not a regular file of at most {MEMBER_BYTES} bytes "
                    f"(type {member.type!r}, {member.size} bytes)"
                )
            content: Any = tar.extractfile(member)
            with (folder / missing.pop(member.name)).open("xb") as file:
                shutil.copyfileobj(content, file)
    if missing:
        raise DownloadError(f"{archive.url} lacks {', '.join(missing)}")


def _progress() -> Progress:
    """A bar on standard error, where that is a terminal."""
    screen = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
