"""Double buffering: a step applies the gradients of the step before."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from tests import problem
from tests.test_refusals import refuses
from tests.test_state import loss_of_gradients

STEPS = 6
ONEBIT = gc.onebit(aggregate="shuffle")


def given(steps, workers=2):
    return trees.noise(trees.MIXED, 0, (steps, workers))


@pytest.mark.parametrize(
    "codec",
    [ONEBIT, gc.qsgd(bucket_size=64, min_size=0)],
    ids=lambda tx: tx.codec.name,
)
def test_updates_are_the_codecs_own_a_step_later(codec):
    """To the bit, if the codec begins with a step of zeros, as it does; its state too."""
    grads = given(STEPS)
    late = run(gc.delayed(codec), grads, "vmap")
    shifted = jax.tree.map(lambda x: np.concatenate([np.zeros_like(x[:1]), x[:-1]]), grads)
    alone = run(codec, shifted, "vmap")
    assert not any(x[0].any() for x in jax.tree.leaves(late.updates))
    assert all(x[1].any() for x in jax.tree.leaves(late.updates))
    chex.assert_trees_all_equal(late.updates, alone.updates)
    chex.assert_trees_all_equal(late.states.codec, alone.states)
    chex.assert_trees_all_equal(late.states.pending.value, grads)


def test_applied_residuals_and_pending_hold_all_gradients():
    grads = given(STEPS)
    got = run(gc.delayed(ONEBIT), grads, "vmap")
    owed = got.states.codec.residual.value["conv"][-1].mean(0)
    applied, pending = got.updates["conv"][:, 0].sum(0), got.states.pending.value["conv"][-1].mean(0)
    assert np.abs(owed).max() > 0.1
    np.testing.assert_allclose(applied + owed + pending, grads["conv"].mean(1).sum(0), atol=1e-4)


def poisoned(params, batch):
    return problem.loss_fn(params, batch) + jnp.sum(params["layer1"]["kernel"]) * jnp.sum(batch["poison"])


@pytest.mark.parametrize("simulated", [False, True], ids=["mesh", "simulated"])
def test_a_step_that_is_not_finite_is_skipped_where_it_would_be_applied(simulated):
    """Gradients of step 2 are NaN: step 3 changes nothing but what is pending, and training goes on."""
    tx = optax.chain(gc.delayed(gc.powersgd(2)), optax.sgd(0.05, momentum=0.9))
    where = 4 if simulated else gc.make_mesh(4)
    step = (gc.simulate if simulated else gc.train_step)(poisoned, tx, where)
    params = problem.params()
    state = gc.init(tx, params, where)
    for i, batch in enumerate(problem.batches(6)):
        poison = jnp.zeros(32).at[9].set(jnp.nan if i == 2 else 0)
        before = jax.device_get((params, kept(state)))
        params, state, _ = step(params, state, {**batch, "poison": poison})
        after = jax.device_get((params, kept(state)))
        assert gc.skipped(state) == (i >= 3)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
        if i == 3:
            chex.assert_trees_all_equal(after, before)
        elif i:
            assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after[0], before[0])), strict=True))


def kept(state):
    """What a skipped step leaves as it was."""
    (late, rest) = state
    return late.codec.codec, late.codec.residual, rest


@pytest.mark.parametrize("codec", [gc.onebit(), gc.qsgd(bucket_size=64, min_size=0)], ids=lambda tx: tx.codec.name)
def test_flush_applies_what_is_pending(codec):
    """With residuals nothing is missing then; without them what is pending goes out whole."""
    tx = optax.chain(gc.delayed(codec), optax.sgd(1.0))
    params, grads = trees.zeros(trees.MATRICES), trees.noise(trees.MATRICES, 1, (4,))
    step = gc.simulate(loss_of_gradients, tx, 4)
    state = gc.init(tx, params, 4)
    for _ in range(2):
        params, state, _ = step(params, state, grads)
    flushed, after = gc.flush(tx, params, state, 4)
    mean = jax.tree.map(lambda x: -x.mean(0), grads)
    times = 2 if codec.settings.error_feedback else 1
    before = trees.zeros(trees.MATRICES) if codec.settings.error_feedback else params
    applied = jax.tree.map(lambda x, y: (x - y) / times, flushed, before)
    chex.assert_trees_all_close(applied, mean, atol=1e-5)
    assert not any(x.any() for x in jax.tree.leaves((after[0].pending, after[0].codec.residual)))


@pytest.mark.parametrize("codec", [gc.onebit(), gc.qsgd(bucket_size=64, min_size=0)], ids=lambda tx: tx.codec.name)
def test_flush_after_gradients_that_are_not_finite(codec):
    """They are skipped, and residuals sent."""
    tx = optax.chain(gc.delayed(codec), optax.sgd(1.0))
    start, grads = trees.zeros(trees.MATRICES), trees.noise(trees.MATRICES, 1, (4,))
    step = gc.simulate(loss_of_gradients, tx, 4)
    params, state, _ = step(start, gc.init(tx, start, 4), grads)
    bad = jax.tree.map(lambda x: np.where(np.arange(4) == 2, np.nan, x.T).T.astype(np.float32), grads)
    params, state, _ = step(params, state, bad)
    flushed, after = gc.flush(tx, params, state, 4)
    assert gc.skipped(after) == 1
    expected = jax.tree.map(lambda x: -x.mean(0), grads) if codec.settings.error_feedback else params
    chex.assert_trees_all_close(flushed, expected, atol=1e-5)
    assert not any(x.any() for x in jax.tree.leaves((after[0].pending, after[0].codec.residual)))


def test_another_number_of_workers():
    """What is pending keeps its mean, and is applied by the workers there are then."""
    tx = optax.chain(gc.delayed(gc.onebit()), optax.sgd(1.0))
    params, grads = trees.zeros(trees.MATRICES), trees.noise(trees.MATRICES, 2, (12,))
    state = gc.init(tx, params, 4)
    params, state, _ = gc.simulate(loss_of_gradients, tx, 4)(params, state, grads)
    state = gc.resize_workers(state, 3)
    params, state = gc.flush(tx, params, state, 3)
    chex.assert_trees_all_close(params, jax.tree.map(lambda x: -x.mean(0), grads), atol=1e-5)


def test_goes_on_from_arrays_on_the_host():
    """As a checkpoint holds them."""
    tx = gc.delayed(ONEBIT)
    grads = given(STEPS)
    whole = run(tx, grads, "vmap")
    half = run(tx, jax.tree.map(lambda x: x[:3], grads), "vmap").states
    leaves, treedef = jax.tree.flatten(gc.init(tx, trees.zeros(trees.MIXED), 2))
    stored = [
        x[-1] if x[-1].shape == leaf.shape else x[-1, 0] for x, leaf in zip(jax.tree.leaves(half), leaves, strict=True)
    ]
    again = run(tx, jax.tree.map(lambda x: x[3:], grads), "vmap", jax.tree.unflatten(treedef, stored))
    chex.assert_trees_all_equal(again, jax.tree.map(lambda x: x[3:], whole))


def test_what_is_no_codec_is_refused():
    for tx in (optax.sgd(0.1), optax.chain(gc.onebit(), optax.sgd(0.1)), gc.average("data"), gc.delayed(gc.onebit())):
        with refuses("must be a codec, as in optax.chain(delayed(onebit()), optax.sgd(0.1))"):
            gc.delayed(tx)


def test_reduced_gradients_are_refused():
    tx, params = gc.delayed(gc.none()), problem.params()

    def worker(params):
        return tx.update(params, tx.init(params))[0]

    with refuses("gradient leaf 'layer1/bias'", "already reduced", "vary(params, 'data')"):
        jax.shard_map(worker, mesh=gc.make_mesh(2), in_specs=jax.P(), out_specs=jax.P())(params)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_that_differ_along_another_axis_are_refused(check_vma):
    """What is pending would be stored as if it did not."""
    tx = optax.chain(gc.delayed(gc.powersgd(2, axis_name="node")), optax.sgd(0.1))
    mesh, params = gc.make_mesh({"node": 2, "local": 2}), problem.params()
    step = gc.train_step(problem.loss_fn, tx, mesh, check_vma=check_vma)
    with refuses("'layer1/bias' differs along mesh axis 'local' too", "average('local') before the codec"):
        step.lower(params, gc.init(tx, params, mesh), next(problem.batches(1)))
