"""For mkdocstrings: the examples of docstrings, which stand there without a heading, as blocks of code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n(?:\S.*\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts a fence around each example, up to the next empty line."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites an object's docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value + "\n"
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text).rstrip()
