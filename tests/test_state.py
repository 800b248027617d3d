"""State that outlives its workers: another number of them, and what residuals hold at the end."""

import functools
import re

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from tests import problem
from tests.table import BY_ID, EACH

WITH_RESIDUAL = [row for row in EACH if row.make().init(trees.zeros(trees.MATRICES)).residual.value]


def loss_of_gradients(params, batch):
    """A loss whose gradient is the mean over the batch [rows, ...] itself."""
    products = jax.tree.map(lambda p, b: jnp.sum(p * jnp.mean(b, axis=0)), params, batch)
    return sum(jax.tree.leaves(products))


def random_state(workers, axis="data"):
    """A state with two PerWorker nodes among replicated leaves, in its global form."""
    rng = np.random.default_rng(workers)
    residual = {"a": rng.standard_normal((workers, 5, 3)), "b": rng.standard_normal((workers, 7))}
    per_worker = gc.PerWorker(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), residual), axis)
    return {"codec": (per_worker, jnp.arange(6)), "other": gc.PerWorker(jnp.ones((workers, 2)), axis), "m": jnp.ones(4)}


class TestResize:
    @hypothesis.settings(max_examples=12)
    @hypothesis.given(old=st.integers(1, 9), new=st.integers(1, 9))
    def test_means_are_kept_and_the_rest_is_untouched(self, old, new):
        before = random_state(old)
        after = gc.resize_workers(before, new)
        chex.assert_trees_all_equal_structs(before, after)
        chex.assert_trees_all_equal((before["codec"][1], before["m"]), (after["codec"][1], after["m"]))
        for x, y in zip(
            jax.tree.leaves((before["codec"][0], before["other"])),
            jax.tree.leaves((after["codec"][0], after["other"])),
            strict=True,
        ):
            assert y.shape == (new, *x.shape[1:])
            assert y.dtype == x.dtype
            np.testing.assert_allclose(np.mean(x, axis=0), np.mean(y, axis=0), atol=1e-6)

    def test_fewer_workers_take_over_whole_groups(self):
        state = gc.PerWorker(jnp.arange(6.0)[:, None], "data")
        np.testing.assert_allclose(gc.resize_workers(state, 3).value[:, 0], [0.5, 2.5, 4.5])
        np.testing.assert_allclose(gc.resize_workers(state, 4).value[:, 0], [2.5] * 4)

    @pytest.mark.parametrize(
        ("row", "old", "new"),
        [*((row, 4, 3) for row in WITH_RESIDUAL), (BY_ID["powersgd-4"], 8, 4), (BY_ID["powersgd-4"], 1, 2)],
        ids=lambda x: getattr(x, "id", x),
    )
    def test_training_goes_on_and_nothing_is_lost(self, row, old, new):
        """What was applied before and after, and is owed at the end, is all that was given."""
        tx = optax.chain(row.make(), optax.sgd(1.0))
        params = trees.zeros(trees.MATRICES)
        grads = trees.noise(trees.MATRICES, 13, (24,))
        state = gc.init(tx, params, gc.make_mesh(old))
        for workers in (old, new):
            mesh = gc.make_mesh(workers)
            step = gc.train_step(loss_of_gradients, tx, mesh)
            params = jax.device_put(jax.device_get(params), NamedSharding(mesh, P()))
            state = gc.resize_workers(state, mesh)
            for _ in range(4):
                params, state, _ = step(params, state, grads)
        owed = jax.tree.map(lambda x: x.mean(0), state[0].residual.value)
        assert all(np.any(x != 0) for x in jax.tree.leaves(owed))
        given = jax.tree.map(lambda x: 8 * x.mean(0), grads)
        chex.assert_trees_all_close(jax.tree.map(jnp.subtract, owed, params), given, atol=1e-4)

    def test_state_lies_on_the_new_mesh(self):
        params = problem.params()
        state = gc.resize_workers(gc.init(gc.powersgd(2), params, gc.make_mesh(8)), gc.make_mesh(4))
        residual = state.residual.value["layer1/kernel"]
        assert residual.sharding == NamedSharding(gc.make_mesh(4), P("data"))
        assert state.codec.q["layer1/kernel"].sharding.is_fully_replicated

    def test_workers_along_two_axes(self):
        tx = gc.powersgd(2, axis_name=("node", "local"))
        state = gc.init(tx, problem.params(), gc.make_mesh({"node": 2, "local": 4}))
        after = gc.resize_workers(state, gc.make_mesh({"node": 2, "local": 2}))
        assert after.residual.value["layer1/kernel"].shape == (4, 64, 64)

    def test_random_keys(self):
        state = gc.resize_workers({"key": jax.random.key(3), "residual": gc.PerWorker(jnp.ones((4, 2)), "data")}, 2)
        assert state["key"] == jax.random.key(3)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"do not begin with one axis of workers.*global form"):
            gc.resize_workers(gc.powersgd(2).init(trees.zeros(trees.MIXED)), 4)
        with pytest.raises(ValueError, match="at least 1 worker, got 0"):
            gc.resize_workers(random_state(2), 0)
        with pytest.raises(ValueError, match="'node' is not an axis of the mesh"):
            gc.resize_workers(random_state(2, "node"), gc.make_mesh(4))


