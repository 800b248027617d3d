"""Parameters that lie in shards over the chips of a slice: `across(codec, inside=...)` on their gradients."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.testing import trees
from tests.test_refusals import refuses

CHIPS = 4
AXES = ("node", "local")
# "b" does not divide among the chips, and stays whole.
SHAPES = {"w0": (32, 48), "w1": (48, 16), "w2": (16, 8), "b": (6,)}
SPECS = {path: P() if path == "b" else P("local") for path in SHAPES}
pytestmark = pytest.mark.usefixtures("promoting")
CODECS = {
    "none": gc.none(),
    "topk": gc.topk(0.1),
    "qsgd": gc.qsgd(4, bucket_size=32, min_size=0),
    "signnorm": gc.signnorm(),
    "randomk": gc.randomk(0.2),
    "powersgd": gc.powersgd(2),
}
# Cut along other axes than the first; the layers of a scan, a matrix by its columns, and a kernel by its inputs.
LAID = {"layers": (3, 32, 64), "columns": (64, 32), "kernel": (3, 3, 16, 32), "b": (6,)}
LIES = {"layers": P(None, "local"), "columns": P(None, "local"), "kernel": P(None, None, "local"), "b": P()}


def stacked(path, leaf):
    return path == "layers"


def matrices(path, leaf):
    return leaf.ndim > 1


KEEPING = {
    "topk": gc.topk(0.1),
    "signnorm": gc.signnorm(),
    "onebit": gc.onebit(second_residual=True),  # which two of three leaves have no use for
    "adaptive": gc.adaptive(8),
    "powersgd": gc.powersgd(2, stacked=stacked),
    "accordion": gc.accordion(gc.powersgd(4, stacked=stacked), gc.powersgd(1, stacked=stacked), interval=2),
    "gradiveq": gc.gradiveq(
        k=32,
        ratio=4,
        train_steps=9,
        compress_steps=4,
        warmup_steps=1,
        error_feedback=True,
        compress=matrices,
    ),
}


@pytest.fixture
def promoting():
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        yield


def comes_whole(path, leaf):
    return path == "b"


def model(params, x):
    hidden = jnp.tanh(jnp.tanh(x @ params["w0"]) @ params["w1"])
    return jnp.mean((hidden @ params["w2"] + jnp.pad(params["b"], (0, 2))) ** 2)


def loss_of_shards(params, x):
    """Gathers each weight; divided, so that the chips' losses add up to the slice's."""
    whole = {k: v if k == "b" else lax.all_gather(v, "local", tiled=True) for k, v in params.items()}
    return model(whole, x) / CHIPS


@functools.cache
def mesh():
    return gc.make_mesh({"node": 2, "local": CHIPS})


def placed():
    params = jax.tree.map(lambda x: 0.2 * x, trees.noise(SHAPES, 0))
    return params, {path: jax.device_put(x, NamedSharding(mesh(), SPECS[path])) for path, x in params.items()}


def batches(count):
    return [jnp.asarray(trees.noise({"x": (64, 32)}, 10 + i)["x"]) for i in range(count)]


@functools.cache
def step_of(name, check_vma=True, inside="specs"):
    """A step on shards, and its optimiser."""
    inside = {"specs": SPECS, "predicate": comes_whole}[inside]
    tx = optax.chain(gc.across(CODECS[name], inside=inside), optax.adam(1e-2))
    specs = gc.state_specs(tx, placed()[0], SPECS)

    def worker(params, state, batch):
        state = gc.local_state(state)
        grads = jax.grad(loss_of_shards)(gc.vary(params, AXES), batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), gc.global_state(state)

    sharded = jax.shard_map(
        worker, mesh=mesh(), in_specs=(SPECS, specs, P(AXES)), out_specs=(SPECS, specs), check_vma=check_vma
    )
    return jax.jit(sharded), tx


def trained(name, steps, check_vma=True, inside="specs"):
    step, tx = step_of(name, check_vma, inside)
    params, shards = placed()
    state = gc.init(tx, params, mesh(), SPECS)
    for batch in batches(steps):
        shards, state = step(shards, state, batch)
    return jax.device_get(shards), state


@pytest.mark.parametrize("name", CODECS)
def test_gives_what_whole_gradients_give(name):
    """To the bit, draws too: what is cut along the first axis are the rows by which a whole matrix is cut."""
    params, sums = placed()[0], []
    for inside, lies in ((SPECS, SPECS), (True, {path: P() for path in SPECS})):
        tx = gc.across(CODECS[name], inside=inside)
        specs = gc.state_specs(tx, params, lies if inside is not True else None)

        def worker(grads, state, tx=tx, whole=inside is True):
            # Whole ones have a mean over the chips, others a sum, of which b is the only one that is yet to be taken.
            part = {path: x[0] / (CHIPS if path == "b" and not whole else 1) for path, x in grads.items()}
            means, state = tx.update(gc.vary(part, AXES), gc.local_state(state))
            return means, gc.global_state(state)

        by_slice = {path: P("node", *spec) for path, spec in lies.items()}
        step = jax.jit(jax.shard_map(worker, mesh=mesh(), in_specs=(by_slice, specs), out_specs=(lies, specs)))
        state, applied = gc.init(tx, params, mesh(), lies if inside is not True else None), []
        for i in range(3):
            grads = trees.noise({path: (2, *shape) for path, shape in SHAPES.items()}, 30 + i)
            mean, state = step(grads, state)
            applied.append(jax.device_get(mean))
        sums.append((applied, jax.device_get(state.residual.value), gc.wire_bits(state)))
    if name == "powersgd":
        chex.assert_trees_all_close(*sums, atol=1e-5, rtol=0)
    else:
        chex.assert_trees_all_equal(*sums)


# Of qsgd a number at the edge between two levels may fall to the other one for its last bit.
@pytest.mark.parametrize("name", [name for name in CODECS if name != "qsgd"])
def test_trains_as_whole_parameters_do(name):
    """20 steps of Adam; the moments lie in shards too."""
    got, state = trained(name, 20)
    tx = optax.chain(gc.across(CODECS[name]), optax.adam(1e-2))
    step, params = gc.train_step(model, tx, mesh()), placed()[0]
    expected = gc.init(tx, params, mesh())
    for batch in batches(20):
        params, expected, _ = step(params, expected, batch)
    for path in SHAPES:
        np.testing.assert_allclose(got[path], params[path], atol=5e-6, rtol=0)
    assert state[1][0].mu["w0"].sharding.spec == P("local")
    # The loss, which rides with train_step, is a float beside it.
    assert 0 < gc.wire_bits(expected).last - gc.wire_bits(state).last <= 64


@pytest.mark.parametrize("name", CODECS)
def test_types_do_not_matter(name):
    typed, untyped = (jax.tree.leaves(trained(name, 3, check)) for check in (True, False))
    chex.assert_trees_all_equal(typed, untyped)


def test_a_predicate_says_what_specs_say():
    chex.assert_trees_all_equal(trained("powersgd", 3), trained("powersgd", 3, inside="predicate"))


@pytest.mark.parametrize("name", ["signnorm", "qsgd", "powersgd"])
def test_between_slices_go_payloads_of_shards_alone(name):
    step, tx = step_of(name)
    state = gc.init(tx, placed()[0], mesh(), SPECS)
    sent = gc.collective_bytes(step.lower(placed()[1], state, batches(1)[0]).compile())
    between = [x for x in sent if any(len({device // CHIPS for device in group}) > 1 for group in x.groups)]
    assert {len(x.groups) for x in between} == {CHIPS}
    _, state = step(placed()[1], state, batches(1)[0])
    assert sum(x.ring_bytes for x in between) * 8 == gc.wire_bits(state).last
    assert gc.wire_bits(state).last < 32 * sum(int(np.prod(shape)) for shape in SHAPES.values()) / CHIPS / 2


def test_nothing_is_gathered_but_weights():
    """Between the slices only the shard's payload goes; inside, what the loss gathers, and leaves that are whole."""
    step, tx = step_of("signnorm")
    params, shards = placed()
    text = step.lower(shards, gc.init(tx, params, mesh(), SPECS), batches(1)[0]).compile().as_text()
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    sizes = sorted(int(np.prod([int(x) for x in dims.split(",")])) for kind, dims in gathered if kind == "f32")
    weights = sorted(int(np.prod(SHAPES[path])) for path in SHAPES if path != "b")
    assert [size for size in sizes if size > 8] == weights


