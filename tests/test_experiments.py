"""The experiments: their flags, their data and how they refuse them, and one short training from end to end."""

import inspect
import os
import pathlib
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cifar, codecs, data, models, report
from gradcomp_jax import init, powersgd, qsgd, simulate, wire_bits

ROOT = pathlib.Path(__file__).parent.parent
PRESETS = sorted((ROOT / "experiments" / "presets").glob("*.flags"))
FLAGS = flags.FLAGS


@pytest.fixture(autouse=True)
def default_flags():
    with flagsaver.flagsaver():
        FLAGS(["test"])
        yield


# Flags


@pytest.mark.parametrize("name", codecs.CODECS)
def test_every_plain_keyword_of_a_codec_has_its_flag(name):
    parameters = inspect.signature(codecs.CODECS[name]).parameters
    without = {"axis_name", "seed", "compress", "stacked"}
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
        "leaves of fewer elements are sent dense, by default those below 10,000, as in the paper."
    )


def test_flags_reach_the_codec_and_its_label():
    FLAGS(["test", "--qsgd_bits=8", "--powersgd_rank=4", "--gradiveq_ratio=4", "--gradiveq_warmup_steps=0"])
    params = {"w": jnp.zeros((100, 200))}
    for name, codec in (("qsgd", qsgd(bits=8)), ("powersgd", powersgd(rank=4))):
        assert sent(codecs.from_flags(name, 0), params, 4) == sent(codec, params, 4)
    assert [codecs.label(name) for name in codecs.CODECS] == [
        "none",
        "gradiveq ratio=4.0 warmup_steps=0",
        "powersgd rank=4",
        "qsgd bits=8",
    ]


@pytest.mark.parametrize("given", ["qsgd,zip", ""])
def test_an_unknown_codec_is_told_which_there_are(given):
    with pytest.raises(flags.IllegalFlagValueError, match="the codecs are none, gradiveq, powersgd, qsgd"):
        FLAGS(["test", f"--codec={given}"])


