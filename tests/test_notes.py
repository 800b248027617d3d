"""What the library tells of itself: what is dense and why, what a leaf is taken for, and that one worker is none."""

import logging

import jax
import jax.numpy as jnp
import pytest

import gradcomp_jax as gc
from gradcomp_jax import notes
from gradcomp_jax.testing import trees


@pytest.fixture
def told(caplog):
    """What is logged from now on, as in a process of its own."""
    notes._once.cache_clear()
    caplog.set_level(logging.INFO, "gradcomp_jax")
    return caplog


def summary(told, tx, shapes):
    """What is told of the leaves, however often the state is made."""
    for _ in range(2):
        jax.eval_shape(tx.init, trees.zeros(shapes))
    (text,) = told.messages
    return text.splitlines()


def test_what_is_compressed_as_what_and_what_is_not_and_why(told):
    shapes = {"a": {"kernel": (3, 3, 4, 8), "bias": (8,)}, "b": (64, 4, 4), "c": (5, 5), "d": (2, 2)}
    assert summary(told, gc.powersgd(1, min_size=20), shapes) == [
        "powersgd compresses 3 of 5 leaves, 99.1% of 1,349 elements",
        "  b: float32[64,4,4] as 64 x 16 at rank 1, 12.8 times fewer numbers",
        "  a/kernel: float32[3,3,4,8] as 9 x 32 at rank 1, 7.0 times fewer numbers",
        "  c: float32[5,5] as 5 x 5 at rank 1, 2.5 times fewer numbers",
        "  a/bias: dense, left out by the codec's rule for its shape",
        "  d: dense, fewer elements than min_size=20",
    ]


def test_leaves_that_ones_own_rule_leaves_out_or_that_do_not_shrink(told):
    tx = gc.signnorm(compress=lambda path, leaf: path != "out")
    assert summary(told, tx, {"out": (40,), "in": (30,), "one": (1,)}) == [
        "signnorm compresses 1 of 3 leaves, 42.3% of 71 elements",
        "  in: float32[30]",
        "  out: dense, left out by compress=",
        "  one: dense, would not shrink",
    ]


def test_between_slices_a_leaf_may_shrink_whole_and_in_shards_not(told):
    gc.init(
        gc.across(gc.powersgd(2)), trees.zeros({"w": (64, 64), "small": (5, 5)}), gc.make_mesh({"node": 2, "local": 4})
    )
    (text,) = told.messages
    assert text.splitlines()[2:] == ["  small: dense, its shards would not shrink"]


def test_layers_that_are_stacked_and_slices(told):
    stacked = lambda path, leaf: True  # noqa: E731
    tx = gc.accordion(gc.powersgd(4, stacked=stacked), gc.powersgd(1, stacked=stacked), interval=10)
    assert "as 12 matrices of 16 x 16 at rank 4 or 1, 8.0 times" in summary(told, tx, {"w": (12, 16, 16)})[1]
    told.clear()
    assert summary(told, gc.gradiveq(), {"w": (3, 3, 16, 32)})[1].endswith("as 9 slices of K=512, by 64 numbers each")


def test_a_large_tree_is_told_of_in_few_lines(told):
    shapes = {f"layer{i}": {"kernel": (100, 100), "own": (100, 200 + i), "bias": (100,)} for i in range(100)}
    lines = summary(told, gc.powersgd(), shapes)
    assert len(lines) == 1 + notes.MOST_KINDS + 1 + 1
    assert max(map(len, lines)) < 120
    assert lines[1].startswith("  layer0/kernel, layer1/kernel and 98 more: float32[100,100] as 100 x 100")
    assert lines[-2:] == [
        f"  and {101 - notes.MOST_KINDS} more kinds, of fewer elements",
        "  layer0/bias, layer1/bias and 98 more: dense, left out by the codec's rule for its shape",
    ]


def test_nothing_is_told_of_no_compression_nor_where_nobody_listens(told):
    jax.eval_shape(gc.none().init, trees.zeros({"w": (9, 9)}))
    told.set_level(logging.WARNING, "gradcomp_jax")
    jax.eval_shape(gc.powersgd().init, trees.zeros({"w": (9, 9)}))
    assert not told.messages
    told.set_level(logging.INFO, "gradcomp_jax")
    assert len(summary(told, gc.powersgd(), {"w": (9, 9)})) == 2


def traced(codec, workers, flush=False):
    """Traces an update among so many workers."""
    grads = {"w": jnp.zeros((workers, 8, 8))}
    jax.eval_shape(jax.vmap(lambda g: codec.update(g, codec.init(g), flush=flush)[0], axis_name="data"), grads)


@pytest.mark.filterwarnings("error")
def test_one_worker_is_warned_of_once(told):
    told.set_level(logging.WARNING, "gradcomp_jax")
    traced(gc.powersgd(1), 2)
    traced(gc.none(), 1)
    traced(gc.powersgd(1), 1, flush=True)
    assert not told.messages
    traced(gc.powersgd(1), 1)
    traced(gc.topk(0.1), 1)
    assert told.messages == [notes.ALONE]
    assert "jax_num_cpu_devices" in notes.ALONE