def test_one_shard_that_is_not_finite_skips_all():
    step, tx = step_of("powersgd")
    params, shards = placed()
    state = gc.init(tx, params, mesh(), SPECS)
    shards, state = step(shards, state, batches(1)[0])
    bad = np.asarray(batches(1)[0]).copy()
    bad[0, 0] = np.nan
    after, skipped = step(shards, state, jnp.asarray(bad))
    assert gc.skipped(skipped) == 1
    residual = lambda state: state[0].residual.value["w0"]  # noqa: E731
    np.testing.assert_array_equal(residual(skipped), residual(state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(after)))


def flushed(tx, params, state, mesh, lies):
    """What is owed, and the state without."""
    specs = gc.state_specs(tx, params, lies)

    def worker(params, state):
        zeros = gc.vary(jax.tree.map(jnp.zeros_like, params), AXES)
        updates, state = tx.update(zeros, gc.local_state(state), flush=True)
        return updates, gc.global_state(state)

    return jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(lies, specs), out_specs=(lies, specs)))(params, state)


def test_what_is_owed_is_applied_by_an_update_of_zeros():
    _, state = trained("topk", 3)
    tx = gc.across(CODECS["topk"], inside=SPECS)
    owed = jax.device_get(state[0].residual.value["w0"])
    updates, after = flushed(tx, placed()[0], state[0], mesh(), SPECS)
    np.testing.assert_allclose(updates["w0"], owed.mean(0).reshape(SHAPES["w0"]), atol=1e-6)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(after.residual))


