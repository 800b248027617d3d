"""Codecs by name, and a command-line flag for each keyword of each, read from its factory's signature.

`--qsgd_bits=8` is `qsgd(bits=8)`: names, types, defaults and help are the factory's own, so a codec that
gains a keyword gains its flag by itself. Keywords that are not a number, a string or a truth value, such as
`compress`, have none.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable

from absl import flags

from gradcomp_jax import Compressor, gradiveq, none, powersgd, qsgd

CODECS: dict[str, Callable[..., Compressor]] = {
    "none": none,
    "gradiveq": gradiveq,
    "powersgd": powersgd,
    "qsgd": qsgd,
}

FLAGS = flags.FLAGS

_DEFINE: dict[type, Callable[..., typing.Any]] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def define_flags() -> None:
    """Defines `--codec`, and `--<codec>_<keyword>` for every codec."""
    flags.DEFINE_list("codec", ["none"], f"Codecs to train with, one after another: {', '.join(CODECS)}.")
    flags.register_validator("codec", _require_known)
    for name, factory in CODECS.items():
        helps = argument_help(factory)
        for keyword, (kind, default) in keywords(factory).items():
            _DEFINE[kind](f"{name}_{keyword}", default, helps[keyword])


def from_flags(name: str, seed: int) -> Compressor:
    """The codec `name` with the keywords that its flags give.

    Args:
      name: a key of `CODECS`.
      seed: the experiment's.

    Raises:
      ValueError: the factory refuses a value.
    """
    return CODECS[name](seed=seed, **_given(name))


def label(name: str) -> str:
    """The codec's name with every keyword that is not at its default, such as "qsgd bits=8"."""
    defaults = keywords(CODECS[name])
    changed = [f"{keyword}={value}" for keyword, value in _given(name).items() if value != defaults[keyword][1]]
    return " ".join([name, *changed])


def settings(name: str) -> dict[str, typing.Any]:
    """The codec's name, and what each of its flags says."""
    return {"codec": name} | {f"{name}_{keyword}": value for keyword, value in _given(name).items()}


def keywords(factory: Callable[..., Compressor]) -> dict[str, tuple[type, typing.Any]]:
    """The keywords of a factory that a flag can give, each with its type and default.

    `seed` is left out, as a comparison has one seed for all. `int | None` counts as int.
    """
    found = {}
    for keyword, parameter in inspect.signature(factory, eval_str=True).parameters.items():
        kind = _without_none(parameter.annotation)
        if kind in _DEFINE and keyword != "seed":
            found[keyword] = (kind, parameter.default)
    return found


def argument_help(factory: Callable[..., Compressor]) -> dict[str, str]:
    """What the "Args:" section of a docstring says of each argument, each on one line."""
    section = re.search(r"^Args:\n((?:  .*\n)+)", inspect.getdoc(factory) or "", re.MULTILINE)
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section[1] if section else "", re.MULTILINE)
    return {argument: re.sub(r"\s+", " ", text) for argument, text in entries}


def _given(name: str) -> dict[str, typing.Any]:
    return {keyword: FLAGS[f"{name}_{keyword}"].value for keyword in keywords(CODECS[name])}


def _without_none(annotation: typing.Any) -> typing.Any:
    """T of `T | None`; any other annotation as it is."""
    if isinstance(annotation, types.UnionType):
        rest = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _require_known(names: list[str]) -> bool:
    unknown = [name for name in names if name not in CODECS]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "no codec"
        raise flags.ValidationError(f"got {got}; the codecs are {', '.join(CODECS)}")
    return True
