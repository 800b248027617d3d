"""Between slices: training by train_step, and a state that outlives its slices and chips."""

import copy
import functools
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gradcomp_jax as gc
from gradcomp_jax.sharding import is_per_worker
from gradcomp_jax.testing import trees
from tests import problem, slices
from tests.test_state import loss_of_gradients

# A matrix; one whose shards would not shrink among four chips, though they do among two; less than a number a chip.
TREE = {"matrix": (64, 24), "small": (5, 5), "bias": (3,), "gain": ()}
ROWS = 24
GRADS = trees.noise(TREE, 1, (ROWS,))
MEANS = jax.tree.map(lambda x: x.mean(0), GRADS)
CYCLE = {"train_steps": 3, "compress_steps": 4, "error_feedback": True, "compress": lambda path, leaf: leaf.ndim > 1}


def trained(tx, mesh, steps, params=None, state=None, **kwargs):
    """Parameters and state after some steps on gradients that are the batch."""
    params = trees.zeros(TREE) if params is None else gc.place(jax.device_get(params), mesh)
    state = gc.init(tx, params, mesh) if state is None else state
    step = gc.train_step(loss_of_gradients, tx, mesh, **kwargs)
    for _ in range(steps):
        params, state, _ = step(params, state, GRADS)
    return params, state


def owed(state):
    """What the codec's residuals owe each leaf, on average over the slices."""
    residual = jax.tree.map(lambda x: np.asarray(x)[None], slices.codec_state(state).residual)
    return {path: x[0].mean(0) for path, x in slices.joined(residual, TREE).value.items()}


def assert_nothing_lost(params, state, steps):
    """What was applied, by steps of the gradient itself, and is owed, is all that was given."""
    pending = owed(state)
    for path, x in params.items():
        np.testing.assert_allclose(pending.get(path, 0) - x, steps * MEANS[path], atol=1e-5 * steps, err_msg=path)


