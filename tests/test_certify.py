"""What a step sends on hardware that is not there; where a compiler for it is missing, on CPUs alone."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

import gradcomp_jax as gc
from gradcomp_jax.certify import absent_mesh, certify, main
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
    report = report_of(certified.across, "cpu:2x4", declared={"between": 1.0})
    assert report.totals["between"] < report.totals["inside"]
    assert not codes(report)
    text = str(report)
    assert "all-gather" in text
    assert "wire_bits counts 1" in text
    assert json.loads(report.as_json())["totals"] == report.totals


def test_what_all_devices_of_a_node_send_alike_is_found():
    (finding,) = [x for x in report_of(certified.each_device_all, "cpu:2x4").findings if x.code == "repeated"][:1]
    assert "across(codec, slow='node', fast='local')" in finding.text


def test_the_command():
    command = [sys.executable, "-m", "gradcomp_jax.certify", "tests.certified:across", "--target=cpu:2x4", "--json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {row["link"] for row in told["sent"]} == {"between", "inside"}


def test_the_experiment():
    """Every way of a codec, small and on CPUs."""
    command = [sys.executable, "-m", "experiments.slices", "--codec=powersgd", "--width=128", "--leaves=2", "--rows=2"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\d of \d", told)) == 4
    assert "not told" not in told


@pytest.mark.parametrize("target", ["cpu", "h100:16", "v5e:", "nothing"])
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

    @pytest.mark.parametrize(
        ("program", "code"),
        [("int4", "int4"), ("int16", "int16"), ("several", "merged"), ("each_device_all", "repeated")],
    )
    def test_faults_are_found(self, program, code):
        assert code in codes(report_of(getattr(certified, program), "h100:2x8"))


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
