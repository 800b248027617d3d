"""What train_step and simulate take beside a batch: parts of it, a random key, what all workers share; TrainStates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import gradcomp_jax as gcj
from tests import problem
from tests.table import EACH
from tests.test_refusals import refuses

N = problem.WORKERS
KINDS = ("checked", "unchecked", "simulated")


def made(kind, loss_fn, tx, **kwargs):
    """A step, and where its state lies."""
    if kind == "simulated":
        return gcj.simulate(loss_fn, tx, N, **kwargs), N
    mesh = gcj.make_mesh(N)
    return gcj.train_step(loss_fn, tx, mesh, check_vma=kind == "checked", **kwargs), mesh


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_gradient_of_the_whole(kind):
    tx = problem.optimizer(gcj.powersgd(2))
    step, where = made(kind, problem.loss_fn, tx, accumulate=4)
    whole, _ = made(kind, problem.loss_fn, tx)
    (batch,) = problem.batches(1)
    params, state = problem.params(), gcj.init(tx, problem.params(), where)
    got, expected = step(params, state, batch), whole(params, state, batch)
    chex.assert_trees_all_close(got, expected, atol=2e-6, rtol=1e-5)
    assert gcj.wire_bits(got[1]) == gcj.wire_bits(expected[1])


@pytest.mark.parametrize("row", EACH, ids=lambda row: row.id)
def test_every_codec_exchanges_once_for_all_parts(row):
    tx = problem.optimizer(row.make())
    (batch,) = problem.batches(1)
    params, state = problem.params(), gcj.init(tx, problem.params(), N)
    sent = [gcj.wire_bits(gcj.simulate(problem.loss_fn, tx, N, accumulate=k)(params, state, batch)[1]) for k in (1, 2)]
    assert sent[0] == sent[1]


def with_everything(params, stats, batch, key, shared):
    prediction = problem.predict(params, batch["x"])
    loss = shared["scale"] * jnp.mean((prediction - batch["y"]) ** 2)
    stats = {"mean": 0.5 * stats["mean"] + 0.5 * jnp.mean(batch["x"], 0), "count": stats["count"] + 1}
    drawn = jax.random.bits(key, (), jnp.uint32)
    return loss, (stats, {"loss": loss, "positive": jnp.sum(batch["y"] > 0), "rows": 8 * shared["step"], "key": drawn})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_states_keys_outputs_and_what_is_shared(kind, parts):
    tx = problem.optimizer(gcj.powersgd(2))
    how = {"loss": "mean", "positive": "sum", "rows": "mean", "key": "workers"}
    step, where = made(
        kind, with_everything, tx, accumulate=parts, has_aux=True, has_state=True, rng=True, shared=True, reduce_aux=how
    )
    (batch,) = problem.batches(1)
    stats, key = {"mean": jnp.zeros(64), "count": jnp.int32(0)}, jax.random.key(3)
    shared = {"scale": jnp.float32(2), "step": jnp.int32(5)}
    params = problem.params()
    _, _, stats, loss, aux = step(params, gcj.init(tx, params, where), stats, batch, key, shared)
    np.testing.assert_allclose(loss, 2 * problem.loss_fn(params, batch), rtol=1e-5)
    np.testing.assert_allclose(aux["loss"], loss, rtol=1e-6)
    assert aux["positive"] == np.sum(batch["y"] > 0)
    assert aux["rows"] == 40
    assert stats["count"] == parts
    part = np.reshape(batch["x"], (N, parts, -1, 64)).mean(2)  # a running mean passes from part to part
    mean = sum(part[:, i] * 0.5 ** (parts - i) for i in range(parts)).mean(0)
    np.testing.assert_allclose(stats["mean"], mean, atol=1e-6)
    mine = [jax.random.fold_in(key, k) for k in range(N)]
    keys = [[k] if parts == 1 else [jax.random.fold_in(k, i) for i in range(parts)] for k in mine]
    drawn = [[jax.random.bits(k, (), jnp.uint32) for k in of_worker] for of_worker in keys]
    np.testing.assert_array_equal(np.reshape(aux["key"], (N, parts)), drawn)


def test_half_precision_parts_are_summed_in_float32():
    """In bfloat16 a sum of 64 parts of like size would stop growing."""
    tx = optax.chain(gcj.none(), optax.sgd(1.0))
    params = {"w": jnp.zeros(4, jnp.bfloat16)}
    loss_fn = lambda params, x: jnp.mean(x * params["w"][:1])  # noqa: E731
    x = jnp.full((512, 1), 1.01, jnp.bfloat16)
    params, _, _ = gcj.simulate(loss_fn, tx, 2, accumulate=256)(params, gcj.init(tx, params, 2), x)
    np.testing.assert_allclose(np.float32(params["w"][0]), -1.01, rtol=2**-8)


def test_parts_take_the_memory_of_one():
    wide, rows = 256, 4096
    tx = optax.chain(gcj.powersgd(2), optax.sgd(0.1))
    params = {"w": jnp.ones((wide, wide)), "v": jnp.ones((wide, wide))}
    loss_fn = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2)  # noqa: E731
    x, mesh = jnp.ones((2 * rows, wide)), gcj.make_mesh(2)
    state = gcj.init(tx, params, mesh)
    temporaries = [
        gcj.train_step(loss_fn, tx, mesh, accumulate=k).lower(params, state, x).compile().memory_analysis()
        for k in (1, 16)
    ]
    one, parts = (x.temp_size_in_bytes for x in temporaries)
    activation = 4 * rows * wide
    assert one > 2 * activation
    assert parts < one / 4


@pytest.mark.parametrize("kind", ["checked", "simulated"])
def test_a_train_state_trains_as_its_parts(kind):
    tx = problem.optimizer(gcj.qsgd(4, min_size=0, error_feedback=True))
    step, where = made(kind, problem.loss_fn, tx, donate=True)
    state = TrainState.create(apply_fn=None, params=problem.params(), tx=tx)
    params, opt_state = problem.params(), gcj.init(tx, problem.params(), where)
    for k, batch in enumerate(problem.batches(2)):
        state, loss = step(state, batch)
        params, opt_state, expected = step(params, opt_state, batch)
        chex.assert_trees_all_close((state.params, state.opt_state), (params, opt_state), atol=1e-6)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert state.step == k + 1


def test_a_train_state_beside_a_model_state():
    def loss_fn(params, count, batch):
        return problem.loss_fn(params, batch), count + 1

    tx = problem.optimizer(gcj.none())
    step, _ = made("checked", loss_fn, tx, has_state=True)
    state = TrainState.create(apply_fn=None, params=problem.params(), tx=tx)
    (batch,) = problem.batches(1)
    state, count, _ = step(state, jnp.int32(0), batch)
    assert count == state.step == 1
    assert "stablehlo" in step.lower(state, count, batch).as_text()


class TestPlacedTrainStates:
    def test_fresh_ones_get_the_global_form(self):
        tx, mesh = problem.optimizer(gcj.powersgd(2)), gcj.make_mesh(N)
        state = gcj.place({"state": TrainState.create(apply_fn=None, params=problem.params(), tx=tx)}, mesh)["state"]
        expected = gcj.init(tx, problem.params(), mesh)
        chex.assert_trees_all_equal(state.opt_state, expected)
        for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)

    def test_what_one_worker_owes_each_does(self):
        """So the mean stays: of a state that pmap or vmap trained."""
        tx = problem.optimizer(gcj.powersgd(2))
        state = TrainState.create(apply_fn=None, params=problem.params(), tx=tx)
        owed = jax.tree.map(jnp.ones_like, state.opt_state[0].residual)
        state = state.replace(opt_state=(state.opt_state[0]._replace(residual=owed), *state.opt_state[1:]))
        placed = gcj.place(state, gcj.make_mesh(N))
        for x in jax.tree.leaves(placed.opt_state[0].residual):
            assert x.shape[0] == N
            assert np.all(x == 1)

    def test_across_slices_only_new_ones(self):
        tx, mesh = (
            problem.optimizer(gcj.across(gcj.qsgd(4, min_size=0, error_feedback=True))),
            gcj.make_mesh({"node": 2, "local": 2}),
        )
        state = TrainState.create(apply_fn=None, params=problem.params(), tx=tx)
        chex.assert_trees_all_equal(gcj.place(state, mesh).opt_state, gcj.init(tx, problem.params(), mesh))
        owed = jax.tree.map(jnp.ones_like, state.opt_state[0].residual)
        old = state.replace(opt_state=(state.opt_state[0]._replace(residual=owed), *state.opt_state[1:]))
        with refuses("is one worker's", "state.replace(opt_state=init(tx, params, mesh))"):
            gcj.place(old, mesh)


class TestRefusals:
    tx = problem.optimizer(gcj.none())

    @pytest.mark.parametrize("accumulate", [0, 1.5, True])
    def test_accumulate(self, accumulate):
        with refuses(f"accumulate={accumulate} must be a whole number of at least 1"):
            gcj.simulate(problem.loss_fn, self.tx, N, accumulate=accumulate)

    def test_a_batch_that_does_not_divide_into_parts(self):
        (batch,) = problem.batches(1)
        step = gcj.simulate(problem.loss_fn, self.tx, N, accumulate=3)
        with refuses("does not divide among 4 workers, and their parts among accumulate=3"):
            step(problem.params(), gcj.init(self.tx, problem.params(), N), batch)

    def test_a_loss_without_the_key(self):
        with refuses("must be a function (params, batch, key, shared) -> loss", "rng=True, shared=True"):
            gcj.simulate(problem.loss_fn, self.tx, N, rng=True, shared=True)

    @pytest.mark.parametrize("key", [jax.random.split(jax.random.key(0)), jnp.float32(1)], ids=["two", "number"])
    def test_a_key_that_is_none(self, key):
        (batch,) = problem.batches(1)
        step = gcj.simulate(lambda params, batch, key: problem.loss_fn(params, batch), self.tx, N, rng=True)
        with refuses("the step's key is an array of shape", "one random key"):
            step(problem.params(), gcj.init(self.tx, problem.params(), N), batch, key)

    def test_a_missing_key(self):
        (batch,) = problem.batches(1)
        step = gcj.simulate(lambda params, batch, key: problem.loss_fn(params, batch), self.tx, N, rng=True)
        with refuses("takes (params, opt_state, batch, key)", "got 3 arguments"):
            step(problem.params(), gcj.init(self.tx, problem.params(), N), batch)