@pytest.mark.parametrize("inside", [SPECS, comes_whole, False], ids=["specs", "predicate", "types"])
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clips_by_the_norm_of_the_whole_tree(max_norm, inside):
    params, shards = placed()
    clip = gc.clip_by_global_norm(max_norm, "local", inside=inside)
    worker = lambda x: clip.update(x, optax.EmptyState())[0]  # noqa: E731
    got = jax.jit(jax.shard_map(worker, mesh=mesh(), in_specs=(SPECS,), out_specs=SPECS))(shards)
    expected, _ = optax.clip_by_global_norm(max_norm).update(params, optax.EmptyState())
    for path in SHAPES:
        np.testing.assert_allclose(got[path], expected[path], rtol=1e-6)


def gradients(steps):
    """By slice, [slices, ...]."""
    return [trees.noise({path: (2, *shape) for path, shape in LAID.items()}, 20 + i) for i in range(steps)]


@functools.cache
def exchanged(name, steps):
    """The means of some steps and the state after them, where leaves are cut along other axes than the first."""
    params = jax.tree.map(lambda shape: np.zeros(shape, np.float32), LAID, is_leaf=lambda x: isinstance(x, tuple))
    tx = gc.across(KEEPING[name], inside=LIES)
    specs = gc.state_specs(tx, params, LIES)
    by_slice = {path: P("node", *spec) for path, spec in LIES.items()}

    def worker(grads, state):
        # Of the whole leaf each chip has a part of the sum, as its own.
        parts = {path: gc.vary(x[0], AXES) / (CHIPS if path == "b" else 1) for path, x in grads.items()}
        means, state = tx.update(parts, gc.local_state(state))
        return means, gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh(), in_specs=(by_slice, specs), out_specs=(LIES, specs)))
    state, means = gc.init(tx, params, mesh(), LIES), []
    for grads in gradients(steps):
        mean, state = step(grads, state)
        means.append(jax.device_get(mean))
    return tx, params, means, state


def assert_all_applied(steps, tx, params, means, state, mesh):
    """What was applied and what is owed are the sum of the gradients."""
    rest, after = flushed(tx, params, state, mesh, LIES)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(after.residual))
    for path in LAID:
        applied = sum(mean[path] for mean in means) + np.asarray(rest[path])
        expected = sum(grads[path].mean(0) for grads in gradients(steps))
        np.testing.assert_allclose(applied, expected, atol=2e-5 * steps, rtol=0)


@pytest.mark.parametrize("name", KEEPING)
def test_any_axis_may_be_cut(name):
    """Nothing is lost; of gradiveq's a cycle with a part of its compressed steps."""
    steps = 12 if name == "gradiveq" else 3
    tx, params, means, state = exchanged(name, steps)
    assert gc.wire_bits(state).last < 32 * sum(int(np.prod(shape)) for shape in LAID.values()) / CHIPS
    assert any(np.asarray(x).any() for x in jax.tree.leaves(state.residual))
    assert_all_applied(steps, tx, params, means, state, mesh())


