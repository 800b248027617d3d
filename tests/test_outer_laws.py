"""Outer steps keep the laws: nothing is lost, nothing poisons, and the state outlives its workers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gradcomp_jax as gcj
from gradcomp_jax.outer_state import on_schedule
from gradcomp_jax.testing import trees
from tests.table import BY_ID, EACH
from tests.test_state import loss_of_gradients

EVERY, RATE = 2, np.float32(0.5)
EXCHANGES = 9
TREE = trees.MATRICES
# Momentum, and a count.
INNER = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: -0.01))
codecs = pytest.mark.parametrize("row", [row for row in EACH if row.id != "none"], ids=lambda row: row.id)


def moved(row, workers, decay=1.0, **settings):
    """An optimiser whose differences are sums of the workers' gradients, and whose anchor moves by their mean."""
    codec = row.make(error_feedback=gcj.Feedback(decay))
    return gcj.outer(optax.sgd(RATE), every=EVERY, codec=codec, **settings), trees.noise(TREE, 7, (workers,))


def means(tree):
    return {path: np.mean(x, axis=0, dtype=np.float64) for path, x in tree.items()}


def train(tx, over, grads, steps, first=None):
    make = gcj.simulate if isinstance(over, int) else gcj.train_step
    params, state = first or (trees.zeros(TREE), gcj.init(tx, trees.zeros(TREE), over))
    step = make(loss_of_gradients, tx, over)
    for _ in range(steps):
        params, state, _ = step(params, state, grads)
    return params, state


class TestConservation:
    @codecs
    @pytest.mark.parametrize("decay", [1.0, 0.9])
    def test_nothing_is_lost_but_what_decays(self, row, decay):
        """Law 1, of what was handed to the codec: what an exchange forgets is (1 - decay) of the residual."""
        tx, grads = moved(row, 3, decay)
        params, state = trees.zeros(TREE), gcj.init(tx, trees.zeros(TREE), 3)
        step, forgotten = gcj.simulate(loss_of_gradients, tx, 3), dict.fromkeys(TREE, 0.0)
        for _ in range(EXCHANGES):
            before = means(jax.device_get(state.codec[0].residual.value))
            for _ in range(EVERY):
                params, state, _ = step(params, state, grads)
            forgotten = {path: x + (1 - decay) * before.get(path, 0) for path, x in forgotten.items()}
        owed = means(jax.device_get(state.codec[0].residual.value))
        for path, given in means(grads).items():
            handed = EXCHANGES * EVERY * RATE * given
            found = -np.asarray(params[path]) + owed.get(path, 0) + forgotten[path]
            np.testing.assert_allclose(found, handed, atol=2e-5 * EXCHANGES, err_msg=path)

    @pytest.mark.parametrize(("alpha", "steps"), [(0.0, 4 + 2 + 2), (1.0, 4 + 4 + 4)])
    def test_steps_done_during_a_delay(self, alpha, steps):
        """At alpha=0 those of each later period are lost; at alpha=1 all steps count, and each once."""
        tx = gcj.outer(optax.sgd(RATE), every=4, codec=gcj.none(), delay=2, alpha=alpha)
        grads = trees.noise(TREE, 7, (3,))
        params, _ = train(tx, 3, grads, 4 * 3 + 1)
        for path, given in means(grads).items():
            np.testing.assert_allclose(-params[path], RATE * steps * given, atol=1e-5)

    @codecs
    @pytest.mark.parametrize("stop", [5, 6])
    def test_flush_during_a_delay(self, row, stop):
        """What is on its way is adopted first, so no part of it is sent a second time: law 1 once more."""
        codec = row.make(error_feedback=gcj.Feedback(1.0))
        tx = gcj.outer(optax.sgd(RATE), every=4, codec=codec, delay=2)
        grads = trees.noise(TREE, 7, (3,))
        params, state = gcj.flush(tx, *train(tx, 3, grads, stop), 3)
        # After 5 steps the fifth is lost with the delay; after 6 the two were adopted away in the ordinary way.
        for path, given in means(grads).items():
            np.testing.assert_allclose(-np.asarray(params[path]), 4 * RATE * given, atol=1e-4)
        assert not any(np.any(x) for s in state.codec for x in jax.tree.leaves(s.residual))
        assert int(state.place) == 0

    @pytest.mark.parametrize("fragments", [1, 2])
    def test_flush_ends_a_period(self, fragments):
        tx, grads = moved(BY_ID["topk-shuffle"], 4, fragments=fragments)
        params, state = train(tx, 4, grads, 5)
        params, state = gcj.flush(tx, params, state, 4)
        for path, given in means(grads).items():
            np.testing.assert_allclose(-np.asarray(params[path]), 5 * RATE * given, atol=1e-5)
        assert int(state.place) == 0
        assert not any(np.any(x) for s in state.codec for x in jax.tree.leaves(s.residual))
        chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], gcj.local_params(state)), params)
        on_mesh = gcj.make_mesh(4)
        other = gcj.flush(tx, *train(tx, on_mesh, grads, 5), on_mesh)
        chex.assert_trees_all_close(other[0], params, atol=1e-6)