class TestTraining:
    @pytest.mark.parametrize(
        ("mesh", "slow", "fast"),
        [
            ({"local": 4, "node": 2}, "node", "local"),
            ({"pod": 2, "node": 2, "local": 2}, ("pod", "node"), "local"),
            ({"node": 2, "a": 2, "b": 2}, "node", ("a", "b")),
            ({"node": 3, "local": 2}, "node", "local"),
            ({"node": 1, "local": 4}, "node", "local"),
            ({"node": 4, "local": 1}, "node", "local"),
        ],
        ids=lambda x: "x".join(map(str, x.values())) if isinstance(x, dict) else str(x),
    )
    def test_meshes(self, mesh, slow, fast):
        tx = optax.chain(gc.across(gc.topk(0.1), slow, fast), optax.sgd(1.0))
        assert_nothing_lost(*trained(tx, gc.make_mesh(mesh), 3), 3)

    @pytest.mark.parametrize("kwargs", [{"donate": True}, {"check_vma": False}], ids=str)
    def test_ways_to_make_the_step(self, kwargs):
        tx = optax.chain(gc.across(gc.topk(0.1)), optax.sgd(1.0))
        got, want = (trained(tx, slices.mesh_of(), 3, **more) for more in (kwargs, {}))
        chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))

    def test_what_is_not_finite_on_one_chip_leaves_all_as_it_was(self):
        tx = optax.chain(gc.across(gc.powersgd(2)), optax.sgd(1.0, momentum=0.9))
        params, state = trained(tx, slices.mesh_of(), 1)
        batch = {**GRADS, "bias": np.array(GRADS["bias"])}
        batch["bias"][-1, 0] = np.nan  # of the last chip
        after, kept, _ = gc.train_step(loss_of_gradients, tx, slices.mesh_of())(params, state, batch)
        chex.assert_trees_all_equal(after, params)
        counts = {"wire": None, "skipped": None}
        chex.assert_trees_all_equal((kept[0]._replace(**counts), kept[1]), (state[0]._replace(**counts), state[1]))
        assert gc.skipped(kept) == 1

    def test_momentum_after_error_feedback(self):
        tx = optax.chain(gc.across(gc.powersgd(2)), gc.ef_momentum(0.0), optax.scale_by_learning_rate(0.5))
        assert_nothing_lost(*trained(tx, slices.mesh_of(), 2), 2)

    def test_delayed(self):
        tx = optax.chain(gc.delayed(gc.across(gc.topk(0.1))), optax.sgd(1.0))
        assert_nothing_lost(*trained(tx, slices.mesh_of(), 4), 3)
        flushed, _ = gc.flush(tx, *trained(tx, slices.mesh_of(), 4), slices.mesh_of())
        chex.assert_trees_all_close(flushed, jax.tree.map(lambda x: -4 * x, MEANS), atol=1e-4)

    def test_model_state_and_auxiliary_outputs(self):
        def loss_fn(params, seen, batch):
            loss = problem.loss_fn(params, batch)
            return loss, ({"n": seen["n"] + 1, "x": jnp.mean(batch["x"])}, {"loss": loss, "rows": jnp.int32(4)})

        tx, (batch,) = problem.optimizer(gc.across(gc.qsgd(min_size=0))), problem.batches(1)
        step = gc.train_step(loss_fn, tx, slices.mesh_of(), has_state=True, has_aux=True)
        seen, state = {"n": jnp.int32(0), "x": jnp.float32(0)}, gc.init(tx, problem.params(), slices.mesh_of())
        _, _, seen, loss, aux = step(problem.params(), state, seen, batch)
        np.testing.assert_allclose(loss, problem.loss_fn(problem.params(), batch), rtol=1e-6)
        np.testing.assert_allclose(seen["x"], batch["x"].mean(), atol=1e-7)
        assert (seen["n"], aux["rows"], aux["loss"]) == (1, 32, loss)

    def test_narrow_gradients_and_dense_leaves(self):
        """What is rounded to bfloat16 is owed too; dense leaves are as near as float16 and that have them."""
        tx = optax.chain(gc.across(gc.powersgd(2, dense_dtype="float16", min_size=100)), optax.sgd(1.0))
        params = trees.zeros(TREE, jnp.bfloat16)
        step, state = gc.train_step(loss_of_gradients, tx, slices.mesh_of()), gc.init(tx, params, slices.mesh_of())
        # Each chip's is one number for the gradient, which bfloat16 has exactly.
        grads = jax.tree.map(lambda x: np.repeat(x[::3].astype(jnp.bfloat16), 3, axis=0), GRADS)
        params, state, _ = step(params, state, grads)
        pending = owed(state)
        assert pending.keys() == {"matrix"}
        for path, x in jax.tree.map(lambda x: x.astype(np.float32), jax.device_get(params)).items():
            given = grads[path].astype(np.float32).mean(0)
            np.testing.assert_allclose(pending.get(path, 0) - x, given, atol=1e-6 if path in pending else 5e-3)

    def test_rules_are_asked_about_whole_leaves(self):
        asked = set()
        choice = lambda path, leaf: asked.add((path, leaf.shape)) or leaf.ndim > 1  # noqa: E731
        tx = gc.across(gc.topk(0.1, compress=choice, min_size=64 * 24))
        state = gc.init(tx, trees.zeros(TREE), slices.mesh_of())
        assert asked == set(TREE.items())
        assert state.residual.value.keys() == {"matrix"}


CODECS = {
    "topk": gc.topk(0.1),
    "powersgd": gc.powersgd(2),
    "ef21": gc.powersgd(2, error_feedback=gc.EF21()),
    "gradiveq": gc.gradiveq(16, ratio=8, **CYCLE),
    "gradiveq-reuse": gc.gradiveq(16, ratio=8, reuse=5, **CYCLE),
    "accordion": gc.accordion(gc.powersgd(2), gc.powersgd(1), interval=2, window=1),
    "onebit": gc.onebit(aggregate="shuffle", second_residual=True),
    "elias": gc.qsgd(norm="l2", code="elias", min_size=0),
}
every_codec = pytest.mark.parametrize("id", CODECS)