SHRINKING = {
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.01)),
    "clip by value": lambda: optax.chain(optax.clip(1e-4), optax.sgd(0.01)),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.01, 12)),
    "at zero": lambda: optax.sgd(optax.linear_schedule(0.01, 0.0, 10)),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(optax.exponential_decay(0.01, 1, 0.5)),
    "adam": lambda: optax.adam(0.01),
    "lion": lambda: optax.lion(0.01),
}


class TestFlush:
    @pytest.mark.parametrize(
        ("row", "simulated"),
        [*((row, False) for row in WITH_RESIDUAL), (BY_ID["onebit-mean"], True)],
        ids=lambda x: getattr(x, "id", "simulated" if x else "mesh"),
    )
    def test_all_that_was_given_is_applied(self, row, simulated):
        workers = 4
        where = workers if simulated else gc.make_mesh(workers)
        tx = optax.chain(row.make(), optax.sgd(1.0))
        params = trees.zeros(trees.MATRICES)
        grads = trees.noise(trees.MATRICES, 14, (workers,))

        make_step = gc.simulate if simulated else gc.train_step
        step = make_step(loss_of_gradients, tx, where)
        state = gc.init(tx, params, where)
        for _ in range(6):  # gradiveq compresses in the last one
            params, state, _ = step(params, state, grads)
        assert all(jnp.any(x != 0) for x in jax.tree.leaves(state[0].residual))
        flushed, after = gc.flush(tx, params, state, where)
        given = jax.tree.map(lambda x: -6 * x.mean(0), grads)
        chex.assert_trees_all_close(jax.device_get(flushed), given, atol=1e-4)
        assert not any(jnp.any(x != 0) for x in jax.tree.leaves(after[0].residual))
        # The second residual of 1-bit SGD is a part of the first.
        codec = jax.tree.map(jnp.zeros_like, state[0].codec) if row.id == "onebit-mean" else state[0].codec
        chex.assert_trees_all_equal(after[0].codec, codec)

        # All parameters as they are, and the loss, as in every step.
        dense = 32 * (sum(x.size for x in jax.tree.leaves(params)) + 1) * 2 * (workers - 1) // workers
        bits = gc.wire_bits(after)
        assert bits == (dense, gc.wire_bits(state).total + dense)
        # The state still fits the step.
        step(flushed, after, grads)

    def test_momentum_takes_it_as_a_gradient(self):
        tx = problem.optimizer(gc.powersgd(1))
        params, mesh = problem.params(), gc.make_mesh(2)
        state = gc.init(tx, params, mesh)
        (batch,) = problem.batches(1)
        params, state, _ = gc.train_step(problem.loss_fn, tx, mesh)(params, state, batch)
        _, after = gc.flush(tx, params, state, mesh)
        owed = state[0].residual.value["layer1/kernel"].mean(0)
        before, trace = (s[1][0].trace["layer1"]["kernel"] for s in (state, after))
        np.testing.assert_allclose(trace, 0.9 * before + owed, atol=1e-6)

    def test_nothing_to_do_without_residuals(self):
        tx = problem.optimizer(gc.qsgd(min_size=0))
        params = problem.params()
        state = gc.init(tx, params, 2)
        assert gc.flush(tx, params, state, 2) == (params, state)

    def test_a_wrapper_that_keeps_flush_from_the_codec_is_refused(self):
        codec = gc.powersgd(1)
        deaf = optax.GradientTransformation(codec.init, lambda u, s, p=None: codec.update(u, s, p))
        tx = optax.chain(deaf, optax.sgd(0.1))
        params = problem.params()
        (batch,) = problem.batches(1)
        params, state, _ = gc.simulate(problem.loss_fn, tx, 2)(params, gc.init(tx, params, 2), batch)
        with pytest.raises(ValueError, match=r"residuals are left after flush.*extra arguments"):
            gc.flush(tx, params, state, 2)

    @pytest.mark.parametrize("rest", [optax.MultiSteps(optax.sgd(0.1), 4), optax.sgd(0.0)], ids=["kept back", "zero"])
    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def test_a_flush_that_would_be_lost_is_refused(self, rest):
        tx = optax.chain(gc.powersgd(1), rest)
        params = problem.params()
        (batch,) = problem.batches(1)
        params, state, _ = gc.simulate(problem.loss_fn, tx, 2)(params, gc.init(tx, params, 2), batch)
        with pytest.raises(ValueError, match=r"flush changed no parameter.*learning rate is zero.*MultiSteps"):
            gc.flush(tx, params, state, 2)

    @staticmethod
    @functools.cache
    def trained(rest):
        """Eleven steps of top-k, whose residual is many gradients' worth by then."""
        tx, params = optax.chain(gc.topk(0.02), SHRINKING[rest]()), problem.params()
        step, state = gc.simulate(problem.loss_fn, tx, 2), gc.init(tx, params, 2)
        for batch in problem.batches(11):
            params, state, _ = step(params, state, batch)
        return tx, params, state

    @pytest.mark.parametrize("rest", SHRINKING)
    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def test_a_chain_that_would_shrink_what_is_owed_is_refused_with_the_share(self, rest):
        tx, params, state = self.trained(rest)
        with pytest.raises(
            ValueError, match=r"would apply (\d+\.\d)% of what residuals hold.*learning_rate="
        ) as caught:
            gc.flush(tx, params, state, 2)
        share = float(re.search(r"apply (\S+)%", str(caught.value)).group(1)) / 100
        owed = state[0].residual.value["layer1/kernel"].mean(0)
        if rest == "clip":
            norm = optax.tree.norm(jax.tree.map(lambda x: x.mean(0), state[0].residual.value))
            np.testing.assert_allclose(share, 0.1 / norm, atol=1e-3)
        if rest == "schedule":
            np.testing.assert_allclose(share, (1 + np.cos(np.pi * 11 / 12)) / 2, atol=1e-3)
        # All of it, past the chain, whose own state stays; and what the chain applies of it, by the user's word.
        flushed, after = gc.flush(tx, params, state, 2, learning_rate=0.25)
        moved = params["layer1"]["kernel"] - flushed["layer1"]["kernel"]
        np.testing.assert_allclose(moved, 0.25 * owed, atol=1e-6)
        chex.assert_trees_all_equal(after[1], state[1])
        assert not any(jnp.any(x != 0) for x in jax.tree.leaves(after[0].residual))
        assert gc.wire_bits(after).total > gc.wire_bits(state).total
        if rest != "at zero":
            _, after = gc.flush(tx, params, state, 2, at_least=0)
            assert not any(jnp.any(x != 0) for x in jax.tree.leaves(after[0].residual))

    @pytest.mark.parametrize("axes", ["data", ("node", "data")], ids=str)
    def test_a_chain_that_does_not_shrink_applies_all(self, axes):
        tx = optax.chain(gc.topk(0.02, axis_name=axes), optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9))
        mesh = 2 if axes == "data" else gc.make_mesh({"node": 1, "data": 2})
        step = gc.simulate(problem.loss_fn, tx, 2) if mesh == 2 else gc.train_step(problem.loss_fn, tx, mesh)
        params, state = problem.params(), gc.init(tx, problem.params(), mesh)
        for batch in problem.batches(3):
            params, state, _ = step(params, state, batch)
        flushed, _ = gc.flush(tx, params, state, mesh)
        trace, owed = state[2][0].trace["layer1"]["kernel"], state[0].residual.value["layer1/kernel"].mean(0)
        expected = 0.01 * (0.9 * trace + owed + 0.1 * params["layer1"]["kernel"])
        np.testing.assert_allclose(params["layer1"]["kernel"] - flushed["layer1"]["kernel"], expected, atol=1e-6)

    @pytest.mark.parametrize("make", [gc.delayed, lambda codec: codec], ids=["delayed", "at once"])
    def test_past_the_chain_all_that_was_given_is_applied(self, make):
        tx = optax.chain(make(gc.topk(0.1)), optax.clip_by_global_norm(1e9), optax.sgd(1.0))
        params, grads = trees.zeros(trees.MATRICES), trees.noise(trees.MATRICES, 14, (2,))
        step, state = gc.simulate(loss_of_gradients, tx, 2), gc.init(tx, params, 2)
        for _ in range(3):
            params, state, _ = step(params, state, grads)
        flushed, _ = gc.flush(tx, params, state, 2, learning_rate=1.0)
        chex.assert_trees_all_close(flushed, jax.tree.map(lambda x: -3 * x.mean(0), grads), atol=1e-4)

    def test_between_nodes(self):
        mesh = gc.make_mesh({"node": 2, "local": 2})
        tx = optax.chain(gc.average("local"), gc.onebit(axis_name="node"), optax.sgd(0.1))
        params, state, (batch,) = problem.params(), gc.init(tx, problem.params(), mesh), problem.batches(1)
        params, state, _ = gc.train_step(problem.loss_fn, tx, mesh)(params, state, batch)
        flushed, _ = gc.flush(tx, params, state, mesh)
        owed = state[1].residual.value["layer1/kernel"].mean(0)
        moved = params["layer1"]["kernel"] - flushed["layer1"]["kernel"]
        np.testing.assert_allclose(moved, 0.1 * owed, atol=1e-6)

    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def test_what_is_pending_and_not_finite_hides_nothing_of_the_share(self):
        tx = optax.chain(gc.delayed(gc.topk(0.02)), optax.clip_by_global_norm(0.1), optax.sgd(0.01))
        step, params, state = gc.simulate(problem.loss_fn, tx, 2), problem.params(), gc.init(tx, problem.params(), 2)
        for batch in problem.batches(8):
            params, state, _ = step(params, state, batch)
        params, state, _ = step(params, state, {**batch, "y": batch["y"].at[0, 0].set(jnp.nan)})
        with pytest.raises(ValueError, match="of what residuals hold"):
            gc.flush(tx, params, state, 2)

    @jax.numpy_dtype_promotion("standard")  # which optax needs
    def test_what_follows_the_loss_stays(self):
        tx = optax.chain(gc.topk(0.02, axis_name=("data",)), optax.sgd(1e-4), optax.contrib.reduce_on_plateau())
        step, params, state = gc.simulate(problem.loss_fn, tx, 2), problem.params(), gc.init(tx, problem.params(), 2)
        for batch in problem.batches(2):
            params, state, _ = step(params, state, batch)
        _, after = gc.flush(tx, params, state, 2)
        chex.assert_trees_all_equal(after[2], state[2])
        assert state[2].best_value > 0

    @pytest.mark.parametrize("rate", [None, 0.5])
    def test_parameters_of_16_bits(self, rate):
        """The mean, or what the parameters become, is rounded to their type; nothing stays owed."""
        tx = optax.chain(gc.topk(0.02), optax.sgd(0.5))
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem.params())
        step, state = gc.simulate(lambda p, b: problem.loss_fn(p, b).astype(jnp.float32), tx, 2), gc.init(tx, params, 2)
        for batch in problem.batches(3):
            params, state, _ = step(params, state, jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch))
        owed = state[0].residual.value["layer1/kernel"].mean(0)
        flushed, after = gc.flush(tx, params, state, 2, learning_rate=rate)
        before, now = (np.asarray(p["layer1"]["kernel"], np.float32) for p in (params, flushed))
        np.testing.assert_allclose(now, before - 0.5 * owed, rtol=2**-7, atol=1e-3)
        assert not any(jnp.any(x != 0) for x in jax.tree.leaves(after[0].residual))

    def test_residuals_that_cancel_change_nothing(self):
        tx = optax.chain(gc.powersgd(1), optax.sgd(1.0))
        params = trees.zeros(trees.MATRICES)
        grads = trees.noise(trees.MATRICES, 16, (1,))
        batch = jax.tree.map(lambda x: np.concatenate([x, -x]), grads)
        params, state, _ = gc.simulate(loss_of_gradients, tx, 2)(params, gc.init(tx, params, 2), batch)
        cancelling = state[0].residual._replace(value=jax.tree.map(jnp.asarray, batch))
        state = (state[0]._replace(residual=cancelling), *state[1:])
        flushed, after = gc.flush(tx, params, state, 2)
        chex.assert_trees_all_equal(flushed, params)
        assert not any(jnp.any(x != 0) for x in jax.tree.leaves(after[0].residual))

    def test_another_number_of_workers_is_refused(self):
        tx = problem.optimizer(gc.powersgd(1))
        params = problem.params()
        for mesh in (2, gc.make_mesh(2)):
            with pytest.raises(
                ValueError, match=r"opt_state is of \[\(4,\)\] workers along 'data'.* has 2.*resize_workers"
            ):
                gc.flush(tx, params, gc.init(tx, params, 4), mesh)


