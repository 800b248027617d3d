"""swap: another codec in the middle of a run; what goes on, and what is refused so that nothing is lost."""

import functools
import itertools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gradcomp_jax as gc
from gradcomp_jax.compressor import compressor_states
from gradcomp_jax.testing import trees
from tests import problem, slices
from tests.test_across_state import assert_nothing_lost, trained
from tests.test_refusals import refuses
from tests.test_state import loss_of_gradients

SHAPES = {"a": (64, 24), "b": (64, 16), "bias": (24,)}
GRADS = trees.noise(SHAPES, 0, (8,))
WORKERS = 4


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        yield


def matrices(path, leaf):
    return leaf.ndim > 1


def step_of(tx, where, loss_fn=loss_of_gradients):
    return (gc.simulate if isinstance(where, int) else gc.train_step)(loss_fn, tx, where)


def after_steps(tx, where, steps, params=None, state=None):
    """Parameters and state after some steps on gradients that are the batch."""
    params = trees.zeros(SHAPES) if params is None else params
    state = gc.init(tx, params, where) if state is None else state
    step = step_of(tx, where)
    for _ in range(steps):
        params, state, _ = step(params, state, GRADS)
    return params, state


topk = functools.partial(gc.topk, compress=matrices)
by_path = {"^b$": topk(0.1), "bias": gc.none(), "": gc.powersgd(2)}
PAIRS = {
    "accordion-powersgd": (gc.accordion(gc.powersgd(4), gc.powersgd(1), interval=2), gc.powersgd(2)),
    "lower rank": (gc.powersgd(4), gc.powersgd(2)),
    "higher rank": (gc.powersgd(1), gc.powersgd(3)),
    "topk-powersgd": (topk(0.1), gc.powersgd(2)),
    "powersgd-scheduled": (gc.powersgd(2), gc.scheduled([gc.powersgd(1), gc.powersgd(2)], lambda step: step)),
    "decay": (gc.topk(0.1, error_feedback=gc.Feedback(1.0)), gc.topk(0.3)),
    "two families": (gc.per_layer(by_path), gc.per_layer({"^a$": topk(0.1), "": gc.powersgd(1)})),
    "two families to one": (gc.per_layer(by_path), gc.powersgd(2)),
    "one to two families": (gc.powersgd(2), gc.per_layer(by_path)),
}


class TestNothingIsLost:
    """Law 1 across the swap: what was applied, and is owed, is all that was given."""

    @staticmethod
    def check(old, new, where, late=0):
        params, state = after_steps(old, where, 3)
        bits, skipped = gc.wire_bits(state), gc.skipped(state)
        swapped = gc.swap(old, new, params, state, where)
        chex.assert_trees_all_equal_shapes_and_dtypes(swapped, gc.init(new, params, where))
        assert gc.wire_bits(swapped) == bits
        assert gc.skipped(swapped) == skipped
        assert any(np.any(x) for one in compressor_states(swapped) for x in jax.tree.leaves(one.residual))
        params, state = after_steps(new, where, 3, params, swapped)
        owed = {path: x for one in compressor_states(state) for path, x in one.residual.value.items()}
        for path, x in params.items():
            pending = np.asarray(owed[path]).mean(0) if path in owed else 0
            np.testing.assert_allclose(pending - x, (6 - late) * GRADS[path].mean(0), atol=1e-4, err_msg=path)
        assert gc.wire_bits(state).total > bits.total

    @pytest.mark.parametrize("where", ["simulated", "mesh"])
    @pytest.mark.parametrize("id", PAIRS)
    def test_of_codecs(self, id, where):
        old, new = (optax.chain(codec, optax.sgd(1.0)) for codec in PAIRS[id])
        self.check(old, new, WORKERS if where == "simulated" else gc.make_mesh(WORKERS))

    def test_delayed(self):
        old, new = (optax.chain(gc.delayed(codec), optax.sgd(1.0)) for codec in PAIRS["topk-powersgd"])
        self.check(old, new, WORKERS, late=1)

    @pytest.mark.parametrize("where", ["simulated", "mesh"])
    def test_after_a_flush_what_had_no_place_may_go(self, where):
        where = WORKERS if where == "simulated" else gc.make_mesh(WORKERS)
        old, new = (optax.chain(codec, optax.sgd(1.0)) for codec in (gc.topk(0.1), gc.powersgd(2)))
        params, state = after_steps(old, where, 3)
        with refuses("no place for what is owed of leaves 'bias': it sends them dense. Apply it first, by", "flush("):
            gc.swap(old, new, params, state, where)
        params, state = gc.flush(old, params, state, where)
        params, state = after_steps(new, where, 2, params, gc.swap(old, new, params, state, where))
        owed = {path: np.asarray(x).mean(0) for path, x in state[0].residual.value.items()}
        for path, x in params.items():
            np.testing.assert_allclose(owed.get(path, 0) - x, 5 * GRADS[path].mean(0), atol=1e-4)

    @pytest.mark.parametrize(
        ("old", "new"),
        [(gc.powersgd(2), topk(0.1)), (gc.topk(0.1), gc.powersgd(1)), (gc.onebit(), gc.powersgd(4))],
        ids=["rows", "vectors", "columns"],
    )
    def test_across_slices_where_shards_are_cut_otherwise(self, old, new):
        old, new = (optax.chain(gc.across(codec), optax.sgd(1.0)) for codec in (old, new))
        mesh = slices.mesh_of()
        params, state = trained(old, mesh, 2)
        owed = {key for one in compressor_states(state) for key in one.residual.value}
        fits = owed <= {key for one in compressor_states(gc.init(new, params, mesh)) for key in one.residual.value}
        if not fits:
            params, state = gc.flush(old, params, state, mesh)
        swapped = gc.swap(old, new, params, state, mesh)
        assert [gc.wire_bits(x, "inside") for x in (swapped, state)] == 2 * [gc.wire_bits(state, "inside")]
        assert_nothing_lost(*trained(new, mesh, 2, params, swapped), 4)