def optimizer(id):
    return optax.chain(gc.across(CODECS[id]), optax.sgd(1.0))


@functools.cache
def state_of(id):
    """After five steps, in which gradiveq is amid its compressed ones."""
    return trained(optimizer(id), slices.mesh_of(), 5)


def wholes(state):
    """All numbers that are of shards, as of whole leaves: of a chip's part all, of the slices' the mean."""
    found = []
    for x in jax.tree.leaves(state, is_leaf=is_per_worker):
        if is_per_worker(x):
            for old, cut in zip(jax.tree.leaves(x), x.shards.cuts, strict=True):
                if jnp.issubdtype(old.dtype, jnp.inexact):
                    mean = np.asarray(old).mean(0) if len(x.leading) == 2 else np.asarray(old)
                    found.append(mean[0] if cut is None else slices.whole(mean, cut))
    return found


class TestResize:
    @every_codec
    def test_what_each_element_owes_and_has_stays(self, id):
        state = state_of(id)[1]
        before = wholes(state)
        for nodes, chips in ((2, 2), (4, 2), (1, 8), (2, 4)):
            state = gc.resize_workers(state, slices.mesh_of(nodes, chips))
            chex.assert_trees_all_equal_structs(state, state_of(id)[1])
            for x, y in zip(wholes(state), before, strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)
        gc.resize_workers(state, slices.mesh_of())

    @pytest.mark.parametrize("id", ["topk", "powersgd", "gradiveq-reuse"])
    def test_training_goes_on_and_nothing_is_lost(self, id):
        """The small matrix, compressed by powersgd among two chips, is dense among four, and sends what it owed."""
        tx, params, state = optimizer(id), None, None
        for nodes, chips in ((4, 2), (2, 4), (2, 2)):
            mesh = slices.mesh_of(nodes, chips)
            state = state if state is None else gc.resize_workers(state, mesh)
            params, state = trained(tx, mesh, 2, params, state)
            if id == "powersgd":
                assert (np.abs(owed(state)["small"]).max() < 1e-6) == (chips == 4)
        assert_nothing_lost(params, state, 6)

    def test_what_is_of_a_number_of_workers_is_refused(self):
        tx, state = optimizer("topk"), state_of("topk")[1]
        for call in (
            lambda: gc.init(tx, trees.zeros(TREE), 8),
            lambda: gc.resize_workers(state, 8),
            lambda: gc.flush(tx, trees.zeros(TREE), state, 8),
            lambda: gc.simulate(loss_of_gradients, tx, 8)(trees.zeros(TREE), state, GRADS),
        ):
            with pytest.raises(ValueError, match=r"=8 is a number of workers, .*across slices.*make_mesh.*train_step"):
                call()

    def test_other_meshes_are_refused(self):
        tx, state = optimizer("topk"), state_of("topk")[1]
        with pytest.raises(ValueError, match=r"no axis 'local', it has \('node',\): .*across\(codec, slow=, fast="):
            gc.init(tx, trees.zeros(TREE), gc.make_mesh({"node": 4}))
        with pytest.raises(ValueError, match=r"of \[\(2, 4\)\] workers along .* has \(4, 2\).*resize_workers"):
            trained(tx, slices.mesh_of(4, 2), 1, state=state)


class TestFlush:
    @pytest.mark.parametrize("id", ["topk", "powersgd", "gradiveq", "onebit"])
    @pytest.mark.parametrize("rate", [None, 0.5])
    def test_all_that_is_owed_is_applied(self, id, rate):
        tx, (params, state) = optimizer(id), state_of(id)
        flushed, after = gc.flush(tx, params, state, slices.mesh_of(), learning_rate=rate)
        for path, x in owed(state).items():
            np.testing.assert_allclose(params[path] - flushed[path], (rate or 1) * x, atol=2e-5)
        assert not any(jnp.any(x != 0) for x in jax.tree.leaves(after[0].residual))
        assert gc.wire_bits(after).total > gc.wire_bits(state).total
        assert gc.wire_bits(after, "inside").total > gc.wire_bits(state, "inside").total


