"""Codecs that send signs: onebit, and signnorm with and without a majority vote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradcomp_jax as gc
from experiments.models import resnet18_shapes
from gradcomp_jax.codecs.onebit import means
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from gradcomp_jax.testing.exchanges import declared, exchanged
from gradcomp_jax.views import l1_norm


def onebit_of(v):
    """Q(v) of the paper: each column's two means; v [n, m]."""
    above = v >= 0
    low, high = (np.where(side, v, 0).sum(0) / np.maximum(side.sum(0), 1) for side in (~above, above))
    return np.where(above, high, low)


def two_stages(grads, stripe, second_residual):
    """Section 2.2 in numpy: gradients [steps, workers, n, m] -> what is applied, e1 and e2 in the end.

    Columns are quantised by themselves, so the stripes show only in who owes what; stripe: of a column, its owner.
    e1 [workers, n, m] is each worker's; e2 [n, m] each owner's, or with no memory of its own n-fold in the owner's e1.
    """
    workers = grads.shape[1]
    e1, e2, applied = np.zeros(grads.shape[1:]), np.zeros(grads.shape[2:]), []
    owner = np.arange(workers)[:, None, None] == stripe
    for g in grads.astype(np.float64):
        v = g + e1
        received = np.stack([onebit_of(x) for x in v])
        e1 = v - received
        mean = received.mean(0) + e2
        applied.append(onebit_of(mean))
        lost = mean - applied[-1]
        if second_residual:
            e2 = lost
        else:
            e1 = e1 + workers * owner * lost
    return np.stack(applied), e1, e2


