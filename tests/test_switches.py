"""What whole projects switch on, by jax's configuration: a codec works under it, and to the same numbers."""

import contextlib
import functools

import chex
import jax
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import first_state, map_state
from tests import problem
from tests.table import BY_ID, EACH

STEPS, WORKERS = 5, 2
each_codec = pytest.mark.parametrize("row", EACH, ids=lambda row: row.id)
FURTHER = [BY_ID[id] for id in ("randomblock", "qsgd-shared", "qsgd-4-hadamard", "gradiveq-holdout", "signnorm-vote")]
FURTHER += [BY_ID[id] for id in ("topk-chunks-all", "topk-chunks-sigma", "float4-ef")]
DRAWING = [BY_ID[id] for id in ("qsgd-4", "adaptive-shuffle", "randomblock")]


@contextlib.contextmanager
def switched(name, value):
    """A switch that has no context manager among jax's public names."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def as_strict_as_can_be():
    """All that raises where something is implicit, leaks or is not finite; and another generator by default."""
    with contextlib.ExitStack() as stack:
        for switch in (
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
            jax.transfer_guard("disallow"),
            jax.checking_leaks(),
            jax.debug_nans(True),
            jax.debug_infs(True),
            jax.debug_key_reuse(True),
            jax.legacy_prng_key("error"),
            jax.default_prng_impl("rbg"),
            switched("jax_explicit_x64_dtypes", "error"),
        ):
            stack.enter_context(switch)
        yield


@functools.cache
def given():
    """Parameters and batches, on the host."""
    with jax.transfer_guard("allow"):
        return jax.device_get((problem.params(), list(problem.batches(STEPS, 8))))


def trained(row, where, dtype=np.float32):
    """All that a run does: init, steps, what is read of the state, flush, and other workers; returns parameters."""
    tx = problem.optimizer(row.make())
    simulated = isinstance(where, int)
    lies, split = (None, None) if simulated else (NamedSharding(where, spec) for spec in (P(), P("data")))
    params, batches = jax.tree.map(lambda x: x.astype(dtype), given())
    params, batches = jax.device_put(params, lies), jax.device_put(batches, split)
    make = gc.simulate if simulated else gc.train_step
    step, state = make(problem.loss_fn, tx, where), gc.init(tx, params, where)
    for batch in batches:
        params, state, loss = step(params, state, batch)
    assert np.isfinite(jax.device_get(loss))
    assert gc.skipped(state) == 0
    assert gc.wire_bits(state).last > 0
    gc.accordion_log(state)
    if "elias" in row.id or "adaptive" in row.id:
        assert gc.code_bits(state) > 0
    after, state = gc.flush(tx, params, state, where)
    gc.resize_workers(state, 3 if simulated else where)
    return jax.device_get((params, after))


@functools.cache
def strictly(id):
    with as_strict_as_can_be():
        return trained(BY_ID[id], WORKERS)


@pytest.mark.parametrize("row", EACH + FURTHER, ids=lambda row: row.id)
def test_all_that_raises_at_once(row):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(strictly(row.id)))


@pytest.mark.parametrize("id", ["none", "powersgd-4", "qsgd-elias-shuffle", "accordion-powersgd"])
def test_and_over_a_mesh(id):
    with as_strict_as_can_be():
        trained(BY_ID[id], gc.make_mesh(WORKERS))


@each_codec
def test_float32_with_64_bits_enabled_is_the_same(row):
    with jax.enable_x64(True):
        got = trained(row, WORKERS)
    chex.assert_trees_all_equal_dtypes(got, strictly(row.id))
    chex.assert_trees_all_close(got, strictly(row.id), atol=1e-5, rtol=0)


@each_codec
def test_float64(row):
    with jax.enable_x64(True):
        got = trained(row, WORKERS, np.float64)
    assert all(x.dtype == np.float64 and np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("row", DRAWING, ids=lambda row: row.id)
def test_the_other_way_to_draw(row):
    """Which draws other numbers."""
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        trained(row, WORKERS)


def vmapped(row):
    """An update of four workers, their gradients, and the state."""
    tx, grads = row.make(), trees.noise(trees.MIXED, 16, (4,))
    state = first_state(tx, grads)
    axes = map_state(lambda _: 0, lambda _: None, state)
    return jax.vmap(tx.update, in_axes=(0, axes), out_axes=(0, axes), axis_name="data"), grads, state


@pytest.mark.parametrize("row", [row for row in EACH + FURTHER if "elias" not in row.id], ids=lambda row: row.id)
def test_nothing_on_the_way_is_no_number(row):
    """Neither what a condition leaves out; of zeros too. (checkify knows no loop of Elias' under vmap.)"""
    update, grads, state = vmapped(row)
    checked = jax.jit(checkify.checkify(update, errors=checkify.nan_checks | checkify.div_checks))
    for gradients in [grads] * 5 + [jax.tree.map(np.zeros_like, grads)] * 5:
        error, (_, state) = checked(gradients, state)
        error.throw()


@each_codec
def test_products_are_of_full_precision_whatever_the_default(row):
    """GPUs and TPUs have shorter products by default, and projects choose them for their networks."""
    update, grads, state = vmapped(row)
    with jax.default_matmul_precision("bfloat16"):
        program = jax.jit(update).lower(grads, state).as_text()
    assert program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]")
    assert ("dot_general" in program) == any(name in row.id for name in ("powersgd", "gradiveq"))
