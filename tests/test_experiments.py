"""The experiments: their flags, their data and how they refuse them, and one short training from end to end."""

import inspect
import itertools
import os
import pathlib
import re
import subprocess
import sys
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import cifar, codecs, data, display, lm, loop, models, records, training
from gradcomp_jax import (
    EF21,
    DelayedState,
    Feedback,
    accordion,
    gradiveq,
    init,
    make_mesh,
    powersgd,
    qsgd,
    randomk,
    simulate,
    topk,
    wire_bits,
)

ROOT = pathlib.Path(__file__).parent.parent
PRESETS = sorted((ROOT / "experiments" / "presets").glob("*.flags"))
FLAGS = flags.FLAGS
COURSE = codecs.Course(10, None)


@pytest.fixture(autouse=True)
def default_flags():
    with flagsaver.flagsaver():
        FLAGS(["test"])
        yield


# Flags


@pytest.mark.parametrize("name", codecs.CODECS)
def test_every_plain_keyword_of_a_codec_has_its_flag(name):
    parameters = inspect.signature(codecs.CODECS[name]).parameters
    without = {"axis_name", "seed", "compress", "stacked", "split", "quantizer", "course"}
    for keyword in parameters.keys() - without:
        flag = FLAGS[f"{name}_{keyword}"]
        assert flag.value == parameters[keyword].default, keyword
        assert len(flag.help) > 10, keyword
    assert not [keyword for keyword in without if f"{name}_{keyword}" in FLAGS]


def test_flags_have_the_types_and_the_help_of_the_factory():
    FLAGS(["test", "--qsgd_levels=3", "--powersgd_min_rate=2", "--qsgd_error_feedback", "--qsgd_norm=l2"])
    assert FLAGS.qsgd_levels == 3
    assert isinstance(FLAGS.powersgd_min_rate, float)
    assert FLAGS.qsgd_error_feedback is True
    assert FLAGS.qsgd_norm == "l2"
    assert FLAGS["qsgd_min_size"].help == (
        "leaves of fewer elements are sent dense; by default 10,000, like in the paper."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "One.\n\n    Args:\n      rank: r,\n        at least 1.\n\n    Returns:\n      It.\n    ",
            {"rank": "r, at least 1."},
        ),
        ("One.\n\n    Args:\n      rank: r: of Q.\n    ", {"rank": "r: of Q."}),
        ("One.", {}),
        (None, {}),
        ("One.\n\n    Args:\n      no colon\n\n    Returns:\n      It.\n    ", {}),
    ],
)
def test_help_is_read_from_any_docstring(text, expected):
    def factory(rank: int = 2):
        pass

    factory.__doc__ = text
    assert codecs.argument_help(factory) == expected


def test_a_codec_whose_docstring_says_nothing_has_its_flags(monkeypatch):
    def bare(bits: int = 2):
        pass

    monkeypatch.setattr(codecs, "CODECS", {"bare": bare})
    monkeypatch.setattr(codecs, "flags", unittest.mock.Mock())
    defined = []
    monkeypatch.setattr(codecs, "_DEFINE", {int: lambda *args: defined.append(args)})
    codecs.define_flags()
    assert defined == [("bare_bits", 2, "bits of bare.")]


def test_help_is_short_and_shows_the_settings_of_codecs_that_are_named(monkeypatch):
    text = FLAGS.module_help("experiments.cifar")
    assert len(text.splitlines()) < 85  # and the docstring
    assert {f"--{name}:" for name in ("codec", "model", "epochs", "lr", "out_dir")} <= set(text.split())
    assert not re.search(rf"^  --(\[no\])?({'|'.join(codecs.CODECS)})_", text, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["program.py", "--codec", "powersgd", "--codec=topk,zip", "--help"])
    codecs.show_settings(sys.argv)
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+):", FLAGS.module_help("program.py"), re.MULTILINE))
    assert {"powersgd_rank", "topk_fraction", "ef21"} < shown
    assert not [name for name in shown if name.startswith("qsgd")]


