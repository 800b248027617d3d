"""The data: how they are split, read and checked; and every way in which files can be wrong."""

import functools
import itertools
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from experiments import data
from tests.cifar_files import (
    assert_same,
    python2,
    small_and_offline,  # noqa: F401, used by every test here
    write_files,
)

# Of each CIFAR: a training file, and how many images it has here.
TRAIN_FILES = [("cifar10", "data_batch_3", 20), ("cifar100", "train", 200)]


# Splits and batches


def test_digits_are_split_the_same_way_every_time():
    dataset, again = data.load("digits", None), data.load("digits", None)
    assert dataset.train.images.shape == (1437, 8, 8, 1)
    assert dataset.test.images.shape == (360, 8, 8, 1)
    assert np.bincount(dataset.test.labels).min() >= 34
    assert (dataset.classes, dataset.channels, dataset.augment) == (10, 1, False)
    assert_same(dataset.test, again.test)


@pytest.mark.parametrize("name", data.DATASETS)
def test_images_are_normalized_by_the_training_split(name, tmp_path):
    if name != "digits":
        write_files(name, tmp_path)
    dataset = data.load(name, str(tmp_path))
    assert dataset.mean.dtype == dataset.std.dtype == np.float32
    normal = dataset.normalize(dataset.train.images)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean((0, 1, 2), np.float64), 0, atol=1e-4)
    np.testing.assert_allclose(normal.std((0, 1, 2), np.float64), 1, atol=1e-4)


def test_settings_are_validated_on_a_tenth_of_the_training_images(tmp_path):
    write_files("cifar10", tmp_path)
    whole = data.load("cifar10", str(tmp_path))
    dataset, again = (data.load("cifar10", str(tmp_path), validation=True) for _ in range(2))
    assert dataset.train.images.shape == (90, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1] * 10)
    assert_same(dataset.test, again.test)
    assert_same(dataset.train, again.train)
    parts = [{image.tobytes() for image in split.images} for split in (dataset.train, dataset.test, whole.train)]
    assert parts[0] | parts[1] == parts[2]
    assert not parts[0] & parts[1]
    np.testing.assert_allclose(dataset.mean, dataset.train.images.mean((0, 1, 2)), rtol=1e-6)
    assert len(data.load("digits", None, validation=True).test.labels) == 143


def test_an_unknown_data_set_is_told_which_there_are():
    with pytest.raises(ValueError, match="name='mnist' is none of digits, cifar10, cifar100"):
        data.load("mnist", None)


TEN = data.Split(np.arange(10)[:, None, None, None], np.arange(10))


def test_the_order_of_the_batches_depends_on_seed_and_epoch_alone():
    def epoch(seed, epoch):
        batches = list(itertools.islice(data.batches(TEN, 4, seed, 2 * epoch), 2))
        for batch in batches:
            np.testing.assert_array_equal(batch.images.ravel(), batch.labels)
        return [*batches[0].labels, *batches[1].labels]

    assert len(set(epoch(0, 0))) == 8
    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 0) != epoch(0, 1) != epoch(1, 1)


@pytest.mark.parametrize("first", range(6))
def test_batches_go_on_where_an_interrupted_training_stopped(first):
    """Two batches an epoch, so that seven cross three borders."""
    whole = list(itertools.islice(data.batches(TEN, 4, 5), 7))
    resumed = itertools.islice(data.batches(TEN, 4, 5, first), 7 - first)
    for batch, expected in zip(resumed, whole[first:], strict=True):
        assert_same(batch, expected)


def test_skipped_batches_are_not_read():
    class Counted(np.ndarray):
        read = 0

        def __getitem__(self, index):
            Counted.read += len(index)
            return super().__getitem__(index)

    batches = data.batches(data.Split(TEN.images.view(Counted), TEN.labels), 2, 0, first=1003)
    next(batches)
    assert Counted.read == 2


def test_a_batch_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="size=11 is more than the 10 images"):
        next(data.batches(TEN, 11, 0))


def test_the_last_test_batch_is_filled_up_with_images_of_no_class():
    split = data.Split(np.ones((5, 2, 2, 1), np.uint8), np.arange(5))
    full = list(data.padded_batches(split, 4))
    assert [batch.images.shape for batch in full] == [(4, 2, 2, 1)] * 2
    np.testing.assert_array_equal(full[1].labels, [4, -1, -1, -1])


