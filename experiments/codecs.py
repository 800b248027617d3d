"""Codecs by name, and a command-line flag for each keyword of each codec, read from its factory's signature.

`--qsgd_bits=8` is `qsgd(bits=8)`. Names, types, defaults and help are the factory's own, so a new keyword of a codec
has a flag by itself. Keywords that are not a number, a string or a truth value, such as `compress`, have no flag, with
four exceptions. A type is given by its name, `--cast_dtype=float16`. A quantiser inside is given by its bits,
`--powersgd_quantizer_bits=8`. The two codecs of `accordion` are given by a codec's name and two values of its strength.
All codecs share one kind of error feedback, `--feedback_decay=0.9` or `--ef21`; each codec's own flag, such as
`--qsgd_error_feedback`, says whether it has any.
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Sequence

import docstring_parser
import optax
from absl import flags

import gradcomp_jax
from gradcomp_jax import EF21, Compressor, Feedback, accordion, qsgd
from gradcomp_jax.describe import texts

FLAGS = flags.FLAGS

_DEFINE: dict[type, Callable[..., typing.Any]] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}
FEEDBACK = ("feedback_decay", "ef21")  # flags for all codecs with error feedback
QUANTIZER_BITS_HELP = "qsgd's bits, 2, 4 or 8, whose other settings are its defaults; 0 for no quantizer."


class Course(typing.NamedTuple):
    """The facts about the training that accordion needs.

    Attributes:
      steps_per_epoch: the number of steps in an epoch.
      learning_rate: the schedule by steps done; None if the rate falls all the time, which tells accordion nothing.
    """

    steps_per_epoch: int
    learning_rate: optax.Schedule | None


def between(
    codec: str = "powersgd",
    *,
    low: float = 2,
    high: float = 1,
    interval: float = 10,
    window: float | None = None,
    threshold: float = 0.5,
    per_layer: bool = True,
    norm_source: str = "mean",
    reset_on_switch: bool = False,
    seed: int = 0,
    course: Course,
) -> Compressor:
    """`accordion` between two strengths of a codec; the codec's own flags give all other settings.

    Args:
      codec: the codec to switch: powersgd by its rank, topk, randomk and randomblock by the fraction, qsgd by the bits,
        adaptive by the proportion, gradiveq by the ratio. Its own flags give the other settings.
      low: the rank, fraction, ... of the weak compression, which sends more.
      high: the rank, fraction, ... of the strong compression.
      interval: the epochs from check to check; 10 in the authors' code.
      window: the epochs at the beginning of each interval over which gradients are summed; 1 in the authors' code, by
        default all.
      threshold: eta; a layer is critical from this relative change of the norm on.
      per_layer: whether each leaf decides for itself; else the norm over all leaves decides for all.
      norm_source: the norm that decides: of the workers' "mean", or of the "first_worker", like in the authors' code.
      reset_on_switch: whether to draw PowerSGD's Q anew if the level changes, like in the authors' code.
      seed: the codec's seed.
      course: the facts about the training.

    Raises:
      ValueError: there is no such codec, or accordion cannot switch it so.
    """
    if codec not in CODECS or codec == "accordion":
        known = ", ".join(name for name in CODECS if name != "accordion")
        raise ValueError(f"--accordion_codec={codec} must be one of {known}")
    weak, strong = (_compressor(codec, seed, _at_strength(codec, value)) for value in (low, high))

    for name, epochs in {"interval": interval, "window": window}.items():
        if epochs is not None and epochs <= 0:
            raise ValueError(f"--accordion_{name}={epochs} must be above 0, it counts epochs")

    def steps(epochs: float) -> int:
        return max(1, round(epochs * course.steps_per_epoch))

    return accordion(
        weak,
        strong,
        interval=steps(interval),
        window=None if window is None else steps(window),
        threshold=threshold,
        per_layer=per_layer,
        learning_rate=course.learning_rate,
        norm_source=norm_source,
        reset_on_switch=reset_on_switch,
    )


CODECS: dict[str, Callable[..., Compressor]] = {**gradcomp_jax.CODECS, "accordion": between}


def define_flags() -> None:
    """Defines `--codec`, and `--<codec>_<keyword>` for every codec."""
    define_choice()
    define_settings()


def define_choice() -> None:
    """Defines `--codec`."""
    flags.DEFINE_list(
        "codec",
        ["none"],
        f"Codecs to train with, one after another: {', '.join(CODECS)}. --codec=NAME --help shows its settings.",
    )
    flags.register_validator("codec", _require_known)


def define_settings() -> None:
    """Defines `--<codec>_<keyword>` for every codec, and the flags of error feedback."""
    for name, factory in CODECS.items():
        helps = argument_help(factory) | {"quantizer_bits": QUANTIZER_BITS_HELP}
        for keyword, (kind, default) in keywords(factory).items():
            _DEFINE[kind](f"{name}_{keyword}", default, helps.get(keyword, f"{keyword} of {name}."))
    decay_help = "What remains of a residual in a step, above 0 and at most 1, for all codecs that keep one."
    flags.DEFINE_float("feedback_decay", 1.0, decay_help)
    flags.DEFINE_boolean("ef21", False, "EF21 instead of a residual, for all codecs that keep one.")


def show_settings(argv: Sequence[str]) -> None:
    """Adds the settings of the codecs in a command line to the --help of its program."""
    given = re.findall(r" --?(?:codec|method)[= ](\S+)", " ".join(argv))
    named = [name for names in given for name in names.split(",") if name in CODECS]
    settings = [f"{name}_{keyword}" for name in named for keyword in keywords(CODECS[name])]
    for flag in [*settings, *FEEDBACK] if named else ():
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[flag])


def from_flags(name: str, seed: int, course: Course) -> Compressor:
    """The codec `name` with the keywords that its flags give.

    Args:
      name: a key of `CODECS`.
      seed: the experiment's seed.
      course: the facts about the training.

    Raises:
      ValueError: the factory refuses a value, or flags contradict each other.
    """
    more = {"course": course} if name == "accordion" else {}
    return _compressor(name, seed, _given(name) | more)


def label(name: str) -> str:
    """The codec's name with every keyword that is not at its default, such as "qsgd bits=8"."""
    changed = [f"{keyword}={value}" for keyword, (value, default) in _settings(name).items() if value != default]
    return " ".join([name, *changed])


