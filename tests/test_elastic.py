"""Workers that die, stand still or pause; and the pure part, what is left of a mesh and a state.

One run of four real processes suffers all faults, one after another, because each of them must start and compile.
"""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax.lifeline import TRY_AGAIN
from gradcomp_jax.sharding import is_per_worker
from gradcomp_jax.survivors import moved, parts_in, save_part, turned, without_others
from tests import problem
from tests.elastic_worker import optimizer, rows_of
from tests.test_processes import ROOT

PAUSED, KILLED, STOPPED, ENDED = 1, 3, 5, 7
FAULTS = f"slow:1@{PAUSED},kill:3@{KILLED},stop:2@{STOPPED},kill:0@{ENDED}"
PROCESSES, SECONDS = 4, 300


def records(file):
    found = []
    with file.open("rb") as stream:
        while True:
            try:
                found.append(pickle.load(stream))
            except EOFError:
                return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, exit codes, what the processes printed, what they wrote down) of a run with all faults."""
    folder = tmp_path_factory.mktemp("elastic")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children, logs = [], [folder / f"{rank}.log" for rank in range(PROCESSES)]
    try:
        for rank, file in enumerate(logs):
            command = [sys.executable, "-m", "tests.elastic_worker", folder, rank, PROCESSES, port, FAULTS, 1]
            with file.open("wb") as log:
                children.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log))
        for rank in (3, 0, 1):
            children[rank].wait(SECONDS)
        os.kill(children[2].pid, signal.SIGCONT)
        children[2].wait(SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail("".join(f"\n--- {file.name}\n{file.read_text()[-3000:]}" for file in logs), pytrace=False)
    finally:
        for child in children:
            child.kill()
            child.wait()
    codes = [child.returncode for child in children]
    return folder, codes, [log.read_text() for log in logs], [records(folder / str(k)) for k in range(PROCESSES)]


def befores(records, step):
    return [x for x in records if x.get("before") == step]


def after(records, step):
    (found,) = [x for x in records if x.get("after") == step]
    return found


def test_each_step_is_done_once_by_those_that_are_left(run):
    _, codes, printed, written = run
    assert codes[:2] == [-signal.SIGKILL, TRY_AGAIN], printed[1]
    assert codes[3] == -signal.SIGKILL
    for rank in (0, 1):
        steps = [x["after"] for x in written[rank] if "after" in x]
        assert steps == list(range(ENDED)), printed[rank]
        members = [x["members"] for x in written[rank] if "after" in x]
        assert members == [(0, 1, 2, 3)] * KILLED + [(0, 1, 2)] * (STOPPED - KILLED) + [(0, 1)] * (ENDED - STOPPED)


@pytest.mark.parametrize("step", [PAUSED, KILLED, STOPPED])
def test_a_step_that_failed_is_repeated_from_the_state_before_it(run, step):
    for records in run[3][: 3 if step < STOPPED else 2]:
        first, second = befores(records, step)
        assert first["order"] != second["order"]
        chex.assert_trees_all_equal(first["state"], second["state"])


def test_survivors_have_the_bits_of_a_run_that_began_with_their_rows(run):
    """As two devices of one process, from the state in which the dead have no rows."""
    written = run[3][:2]
    tries = [befores(records, STOPPED)[-1] for records in written]
    order = tries[0]["order"]
    assert sorted(order) == [0, 1]
    mesh = gc.make_mesh(2)
    state = gc.place(of_all([tries[rank]["state"] for rank in order]), mesh)
    step = gc.train_step(problem.loss_fn, optimizer(), mesh)
    params, opt_state = state["params"], state["opt_state"]
    for number in range(STOPPED, ENDED):
        batch = jax.tree.map(lambda *x: np.concatenate(x), *(rows_of(number, rank, 2) for rank in order))
        params, opt_state, _ = step(params, opt_state, batch)
        got = of_all([after(written[rank], number)["state"] for rank in order])
        assert got["step"] == number + 1
        chex.assert_trees_all_equal((got["params"], got["opt_state"]), jax.device_get((params, opt_state)))
    residual = got["opt_state"][0].residual.value
    assert all(np.any(rows[0] != rows[1]) for rows in residual.values())


def of_all(states):
    """The global form, from what processes of one device each have, [1, ...] each."""

    def join(*own):
        if is_per_worker(own[0]):
            return jax.tree.map(lambda *rows: np.concatenate([row[0] for row in rows]), *own)
        return own[0] if isinstance(own[0], int) else own[0][0]

    return jax.tree.map(join, *states, is_leaf=is_per_worker)


def test_a_worker_that_stood_still_ends_when_it_goes_on(run):
    _, codes, printed, _ = run
    assert codes[2] in (TRY_AGAIN, -signal.SIGABRT)  # jax's own client may be the first to hear of it
    assert re.search("process 2 ends: .* dead|JAX distributed service detected fatal errors", printed[2])


def test_without_process_0_the_others_save_and_end(run):
    folder, codes, printed, written = run
    assert codes[1] == TRY_AGAIN
    assert "process 1 ends: process 0 is dead" in printed[1]
    params, state = problem.params(), {"params": problem.params(), "opt_state": None, "step": 0}
    state["opt_state"] = gc.init(optimizer(), params, 1)
    saved = gc.restore(folder / "parts", state, 1)
    last = of_all([after(written[1], ENDED - 1)["state"]])
    chex.assert_trees_all_equal(jax.device_get(saved), last)
    assert saved["step"] == ENDED


class Device:
    """A device of some process that is not there."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, process):
        self.process_index, self.client = process, jax.devices()[0].client