@pytest.mark.parametrize("argv", [["--codec=qsgd", "--flagfile=P"], ["--flagfile=P", "--codec=qsgd"]])
def test_what_is_typed_beside_a_preset_wins_in_any_order(argv):
    argv = [arg.replace("P", str(ROOT / "experiments/presets/digits.flags")) for arg in argv]
    FLAGS(cifar.flagfiles_first(["test", *argv]))
    assert FLAGS.codec == ["qsgd"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_parse_and_tell_what_they_reached(preset):
    FLAGS(["test", f"--flagfile={preset}"])
    comments = " ".join(line for line in preset.read_text().splitlines() if line.startswith("#"))
    assert f"--flagfile=experiments/presets/{preset.name}" in comments
    assert "%" in comments
    assert "MB" in comments
    for name in FLAGS.codec:
        codecs.from_flags(name, 0)


# Data


def test_digits_are_split_the_same_way_every_time():
    dataset, again = data.load("digits", None), data.load("digits", None)
    assert dataset.train.images.shape == (1437, 8, 8, 1)
    assert dataset.test.images.shape == (360, 8, 8, 1)
    assert np.bincount(dataset.test.labels).min() >= 34
    np.testing.assert_array_equal(dataset.test.images, again.test.images)
    normal = dataset.normalize(dataset.train.images)
    assert normal.dtype == np.float32
    assert abs(normal.mean()) < 1e-4
    assert abs(normal.std() - 1) < 1e-4


def test_the_order_of_the_batches_depends_on_seed_and_epoch_alone():
    split = data.Split(np.arange(10)[:, None, None, None], np.arange(10))

    def epoch(seed, epoch):
        return np.concatenate([batch.labels for batch in data.batches(split, 4, seed, epoch)])

    assert len(epoch(0, 0)) == 8
    assert len(set(epoch(0, 0))) == 8
    np.testing.assert_array_equal(epoch(0, 1), epoch(0, 1))
    assert list(epoch(0, 0)) != list(epoch(0, 1)) != list(epoch(1, 1))


def test_the_last_test_batch_is_filled_up_with_images_of_no_class():
    split = data.Split(np.ones((5, 2, 2, 1), np.uint8), np.arange(5))
    full = list(data.padded_batches(split, 4))
    assert [batch.images.shape for batch in full] == [(4, 2, 2, 1)] * 2
    np.testing.assert_array_equal(full[1].labels, [4, -1, -1, -1])


@pytest.fixture
def cifar10_folder(tmp_path, monkeypatch):
    """A data set of three images a file; the test file is pickled as Python 2 did, by the oldest protocol."""
    monkeypatch.setattr(data, "CIFAR10_FILE_ROWS", 3)
    folder = tmp_path / data.CIFAR10_FOLDER
    folder.mkdir()
    for i, name in enumerate([*data.CIFAR10_TRAIN_FILES, data.CIFAR10_TEST_FILE]):
        images = np.arange(3 * 3072).reshape(3, 3072).astype(np.uint8)
        protocol = 2 if name == data.CIFAR10_TEST_FILE else pickle.DEFAULT_PROTOCOL
        content = pickle.dumps({b"data": images, b"labels": [i, 0, 9]}, protocol)
        # Before numpy 2 the same function had another address.
        (folder / name).write_bytes(content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    return folder


def test_cifar10_is_read_from_the_folder_or_the_one_above(cifar10_folder, monkeypatch):
    train, test = data.cifar10(str(cifar10_folder))
    assert train.images.shape == (15, 32, 32, 3)
    np.testing.assert_array_equal(train.labels, [0, 0, 9, 1, 0, 9, 2, 0, 9, 3, 0, 9, 4, 0, 9])
    # Planes of 1,024 pixels in the file: the first pixel's green is number 1,024.
    np.testing.assert_array_equal(test.images[0, 0, :2, 1], np.array([1024, 1025]).astype(np.uint8))
    monkeypatch.setenv("GRADCOMP_DATA_DIR", str(cifar10_folder.parent))
    np.testing.assert_array_equal(data.cifar10(None)[1].images, test.images)


def test_missing_data_name_the_file_and_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADCOMP_DATA_DIR", raising=False)
    with pytest.raises(data.DataError, match=r"no directory given.*--data_dir.*GRADCOMP_DATA_DIR.*--dataset=digits"):
        data.cifar10(None)
    with pytest.raises(data.DataError, match=r"cifar-10-batches-py/data_batch_1 .*No such file.*--dataset=digits"):
        data.cifar10(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:1000], "data_batch_3 is not a whole batch file"),
        (lambda whole: b"", "data_batch_3 is not a whole batch file"),
        (lambda whole: pickle.dumps([1, 2]), r"data_batch_3: expected b'data' to be uint8 \[3, 3072\], got nothing"),
        (
            lambda whole: pickle.dumps({**pickle.loads(whole), b"data": np.zeros((2, 3072), np.uint8)}),
            r"data_batch_3: expected b'data' to be uint8 \[3, 3072\], got uint8 \[2, 3072\]",
        ),
        (
            lambda whole: pickle.dumps({**pickle.loads(whole), b"labels": [0, 1, 10]}),
            "data_batch_3: expected b'labels' to be a list of 3 ints from 0 to 9",
        ),
        (
            lambda whole: pickle.dumps({**pickle.loads(whole), b"labels": [0, [1], 2]}),
            "data_batch_3: expected b'labels' to be a list of 3 ints from 0 to 9",
        ),
    ],
    ids=["truncated", "empty", "no dictionary", "too few images", "unknown class", "ragged labels"],
)
def test_damaged_data_name_the_file_and_what_was_expected(cifar10_folder, damage, message):
    path = cifar10_folder / "data_batch_3"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match=message):
        data.cifar10(str(cifar10_folder))


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval])
def test_a_hostile_file_is_refused_and_not_executed(cifar10_folder, tmp_path, function):
    mark = tmp_path / "mark"
    argument = str(mark) if function is os.mkdir else f"__import__('os').mkdir({str(mark)!r})"
    (cifar10_folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Hostile(function, argument)}))
    with pytest.raises(data.DataError, match=r"data_batch_1 .*which no array needs"):
        data.cifar10(str(cifar10_folder))
    assert not mark.exists()


