"""Ways to aggregate: awkward trees, the choice between two, memory, large counts, nodes."""

import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.compressor import Delivered, compressor_states
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import first_state, map_state, run, sharded
from gradcomp_jax.testing.exchanges import declared
from tests import problem

# Sizes that nothing divides: one column, fewer elements than workers; three types.
AWKWARD = {"column": (71, 1), "kernel": (67, 3), "few": (3,), "conv": (3, 3, 8, 5), "scalar": ()}
TYPES = {"kernel": jnp.bfloat16, "conv": jnp.float16}

# Of each codec the way on which most happens.
CODECS = {
    "onebit": (gc.onebit, "shuffle"),
    "signnorm": (gc.signnorm, "shuffle"),
    "topk": (lambda **kwargs: gc.topk(0.1, **kwargs), "shuffle"),
    "topk-chunks": (lambda **kwargs: gc.topk(chunk=36, k=5, **kwargs), "shuffle"),
    "float4": (lambda **kwargs: gc.float4(32, **kwargs), "shuffle"),
    "adaptive": (lambda **kwargs: gc.adaptive(8, **kwargs), "shuffle"),
    "qsgd": (lambda **kwargs: gc.qsgd(bucket_size=32, min_size=0, **kwargs), "ring"),
    "qsgd-shared": (lambda **kwargs: gc.qsgd(bucket_size=32, min_size=0, shared_scale=True, **kwargs), "psum"),
    "randomk": (lambda **kwargs: gc.randomk(0.1, **kwargs), "psum"),
    "randomblock": (lambda **kwargs: gc.randomblock(0.1, **kwargs), "psum"),
    "powersgd": (lambda **kwargs: gc.powersgd(1, **kwargs), "ring"),
}


def make(name, aggregate):
    return CODECS[name][0](aggregate=aggregate, error_feedback=True)


def awkward(workers, steps):
    grads = trees.noise(AWKWARD, 0, (steps, workers))
    return {path: x.astype(TYPES.get(path, np.float32)) for path, x in grads.items()}


@pytest.mark.parametrize("name", CODECS)
def test_awkward_sizes_and_mixed_types(name):
    """Five workers: all apply the same, in the gradients' types, and nothing is lost."""
    grads = awkward(5, 3)
    got = run(make(name, CODECS[name][1]), grads, "vmap")
    residual = got.states.residual.value
    for path, x in got.updates.items():
        assert x.dtype == grads[path].dtype
        np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1], x.shape))
        owed = residual[path][-1].mean(0) if path in residual else 0
        given = grads[path].astype(np.float64).mean(1).sum(0)
        dense_rounding = 0 if path in residual else 8e-3  # of bfloat16, which dense leaves do not owe
        np.testing.assert_allclose(x[:, 0].astype(np.float64).sum(0) + owed, given, atol=1e-5 + dense_rounding)
    assert residual
    assert all(x.dtype == np.float32 for x in residual.values())


RIDING = {
    "none": gc.none(),
    "powersgd-ring": gc.powersgd(1, aggregate="ring"),
    "powersgd-qsgd": gc.powersgd(1, quantizer=gc.qsgd(8, bucket_size=16)),
    "qsgd-shared": gc.qsgd(bucket_size=32, min_size=0, shared_scale=True),
    "topk-gather": gc.topk(0.5, aggregate="gather"),
    "topk-shuffle": gc.topk(0.1, aggregate="shuffle"),
    "gradiveq": gc.gradiveq(16, train_steps=3, compress=lambda path, leaf: leaf.ndim > 1),
    "accordion-powersgd": gc.accordion(gc.powersgd(4), gc.powersgd(1), interval=2),
    "accordion-topk": gc.accordion(gc.topk(0.3), gc.topk(0.1), interval=2),
    "delayed": gc.delayed(gc.signnorm()),
}


@pytest.mark.parametrize("id", RIDING)
def test_what_rides_beside_arrives_exactly_and_disturbs_nothing(id):
    """Of three workers: sizes that do not divide, float32 or wider; what is not finite stays where it is."""
    tx = RIDING[id]
    grads = trees.noise(trees.SMALL, 1, (3,))
    beside = trees.noise({"loss": (), "norms": (3, 5), "half": (2,), "bad": (2,)}, 2, (3,))
    beside["half"] = beside["half"].astype(jnp.bfloat16)
    beside["bad"][1, 0] = np.nan

    state = first_state(tx, grads)

    def worker(grads, state, beside):
        return tx.update(grads, state), tx.update(grads, state, beside=beside)

    step = jax.vmap(worker, in_axes=(0, map_state(lambda _: 0, lambda _: None, state), 0), axis_name="data")
    (plain, alone), (updates, got) = jax.device_get(jax.jit(step)(grads, state, beside))
    assert isinstance(got, Delivered)
    for path, x in beside.items():
        assert got.beside[path].dtype == np.float32
        mean = np.broadcast_to(x.astype(np.float32).mean(0), x.shape)
        np.testing.assert_allclose(got.beside[path], mean, rtol=1e-6, atol=1e-6)
    (alone,), (state,) = compressor_states(alone), compressor_states(got.state)
    # A ring begins each part of a message at another worker.
    same = functools.partial(chex.assert_trees_all_close, rtol=0, atol=1e-6 if "ring" in id else 0)
    same(updates, plain)
    same(state._replace(wire=()), alone._replace(wire=()))
    assert gc.wire_bits(state).last > gc.wire_bits(alone).last