# Files


@pytest.mark.parametrize("dumps", [python2, *(functools.partial(pickle.dumps, protocol=p) for p in (2, 4, 5))])
@pytest.mark.parametrize("name", data.CIFAR)
def test_cifar_is_read_as_it_was_written(name, dumps, tmp_path):
    folder = write_files(name, tmp_path, dumps=dumps)
    layout = data.CIFAR[name]
    dataset = data.load(name, str(folder))
    assert dataset.train.images.shape == (layout.train_rows, 32, 32, 3)
    assert (dataset.classes, dataset.channels, dataset.augment) == (layout.classes, 3, True)
    contents = [pickle.loads((folder / file).read_bytes(), encoding="bytes") for file in layout.archive.files]
    labels = np.concatenate([content[layout.label_key] for content in contents])
    np.testing.assert_array_equal(np.concatenate([dataset.train.labels, dataset.test.labels]), labels)
    assert dataset.train.labels.dtype == np.int32
    # Planes of 1,024 pixels in the file: the first pixel's green is number 1,024.
    raw = contents[-1][b"data"]
    np.testing.assert_array_equal(dataset.test.images[1, 0, :2, 1], raw[1, 1024:1026])
    assert dataset.test.images[1, 2, 3, 2] == raw[1, 2 * 1024 + 2 * 32 + 3]


def test_files_are_found_in_the_folder_or_the_one_above(tmp_path, monkeypatch):
    folder = write_files("cifar10", tmp_path)
    train, _ = data.cifar("cifar10", str(tmp_path))
    assert_same(data.cifar("cifar10", str(folder))[0], train)
    monkeypatch.chdir(folder)
    assert_same(data.cifar("cifar10", ".")[0], train)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(data.cifar("cifar10", "~")[0], train)


def test_the_directory_given_goes_before_the_environment_before_the_cache(tmp_path, monkeypatch):
    places = [tmp_path / "given", tmp_path / "environment", tmp_path / "cache" / "gradcomp_jax"]
    folders = [write_files("cifar10", above, seed) for seed, above in enumerate(places)]
    given, environment, cached = (data.cifar("cifar10", str(folder))[0] for folder in folders)
    assert_same(data.cifar("cifar10", None)[0], cached)
    monkeypatch.setenv("GRADCOMP_DATA_DIR", str(places[1]))
    assert_same(data.cifar("cifar10", None)[0], environment)
    assert_same(data.cifar("cifar10", str(places[0]))[0], given)
    assert not (given.images == environment.images).all()
    assert not (environment.images == cached.images).all()


def test_files_missing_where_they_were_said_to_be_are_not_looked_for_elsewhere(tmp_path, monkeypatch):
    write_files("cifar10", tmp_path / "cache" / "gradcomp_jax")
    message = r"cannot read .*nowhere/cifar-10-batches-py/data_batch_1 \(No such file.*without --data_dir and "
    message += r"GRADCOMP_DATA_DIR it is downloaded.*--dataset=digits"
    with pytest.raises(data.DataError, match=message):
        data.cifar("cifar10", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GRADCOMP_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataError, match=message):
        data.cifar("cifar10", None)


def changed(**changes):
    def damage(whole):
        content = pickle.loads(whole, encoding="bytes")
        labels = b"labels" if b"labels" in content else b"fine_labels"
        keys = {"images": b"data", "labels": labels}
        return pickle.dumps({**content, **{keys[key]: change(content[keys[key]]) for key, change in changes.items()}})

    return damage


