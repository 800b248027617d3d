"""What a step sends on hardware that is not there; where a compiler for it is missing, on CPUs alone."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax import known
from gradcomp_jax.certify import GPUS, absent_mesh, certify, main
from gradcomp_jax.hlo import Span
from gradcomp_jax.picture import picture
from tests import certified

MISSING = "needs pip install 'gradcomp_jax[certify]'"
gpu = pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason=MISSING)
tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=MISSING)


def report_of(program, target, slices=1, **options):
    mesh = absent_mesh(target, slices)
    return certify(*program(mesh), mesh, **options)


def codes(report):
    return {finding.code for finding in report.findings}


def test_cpus_send_what_the_state_counts():
    report = report_of(certified.across, "cpu:2x4")
    assert report.totals["between"] < report.totals["inside"]
    assert report.declared == pytest.approx(report.totals, abs=1)
    assert not codes(report)
    assert report.overlapped == 0  # CPUs wait for each collective
    beside = report._replace(sent=[x._replace(span=Span(0, 9, 3)) for x in report.sent])
    assert beside.overlapped == 1
    text = str(report)
    assert "all-gather" in text
    assert f"wire_bits counts {report.declared['between']:,.0f}" in text
    assert json.loads(report.as_json())["totals"] == report.totals


def test_what_is_counted_may_hang_on_the_state():
    """It is told of a state that is given, and no figure is made up of one that is not."""
    mesh = absent_mesh("cpu:2x4")
    step, (params, state, batch) = certified.in_cycles(mesh)
    assert certify(step, (params, state, batch), mesh).declared == {}
    first = gc.init(certified.IN_CYCLES, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params), mesh)
    codec = first[0].codec
    told = []
    for position in (0, 4):  # before its first basis, and after
        given = (first[0]._replace(codec=codec._replace(position=np.int32(position))), *first[1:])
        told.append(certify(step, (params, given, batch), mesh).declared["between"])
    assert told[1] < told[0]


def test_no_state_counts_nothing():
    assert report_of(certified.several, "cpu:2x4").declared == {}


def test_what_hangs_on_nothing_is_known():
    @jax.jit
    def f(x, y, flag):
        three = jnp.asarray([1, 2], jnp.int32).sum()
        both = jax.lax.cond(flag, lambda: three + 1, lambda: three + x)
        looped = jax.lax.fori_loop(0, 3, lambda i, c: c + 1, three)
        return three, three + x, y[0], both, looped

    shape = jax.ShapeDtypeStruct
    given = f.trace(shape((), jnp.int32), np.arange(3), np.bool_(True)).jaxpr
    outputs = known.outputs(given, [shape((), jnp.int32), np.arange(3), np.bool_(True)])
    assert [outputs[i]() for i in (0, 2, 3)] == [3, 0, 4]
    for i in (1, 4):
        with pytest.raises(known.Unknown):
            outputs[i]()


def test_a_step_with_options_of_its_own():
    """As they are for a jit that no other one calls."""

    def program(mesh):
        tx = optax.chain(gc.across(gc.qsgd(4, min_size=0)), optax.sgd(0.1))
        batch = jax.ShapeDtypeStruct((32, certified.SIZE), jnp.float32)
        options = {"xla_llvm_disable_expensive_passes": True}
        step = gc.train_step(certified.loss_fn, tx, mesh, compiler_options=options)
        return step, certified.shapes(tx, certified.PARAMS, batch, mesh)

    assert report_of(program, "cpu:2x4").declared


def test_the_picture():
    report = report_of(certified.in_buckets, "cpu:2x4")
    (axes,) = picture(report).axes
    drawn = [bar for bar in axes.patches if bar.get_height() == pytest.approx(0.7)]
    assert len(drawn) == sum(x.span is not None for x in report.sent)
    assert axes.get_title(loc="left").startswith("cpu, 2 x 4: 0 of ")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["work", "between", "inside"]
    assert any(report.work.values())
    assert any("all-reduce" in text.get_text() for text in axes.texts)


def test_a_picture_of_much_is_packed():
    """Without labels, where spans do not meet in one row."""
    report = report_of(certified.in_buckets, "cpu:2x4")
    report = report._replace(sent=report.sent * 20)
    (axes,) = picture(report).axes
    assert not axes.texts


@pytest.mark.parametrize("path", ["no/such/folder/a.png", "a.unheard"])
def test_a_picture_that_cannot_be_written(path, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["tests.certified:several", f"--plot={tmp_path / path}"])
    assert f"error: --plot={tmp_path / path}: " in capsys.readouterr().err


def test_what_all_devices_of_a_node_send_alike_is_found():
    (finding,) = [x for x in report_of(certified.each_device_all, "cpu:2x4").findings if x.code == "repeated"][:1]
    assert "across(codec, slow='node', fast='local')" in finding.text


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "gradcomp_jax.certify", "tests.certified:across", "--target=cpu:2x4", "--json"]
    command.append(f"--plot={tmp_path / 'schedule.svg'}")
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {row["link"] for row in told["sent"]} == {"between", "inside"}
    assert "between" in (tmp_path / "schedule.svg").read_text()


def test_the_experiment():
    """Every way of a codec, small and on CPUs."""
    command = [sys.executable, "-m", "experiments.slices", "--codec=powersgd", "--width=128", "--leaves=2", "--rows=2"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\d of \d", told)) == 4
    assert "not told" not in told


@pytest.mark.parametrize("target", ["cpu", "h100:16", "v5e:", "nothing", "nothing.txtpb:2x8"])
def test_targets_that_are_none(target):
    with pytest.raises(ValueError, match="target="):
        absent_mesh(target)


@pytest.mark.parametrize(("program", "told"), [("nowhere:f", "nowhere"), ("tests.certified:nothing", "nothing")])
def test_programs_that_are_none(program, told, capsys):
    with pytest.raises(SystemExit):
        main([program])
    assert re.search(f"error: .*{told}.* is not found", capsys.readouterr().err)


@gpu
class TestGPU:
    def test_a_step_is_asynchronous(self):
        options = gc.compiler_options("gpu")
        report = report_of(certified.in_buckets, "h100:2x8", compiler_options=options)
        assert not codes(report)
        between = [x.span.work for x in report.sent if x.link == "between"]
        assert len(between) == 4
        assert sum(work > 0 for work in between) >= 3
        assert report.overlapped > 0.7

    @pytest.mark.parametrize(
        ("program", "code"),
        [("int4", "int4"), ("int16", "int16"), ("several", "merged"), ("each_device_all", "repeated")],
    )
    def test_faults_are_found(self, program, code):
        assert code in codes(report_of(getattr(certified, program), "h100:2x8"))

    @pytest.mark.parametrize("target", ["a100:2x8", "b200:2x8", f"{GPUS}/h100.txtpb:2x8"])
    def test_other_gpus(self, target):
        report = report_of(certified.across, target)
        assert report.declared == pytest.approx(report.totals, abs=1)


@tpu
class TestTPU:
    def test_a_topology_that_there_is_not(self):
        with pytest.raises(ValueError, match=r"target='v5e:3x5' is none that libtpu"):
            absent_mesh("v5e:3x5")

    def test_a_step_between_slices(self):
        report = report_of(certified.across, "v5e:2x4", 2)
        assert report.totals["between"] > 0
        assert not codes(report)

    def test_faults_are_found(self):
        assert "reduce-scatter" in codes(report_of(certified.vector, "v5e:2x4", 2))
        assert "merged" in codes(report_of(certified.in_buckets, "v5e:2x4", 2))
        quantised = {"xla_tpu_quantized_all_reduce_level": "1"}
        assert "quantised" in codes(report_of(certified.across, "v5e:2x4", 2, compiler_options=quantised))


CODECS = {
    "float4": lambda axis: gc.float4(aggregate="gather", axis_name=axis),
    "none": lambda axis: gc.none(axis_name=axis),
}


def order_of(compiled, *kinds):
    """The operations of these kinds, in the order of the compiled program."""
    text = compiled.as_text()
    text = text[text.index("\nENTRY ") :]
    return re.findall(rf" ({'|'.join(kinds)})\(", text)


@gpu
@pytest.mark.parametrize("codec", CODECS)
def test_an_exchange_spans_the_local_steps_beside_it_on_gpus(codec):
    """It starts before the loop of local steps, and ends after it; a short message before tells who takes part."""
    mesh = absent_mesh("h100:1x8")
    step, args = certified.streaming(mesh, CODECS[codec](mesh.axis_names))
    kind = "all-reduce" if codec == "none" else "all-gather"
    found = order_of(step.lower(*args).compile(), "all-[a-z]+-start", "all-[a-z]+-done", "while")
    assert found[:5] == ["all-reduce-start", "all-reduce-done", f"{kind}-start", "while", f"{kind}-done"]


@tpu
@pytest.mark.parametrize("codec", CODECS)
def test_an_exchange_spans_the_local_steps_beside_it_between_slices(codec):
    mesh = absent_mesh("v5e:2x4", 2)
    step, args = certified.streaming(mesh, gc.across(CODECS[codec]("node")))
    found = order_of(step.lower(*args).compile(), "send", "recv", "send-done", "recv-done", "while")
    short = ["send", "recv", "send-done", "recv-done"]
    assert found[:9] == [*short, "send", "recv", "while", "send-done", "recv-done"]
