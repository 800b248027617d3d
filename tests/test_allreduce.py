"""One exchange of a gradient between hosts: the ways, the wire on which nothing is sent, records and their figures."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gcj
from experiments import allreduce, exchange_records, loopback, timing, training
from gradcomp_jax.exchange.collectives import Wire
from gradcomp_jax.hlo import collective_bytes
from tests import test_processes

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = flags.FLAGS
SHAPES = {"kernel": (128, 128), "bias": (128,)}


@pytest.fixture(autouse=True)
def codec_flags():
    assert "powersgd_rank" in FLAGS, training  # which defines the codecs' flags
    with flagsaver.flagsaver():
        FLAGS(["test"])
        yield


def test_ways_take_turns_and_copies_leave_the_state_alone():
    log = []

    def step(name, state):
        log.append((name, int(state)))
        return None, state + 1

    ways = {
        "a": timing.Way(lambda x: step("a", x), jnp.int32(0)),
        "b": timing.Way(lambda x: step("b", x), jnp.int32(10), lambda x: x * 2),
        "a again": timing.Way(lambda x: step("a again", x), copies="a"),
    }
    counts = iter(range(100))
    done = timing.in_turn(ways, 2, counter=lambda: [next(counts), 7])
    a, b, again = zip(*[log[i : i + 3] for i in (0, 3, 6)], strict=True)
    assert (a, b, again) == (
        *((("a", 0), ("a", 1), ("a", 2)), (("b", 20), ("b", 42), ("b", 86))),
        (("a again", 1), ("a again", 2), ("a again", 3)),
    )
    assert {name: len(seconds) for name, seconds in done.seconds.items()} == {"a": 2, "b": 2, "a again": 2}
    assert done.counted["b"] == [[1, 0], [1, 0]]
    assert (int(done.states["a"]), int(done.states["b"])) == (3, 87)


def test_gradients_differ_between_hosts():
    grads = timing.random_gradients(SHAPES, gcj.make_mesh(2))
    assert {name: x.shape for name, x in grads.items()} == {"kernel": (2, 128, 128), "bias": (2, 128)}
    assert not np.array_equal(grads["bias"][0], grads["bias"][1])
    assert np.std(grads["kernel"]) == pytest.approx(0.01, rel=0.05)


def test_recorded_gradients_are_one_step_for_each_host(tmp_path):
    steps = np.arange(6, dtype=np.float64).reshape(2, 3)
    np.savez(tmp_path / "file.npz", **{"layer/kernel": steps})
    (name, grads), *rest = allreduce.recorded_gradients(str(tmp_path / "file.npz"), gcj.make_mesh(3)).items()
    assert (name, grads.dtype, rest) == ("layer/kernel", np.float32, [])
    np.testing.assert_array_equal(grads, steps[[0, 1, 0]])
    with pytest.raises(SystemExit, match=r"error: --gradients=nothing cannot be read \(.*: give a file of numpy.savez"):
        allreduce.recorded_gradients("nothing", gcj.make_mesh(2))


def test_a_wire_that_sends_nothing_counts_the_messages_of_the_branch_and_turns_taken():
    mesh = gcj.make_mesh(4)

    def worker(index, x):
        wire = loopback.Loopback("data")
        assert isinstance(wire, Wire)
        wire.total({"a": x, "b": x})
        wire.switch(index, [lambda: wire.gather(x)[0].ravel(), lambda: jnp.tile(wire.total(x)[0], 4)])
        wire.ring_total(x)
        rows, _ = wire.scatter(jnp.stack([x] * 4))
        said = loopback.in_all(wire.said)
        return jax.tree.map(lambda x: x[None], said), rows

    mapped = jax.shard_map(worker, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    program = jax.jit(mapped).lower(jnp.int32(0), jnp.ones(16)).compile()
    assert {found.kind for found in collective_bytes(program)} == {"collective-permute"}
    for index, in_branch in ((0, [0, 1, 0, 0]), (1, [1, 0, 0, 0])):
        said, rows = program(jnp.int32(index), jnp.ones(16))
        assert said.messages.tolist() == [(np.array([2, 1, 1, 3]) + in_branch).tolist()] * 4
        np.testing.assert_array_equal(rows, np.ones((16, 4)))


@pytest.mark.parametrize(
    ("tx", "messages"),
    [
        (gcj.powersgd(rank=2), {"all-reduce": 2}),
        (gcj.qsgd(min_size=0, aggregate="shuffle"), {"all-to-all": 1, "all-gather": 1}),
        (gcj.qsgd(min_size=0, aggregate="gather"), {"all-gather": 1}),
    ],
    ids=["sums", "shuffle", "gather"],
)
def test_alone_a_codec_says_as_many_words_in_as_many_messages(tx, messages):
    mesh = gcj.make_mesh(2)
    grads = timing.random_gradients({"kernel": (128, 128)}, mesh)
    exchange = allreduce.Exchange.of(tx, grads, mesh)
    real, alone = (
        collective_bytes(program.func.lower(*program.args, exchange.state).compile())
        for program in (exchange.whole, exchange.codec)
    )
    assert {found.kind for found in alone} == {"collective-permute"}
    said = exchange.encode(exchange.state).messages
    assert {kind: int(x) for kind, x in zip(loopback.KINDS, said[0], strict=True) if x} == messages
    assert {found.kind for found in real} == messages.keys()
    means, _ = exchange.whole(jax.tree.map(jnp.copy, exchange.state))
    assert jax.tree.map(jnp.shape, means) == {"kernel": (128, 128)}


def test_every_aggregation_that_a_codec_takes_is_a_way_of_its_own():
    found = [label for _, label, _ in allreduce.chosen(["none", "qsgd", "powersgd"], aggregations=True)]
    assert found == [
        *("none aggregate=psum", "none aggregate=ring"),
        *("qsgd aggregate=gather", "qsgd aggregate=shuffle", "qsgd aggregate=ring"),
        *("powersgd aggregate=psum", "powersgd aggregate=ring"),
    ]
    assert [label for _, label, _ in allreduce.chosen(["qsgd"], aggregations=False)] == ["qsgd"]


def test_a_measurement_has_every_way_with_its_bytes(tmp_path, capsys):
    mesh = gcj.make_mesh(2)
    grads = timing.random_gradients(SHAPES, mesh)
    exchanges = {name: (name, tx) for name, tx in (("none", gcj.none()), ("powersgd", gcj.powersgd(rank=2)))}
    latency, ways = allreduce.measured(exchanges, grads, mesh, 2, tuple)
    assert {kind: len(times) for kind, times in latency.items()} == dict.fromkeys(loopback.KINDS, 2)
    dense = 4 * (128 * 128 + 128)
    assert {way["way"]: (way["bytes"], way["messages"]) for way in ways} == {
        "psum, flat": (dense, {"all-reduce": 1}),
        "psum, by leaf": (dense, {"all-reduce": 2}),
        "none": (dense, {"all-reduce": 1}),
        "powersgd": (4 * (2 * 2 * 128 + 128), {"all-reduce": 2}),
    }
    for way in ways:
        parts = 0 if way["way"].startswith("psum") else 2
        assert [len(way[f"{part}_ms"]) for part in ("whole", "codec", "encode")] == [2, parts, parts]


WAY = {
    "kind": "way",
    "way": "qsgd",
    "codec": "qsgd",
    "bytes": 1_000_000,
    "counted": [[1_066_000, 1000]] * 3,
    "messages": {"all-reduce": 2, "all-gather": 1},
    "whole_ms": [200.0, 100.0, 300.0],
    "codec_ms": [40.0, 50.0, 60.0],
    "encode_ms": [20.0, 10.0, 90.0],
}
PSUM = WAY | {"way": "psum, flat", "codec": "none", "codec_ms": [], "encode_ms": [], "whole_ms": [400.0]}
HEADER = {"kind": "allreduce", "model": "resnet18", "parameters": 10, "hosts": 2, "processes": 2, "mbit": 100.0}
LATENCY = {"all-reduce": [1.0, 2.0, 3.0], "all-gather": [4.0, 4.0, 4.0]}
RECORDS = exchange_records.Records(HEADER | {"refused": {}}, LATENCY, [PSUM, WAY])


def test_the_figures_of_a_way():
    found = exchange_records.figures_of(WAY, RECORDS)
    assert found[:5] == (200.0, 20.0, 30.0, 150.0, 80.0)
    assert found.bound == pytest.approx(80 * 1.046 + 2 * 2 + 4 + 50)
    assert found.over == pytest.approx(200 / found.bound)
    assert exchange_records.baseline_ms(RECORDS) == 400
    unknown = RECORDS._replace(header=HEADER | {"mbit": None})
    assert np.isnan(exchange_records.figures_of(WAY, unknown)[4:]).all()


def test_records_are_read_as_they_were_written(tmp_path):
    path = str(tmp_path / "new" / "records.jsonl")
    exchange_records.write(path, RECORDS)
    assert exchange_records.read(path) == RECORDS
    pathlib.Path(path).write_text(json.dumps({"kind": "run"}) + "\n{}\n")
    with pytest.raises(
        exchange_records.RecordsError, match=r"records.jsonl is not the records of experiments.allreduce"
    ):
        exchange_records.read(path)


def test_two_processes_measure_and_their_records_are_shown(tmp_path):
    port, out, figure = test_processes.free_port(), tmp_path / "out.jsonl", tmp_path / "figure.png"
    line = [sys.executable, "-m", "experiments.allreduce", "--model=square", "--size=128", "--codec=powersgd,gradiveq"]
    line += [f"--out={out}", "--rounds=1", "--mbit=100", "--num_processes=2", f"--coordinator_address=localhost:{port}"]
    test_processes.run([[*line, f"--process_id={rank}"] for rank in range(2)], tmp_path)
    records = exchange_records.read(str(out))
    assert (records.header["hosts"], records.header["processes"], records.header["parameters"]) == (2, 2, 128 * 128)
    assert [way["way"] for way in records.ways] == ["psum, flat", "psum, by leaf", "powersgd"]
    assert list(records.header["refused"]) == ["gradiveq"]
    shown = subprocess.run(
        [sys.executable, "-m", "experiments.allreduce", f"--runs={out}", f"--figure={figure}"],
        **{"cwd": ROOT, "env": os.environ, "capture_output": True, "text": True, "timeout": 100},
    )
    assert shown.returncode == 0, shown.stderr
    assert "2 hosts joined by their links at 100 Mbit/s" in shown.stdout
    assert "gradiveq is left out: codec 'gradiveq' would compress none of the 1 leaves" in shown.stdout
    assert figure.stat().st_size > 10_000


def test_one_process_stands_for_several_hosts(tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--model=square", "--size=64", "--codec=none", "--rounds=1", f"--out={out}"]
    line = [sys.executable, "-m", "experiments.allreduce", *flags]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert exchange_records.read(str(out)).header["hosts"] == 2
