"""What the papers claim, and what their counts come to, on the real codecs."""

import logging
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
from gradcomp_jax.codecs.powersgd import best_split
from gradcomp_jax.orthonormal import orthonormalize
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from gradcomp_jax.testing.exchanges import declared


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
        assert declared(gc.powersgd(rank), resnet18_shapes(), 2) == 32 * floats
        assert round(24 * 4 * floats / 2**20) == {1: 4, 2: 8, 4: 14, 7: 24}[rank]

    def test_what_is_sent_is_two_all_reduces(self):
        """Dense leaves ride along."""
        collectives, state = resnet18_step(gc.powersgd(2))
        assert [c.kind for c in collectives] == ["all-reduce", "all-reduce"]
        assert sum(c.operand_bytes for c in collectives) == 4 * 82_260
        assert gc.wire_bits(state) == (32 * 82_260, 32 * 82_260)

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

    def test_a_refresh_leaves_a_subspace_that_holds_less(self):
        """Without error feedback Q at the second direction of a gradient stays there for ever."""

        def reached(tx):
            state = tx.init({"w": jnp.zeros((8, 8))})
            state = state._replace(codec=state.codec._replace(q={"w": jnp.eye(8)[None, :1]}))
            step = jax.jit(
                jax.vmap(lambda g, s: tx.update(g, s), in_axes=(0, None), axis_name="data", out_axes=(0, None))
            )
            for _ in range(12):
                update, state = step({"w": jnp.diag(jnp.array([1.0, 2, 0, 0, 0, 0, 0, 0]))[None]}, state)
            return jnp.diag(update["w"][0])[:2]

        settings = {"rank": 1, "error_feedback": False, "min_rate": 0.1}
        np.testing.assert_allclose(reached(gc.powersgd(**settings)), [1, 0], atol=1e-6)
        np.testing.assert_allclose(reached(gc.powersgd(refresh=6, **settings)), [0, 2], atol=1e-2)

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

    @pytest.mark.parametrize(
        ("shape", "rows"),
        [
            ((), 1),
            ((7,), 1),
            ((40, 30), 1),
            ((3, 3, 64, 128), 3),  # Flax's [H, W, in, out]
            ((64, 64, 3, 3), 1),  # PyTorch's [out, in, H, W]
            ((64, 8, 8), 1),  # an attention's [D, heads, D / heads]
            ((8, 8, 64), 2),  # and back
            ((4, 4, 4), 2),  # as many either way
        ],
    )
    def test_matrix_of_fewest_rows_and_columns(self, shape, rows):
        assert best_split(shape) == rows

    def test_layouts_send_as_much_as_the_papers_view(self):
        """2 (64 + 576) floats of a convolution, however it lies; 2 (64 + 64) of a head's kernel."""
        for shape in ((64, 64, 3, 3), (3, 3, 64, 64)):
            assert declared(gc.powersgd(2), {"w": shape}, 2) == 32 * 1280
        for shape in ((64, 8, 8), (8, 8, 64)):
            assert declared(gc.powersgd(2), {"w": shape}, 2) == 32 * 256

    def test_a_view_of_ones_own(self):
        """The rows' axes are counted without the one of layers."""
        split = lambda path, leaf: 3 if path == "w" else 1  # noqa: E731
        shapes = {"layers": (5, 16, 12, 4), "w": (6, 5, 4, 7)}
        tx = gc.powersgd(2, split=split, stacked=lambda path, leaf: path == "layers")
        q = jax.eval_shape(tx.init, trees.zeros(shapes)).codec.q
        assert {path: x.shape for path, x in q.items()} == {"layers": (5, 2, 48), "w": (1, 2, 7)}
        assert declared(tx, shapes, 2) == 32 * (5 * 2 * (16 + 48) + 2 * (120 + 7))

    @pytest.mark.parametrize(("rows", "stacked", "axes"), [(0, False, 3), (3, False, 3), (-1, False, 3), (2, True, 2)])
    def test_a_view_that_there_is_not(self, rows, stacked, axes):
        tx = gc.powersgd(2, split=lambda path, leaf: rows, stacked=lambda path, leaf: stacked)
        with pytest.raises(
            ValueError, match=f"split={rows} of leaf 'w': of its {axes} axes 1 to {axes - 1} make the rows"
        ):
            tx.init({"w": jnp.zeros((12, 10, 8))})

    def test_a_leaf_that_hardly_shrinks_is_told_of(self, caplog):
        """Unless it shrinks by two or travels dense."""
        shapes = {"hardly": (20, 12), "half": (32, 16), "dense": (5, 5), "vector": (9,)}
        with caplog.at_level(logging.INFO, "gradcomp_jax"):
            jax.eval_shape(gc.powersgd(4).init, trees.zeros(shapes))
        (line,) = [line for line in caplog.messages[0].splitlines() if "stacked=" in line]
        assert line.startswith(
            "  hardly: float32[20,12] as 20 x 12 at rank 4, 1.9 times fewer numbers only: see stacked="
        )

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


def test_same_seed_same_draws_and_another_seed_others():
    grads = trees.noise(trees.MATRICES, 10, (2, 2))
    for make in (gc.powersgd, lambda **kw: gc.qsgd(min_size=0, bucket_size=64, **kw)):
        first, again, other = (run(make(seed=seed), grads, "vmap").updates for seed in (0, 0, 1))
        chex.assert_trees_all_equal(first, again)
        assert all((x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