class TestPoison:
    def poisoned(self, tx, over, at, steps, worker=1):
        """Trains on gradients of which one worker's are NaN in one step."""
        grads = trees.noise(TREE, 7, (3,))
        params, state = trees.zeros(TREE), gcj.init(tx, trees.zeros(TREE), over)
        step = (gcj.simulate if isinstance(over, int) else gcj.train_step)(loss_of_gradients, tx, over)
        for place in range(steps):
            rows = jax.tree.map(np.array, grads)
            if place == at:
                rows["a"][worker, 3, 4] = np.nan
            params, state, loss = step(params, state, rows)
        return params, state, loss, grads

    @pytest.mark.parametrize("over", [3, "mesh"])
    def test_a_local_step_that_is_not_finite_is_held(self, over):
        tx, _ = moved(BY_ID["topk-shuffle"], 3)
        over = gcj.make_mesh(3) if over == "mesh" else over
        params, state, loss, grads = self.poisoned(tx, over, 2, 4)
        assert gcj.held(state).tolist() == [0, 1, 0]
        assert gcj.absent(state).tolist() == [0, 0, 0]
        assert gcj.skipped(state) == 0
        assert np.isfinite(loss)
        owed = means(jax.device_get(state.codec[0].residual.value))
        for path in TREE:
            weight = np.array([4, 3, 4])[:, None, None] / 3
            np.testing.assert_allclose(-params[path] + owed[path], RATE * np.sum(weight * grads[path], 0), atol=1e-5)

    def test_weighed_by_steps(self):
        tx, _ = moved(BY_ID["none"], 3, weigh="steps")
        params, _, _, grads = self.poisoned(tx, 3, 0, 2)
        for path, g in grads.items():
            weight = np.array([2, 1, 2])[:, None, None]
            np.testing.assert_allclose(-params[path], RATE * np.sum(weight * weight * g, 0) / 5, atol=1e-5)

    def test_without_a_step_all_weigh_alike(self):
        """What alpha left to the workers is not lost in a flush right after an exchange."""
        ends = []
        for weigh in (None, "steps"):
            settings = {"every": 4, "delay": 1, "alpha": 0.5, "outer": optax.sgd(0.5), "weigh": weigh}
            tx, grads = gcj.outer(optax.sgd(RATE), codec=gcj.none(), **settings), trees.noise(TREE, 7, (3,))
            step, params, state = (
                gcj.simulate(loss_of_gradients, tx, 3),
                trees.zeros(TREE),
                gcj.init(tx, trees.zeros(TREE), 3),
            )
            for _ in range(5):
                params, state, _ = step(params, state, grads)
            mine = state.worker.value
            state = state._replace(worker=state.worker._replace(value=mine._replace(weight=0 * mine.weight)))
            ends.append(gcj.flush(tx, params, state, 3)[0])
        chex.assert_trees_all_close(*ends, atol=1e-6)
        assert np.max(np.abs(ends[0]["a"] - params["a"])) > 0.1

    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
    def test_a_weight_that_is_no_weight_counts_as_zero(self, wrong):
        def moved_by(weights):
            tx = gcj.outer(optax.sgd(RATE), every=1, codec=gcj.none(), weigh=lambda rows: jnp.mean(rows))
            step = gcj.simulate(
                lambda params, rows: jnp.sum(params["w"]) * (1 + jax.lax.axis_index("data").astype(jnp.float32)), tx, 3
            )
            params = {"w": jnp.ones(4)}
            return step(params, gcj.init(tx, params, 3), np.array(weights, np.float32))[0]

        chex.assert_trees_all_close(moved_by([1, wrong, 3]), moved_by([1, 0, 3]))

    def test_a_weight_is_one_number(self):
        tx = gcj.outer(optax.sgd(RATE), every=1, codec=gcj.none(), weigh=lambda rows: rows)
        params = {"w": jnp.ones(4)}
        with pytest.raises(ValueError, match=r"the weight of a step has shape \(2,\): weigh= must return one number"):
            gcj.simulate(lambda params, rows: jnp.sum(params["w"]), tx, 2)(
                params, gcj.init(tx, params, 2), np.ones(4, np.float32)
            )

    @pytest.mark.parametrize("fragments", [1, 2])
    def test_a_flush_keeps_the_loss(self, fragments):
        tx = gcj.outer(optax.sgd(RATE), every=2, codec=gcj.none(), fragments=fragments)
        params = {"layer_0": jnp.ones(4), "layer_1": jnp.ones(4)}
        step = gcj.simulate(lambda params, rows: jnp.mean(rows) * params["layer_0"][0], tx, 2)
        state = gcj.init(tx, params, 2)
        for _ in range(2):
            params, state, loss = step(params, state, np.ones(4, np.float32))
        assert np.isfinite(loss)
        assert gcj.flush(tx, params, state, 2)[1].loss == loss

    @pytest.mark.parametrize("over", [3, "mesh"])
    @pytest.mark.parametrize("settings", [{"accumulate": 2}, {"steps": 2}])
    def test_weighed_in_parts_and_several_steps(self, over, settings):
        """The weight is of the whole batch of a step, and those of a period add up."""
        tx = gcj.outer(optax.sgd(RATE), every=2, codec=gcj.none(), weigh=lambda rows: jnp.sum(rows["tokens"]))
        loss = lambda params, rows: jnp.mean(params["w"] @ rows["x"].T)  # noqa: E731
        rows = np.random.default_rng(3).normal(size=(2, 6, 4)).astype(np.float32)
        tokens = np.float32([[1, 2, 3, 4, 5, 6], [0, 1, 0, 2, 0, 9]])
        params, over = {"w": jnp.zeros((1, 4))}, gcj.make_mesh(3) if over == "mesh" else over
        step = (gcj.simulate if over == 3 else gcj.train_step)(loss, tx, over, **settings)
        state, several = gcj.init(tx, params, over), "steps" in settings
        for at in range(1 if several else 2):
            which = slice(None) if several else at
            params, state, _ = step(params, state, {"x": rows[which], "tokens": tokens[which]})
        moves = rows.reshape(2, 3, 2, 4).mean(2).sum(0)
        weights = tokens.reshape(2, 3, 2).sum((0, 2))
        np.testing.assert_allclose(-params["w"][0], RATE * weights @ moves / weights.sum(), atol=1e-6)

    def test_weighed_by_a_function(self):
        tx = gcj.outer(optax.sgd(RATE), every=1, codec=gcj.none(), weigh=lambda rows: jnp.mean(rows["tokens"]))

        def loss(params, rows):
            return loss_of_gradients(params, {path: rows[path] for path in TREE})

        grads, tokens = trees.noise(TREE, 7, (3,)), np.float32([1, 2, 5])
        step = gcj.simulate(loss, tx, 3)
        params, *_ = step(trees.zeros(TREE), gcj.init(tx, trees.zeros(TREE), 3), grads | {"tokens": tokens})
        for path, g in grads.items():
            np.testing.assert_allclose(-params[path], RATE * np.einsum("w,wij->ij", tokens / 8, g), atol=1e-6)

    @pytest.mark.parametrize("over", [3, "mesh"])
    @pytest.mark.parametrize("settings", [{}, {"delay": 1, "alpha": 0.5}, {"fragments": 2}])
    def test_a_ruined_worker_is_absent_once(self, over, settings):
        """Its own parameters are not finite. The others' exchange takes place, and it goes on from the anchor, anew."""
        over = gcj.make_mesh(3) if over == "mesh" else over
        codec = gcj.topk(0.2, aggregate="gather")
        tx = gcj.outer(INNER, every=4, codec=codec, **settings)
        grads = trees.noise(TREE, 7, (3,))
        params, state = train(tx, over, grads, 2)
        ruined = state.worker.value.params["a"].at[1, 0, 0].set(jnp.inf)
        mine = state.worker.value._replace(params=state.worker.value.params | {"a": ruined})
        state = state._replace(worker=state.worker._replace(value=mine))
        params, state = train(tx, over, grads, 8, (params, state))
        assert gcj.absent(state).tolist() == [0, 1, 0]
        assert gcj.skipped(state) == 0
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.device_get((params, state))))
        momentum, schedule = state.worker.value.inner
        assert schedule.count.tolist() == [10] * 3
        since = momentum.trace["a"] / grads["a"]
        np.testing.assert_allclose(since[0], (1 - 0.9**10) / 0.1, rtol=1e-4)
        assert np.max(since[1]) < (1 - 0.9**8) / 0.1

    @pytest.mark.parametrize(("settings", "steps"), [({}, 4), ({"delay": 1, "alpha": 0.5}, 5)])
    def test_the_others_go_on_without_a_ruined_worker(self, settings, steps):
        """The anchor moves as if there were only the others, in whose exchange the codec is given the same."""
        tx = gcj.outer(INNER, every=4, codec=gcj.topk(0.2, aggregate="gather"), **settings)
        grads = trees.noise(TREE, 7, (3,))
        params, state = train(tx, 3, grads, 2)
        got, _ = train(tx, 3, grads, steps - 2, (params, self.ruined(state)))
        want, _ = train(tx, 2, jax.tree.map(lambda x: x[::2], grads), steps)
        chex.assert_trees_all_close(got, want, atol=1e-6)
        assert np.max(np.abs(got["a"])) > 1e-3

    def ruined(self, state, worker=1):
        mine = state.worker.value
        mine = mine._replace(params=jax.tree.map(lambda x: x.at[worker].set(jnp.nan), mine.params))
        return state._replace(worker=state.worker._replace(value=mine))

    def test_a_flush_goes_without_a_ruined_worker(self):
        """Also during a delay, when it begins anew with the adoption and would have a difference of zero."""
        for delay in (0, 2):
            tx = gcj.outer(optax.sgd(RATE), every=4, codec=gcj.none(), delay=delay, alpha=delay / 2)
            grads = trees.noise(TREE, 7, (3,))
            params, state = train(tx, 3, grads, 5)
            got, after = gcj.flush(tx, params, self.ruined(state), 3)
            assert gcj.absent(after).tolist() == [0, 1, 0]
            want = jax.tree.map(lambda x: (x[0] + x[2]) / 2, gcj.local_params(state))
            chex.assert_trees_all_close(got, want, atol=1e-6)

    @pytest.mark.parametrize("over", [3, "mesh"])
    def test_a_ruined_worker_under_all_at_once(self, over):
        """By a loss of its own parameters it holds its steps; its schedule goes on, its weight is of steps since."""
        over = gcj.make_mesh(3) if over == "mesh" else over
        settings = {"fragments": 2, "delay": 1, "weigh": "steps"}
        inner = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: -0.1))
        tx = gcj.outer(inner, every=4, codec=gcj.none(), **settings)
        loss = lambda params, rows: jnp.mean(sum(jnp.sum(jnp.square(x)) for x in params.values()) * rows)  # noqa: E731
        step = (gcj.simulate if over == 3 else gcj.train_step)(loss, tx, over)
        params, rows = {"layer_0": jnp.ones((4, 4)), "layer_1": jnp.ones((4, 4))}, np.ones(3, np.float32)
        state = gcj.init(tx, params, over)
        params, state, _ = step(params, state, rows)
        state = self.ruined(state)
        held, counts = [], []
        for _ in range(6):
            params, state, _ = step(params, state, rows)
            held.append(gcj.held(state).tolist())
            counts.append(state.worker.value.inner[1].count.tolist())
        # The first fragment is exchanged beside the third step, and adopted at its end, when the worker begins anew.
        assert held == [[0, 1, 0], [0, 2, 0], *[[0, 2, 0]] * 4]
        assert counts == [[n] * 3 for n in range(2, 8)]
        assert gcj.absent(state).tolist() == [0, 1, 0]
        # All have done 3 and 1 steps since their fragments' last exchange, beside the seventh and the fifth step.
        assert state.worker.value.weight.tolist() == [[1, 3]] * 3
        flushed, _ = gcj.flush(tx, params, state, over)
        chex.assert_tree_all_finite(flushed)

    @pytest.mark.parametrize("steps", [1, 2])
    def test_the_weight_of_lost_steps_is_lost(self, steps):
        """A worker that began anew when one fragment was exchanged weighs by its steps since, in the other."""
        tx = gcj.outer(optax.sgd(RATE), every=4, codec=gcj.none(), fragments=2, weigh="steps")
        grads = trees.noise(TREE, 7, (3,))
        params, state = train(tx, 3, grads, 1)
        _, state = train(tx, 3, grads, steps, (params, self.ruined(state)))
        assert state.worker.value.weight[:, 1].tolist() == [1 + steps, steps - 1, 1 + steps]

    def test_a_void_flush_is_refused(self):
        tx, grads = moved(BY_ID["topk-shuffle"], 3)
        params, state = train(tx, 3, grads, 3)
        residual = jax.tree.map(lambda x: x.at[0].set(jnp.inf), state.codec[0].residual)
        state = state._replace(codec=(state.codec[0]._replace(residual=residual),))
        with pytest.raises(ValueError, match=r"what the workers owe is not finite.*Nothing was changed"):
            gcj.flush(tx, params, state, 3)

    def test_a_mean_that_is_not_finite_voids_the_exchange(self):
        """Anchor, codec and undecayed residuals stay, and every worker begins again."""
        codec = gcj.powersgd(1, error_feedback=gcj.Feedback(0.9))
        tx = gcj.outer(optax.sgd(1.0), every=1, codec=codec, outer=optax.sgd(0.7, 0.9))
        step, grads = gcj.simulate(loss_of_gradients, tx, 3), trees.noise(TREE, 7, (3,))
        params, state, _ = step(trees.zeros(TREE), gcj.init(tx, trees.zeros(TREE), 3), grads)
        residual = jax.tree.map(lambda x: x.at[0].set(jnp.inf), state.codec[0].residual)
        before = state._replace(codec=(state.codec[0]._replace(residual=residual),))
        anchor, after, loss = step(params, before, grads)
        assert gcj.skipped(after) == 1
        assert np.isnan(loss)
        chex.assert_trees_all_equal((anchor, after.outer), (params, before.outer))
        chex.assert_trees_all_equal(after.codec[0].residual, residual)
        chex.assert_trees_all_equal(jax.tree.map(lambda x: x[2], gcj.local_params(after)), params)

    def test_nobody_is_left(self):
        tx, grads = moved(BY_ID["topk-shuffle"], 3)
        params, state = train(tx, 3, grads, 2)
        mine = state.worker.value
        mine = mine._replace(params=jax.tree.map(lambda x: x * jnp.nan, mine.params))
        after = train(tx, 3, grads, 2, (params, state._replace(worker=state.worker._replace(value=mine))))
        assert gcj.absent(after[1]).tolist() == [1, 1, 1]
        for own in jax.tree.leaves(jax.tree.map(jnp.subtract, gcj.local_params(after[1]), after[0])):
            assert not np.any(own)
        owed = [means(jax.device_get(x.codec[0].residual.value)) for x in (state, after[1])]
        for path in TREE:  # all hand zeros to the codec, which sends of what it owes
            np.testing.assert_allclose(after[0][path] - params[path], owed[1][path] - owed[0][path], atol=1e-6)

    def test_a_worker_that_begins_anew_stays_on_schedule(self):
        """Its moments are fresh; schedules, and rates that were injected or set by hand, are those of the others."""
        inner = optax.chain(
            optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
            optax.masked(optax.scale_by_schedule(lambda count: 1.0), {"a": True, "b": False}),
            optax.add_decayed_weights(lambda count: 0.1),
        )
        params = {"a": jnp.ones(3), "b": jnp.ones(3)}
        old = inner.init(params)
        old[0].hyperparams["learning_rate"] = jnp.float32(0.02)
        for _ in range(3):
            old = inner.update(params, old, params)[1]
        got = on_schedule(inner.init(params), old)
        assert got[0].hyperparams["learning_rate"] == jnp.float32(0.02)
        assert got[0].count == got[1].inner_state.count == got[2].count == 3
        chex.assert_trees_all_equal(got[0].inner_state, inner.init(params)[0].inner_state)