def test_powersgd_has_the_axis_that_is_cut_among_the_rows():
    """As of whole leaves that lie so."""
    turned = lambda tree: tree | {"columns": tree["columns"].T, "kernel": tree["kernel"].transpose(2, 0, 1, 3)}  # noqa: E731
    tx = gc.powersgd(2, stacked=stacked)
    _, params, means, _ = exchanged("powersgd", 3)
    update = jax.jit(jax.vmap(lambda grads, state: tx.update(grads, state), axis_name="data"))
    state = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(turned(params)))
    for grads, mean in zip(gradients(3), means, strict=True):
        expected, state = update(jax.vmap(turned)(grads), state)
        for path, x in turned(mean).items():
            np.testing.assert_allclose(x, expected[path][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("slices", "chips"), [(4, 2), (1, 4)])
@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_other_slices_and_chips_keep_what_each_element_owes(name, slices, chips):
    tx, params, means, state = exchanged(name, 3)
    other = gc.make_mesh({"node": slices, "local": chips})
    state = gc.resize_workers(state, other)
    assert state.residual.value["layers"].shape == (slices, chips, 3, 32 // chips, 64)
    assert_all_applied(3, tx, params, means, state, other)


def test_restored_and_placed_they_lie_as_they_lay(tmp_path):
    params, state = trained("topk", 2)
    shards = {path: jax.device_put(x, NamedSharding(mesh(), SPECS[path])) for path, x in params.items()}
    saved = {"params": shards, "opt_state": state}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(saved))
    like = {"params": placed()[1], "opt_state": gc.init(step_of("topk")[1], placed()[0], mesh(), SPECS)}
    for tree in (gc.restore(tmp_path, like, mesh()), gc.place(saved, mesh())):
        chex.assert_trees_all_equal(tree, saved)
        lie = [x.sharding.spec for x in jax.tree.leaves(tree)]
        assert lie == [x.sharding.spec for x in jax.tree.leaves(saved)]
        assert tree["opt_state"][1][0].mu["w0"].sharding.spec == P("local")


def of_whole(call):
    """A call that takes whole parameters, given a state of shards."""
    tx, params, _, state = exchanged("topk", 3)
    return lambda: call(tx, params, state)


REFUSED = {
    "delayed": (lambda: gc.delayed(gc.across(gc.topk(), inside=LIES)), "their gradients cannot wait"),
    "init": (of_whole(lambda tx, params, _: gc.init(tx, params, mesh())), "give param_specs="),
    "specs": (of_whole(lambda tx, params, _: gc.state_specs(tx, params)), "give param_specs="),
    "flush": (
        of_whole(lambda tx, params, state: gc.flush(tx, params, state, mesh())),
        "flush=True) gives what is owed",
    ),
    "train_step": (
        of_whole(lambda tx, params, state: gc.train_step(model, tx, mesh())(params, state, jnp.ones(8))),
        "this takes whole ones: leave inside= out",
    ),
    "other_axis": (
        of_whole(lambda tx, params, _: gc.init(tx, params, mesh(), LIES | {"columns": P("local")})),
        "parameter 'columns' is cut along axis 0 by param_specs, and cut along axis 1 for the codec",
    ),
    "whole": (
        lambda: gc.init(gc.across(gc.topk(), inside=False), placed()[0], mesh(), SPECS),
        "parameter 'b' is whole by param_specs, and cut along axis 0 for the codec",
    ),
    "summed": (
        lambda: gc.state_specs(gc.across(gc.topk()), placed()[0], SPECS),
        "parameter 'w0' is cut along axis 0 by param_specs, and whole for the codec",
    ),
    "slow": (lambda: gc.across(gc.topk(), inside={"w": P("node", "local")}), "leaf 'w' lies by"),
    "no_spec": (
        lambda: gc.state_specs(gc.across(gc.topk(), inside={"w0": P("local")}), placed()[0], SPECS),
        "inside= has no PartitionSpec for gradient leaf 'b'",
    ),
    "layers": (
        lambda: gc.state_specs(
            gc.across(KEEPING["powersgd"], inside={"layers": P("local")}), {"layers": jnp.ones((4, 8, 8))}
        ),
        "gradient leaf 'layers' is cut along axis 0, which counts its layers",
    ),
}


@pytest.mark.parametrize("id", REFUSED)
def test_refusals(id):
    call, words = REFUSED[id]
    with refuses(words):
        call()


def test_the_experiment():
    """A transformer of which all chips share the weights, two steps."""
    command = [sys.executable, "-m", "experiments.sharded", "--steps=2", "--codecs=none,powersgd", "--layers=1"]
    command += ["--width=24", "--log_every=1", "--batch_size=16"]
    root = pathlib.Path(__file__).parent.parent
    told = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, timeout=300, check=True)
    (none,), (powersgd,) = ([x.split() for x in told.stdout.splitlines() if name in x] for name in ("none", "powersgd"))
    # Both begin at one loss; that of a dense exchange is what a dense exchange sends, but for filling up.
    assert none[3] == powersgd[3]
    assert 0.98 < float(none[-4]) <= 1 < 2 < float(powersgd[-4])