class TestOneBit:
    """Seide et al., Interspeech 2014."""

    def test_values_keep_the_means_of_columns(self):
        v = trees.noise({"v": (100, 5)}, 0)["v"]
        v[:, 0] = np.abs(v[:, 0])
        v[:, 1] = 0
        v[:3, 2] = 0
        bits, low, high = (np.asarray(x) for x in means(jnp.asarray(v), "zero"))
        np.testing.assert_array_equal(bits, v >= 0)  # zero counts as positive
        quantized = np.where(bits, high, low)
        np.testing.assert_allclose(quantized, onebit_of(v), rtol=1e-5)
        np.testing.assert_allclose(quantized.mean(0), v.mean(0), atol=1e-6)
        assert low[0] == 0  # a side without elements
        assert not quantized[:, 1].any()

    def test_threshold_of_the_mean(self):
        """m - dev and m + dev, where dev is the mean of |v - m|."""
        v = trees.noise({"v": (100, 5)}, 1)["v"] + 3
        bits, low, high = (np.asarray(x) for x in means(jnp.asarray(v), "mean"))
        m = v.mean(0)
        dev = np.abs(v - m).mean(0)
        np.testing.assert_array_equal(bits, v >= m)
        np.testing.assert_allclose([low, high], [m - dev, m + dev], rtol=1e-5)

    @pytest.mark.parametrize("threshold", ["zero", "mean"])
    def test_zeros_and_constant_columns_leave_nothing(self, threshold):
        grads = {"w": np.zeros((1, 2, 80, 6), np.float32)}
        grads["w"][..., 3], grads["w"][..., 4] = 2.5, -0.75
        got = run(gc.onebit(threshold=threshold), grads, "vmap")
        np.testing.assert_array_equal(got.updates["w"][0, 0], grads["w"][0, 0])
        assert not got.states.residual.value["w"].any()

    @pytest.mark.parametrize("second_residual", [False, True])
    def test_trajectory_is_that_of_the_two_stages(self, second_residual):
        """Three workers, stripes of 4, 4 and 2 columns."""
        grads = trees.noise({"w": (70, 10)}, 2, (6, 3))
        tx = gc.onebit(second_residual=second_residual, aggregate="shuffle")
        got = run(tx, grads, "vmap")
        stripe = np.arange(10) // 4
        applied, e1, e2 = two_stages(grads["w"], stripe, second_residual)
        np.testing.assert_allclose(got.updates["w"][:, 0], applied, atol=1e-5)
        owner = np.arange(3)[:, None, None] == stripe
        residual = got.states.residual.value["w"][-1]
        np.testing.assert_allclose(residual, e1 + 3 * owner * e2, atol=2e-5)
        if second_residual:
            np.testing.assert_allclose(got.states.codec.second.value["w"][-1], owner * e2, atol=2e-5)

    def test_columns_are_counted_by_axis(self):
        x = {"w": trees.noise({"w": (6, 70, 2)}, 3)["w"][None]}
        own = exchanged(gc.onebit(axis=0), x).own["w"][0]
        np.testing.assert_allclose(own.reshape(6, 140).T, onebit_of(x["w"][0].reshape(6, 140).T), rtol=1e-5)

    def test_payload(self):
        """A bit an element, those of all leaves filled up to bytes, and two floats a column; short columns go dense."""
        shapes = {"long": (100, 7), "conv": (4, 4, 4, 3), "short": (63, 5), "bias": (500,)}
        assert list(gc.onebit().init(trees.zeros(shapes)).residual.value) == ["conv", "long"]
        one_bit = 8 * -(-(7 * 100 + 3 * 64) // 8) + (7 + 3) * 64
        assert declared(gc.onebit(aggregate="gather"), shapes, 2) == one_bit + 32 * (63 * 5 + 500)


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def cases():
    """Two leaves of three workers, with ties, zeros, and a leaf that is zero for all, or for one."""
    x = trees.noise({"w": (31, 3), "v": (17,), "zeros": (20,), "one": (20,)}, 4, (3,))
    x["w"][:, :5] = 0
    x["zeros"][:] = 0
    x["one"][1] = 0
    return x


class TestSignNorm:
    """Vogels et al., NeurIPS 2019, Table 4."""

    def test_sends_the_signs_of_the_whole_model_and_a_float_a_tensor(self):
        bits = declared(gc.signnorm(aggregate="gather"), resnet18_shapes(), 2)
        assert bits == 8 * -(-11_173_962 // 8) + 32 * 62

    def test_is_the_mean_magnitude_by_sign(self):
        """And a contraction: |C(D) - D|^2 = |D|^2 - |D|_1^2 / n."""
        x = cases()
        got = exchanged(gc.signnorm(aggregate="gather"), x)
        for path, rows in x.items():
            for own, d in zip(got.own[path], rows.astype(np.float64), strict=True):
                np.testing.assert_allclose(own, sign(d) * np.abs(d).mean(), rtol=1e-5)
                lost = np.sum(d**2) - np.abs(d).sum() ** 2 / d.size
                np.testing.assert_allclose(np.sum((own - d) ** 2), lost, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(got.mean[path], got.own[path].mean(0), atol=1e-6)

    def test_shards_have_norms_of_their_own(self):
        """Of 93 elements 31 each; of 17 elements 6, 6 and 5, the padding of no account."""
        x = cases()
        got = exchanged(gc.signnorm(aggregate="shuffle"), x)
        for path in ("w", "v"):
            each = -(-x[path][0].size // 3)
            flat, mean = x[path].reshape(3, -1).astype(np.float64), got.mean[path].reshape(-1)
            for start in range(0, flat.shape[1], each):
                shard = flat[:, start : start + each]
                sent = (sign(shard) * np.abs(shard).mean(1, keepdims=True)).mean(0)
                expected = sign(sent) * np.abs(sent).mean()
                np.testing.assert_allclose(mean[start : start + each], expected, rtol=1e-5)


class TestMajority:
    """Bernstein et al., ICLR 2019, Algorithm 1."""

    @pytest.mark.parametrize("aggregate", ["gather", "shuffle"])
    def test_is_the_vote(self, aggregate):
        """A tie is +1, a zero votes +1; who has only zeros does not vote, and where nobody does all stays."""
        x = cases()
        for workers in (slice(0, 3), slice(0, 2)):
            votes = {path: rows[workers] for path, rows in x.items()}
            got = exchanged(gc.signnorm(majority=True, aggregate=aggregate), votes).mean
            for path in ("w", "v"):
                np.testing.assert_array_equal(got[path], sign(sign(votes[path]).sum(0)))
            np.testing.assert_array_equal(got["zeros"], 0)
            voting = votes["one"][[0, 2][: len(votes["one"]) - 1]]
            np.testing.assert_array_equal(got["one"], sign(sign(voting).sum(0)))

    def test_keeps_no_residual(self):
        assert gc.signnorm(majority=True).init(trees.zeros(trees.MIXED)).residual.value == {}
        assert gc.signnorm().init(trees.zeros(trees.MIXED)).residual.value


@pytest.mark.parametrize("aggregate", ["gather", "shuffle"])
def test_a_tensor_of_ties_alone_is_not_voted_on(aggregate):
    grads = {"tied": np.stack([np.ones(8), -np.ones(8)])[None].astype(np.float32)}
    got = run(gc.signnorm(majority=True, aggregate=aggregate), grads, "vmap")
    assert not got.updates["tied"].any()


def test_flush_settles_the_second_residual_too():
    tx, params = gc.onebit(second_residual=True), {"w": jnp.zeros((64, 8))}
    state = gc.init(tx, params, 3)
    step = gc.simulate(lambda params, batch: jnp.sum(params["w"] * batch["w"][0]), tx, 3)
    for _ in range(3):
        params, state, _ = step(params, state, trees.noise({"w": (64, 8)}, 7, (3,)))
    assert jnp.any(state.codec.second.value["w"] != 0)
    _, state = gc.flush(tx, params, state, 3)
    assert not jnp.any(state.codec.second.value["w"] != 0)
    assert not jnp.any(state.residual.value["w"] != 0)


def test_a_shard_of_a_single_element_keeps_its_sign():
    """XLA takes a reduction over one element for that element, without what the reducer makes of it."""
    tx = gc.signnorm(aggregate="shuffle", min_size=0, compress=lambda path, leaf: True, allow_dense=True)
    grads = {"b": -jnp.ones((4, 4))}  # four workers, each of which decodes one of four elements
    mean, _ = jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="data")(grads)
    assert jnp.all(mean["b"] == -1)
    assert jax.jit(l1_norm)(jnp.full(1, -2.0)) == 2