# Models


@pytest.mark.parametrize(("name", "parameters"), [("resnet8", 75_290), ("resnet20", 269_722)])
def test_networks_have_the_number_of_parameters_of_parameter_free_shortcuts(name, parameters):
    shapes = jax.eval_shape(lambda: models.create(name, 3, 0)[1])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


# The command


def run(*args):
    """The command in a process of its own, with its output in `stdout` and `stderr`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    command = [sys.executable, "-m", "experiments.cifar", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def sent(codec, params, workers):
    """MB that a worker sends in a step."""
    step = simulate(lambda params, batch: sum(jnp.sum(x) for x in jax.tree.leaves(params)), codec, workers)
    _, opt_state, _ = step(params, init(codec, params, workers), jnp.zeros(workers))
    return wire_bits(opt_state).last / 8e6


def test_a_short_training_gives_a_table_and_a_figure(tmp_path):
    done = run(
        "--codec=none,qsgd", "--workers=2", "--epochs=1", "--batch_size=512", "--eval_every=1", f"--out_dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)
    assert done.stdout.count("test accuracy ") == 2 * 2 + 1  # two evaluations of each codec, and the table's head

    _, params, _ = models.create("resnet8", 1, 0)
    for name in ("none", "qsgd"):
        (row,) = re.findall(rf"^│ {name} .*", done.stdout, re.MULTILINE)
        accuracy, step, total, ratio = (cell.strip() for cell in row.split("│")[2:6])
        expected, dense = (sent(codecs.CODECS[codec](), params, 2) for codec in (name, "none"))
        assert accuracy.endswith("%")
        assert (step, total, ratio) == (f"{expected:.4f}", f"{2 * expected:.2f}", f"{dense / expected:.2f}")


def test_the_table_tells_compressed_steps_from_the_others():
    """Of 8 steps, 6 at a quarter of 2 MB; the run sent 7 MB where dense sends 16."""
    curve = [report.Point(8, 7.0, 0.5)]
    phases = report.Result("gradiveq", "gradiveq k=3", curve, [2.0, 2.0] + 6 * [0.5], 2.0, 1.0, 1.0)
    dense = report.Result("none", "none", curve, 8 * [2.0], 2.0, 1.0, 1.0)
    cells = [list(column.cells) for column in report.table([phases, dense], "").columns]
    assert cells[2] == ["0.8750", "2.0000"]
    assert cells[4:7] == [["2.29", "1.00"], ["75%", "0%"], ["4.00", ""]]
    notes = report.notes([phases, dense, dense._replace(name="gradiveq")], 4, emulated=False)
    assert "Settings: gradiveq k=3." in notes
    assert [note for note in notes if "sent less than dense in none of the 8 steps" in note] == notes[-1:]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch_size=30"], "--batch_size=30 does not divide among --workers=4"),
        (["--batch_size=2000"], "--batch_size=2000 is more than the 1437 images"),
        (["--dataset=cifar10", "--data_dir=/nowhere"], "cannot read /nowhere/cifar-10-batches-py/data_batch_1"),
        (["--codec=qsgd", "--qsgd_bits=3"], "bits=3 must be 2, 4 or 8"),
        (["--codec=none,qsgd", "--qsgd_min_size=99999"], "'qsgd' would compress none of the 23 leaves"),
        (["--workers=9"], "--workers=9: jax has 8 devices"),
        (["digits"], "'digits' is no flag"),
    ],
)
def test_wrong_settings_end_in_a_message(args, message):
    argv = cifar.flagfiles_first(["cifar", *args])
    with pytest.raises(SystemExit, match=re.escape(message)):
        cifar.main(FLAGS(argv))
