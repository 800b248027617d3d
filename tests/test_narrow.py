"""Gradients in 16 and 8 bits: cast, and dense_dtype for what is not compressed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax.codecs import cast as codec_of_cast
from gradcomp_jax.exchange import ways
from gradcomp_jax.exchange.plan import plan
from gradcomp_jax.testing import contexts, trees
from gradcomp_jax.testing.contexts import CONTEXTS, first_state, map_state, run
from gradcomp_jax.testing.exchanges import exchanged
from gradcomp_jax.testing.laws import possible
from tests import problem

# The largest relative error, and down to which part of the largest value it holds.
PRECISION = {"bfloat16": (2**-8, 0), "float16": (2**-11, 2**-28), "float8_e4m3fn": (2**-4, 2**-13)}
PRECISION["float8_e5m2"] = (2**-3, 2**-28)


@pytest.fixture
def sums_in_16_bits(monkeypatch):
    """As where the backend does: what is handed to it is then of 16 bits, which CPUs widen by themselves."""
    for module in (ways, codec_of_cast):
        monkeypatch.setattr(module, "on_cpus", lambda: False)


def bits_of(got):
    """What a worker sent in each step of a run."""
    return [int(pair[0, 1]) for pair in got.states.wire.last]


def rounded(x, dtype):
    return x.astype(dtype).astype(np.float32)


class TestCast:
    @pytest.mark.parametrize("dtype", PRECISION)
    def test_a_leaf_is_rounded_to_the_nearest_whatever_its_scale(self, dtype):
        leaves = {f"{scale}": scale * trees.noise((300,), 0, (2,)) for scale in (1e-25, 1.0, 1e30)}
        got = exchanged(gc.cast(dtype, aggregate="gather"), {"zero": np.zeros((2, 9), np.float32), **leaves})
        error, down_to = PRECISION[dtype]
        for path, x in leaves.items():
            largest = np.abs(x).max(1, keepdims=True)
            allowed = error * np.maximum(np.abs(x), down_to * largest)
            assert (np.abs(got.own[path] - x) <= 1.001 * allowed).all()
            np.testing.assert_allclose(got.mean[path], got.own[path].mean(0), atol=1e-6 * largest.max())
        assert not got.own["zero"].any()

    def test_residuals_are_kept_of_8_bits_only(self):
        for dtype in PRECISION:
            residual = gc.cast(dtype).init(trees.zeros(trees.ONE)).residual.value
            assert bool(residual) == dtype.startswith("float8")

    def test_a_sum_on_cpus_is_one_of_float32(self):
        """bfloat16 rounded, and no sum of it."""
        grads = trees.noise(trees.ONE, 1, (1, 3))
        got = run(gc.cast(aggregate="psum"), grads, "checked")
        np.testing.assert_allclose(
            got.updates["only"][0, 0], rounded(grads["only"][0], jnp.bfloat16).mean(0), atol=1e-6
        )

    @pytest.mark.parametrize("make", [gc.cast, functools.partial(gc.none, dense_dtype="bfloat16")])
    def test_a_sum_in_16_bits(self, make, sums_in_16_bits):
        """By default, where the backend has it; what the rounding of gradients loses is kept."""
        grads = trees.noise(trees.ONE, 2, (1, 4))
        got = run(make(error_feedback=True), grads, "vmap")
        x = grads["only"][0]
        assert bits_of(got) == [16 * x[0].size * 2 * 3 // 4]
        residual = got.states.residual.value["only"][0]
        np.testing.assert_array_equal(residual, x - rounded(x, jnp.bfloat16))
        sums = got.updates["only"][0, 0] * 4
        np.testing.assert_array_equal(sums, rounded(sums, jnp.bfloat16))
        np.testing.assert_allclose(sums, x.sum(0), atol=2**-4)

    @pytest.mark.parametrize("workers", [3, 4])
    def test_a_sum_of_float16_stays_within_its_range(self, workers):
        """Cut off at its largest value; what is small is lost where it falls below the range, and is owed."""
        tx = gc.cast("float16", aggregate="psum", error_feedback=True)
        values = np.array([60_000, -65_504, 1e6, 1.0, 4e-8, 1e-9], np.float32)
        grads = {"w": np.broadcast_to(values, (1, workers, 6)).copy()}
        got = run(tx, grads, "checked")
        applied = got.updates["w"][0, 0]
        np.testing.assert_allclose(applied, [60_000, -65_504, 65_504, 1, 0, 0], rtol=2e-3)
        np.testing.assert_allclose(got.states.residual.value["w"][0, 0] + applied, values, rtol=2e-3)
        (collective,) = gc.collective_bytes(contexts.program(tx, grads, "checked")[0])
        assert (collective.kind, collective.dtype) == ("all-reduce", "f16")
        assert bits_of(got) == [8 * collective.ring_bytes]


def test_none_in_bfloat16_is_a_pmean_of_bfloat16():
    grads = {"w": trees.noise((40, 24), 3, (4,)).astype(jnp.bfloat16)}
    tx = gc.none(dense_dtype="bfloat16")

    def step(grads):
        return tx.update(grads, tx.init(grads))[0], jax.lax.pmean(grads, "data")

    mean, expected = jax.jit(jax.shard_map(step, mesh=gc.make_mesh(4), in_specs=P("data"), out_specs=P()))(grads)
    assert mean["w"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(mean, expected)


# Each way by which something dense travels: a sum, a ring, beside codes, apart from them, beside fronts of a buffer.
DENSE = {
    "powersgd": functools.partial(gc.powersgd, 1),
    "powersgd-ring": functools.partial(gc.powersgd, 1, aggregate="ring"),
    "powersgd-qsgd": functools.partial(gc.powersgd, 1, quantizer=gc.qsgd(8, bucket_size=16)),
    "topk-gather": functools.partial(gc.topk, 0.3, aggregate="gather"),
    "signnorm-gather": functools.partial(gc.signnorm, aggregate="gather"),
    "signnorm-shuffle": functools.partial(gc.signnorm, aggregate="shuffle"),
    "qsgd-shared": functools.partial(gc.qsgd, bucket_size=32, shared_scale=True),
    "accordion-powersgd": lambda **given: gc.accordion(gc.powersgd(4, **given), gc.powersgd(1, **given), interval=2),
    "accordion-topk": lambda **given: gc.accordion(gc.topk(0.3, **given), gc.topk(0.1, **given), interval=2),
}
# Of which "bias" and "gain" travel dense, by "gather" beside the codes of topk and apart from those of signnorm.
TREE, SMALL = {**trees.SMALL, "conv": (3, 3, 16, 32)}, {"min_size": 100}
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-10}


class TestDense:
    @pytest.mark.parametrize("dtype", ROUNDING)
    @pytest.mark.parametrize("id", DENSE)
    def test_beside_what_is_compressed(self, id, dtype):
        """It is rounded, and nothing else is; what is counted is what the compiled program sends."""
        grads = trees.noise(TREE, 1, (3, 4))
        narrow, plain = DENSE[id](dense_dtype=dtype, **SMALL), DENSE[id](**SMALL)
        got, expected = (run(tx, grads, "checked") for tx in (narrow, plain))
        # A ring begins each part of a message at another worker.
        np.testing.assert_allclose(got.updates["conv"], expected.updates["conv"], atol=1e-5)
        for path in ("bias", "gain"):
            rounding = np.abs(got.updates[path] - expected.updates[path])
            assert 0 < rounding.max() < 2 * ROUNDING[dtype] * np.abs(grads[path]).max()
        bits, more = (bits_of(steps) for steps in (got, expected))
        sent = gc.collective_bytes(contexts.program(narrow, grads, "checked")[0])
        assert {*bits} <= {8 * x for x in possible(sent, lambda c: c.ring_bytes, 0)}
        in_codes = id in ("powersgd-qsgd", "topk-gather", "signnorm-shuffle", "accordion-topk")
        assert all((b < m) == (in_codes or dtype == "float16") for b, m in zip(bits, more, strict=True))

    @pytest.mark.parametrize("id", ["powersgd", "signnorm-shuffle"])
    def test_contexts_agree_and_nothing_poisons(self, id):
        tx = DENSE[id](dense_dtype="float16", **SMALL)
        grads = trees.noise(trees.SMALL, 2, (3, 4))
        grads["bias"][1, 2, 3] = np.nan
        reference = run(tx, grads, "vmap")
        for context in CONTEXTS[1:]:
            chex.assert_trees_all_close(run(tx, grads, context), reference, atol=2e-5, rtol=2**-10)
        np.testing.assert_array_equal(reference.states.skipped[:, 0], [0, 1, 1])
        for x in jax.tree.leaves(reference.updates):
            assert not x[1].any()
            np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1], x.shape))

    @pytest.mark.parametrize("id", ["powersgd", "signnorm-shuffle"])
    def test_what_rides_beside_it_stays_exact(self, id):
        tx = DENSE[id](dense_dtype="bfloat16", **SMALL)
        grads, beside = trees.noise(trees.SMALL, 3, (3,)), trees.noise({"loss": (), "mean": (5,)}, 4, (3,))
        state = first_state(tx, grads)
        step = lambda g, s, b: tx.update(g, s, beside=b)[1].beside  # noqa: E731
        axes = (0, map_state(lambda _: 0, lambda _: None, state), 0)
        got = jax.jit(jax.vmap(step, axes, axis_name="data"))(grads, state, beside)
        for path, x in beside.items():
            np.testing.assert_allclose(got[path][0], x.mean(0), atol=1e-6)

    def test_gradiveqs_dense_steps_are_in_it_and_their_rounding_is_owed(self):
        tx = gc.gradiveq(
            16, train_steps=3, compress_steps=3, warmup_steps=1, error_feedback=True, dense_dtype="float16"
        )
        grads = trees.noise({"conv": (3, 3, 8, 16)}, 5, (8, 2))
        got = run(tx, grads, "checked")
        owed = got.states.residual.value["conv"]
        assert 0 < np.abs(owed[0]).max() < 2e-3
        given, applied = (x["conv"].astype(np.float64) for x in (grads, got.updates))
        np.testing.assert_allclose(applied[:, 0].sum(0) + owed[-1].mean(0), given.mean(1).sum(0), atol=5e-3)
        bits = bits_of(got)
        assert bits[0] == 16 * 1152
        assert len({*bits}) > 1

    def test_flush_sends_residuals_as_they_are(self):
        tx = problem.optimizer(gc.none(dense_dtype="bfloat16", error_feedback=True))
        params, state = problem.params(), gc.init(tx, problem.params(), 4)
        params, state, _ = gc.simulate(problem.loss_fn, tx, 4)(params, state, next(problem.batches(1)))
        assert any(x.any() for x in jax.tree.leaves(state[0].residual))
        _, state = gc.flush(tx, params, state, 4)
        assert not any(x.any() for x in jax.tree.leaves(state[0].residual))

    def test_a_leaf_is_compressed_where_that_sends_less_than_it_would_otherwise(self):
        """Which dense_dtype decides, and not the gradient's type."""
        grads = {"w": jnp.zeros((64, 64), jnp.bfloat16), "v": jnp.zeros((64, 64))}

        def compressed(tx):
            return {*plan(tx.codec, tx.settings, grads).compressed}

        for make, sent in (
            (functools.partial(gc.powersgd, 20), 2.5),
            (functools.partial(gc.randomk, 0.6), 2.4),
            (functools.partial(gc.topk, 0.4), 2.2),
            (gc.cast, 2),
            (functools.partial(gc.cast, "float8_e5m2"), 1),
            (functools.partial(gc.qsgd, 8), 1),
        ):
            given = {"min_size": 0, "allow_dense": True}
            assert compressed(make(**given)) == {*grads}
            assert compressed(make(dense_dtype="bfloat16", **given)) == ({*grads} if sent < 2 else set())
