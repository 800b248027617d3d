"""Codecs that send some of the coordinates: topk, randomk, randomblock, adaptive."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradcomp_jax as gc
from experiments.models import resnet18_shapes
from gradcomp_jax import views
from gradcomp_jax.codecs.chunked import Chunks
from gradcomp_jax.testing import trees
from gradcomp_jax.testing.contexts import run
from gradcomp_jax.testing.exchanges import declared, exchanged, means
from gradcomp_jax.wire.packing import fields_bytes
from gradcomp_jax.wire.places import pack_places, places_bytes, unpack_places
from gradcomp_jax.wire.values import Levels, Sigmas
from tests import networks


def resnet18_sizes():
    return [math.prod(shape) for shape in jax.tree.leaves(resnet18_shapes(), is_leaf=trees.is_shape)]


def count(x):
    return np.count_nonzero(x)


class TestTopK:
    @pytest.mark.parametrize(("fraction", "values"), [(1 / 272, 41_076), (1 / 64, 174_594)])
    def test_table_4_of_powersgd(self, fraction, values):
        """Vogels et al.'s budgets of 1/136 and 1/32 of the floats, half of them for the indices."""
        counts = [(max(1, int(fraction * n)), n) for n in resnet18_sizes()]
        assert sum(k for k, _ in counts) == values
        for k, n in (min(counts), max(counts)):
            sent = declared(gc.topk(fraction, aggregate="gather"), {"w": (n,)}, 2)
            assert sent == 8 * (4 * k + fields_bytes(k, (n - 1).bit_length()))

    def test_sends_the_largest_and_of_equal_ones_the_first(self):
        rng = np.random.default_rng(0)
        noise, ties = rng.standard_normal(240), rng.integers(-3, 4, 240)
        x = np.stack([noise, ties, np.where(rng.random(240) < 0.02, 5.0, 0.0)]).astype(np.float32)
        got = exchanged(gc.topk(0.1, aggregate="gather"), {"w": x.reshape(3, 30, 8)})
        expected = np.zeros_like(x)
        for worker, row in enumerate(x):
            sent = np.argsort(-np.abs(row), kind="stable")[:24]
            expected[worker, sent] = row[sent]
            assert np.sum((row - expected[worker]) ** 2) <= (1 - 24 / 240) * np.sum(row**2)
        np.testing.assert_array_equal(got.own["w"].reshape(3, -1), expected)
        np.testing.assert_allclose(got.mean["w"].reshape(-1), expected.mean(0), atol=1e-7)

    def test_shuffle_sends_a_fraction_of_each_shard(self):
        """A shard of 84 or 83 of 250 coordinates has 8 of each worker's, and 8 of their mean go on."""
        x = trees.noise({"w": (25, 10)}, 1, (3,))
        got = exchanged(gc.topk(0.1, aggregate="shuffle"), x)
        shards = np.split(got.mean["w"].reshape(-1), [84, 168])
        assert [count(shard) for shard in shards] == [8, 8, 8]
        for shard, given in zip(shards, np.split(x["w"].reshape(3, -1), [84, 168], axis=1), strict=True):
            sent = np.zeros_like(given)
            for worker, row in enumerate(given):
                first = np.argsort(-np.abs(row))[:8]
                sent[worker, first] = row[first]
            mean = sent.mean(0)
            mean[np.argsort(-np.abs(mean))[8:]] = 0
            np.testing.assert_allclose(shard, mean, atol=1e-7)


SPARSELOCO = {"chunk": 4096, "k": 64, "aggregate": "gather"}


def kept_of(x, k):
    """Rows with their k largest magnitudes alone; of equal ones the first."""
    places = np.argsort(-np.abs(x), axis=1, kind="stable")[:, :k]
    kept = np.zeros_like(x)
    np.put_along_axis(kept, places, np.take_along_axis(x, places, 1), 1)
    return kept


def of_rows(x, **settings):
    """What the codec makes of rows that are its chunks, as the only worker."""
    tx = gc.topk(chunk=x.shape[1], aggregate="gather", **settings)
    return exchanged(tx, {"w": x.reshape(1, -1)}).own["w"].reshape(x.shape)