class TestOtherStates:
    """A state that is not one of the step's: refused in words that lead on."""

    @staticmethod
    def refused(state, tx, words, params=None, workers=4):
        params, (batch,) = params or problem.params(), problem.batches(1)
        mesh = gc.make_mesh(workers)
        for step in (gc.train_step(problem.loss_fn, tx, mesh), gc.simulate(problem.loss_fn, tx, workers)):
            with pytest.raises(ValueError, match=words):
                step(params, state, batch)

    @pytest.mark.parametrize("workers", [2, 8])
    def test_of_other_workers(self, workers):
        tx = problem.optimizer(gc.powersgd(1))
        words = rf"opt_state is of \[\({workers},\)\] workers.*resize_workers.*what the residuals owe"
        self.refused(gc.init(tx, problem.params(), workers), tx, words)

    def test_in_the_local_form(self):
        tx = problem.optimizer(gc.powersgd(1))
        self.refused(tx.init(problem.params()), tx, r"local form.*init\(tx, params, mesh\)")

    @pytest.mark.parametrize("feedback", [True, gc.Feedback(decay=0.9)])
    def test_with_error_feedback_switched(self, feedback):
        with_it, without = (problem.optimizer(gc.powersgd(1, error_feedback=on)) for on in (feedback, False))
        params = problem.params()
        self.refused(gc.init(with_it, params, 4), without, "opt_state keeps a residual at .* and tx does not.*flush")
        self.refused(gc.init(without, params, 4), with_it, "tx keeps a residual at .* and opt_state does not.*flush")

    def test_of_another_optimiser_or_other_parameters(self):
        tx = problem.optimizer(gc.powersgd(1))
        adam = optax.chain(gc.powersgd(1), optax.adam(0.1))
        self.refused(gc.init(adam, problem.params(), 4), tx, "not one of tx for these parameters: leaf .* is left over")
        more = {**problem.params(), "more": jnp.ones(3)}
        self.refused(gc.init(tx, problem.params(), 4), tx, r"leaf \[1\].*more.* is missing", more)


class TestSkipped:
    @pytest.mark.parametrize("context", ["vmap", "pmap"])
    def test_counts_steps_of_any_form(self, context):
        grads = trees.noise(trees.MATRICES, 15, (4, 2))
        grads["a"][1, 0, 3, 3] = grads["a"][3, 1, 0, 0] = np.nan
        states = run(BY_ID["powersgd-1"].make(), grads, context).states
        counts = [gc.skipped(jax.tree.map(lambda x, t=t: x[t], states)) for t in range(4)]
        assert counts == [0, 1, 1, 2]
        assert gc.skipped((gc.none().init({"w": jnp.ones(3)}), "other")) == 0

    def test_a_state_without_a_codec(self):
        with pytest.raises(ValueError, match="holds no codec's state"):
            gc.skipped(optax.sgd(0.1).init(problem.params()))