def test_flags_reach_the_codec_and_its_label():
    FLAGS(["test", "--qsgd_bits=8", "--powersgd_rank=4", "--gradiveq_ratio=4", "--gradiveq_warmup_steps=0"])
    params = {"w": jnp.zeros((100, 200))}
    for name, codec in (("qsgd", qsgd(bits=8)), ("powersgd", powersgd(rank=4))):
        assert sent(codecs.from_flags(name, 0, COURSE), params, 4) == sent(codec, params, 4)
    assert [codecs.label(name) for name in ("none", "gradiveq", "powersgd", "qsgd", "accordion")] == [
        "none",
        "gradiveq ratio=4.0 warmup_steps=0",
        "powersgd rank=4",
        "qsgd bits=8",
        "accordion",
    ]


def test_flags_that_are_not_given_may_be_none():
    FLAGS(
        [
            "test",
            "--cast_dtype=float8_e5m2",
            "--topk_dense_dtype=bfloat16",
            "--randomk_rank=2",
            "--nosignnorm_error_feedback",
            "--adaptive_sample",
            "--qsgd_capacity=3",
        ]
    )
    assert (FLAGS.randomk_rank, FLAGS.randomk_fraction) == (2, None)
    assert (FLAGS.cast_dtype, FLAGS.topk_dense_dtype, FLAGS.qsgd_dense_dtype) == ("float8_e5m2", "bfloat16", None)
    assert codecs.from_flags("topk", 0, COURSE).settings.dense_dtype == jnp.bfloat16
    assert (FLAGS.signnorm_error_feedback, FLAGS.onebit_aggregate) == (False, None)
    assert (FLAGS.adaptive_sample, FLAGS.adaptive_capacity, FLAGS.qsgd_capacity) == (True, None, 3.0)


def test_the_kind_of_error_feedback_is_one_for_all_codecs_that_have_any():
    FLAGS(["test", "--feedback_decay=0.9", "--qsgd_bits=8", "--accordion_codec=topk", "--accordion_low=0.1"])
    kept = {name: codecs.from_flags(name, 0, COURSE).settings.error_feedback for name in ("topk", "signnorm", "qsgd")}
    assert kept == {"topk": Feedback(0.9), "signnorm": Feedback(0.9), "qsgd": None}
    assert [codecs.label(name) for name in kept] == [
        "topk feedback_decay=0.9",
        "signnorm feedback_decay=0.9",
        "qsgd bits=8",
    ]
    FLAGS(["test", "--feedback_decay=1", "--ef21", "--qsgd_error_feedback", "--accordion_high=0.01"])
    for name in ("qsgd", "accordion"):
        assert codecs.from_flags(name, 0, COURSE).settings.error_feedback == EF21()
    assert codecs.label("accordion") == "accordion codec=topk low=0.1 high=0.01 topk_ef21=True"
    assert codecs.settings("qsgd")["qsgd_ef21"] is True
    assert codecs.settings("none")["none_ef21"] is False
    FLAGS(["test", "--feedback_decay=0.5"])
    with pytest.raises(ValueError, match=r"--ef21 has no residual that --feedback_decay=0\.5 could"):
        codecs.from_flags("topk", 0, COURSE)


@pytest.mark.parametrize(("name", "inside"), [("powersgd", powersgd), ("gradiveq", gradiveq)])
def test_a_quantizer_inside_is_given_by_its_bits(name, inside):
    FLAGS(["test", f"--{name}_quantizer_bits=8", "--gradiveq_warmup_steps=0"])
    more = {"warmup_steps": 0} if name == "gradiveq" else {}
    params = {"w": jnp.zeros((3, 3, 100, 20))}
    expected = sent(inside(quantizer=qsgd(8), **more), params, 4)
    assert sent(codecs.from_flags(name, 0, COURSE), params, 4) == expected < sent(inside(**more), params, 4)
    assert "quantizer_bits=8" in codecs.label(name)
    FLAGS(["test", f"--{name}_quantizer_bits=0"])
    assert "quantizer" not in codecs.label(name)