def settings(name: str) -> dict[str, typing.Any]:
    """The codec's name and the values of its flags; for accordion, also those of the codec inside."""
    return {"codec": name} | {f"{name}_{keyword}": value for keyword, (value, _) in _settings(name).items()}


def keywords(factory: Callable[..., Compressor]) -> dict[str, tuple[type, typing.Any]]:
    """The keywords of a factory that a flag can give, each with its type and default.

    `seed` is left out, because a comparison has one seed for all.
    """
    return {name: found for name, found in texts.keywords(factory).items() if name != "seed"}


def argument_help(factory: Callable[..., Compressor]) -> dict[str, str]:
    """A docstring's text on each argument, on one line; empty if the docstring cannot be read."""
    try:
        parsed = docstring_parser.parse(inspect.getdoc(factory) or "", docstring_parser.DocstringStyle.GOOGLE)
    except docstring_parser.ParseError:
        return {}
    return {said.arg_name: " ".join(said.description.split()) for said in parsed.params if said.description}


def _given(name: str) -> dict[str, typing.Any]:
    return {keyword: FLAGS[f"{name}_{keyword}"].value for keyword in keywords(CODECS[name])}


def _compressor(name: str, seed: int, given: dict[str, typing.Any]) -> Compressor:
    """The codec with these keywords, which are keys of `keywords`."""
    given = dict(given)
    if bits := given.pop("quantizer_bits", 0):
        given["quantizer"] = qsgd(bits, seed=seed)
    made = CODECS[name](seed=seed, **given)
    if "error_feedback" not in given or made.settings.error_feedback is None:
        return made
    return CODECS[name](seed=seed, **given | {"error_feedback": _feedback()})


def _feedback() -> Feedback | EF21:
    """The error feedback that the flags give, for codecs that have any."""
    if FLAGS.ef21 and FLAGS.feedback_decay != 1:
        raise ValueError(f"--ef21 has no residual that --feedback_decay={FLAGS.feedback_decay} could shrink: give one")
    return EF21() if FLAGS.ef21 else Feedback(FLAGS.feedback_decay)


def _strength(codec: str) -> str | None:
    """The keyword of a codec that accordion switches, with the codec's flags; None if there is none."""
    strength = _compressor(codec, 0, _given(codec)).codec.strength
    return None if strength is None else strength.setting


def _at_strength(codec: str, value: float) -> dict[str, typing.Any]:
    """The keywords from the codec's flags, with another strength; unchanged if accordion will refuse the codec."""
    given, strength = _given(codec), _strength(codec)
    if strength is not None:
        kind, _ = keywords(CODECS[codec])[strength]
        given[strength] = int(value) if kind is int and value == int(value) else value
    return given


def _settings(name: str) -> dict[str, tuple[typing.Any, typing.Any]]:
    """The value and the default of each keyword; keywords of the codec inside accordion begin with its name."""
    defaults = keywords(CODECS[name])
    found = {keyword: (value, defaults[keyword][1]) for keyword, value in _given(name).items()}
    if "error_feedback" in found:
        keeps = _compressor(name, 0, _given(name)).settings.error_feedback is not None
        shared = {key: FLAGS[key] for key in FEEDBACK}
        found |= {key: (flag.value if keeps else flag.default, flag.default) for key, flag in shared.items()}
    if name == "accordion":
        inner = FLAGS.accordion_codec
        strength = _strength(inner)
        found |= {f"{inner}_{keyword}": pair for keyword, pair in _settings(inner).items() if keyword != strength}
    return found


def _require_known(names: list[str]) -> bool:
    unknown = [name for name in names if name not in CODECS]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "no codec"
        raise flags.ValidationError(f"got {got}; the codecs are {', '.join(CODECS)}")
    return True
