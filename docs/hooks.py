"""For mkdocs: pages link the results of the experiments where they lie in the repository; the site gets copies."""

import os
import pathlib
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = "experiments/results"


def on_files(files: Files, config: Any) -> Files:
    """Adds figures and reports to the site's files."""
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in (".png", ".html"):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links to results in the repository become links to results in the site, whose root is docs/."""
    up = os.path.relpath(".", pathlib.PurePosixPath(page.file.src_uri).parent)  # to the site's root
    there = os.path.normpath(f"{up}/../{RESULTS}")
    return markdown.replace(f"]({there}/", f"]({os.path.normpath(f'{up}/{RESULTS}')}/")