@pytest.mark.parametrize("id", ["topk", "ef21", "gradiveq-reuse", "accordion"])
def test_a_checkpoint_is_restored_on_other_slices(id, tmp_path):
    params, state = state_of(id)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave({"params": params, "opt_state": state}))
    for mesh in (slices.mesh_of(4, 2), slices.mesh_of()):
        like = {"params": params, "opt_state": gc.init(optimizer(id), params, mesh)}
        got = gc.restore(tmp_path, like, mesh)
        chex.assert_trees_all_equal(*jax.device_get((got["opt_state"], gc.resize_workers(state, mesh))))
        lies = jax.tree.map(lambda x: x.sharding, like["opt_state"])
        assert lies == jax.tree.map(lambda x: x.sharding, got["opt_state"])


@every_codec
def test_the_state_as_an_object(id):
    tx, state = optimizer(id), state_of(id)[1]
    host = jax.device_get(state)
    copies = [pickle.loads(pickle.dumps(host)), copy.deepcopy(host)]
    copies.append(flax.serialization.from_state_dict(host, flax.serialization.to_state_dict(host)))
    copies.append(flax.serialization.from_bytes(host, flax.serialization.to_bytes(host)))
    for other in copies:
        chex.assert_trees_all_equal(other, host)
        assert jax.tree.structure(other) == jax.tree.structure(host)
    doubled = optax.tree_map_params(tx, lambda x: 2 * x, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(doubled, state)
    assert (gc.skipped(state), gc.wire_bits(state).last > 0, gc.wire_bits(state, "inside").last > 0) == (0, True, True)
    with pytest.raises(ValueError, match="link='outside' must be 'between' or 'inside'"):
        gc.wire_bits(state, "outside")


REFUSED = {
    "no codec": (lambda: gc.across(optax.sgd(0.1)), r"codec=.* must be a codec, as in across\(qsgd\(4\)"),
    "uncalled": (lambda: gc.across(gc.qsgd), r"codec=.* must be a codec"),
    "another axis": (lambda: gc.across(gc.topk(axis_name="x")), "axis_name='x' of the codec must be slow='node'"),
    "one axis": (lambda: gc.across(gc.topk(), slow=("x", "y"), fast="x"), "must be different axes"),
    "no name": (lambda: gc.across(gc.topk(), fast=None), "fast=None must be the name of a mesh axis"),
    "no names": (lambda: gc.across(gc.topk(), slow=()), r"slow=\(\) must be the name of a mesh axis"),
    "inside": (lambda: gc.across(gc.topk(), inside=3), "inside=3 must be True, False, or a function of 2 arguments"),
    "twice": (lambda: gc.across(gc.across(gc.topk())), "codec is across 'local' already"),
    "quantizer": (
        lambda: gc.powersgd(2, axis_name="node", quantizer=gc.across(gc.qsgd())),
        r"quantizer of codec 'powersgd' is across slices: .* across\(powersgd",
    ),
    "one of two": (
        lambda: gc.accordion(gc.across(gc.powersgd(2)), gc.powersgd(1, axis_name="node"), interval=2),
        "low has fast='local', high has fast=None",
    ),
}


@pytest.mark.parametrize("id", REFUSED)
def test_what_is_not_across_slices_is_refused(id):
    call, words = REFUSED[id]
    with pytest.raises(ValueError, match=words):
        call()


def test_codecs_of_codecs_may_be_given_those_across_slices():
    low, high = gc.powersgd(2), gc.powersgd(1)
    around = gc.accordion(gc.across(low), gc.across(high), interval=2)
    assert around == gc.across(gc.accordion(low, high, interval=2))
    assert gc.transformed(gc.across(gc.topk(0.1)), "dct") == gc.across(gc.transformed(gc.topk(0.1), "dct"))
    assert pickle.loads(pickle.dumps(around)) == around
