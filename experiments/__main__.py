"""Lists the programs, and tells how to begin.

python -m experiments
"""

import ast
import pathlib

BEGIN = """\
Begin with one of these; the first two take the handwritten digits that come with scikit-learn, the last a text:

  make demo                                                      eight codecs, some minutes, a table and a figure
  python -m experiments.cifar --codec=none,powersgd --epochs=5   two codecs, less than a minute
  python -m experiments.cifar --codec=powersgd --help            what can be set
  python -m experiments.lm --method=diloco --width=128           a language model with outer steps, some minutes

The programs, each of which has --help:
"""


def programs() -> dict[str, str]:
    """The modules that can be run, each with the first line of its docstring."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


if __name__ == "__main__":
    print("\n".join([BEGIN, *(f"  python -m experiments.{name:<13} {line}" for name, line in programs().items())]))
