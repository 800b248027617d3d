"""Parameters that lie in shards over the chips of a slice: `across(codec, inside=...)` on their gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from tests import trees

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
def step_of(name, check_vma=True):
    """A step on shards, its optimiser and the specs of that's state."""
    tx = optax.chain(gc.across(CODECS[name], inside=comes_whole), optax.adam(1e-2))
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


def trained(name, steps, check_vma=True):
    step, tx = step_of(name, check_vma)
    params, shards = placed()
    state = gc.init(tx, params, mesh(), SPECS)
    for batch in batches(steps):
        shards, state = step(shards, state, batch)
    return jax.device_get(shards), state


@pytest.mark.parametrize("name", CODECS)
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


@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_types_do_not_matter(name):
    for typed, untyped in zip(*(jax.tree.leaves(trained(name, 3, check)) for check in (True, False)), strict=True):
        np.testing.assert_array_equal(np.asarray(typed), np.asarray(untyped))


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


def test_what_is_owed_is_applied_by_an_update_of_zeros():
    _, state = trained("topk", 3)
    tx = gc.across(CODECS["topk"], inside=comes_whole)
    specs = gc.state_specs(tx, placed()[0], SPECS)

    def worker(params, state):
        zeros = gc.vary(jax.tree.map(jnp.zeros_like, params), AXES)
        updates, state = tx.update(zeros, gc.local_state(state), flush=True)
        return updates, gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh(), in_specs=(SPECS, specs), out_specs=(SPECS, specs)))
    owed = jax.device_get(state[0].residual.value["w0"])
    updates, after = step(placed()[1], state[0])
    np.testing.assert_allclose(updates["w0"], owed.mean(0).reshape(SHAPES["w0"]), atol=1e-6)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(after.residual))


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clips_by_the_norm_of_the_whole_tree(max_norm):
    params, shards = placed()
    clip = gc.clip_by_global_norm(max_norm, "local", inside=comes_whole)
    worker = lambda x: clip.update(x, optax.EmptyState())[0]  # noqa: E731
    got = jax.jit(jax.shard_map(worker, mesh=mesh(), in_specs=(SPECS,), out_specs=SPECS))(shards)
    expected, _ = optax.clip_by_global_norm(max_norm).update(params, optax.EmptyState())
    for path in SHAPES:
        np.testing.assert_allclose(got[path], expected[path], rtol=1e-6)


def test_other_numbers_of_slices_keep_what_is_owed():
    _, state = trained("topk", 3)
    fewer = gc.resize_workers(state, gc.make_mesh({"node": 1, "local": CHIPS}))
    old, new = (jax.device_get(s[0].residual.value["w0"]) for s in (state, fewer))
    np.testing.assert_allclose(new[0], old.mean(0), atol=1e-7)