class TestHalves:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_small_steps_add_up(self, dtype):
        """The anchor has 16 bits, and steps far below its last one are kept beside it."""
        tx = gcj.outer(optax.sgd(1.0), every=1, codec=gcj.none(), outer=optax.sgd(2.0**-12))
        params = {"w": jnp.ones((8, 8), dtype)}
        step, state = gcj.simulate(lambda p, b: jnp.sum(p["w"].astype(jnp.float32)) * jnp.mean(b), tx, 2), None
        state = gcj.init(tx, params, 2)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(64):
                params, state, _ = step(params, state, jnp.ones(2))
        assert params["w"].dtype == dtype
        assert gcj.local_params(state)["w"].dtype == dtype
        whole = params["w"].astype(jnp.float32) + state.rest["w"]
        np.testing.assert_allclose(whole, 1 - 64 * 2.0**-12, rtol=1e-6)
        np.testing.assert_allclose(params["w"].astype(jnp.float32), 1 - 64 * 2.0**-12, rtol=2e-3)

    def test_differences_of_halves_are_exact(self):
        """A worker's step of one last bit is not lost in the difference."""
        tx = gcj.outer(optax.sgd(2.0**-8), every=1, codec=gcj.none())
        params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
        step = gcj.simulate(lambda p, b: jnp.sum(p["w"].astype(jnp.float32)) * jnp.mean(b), tx, 2)
        with jax.numpy_dtype_promotion("standard"):
            params, state, _ = step(params, gcj.init(tx, params, 2), jnp.float32([0.0, 1.0]))
        np.testing.assert_allclose(params["w"].astype(jnp.float32) + state.rest["w"], 1 - 2.0**-9)

    def test_halves_under_a_delay(self):
        """Also a part of an anchor of 16 bits that is adopted late keeps its small steps."""
        settings = {"every": 2, "delay": 1, "fragments": lambda path: int(path == "b"), "outer": optax.sgd(2.0**-8)}
        tx = gcj.outer(optax.sgd(2.0**-4), codec=gcj.none(), **settings)
        params = {"a": jnp.ones((8, 8), jnp.bfloat16), "b": jnp.ones((8, 8), jnp.bfloat16)}
        loss = lambda p, b: sum(jnp.sum(x.astype(jnp.float32)) for x in p.values()) * jnp.mean(b)  # noqa: E731
        step, state = gcj.simulate(loss, tx, 2), gcj.init(tx, params, 2)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(33):
                params, state, _ = step(params, state, jnp.ones(2))
        whole = {path: x.astype(jnp.float32) + state.rest[path] for path, x in params.items()}
        # Per exchange 2 steps, or 1 after the first, because one of two is lost with the delay.
        np.testing.assert_allclose(whole["b"], 1 - (2 + 15) * 2.0**-12, rtol=1e-6)
        np.testing.assert_allclose(whole["a"], 1 - 16 * 2.0**-12, rtol=1e-6)