class TestWhatGoesOn:
    def setup_method(self):
        self.params = problem.params()

    def swapped(self, old, new, where=WORKERS, rest=None, steps=3):
        """The states before and after a swap in the middle of a training by Adam."""
        old, new = (optax.chain(codec, optax.adam(0.01) if rest is None else rest) for codec in (old, new))
        params, state = self.params, gc.init(old, self.params, where)
        step = step_of(old, where, problem.loss_fn)
        for batch in problem.batches(steps):
            params, state, _ = step(params, state, batch)
        return state, gc.swap(old, new, params, state, where)

    def test_the_rest_of_the_chain_and_residuals_as_they_lie(self):
        before, after = self.swapped(gc.powersgd(4), gc.powersgd(2))
        assert all(a is b for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True))
        for path, x in before[0].residual.value.items():
            assert after[0].residual.value[path] is x
        assert before[1][0].count == 3

    @pytest.mark.parametrize("around", [lambda x: x, gc.delayed, gc.across], ids=["alone", "delayed", "across"])
    def test_common_columns_of_q(self, around):
        """As they are where there are fewer, and up to a power of two where others are drawn."""
        where = slices.mesh_of() if around is gc.across else WORKERS
        before, after = (
            compressor_states(x)[0].codec.q for x in self.swapped(around(gc.powersgd(4)), around(gc.powersgd(2)), where)
        )
        for path, x in before.items():
            np.testing.assert_array_equal(after[path], x[:, :2])
        before, after = (x[0].codec.q for x in self.swapped(gc.powersgd(2), gc.powersgd(4)))
        for path, x in before.items():
            ratio = after[path][:, :2] / x
            assert np.all(ratio == ratio[0, 0, 0])
            assert np.log2(ratio[0, 0, 0]) % 1 == 0
            magnitudes = np.abs(after[path]).max((0, 2))
            assert magnitudes.min() > 0.05
            assert magnitudes.max() < 2

    def test_q_of_accordion_and_of_scheduled(self):
        around = gc.accordion(gc.powersgd(4), gc.powersgd(1), interval=9)
        before, after = self.swapped(around, gc.powersgd(4))
        chex.assert_trees_all_equal(after[0].codec, before[0].codec.codec)
        before, after = self.swapped(gc.powersgd(4), gc.scheduled([gc.powersgd(4), gc.powersgd(1)], lambda step: step))
        chex.assert_trees_all_equal(after[0].codec.codec, before[0].codec)
        assert after[0].codec.step == 0

    def test_a_controller_keeps_its_own_state_where_the_codec_changes(self):
        old, new = (gc.scheduled([gc.powersgd(1), gc.powersgd(r)], lambda step: step) for r in (2, 3))
        before, after = self.swapped(old, new)
        assert after[0].codec.step == before[0].codec.step == 3
        old, new = (gc.accordion(gc.powersgd(r), gc.powersgd(1), interval=2) for r in (2, 3))
        before, after = (x[0].codec for x in self.swapped(old, new))
        chex.assert_trees_all_equal(after._replace(codec=()), before._replace(codec=()))

    def test_state_that_does_not_fit_begins_anew(self):
        cycle = {"train_steps": 5, "compress_steps": 6, "warmup_steps": 1, "compress": matrices}
        old, new = (gc.gradiveq(16, ratio=ratio, **cycle) for ratio in (4, 8))
        before, after = self.swapped(old, new)
        assert (before[0].codec.position, after[0].codec.position) == (2, -1)
        before, after = self.swapped(old, old)
        chex.assert_trees_all_equal(before, after)

    def test_norms_go_on_where_both_are_measured(self):
        plain, measured, new = gc.powersgd(2), gc.measured(gc.powersgd(2)), gc.measured(topk(0.1))
        params, state = after_steps(measured, WORKERS, 2)
        chex.assert_trees_all_equal(gc.swap(measured, new, params, state, WORKERS).norms, state.norms)
        unmeasured = gc.swap(measured, plain, params, state, WORKERS)
        assert isinstance(unmeasured, gc.CompressorState)
        again = gc.swap(plain, new, params, unmeasured, WORKERS)
        assert not any(x.any() for x in again.norms.value.values())
        _, after = after_steps(new, WORKERS, 1, params, again)
        assert gc.metrics(after).error > 0

    def test_estimates_go_on_under_ef21_and_owe_nothing_elsewhere(self, caplog):
        old, new = (gc.powersgd(rank, error_feedback=gc.EF21()) for rank in (4, 2))
        before, after = self.swapped(old, new)
        chex.assert_trees_all_equal(after[0].residual, before[0].residual)
        chex.assert_trees_all_equal(after[0].codec.mean, before[0].codec.mean)
        np.testing.assert_array_equal(
            after[0].codec.codec.q["layer1/kernel"][:, :2], after[0].codec.codec.q["layer1/kernel"]
        )
        with caplog.at_level(logging.INFO, "gradcomp_jax"):
            _, after = self.swapped(old, gc.powersgd(2))
        assert not any(np.any(x) for x in jax.tree.leaves(after[0].residual))
        assert "swap drops EF21's estimates of leaves 'layer1/kernel', 'layer2/kernel'" in caplog.text

    def test_steps_that_were_skipped_and_bits_of_several_codecs_add_up(self):
        params = trees.zeros(SHAPES)
        old, new = (optax.chain(x, optax.sgd(1.0)) for x in PAIRS["two families to one"])
        bad = {**GRADS, "a": np.where(np.arange(8) == 5, np.nan, GRADS["a"].T).T.astype(np.float32)}
        params, state, _ = step_of(old, WORKERS)(params, gc.init(old, params, WORKERS), bad)
        state = gc.swap(old, new, params, state, WORKERS)
        assert gc.skipped(state) == 1
        back = gc.swap(new, old, params, state, WORKERS)
        assert gc.wire_bits(back) == gc.wire_bits(state)
        assert [int(one.skipped) for one in compressor_states(back)] == [1, 0]

    def test_a_checkpoint_after_it(self, tmp_path):
        old, new = (problem.optimizer(codec) for codec in (gc.powersgd(4), gc.powersgd(2)))
        mesh = gc.make_mesh(WORKERS)
        params, state = gc.place(self.params, mesh), gc.init(old, self.params, mesh)
        for batch in problem.batches(2):
            params, state, _ = gc.train_step(problem.loss_fn, old, mesh)(params, state, batch)
        state, step = gc.swap(old, new, params, state, mesh), gc.train_step(problem.loss_fn, new, mesh)
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(2, args=ocp.args.StandardSave({"params": params, "opt_state": state}))
        like = {"params": self.params, "opt_state": gc.init(new, self.params, mesh)}
        got = gc.restore(tmp_path, like, mesh)
        chex.assert_trees_all_equal(*jax.device_get((got["opt_state"], state)))
        ends = [step(one["params"], one["opt_state"], batch) for one in (got, {"params": params, "opt_state": state})]
        chex.assert_trees_all_equal(*jax.device_get(ends))
        assert step._cache_size() == 1  # it lies as a state of init does


