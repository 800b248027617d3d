"""Readers of command line text: the settings of a codec's factory, and the shapes of parameters."""

import importlib
import inspect
import itertools
import json
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradcomp_jax.arguments import is_whole, shown
from gradcomp_jax.feedback import EF21, Feedback
from gradcomp_jax.views import dtype_of

PLAIN = (bool, int, float, str)


def keywords(factory: Callable[..., Any]) -> dict[str, tuple[type, Any]]:
    """The keywords of a factory that can be given as text, each with its type and default.

    `int | None` counts as int, and `bool | Feedback | EF21` as bool. A type is given by its name, and a quantizer by
    the number of its bits, 0 for none.
    """
    found: dict[str, tuple[type, Any]] = {}
    for keyword, parameter in inspect.signature(factory, eval_str=True).parameters.items():
        kind = _plain(parameter.annotation)
        if keyword == "quantizer":
            found["quantizer_bits"] = (int, 0)
        elif keyword.endswith("dtype"):
            found[keyword] = (str, parameter.default)
        elif kind in PLAIN:
            found[keyword] = (kind, parameter.default)
    return found


def _plain(annotation: Any) -> Any:
    """T for `T | None`, `T | Feedback | EF21` and `T | Callable | None`; any other annotation as it is."""
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if typing.get_origin(kind) is not Callable]
        rest = [kind for kind in kinds if kind not in (types.NoneType, Feedback, EF21)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def settings(factory: Callable[..., Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """The keyword arguments of a factory by name, read from texts.

    Raises:
      ValueError: there is no such keyword, it cannot be given as text, or the text is not of its type.
    """
    kinds, read = keywords(factory), {}
    for name, text in texts.items():
        if name not in kinds:
            python = name in inspect.signature(factory).parameters
            way_out = "which is no text: give it in Python" if python else f"it has {', '.join(kinds)}"
            raise ValueError(f"--{name}={text}: codec {factory.__name__!r} has {'it' if python else 'none'}, {way_out}")
        kind, _ = kinds[name]
        try:
            read[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"--{name}={text} of codec {factory.__name__!r} must be {wanted}") from None
    return read


def shapes(text: str) -> Any:
    """The shapes of parameters, from JSON, from the path of a file with JSON, or from module:function.

    JSON has, by path, a shape, or a shape and a type. {0..31} in a path stands for each number in turn. A function
    returns a tree of arrays, of shapes with types, or of tuples of integers. It is traced: nothing is allocated.

    Raises:
      ValueError: the text is none of these, or it is not well formed.
    """
    file, found = pathlib.Path(text), re.fullmatch(r"([\w.]+):(\w+)", text)
    if text.lstrip().startswith("{"):
        return _by_path(text, "--params")
    if found and not file.exists():
        return _returned(*found.groups())
    if not file.is_file():
        raise ValueError(
            f"--params={text}: there is no such file. Give JSON such as "
            """'{"layers/{0..31}/wq": [4096, 4096]}', a file of it, or module:function"""
        )
    return _by_path(file.read_text(), f"--params={text}")


def _by_path(text: str, where: str) -> dict[str, jax.ShapeDtypeStruct]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"""{where} must be an object of shapes by path, such as {{"embed": [32000, 4096]}}""")
    for pattern, value in pairs:
        leaf = _leaf(pattern, value, where)
        for path in _expanded(pattern, where):
            if path in shapes:
                raise ValueError(f"{where} has path {path!r} twice")
            shapes[path] = leaf
    return shapes


def _leaf(path: str, value: Any, where: str) -> jax.ShapeDtypeStruct:
    shape, *rest = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    sizes = isinstance(shape, list) and all(is_whole(size) and size >= 0 for size in shape)
    dtype = dtype_of(rest[0] if rest else "float32") if len(rest) < 2 else None
    if not sizes or dtype is None:
        raise ValueError(
            f"{where}: {path!r} is {shown(value)}, and must be a shape such as [4096, 4096], or a shape and a type, "
            'such as [[4096, 4096], "bfloat16"]'
        )
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _expanded(pattern: str, where: str) -> Iterator[str]:
    """The paths for which a pattern stands, such as "layers/{0..31}/wq"."""
    texts = re.split(r"\{(.*?)\}", pattern)  # every second text is between braces
    ranges: list[Sequence[Any]] = []
    for place, text in enumerate(texts):
        found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
        if place % 2 and not (found and int(found[1]) <= int(found[2])):
            raise ValueError(f"{where}: {{{text}}} in path {pattern!r} must be a range such as {{0..31}}")
        ranges.append(range(int(found[1]), int(found[2]) + 1) if place % 2 and found else [text])
    yield from ("".join(map(str, parts)) for parts in itertools.product(*ranges))


def _returned(module: str, function: str) -> Any:
    where = f"--params={module}:{function}"
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} is not found from here: {error}") from error
    found: list[Any] = []
    is_shape = lambda x: isinstance(x, tuple) and not hasattr(x, "_fields") and all(map(is_whole, x))  # noqa: E731

    def leaf(x: Any) -> Any:
        x = jax.ShapeDtypeStruct(x, np.float32) if is_shape(x) else x
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise ValueError(f"{where} returned leaf {shown(x)}, which is neither an array nor a shape")
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    # The function is traced, and its result leaves by `found`: a shape is no value that eval_shape could return.
    jax.eval_shape(lambda: found.append(jax.tree.map(leaf, made(), is_leaf=is_shape)))
    return found[0]
