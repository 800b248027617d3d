"""restore: a checkpoint of any number of workers, on any other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import gradcomp_jax as gc
from tests import problem
from tests.test_refusals import refuses

WORKERS = 4


def trained(tx, workers=WORKERS):
    """A state that owes something, and where it lies."""
    mesh = gc.make_mesh(workers)
    params, state = gc.place(problem.params(), mesh), gc.init(tx, problem.params(), mesh)
    (batch,) = problem.batches(1)
    params, state, _ = gc.train_step(problem.loss_fn, tx, mesh)(params, state, batch)
    return {"params": params, "opt_state": state, "step": 1}


@pytest.fixture
def saved(tmp_path):
    tx = problem.optimizer(gc.powersgd(1))
    state = trained(tx)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
    return tmp_path, tx, state


def owed(state):
    return jax.tree.map(lambda x: np.mean(x, axis=0), jax.device_get(state["opt_state"][0].residual))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_it_goes_on_with_what_is_owed_on_any_number_of_workers(saved, workers):
    folder, tx, state = saved
    mesh = gc.make_mesh(workers)
    like = {"params": problem.params(), "opt_state": gc.init(tx, problem.params(), mesh), "step": 0}
    got = gc.restore(folder, like, mesh)
    assert got["step"] == 1
    chex.assert_trees_all_equal(*jax.device_get((got["params"], state["params"])))
    chex.assert_trees_all_close(owed(got), owed(state), atol=1e-7)
    if workers == WORKERS:
        chex.assert_trees_all_equal(*jax.device_get((got["opt_state"], state["opt_state"])))
    (batch,) = problem.batches(1)
    step = gc.train_step(problem.loss_fn, tx, mesh)
    params, opt_state, _ = step(got["params"], got["opt_state"], batch)
    step(params, opt_state, batch)
    assert step._cache_size() == 1 or workers == 1  # what was restored lies where the step leaves it


@pytest.mark.parametrize("workers", [1, 4])
def test_a_train_state_that_was_saved_before_its_first_step(tmp_path, workers):
    tx, mesh = problem.optimizer(gc.powersgd(1)), gc.make_mesh(workers)
    fresh = TrainState.create(apply_fn=None, params=problem.params(), tx=tx)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave({"state": fresh}))
    got = gc.restore(tmp_path, {"state": fresh}, mesh)["state"]
    want = gc.place(fresh, mesh)
    chex.assert_trees_all_equal(*jax.device_get((got, want)))
    lies = lambda state: [x.sharding for x in jax.tree.leaves((state.params, state.opt_state))]  # noqa: E731
    assert lies(got) == lies(want)
    with refuses("opt_state/0/residual/value/layer1/kernel' of the checkpoint", "one worker's, from tx.init"):
        gc.restore(tmp_path, {"state": want}, mesh)
    with refuses("directory={", "must be a path: the order is restore(directory, like)"):
        gc.restore({"state": fresh}, tmp_path, mesh)


def test_for_simulate_and_from_shapes(saved):
    folder, tx, state = saved
    like = jax.eval_shape(lambda p: {"params": p, "opt_state": gc.init(tx, p, 2), "step": 0}, problem.params())
    got = gc.restore(folder, {**like, "step": 0}, 2)
    chex.assert_trees_all_close(owed(got), owed(state), atol=1e-7)
    (batch,) = problem.batches(1)
    gc.simulate(problem.loss_fn, tx, 2)(got["params"], got["opt_state"], batch)


def test_one_item_and_step_of_several(tmp_path):
    tx, mesh = problem.optimizer(gc.topk(0.1)), gc.make_mesh(2)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            arrays = {"opt_state": gc.init(tx, problem.params(), mesh), "n": jnp.int32(step)}
            items = {"state": ocp.args.StandardSave(arrays), "note": ocp.args.JsonSave({"step": step})}
            manager.save(step, args=ocp.args.Composite(**items))
    like = {"opt_state": gc.init(tx, problem.params(), 4), "n": jnp.int32(0)}
    assert gc.restore(tmp_path, like, 4, step=1, item="state")["n"] == 1
    assert gc.restore(tmp_path, like, 4, item="state")["n"] == 2
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
        gc.restore(tmp_path, like, 4, step=3, item="state")
    with pytest.raises(FileNotFoundError, match=r"step 2 .*has no item 'default'"):
        gc.restore(tmp_path, like, 4)


def test_keys_and_numbers_beside_the_arrays(tmp_path):
    tree = {"key": jax.random.key(3), "step": 7, "opt_state": gc.init(gc.topk(0.1), problem.params(), 4)}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))
    like = {"key": jax.random.key(0), "step": 0, "opt_state": gc.init(gc.topk(0.1), problem.params(), 2)}
    got = gc.restore(tmp_path, like, gc.make_mesh(2))
    assert got["step"] == 7
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(tree["key"])).all()


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        gc.restore(tmp_path, problem.params(), 2)
    with pytest.raises(FileNotFoundError, match="no directory"):
        gc.restore(tmp_path / "none", problem.params(), 2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (gc.powersgd(1, error_feedback=False), r"has beside what like has leaf 'opt_state/0/residual.*error_feedback"),
        (gc.powersgd(1, error_feedback=gc.EF21()), "lacks leaf 'opt_state/0/codec/codec"),
        (gc.powersgd(2), r"leaf 'opt_state/0/codec/q/.*has the shape"),
        (gc.topk(0.1), "opt_state/0/codec"),
    ],
    ids=["without feedback", "EF21", "rank", "codec"],
)
def test_what_was_made_by_another_optimiser_is_refused(saved, codec, words):
    folder, _, _ = saved
    tx = problem.optimizer(codec)
    like = {"params": problem.params(), "opt_state": gc.init(tx, problem.params(), 2), "step": 0}
    with pytest.raises(ValueError, match=words):
        gc.restore(folder, like, 2)


def test_other_parameters_are_refused_instead_of_cut(saved):
    folder, tx, _ = saved
    params = problem.params()
    params["layer2"]["bias"] = jnp.zeros(9)
    like = {"params": params, "opt_state": gc.init(tx, params, 2), "step": 0}
    with pytest.raises(
        ValueError, match=r"leaf 'opt_state/1/0/trace/layer2/bias' of the checkpoint has the shape \(8,\)"
    ):
        gc.restore(folder, like, 2)