class TestChunks:
    """SparseLoCo's codec."""

    def test_bytes_of_a_chunk(self):
        """64 x 6 low bits, 128 bits of unary, 64 codes of 2 bits, and the levels; of 4096 float32."""
        each = 64 * 6 // 8 + (64 + 64) // 8 + 64 * 2 // 8 + 3
        assert each == 83
        assert declared(gc.topk(**SPARSELOCO), {"w": (64 * 5, 64)}, 2) == 8 * 5 * each
        assert declared(gc.topk(chunk=4096, k=4096, aggregate="gather"), {"w": (64, 64)}, 2) == 8 * (4096 // 4 + 3)
        assert declared(gc.topk(**SPARSELOCO, levels="sigma"), {"w": (64, 64)}, 2) == 8 * (48 + 16 + 16 + 16)

    def test_a_transformer_shrinks_195_times(self):
        """Small leaves, scales and the filled up last chunk included."""
        shapes = networks.transformer(layers=2, width=256)
        sizes = [math.prod(shape) for shape in jax.tree.leaves(shapes, is_leaf=trees.is_shape)]
        assert (sum(sizes), sum(size for size in sizes if size < 4096)) == (2_890_752, 7_168)
        sent = declared(gc.topk(**SPARSELOCO), shapes, 2)
        assert sent == 8 * 83 * -(-sum(sizes) // 4096)
        assert 32 * sum(sizes) / sent > 197

    @pytest.mark.parametrize(
        ("n", "k", "size"),
        [
            (4096, 64, 64),
            (4096, 1, 3),
            (4096, 4095, 1024),
            (100, 7, 6),
            (1000, 41, 34),
            (2**16, 64, 96),
            (70_000, 3, 7),
        ],
    )
    def test_places_are_exact(self, n, k, size):
        """At random, all in front, all at the end, spread out, none at all, and few."""
        rng = np.random.default_rng(n + k)
        rows = [np.sort(rng.permutation(n)[:k]) for _ in range(8)]
        rows += [np.arange(k), np.arange(n - k, n), np.arange(k) * (n // k), np.full(k, n), np.minimum(np.arange(k), n)]
        rows[-1][k // 2 :] = n
        places = np.stack(rows).astype(np.int32)
        packed = pack_places(places, n)
        assert packed.shape == (len(rows), size)
        assert places_bytes(k, n) == size
        np.testing.assert_array_equal(unpack_places(packed, k, n), places)

    def test_foreign_bytes_are_places_that_are_not_negative(self):
        data = np.random.default_rng(3).integers(0, 256, (20, places_bytes(7, 100)), np.uint8)
        data[0], data[1] = 0, 255
        assert (np.asarray(unpack_places(data, 7, 100)) >= 0).all()

    @pytest.mark.parametrize(
        ("values", "most", "of_the_authors"),
        [("standard_normal", 0.0062, 0.0123), ("laplace", 0.013, 0.037), ("t", 0.053, 0.34)],
    )
    def test_squared_error_of_two_bits(self, values, most, of_the_authors):
        """Relative to the kept values', of chunks whose scales differ if their tails are heavy."""
        rng = np.random.default_rng(5)
        if values == "t":
            x = rng.standard_t(4, (400, 4096)) * np.exp(rng.standard_normal((400, 1)))
        else:
            x = getattr(rng, values)(size=(400, 4096))
        kept = kept_of(x.astype(np.float32), 64)
        error = {
            levels: np.sum((of_rows(x.astype(np.float32), k=64, levels=levels) - kept) ** 2) / np.sum(kept**2)
            for levels in ("chunk", "sigma")
        }
        assert error["chunk"] < most
        np.testing.assert_allclose(error["sigma"], of_the_authors, rtol=0.15)

    def test_the_largest_of_equal_ones_the_first(self):
        x = np.random.default_rng(1).integers(-3, 4, (6, 100)).astype(np.float32)
        got = of_rows(x, k=9, bits=None)
        np.testing.assert_array_equal(got, kept_of(x, 9))
        np.testing.assert_array_equal(np.sign(of_rows(x, k=9)), np.sign(got))

    @pytest.mark.parametrize("levels", ["chunk", "sigma"])
    def test_zeros_stay_zeros(self, levels):
        """In chunks of fewer values than are kept; two values of one sign and magnitude are exact."""
        x = np.zeros((5, 64), np.float32)
        x[1, 63], x[2, [0, 7]], x[3, ::9] = 3, [-2, -2], np.arange(8) - 10
        got = of_rows(x, k=8, levels=levels)
        np.testing.assert_array_equal(got[x == 0], 0)
        assert (np.sign(got) == np.sign(x)).all()
        if levels == "chunk":
            np.testing.assert_array_equal(got[:3], x[:3])

    def test_all_values_of_a_chunk(self):
        """Sign and level of each; the error is that of the best two levels, nearly."""
        x = np.random.default_rng(2).standard_normal((200, 256)).astype(np.float32)
        got = of_rows(x, k=256)
        assert all(len(set(np.abs(row))) == 2 for row in got)
        assert 0.115 < np.sum((got - x) ** 2) / np.sum(x**2) < 0.122  # 0.1175 by Lloyd and Max

    def test_levels_of_the_authors(self):
        """round((v - mean) / (1.5 sigma)) + 2 within 0..3, and a table of the bins' means."""
        kept = np.random.default_rng(4).standard_t(5, (30, 16)).astype(np.float32)
        values, all_sent = Sigmas(), np.full(kept.shape, True)
        got = values.restore(jax.jit(values.encode)(kept, all_sent), 16)
        v = kept.astype(np.float64)
        codes = np.clip(np.round((v - v.mean()) / (1.5 * v.std(ddof=1))) + 2, 0, 3)
        assert len({*codes.reshape(-1)}) == 4
        means = {code: v[codes == code].mean() for code in range(4)}
        np.testing.assert_allclose(got, np.vectorize(means.get)(codes), rtol=1e-5)

    def test_a_chunk_is_a_block_of_a_matrix(self):
        """Eight by eight; what is beside and below of all leaves shares chunks, and the last one is filled up."""
        x = trees.noise({"a": (3, 6, 19), "b": (5,), "c": (8, 40)}, 6, (1,))
        got = exchanged(gc.topk(chunk=64, k=1, aggregate="gather"), x).own
        sent = {path: y[0].reshape(-1, y.shape[-1]) != 0 for path, y in got.items()}
        blocks = [sent["a"][8 * i : 8 * i + 8, 8 * j : 8 * j + 8] for i in range(2) for j in range(2)]
        blocks += np.split(sent["c"], 5, axis=1)
        assert [count(block) for block in blocks] == [1] * 9
        rest = np.concatenate([sent["a"][:16, 16:].reshape(-1), sent["a"][16:].reshape(-1), sent["b"].reshape(-1)])
        assert [count(part) for part in np.split(rest, [64])] == [1, 1]
        assert declared(gc.topk(chunk=64, k=1, aggregate="gather"), {p: y.shape[1:] for p, y in x.items()}, 2) == (
            8 * 11 * (places_bytes(1, 64) + 1 + 3)
        )

    def test_what_travels_to_other_workers_is_whole_chunks(self):
        """Of eleven chunks among four workers three each, and one more that is filled up; told for each leaf."""
        shapes = {"a": (64, 10), "b": (64,)}
        told = gc.describe(gc.topk(chunk=64, k=8, aggregate="shuffle"), trees.zeros(shapes), 4)
        each = Chunks(64, 8, Levels()).chunk_bytes
        assert told.totals.sent == 2 * 3 * 3 * each
        a, b = told.rows
        assert (a.sent, b.sent) == (2 * 3 / 4 * 10 * each, 2 * 3 / 4 * each)
        assert a.view == "the largest 8 of each 64 numbers"

    def test_two_numbers_of_chunks_by_path_are_two_codecs(self):
        tx = gc.per_layer({"a": gc.topk(chunk=64, k=8), "": gc.topk(chunk=64, k=4)})
        got = run(tx, trees.noise({"a": (64, 2), "b": (64, 2)}, 7, (1, 2)), "vmap").updates
        assert {path: count(x[0, 0]) for path, x in got.items()}.keys() == {"a", "b"}
        assert count(got["a"][0, 0]) > count(got["b"][0, 0]) > 0


@pytest.mark.parametrize(
    ("make", "rank", "floats"),
    [(gc.randomblock, 2, 82_260), (gc.randomblock, 7, 263_885), (gc.randomk, 2, 82_260)],
)
def test_random_subsets_in_table_4_of_powersgd(make, rank, floats):
    """PowerSGD's budget, vectors sent whole."""
    assert declared(make(rank=rank), resnet18_shapes(), 2) == 32 * floats


@pytest.mark.parametrize("make", [gc.randomk, gc.randomblock])
class TestRandomSubsets:
    def test_all_workers_send_the_same_coordinates_and_others_in_the_next_step(self, make):
        x = trees.noise({"w": (30, 10)}, 2, (5, 3))
        got = run(make(0.2), x, "vmap")
        sent = got.updates["w"][:, 0].reshape(5, -1) != 0
        assert (sent.sum(1) == 60).all()
        assert all((a != b).any() for i, a in enumerate(sent) for b in sent[:i])
        first = got.states.residual.value["w"][0].reshape(3, -1)
        np.testing.assert_array_equal(first == 0, np.broadcast_to(sent[0], (3, 300)))
        # As in the paper what is sent is not scaled.
        mean = x["w"][0].mean(0).reshape(-1)
        np.testing.assert_allclose(got.updates["w"][0, 0].reshape(-1), np.where(sent[0], mean, 0), atol=1e-6)

    def test_unbiased_without_error_feedback(self, make):
        """The mean of 10^4 draws, scaled by n / k, is within 4 standard deviations of the gradient's mean."""
        draws, n, k = 10_000, 24, 9
        tx = make(k / n, error_feedback=False)
        x = trees.noise({"w": (6, 4)}, 3, (2,))
        state = jax.vmap(gc.SubsetState)(jnp.arange(draws, dtype=jnp.int32))

        estimates = means(tx, x["w"], state)
        assert (np.count_nonzero(estimates, axis=(1, 2)) == k).all()
        mean = x["w"].mean(0)
        sigma = np.abs(mean) * math.sqrt((n / k - 1) / draws)
        assert (np.abs(estimates.mean(0) - mean) <= 4 * sigma).all()

    def test_values_may_travel_through_a_quantizer(self, make):
        """60 of them in 4 buckets: the same coordinates, to a level of 127, and what rounding loses stays owed."""
        x = trees.noise({"w": (30, 10)}, 8, (5, 3))
        plain = run(make(0.2), x, "vmap")
        got = run(make(0.2, quantizer=gc.qsgd(8, bucket_size=16, aggregate="gather")), x, "vmap")
        assert gc.wire_bits(jax.tree.map(lambda x: x[-1], got.states)).last == 8 * (3 - 1) * 4 * (16 + 4)
        assert not got.updates["w"][plain.updates["w"] == 0].any()
        error = got.updates["w"][0] - plain.updates["w"][0]
        assert 0 < np.abs(error).max() < 1.2 * np.abs(x["w"][0]).max() / 127
        owed = got.states.residual.value["w"][-1].mean(0)
        np.testing.assert_allclose(got.updates["w"][:, 0].sum(0) + owed, x["w"].mean(1).sum(0), atol=1e-5)

    def test_residual_stays_bounded_by_what_waits(self, make):
        """A constant gradient: on average a coordinate is sent after n / k steps."""
        x = {"w": np.ones((400, 1, 20, 10), np.float32)}
        owed = run(make(0.1), x, "vmap").states.residual.value["w"].reshape(400, -1)
        assert 6 < owed[100:].mean() < 14


def test_a_block_is_of_neighbours_and_wraps_around():
    x = {"w": np.ones((60, 1, 10, 3), np.float32)}
    sent = run(gc.randomblock(0.4, error_feedback=False), x, "vmap").updates["w"].reshape(60, 30) != 0
    assert (sent.sum(1) == 12).all()
    # Around the circle there is one place where a block begins.
    begins = sent & ~np.roll(sent, 1, axis=1)
    assert (begins.sum(1) == 1).all()
    assert (sent[:, 0] & sent[:, -1]).any()
    assert len(set(begins.argmax(1))) > 15


def quantized(v, proportion, scope):
    """Q(v) of the papers, and which elements are sent; v [n, m]."""
    v = v.astype(np.float64)
    above, below = np.full((2, v.shape[1]), np.inf) * [[1], [-1]]
    if scope == "matrix":
        ranked = sorted(v.reshape(-1), key=abs, reverse=True)
        reached = [x for x in ranked if abs(x) >= abs(ranked[max(1, int(v.size / proportion)) - 1])]
        least = min((x for x in reached if x > 0), default=None)
        most = max((x for x in reached if x < 0), default=None)
        if least is not None or most is not None:
            above[:] = least if least is not None else -most
            below[:] = most if most is not None else -least
    else:
        for j, column in enumerate(v.T):
            for side, threshold, sign in ((column[column > 0], above, 1), (column[column < 0], below, -1)):
                if len(side):
                    threshold[j] = sign * np.sort(np.abs(side))[::-1][max(1, int(len(side) / proportion)) - 1]
    plus, minus = (v >= above) & (v > 0), (v <= below) & (v < 0)
    mean = lambda side: np.where(side, v, 0).sum(0) / np.maximum(side.sum(0), 1)  # noqa: E731
    return np.where(plus, mean(plus), np.where(minus, mean(minus), 0)), plus | minus


def awkward_matrices():
    """[cases, 48, 16], each an edge of the rule; and their negatives."""
    noise = np.random.default_rng(4).standard_normal((48, 16))
    column = noise.copy()
    column[:, 3] = 0
    few = np.where(np.arange(48 * 16).reshape(48, 16) % 251 == 7, noise, 0)
    one_sign_beyond = noise + 4 * (noise > 2)
    cases = [noise, few, np.zeros_like(noise), np.abs(noise), one_sign_beyond, column, np.round(2 * noise)]
    return np.stack([*cases, *(-x for x in cases)]).astype(np.float32)


def own_of_adaptive(v, **kwargs):
    """Q(v) of the codec: each matrix is a worker's."""
    return exchanged(gc.adaptive(16, aggregate="gather", **kwargs), {"w": v}).own["w"]


class TestAdaptive:
    """Dryden et al., MLHPC 2016; "matrix" is the form of 2017, "column" that of 2016."""

    @pytest.mark.parametrize("scope", ["matrix", "column"])
    def test_is_the_papers_quantizer(self, scope):
        v = awkward_matrices()
        got = own_of_adaptive(v, threshold_scope=scope, capacity=16)
        for case, (own, x) in enumerate(zip(got, v, strict=True)):
            expected, sent = quantized(x, 16, scope)
            np.testing.assert_array_equal(own != 0, sent, err_msg=str(case))
            np.testing.assert_allclose(own, expected, rtol=1e-5, err_msg=str(case))
        noise, few, zeros = got[:3]
        assert not count(zeros)
        if scope == "matrix":
            assert (count(noise), count(few)) == (48, count(v[1]))

    @pytest.mark.parametrize("scope", ["matrix", "column"])
    def test_beyond_the_capacity_the_last_columns_wait_in_the_residual(self, scope):
        v = awkward_matrices()
        room = math.ceil(0.5 * (48 if scope == "matrix" else 48 + 2 * 16))
        for own, x in zip(own_of_adaptive(v, threshold_scope=scope, capacity=0.5), v, strict=True):
            _, sent = quantized(x, 16, scope)
            kept = np.zeros(x.size, bool)
            kept[np.flatnonzero(sent.T)[:room]] = True
            kept = kept.reshape(16, 48).T
            np.testing.assert_array_equal(own != 0, kept)
            # The values of a column are the means of what is kept, which costs the least.
            for side in (kept & (x > 0), kept & (x < 0)):
                mean = np.where(side, x, 0).sum(0) / np.maximum(side.sum(0), 1)
                np.testing.assert_allclose(np.where(side, own, 0), np.where(side, mean, 0), rtol=1e-5)

    def test_sampled_thresholds_send_about_one_in_pi(self):
        """The 32nd of 1024 sampled elements is reached by 32 / 1025, give or take a sixth.

        That is the threshold of one sign; the other's is the next that was sampled, which one in 1025 fewer reach.
        """
        shape = (300, 250)  # above 65,536 elements
        x = {"w": np.broadcast_to(trees.noise({"w": shape}, 5)["w"], (120, 1, *shape))}
        got = run(gc.adaptive(32, capacity=4, error_feedback=False), x, "vmap")
        sent = np.count_nonzero(got.updates["w"][:, 0], axis=(1, 2)) * 1025 / 31 / math.prod(shape)
        assert abs(sent.mean() - 1) < 4 * math.sqrt(1 / 32 / 120)
        assert len(set(sent)) > 80  # another sample in each step

    def test_sampled_rows_of_each_column(self):
        """Of about 500 positive elements in 1000 rows, the 15th or so is reached by 15 / 501."""
        x = {"w": np.broadcast_to(trees.noise({"w": (1000, 40)}, 6)["w"], (10, 1, 1000, 40))}
        tx = gc.adaptive(32, threshold_scope="column", sample=True, capacity=4, error_feedback=False)
        sent = np.count_nonzero(run(tx, x, "vmap").updates["w"][:, 0], axis=1) / 1000
        assert 14 / 501 < sent.mean() < 16.5 / 501
        assert sent.std() > 0.005

    def test_true_length_of_the_code(self):
        """3 words a column and one more, and 16 bits an element that is sent."""
        v = awkward_matrices()
        state = exchanged(gc.adaptive(16, aggregate="gather"), {"w": v}).state
        sent = np.count_nonzero(own_of_adaptive(v), axis=(1, 2))
        np.testing.assert_array_equal(state.length.value.last[:, 1], 32 * (3 * 16 + 1) + 16 * sent)
        assert gc.code_bits(state) == np.mean(32 * (3 * 16 + 1) + 16 * sent)

    def test_two_stages(self):
        """Two workers: each encodes two stripes of 8 columns, and one again; what it does not send it owes once.

        The authors' later code adds what is not sent of the own stripe to the sum, and keeps it too.
        """
        v = awkward_matrices()[:1]
        got = exchanged(gc.adaptive(16, aggregate="shuffle"), {"w": np.concatenate([v, v])})
        # Of equal gradients the second stage sends again what it is given, a 16th of each stripe.
        assert gc.code_bits(got.state) == 3 * (32 * (3 * 8 + 1) + 16 * 48 * 8 // 16)
        np.testing.assert_allclose(got.mean["w"], got.own["w"].mean(0), atol=1e-6)
        assert count(got.mean["w"]) == 48

    def test_true_length_under_accordion(self):
        """What fills the front of a buffer is counted as it would be alone."""
        x = {"w": np.broadcast_to(trees.noise({"w": (48, 16)}, 7)["w"], (3, 2, 48, 16))}
        low, high = gc.adaptive(8, aggregate="gather"), gc.adaptive(32, aggregate="gather")
        tx = gc.accordion(low, high, interval=1, threshold=10)
        states = run(tx, x, "vmap").states
        lengths = [gc.code_bits(jax.tree.map(lambda x, t=t: x[t], states)) for t in range(3)]
        header = 32 * (3 * 16 + 1)
        assert lengths == [header + 16 * 96, header + 16 * 96, header + 16 * 24]

    def test_entries_of_tall_matrices_take_32_bits(self):
        tx = gc.adaptive(32, sample=False, aggregate="gather")
        short, tall = (declared(tx, {"w": (n, 2)}, 2) for n in (32_767, 32_768))
        assert short == 32 * 7 + 16 * math.ceil(32_767 / 16)
        assert tall == 32 * 7 + 32 * 2048


def test_a_share_is_rounded_down_as_decimals_are():
    assert [views.share(100, fraction) for fraction in (0.29, 0.57, 0.999, 1.0)] == [29, 57, 99, 100]
    assert views.share(3, 0.01) == 1