DAMAGES = {
    "truncated": (lambda whole: whole[:1000], "FILE is not a whole file of CIFAR"),
    "last byte lost": (lambda whole: whole[:-1], "FILE is not a whole file of CIFAR"),
    "empty": (lambda whole: b"", "FILE is not a whole file of CIFAR"),
    "a page of the web": (lambda whole: b"<!DOCTYPE html>", "FILE is not a whole file of CIFAR"),
    "no dictionary": (lambda whole: pickle.dumps([1]), r"FILE: expected b'data' to be uint8 \[N, 3072\], got nothing"),
    "too few images": (
        changed(images=lambda images: images[:-1]),
        r"FILE: expected b'data' to be uint8 \[N, 3072\], got uint8 \[\d+, 3072\]",
    ),
    "other pixels": (
        changed(images=lambda images: images.astype(np.float32)),
        r"FILE: expected b'data' to be uint8 \[N, 3072\], got float32 \[N, 3072\]",
    ),
    "no labels": (changed(labels=lambda labels: None), "to be a list of N ints from 0 to LAST, got nothing"),
    "too few labels": (changed(labels=lambda labels: labels[:-1]), "to be a list of N ints from 0 to LAST, got a list"),
    "unknown class": (changed(labels=lambda labels: [*labels[:-1], len(labels)]), "ints from 0 to LAST, got a list"),
    "negative class": (changed(labels=lambda labels: [*labels[:-1], -1]), "ints from 0 to LAST, got a list of N"),
    "ragged labels": (changed(labels=lambda labels: [*labels[:-1], [1]]), "ints from 0 to LAST, got a list of N"),
    "labels of one class": (
        changed(labels=lambda labels: [0] * len(labels)),
        r"FILE.* in FOLDER: expected \d+ images of each class, got \{0: .*1: .*\(class: images\)",
    ),
}


@pytest.mark.parametrize(("name", "file", "rows"), TRAIN_FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_with_what_was_expected(name, file, rows, damage, tmp_path):
    folder = write_files(name, tmp_path)
    function, message = DAMAGES[damage]
    (folder / file).write_bytes(function((folder / file).read_bytes()))
    for word, value in {"FILE": file, "FOLDER": folder, "N": rows, "LAST": data.CIFAR[name].classes - 1}.items():
        message = re.sub(rf"\b{word}\b", str(value), message)
    with pytest.raises(data.DataError, match=message) as error:
        data.cifar(name, str(folder))
    assert "--dataset=digits" in str(error.value)


@pytest.mark.parametrize(
    ("name", "source", "target", "message"),
    [
        ("cifar10", "data_batch_1", "data_batch_2", r"data_batch_1, data_batch_2, .*expected 10 images .*a copy"),
        ("cifar10", "test_batch", "data_batch_2", r"data_batch_1, data_batch_2, .*expected 10 images .*a copy"),
        ("cifar10", "data_batch_1", "test_batch", r"test_batch in .*expected 2 images of each class.*a copy"),
        ("cifar100", "test", "train", r"train: expected b'data' to be uint8 \[200, 3072\], got uint8 \[100, 3072\]"),
        ("cifar100", "train", "test", r"test: expected b'data' to be uint8 \[100, 3072\], got uint8 \[200, 3072\]"),
    ],
)
def test_a_file_copied_under_the_name_of_another_is_noticed(name, source, target, message, tmp_path):
    folder = write_files(name, tmp_path)
    shutil.copy(folder / source, folder / target)
    with pytest.raises(data.DataError, match=message):
        data.cifar(name, str(folder))


def test_files_of_the_other_cifar_are_refused(tmp_path):
    ten, hundred = (write_files(name, tmp_path) for name in data.CIFAR)
    content = pickle.loads((hundred / "train").read_bytes(), encoding="bytes")
    content[b"labels"] = content.pop(b"fine_labels")
    (hundred / "train").write_bytes(pickle.dumps(content))
    with pytest.raises(data.DataError, match=r"train: expected b'fine_labels' to be .* from 0 to 99, got nothing"):
        data.cifar("cifar100", str(hundred))
    with pytest.raises(data.DataError, match=r"cannot read .*cifar-10-batches-py/cifar-100-python/train"):
        data.cifar("cifar100", str(ten))


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval])
@pytest.mark.parametrize(("name", "file", "rows"), TRAIN_FILES)
def test_a_hostile_file_is_refused_and_not_executed(name, file, rows, function, tmp_path):
    folder = write_files(name, tmp_path)
    mark = tmp_path / "mark"
    argument = str(mark) if function is os.mkdir else f"__import__('os').mkdir({str(mark)!r})"
    (folder / file).write_bytes(pickle.dumps({b"data": Hostile(function, argument)}))
    with pytest.raises(data.DataError, match=rf"{file} .*which no array needs"):
        data.cifar(name, str(folder))
    assert not mark.exists()
    pickle.loads((folder / file).read_bytes())
    assert mark.exists()
