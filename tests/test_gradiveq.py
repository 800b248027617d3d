"""What GradiVeQ's paper claims and counts, its phases and their bytes, and the rank trap."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from experiments.models import resnet18_shapes
from gradcomp_jax.codecs.gradiveq import principal_basis, project, slice_length, unexplained
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from gradcomp_jax.views import buckets


class TestGradiVeQ:
    """Yu et al., NeurIPS 2018."""

    @pytest.mark.parametrize(
        ("shape", "k"),
        [
            ((3, 3, 16, 16), 768),  # Fig. 5's layer: 3 positions of F D = 256
            ((3, 3, 3, 64), 576),
            ((1, 1, 64, 128), 512),
            ((3, 3, 64, 64), 768),
            ((3, 3, 128, 128), 768),
            ((3, 3, 256, 256), 768),
            ((3, 3, 512, 512), 512),
            ((512, 10), 640),
            ((40, 1000), 500),
            ((40, 1009), 768),
        ],
    )
    def test_slices_tile_the_kernel_at_multiples_of_filters(self, shape, k):
        assert slice_length(shape) == k
        assert math.prod(shape) % k == 0 or shape[-1] == 1009  # a prime

    def test_slice_length_keeps_to_k_max(self):
        assert slice_length((3, 3, 16, 16), 767) == 256
        assert slice_length((3, 3, 16, 16), 9 * 256) == 9 * 256
        assert slice_length((3, 3, 16, 16), 100) == 96

    def test_slices_follow_filters_then_depth(self):
        """The first D F values of a kernel [H, W, D, F] are those at its first position."""
        kernel = jnp.arange(3 * 3 * 4 * 5, dtype=jnp.float32).reshape(3, 3, 4, 5)
        np.testing.assert_array_equal(buckets(kernel, 20)[4], kernel[1, 1].reshape(-1))

    @pytest.mark.parametrize("spectrum", ["1/k", "1/k^2", "rank 5", "zeros", "tiny", "large"])
    def test_basis_is_orthonormal_in_float32(self, spectrum):
        samples = spectrum_of(spectrum)
        basis, variance = principal_basis(jnp.asarray(samples, jnp.float32), 32)
        used = np.asarray(jnp.any(basis != 0, axis=0))
        assert used.sum() == {"rank 5": 5, "zeros": 0, "1/k^2": pytest.approx(20, abs=8)}.get(spectrum, 32)
        gram = np.asarray(basis.T @ basis)
        np.testing.assert_allclose(gram, np.diag(used.astype(float)), atol=2e-6)
        assert (np.diff(variance) <= 0).all()
        assert np.isfinite(variance).all()
        largest = np.take_along_axis(np.asarray(basis), np.abs(basis).argmax(0)[None], 0)[0]
        assert (largest[used] > 0).all()

    @pytest.mark.parametrize("d", [1, 5, 20])
    def test_gram_route_is_the_covariance_route_up_to_sign(self, d):
        samples = spectrum_of("1/k")
        with jax.enable_x64(True):
            basis, variance = jax.device_get(principal_basis(jnp.asarray(samples), d))
        values, vectors = np.linalg.eigh(np.cov(samples, rowvar=False))
        vectors = vectors[:, ::-1][:, :d]
        np.testing.assert_allclose(np.abs(np.sum(basis * vectors, axis=0)), 1, atol=1e-9)
        explained = variance[:d] / variance.sum()
        np.testing.assert_allclose(explained, values[::-1][:d] / values.sum(), rtol=1e-9)

    def test_loss_of_the_first_columns(self):
        samples, fresh = np.split(spectrum_of("1/k"), 2)
        with jax.enable_x64(True):
            basis, _ = principal_basis(jnp.asarray(samples), 16)
            mu = samples.mean(0)
            lost = unexplained(jnp.asarray(fresh), basis, jnp.asarray(mu))
        for d in (1, 7, 16):
            u = np.asarray(basis)[:, :d]
            restored = (fresh - mu) @ u @ u.T + mu
            expected = np.sum((fresh - restored) ** 2) / np.sum(fresh**2)
            np.testing.assert_allclose(lost[d - 1], expected, rtol=1e-9)

    def test_sum_of_the_compressed_is_the_compressed_sum(self):
        rng = np.random.default_rng(0)
        basis, _ = principal_basis(jnp.asarray(rng.standard_normal((50, 64)), jnp.float32), 16)
        rows = jnp.asarray(rng.standard_normal((6, 12, 64)), jnp.float32)
        each = sum(project(worker, basis[None]) for worker in rows)
        np.testing.assert_allclose(each, project(rows.sum(0), basis[None]), atol=1e-4)

    def test_gradients_in_the_span_are_reproduced(self):
        """After the training steps, mu + 3 directions of each slice come through 3 coefficients whole."""
        rng = np.random.default_rng(1)
        directions, mu = rng.standard_normal((3, 24)), rng.standard_normal((10, 24))
        coefficients = rng.standard_normal((40, 2, 10, 3))
        grads = (coefficients @ directions + mu).reshape(40, 2, 10, 24).astype(np.float32)
        got = run(small_gradiveq(24, ratio=8), {"w": grads}, "vmap")
        assert gc.wire_bits(jax.tree.map(lambda x: x[-1], got.states)).last == 32 * (30 + 1)
        np.testing.assert_allclose(got.updates["w"][:, 0], grads.mean(1), atol=1e-4)
        # The mean of 2 workers lies nearer to mu than a worker; the bases were of the mean.
        np.testing.assert_allclose(got.states.codec.loss["w"][-1], 0, atol=1e-5)

    def test_phases_and_their_bytes(self):
        """Warm-up 2; then 5 dense, of which the last sends the basis too, and 4 compressed, again and again."""
        grads = trees.noise({"w": (10, 24)}, 3, (25, 2))
        got = run(small_gradiveq(24, ratio=8, warmup_steps=2, train_steps=5, compress_steps=4), grads, "checked")
        sent = [gc.wire_bits(jax.tree.map(lambda x, t=t: x[t], got.states)).last // 32 for t in range(25)]
        dense, fit, compressed = 240, 240 + 24 * 3, 10 * 3 + 1
        assert sent == [dense] * 2 + ([dense] * 4 + [fit] + [compressed] * 4) * 2 + [dense] * 4 + [fit]
        exact = np.isclose(got.updates["w"][:, 0], grads["w"].mean(1), atol=1e-5).all((1, 2))
        np.testing.assert_array_equal(exact, np.array(sent) >= dense)

    def test_mu_is_each_slices_own_mean_over_the_training_steps(self):
        grads = trees.noise({"w": (10, 24)}, 4, (9, 2))
        codec = run(small_gradiveq(24, warmup_steps=2, train_steps=5, compress_steps=4), grads, "vmap").states.codec
        np.testing.assert_allclose(codec.mu["w"][-1, 0], grads["w"][2:7].mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(codec.samples["w"][-1, 0, :, 0], grads["w"][2:7, :, 0].mean(1), atol=1e-6)
        assert codec.samples["w"].shape[2:] == (5, 1, 24)

    def test_reuse_of_bases(self):
        """A basis for every 4 slices, each of the group's first slice; 10 slices make 3 groups."""
        rng = np.random.default_rng(5)
        grads = np.zeros((12, 1, 10, 24), np.float32)
        for group in range(3):
            rows = slice(4 * group, 4 * group + 4)
            directions = rng.standard_normal((3, 24))
            grads[:, :, rows] = rng.standard_normal((12, 1, len(range(10)[rows]), 3)) @ directions
        together, apart = (
            run(small_gradiveq(24, ratio=8, reuse=reuse, train_steps=6, compress_steps=6), {"w": grads}, "vmap")
            for reuse in (None, 4)
        )
        np.testing.assert_allclose(apart.updates["w"][:, 0], grads[:, 0], atol=1e-4)
        assert np.abs(together.updates["w"][:, 0] - grads[:, 0]).max() > 0.1

    @pytest.mark.parametrize("context", ["vmap", "checked"])
    def test_holdout_refuses_noise_where_energy_falls_into_the_rank_trap(self, context):
        """39 directions hold all of 40 samples of noise in 160 dimensions, and of fresh noise a quarter."""
        rng = np.random.default_rng(6)
        noise = rng.standard_normal((44, 1, 2, 160)).astype(np.float32)
        lowrank = (rng.standard_normal((44, 1, 2, 4)) @ rng.standard_normal((4, 160))).astype(np.float32)
        lost = {}
        for select, rung in (("energy", 3), ("holdout", 4)):
            tx = small_gradiveq(160, select=select, train_steps=40, compress_steps=4)
            got = run(tx, {"lowrank": lowrank, "noise": noise}, context)
            assert jax.tree.map(lambda x: x[-1, 0], got.states.codec.rung) == {"lowrank": 0, "noise": rung}
            error = got.updates["noise"][-1, 0] - noise[-1, 0]
            lost[select] = np.sum(error**2) / np.sum(noise[-1] ** 2)
            np.testing.assert_allclose(got.states.codec.loss["noise"][-1, 0], lost[select], atol=1e-5)
            np.testing.assert_allclose(got.updates["lowrank"][-1, 0], lowrank[-1, 0], atol=1e-3)
        assert lost["holdout"] == 0
        assert lost["energy"] > 0.6

    def test_a_layer_of_zeros_is_not_compressed_by_a_ladder(self):
        """Its basis would hold nothing of the gradients that come later."""
        for select in ("energy", "holdout"):
            grads = {"w": np.zeros((22, 2, 4, 64), np.float32)}
            grads["w"][20:] = 1
            got = run(small_gradiveq(64, select=select), grads, "vmap")
            np.testing.assert_array_equal(got.updates["w"][20:], 1)

    def test_ladders_bytes_fall_with_the_rungs(self):
        """Two leaves of low rank on the lowest rung, each 1/32 of its size and a loss; 2 (n - 1) / n = 1."""
        rng = np.random.default_rng(7)
        grads = {
            name: (rng.standard_normal((22, 2, 8, 1)) @ rng.standard_normal((1, 64))).astype(np.float32)
            for name in "ab"
        }
        got = run(small_gradiveq(64, select="holdout"), grads, "checked")
        sent = gc.wire_bits(jax.tree.map(lambda x: x[-1], got.states)).last
        assert sent == 32 * (2 * 8 * 64 // 32 + 2)

    def test_error_feedback_sends_what_is_owed_in_a_step_that_is_no_sample(self):
        grads = trees.noise({"w": (10, 24)}, 8, (24, 2))
        tx = small_gradiveq(24, ratio=8, train_steps=5, compress_steps=4, error_feedback=True)
        got = run(tx, grads, "vmap")
        owed = np.abs(got.states.residual.value["w"]).max((1, 2, 3)) > 1e-3
        np.testing.assert_array_equal(owed, ([False] * 6 + [True] * 4) * 2 + [False] * 4)
        samples = got.states.codec.samples["w"][:, 0, :, 0]
        np.testing.assert_array_equal(samples[10], samples[9])
        np.testing.assert_allclose(got.states.codec.mu["w"][-5, 0], grads["w"][11:16].mean((0, 1)), atol=1e-6)

    def test_a_restart_with_other_phases_goes_on_in_the_old_one(self):
        """Without the rest of its warm-up it would compress by a basis of zeros."""
        grads = trees.noise({"w": (10, 24)}, 9, (14, 1))
        first, rest = ({"w": grads["w"][part]} for part in (slice(0, 3), slice(3, None)))
        state = run(small_gradiveq(24, warmup_steps=5, train_steps=6, compress_steps=4), first, "vmap").states
        state = jax.tree.map(lambda x: jnp.asarray(x[-1, 0]), state)
        got = run(small_gradiveq(24, warmup_steps=0, train_steps=6, compress_steps=2), rest, "vmap", state)
        exact = np.isclose(got.updates["w"][:, 0], rest["w"][:, 0], atol=1e-5).all((1, 2))
        np.testing.assert_array_equal(exact, [True] * 8 + [False] * 2 + [True])

    @pytest.mark.parametrize("select", ["ratio", "energy", "holdout"])
    def test_leaves_of_different_types(self, select):
        rng = np.random.default_rng(10)
        with jax.enable_x64(True):
            single, double = (rng.standard_normal((8, 2, 4, 1)) @ rng.standard_normal((1, 64)) for _ in range(2))
            grads = {"single": single.astype(np.float32), "double": double}
            tx = small_gradiveq(64, ratio=32, select=select, train_steps=6, compress_steps=4)
            got = run(tx, grads, "checked")
            for path, tolerance in (("single", 1e-4), ("double", 1e-10)):
                assert got.updates[path].dtype == grads[path].dtype
                np.testing.assert_allclose(got.updates[path][:, 0], grads[path].mean(1), atol=tolerance)

    @pytest.mark.parametrize("scale", [1e-20, 1.0, 1e25])
    def test_loss_at_any_scale(self, scale):
        grads = {"w": np.float32(scale) * trees.noise({"w": (10, 24)}, 11, (8, 1))["w"]}
        got = run(small_gradiveq(24, train_steps=6, compress_steps=4), grads, "vmap")
        error = (got.updates["w"][-1, 0] - grads["w"][-1, 0]) / scale
        expected = np.sum(error**2) / np.sum((grads["w"][-1, 0] / scale) ** 2)
        np.testing.assert_allclose(got.states.codec.loss["w"][-1, 0], expected, rtol=1e-4)

    def test_a_large_mean_of_few_elements_stops_no_later_step(self):
        """Next to which a gradient of the compressed steps is lost, up to a loss near the end of the range."""
        tx = small_gradiveq(24, train_steps=6, compress_steps=4)
        for power in np.arange(17, 21, 0.25):
            grads = trees.noise({"w": (2, 24)}, 11, (8, 1))
            grads["w"][2] = np.copysign(np.float32(10**power), grads["w"][2])
            np.testing.assert_array_equal(run(tx, grads, "vmap").states.skipped, 0)

    def test_hlo_of_each_branch(self):
        """One all-reduce a branch: the gradient, or d floats a slice and a loss, with the dense leaves; or U."""
        collectives = two_worker_hlo(small_gradiveq(24, ratio=8), {"w": (10, 24), "b": (2,)})
        assert {c.kind for c in collectives} == {"all-reduce"}
        branches = {}
        for c in collectives:
            name, _, index = c.branch.partition("/")
            branches.setdefault(name, {}).setdefault(index, c.operand_bytes)
        assert len(collectives) == 3
        (fit,) = (sent for sent in branches.values() if len(sent) == 1)
        (exchange,) = (sent for sent in branches.values() if len(sent) == 2)
        assert exchange == {"0": 4 * (240 + 2), "1": 4 * (10 * 3 + 1 + 2)}
        assert fit == {"1": 4 * 24 * 3}

    def test_hlo_of_each_size_on_a_ladder(self):
        """From all leaves at K / 32 to all of them dense, each next size at most 1.25 times the one before."""
        collectives = two_worker_hlo(small_gradiveq(64, select="energy"), {"w": (30, 64), "v": (10, 64)})
        sizes = sorted(c.operand_bytes // 4 for c in collectives if c.branch.count("/") == 3)
        assert (sizes[0], sizes[-1]) == (40 * 2 + 2, 40 * 64 + 2)
        assert max(b / a for a, b in itertools.pairwise(sizes)) <= 1.25

    def test_state_on_resnet18(self):
        """1.35 times the compressed leaves, as the docstring says."""
        params = trees.zeros(resnet18_shapes())
        state = jax.eval_shape(gc.gradiveq().init, params)
        convolutions = [x for x in jax.tree.leaves(params) if x.ndim == 4]
        assert len(state.codec.mu) == len(convolutions) == 20
        held = sum(math.prod(x.shape) for x in jax.tree.leaves(state.codec))
        assert held / sum(x.size for x in convolutions) == pytest.approx(1.35, abs=0.01)


def spectrum_of(name):
    """40 samples of 64 values."""
    if name == "zeros":
        return np.zeros((40, 64))
    rng = np.random.default_rng(2)
    k = np.arange(1, 65)
    scale = {"1/k": 1 / k, "1/k^2": 1 / k**2, "rank 5": k <= 5, "tiny": 1e-30 / k, "large": 1e30 / k}[name]
    mix = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    return rng.standard_normal((40, 64)) * scale @ mix + scale.max()


def small_gradiveq(k, **kwargs):
    settings = {"warmup_steps": 0, "train_steps": 20, "compress_steps": 20, **kwargs}
    return gc.gradiveq(k, compress=lambda path, leaf: leaf.ndim > 1, **settings)


def two_worker_hlo(tx, shapes):
    """The collectives of a step of two workers, who each send exactly what they hand over: 2 (n - 1) / n = 1."""
    mesh = gc.make_mesh(2)
    params = trees.zeros(shapes)
    specs = gc.state_specs(tx, params)

    def worker(params, state):
        updates, state = tx.update(gc.vary(params, "data"), gc.local_state(state))
        return updates, gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs)))
    return gc.collective_bytes(step.lower(params, gc.init(tx, params, mesh)).compile())