class TestState:
    @pytest.mark.parametrize("stop", [6, 9])
    def test_killed_and_resumed(self, tmp_path, stop):
        """In the middle of a period, and of a delay: the same bits."""
        codec = gcj.topk(0.2, aggregate="gather")
        tx = gcj.outer(INNER, every=8, codec=codec, outer=optax.sgd(0.7, 0.9), delay=3, alpha=0.5)
        mesh, grads = gcj.make_mesh(3), trees.noise(TREE, 7, (3,))
        params, state = train(tx, mesh, grads, stop)
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "at", {"params": params, "opt_state": state})
        want = train(tx, mesh, grads, 12, (params, state))
        like = {"params": trees.zeros(TREE), "opt_state": gcj.init(tx, trees.zeros(TREE), mesh)}
        found = gcj.restore(tmp_path / "at", like, mesh)
        got = train(tx, mesh, grads, 12, (found["params"], found["opt_state"]))
        chex.assert_trees_all_equal(got, want)

    @pytest.mark.parametrize("stop", [6, 9])
    def test_other_numbers_of_workers(self, stop):
        """4 -> 3 -> 6: the mean difference and the mean debt stay, counts are the largest, the place stays."""
        codec = gcj.topk(0.2, aggregate="gather")
        tx = gcj.outer(INNER, every=8, codec=codec, delay=3, alpha=0.5)
        grads = trees.noise(TREE, 7, (12,))
        params, state = train(tx, 4, grads, stop)
        state = state._replace(worker=state.worker._replace(value=state.worker.value._replace(held=jnp.arange(4))))
        for workers in (3, 6):
            new = gcj.resize_workers(state, workers)
            mean = lambda x: jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), x)  # noqa: E731
            chex.assert_trees_all_close(mean(gcj.local_params(new)), mean(gcj.local_params(state)), atol=1e-6)
            chex.assert_trees_all_close(
                mean(new.codec[0].residual.value), mean(state.codec[0].residual.value), atol=1e-6
            )
            assert new.place == state.place
            assert gcj.held(new).tolist() == [3] * workers
            assert new.worker.value.inner[1].count.tolist() == [stop] * workers
            state = new
        on_mesh = train(tx, 6, grads, 12, (params, state))
        chex.assert_tree_all_finite(jax.device_get(on_mesh[0]))

    def test_a_ruined_worker_ruins_no_other(self):
        tx, grads = moved(BY_ID["topk-shuffle"], 4)
        _, state = train(tx, 4, grads, 3)
        mine = state.worker.value
        ruined = mine._replace(params=jax.tree.map(lambda x: x.at[1].set(jnp.nan), mine.params))
        new = gcj.resize_workers(state._replace(worker=state.worker._replace(value=ruined)), 2)
        want = jax.tree.map(lambda x: jnp.stack([x[0], (x[2] + x[3]) / 2]), mine.params)
        chex.assert_trees_all_close(gcj.local_params(new), want, atol=1e-6)


