"""data_parallel: a step written for one device, by all workers; and simulate on several devices, by the compiler."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gcj
from gradcomp_jax import varying
from gradcomp_jax.hlo import collective_bytes
from tests import problem
from tests.table import BY_ID
from tests.test_refusals import refuses

N = problem.WORKERS
STEPS = 3
# One of each way to send, and those whose state is of several kinds.
ROWS = ["none", "powersgd-4", "qsgd-4-ef", "onebit-mean", "gradiveq-ef", "accordion-powersgd"]


def of_state(state, batch):
    loss, grads = jax.value_and_grad(problem.loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), loss


def new_state(tx):
    return TrainState.create(apply_fn=problem.predict, params=problem.params(), tx=tx)


@pytest.mark.parametrize("id", ROWS)
def test_a_train_state_trains_as_by_train_step(id):
    tx, mesh = problem.optimizer(BY_ID[id].make()), gcj.make_mesh(N)
    steps = gcj.data_parallel(of_state, mesh=mesh), gcj.train_step(problem.loss_fn, tx, mesh)
    state = other = gcj.place(new_state(tx), mesh)
    for batch in problem.batches(STEPS):
        # From one state, so that the rounding of another program has one step to grow in.
        state, loss = steps[0](other, batch)
        other, expected = steps[1](other, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        chex.assert_trees_all_close(state.params, other.params, atol=1e-6, rtol=0)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, other)
        assert [x.sharding for x in jax.tree.leaves(state)] == [x.sharding for x in jax.tree.leaves(other)]
    assert state.step == STEPS


def apart(tx, loss_fn=problem.loss_fn):
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, "rows": jnp.int32(len(batch["x"]))}

    return step


def test_params_and_state_apart_donated_and_by_keyword():
    tx, mesh = problem.optimizer(gcj.powersgd(2)), gcj.make_mesh(N)
    step = gcj.data_parallel(mesh=mesh, donate=("params", "opt_state"))(apart(tx))
    expected = gcj.train_step(problem.loss_fn, tx, mesh)
    first = problem.params(), gcj.init(tx, problem.params(), mesh)
    (batch,) = problem.batches(1)
    params, _, loss = expected(*first, batch)
    given = gcj.place(first, mesh)
    got, _, metrics = step(given[0], batch=batch, opt_state=given[1])
    chex.assert_trees_all_close(got, params, atol=1e-6, rtol=0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert metrics["rows"] == 8  # the same number on all workers is that number
    assert all(x.is_deleted() for x in jax.tree.leaves((given[0], given[1][0].residual)))


def test_metrics_that_are_not_finite_come_alone():
    def step(params, batch):
        x = batch["x"]
        return {
            "loss": jnp.mean(x),
            "bad": jnp.sum(x) * jnp.nan,
            "inf": jnp.exp(1e4 * jnp.mean(x**2)),
            "n": jnp.sum(x > 0),
        }

    (batch,) = problem.batches(1)
    got = gcj.data_parallel(step, mesh=gcj.make_mesh(N))(problem.params(), batch)
    np.testing.assert_allclose(got["loss"], batch["x"].mean(), rtol=1e-5)
    assert (jnp.isnan(got["bad"]), got["inf"], got["n"]) == (True, jnp.inf, (batch["x"] > 0).sum())


def test_codecs_by_path_that_exchange_one_after_another():
    tx = problem.optimizer(gcj.per_layer({"layer1": gcj.topk(0.1), "": gcj.powersgd(2)}))
    mesh, (batch,) = gcj.make_mesh(N), problem.batches(1)
    state = gcj.place(new_state(tx), mesh)
    got, _ = gcj.data_parallel(of_state, mesh=mesh)(state, batch)
    expected, _ = gcj.train_step(problem.loss_fn, tx, mesh)(state, batch)
    chex.assert_trees_all_close(got.params, expected.params, atol=1e-6, rtol=0)
    # Of several codecs the loss travels in a message of its own.
    poisoned = batch | {"x": batch["x"].at[0].set(jnp.nan)}
    kept, loss = gcj.train_step(problem.loss_fn, tx, mesh)(state, poisoned)
    assert jnp.isnan(loss)
    chex.assert_trees_all_equal(kept.params, state.params)


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
def test_a_key_that_is_not_named_is_warned_of(key):
    step = lambda params, batch, key: jnp.mean(jax.random.normal(key, (3,)))  # noqa: E731
    (batch,) = problem.batches(1)
    with pytest.warns(UserWarning, match="'key' is a random key, and all workers draw the same.*rng='key'"):
        gcj.data_parallel(step, mesh=gcj.make_mesh(N))(problem.params(), batch, key(0))


def test_what_differs_is_averaged_and_summed():
    tx, mesh = problem.optimizer(gcj.none()), gcj.make_mesh(N)

    @gcj.data_parallel(mesh=mesh)
    def step(state, batch):
        state, loss = of_state(state, batch)
        return state, {"loss": loss.astype(jnp.bfloat16), "positive": jnp.sum(batch["y"] > 0), "seen": state.step}

    (batch,) = problem.batches(1)
    _, metrics = step(new_state(tx), batch)
    assert metrics["positive"] == np.sum(batch["y"] > 0)
    assert metrics["seen"] == 1
    np.testing.assert_allclose(metrics["loss"], problem.loss_fn(problem.params(), batch), rtol=1e-2)


def test_between_slices():
    mesh = gcj.make_mesh({"node": 2, "local": 2})
    tx = problem.optimizer(gcj.across(gcj.qsgd(4, min_size=0, error_feedback=True), slow="node", fast="local"))
    step = gcj.data_parallel(of_state, mesh=mesh)
    expected = gcj.train_step(problem.loss_fn, tx, mesh)
    (batch,) = problem.batches(1)
    state, _ = step(new_state(tx), batch)
    other, _ = expected(new_state(tx), batch)
    chex.assert_trees_all_close(state.params, other.params, atol=1e-6, rtol=0)
    assert gcj.wire_bits(state.opt_state, "inside").total < gcj.wire_bits(other.opt_state, "inside").total  # the loss


@pytest.mark.parametrize("make", [gcj.data_parallel, None], ids=["data_parallel", "train_step"])
@jax.numpy_dtype_promotion("standard")  # of optax's adam
def test_a_step_that_is_not_finite_changes_nothing(make):
    tx, mesh = optax.chain(gcj.powersgd(2), optax.adam(1e-3)), gcj.make_mesh(N)
    step = gcj.train_step(problem.loss_fn, tx, mesh) if make is None else make(of_state, mesh=mesh)
    good, bad = problem.batches(2)
    before, _ = step(new_state(tx), good)
    after, _ = step(before, {**bad, "x": bad["x"].at[3, 3].set(jnp.nan)})
    assert gcj.skipped(after.opt_state) == 1
    assert after.step == before.step == 1
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.opt_state[1], before.opt_state[1])
    chex.assert_trees_all_equal(after.opt_state[0].residual, before.opt_state[0].residual)


def test_what_is_alike_goes_by_its_order():
    """In a skipped step a mean of parameters stays itself, and does not become the parameters."""
    tx, mesh = problem.optimizer(gcj.none()), gcj.make_mesh(N)

    @gcj.data_parallel(mesh=mesh)
    def step(run, batch):
        loss, grads = jax.value_and_grad(problem.loss_fn)(run["params"], batch)
        updates, opt_state = tx.update(grads, run["opt_state"], run["params"])
        params = optax.apply_updates(run["params"], updates)
        mean = optax.incremental_update(params, run["mean"], 0.5)
        return {"loss": loss, "run": {"params": params, "mean": mean, "opt_state": opt_state}}

    (batch,) = problem.batches(1)
    zeros = jax.tree.map(jnp.zeros_like, problem.params())
    run = {"params": problem.params(), "mean": zeros, "opt_state": gcj.init(tx, problem.params(), mesh)}
    out = step(run, {**batch, "x": batch["x"].at[0, 0].set(jnp.inf)})
    assert gcj.skipped(out["run"]["opt_state"]) == 1
    chex.assert_trees_all_equal(out["run"]["mean"], zeros)
    chex.assert_trees_all_equal(out["run"]["params"], problem.params())


@pytest.mark.parametrize("nested", [lambda state, loss: {"state": state, "loss": loss}, lambda state, _: state.params])
def test_what_is_passed_on_inside_another_tree_must_be_the_same_too(nested):
    step = gcj.data_parallel(lambda state, batch: nested(*of_state(state, batch)), mesh=gcj.make_mesh(N))
    (batch,) = problem.batches(1)
    with refuses("differs between the workers", "none() or average() first"):
        step(new_state(optax.sgd(0.1)), batch)


def test_each_worker_has_a_key_of_its_own():
    tx, mesh = problem.optimizer(gcj.none()), gcj.make_mesh(N)

    @gcj.data_parallel(mesh=mesh, rng="key")
    def step(state, batch, key):
        state, _ = of_state(state, batch)
        drawn = jax.random.bits(key, (), jnp.uint32)
        return state, jax.lax.all_gather(drawn, "data")

    (batch,) = problem.batches(1)
    for key in (jax.random.key(5), jax.random.PRNGKey(5)):
        _, drawn = step(new_state(tx), batch, key)
        expected = [jax.random.bits(jax.random.fold_in(key, k), (), jnp.uint32) for k in range(N)]
        np.testing.assert_array_equal(drawn, expected)


def test_it_is_lowered_as_a_jitted_function():
    tx, mesh = problem.optimizer(gcj.qsgd(4, min_size=0)), gcj.make_mesh(N)
    step = gcj.data_parallel(apart(tx), mesh=mesh)
    (batch,) = problem.batches(1)
    state = gcj.init(tx, problem.params(), mesh)
    compiled = step.lower(gcj.place(problem.params(), mesh), state, batch).compile()
    sent = sum(x.ring_bytes for x in collective_bytes(compiled))
    _, state, _ = step(problem.params(), state, batch)
    loss = 2 * (N - 1) / N * 4
    assert sent == gcj.wire_bits(state).last / 8 + loss


class TestRefusals:
    mesh = property(lambda self: gcj.make_mesh(N))
    batch = property(lambda self: next(problem.batches(1)))

    @pytest.mark.parametrize(
        ("tx", "leaf"),
        [
            (optax.sgd(0.1), "its output[0].params"),
            (optax.chain(optax.trace(0.9), gcj.none(), optax.sgd(0.1)), "its output[0].opt_state[0].trace"),
            (optax.MultiSteps(optax.chain(gcj.none(), optax.sgd(0.1)), 2), "its output[0].opt_state.acc_grads"),
        ],
        ids=["none", "before", "around"],
    )
    @jax.numpy_dtype_promotion("standard")  # of optax's MultiSteps
    def test_what_differs_and_is_passed_on(self, tx, leaf):
        with refuses(leaf, "differs between the workers along ('data',)", "none() or average() first"):
            gcj.data_parallel(of_state, mesh=self.mesh)(new_state(tx), self.batch)

    def test_a_single_output(self):
        with refuses("its output['layer1']['bias'] differs"):
            gcj.data_parallel(lambda params, batch: jax.grad(problem.loss_fn)(params, batch), mesh=self.mesh)(
                problem.params(), self.batch
            )

    def test_a_branch_that_not_all_workers_take(self):
        def step(params, batch):
            mean = lambda: jax.lax.pmean(params, "data")  # noqa: E731
            return jax.lax.cond(batch["x"][0, 0] > 0, mean, lambda: params)

        with refuses("branch or loop that some workers may take"):
            gcj.data_parallel(step, mesh=self.mesh)(problem.params(), self.batch)

    def test_a_state_in_its_local_form(self):
        tx = problem.optimizer(gcj.powersgd(2))
        with refuses("init(tx, params, mesh)"):
            gcj.data_parallel(apart(tx), mesh=self.mesh)(problem.params(), tx.init(problem.params()), self.batch)

    @pytest.mark.parametrize("setting", ["batch", "rng", "donate"])
    def test_an_argument_that_is_not_there(self, setting):
        with refuses(f"{setting}='rows' is no argument of the step, which has state, batch"):
            gcj.data_parallel(of_state, **{setting: "rows"})

    def test_no_batch(self):
        with refuses("names no argument"):
            gcj.data_parallel(of_state, batch=())

    def test_no_function(self):
        with refuses("step=3 must be a function"):
            gcj.data_parallel(3)

    def test_a_batch_that_does_not_divide(self):
        batch = {name: x[:30] for name, x in self.batch.items()}
        with refuses("['x']", "does not divide among the mesh's 4 workers"):
            gcj.data_parallel(of_state, mesh=self.mesh)(new_state(problem.optimizer(gcj.none())), batch)

    @pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["new", "old"])
    def test_a_key_that_is_passed_on(self, key):
        step = gcj.data_parallel(
            lambda params, batch, key: (params, jax.random.split(key)[0]), rng="key", mesh=self.mesh
        )
        with refuses("its output[1] a random key that differs by worker", "outside of the step"):
            step(problem.params(), self.batch, key)

    def test_no_key(self):
        step = gcj.data_parallel(lambda params, batch, key: params, rng="key", mesh=self.mesh)
        with refuses("argument 'key' is an array of shape () and type int32, it must be one random key"):
            step(problem.params(), self.batch, 3)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, same: x + same, {"data"}),
        (lambda x, same: jax.lax.psum(x, "data") + same, set()),
        (lambda x, same: jax.lax.psum((x, same), "data")[1], set()),
        (lambda x, same: jax.lax.all_gather(same, "data"), set()),
        (lambda x, same: jax.lax.psum_scatter(jax.lax.all_gather(x, "data"), "data"), {"data"}),
        (lambda x, same: same + jax.lax.axis_index("data").astype(same.dtype), {"data"}),
        (lambda x, same: jax.jit(jnp.sin)(jax.lax.pmax(x, "data")), set()),
        (lambda x, same: jax.checkpoint(jnp.sin)(x), {"data"}),
        (lambda x, same: jax.lax.cond(same[0] > 0, jnp.sin, jnp.cos, same), set()),
        (lambda x, same: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, same), {"data"}),
        (lambda x, same: jax.lax.fori_loop(0, 3, lambda _, c: c + 1, same), set()),
        (lambda x, same: jax.lax.while_loop(lambda c: c[0] < x[0], lambda c: c + 1, same), {"data"}),
        (lambda x, same: jax.lax.scan(lambda c, _: ((c[1], x), None), (same, same), None, length=3)[0][0], {"data"}),
        (lambda x, same: jax.nn.relu(jax.lax.pmean(x, "data")), set()),
        (lambda x, same: jax.lax.optimization_barrier((x, same))[1], set()),
    ],
)
def test_what_differs_between_workers_is_found(function, expected):
    found = []

    def worker(x, same):
        closed = jax.make_jaxpr(function)(x, same)
        found.append(varying.outputs(closed, [frozenset({"data"}), frozenset()]))
        return x

    on_mesh = jax.shard_map(
        worker, mesh=gcj.make_mesh(N), in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False
    )
    jax.eval_shape(on_mesh, jnp.ones(2 * N), jnp.ones(2))
    assert found == [[frozenset(expected)]]


def sharded(tx, n=N):
    mesh = gcj.make_mesh(n)
    (batch,) = problem.batches(1)
    return gcj.place((problem.params(), gcj.init(tx, problem.params(), n)), mesh), gcj.shard_batch(batch, mesh), mesh


def kinds(step, *args):
    return ((x.kind, x.dtype, x.ring_bytes) for x in collective_bytes(step.lower(*args).compile()))


@pytest.mark.parametrize("id", ["none", "powersgd-4", "powersgd-2-ef21", "randomk", "qsgd-shared", "gradiveq-ef"])
def test_simulate_on_several_devices_is_data_parallel_and_sends_what_is_counted(id):
    tx = problem.optimizer(BY_ID[id].make())
    (params, state), batch, mesh = sharded(tx)
    step, typed = gcj.simulate(problem.loss_fn, tx, N), gcj.train_step(problem.loss_fn, tx, mesh)
    got = step(params, state, batch)
    chex.assert_trees_all_close(got[0], typed(params, state, batch)[0], atol=1e-6, rtol=0)
    for x in jax.tree.leaves(got[1][0].residual):
        assert x.sharding.spec[0] == "data"
    sent = sum(x.ring_bytes for x in collective_bytes(step.lower(params, state, batch).compile()) if not x.branch)
    if id == "gradiveq-ef":  # what stands in branches is that of train_step, which laws test, but for the bases
        sends, expected = set(kinds(step, params, state, batch)), set(kinds(typed, params, state, batch))
        assert sends < expected
        assert len(expected - sends) == 1
    else:
        assert sent == gcj.wire_bits(got[1]).last / 8


@pytest.mark.parametrize("id", ["qsgd-4", "topk-shuffle", "powersgd-1-ring", "onebit"])
def test_simulate_on_several_devices_refuses_what_it_would_send_otherwise(id):
    tx = problem.optimizer(BY_ID[id].make())
    (params, state), batch, _ = sharded(tx)
    step = gcj.simulate(problem.loss_fn, tx, N)
    with refuses("lies on several devices", "train_step(loss_fn, tx, mesh)"):
        step(params, state, batch)
    step(params, jax.device_get(state), jax.device_get(batch))  # on one it is the twin of train_step
