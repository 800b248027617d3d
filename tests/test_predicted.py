"""The planner's commands, and the fit of its model, to records that follow it exactly."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import plan, predicted, scale
from gradcomp_jax.planner import work

ROOT = pathlib.Path(__file__).parent.parent
LATENCY, HEADERS = 2e-4, 1.05
# Seconds for each parameter, bytes for each parameter, messages.
CODECS = {
    "psum, flat": (0.0, 4.0, {"all-reduce": 1}),
    "psum, by leaf": (0.0, 4.0, {"all-reduce": 60}),
    "qsgd": (1e-8, 0.5, {"all-to-all": 1, "all-gather": 1}),
    "powersgd": (4e-9, 0.1, {"all-reduce": 2}),
}


def records(path, hosts, mbit, parameters, rate=None):
    """Writes the records of a run of experiments.allreduce."""
    lines = [{"kind": "allreduce", "model": "m", "hosts": hosts, "mbit": mbit, "parameters": parameters}]
    lines += [{"kind": "latency", "ms": {}}]
    for name, (codec, size, messages) in CODECS.items():
        seconds = codec * parameters + LATENCY * predicted.waits(messages, hosts)
        seconds += HEADERS * 8 * size * parameters / (rate or 1e6 * mbit)
        times = {"whole_ms": [1e3 * seconds] * 3, "codec_ms": [1e3 * codec * parameters] * 3 if codec else []}
        lines.append({"kind": "way", "way": name, "bytes": size * parameters, "messages": messages} | times)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return predicted.read_exchanges(str(path))


def test_a_fit_finds_the_model_and_predicts_what_it_has_not_seen(tmp_path):
    cases = [(2, 100, 10**7), (4, 100, 10**7), (4, 1000, 10**6)]
    runs = [records(tmp_path / f"{i}.jsonl", *case) for i, case in enumerate(cases)]
    found = predicted.fit(runs)
    assert found.latency == pytest.approx(LATENCY)
    assert found.headers == pytest.approx(HEADERS)
    for one in predicted.left_out(runs):
        assert one.errors == pytest.approx([0, 0, 0], abs=1e-9)
        assert (one.choice, one.over) == ("powersgd", 1)


def test_without_a_limit_of_the_link_it_says_not_to_compress(tmp_path):
    runs = [records(tmp_path / f"{i}.jsonl", 2, mbit, 10**7) for i, mbit in enumerate((100, 1000))]
    fast = records(tmp_path / "fast.jsonl", 2, None, 10**7, rate=3e10)
    (judged,) = predicted.left_out([*runs, fast])[2:]
    assert (judged.choice, judged.over) == ("none", 1)


def test_steps_are_predicted_from_the_local_step_of_their_run(tmp_path):
    runs = [records(tmp_path / f"{i}.jsonl", 2, mbit, 10**7) for i, mbit in enumerate((100, 1000))]
    path, local = tmp_path / "steps.jsonl", 0.2
    ways = {"none": runs[1].ways[0], "qsgd": runs[1].ways[1]}
    lines = [{"kind": "end_to_end", "model": "m", "hosts": 2, "mbit": 1000.0, "parameters": 10**7}]
    lines += [{"framework": "jax", "method": "local", "ms": [1e3 * local], "wire_bytes": 0}]
    lines += [{"framework": "torch", "method": "ddp", "ms": [1.0], "wire_bytes": None}]
    for name, way in ways.items():
        lines.append({"framework": "jax", "method": name, "ms": [1e3 * (local + way.seconds)], "wire_bytes": way.bytes})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = predicted.judged(predicted.read_steps(str(path)), predicted.fit(runs))
    assert one.errors == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "end_to_end"}', "no json"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.jsonl").write_text(text)
    with pytest.raises(predicted.RecordsError, match=r"is not the records of experiments\.allreduce"):
        predicted.read_exchanges(str(tmp_path / "other.jsonl"))


def ran(*arguments):
    """A run of experiments.plan."""
    command = [sys.executable, "-m", "experiments.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_plans_for_a_model():
    flags = ["--workers=8", "--link=100mbit", "--step_ms=50", "--device=cpu", "--codec=powersgd", "--powersgd_rank=4"]
    done = ran("--model=perceptron", *flags)
    assert done.returncode == 0, done.stderr
    assert "recommended: powersgd rank=4: the uncompressed exchange adds " in done.stdout
    assert "local step of 50 ms" in done.stdout


def test_the_command_needs_a_link():
    done = ran("--model=perceptron", "--step_ms=50")
    assert (done.returncode, done.stderr) == (
        1,
        "error: --link=1gbit tells the link between workers, and --measure measures it: give one\n",
    )


def test_a_transformer_s_operations_are_about_six_for_each_parameter_and_symbol():
    task = plan.task_of("transformer-25m", rows=2, context=128)
    params, batch = jax.eval_shape(task.params), jax.eval_shape(task.batch)
    size = sum(x.size for x in jax.tree.leaves(params))
    assert work.operations(task.loss_fn, params, batch) == pytest.approx(6 * size * 256, rel=0.15)


def test_the_map_shows_what_is_chosen_where(tmp_path):
    shape = (len(scale.WORKERS), len(scale.RATES))
    wire = np.broadcast_to(1e9 / scale.RATES, shape)  # a second at 1 Gbit/s
    steps = {"none": 1 + wire, "gentle": 1 + wire / 2, "strong": 1.5 + wire / 100, "rare": 1.1 + wire / 100}
    every_step = scale.chosen(steps, ["gentle", "strong"], "none")
    allowed = scale.further(steps, ["rare"], every_step)
    at = lambda best, rate: best[0][np.argmin(abs(scale.RATES - rate))]  # noqa: E731
    assert [at(every_step, rate) for rate in (1e8, 1e9, 4e11)] == ["strong", "gentle", "none"]
    assert [at(allowed, rate) for rate in (1e8, 1e9, 4e11)] == ["rare", "rare", "none"]
    chart = scale.Chart(scale.CASES[0], 1.0, steps, (every_step, allowed), wire > 1)
    scale.draw([chart], tmp_path / "map.png", "predicted")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    last = float(next(iter(scale.ends([chart]).columns[1].cells)))
    assert 4.5 / 1.27 < last <= 4.5  # Gbit/s: half of the exchange is a tenth of the rest; rates are 1.26 apart
