"""Processes of their own, on one machine: the numbers of one process, and the bytes that their sockets send.

A worker in its own process computes as one on an emulated device does, bit for bit, but for sums of more than two:
gloo's ring begins each part of an array at another worker, XLA's emulation adds in the workers' order. So two
workers give the same bits with every codec, and four with those that gather. `simulate` batches the workers'
products, some of which then add in another order: it agrees to rounding.

Every message of gloo carries 144 bytes of headers. In an all-reduce a worker sends 4 (n - 1) messages, or more where
those would be larger than 1 MiB, in an all-gather 2 (n - 1). Nothing else is sent; the coordinator has connections of
its own.
"""

import functools
import math
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import tempfile
import time

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.sharding import is_per_worker
from gradcomp_jax.testing.contexts import map_state
from gradcomp_jax.testing.trees import is_shape
from tests import problem
from tests.process_worker import EVERY, NARROW, STEPS, TRAFFIC, TRANSFORMER, kernel_counts_bytes, kernels, loss_fn
from tests.table import AMONG_PROCESSES, BY_ID

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 400
HEADERS = 144
# The most that headers add here, as a share of the bits declared; measured: 1.1 %.
OVERHEAD = 0.02

# Not `row`, by which conftest.py would spread the tests, and each a launch, over the processes of pytest-xdist.
each_codec = pytest.mark.parametrize("codec", AMONG_PROCESSES, ids=lambda row: row.id)
counted = pytest.mark.skipif(
    not kernel_counts_bytes(), reason="the kernel does not tell what a TCP connection sent; Linux does from 4.19 on"
)


@pytest.fixture(params=[2, 4])
def results(request):
    """What each of the processes hands back, by rank."""
    return launched(request.param)


@pytest.fixture
def results_of_four():
    """Between two, every collective sends as much as it is given, whatever the law of its bytes."""
    return launched(4)


@functools.cache  # not the fixture's scope, which pytest-xdist ends and begins anew between tests
def launched(processes):
    with tempfile.TemporaryDirectory() as folder:
        return launch(processes, pathlib.Path(folder))


def launch(processes, folder, module="tests.process_worker", read=lambda file: pickle.loads(file.read_bytes())):
    port, files = free_port(), [folder / str(rank) for rank in range(processes)]
    python = [sys.executable, "-m", module]
    run([[*python, str(file), str(rank), str(processes), str(port)] for rank, file in enumerate(files)], folder)
    return [read(file) for file in files]


def free_port():
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


def run(commands, folder):
    """Runs commands side by side, to their ends."""
    children, logs = [], [folder / f"{rank}.log" for rank in range(len(commands))]
    try:
        for command, path in zip(commands, logs, strict=True):
            with path.open("wb") as log:
                # The compiler flags, which decide on the bits, are in the environment.
                children.append(subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=log, stderr=log))
        wait(children, logs)
    finally:
        for child in children:
            child.kill()
            child.wait()


def wait(children, logs):
    """Until all have ended well; fails, with what they printed, when one has not or time is up."""
    end = time.monotonic() + SECONDS
    while any(codes := [child.poll() for child in children]) or None in codes:
        if any(codes) or time.monotonic() > end:
            printed = "".join(
                f"\n--- process {rank}, {'running' if code is None else f'exit code {code}'}\n{log.read_text()[-4000:]}"
                for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
            )
            pytest.fail(f"{'a process failed' if any(codes) else f'not done in {SECONDS} s'}{printed}", pytrace=False)
        time.sleep(0.05)


@functools.cache
def in_one_process(id, workers, simulated):
    """(parameters, state, loss) after each step, of `simulate` or of emulated devices, from those of the processes.

    So what sums round otherwise has one step to grow in, whatever the codec makes of it, as PowerSGD of small columns.
    """
    tx = problem.optimizer(BY_ID[id].make())
    where = workers if simulated else gc.make_mesh(workers)
    step = gc.simulate(loss_fn, tx, workers) if simulated else gc.train_step(loss_fn, tx, where)
    params = kernels() if simulated else jax.device_put(kernels(), NamedSharding(where, P()))
    before = params, gc.init(tx, params, where)
    lies = jax.tree.map(lambda x: x.sharding, before)
    history = []
    for now, batch in enumerate(problem.batches(STEPS)):
        history.append(jax.device_get(step(*before, batch)))
        parts = [result[id]["steps"][now][:2] for result in launched(workers)]
        before = jax.device_put(map_state(lambda *x: np.concatenate(x), lambda *x: x[0], *parts), lies)
    return history


