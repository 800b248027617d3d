"""QSGD: what its paper claims, a scale that all workers share, and Elias' code on the wire."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradcomp_jax as gc
from gradcomp_jax.codecs.qsgd import NORMS, quantize
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from gradcomp_jax.testing.exchanges import declared, exchanged, means
from gradcomp_jax.wire import elias
from gradcomp_jax.wire.packing import fields_bytes
from tests import elias_reference


class TestQSGD:
    """Alistarh et al., NeurIPS 2017."""

    @pytest.mark.parametrize(("bits", "bucket", "a_value"), [(4, 512, 4.0625), (2, 128, 2.25), (8, 512, 8.0625)])
    def test_cost_of_a_value(self, bits, bucket, a_value):
        n = 512 * 128
        grads = {"w": np.ones((1, 2, n // 128, 128), np.float32)}
        got = run(gc.qsgd(bits, bucket_size=bucket), grads, "vmap")
        assert gc.wire_bits(got.states).last == n * a_value

    @pytest.mark.parametrize("norm", ["max", "l2"])
    @pytest.mark.parametrize("levels", [1, 7])
    def test_lemma_3_1_unbiased(self, norm, levels):
        """(i): the mean of 10^4 draws is within 4 standard deviations of v, coordinate by coordinate."""
        draws, d = 10_000, 32
        v = jnp.asarray(np.random.default_rng(5).standard_normal((1, d)), jnp.float32)
        scale = NORMS[norm](v)
        many = quantize(jnp.broadcast_to(v, (draws, d)), jnp.broadcast_to(scale, (draws, 1)), levels, jax.random.key(0))
        mean = np.asarray(many, np.float64).mean(0) * float(scale[0, 0]) / levels
        a = np.abs(np.asarray(v[0], np.float64)) * levels / float(scale[0, 0])
        p = a - np.floor(a)
        sigma = np.sqrt(p * (1 - p) / draws) * float(scale[0, 0]) / levels
        assert (np.abs(mean - v[0]) <= 4 * sigma + 1e-5).all()

    @pytest.mark.parametrize("norm", ["max", "l2"])
    def test_norms_and_levels_at_the_ends_of_the_range(self, norm):
        """A scale above 2^126 has no reciprocal, squares leave the range long before."""
        v = np.random.default_rng(5).uniform(0.25, 1, (12, 16))
        scales = [1e-37, 1e-30, 1e-23, 1e-19, 1, 1.8e19, 1e30, 4e37, 8.4e37, 8.6e37, 0, np.nan]
        rows = (v * np.array(scales)[:, None]).astype(np.float32)
        got = jax.jit(NORMS[norm])(rows)[:, 0]
        expected = np.linalg.norm(rows.astype(np.float64), np.inf if norm == "max" else 2, axis=1)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        levels = jax.jit(functools.partial(quantize, levels=127))(rows[:-1], got[:-1, None], key=jax.random.key(0))
        exact = 127 * (rows[:-2] / expected[:-2, None])
        assert (np.abs(levels[:-1] - exact) < 1 + 1e-4).all()
        assert not levels[-1].any()

    @pytest.mark.parametrize("norm", ["max", "l2"])
    @pytest.mark.parametrize(("levels", "d"), [(1, 128), (7, 512), (127, 512)])
    def test_lemma_3_1_variance(self, norm, levels, d):
        """(ii): E |Q(v) - v|^2 <= min(d / s^2, sqrt(d) / s) |v|^2; also on a bucket of one large value."""
        rng = np.random.default_rng(6)
        spiked = np.full(d, 1e-3)
        spiked[0] = 1
        for v in (rng.standard_normal(d), spiked):
            v = jnp.asarray(np.tile(v, (400, 1)), jnp.float32)
            scale = NORMS[norm](v)
            error = quantize(v, scale, levels, jax.random.key(1)) * scale / levels - v
            variance = float(jnp.mean(jnp.sum(error**2, axis=1)))
            bound = min(d / levels**2, math.sqrt(d) / levels) * float(jnp.sum(v[0] ** 2))
            assert variance <= 1.05 * bound

    @pytest.mark.parametrize(("levels", "nonzero"), [(1, 366), (2, 751), (4, 1467), (16, 5674)])
    def test_lemma_3_1_sparsity(self, levels, nonzero):
        """(iii): at most s (s + sqrt(n)) nonzeros; measured here on n = 2e5 normal values."""
        v = jnp.asarray(np.random.default_rng(7).standard_normal((1, 200_000)), jnp.float32)
        counts = [
            int(jnp.count_nonzero(quantize(v, NORMS["l2"](v), levels, jax.random.key(seed)))) for seed in range(5)
        ]
        assert np.mean(counts) == pytest.approx(nonzero, rel=0.06)
        assert np.mean(counts) <= levels * (levels + math.sqrt(200_000))

    def test_a_zero_bucket_gives_zeros(self):
        grads = {"w": np.zeros((1, 2, 64, 64), np.float32)}
        grads["w"][:, :, 32:] = 1
        got = run(gc.qsgd(2, bucket_size=64, min_size=0), grads, "vmap")
        np.testing.assert_array_equal(got.updates["w"][0, 0], grads["w"][0, 0])

    def test_a_bucket_of_one_value_is_exact(self):
        grads = {"w": np.zeros((1, 2, 64, 64), np.float32)}
        grads["w"][..., 5] = np.linspace(-3, 3, 64)
        for norm in NORMS:
            got = run(gc.qsgd(2, bucket_size=64, min_size=0, norm=norm), grads, "vmap")
            np.testing.assert_allclose(got.updates["w"][0, 0], grads["w"][0, 0], rtol=1e-6)

    def test_levels(self):
        grads = trees.noise({"w": (64, 64)}, 8, (1, 1))
        got = run(gc.qsgd(4, levels=3, bucket_size=64, min_size=0), grads, "vmap").updates["w"][0, 0]
        steps = np.abs(got) / np.abs(grads["w"][0, 0]).max(1, keepdims=True) * 3
        np.testing.assert_allclose(steps, steps.round(), atol=1e-5)
        assert set(steps.round().reshape(-1)) == {0, 1, 2, 3}

    def test_tensors_below_ten_thousand_elements_are_not_quantised(self):
        params = {"large": jnp.zeros((100, 100)), "small": jnp.zeros((99, 101))}
        tx = gc.qsgd(error_feedback=True)
        assert list(tx.init(params).residual.value) == ["large"]

    @pytest.mark.parametrize("norm", ["max", "l2"])
    @pytest.mark.parametrize(("bits", "bucket"), [(2, 128), (4, 512), (8, 512)])
    def test_residual_is_bounded_in_the_papers_settings(self, bits, bucket, norm):
        """2-bit buckets by the 2-norm, sent unscaled, would reach 10^16 times the gradient."""
        grads = trees.noise({"w": (64, 64)}, 9, (200, 1))
        tx = gc.qsgd(bits, bucket_size=bucket, norm=norm, min_size=0, error_feedback=True)
        residual = run(tx, grads, "vmap").states.residual.value["w"]
        norms = np.linalg.norm(residual.reshape(200, -1), axis=1) / 64
        s = 2 ** (bits - 1) - 1
        omega = min(bucket / s**2, math.sqrt(bucket) / s)
        assert norms.max() < 2 * (1 + omega)
        assert norms[150:].mean() < 1.2 * norms[50:100].mean() + 0.1


small = functools.partial(gc.qsgd, bucket_size=16, min_size=0)


@pytest.mark.parametrize(
    "tx",
    [
        small(2, aggregate="gather"),
        small(4, norm="l2", code="packed", aggregate="shuffle"),
        small(2, aggregate="ring"),
        small(4, shared_scale=True),
        small(2, norm="l2", shared_scale=True, aggregate="ring"),
    ],
    ids=["gather", "shuffle", "ring", "shared scale", "shared 2-norm"],
)
def test_exchanges_are_unbiased(tx):
    """However often what is sent is rounded on its way: 10^4 draws of two workers, coordinate by coordinate."""
    draws = 10_000
    x = trees.noise({"w": (4, 8)}, 11, (2,))
    states = jax.vmap(lambda step: gc.QSGDState(step, ()))(jnp.arange(draws, dtype=jnp.int32))
    estimates = means(tx, x["w"], states)
    sigma = estimates.std(0) / math.sqrt(draws)
    # Rounding is by numbers of 24 bits, which may be off by 2^-25 of a level at each stage.
    assert (np.abs(estimates.mean(0) - x["w"].mean(0)) <= 4 * sigma + 1e-6).all()
    assert (sigma > 0).sum() >= 28


class TestSharedScale:
    def test_integers_are_summed_exactly(self):
        """Of the largest scale of all workers, bucket by bucket."""
        x = trees.noise({"w": (24, 16)}, 12, (5,))
        x["w"] *= np.arange(1, 6)[:, None, None]
        got = exchanged(small(4, shared_scale=True), x)
        unit = np.abs(x["w"]).max((0, 2), keepdims=True)[0] / 7
        sent, total = got.own["w"] / unit, got.mean["w"] * 5 / unit
        np.testing.assert_allclose(sent, sent.round(), atol=1e-5)
        np.testing.assert_allclose(total, sent.round().sum(0), atol=1e-4)
        assert (np.abs(got.own["w"] - x["w"]) <= unit * 1.0001).all()

    @pytest.mark.parametrize(
        ("bits", "workers", "each"),
        [(4, 2, 4), (4, 18, 4), (4, 19, 2), (8, 2, 2), (8, 258, 2), (8, 259, 1)],
    )
    def test_sums_of_full_levels_do_not_run_over(self, bits, workers, each):
        """As many to a word as hold 2 s n, on either side of what changes that; the lowest levels and the highest."""
        x = {"w": np.full((workers, 4, 32), -2.5, np.float32)}
        x["w"][:, :, ::3] = 2.5
        tx = small(bits, shared_scale=True, error_feedback=True)
        np.testing.assert_allclose(exchanged(tx, x).mean["w"], x["w"][0], rtol=1e-6)
        words = 4 * 32 // each
        sent = [-(-2 * (workers - 1) * payload // workers) for payload in (8 * 32, 32 * words)]  # scales, integers
        assert declared(tx, {"w": (4, 32)}, workers) == sum(sent)

    @pytest.mark.parametrize("norm", ["max", "l2"])
    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
    def test_one_workers_bad_value_is_heard_of(self, norm, bad):
        """A processor makes a negative NaN of Inf / Inf, which is no largest integer."""
        grads = trees.noise({"w": (24, 16)}, 13, (1, 3))
        grads["w"][0, 1, 3, 4] = bad
        got = run(SHARED[norm], grads, "vmap")
        assert not got.updates["w"].any()
        np.testing.assert_array_equal(got.states.skipped, 1)


SHARED = {norm: small(4, norm=norm, shared_scale=True) for norm in NORMS}


class TestEliasOnTheWire:
    def test_means_are_those_of_the_packed_code(self):
        """Also where one worker's code does not fit, and all send the packed one in that step."""
        settings = {"norm": "l2", "bucket_size": 64, "min_size": 0, "aggregate": "gather"}
        grads = trees.noise({"w": (24, 32)}, 14, (3, 2))
        grads["w"][:, :, np.arange(24) % 8 != 0] = 0  # of a bucket of 64 half, or all, are zeros
        grads["w"][1, 1] = trees.noise({"w": (24, 32)}, 15)["w"]
        short = run(gc.qsgd(4, code="elias", capacity=0.7, **settings), grads, "vmap")
        packed = run(gc.qsgd(4, code="packed", **settings), grads, "vmap")
        # Of the same levels; what is added up is fused otherwise.
        np.testing.assert_allclose(short.updates["w"], packed.updates["w"], rtol=1e-6, atol=1e-6)
        sent = [gc.wire_bits(jax.tree.map(lambda x, t=t: x[t], short.states)).last for t in range(3)]
        flag = 32
        assert sent[1] == gc.wire_bits(packed.states).last + flag
        compact = 4 * 12 + fields_bytes(12, 9) + math.ceil(12 * 64 * 0.7 / 8)
        assert sent[0] == sent[2] == 8 * compact + flag

    def test_true_length(self):
        """A scale, the code's own length in 9 bits, and the code of each bucket, as the paper writes it."""
        x = trees.noise({"w": (24, 32)}, 16, (2,))
        got = exchanged(gc.qsgd(4, norm="l2", bucket_size=64, min_size=0, code="elias", aggregate="gather"), x)
        form = elias.shorter_form(64, 7)
        for worker, length in enumerate(got.state.length.value.last):
            buckets, own = (v[worker].reshape(12, 64).astype(np.float64) for v in (x["w"], got.own["w"]))
            levels = (own / np.linalg.norm(buckets, axis=1, keepdims=True) * 7).round().astype(int)
            codes = [elias_reference.bucket_code(bucket, form, False) for bucket in levels.tolist()]
            assert list(length) == [0, 12 * (32 + 9) + sum(map(len, codes))]
        assert gc.code_bits(got.state) == got.state.length.value.last[:, 1].mean()

    def test_true_lengths_survive_another_number_of_workers(self):
        tx = gc.qsgd(4, norm="l2", bucket_size=64, min_size=0, code="elias")
        state = gc.init(tx, {"w": jnp.zeros((24, 32))}, 4)
        after = gc.resize_workers(state, 6)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        assert after.codec.length.value.last.shape == (6, 2)
