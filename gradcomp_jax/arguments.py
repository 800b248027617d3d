"""Checks of users' arguments, above all of codecs' settings, before anything reads them."""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
# The most characters of a value in a message.
LONG = 100


def factory(make: Callable[P, R]) -> Callable[P, R]:
    """Marks a factory of codecs: its settings are fixed when it is called, and are Python's own values.

    Numbers of numpy become Python's, because these promote no type of jax. The factory refuses arrays of jax, settings
    that do not match an annotation of `float`, `bool` or a function, and values that are no seed or no axis name.
    """

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        parameters = inspect.signature(make, eval_str=True).parameters
        if unknown := [name for name in kwargs if name not in parameters]:
            raise TypeError(f"{make.__name__} has no setting {unknown[0]!r}: it has {', '.join(parameters)}")
        first = dict(zip(parameters, args, strict=False))  # Python itself refuses more arguments, and any given twice
        given = {name: own(name, value) for name, value in (first | kwargs).items()}
        for name, value in given.items():
            _require_kind(name, value, parameters[name].annotation)
        more = args[len(first) :]
        result = make(*(given[name] for name in first), *more, **{name: given[name] for name in kwargs})  # type: ignore
        return result.named(_call(make.__name__, parameters, given)) if hasattr(result, "named") else result

    def uncalled(*args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{make.__name__} is passed uncalled: call it, such as {make.__name__}(...)")

    # The attributes of a transformation that optax reads.
    for name in ("init", "update"):
        setattr(made, name, uncalled)
    return made


def _call(name: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> str:
    """The call of a factory as it may be written, with the given settings, and always its first setting."""
    key, first = next(iter(parameters.items()))
    main = {} if first.default in (None, first.empty) else {key: first.default}
    said = {key: (main | dict(given))[key] for key in parameters if key in main or key in given}
    texts = [as_written(x) if key in ("codec", "codecs", "tx") else f"{key}={as_written(x)}" for key, x in said.items()]
    return f"{name}({', '.join(texts)})"


def as_written(value: Any) -> str:
    """A setting as it may be written: a codec as its call, a function as its name."""
    if hasattr(value, "named"):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {as_written(x)}' for key, x in value.items())}}}"
    return getattr(value, "__name__", None) or shown(value)


def own(name: str, value: Any) -> Any:
    """`value`; a number of numpy becomes a number of Python.

    Raises:
      ValueError: the value is an array of jax.
    """
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} is an array of jax, and must be a number of Python's, because the compiled program depends on it: "
            f"under optax.inject_hyperparams name {name!r}, and all other settings of the codec, in static_args"
        )
    scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if scalar else value


def require_seed(seed: Any) -> None:
    """Raises ValueError for a seed that is not a whole number of 64 bits."""
    if not is_whole(seed) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={shown(seed)} must be a whole number from -2^63 to 2^63 - 1")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """`value` as text for a message; a long text is cut, and its type follows."""
    text = repr(value)
    return text if len(text) <= LONG else f"{text[:LONG]}... ({type(value).__name__})"


def is_transformation(tx: Any) -> bool:
    """Whether a value is an optax transformation."""
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))


def require_transformation(tx: Any) -> None:
    """Raises ValueError for a value that is not an optax transformation."""
    if is_transformation(tx):
        return
    chain = "; of several make one by optax.chain(*tx)" if isinstance(tx, list | tuple) else ""
    raise ValueError(
        f"tx={shown(tx)} must be an optax transformation, such as optax.chain(powersgd(2), optax.sgd(0.1)){chain}. "
        "The order of arguments is train_step(loss_fn, tx, mesh), simulate(loss_fn, tx, workers), "
        "init(tx, params, mesh), state_specs(tx, params)"
    )


def require_arrays(what: str, tree: Any) -> None:
    """Raises ValueError, by name, for a leaf that is neither an array nor a number."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(x, "dtype") and not isinstance(x, numbers.Number):
            raise ValueError(
                f"{what}: leaf {jax.tree_util.keystr(path)} is {shown(x)}, which is no array: leave it out of the tree"
            )


def require_number(name: str, value: Any, described: str = "a number") -> None:
    """Raises ValueError for a value that is not a real number."""
    if not isinstance(own(name, value), numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be {described}")


def _require_kind(name: str, value: Any, annotation: Any) -> None:
    if name == "seed":
        require_seed(value)
    if name in ("axis_name", "slow", "fast"):
        _require_axis_name(name, value)
    optional = isinstance(annotation, types.UnionType) and types.NoneType in typing.get_args(annotation)
    kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType] if optional else [annotation]
    if len(kinds) > 1 or (optional and value is None):
        return
    or_none = " or None" * optional
    if kinds == [float]:
        require_number(name, value, f"a number{or_none}")
    if kinds == [bool] and not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False{or_none}")
    if typing.get_origin(kinds[0]) is Callable and isinstance(typing.get_args(kinds[0])[0], list):
        count = len(typing.get_args(kinds[0])[0])
        if not takes(value, count):
            raise ValueError(
                f"{name}={shown(value)} must be a function of {count} argument{'s' * (count > 1)}{or_none}"
            )


def takes(function: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        pass  # functions written in C may have no signature
    return True


def _require_axis_name(setting: str, value: Any) -> None:
    names = value if isinstance(value, tuple) else (value,)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{setting}={shown(value)} must be the name of a mesh axis, such as 'data', or a tuple of names"
        )
