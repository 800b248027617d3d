"""For mkdocs: the results of the experiments, which pages link where they lie in the repository, as part of the site."""

import os
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = "experiments/results/"


def on_files(files: Files, config: Any) -> Files:
    """Adds figures and reports to the site's files."""
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in (".png", ".html"):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links that lead out of docs/ to the results lead to their copies in the site."""
    here = pathlib.PurePosixPath(page.file.src_uri).parent
    out = os.path.relpath(".", here) + "/../" + RESULTS
    return re.sub(
        r"\]\(" + re.escape(os.path.normpath(out)) + "/", lambda _: f"]({os.path.relpath(RESULTS, here)}/", markdown
    )