@pytest.mark.parametrize(
    ("args", "low", "high"),
    [
        ([], powersgd(2), powersgd(1)),
        (
            ["--accordion_codec=topk", "--accordion_low=0.1", "--accordion_high=0.01", "--topk_aggregate=gather"],
            topk(0.1, aggregate="gather"),
            topk(0.01, aggregate="gather"),
        ),
        (["--accordion_codec=qsgd", "--accordion_low=8", "--accordion_high=2"], qsgd(8), qsgd(2)),
        (["--accordion_codec=randomk", "--accordion_low=2", "--randomk_rank=9"], randomk(rank=2), randomk(rank=1)),
        (["--accordion_codec=gradiveq", "--accordion_low=8", "--accordion_high=16"], gradiveq(), gradiveq(ratio=16)),
    ],
)
def test_accordion_is_given_a_codec_and_two_strengths_of_it(args, low, high):
    FLAGS(["test", *args, "--accordion_interval=2", "--accordion_window=0.5"])
    codec = codecs.from_flags("accordion", 0, COURSE)
    assert codec.settings == low.settings
    params = {"w": jnp.zeros((3, 3, 100, 200))}
    expected = accordion(low, high, interval=20, window=5)
    assert jax.eval_shape(codec.init, params) == jax.eval_shape(expected.init, params)
    if "gradiveq" not in str(args):  # whose state tells
        assert sent(codec, params, 4) == sent(expected, params, 4)


def test_labels_and_settings_of_accordion_tell_of_the_codec_inside():
    FLAGS(["test", "--accordion_codec=topk", "--accordion_low=0.1", "--topk_aggregate=gather", "--topk_fraction=0.5"])
    assert codecs.label("accordion") == "accordion codec=topk low=0.1 topk_aggregate=gather"
    settings = codecs.settings("accordion")
    assert (settings["accordion_low"], settings["accordion_topk_aggregate"]) == (0.1, "gather")
    assert "accordion_topk_fraction" not in settings


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--accordion_codec=onebit"], "codec 'onebit' in these settings has one strength only"),
        (["--accordion_codec=accordion"], "--accordion_codec=accordion must be one of none, gradiveq,"),
        (["--accordion_interval=0"], "--accordion_interval=0.0 must be above 0"),
        (["--accordion_window=-1"], "--accordion_window=-1.0 must be above 0"),
        (["--accordion_high=3"], "low has rank=2, which must be above high's rank=3"),
        (["--accordion_low=2.5"], "rank=2.5 must be a whole number"),
        (["--powersgd_quantizer_bits=4"], "has one strength only"),
    ],
)
def test_what_accordion_cannot_switch_is_refused(args, message):
    FLAGS(["test", *args])
    with pytest.raises(ValueError, match=message):
        codecs.from_flags("accordion", 0, COURSE)


@jax.numpy_dtype_promotion("standard")  # which schedules need
def test_accordion_knows_of_falls_of_the_learning_rate_in_steps_only():
    task = types.SimpleNamespace(examples=1280)
    params = {"w": jnp.ones((100, 200))}
    for schedule, expected in (([], 0), (["--schedule=step", "--decay_epochs=5"], 0.1)):
        FLAGS(["test", *schedule, "--warmup_epochs=1"])
        codec = training.codec("accordion", task)
        step = simulate(lambda params, batch: sum(jnp.sum(x) for x in jax.tree.leaves(params)), codec, 2)
        _, opt_state, _ = step(params, init(codec, params, 2), jnp.zeros(2))
        np.testing.assert_allclose(opt_state.codec.learning_rate, expected, rtol=1e-6)


def test_delayed_is_for_every_codec_and_told():
    FLAGS(["test", "--delayed", "--qsgd_bits=8"])
    state = jax.eval_shape(
        training.codec("qsgd", types.SimpleNamespace(examples=1280)).init, {"w": jnp.zeros((100, 200))}
    )
    assert isinstance(state, DelayedState)
    assert training.label("qsgd") == "qsgd bits=8 delayed"


@pytest.mark.parametrize("given", ["qsgd,zip", ""])
def test_an_unknown_codec_is_told_which_there_are(given):
    with pytest.raises(flags.IllegalFlagValueError, match="the codecs are none, gradiveq, powersgd, qsgd, onebit"):
        FLAGS(["test", f"--codec={given}"])