def of_worker(rank, step):
    """The part of a step's (parameters, state, loss) that is in this worker's process."""

    def own(x):
        return jax.tree.map(lambda leaf: leaf[rank : rank + 1], x) if is_per_worker(x) else x

    return jax.tree.map(own, step, is_leaf=is_per_worker)


def pairs(results, codec, simulated):
    """(a worker's step, the same in one process), for all workers and steps."""
    history = in_one_process(codec.id, len(results), simulated)
    for rank, result in enumerate(results):
        for got, expected in zip(result[codec.id]["steps"], history, strict=True):
            yield got, of_worker(rank, expected)


def test_the_steps_go_through_every_phase():
    assert all(max(row.phases) < STEPS for row in AMONG_PROCESSES)


@each_codec
def test_processes_give_the_numbers_of_simulate(codec, results_of_four):
    for got, expected in pairs(results_of_four, codec, simulated=True):
        chex.assert_trees_all_close(got, expected, atol=2e-6, rtol=0)


@each_codec
def test_processes_give_the_bits_of_emulated_devices(codec, results):
    """But for sums of more than two, which agree to their rounding."""
    sums = codec.linear or codec.id == "accordion-powersgd"
    tolerance = 1e-6 if sums and len(results) > 2 else 0
    for got, expected in pairs(results, codec, simulated=False):
        chex.assert_trees_all_close(got[:2], expected[:2], atol=tolerance, rtol=0)
        np.testing.assert_allclose(got[2], expected[2], rtol=1e-6)  # the loss is a sum with every codec


@each_codec
def test_processes_count_the_same_bits(codec, results):
    for got, expected in pairs(results, codec, simulated=False):
        assert gc.wire_bits(got[1]) == gc.wire_bits(expected[1])


@each_codec
def test_all_workers_have_the_same_bits(codec, results):
    def replicated(rank):
        return [
            (params, map_state(lambda x: None, lambda x: x, state), loss)
            for params, state, loss in results[rank][codec.id]["steps"]
        ]

    for rank in range(1, len(results)):
        chex.assert_trees_all_equal(replicated(0), replicated(rank))


@counted
@pytest.mark.parametrize("id", [*(row.id for row in AMONG_PROCESSES), *NARROW])
def test_sockets_send_what_the_codec_declares(id, results_of_four):
    """In every step; and all workers together to the byte, where rings of uneven parts even out."""
    results = results_of_four
    for result in results:
        sent, declared = (np.array(result[id][key]) for key in ("sent", "declared"))
        over = sent - declared / 8
        assert (over >= 0).all(), over
        assert (over <= OVERHEAD * declared / 8).all(), over
        assert result[id]["total"] == declared.sum()
    sent, declared = (np.sum([result[id][key] for result in results], axis=0) for key in ("sent", "declared"))
    np.testing.assert_array_equal((8 * sent - declared) % (8 * HEADERS), 0)


@counted
def test_sockets_of_outer_steps(results_of_four):
    """A local step sends nothing. An exchange of SparseLoCo sends 97 times less than an all-reduce of float32."""
    elements = sum(math.prod(shape) for shape in jax.tree.leaves(TRANSFORMER, is_leaf=is_shape))
    workers, payload = len(results_of_four), 83 * -(-elements // 4096)
    assert 4 * elements >= 195 * payload
    for result in (result["sparseloco"] for result in results_of_four):
        sent, declared = (np.array(result[key]) for key in ("sent", "declared"))
        quiet, exchanged = sent.reshape(-1, EVERY)[:, :-1], sent.reshape(-1, EVERY)[:, -1]
        assert not quiet.any()
        assert (exchanged <= 1.02 * (workers - 1) * payload).all()
        np.testing.assert_allclose(exchanged.sum(), declared[-1] / 8, rtol=0.02)
        assert 2 * (workers - 1) / workers * 4 * elements >= 97 * exchanged.max()


@counted
def test_cpus_sum_bfloat16_in_32_bits_and_float16_in_16(results_of_four):
    elements = sum(map(math.prod, TRAFFIC.values()))
    each = {id: results_of_four[0][id]["declared"][0] / (1.5 * elements) for id in NARROW}
    assert (each["none-bf16"], each["none-f16"], round(each["cast-bf16"], 3)) == (32, 16, 16)