def mesh_of(processes):
    devices = np.vectorize(Device, otypes=[object])(processes)
    return jax.sharding.Mesh(devices, ("node", "local")[: devices.ndim])


def by_process(mesh):
    return np.vectorize(lambda device: device.process_index)(mesh.devices).tolist()


class TestRows:
    """What is left of a state, without processes."""

    def trained(self, tx, mesh):
        params = gc.place(problem.params(), mesh)
        state = gc.init(tx, params, mesh)
        for batch in problem.batches(2):
            params, state, _ = gc.train_step(problem.loss_fn, tx, mesh)(params, state, batch)
        return params, state

    @pytest.mark.parametrize(
        ("tx", "sizes"),
        [
            (problem.optimizer(gc.delayed(gc.powersgd(2))), {"data": 4}),
            (gc.diloco(optax.sgd(0.1), every=3), {"data": 4}),
            (problem.optimizer(gc.across(gc.powersgd(2), slow="node", fast="local")), {"node": 4, "local": 2}),
        ],
        ids=["delayed", "outer", "slices"],
    )
    def test_rows_of_the_living_stay(self, tx, sizes):
        whole = gc.make_mesh(sizes)
        left = jax.sharding.Mesh(whole.devices[[0, 1, 3]], whole.axis_names)
        params, state = self.trained(tx, whole)
        new_params, new = moved((params, state), left)
        keep = lambda x: x[jnp.array([0, 1, 3])]  # noqa: E731
        expected = jax.tree.map(
            lambda x: jax.tree.map(keep, x) if is_per_worker(x) and len(x.leading) == len(sizes) else x,
            state,
            is_leaf=is_per_worker,
        )
        chex.assert_trees_all_equal(*map(jax.device_get, (new, expected)))
        chex.assert_trees_all_equal(*map(jax.device_get, (new_params, params)))
        batch = next(problem.batches(1, 24))
        gc.train_step(problem.loss_fn, tx, left)(new_params, new, batch)

    @pytest.mark.parametrize(
        ("processes", "members", "expected"),
        [([0, 1, 2], {0, 2}, [0, 2]), ([[0, 0], [1, 1], [2, 2]], {1, 2}, [[1, 1], [2, 2]])],
        ids=["workers", "slices"],
    )
    def test_devices_of_the_dead_leave(self, processes, members, expected):
        assert by_process(without_others(mesh_of(processes), members)) == expected

    def test_part_of_a_slice_is_refused(self):
        with pytest.raises(ValueError, match="a slice has lost only some of its chips"):
            without_others(mesh_of([[0, 1], [2, 3]]), {0, 1, 2})

    @pytest.mark.parametrize(
        ("processes", "expected"),
        [([0, 0, 1, 2], [1, 2, 0, 0]), ([[0, 0], [1, 1]], [[1, 1], [0, 0]])],
        ids=["workers", "slices"],
    )
    def test_another_order_has_the_rows_of_a_process_together(self, processes, expected):
        assert by_process(turned(mesh_of(processes))) == expected

    def test_the_owed_mean_is_that_of_the_living(self):
        tx, mesh = problem.optimizer(gc.topk(fraction=0.25, min_size=0)), gc.make_mesh(3)
        params = gc.place(problem.params(), mesh)
        state = gc.init(tx, params, mesh)
        params, state, _ = gc.train_step(problem.loss_fn, tx, mesh)(params, state, next(problem.batches(1, 24)))
        rows = jax.device_get(state[0].residual.value)
        params, state = moved((params, state), gc.make_mesh(2))
        before = jax.device_get(params)
        flushed, _ = gc.flush(tx, params, state, gc.make_mesh(2), learning_rate=1.0)
        for path, change in gc.exchange.plan.flatten(jax.tree.map(lambda a, b: a - b, before, flushed))[0].items():
            np.testing.assert_allclose(change, rows[path][:2].mean(0), atol=1e-6)

    def test_parts_are_joined(self, tmp_path):
        state = {"x": gc.place(jnp.arange(3.0, dtype=jnp.bfloat16), gc.make_mesh(2)), "key": jax.random.key(3), "n": 4}
        rows = jax.device_put(
            jnp.arange(4.0), jax.sharding.NamedSharding(gc.make_mesh(2), jax.sharding.PartitionSpec("data"))
        )
        rows = gc.PerWorker({"w": rows.reshape(2, 2)}, "data", "owed")
        for process in (0, 2):
            save_part(tmp_path, process, 9, {**state, "own": rows})
        save_part(tmp_path, 1, 8, {**state, "own": rows})
        assert [file.name for file in parts_in(tmp_path, None)] == ["0.npz", "2.npz"]
        like = {**state, "n": 0, "own": jax.tree.map(jnp.zeros_like, rows)}
        read = gc.restore(tmp_path, like, 4)
        assert (read["n"], read["x"].dtype) == (4, jnp.bfloat16)
        np.testing.assert_array_equal(read["own"].value["w"], [[0, 1], [2, 3], [0, 1], [2, 3]])
        chex.assert_trees_all_equal(*map(jax.random.key_data, (read["key"], state["key"])))
        assert gc.restore(tmp_path, like, 1, step=8)["n"] == 4
        with pytest.raises(ValueError, match="lacks leaf 'more'"):
            gc.restore(tmp_path, {**like, "more": jnp.zeros(1)}, 4)
