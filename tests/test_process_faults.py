"""What goes wrong between processes is refused, and read-outs are the same in each."""

import json
import pathlib
import tempfile

import pytest

from tests.test_processes import HEADERS, counted, launch


@pytest.fixture(scope="module")
def results():
    with tempfile.TemporaryDirectory() as folder:
        return launch(2, pathlib.Path(folder), "tests.process_faults", lambda file: json.loads(file.read_text()))


def test_rows_of_one_process_are_refused_and_none_is_dropped(results):
    for result in results:
        assert "batch leaf \"['x']\" is ndarray of this process alone" in result["batches"]["refused"]
        assert "shard_batch(batch, mesh)" in result["batches"]["refused"]
        assert result["batches"]["gradient"] == (1 + 2 + 4 + 8 + 16 + 32 + 64 + 128) / 8


def test_parameters_that_differ_are_refused_by_name(results):
    for result in results:
        assert "leaf ['w'] differs between the processes" in result["different"]
        assert "broadcast_one_to_all" in result["different"]


def test_read_outs_and_flush_are_the_same_in_each(results):
    first, second = (result["read_outs"] for result in results)
    assert first == second
    code, (last, total), skipped = first["read"]
    assert 0 < code < last < total
    assert skipped == 0
    assert first["moved"]["layer1"]["kernel"] > 0


def test_copies_that_differ_are_named_and_repaired(results):
    for result in results:
        assert (
            "leaf \"['w']\" differ: worker 1 (process 1) has not what the first worker has" in result["parted"]["said"]
        )
        assert result["parted"]["repaired"] == [0, 1]


@counted
def test_to_place_host_arrays_sends_four_bytes_a_leaf(results):
    for result in results:
        # Two leaves, placed twice; each time one all-gather between two, of what each of them has checked.
        assert result["placed"] == 2 * (4 * 2 + 2 * HEADERS)