@pytest.mark.parametrize("argv", [["--codec=qsgd", "--flagfile=P"], ["--flagfile=P", "--codec=qsgd"]])
def test_what_is_typed_beside_a_preset_wins_in_any_order(argv):
    argv = [arg.replace("P", str(ROOT / "experiments/presets/digits.flags")) for arg in argv]
    FLAGS(loop.command_line(["test", *argv]))
    assert FLAGS.codec == ["qsgd"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_parse_and_tell_what_they_reached(preset):
    FLAGS(["test", f"--flagfile={preset}"])
    comments = " ".join(line for line in preset.read_text().splitlines() if line.startswith("#"))
    assert f"--flagfile=experiments/presets/{preset.name}" in comments
    assert "MB" in comments
    if preset.name == "lm.flags":
        assert [plan.name for name in FLAGS.method for plan in lm.plans_of(name, [15])] == FLAGS.method
        return
    assert "%" in comments
    for name in FLAGS.codec:
        codecs.from_flags(name, 0, COURSE)


# The command


def run(*args):
    """The command in a process of its own, with its output in `stdout` and `stderr`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    command = [sys.executable, "-m", "experiments.cifar", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def sent(codec, params, workers, stats=()):
    """MB that a worker sends in a step, with its batch statistics, loss and accuracy."""

    def loss_fn(params, stats, batch):
        loss = sum(jnp.sum(x) for x in jax.tree.leaves(params)) + 0 * jnp.sum(batch)
        return loss, (stats, loss)

    step = simulate(loss_fn, codec, workers, has_state=True, has_aux=True)
    _, opt_state, *_ = step(params, init(codec, params, workers), stats, jnp.zeros(workers))
    return wire_bits(opt_state).last / 8e6


def test_a_short_training_gives_a_table_and_a_figure(tmp_path):
    done = run(
        "--codec=none,qsgd",
        "--workers=2",
        "--epochs=1",
        "--batch_size=512",
        "--eval_every=1",
        f"--out_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--epochs=1 ends within --warmup_epochs=1: the learning rate only rises\n")
    assert (tmp_path / "digits-resnet8.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)
    assert done.stdout.count("test accuracy ") == 2 * 2 + 1  # two evaluations of each codec, and the table's head

    _, params, stats = models.create("resnet8", (8, 8, 1), 10, 0)
    for name in ("none", "qsgd"):
        (row,) = re.findall(rf"^│ {name} .*", done.stdout, re.MULTILINE)
        accuracy, step, total, ratio = (cell.strip() for cell in row.split("│")[2:6])
        expected, dense = (sent(codecs.CODECS[codec](), params, 2, stats) for codec in (name, "none"))
        assert accuracy.endswith("%")
        assert (step, total, ratio) == (f"{expected:.4f}", f"{2 * expected:.2f}", f"{dense / expected:.2f}")


def test_codecs_train_with_outer_steps_beside_those_in_each_step(tmp_path):
    args = ["--codec=topk", "--every=1,3", "--model=resnet8gn", "--workers=2", "--epochs=4", "--batch_size=512"]
    done = run(*args, "--warmup_epochs=0", "--eval_every=8", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    sent = {}
    for path in tmp_path.glob("*.jsonl"):
        found = records.read(path)
        sent[found.name] = found.end["bytes"]
        assert (found.end["step"], found.end["exchanges"]) == (8, 2 if "every=3" in found.name else 8)
        assert len(re.findall(rf"^│ {found.called} .*", done.stdout, re.MULTILINE)) == 1
    assert {*sent} == {"topk", "topk every=3"}
    assert sent["topk every=3"] == pytest.approx(sent["topk"] / 4, rel=1e-2)  # the values beside differ
    assert "topk, every 3: the last 2 steps came after its last exchange, and count for nothing." in done.stdout


def recorded(codec, label, sent, dense=2.0, skipped=0, settings=None):
    """A run of some steps, given what each sent in MB; dense sends 2 MB."""
    so_far = {"step": len(sent), "bytes": sum(sent) * 10**6, "dense_bytes": len(sent) * dense * 10**6}
    fewer = [x for x in sent if x < dense]
    compressed = {"compressed_steps": len(fewer), "compressed_bytes": sum(fewer) * 10**6}
    lines = [
        {"kind": "run", "codec": codec, "label": label, "workers": 4, "emulated": False, "settings": settings or {}},
        {"kind": "train", **so_far, "ms": 1.0},
        {"kind": "test", **so_far, "accuracy": 0.5},
        {"kind": "end", **so_far, **compressed, "skipped": skipped, "seconds": {"step": 1.0}},
    ]
    return records.of(lines)


def test_the_table_tells_compressed_steps_from_the_others():
    """Of 8 steps, 6 at a quarter of 2 MB; the run sent 7 MB where dense sends 16."""
    phases = recorded("gradiveq", "gradiveq k=3", [2.0, 2.0] + 6 * [0.5])
    dense = recorded("none", "none", 8 * [2.0])
    cells = [list(column.cells) for column in display.table([phases, dense], "").columns]
    assert cells[2] == ["0.8750", "2.0000"]
    assert cells[4:7] == [["2.29", "1.00"], ["75%", "0%"], ["4.00", ""]]


def test_notes_tell_what_the_table_does_not():
    runs = [recorded("gradiveq", "gradiveq k=3", [2.0, 0.5]), recorded("none", "none", [2.0])]
    assert display.notes(runs)[1:] == ["Settings: gradiveq k=3."]
    (note,) = display.notes([recorded("gradiveq", "gradiveq", [2.0] * 8, settings={"gradiveq_warmup_steps": 2500})])[1:]
    assert note == "gradiveq sent less than dense in none of the 8 steps: see --gradiveq_warmup_steps."
    (note,) = display.notes([recorded("own", "own", [2.0])])[1:]
    assert note == "own sent less than dense in none of the 1 steps."
    (note, skipped) = display.notes([recorded("qsgd", "qsgd", [1.0, 4.0], skipped=2)])[1:]
    assert "over 4 workers it sends 1.25 times as many bytes" in note
    assert "qsgd skipped 2 steps" in skipped
    runs[0].header["beside"] = 12
    assert display.notes(runs)[1] == display.BESIDE_NOTE


# Batches


@pytest.mark.parametrize("workers", [1, 4])
def test_crops_and_flips_are_of_the_images_and_do_not_depend_on_the_workers(workers):
    images = np.random.default_rng(0).integers(1, 256, (8, 6, 6, 1), np.uint8)
    sharding = NamedSharding(make_mesh(workers), P("data"))
    crop = jax.jit(cifar.crop_and_flip, out_shardings=sharding)
    got = np.asarray(crop(jax.random.key(0), jax.device_put(images, sharding)))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, cifar.crop_and_flip(jax.random.key(0), images))
    assert (got != np.asarray(crop(jax.random.key(1), jax.device_put(images, sharding)))).any()
    padded = np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)])
    seen = set()
    for image, whole in zip(got, padded, strict=True):
        candidates = {
            (row, column, flip): whole[row : row + 6, column : column + 6][:, :: 1 - 2 * flip]
            for row in range(9)
            for column in range(9)
            for flip in (0, 1)
        }
        found = [place for place, candidate in candidates.items() if (candidate == image).all()]
        assert found
        seen.add(found[0])
    assert len({flip for *_, flip in seen}) == 2
    assert len({row for row, *_ in seen}) > 2


def test_a_training_sees_the_same_batches_from_wherever_it_goes_on():
    FLAGS(["test", "--augment", "--batch_size=512", "--workers=2"])
    task = cifar.classification(data.load("digits", None), training.worker_mesh(2))
    whole = list(itertools.islice(task.batches(0), 5))
    for batch, expected in zip(itertools.islice(task.batches(3), 2), whole[3:], strict=True):
        for x, y in zip(batch, expected, strict=True):
            assert (x == y).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch_size=30"], "--batch_size=30 does not divide among --workers=4"),
        (["--batch_size=2000"], "--batch_size=2000 is more than the 1437 examples"),
        (["--dataset=cifar10", "--data_dir=/nowhere"], "cannot read /nowhere/cifar-10-batches-py/data_batch_1"),
        (["--codec=qsgd", "--qsgd_bits=3"], "bits=3 must be 2, 4 or 8"),
        (["--codec=none,qsgd", "--qsgd_min_size=99999"], "'qsgd' would compress none of the 23 leaves"),
        (["--every=1,10"], "--every=10: between exchanges the batch statistics of --model=resnet8 would differ"),
        (["--every=10", "--delayed", "--model=resnet8gn"], "--delayed is for exchanges in each step, and not for --ev"),
        (["--workers=9"], "--workers=9: jax has 8 devices"),
        (["--schedule=step"], "--decay_epochs=150,250 are not reached in --epochs=10"),
        (["--model=vgg19"], "VGG-19-bn needs images of 32x32 or more, got 8x8"),
        (["--out_dir=/dev/null/x"], "--out_dir=/dev/null/x is no directory to write in (Not a directory): give"),
    ],
)
def test_wrong_settings_end_in_a_message(args, message):
    argv = loop.command_line(["cifar", *args])
    FLAGS(argv)
    with pytest.raises(SystemExit, match=re.escape(message)):
        cifar.main()