class TestRefused:
    """In words that lead on, and before anything is changed."""

    @staticmethod
    def refused(old, new, *words, rest=None, where=WORKERS):
        rests = [optax.sgd(1.0)] * 2 if rest is None else rest
        old, new = (optax.chain(codec, one) for codec, one in zip((old, new), rests, strict=True))
        params, state = after_steps(old, where, 1)
        before = jax.device_get(state)
        with refuses(*words):
            gc.swap(old, new, params, state, where)
        chex.assert_trees_all_equal(before, jax.device_get(state))

    @pytest.mark.parametrize(
        ("new", "words"),
        [
            (gc.none(), "'a', 'b': it keeps no residuals"),
            (gc.powersgd(2, error_feedback=False), "'a', 'b': it keeps no residuals"),
            (gc.powersgd(2, error_feedback=gc.EF21()), "'a', 'b': under EF21 it keeps estimates in their place"),
            (gc.powersgd(2, min_size=1100), "of leaves 'b': it sends them dense"),
            (gc.per_layer({"^b$": gc.none(), "": gc.powersgd(1)}), "of leaves 'b': it sends them dense"),
        ],
        ids=["dense", "no feedback", "ef21", "one leaf", "by pattern"],
    )
    def test_what_is_owed_and_has_no_place(self, new, words):
        self.refused(gc.powersgd(2), new, "new_tx has no place", words, "opt_state = flush(tx, params", "changed")

    def test_another_axis(self):
        mesh = gc.make_mesh({"data": 2, "other": 2})
        old, new = (gc.powersgd(2, axis_name=axis) for axis in (("data", "other"), ("other", "data")))
        self.refused(old, new, "'a', 'b': its codec is on other axes", where=mesh)

    def test_many_leaves(self):
        params = {f"w{i}": jnp.zeros((16, 16)) for i in range(6)}
        old, new, state = gc.powersgd(2), gc.none(), gc.init(gc.powersgd(2), params, 2)
        owed = state.residual._replace(value=jax.tree.map(jnp.ones_like, state.residual.value))
        with refuses("of leaves 'w0', 'w1', 'w2', 'w3' and 2 more: it keeps no residuals"):
            gc.swap(old, new, params, state._replace(residual=owed), 2)

    def test_another_chain(self):
        adam, sgd, momentum = optax.adam(0.1), optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
        words = "tx and new_tx differ beside the codec: state leaf"
        self.refused(gc.topk(), gc.topk(), words, "is of new_tx alone; give both the same chain", rest=(sgd, adam))
        self.refused(gc.topk(), gc.topk(), words, "is of tx alone; give both the same chain", rest=(momentum, sgd))
        narrow = optax.trace(0.9, accumulator_dtype=jnp.bfloat16)
        self.refused(
            gc.topk(), gc.topk(), words, "is float32[64, 24] and bfloat16[64, 24]", rest=(optax.trace(0.9), narrow)
        )
        self.refused(gc.topk(), optax.identity(), words, "is of tx alone")
        clip = optax.chain(optax.clip(1.0), momentum)
        self.refused(gc.topk(), gc.topk(), "differ beside the codec: state leaf", rest=(momentum, clip))

    def test_delayed_in_one_alone(self):
        words = "differ beside the codec", "put both codecs in delayed(...), or neither"
        self.refused(gc.delayed(gc.powersgd(2)), gc.powersgd(2), *words)
        self.refused(gc.powersgd(2), gc.delayed(gc.powersgd(2)), *words)

    def test_across_in_one_alone(self):
        mesh = slices.mesh_of()
        old, new = gc.across(gc.qsgd(min_size=0)), gc.qsgd(min_size=0, axis_name=("node", "local"))
        params = trees.zeros(SHAPES)
        for one, other in itertools.permutations((old, new)):
            with refuses("the codec is across slices in one of tx and new_tx only", "or neither"):
                gc.swap(one, other, params, gc.init(one, params, mesh), mesh)

    def test_a_state_of_another_optimiser_or_of_other_workers(self):
        old, new = (optax.chain(gc.powersgd(rank), optax.sgd(1.0)) for rank in (2, 1))
        params = trees.zeros(SHAPES)
        with refuses("opt_state keeps a residual at [0].residual.value['", "and tx does not"):
            gc.swap(optax.chain(gc.none(), optax.sgd(1.0)), new, params, gc.init(old, params, 2), 2)
        with refuses("opt_state is of [(2,)] workers along 'data'", "has 4", "resize_workers"):
            gc.swap(old, new, params, gc.init(old, params, 2), 4)
        with refuses("opt_state is in its local form"):
            gc.swap(old, new, params, old.init(params), 2)
        with refuses("mesh='data' must be a mesh"):
            gc.swap(old, new, params, gc.init(old, params, 2), "data")
        with refuses("must be an optax transformation"):
            gc.swap(old, 3, params, gc.init(old, params, 2), 2)
