"""Archives from their official sites, by pooch: downloaded once and verified; then unpacked into a cache."""

import os
import pathlib
import sys
import tarfile
import tempfile
from typing import NamedTuple

import pooch

TIMEOUT = 30.0  # seconds of silence after which a server is given up


class Archive(NamedTuple):
    """A .tar.gz file and what is wanted of it.

    Attributes:
      url: where it is.
      sha256: of the archive, in hexadecimal digits.
      folder: in the archive, which holds the files; also its name in the cache.
      files: the names in that folder of those to unpack.
    """

    url: str
    sha256: str
    folder: str
    files: tuple[str, ...]


def cache_dir() -> pathlib.Path:
    """Where downloads are kept: gradcomp_jax in $XDG_CACHE_HOME, by default in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gradcomp_jax")


def fetch(archive: Archive, cache: pathlib.Path) -> pathlib.Path:
    """The folder of `archive` in `cache`; unpacked, and before that downloaded, if it is not there.

    A file or folder takes its name in one step, once it is whole. So runs at the same time do not meet, and what a
    killed one leaves is not taken for whole.

    Returns:
      The folder. Its files are not looked at if it was there before.

    Raises:
      OSError: the archive does not come, or cannot be stored.
      ValueError: it is not the one expected.
    """
    folder = cache / archive.folder
    if folder.is_dir():
        return folder
    file, downloader = archive.url.rpartition("/")[2], pooch.HTTPDownloader(sys.stderr.isatty(), 2**18, timeout=TIMEOUT)
    packed = pooch.retrieve(archive.url, archive.sha256, file, cache, downloader=downloader)
    with tempfile.TemporaryDirectory(prefix="unpacking-", dir=cache) as temporary, tarfile.open(packed) as tar:
        unpacked = pathlib.Path(temporary, archive.folder)
        unpacked.mkdir()
        for member in tar:
            # Under names of our own: paths and links of the archive are not followed.
            above, _, name = member.name.rpartition("/")
            wanted = member.isreg() and above == archive.folder and name in archive.files
            if wanted and (content := tar.extractfile(member)):
                (unpacked / name).write_bytes(content.read())
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was first, whose folder is the same
                raise
    return folder