class TestSlices:
    def made(self):
        between = gcj.across(gcj.none(), slow="node", fast="local")
        return gcj.outer(INNER, every=4, codec=between), gcj.make_mesh({"node": 2, "local": 4})

    def test_a_chip_whose_gradient_is_not_finite(self):
        """Its slice leaves the step out, all chips of it alike; the other slice does not notice."""
        tx, mesh = self.made()
        grads, params, state = trees.noise(TREE, 7, (8,)), trees.zeros(TREE), gcj.init(tx, trees.zeros(TREE), mesh)
        step = gcj.train_step(loss_of_gradients, tx, mesh)
        for place in range(4):
            rows = jax.tree.map(np.array, grads)
            if place == 1:
                rows["a"][6, 3, 4] = np.nan
            params, state, _ = step(params, state, rows)
        assert gcj.held(state).tolist() == [0, 1]
        alone = gcj.outer(INNER, every=4, codec=gcj.none())
        halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]).mean(1), grads)
        first = train(alone, 1, jax.tree.map(lambda x: x[:1], halves), 4)[0]
        second = gcj.local_params(train(alone, 1, jax.tree.map(lambda x: x[1:], halves), 3)[1])
        for path in TREE:
            np.testing.assert_allclose(params[path], (first[path] + second[path][0]) / 2, atol=1e-6)

    def test_flush_and_resize(self):
        """In the middle of a period; the mean of the slices' own parameters stays, and goes to the anchor."""
        tx, mesh = self.made()
        grads = trees.noise(TREE, 7, (8,))
        params, state = train(tx, mesh, grads, 6)
        mean = jax.tree.map(lambda x: jnp.mean(x, 0), gcj.local_params(state))
        flushed, after = gcj.flush(tx, params, state, mesh)
        chex.assert_trees_all_close(flushed, mean, atol=1e-6)
        chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], gcj.local_params(after)), flushed)
        wider = gcj.make_mesh({"node": 4, "local": 2})
        new = gcj.resize_workers(state, wider)
        chex.assert_trees_all_close(jax.tree.map(lambda x: jnp.mean(x, 0), gcj.local_params(new)), mean, atol=1e-6)
        chex.assert_trees_all_close(gcj.flush(tx, params, new, wider)[0], mean, atol=1e-6)

    def test_a_worker_is_a_slice(self):
        """As many workers as slices, each on the mean gradient of its chips; every chip sends a share."""
        grads = trees.noise(TREE, 7, (8,))
        mesh = gcj.make_mesh({"node": 2, "local": 4})
        settings = {"every": 4, "outer": optax.sgd(0.7, 0.9)}
        between = gcj.across(gcj.none(), slow="node", fast="local")
        across = gcj.outer(INNER, codec=between, **settings)
        alone = gcj.outer(INNER, codec=gcj.none(), **settings)
        want = train(alone, 2, grads, 9)
        for check_vma in (True, False):
            step = gcj.train_step(loss_of_gradients, across, mesh, check_vma=check_vma)
            params, state = trees.zeros(TREE), gcj.init(across, trees.zeros(TREE), mesh)
            for _ in range(9):
                params, state, _ = step(params, state, grads)
            chex.assert_trees_all_close(params, want[0], atol=1e-6)
            chex.assert_trees_all_close(state.worker.value, want[1].worker.value, atol=1e-5)
            assert gcj.held(state).shape == (2,)
