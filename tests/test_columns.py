"""The sparse-column format against a plain writer of it, and against bytes that nobody wrote."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import gradcomp_jax as gc
from gradcomp_jax.wire import columns

encode = jax.jit(columns.encode, static_argnums=4)
decode = jax.jit(columns.decode, static_argnums=(1, 2))
keep_first = jax.jit(columns.keep_first, static_argnums=1)


def written(selected, positive, plus, minus, capacity):
    """The format, entry by entry; (bytes, kept)."""
    n, m = selected.shape
    small = n <= 32767
    head = (3 * m + 1) * (2 if small else 1)
    kept, starts, entries = np.zeros_like(selected), [], []
    for c in range(m):
        starts.append(head + len(entries))
        for r in np.flatnonzero(selected[:, c]):
            if len(entries) < capacity:
                kept[r, c] = True
                entries.append(r << 1 | positive[r, c])
    out = b""
    for c in range(m):
        out += np.uint32(starts[c]).tobytes() + plus[c].tobytes() + minus[c].tobytes()
    out += np.uint32(head + len(entries)).tobytes()
    entries += [0] * (capacity - len(entries))
    return out + np.array(entries, np.uint16 if small else np.uint32).tobytes(), kept


def drawn(n, m, fraction, seed):
    rng = np.random.default_rng(seed)
    selected = rng.random((n, m)) < fraction
    # Every kind of column: full, empty, the rest at random.
    selected[:, rng.random(m) < 0.1] = True
    selected[:, rng.random(m) < 0.2] = False
    return selected, rng.random((n, m)) < 0.5, *rng.normal(size=(2, m)).astype(np.float32)


def check(n, m, fraction, capacity, seed):
    selected, positive, plus, minus = drawn(n, m, fraction, seed)
    data = np.asarray(encode(selected, positive, plus, minus, capacity))
    expected, kept = written(selected, positive, plus, minus, capacity)
    assert data.tobytes() == expected
    assert data.size == columns.encoded_bytes((n, m), capacity)
    np.testing.assert_array_equal(keep_first(selected, capacity), kept)
    np.testing.assert_array_equal(
        decode(data, (n, m), capacity), np.where(kept, np.where(positive, plus, minus), np.float32(0))
    )
    bits = 32 * (3 * m + 1) + (16 if n <= 32767 else 32) * int(kept.sum())
    assert np.asarray(columns.sent_bits(data, (n, m))).tolist() == [bits >> 32, bits & 0xFFFFFFFF]


@hypothesis.given(
    shape=st.sampled_from([(1, 5), (32, 1), (100, 5)]),
    fraction=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    capacity=st.sampled_from([0, 40]),
    seed=st.integers(0, 99),
)
def test_bytes_are_those_of_the_format(shape, fraction, capacity, seed):
    check(*shape, fraction, capacity, seed)


@pytest.mark.parametrize("n", [32767, 32768])
@pytest.mark.parametrize("capacity", [500, 100_000])
def test_tall_matrices_take_wider_words(n, capacity):
    check(n, 3, 0.01, capacity, 1)
    assert columns.encoded_bytes((n, 3), 10) == 40 + (20 if n == 32767 else 40)


def test_the_last_row_of_either_width_is_sent():
    for n in (32767, 70000):
        selected = np.zeros((n, 2), bool)
        selected[-1] = True
        data = encode(selected, selected, np.float32([1, 2]), np.float32([-1, -2]), 2)
        np.testing.assert_array_equal(np.asarray(decode(data, (n, 2), 2))[-1], [1, 2])


@pytest.mark.parametrize("n", [50, 32800])
def test_any_bytes_decode_to_values_that_were_sent(n):
    m, capacity = 7, 60
    rng = np.random.default_rng(0)
    _, _, plus, minus = drawn(n, m, 0, 0)
    head, width = 4 * (3 * m + 1), 2 if n <= 32767 else 4
    for trial in range(60):
        data = np.frombuffer(rng.bytes(columns.encoded_bytes((n, m), capacity)), np.uint8).copy()
        header = data[:head].view(np.uint32)
        header[1:-1:3], header[2:-1:3] = plus.view(np.uint32), minus.view(np.uint32)
        if trial % 3:  # starts near those that are possible, in any order
            header[:-1:3] = head // width + rng.integers(-3, capacity + 3, m)
            header[-1] = head // width + rng.integers(-3, capacity + 3)
        if trial % 3 == 1:  # rows that exist, or nearly
            data[head:].view(np.uint16 if width == 2 else np.uint32)[:] = rng.integers(0, 2 * n + 20, capacity)
        if trial == 0:
            data[:] = 255  # all NaN: heard of
            assert np.isnan(decode(data, (n, m), capacity)).all()
            continue
        out = np.asarray(decode(data, (n, m), capacity))
        for c in range(m):
            assert set(out[:, c].tolist()) <= {0.0, plus[c].item(), minus[c].item()}
        starts, total = header[:-1:3].astype(np.int64) - head // width, int(header[-1]) - head // width
        entries = data[head:].view(np.uint16 if width == 2 else np.uint32)
        claimed = [e for i, e in enumerate(entries) if i < total and (starts[starts >= 0] <= i).any() and e >> 1 < n]
        assert np.count_nonzero(out) <= len(claimed)
        assert bool(np.count_nonzero(out)) == bool(claimed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_heard_of_everywhere(bad, side):
    selected = np.zeros((6, 3), bool)
    selected[2, 0] = True
    values = np.ones((2, 3), np.float32)
    values[side, 2] = bad  # of a column without an entry
    assert np.isnan(decode(encode(selected, selected, *values, 4), (6, 3), 4)).all()


@pytest.mark.parametrize(("n", "bits"), [(2, 16), (40_000, 32)])
def test_the_length_of_many_entries_does_not_wrap(n, bits):
    total = 2**31 + 3  # as if there were so many
    header = np.array([0, 0, 0, total], np.uint32).view(np.uint8)
    high, low = np.asarray(columns.sent_bits(header, (n, 1))).tolist()
    assert high << 32 | low == bits * total


def test_a_matrix_too_large_is_refused():
    with pytest.raises(ValueError, match="65536 x 32768 has"):
        columns._layout((65536, 32768))


def test_under_vmap_and_checked_shard_map():
    matrices = [drawn(40, 6, 0.2, seed) for seed in range(4)]
    selected, positive, plus, minus = (np.stack(part) for part in zip(*matrices, strict=True))

    def through(*parts):
        return columns.decode(columns.encode(*parts, 30), (40, 6), 30), columns.keep_first(parts[0], 30)

    alone = [jax.jit(through)(*parts) for parts in zip(selected, positive, plus, minus, strict=True)]
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda *parts: jax.tree.map(lambda x: x[None], through(*(x[0] for x in parts))),
        mesh=gc.make_mesh(4),
        in_specs=spec,
        out_specs=spec,
    )
    for context in (jax.vmap(through), sharded):
        out = jax.jit(context)(selected, positive, plus, minus)
        for i in range(4):
            for got, expected in zip(out, alone[i], strict=True):
                np.testing.assert_array_equal(got[i], expected)
