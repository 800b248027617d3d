"""Describes what a codec would do with each parameter, for shapes on the command line; nothing is allocated.

    python -m gradcomp_jax.describe --codec=powersgd --rank=4 --workers=8 --params=shapes.json
    python -m gradcomp_jax.describe --codec=qsgd --workers=2x4 --params='{"layers/{0..31}/wq": [4096, 4096]}'
    python -m gradcomp_jax.describe --codec=topk --fraction=0.01 --workers=8 --params=module:function --json

`--params` is JSON, or a file with JSON. It has, by path, a shape, or a shape and a type such as
[[4096, 4096], "bfloat16"]. {0..31} in a path stands for 32 leaves. Or `--params` is module:function, and the function
returns a tree of arrays or of shapes. `--workers=2x4` means 2 nodes of 4 devices each, and puts the codec under
`across`. All other flags are settings of the codec, with the names of its factory's keywords. Give a quantizer by its
bits, --quantizer_bits=8.
"""

import argparse
import re
from collections.abc import Sequence

from gradcomp_jax import CODECS, Compressor, across, describe, qsgd
from gradcomp_jax.describe import texts


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gradcomp_jax.describe",
        description=(__doc__ or "").split("\n")[0],
        epilog="All other flags are settings of the codec, such as --rank=4 of powersgd.",
        allow_abbrev=False,
    )
    parser.add_argument("--codec", required=True, help=", ".join(CODECS))
    parser.add_argument("--workers", required=True, help="how many, or nodes x devices, such as 2x4")
    parser.add_argument(
        "--params", required=True, help="JSON of shapes by path, a file of it, or module:function, which returns them"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    given, rest = parser.parse_known_args(argv)
    settings: dict[str, str] = {}
    for text in rest:
        found = re.fullmatch(r"--(\w+)=(.*)", text)
        if not found:
            parser.error(f"{text!r} must be a setting of the codec, such as --rank=4")
        settings[found[1]] = found[2]
    try:
        nodes, devices = _workers(given.workers)
        codec = _codec(given.codec, settings)
        told = describe(
            across(codec) if devices else codec,
            texts.shapes(given.params),
            {"node": nodes, "local": devices} if devices else nodes,
        )
    except (ValueError, TypeError) as error:
        parser.exit(1, f"error: {error}\n")
    print(told.as_json() if given.json else told)


def _workers(text: str) -> tuple[int, int]:
    """The number of workers, and 0; or the number of nodes, and of devices in each node."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not found:
        raise ValueError(f"--workers={text} must be a number of at least 1, or nodes x devices such as 2x4")
    return int(found[1]), int(found[2] or 0)


def _codec(name: str, given: dict[str, str]) -> Compressor:
    if name not in CODECS:
        raise ValueError(f"--codec={name} must be one of {', '.join(CODECS)}; of others call describe() in Python")
    settings = texts.settings(CODECS[name], given)
    if bits := settings.pop("quantizer_bits", 0):
        settings["quantizer"] = qsgd(bits)
    return CODECS[name](**settings)


if __name__ == "__main__":
    main()