@pytest.mark.parametrize("name", ["onebit", "signnorm", "topk"])
def test_by_default_what_sends_less(name):
    """By what each declares; of two workers, who send as much either way, "gather"."""
    shapes = {"column": (71, 1), "conv": (3, 3, 8, 5)}
    for workers in (2, 8):
        gathered, shuffled, default = (
            declared(make(name, way), shapes, workers) for way in ("gather", "shuffle", None)
        )
        assert default == (gathered if workers == 2 else shuffled)
        assert (gathered > shuffled) == (workers == 8) or name == "topk"  # whose k is rounded down in each shard


def temporary_bytes(tx, size, workers):
    """What the compiled step needs beside its arguments and results, on each of the workers."""
    grads = {"w": np.zeros((workers, size // 64, 64), np.float32)}
    state = jax.device_get(gc.init(tx, {"w": jnp.zeros((size // 64, 64))}, workers))
    function, mesh, specs = sharded(tx, grads, state, check_vma=True)
    del mesh, specs
    return jax.jit(function).lower(grads, state).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["onebit", "qsgd", "topk-chunks", "float4"])
def test_gather_decodes_one_worker_after_another(name):
    """Memory of eight workers is that of four, and four payloads more, held twice: not four decoded gradients.

    (Of two, XLA may need less, as what is added to the first is not a loop.)
    """
    size, tx = 2**18, make(name, "gather")
    payload = declared(tx, {"w": (size // 64, 64)}, 2) // 8
    four, eight = (temporary_bytes(tx, size, workers) for workers in (4, 8))
    assert eight - four <= 2 * 4 * payload + 4096 < 4 * 4 * size / 3


@pytest.mark.parametrize(
    ("tx", "payload"),
    [
        (gc.signnorm(aggregate="gather"), 2**30 + 32),
        (gc.topk(1 / 64, aggregate="gather"), (32 + 30) * 2**24),
        (gc.qsgd(2, bucket_size=128, aggregate="gather", error_feedback=True), 2**31 + 32 * 2**23),
        (gc.adaptive(32, aggregate="gather", sample=False), 32 * (3 * 2**10 + 1) + 32 * 2**25),
    ],
    ids=lambda x: getattr(getattr(x, "codec", None), "name", ""),
)
def test_bits_beyond_32_are_counted(tx, payload):
    """A leaf of 2^30 elements among 64 workers."""
    assert declared(tx, {"w": (2**20, 2**10)}, 64) == 63 * payload > 2**35


def test_nodes_of_workers_are_as_one_worker_each():
    """Exact inside a node of four, compressed between two nodes; under `delayed` too."""
    mesh, params = gc.make_mesh({"node": 2, "local": 4}), problem.params()

    def trained(step, tx, where, params):
        state = gc.init(tx, params, where)
        for batch in problem.batches(3):
            params, state, _ = step(params, state, batch)
        return jax.device_get(params), gc.wire_bits(state)

    alone, inside = (optax.chain(gc.delayed(gc.signnorm(axis_name=axis)), optax.sgd(0.05)) for axis in ("data", "node"))
    nodes = optax.chain(gc.average("local"), inside)
    on_all = jax.device_put(params, NamedSharding(mesh, P()))
    got = trained(gc.train_step(problem.loss_fn, nodes, mesh), nodes, mesh, on_all)
    expected = trained(gc.simulate(problem.loss_fn, alone, 2), alone, 2, params)
    chex.assert_trees_all_close(got[0], expected[0], atol=1e-5, rtol=0)
    # Two simulated workers send the step's loss along; where a codec is between nodes alone it travels by itself.
    assert got[1] == (expected[1].last - 32, expected[1].total - 3 * 32)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (got[0], params)), strict=True))


def test_the_choice_is_logged(caplog):
    with caplog.at_level(logging.INFO, "gradcomp_jax"):
        declared(gc.signnorm(), {"w": (64, 64)}, 4)
    assert "aggregate='shuffle' among 4 workers: a worker sends 792 bytes by shuffle, 1,548 by gather" in caplog.text
