"""`gradcomp_jax.testing.check` passes what is sound and names what is not; the example that uses it."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import gradcomp_jax as gcj
from gradcomp_jax.testing import LawError, check
from tests import decoders, planted
from tests.planted import Forgets, Rounded, Turns, made

ROOT = pathlib.Path(__file__).parent.parent
TREE = {"kernel": (64, 8), "bias": (6,)}

# Cheap settings, of which eight steps see all that the codec does.
CHEAP = {
    "gradiveq": functools.partial(
        gcj.gradiveq, 8, ratio=4, train_steps=3, compress_steps=3, warmup_steps=1, compress=lambda path, x: x.ndim > 1
    ),
    "powersgd": functools.partial(gcj.powersgd, 2),
    "qsgd": functools.partial(gcj.qsgd, 4, bucket_size=64, min_size=0, aggregate="shuffle"),
    "topk": functools.partial(gcj.topk, 0.1),
    "adaptive": functools.partial(gcj.adaptive, 8, sample=False),
    "randomk": functools.partial(gcj.randomk, 0.1),
    "randomblock": functools.partial(gcj.randomblock, 0.1),
}


@pytest.mark.parametrize("name", gcj.CODECS)
def test_the_librarys_codecs_pass(name):
    make = CHEAP.get(name, gcj.CODECS[name])
    report = check(lambda: make(), tree=TREE)
    held = {1, 2, 4, 5, 6, 7, 9} | ({8} if make().settings.error_feedback else set())
    assert (report.codec, {*report.laws}) == (name, held)


def test_each_legal_way_is_checked_and_the_report_says_so():
    report = check(functools.partial(made, Rounded(), False), tree=TREE)
    assert report.ways == ("gather", "shuffle")
    text = str(report)
    assert text.startswith("codec 'rounded' holds 7 laws, in ")
    for line in (
        "  laws: 1 conservation, 2 agreement, 4 contexts agree, 5 bits are true, 6 state is stable",
        "  ways: gather, shuffle\n",
        "  contexts: vmap of 1, 3 and 8 workers, pmap and shard_map checked and unchecked of 8 devices",
        "  not checked: law 3, linearity, which is claimed by linear=True",
        "  not checked: law 8, which is about error feedback",
    ):
        assert line in text


def coded(coder):
    return lambda: made(Rounded(coder), False)


def plain(codec, error_feedback=True):
    return lambda: made(codec, error_feedback)


# What is planted, the law that breaks first, the leaf, the numbers and the cause.
FAULTS = {
    "sends more than declared": (
        plain(planted.SendsMore()),
        r"law 5, bits are true: in step 0 the state declares \d+ bits, and the compiled program sends \d+: .*"
        r"a collective of jax.lax is called in the codec",
    ),
    "sends more than its size": (
        coded(planted.SaysLess()),
        r"law 9, .*laid as \(\d+,\) takes 68 bytes, and its `size` declares 64",
    ),
    "drops the residual": (
        plain(planted.DropsResidual()),
        r"law 1, conservation, leaf 'kernel': in step 0 the mean is not the mean of the 8 workers' `own`: .*"
        r"the residual is dropped",
    ),
    "a feedback that forgets": (
        plain(Turns(), Forgets()),
        r"law 1, conservation, leaf 'kernel': after 8 steps what was applied .* the residual is dropped: it is zero",
    ),
    "averages twice": (
        plain(planted.AveragesTwice()),
        r"law 1, conservation, leaf 'kernel': .*: the mean is averaged twice, it is 0.125 times what it should be",
    ),
    "shares the workers' random numbers": (
        coded(planted.SharesNumbers()),
        r"law 2, agreement: coder 'rounds' .*the workers' random numbers are shared",
    ),
    "random numbers differ that must agree": (
        plain(planted.WorkersPart()),
        r"law 2, agreement, leaf 'kernel': the mean differs between workers: in step \d+ worker \d has .*"
        r"random numbers that must agree are drawn with the worker's index",
    ),
    "a mean of the worker's own numbers": (
        plain(planted.OwnMean()),
        r"law 9, .* made the mean of leaf 'kernel' of more than heard numbers",
    ),
    "state of a worker's own that is not marked": (
        plain(planted.KeepsItsOwn()),
        r"law 2, agreement: the state 'codec/last/kernel' differs between workers: after step 0 worker \d .*`Mine`",
    ),
    "state that changes type": (
        plain(planted.Changes()),
        r"law 6, state is stable: the state 'codec/step' is int32\[\] before a step and float32\[\] after it",
    ),
    "NaN that poisons": (
        coded(planted.DropsNaN()),
        r"law 7, nothing poisons, leaf 'bias': a gradient of worker 2 has inf in leaf 'kernel' in step 1, and the mean",
    ),
    "NaN in what is not sent": (
        plain(planted.Blind()),
        r"law 7, nothing poisons: .*'states/residual/value/kernel' is not finite from step 1 on",
    ),
    "a constant magnitude": (
        coded(planted.Epsilon()),
        r"law 7, nothing poisons, leaf 'kernel': gradients 4.93e-32 times as large .*an epsilon",
    ),
    "a residual that grows": (
        plain(planted.Grows()),
        r"law 8, bounded, leaf 'kernel': the residual grows without bound: .*the codec is no contraction",
    ),
    "a residual that is never sent": (
        plain(planted.OwesForEver()),
        r"law 8, bounded, leaf 'kernel': .*what is owed is never sent: .*`total\(d\)`",
    ),
    "elements that are never sent": (
        plain(planted.NeverSendsHalf()),
        r"law 8, bounded, leaf 'kernel': .*some elements are never sent",
    ),
    "other numbers under vmap": (
        coded(planted.OtherUnderVmap()),
        r"law 4, contexts agree: 'updates/kernel' is not what it is under vmap: .*pmap of 8 devices",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault):
    factory, told = FAULTS[fault]
    with pytest.raises(LawError, match=re.compile(told, re.DOTALL)):
        check(factory, tree=TREE)


def test_linearity_is_checked_where_it_is_claimed():
    assert 3 in check(plain(Turns()), tree=TREE, linear=True).laws
    with pytest.raises(LawError, match="law 3, linearity, leaf 'kernel': 8 workers do not equal one") as found:
        check(plain(planted.LeavesOut()), tree=TREE, linear=True)
    assert (found.value.law, found.value.leaf) == (3, "kernel")
    assert found.value.place == "codec 'turns', way the default, vmap in float64"
    assert isinstance(found.value, AssertionError)


def decode(sent, state, shapes):
    """`Turns`'s mean: one half of each leaf, of which the state's step tells."""
    (operand,) = sent
    flat, mean = decoders.Flat(operand.mean(0)), {}
    for path in sorted(shapes):
        size = int(np.prod(shapes[path]))
        part, mean[path] = flat.take((-(-size // 2),)), np.zeros(size)
        start = int(state.step) % 2 * (size // 2)
        mean[path][start : start + len(part)] = part
        mean[path] = mean[path].reshape(shapes[path])
    return mean


def test_one_device_is_enough_and_an_authors_decoder_is_asked(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    report = check(plain(Turns()), tree=TREE, decode=decode)
    assert report.laws == (1, 2, 6, 7, 8, 9)
    assert report.contexts == ("vmap of 1, 3 and 4 workers",)
    told = "laws 4 and 5, which need several devices for pmap and shard_map (see jax_num_cpu_devices)"
    assert told in report.left_out
    with pytest.raises(LawError, match=r"law 9, .* in step 0 the mean is not what `decode` reads from what was handed"):
        check(plain(Turns()), tree=TREE, decode=lambda *args: {path: 2 * x for path, x in decode(*args).items()})
    # Nobody reads a compiled program here, and other gradients make another mean.
    with pytest.raises(LawError, match=r"law 9, .*done again with other gradients.* the mean is another.*jax.lax"):
        check(plain(planted.SendsMore()), tree=TREE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"factory": gcj.none()}, r"factory=Compressor\(.* must be a function that makes a codec, such as lambda"),
        ({"factory": lambda: 3}, "factory made 3, which is no Compressor"),
        ({"tree": {"w": 3}}, "tree={'w': 3} must be a tree of shapes, .*: 3 is none"),
        ({"tree": {}}, "tree={} has no leaf"),
        ({"steps": 3}, "steps=3 must be a whole number of at least 4"),
        ({"factory": lambda: gcj.topk(axis_name="node")}, r"along \('node',\), and is checked along 'data'"),
        ({"factory": lambda: gcj.across(gcj.topk())}, "without `across`"),
        ({"tree": {"b": (1,)}}, "of tree={'b': .*would compress none of the 1 leaves.* give check.*tree="),
        ({"factory": lambda: gcj.topk(allow_dense=True), "tree": {"b": (1,)}}, "compresses no leaf of tree="),
    ],
)
def test_bad_arguments_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        check(**{"factory": gcj.topk, **arguments})


def test_the_example_runs_as_a_script():
    script = ROOT / "examples/demo_codec.py"
    assert len(script.read_text().splitlines()) <= 90
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "codec 'demo' holds 8 laws" in done.stdout
    first, *_, last = (float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout))
    assert last < 0.1 * first
    assert float(re.search(r"([\d.]+) times fewer bytes", done.stdout)[1]) > 20
