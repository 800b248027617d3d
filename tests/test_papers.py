"""What the papers claim, and what their counts come to, on the real codecs."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from experiments.models import resnet18_shapes
from gradcomp_jax.codecs.powersgd import orthonormalize
from gradcomp_jax.codecs.qsgd import NORMS, quantize
from tests import trees
from tests.contexts import run


def test_resnet18_has_the_papers_size():
    sizes = [math.prod(shape) for shape in jax.tree.leaves(resnet18_shapes(), is_leaf=trees.is_shape)]
    assert (len(sizes), sum(sizes)) == (62, 11_173_962)


def resnet18_step(tx):
    """One step of two workers, each of whom then sends exactly its payload: 2 (n - 1) / n = 1."""
    mesh = gc.make_mesh(2)
    params = trees.zeros(resnet18_shapes())
    specs = gc.state_specs(tx, params)

    def worker(params, state):
        updates, state = tx.update(gc.vary(params, "data"), gc.local_state(state))
        return updates, gc.global_state(state)

    step = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs)))
    state = gc.init(tx, params, mesh)
    compiled = step.lower(params, state).compile()
    return gc.collective_bytes(compiled), compiled(params, state)[1]


class TestPowerSGD:
    """Vogels et al., NeurIPS 2019."""

    @pytest.mark.parametrize(("rank", "floats"), [(1, 45_935), (2, 82_260), (4, 154_910), (7, 263_885)])
    def test_table_3_data_sent_a_step(self, rank, floats):
        """MiB an epoch of 24 steps: 4, 8, 14 and 24, as Tables 3 and 4 have them."""
        collectives, state = resnet18_step(gc.powersgd(rank))
        assert [c.kind for c in collectives] == ["all-reduce", "all-reduce"]
        assert sum(c.operand_bytes for c in collectives) == 4 * floats
        assert gc.wire_bits(state) == (32 * floats, 32 * floats)
        assert round(24 * 4 * floats / 2**20) == {1: 4, 2: 8, 4: 14, 7: 24}[rank]

    def test_a_minimum_rate_sends_the_linear_layer_dense(self):
        """PyTorch's hook compresses at a rate of 2 and above; the last layer of ResNet-18 has 1.4 at rank 7."""
        compressed = jax.eval_shape(gc.powersgd(7, min_rate=2).init, trees.zeros(resnet18_shapes()))
        q = compressed.codec.q
        assert "linear/kernel" not in q
        shapes = resnet18_shapes()
        total = 11_173_962
        for path in q:
            *parents, leaf = path.split("/")
            node = shapes
            for name in parents:
                node = node[name]
            n, m = math.prod(node[leaf][:-1]), node[leaf][-1]
            total += min(n, m, 7) * (n + m) - n * m
        assert total == 265_351

    @pytest.mark.parametrize("rank", [1, 3])
    def test_low_rank_gradients_are_reproduced(self, rank):
        """A fixed gradient of the codec's rank is applied whole after two steps; nothing is left owing."""
        rng = np.random.default_rng(0)
        matrix = (rng.standard_normal((40, rank)) @ rng.standard_normal((rank, 30))).astype(np.float32)
        got = run(gc.powersgd(rank), {"w": np.broadcast_to(matrix, (4, 2, 40, 30))}, "vmap")
        assert np.abs(got.states.residual.value["w"][-1]).max() < 1e-4
        np.testing.assert_allclose(got.updates["w"][-1, 0], matrix, atol=1e-4)

    @pytest.mark.parametrize("matrix", ["noise", "zero", "rank one"])
    def test_basis_is_orthonormal(self, matrix):
        p = {
            "noise": np.random.default_rng(1).standard_normal((2, 4, 50)),
            "zero": np.zeros((2, 4, 50)),
            "rank one": np.ones((2, 4, 50)),
        }[matrix]
        basis = orthonormalize(jnp.asarray(p, jnp.float32))
        np.testing.assert_allclose(basis @ basis.swapaxes(1, 2), np.broadcast_to(np.eye(4), (2, 4, 4)), atol=1e-5)

    def test_warm_start_survives_a_gradient_that_was_zero(self):
        """Rows that QR picks for a zero matrix may stay zero for ever, as for tokens that never occur."""
        rng = np.random.default_rng(2)
        matrix = np.zeros((40, 30), np.float32)
        matrix[20:] = rng.standard_normal((20, 1)) * rng.standard_normal(30)
        grads = np.stack([np.zeros_like(matrix)] + 5 * [matrix])[:, None]
        got = run(gc.powersgd(2), {"w": np.broadcast_to(grads, (6, 2, 40, 30))}, "vmap")
        np.testing.assert_allclose(got.updates["w"][-1, 0], matrix, atol=1e-4)

    def test_residual_is_of_the_workers_own_approximation(self):
        """With the mean's instead, workers whose gradients cancel would owe ever more, like sqrt(t)."""
        rng = np.random.default_rng(3)
        noise = rng.standard_normal((300, 1, 24, 16)).astype(np.float32)
        grads = {"w": np.concatenate([noise, -noise], axis=1)}
        got = run(gc.powersgd(2), grads, "vmap")
        norms = np.linalg.norm(got.states.residual.value["w"][:, 0].reshape(300, -1), axis=1)
        assert norms[200:].mean() < 1.2 * norms[50:150].mean()

    def test_stacked_layers_are_matrices_of_their_own(self):
        """A scan's leading axis: three layers in one leaf give what three leaves give."""
        grads = trees.noise({"a": (24, 16), "b": (24, 16), "c": (24, 16)}, 4, (3, 2))
        stacked = {"layers": np.stack(list(grads.values()), axis=2)}
        tx = gc.powersgd(16 - 7, stacked=lambda path, leaf: path == "layers")
        got = run(tx, stacked, "checked")
        assert got.states.codec.q["layers"].shape == (3, 2, 3, 9, 16)
        # Each layer is approximated at full rank 9 of its own; one (72 x 16) matrix would not be.
        alone = gc.powersgd(9)
        for i, name in enumerate(grads):
            state = gc.init(alone, {"w": jnp.zeros((24, 16))}, 2)
            q = {"w": got_q(tx, stacked)[i : i + 1]}
            state = state._replace(codec=state.codec._replace(q=q))
            single = run(alone, {"w": grads[name]}, "vmap", state)
            np.testing.assert_allclose(got.updates["layers"][:, :, i], single.updates["w"], atol=1e-4)

    def test_momentum_of_algorithm_2(self):
        """Steady-state gain 1 + 1 / (1 - decay) = 11, where Nesterov's is 10; at decay 0 twice the step."""
        for decay, ours, nesterov in ((0.9, 11.0, 10.0), (0.0, 2.0, 1.0)):
            for tx, gain in ((gc.ef_momentum(decay), ours), (optax.trace(decay, nesterov=True), nesterov)):
                state = tx.init(jnp.float32(0))
                for _ in range(300):
                    update, state = tx.update(jnp.float32(1), state)
                assert float(update) == pytest.approx(gain, rel=1e-4)

    def test_momentum_keeps_its_type(self):
        tx = gc.ef_momentum(0.9)
        state = tx.init(jnp.bfloat16(0))
        with jax.numpy_dtype_promotion("standard"):
            _, after = tx.update(jnp.float32(1), state)
        chex.assert_trees_all_equal_dtypes(state, after)

    def test_algorithm_2_by_hand(self):
        tx, lr = gc.ef_momentum(0.5), 0.1
        x, m, state = 1.0, 0.0, tx.init(jnp.float32(1))
        for gradient in (1.0, -2.0, 3.0):
            m = 0.5 * m + gradient
            x -= lr * (gradient + m)
            update, state = tx.update(jnp.float32(gradient), state)
            np.testing.assert_allclose(update, gradient + m, rtol=1e-6)


def got_q(tx, grads):
    """The first Q of a stacked leaf [layers, r, m]."""
    return tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape[2:]), grads)).codec.q["layers"]


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


def test_same_seed_same_draws_and_another_seed_others():
    grads = trees.noise(trees.MATRICES, 10, (2, 2))
    for make in (gc.powersgd, lambda **kw: gc.qsgd(min_size=0, bucket_size=64, **kw)):
        first, again, other = (run(make(seed=seed), grads, "vmap").updates for seed in (0, 0, 1))
        chex.assert_trees_all_equal(first, again)
        assert all((x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
