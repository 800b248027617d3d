"""A step between hosts beside PyTorch's: figures and records, two processes, and PyTorch's side if it is installed."""

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import gradcomp_jax as gcj
from experiments import end_to_end, step_times, torch_side
from tests.test_processes import ROOT, wait

WIDTHS = {"perceptron": 8, "resnet18": 8, "transformer": 48}
HEADER = {
    "kind": "end_to_end",
    "model": "perceptron",
    "parameters": 1234,
    "batch": 8,
    "workers": 2,
    "hosts": 2,
    "mbit": 1000.0,
    "cores": 1,
    "rounds": 3,
}


def made(framework, method, ms, sent=None):
    case = step_times.case(framework, method)
    for x in (1000.0, *ms):
        step_times.add(case, x / 1e3, 2e6, sent)
    return step_times.without_first(case)


RUN = step_times.Run(
    HEADER,
    [
        made("jax", "local", [10, 12, 90], 0),
        made("jax", "none", [500, 400, 450], 4e7),
        made("jax", "powersgd rank=4", [30, 20, 22], 2e5),
        made("torch", "local", [11, 10, 12]),
        made("torch", "powersgd", [61, 60, 31]),
        made("torch", "ddp", [400, 300, 350]),
    ],
)


def cells(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_what_a_method_adds_is_beyond_its_own_framework_s_local_step():
    assert [RUN.added(case) for case in RUN.cases] == [0, 438, 10, 0, 49, 339]
    assert step_times.notes(RUN) == [
        "PowerSGD adds 10.0 ms to a local step here, and 49.0 ms in PyTorch: 0.20 of that."
    ]
    assert not step_times.notes(RUN._replace(cases=RUN.cases[:3]))


def test_the_table_has_medians_without_the_first_round():
    rows = cells(step_times.table(RUN))
    assert rows[0] == ("gradcomp_jax", "local", "12.0", "10.0 to 90.0", "", "0.000", "2.000")
    assert rows[2] == ("gradcomp_jax", "powersgd rank=4", "22.0", "20.0 to 30.0", "10.0", "0.200", "2.000")
    assert rows[4] == ("PyTorch", "DDP, powerSGD_hook", "60.0", "31.0 to 61.0", "49.0", "", "2.000")
    title = "perceptron, 1,234 parameters, batch 8, 2 hosts of a core at 1000 Mbit/s, medians of 3"
    assert title in step_times.table(RUN).title


def test_records_are_read_as_they_were_written_and_drawn(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        step_times.write(RUN, tmp_path / "made" / name)
    runs = step_times.read([f"{tmp_path}/made/*.jsonl"])
    assert runs == [RUN, RUN]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    step_times.figure(runs, tmp_path / "x.png")
    first, second = drawn[0].axes
    widths = [bar.get_width() for bar in first.patches]
    assert widths == [bar.get_width() for bar in second.patches]
    assert widths == [12, 0, 12, 438, 12, 10, 11, 0, 11, 49, 11, 339]  # local, added, local, added, ...
    assert [text.get_text() for text in first.texts][:3] == ["12", "450 (+438) →", "22 (+10)"]


@pytest.mark.parametrize("text", ["", "no JSON\n", '{"kind": "run"}\n', "[]\n"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(step_times.RecordsError, match=r"x\.jsonl is not the records of experiments\.end_to_end"):
        step_times.read([str(path)])
    with pytest.raises(step_times.RecordsError, match="names no file"):
        step_times.read([f"{tmp_path}/y*"])


def test_the_models_have_ten_million_parameters_or_eleven():
    sizes = {}
    for name, network in end_to_end.MODELS.items():
        params = jax.eval_shape(end_to_end.task_of(name, network.width).weights)
        sizes[name] = sum(x.size for x in jax.tree.leaves(params))
    assert sizes == {"perceptron": 10_510_346, "resnet18": 11_173_962, "transformer": 10_720_128}


def program(*flags, log):
    command = [sys.executable, "-m", "experiments.end_to_end", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": ""}, stdout=log, stderr=log)


def run(tmp_path, processes, *flags):
    """The output of the first process of a program of several."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    logs, children = [tmp_path / f"{rank}.log" for rank in range(processes)], []
    try:
        for rank, path in enumerate(logs):
            who = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={rank}"]
            with path.open("wb") as log:
                children.append(program(*who, *flags, log=log))
        wait(children, logs)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return logs[0].read_text()


def test_two_processes_write_the_records_of_every_method(tmp_path):
    out = tmp_path / "x.jsonl"
    flags = [
        "--width=8",
        "--method=none,powersgd,sparseloco",
        "--every=2",
        "--rounds=2",
        "--steps=1",
        "--dense_steps=1",
    ]
    printed = run(tmp_path, 2, *flags, "--warmup=3", "--interface=lo", "--mbit=100", f"--out={out}")
    header, *cases = [json.loads(line) for line in out.read_text().splitlines()]
    assert (header["hosts"], header["workers"], header["mbit"], header["torch"]) == (2, 2, 100.0, None)
    assert header["parameters"] == 3072 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    assert [case["method"] for case in cases] == ["local", "powersgd rank=4", "sparseloco every=2", "none"]
    assert all(len(case["ms"]) == len(case["counted_bytes"]) == 2 for case in cases)
    local, powersgd, sparseloco, none = (case["wire_bytes"] for case in cases)
    assert local == 0
    assert none == 4 * (header["parameters"] + 1)  # and the loss
    params = jax.eval_shape(end_to_end.task_of("perceptron", 8).weights)
    assert powersgd == gcj.describe(gcj.powersgd(rank=4), params, 2).totals.sent + 4
    assert 0 < sparseloco < none / 8
    assert cases[-1]["counted_bytes"][0] > 2 * none  # both processes' bytes, on one interface
    for part in ("gradcomp_jax", "powersgd rank=4", "added to local"):
        assert part in printed


# PyTorch's side

there = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="torch, several GB for a benchmark's other side, is not installed: pip install -e '.[torch]'",
)


@pytest.mark.parametrize("python", ["false", "/no/such/python"])
def test_a_python_without_torch_is_told(python):
    rows = np.zeros(1), np.zeros(1)
    with (
        pytest.raises(torch_side.TorchError, match=r"exit code 1; it printed|/no/such/python cannot be run"),
        torch_side.started(python, {"w": np.zeros(1)}, rows, {}),
    ):
        pass


@there
@pytest.mark.parametrize("name", WIDTHS)
def test_pytorch_trains_the_same_model(name):
    """The losses of three steps from the same weights; so the gradients and the optimiser are the same too."""
    import torch

    from experiments import torch_ddp

    task = end_to_end.task_of(name, WIDTHS[name])
    params, rows, optimizer = task.weights(), task.rows(0, 4), optax.sgd(0.01, momentum=0.9)
    model = torch_ddp.MODELS[name](WIDTHS[name])
    torch_ddp.load(model, torch_side.by_path(params))
    assert sum(x.numel() for x in model.parameters()) == sum(x.size for x in jax.tree.leaves(params))
    training = torch_ddp.training("local", model, argparse.Namespace(lr=0.01, momentum=0.9))
    x, labels = torch.from_numpy(rows[0]), torch.from_numpy(rows[1]).long()
    state, step = optimizer.init(params), jax.jit(jax.value_and_grad(task.loss_fn))
    for _ in range(3):
        loss, grads = step(params, rows)
        theirs = torch_ddp.loss_of(training.network, x, labels).item()
        assert theirs == pytest.approx(float(loss), rel=2e-3)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        training.step(x, labels)


@there
def test_two_processes_measure_pytorch_too(tmp_path):
    out = tmp_path / "x.jsonl"
    flags = ["--torch", "--width=8", "--rounds=1", "--steps=1", "--dense_steps=1", "--warmup=3", f"--out={out}"]
    assert "PowerSGD adds" in run(tmp_path, 2, *flags)
    header, *cases = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["torch"]
    assert [case["method"] for case in cases if case["framework"] == "torch"] == ["local", "powersgd", "ddp"]
