"""The wire's formats and random numbers against plain references."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import gradcomp_jax as gc
from gradcomp_jax import views
from gradcomp_jax.exchange import collectives
from gradcomp_jax.random import distinct, step_key, threefry2x32, uniform23
from gradcomp_jax.wire.packing import (
    fields_bytes,
    from_bytes,
    pack,
    pack_fields,
    pack_terms,
    to_bytes,
    unpack,
    unpack_fields,
    unpack_sum,
)
from tests.marks import every_context


@hypothesis.given(
    bits=st.sampled_from([1, 2, 4, 8]), rows=st.integers(1, 5), width=st.integers(1, 9), seed=st.integers(0, 999)
)
def test_packing_round_trips_and_is_dense(bits, rows, width, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, width * 8 // bits), dtype=np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (rows, width)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    # Code j lies in byte j mod width, at bit (j div width) * bits.
    for j in range(codes.shape[1]):
        np.testing.assert_array_equal(
            np.asarray(packed)[:, j % width] >> (j // width * bits) & (2**bits - 1), codes[:, j]
        )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_along_another_axis_is_that_of_the_last(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 16, 5), dtype=np.uint8)
    packed = pack(jnp.asarray(codes), bits, axis=1)
    last = pack(jnp.asarray(np.moveaxis(codes, 1, -1)), bits)
    np.testing.assert_array_equal(packed, np.moveaxis(np.asarray(last), -1, 1))
    np.testing.assert_array_equal(unpack(packed, bits, axis=1), codes)


@pytest.mark.parametrize("width", range(33))
def test_fields_of_any_width_round_trip_in_few_bytes(width):
    for k in (0, 7):
        values = np.random.default_rng(width).integers(0, 2**width, (2, k), dtype=np.uint64).astype(np.uint32)
        data = pack_fields(jnp.asarray(values), width)
        assert data.dtype == jnp.uint8
        assert data.shape == (2, fields_bytes(k, width))
        assert 0 <= data.shape[1] - -(-k * width // 8) <= 2
        back = unpack_fields(data, k, width)
        assert back.dtype == (jnp.uint8 if width <= 8 else jnp.uint32)
        np.testing.assert_array_equal(back, values)
        if width < 32:  # what does not fit is left out, and disturbs nothing
            np.testing.assert_array_equal(pack_fields(jnp.asarray(values) | np.uint32(1 << width), width), data)


def test_parts_of_a_field_follow_each_other_lowest_bits_first():
    values = jnp.asarray([0x1A5, 0x03C], jnp.uint32)
    assert pack_fields(values, 9).tolist() == [0xA5, 0x3C, 0b01]
    assert pack_fields(values, 12).tolist() == [0xA5, 0x3C, 0x01]


@pytest.mark.parametrize("width", [-1, 33])
def test_fields_refuse_other_widths(width):
    with pytest.raises(ValueError, match=f"width={width} must be"):
        pack_fields(jnp.zeros(3, jnp.uint32), width)


@pytest.mark.parametrize(
    ("bound", "terms", "words"), [(1, 1, 18), (1, 127, 18), (1, 128, 36), (7, 18, 18), (7, 19, 36), (127, 258, 36)]
)
@pytest.mark.parametrize("extreme", [False, True])
def test_sums_of_several_numbers_in_a_word(bound, terms, words, extreme):
    """Exact, also where all are of the largest magnitude, of either sign."""
    x = np.random.default_rng(terms).integers(-bound, bound + 1, (terms, 3, 72))
    if extreme:
        x[:] = np.where(np.arange(72) % 2, bound, -bound)
    total = sum(pack_terms(jnp.asarray(row, jnp.int8), bound, terms) for row in x)
    assert (total.dtype, total.shape) == (jnp.uint32, (3, words))
    np.testing.assert_array_equal(unpack_sum(total, bound, terms), x.sum(0))


def test_a_number_has_a_word_where_no_two_fit():
    words = pack_terms(jnp.asarray([127, -127, 0, 1], jnp.int8), 127, 40_000) * jnp.uint32(40_000)
    np.testing.assert_array_equal(unpack_sum(words, 127, 40_000), [127 * 40_000, -127 * 40_000, 0, 40_000])


@pytest.mark.parametrize(("platform", "sent"), [("cpu", 1500), ("gpu", 1500), ("tpu", 2048)])
def test_a_gather_fills_whole_tiles_on_tpus(platform, sent, monkeypatch):
    monkeypatch.setattr(collectives, "platform", lambda: platform)
    told = []

    def worker(x):
        got, bits = collectives.Wire("data").gather(x)
        told.append(bits)
        return got

    x = np.random.default_rng(0).integers(0, 256, (3, 1500), np.uint8)
    np.testing.assert_array_equal(jax.vmap(worker, axis_name="data")(x)[1], x)
    assert told == [2 * 8 * sent]


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int32])
def test_bytes_are_little_endian_and_round_trip(dtype):
    x = np.arange(12, dtype=dtype).reshape(3, 4)
    np.testing.assert_array_equal(to_bytes(jnp.asarray(x)), np.frombuffer(x.tobytes(), np.uint8))
    np.testing.assert_array_equal(from_bytes(to_bytes(jnp.asarray(x)), (3, 4), dtype), x)


@hypothesis.given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), size=st.integers(1, 20))
def test_buckets_round_trip(shape, size):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    rows = views.buckets(jnp.asarray(x), size)
    assert rows.shape == (-(-x.size // size), size)
    assert np.count_nonzero(rows) == x.size
    np.testing.assert_array_equal(views.from_buckets(rows, x.shape), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_powers_are_exact_at_all_magnitudes(dtype):
    info = np.finfo(dtype)
    x = np.array(
        [info.tiny, 1.5e-30, 0.75, 1, 3, 1e30, info.max / 4, info.max / 2.5, info.max, 0, np.inf, np.nan], dtype
    )
    with jax.enable_x64(dtype == np.float64):
        down = np.asarray(jax.jit(views.inverse_power)(x))
    assert down.dtype == dtype
    assert ((x[:8] * down[:8] >= 1) & (x[:8] * down[:8] < 2)).all()
    assert 2 <= x[8] * down[8] < 4
    assert (np.frexp(down)[0] == 0.5).all()
    np.testing.assert_array_equal(x[9:] * down[9:], [0, np.inf, np.nan])


def test_threefry_is_jaxs():
    key = jax.random.key_data(jax.random.key(7))
    counts = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    ours = jnp.concatenate(threefry2x32(key, jnp.asarray(counts[:1000]), jnp.asarray(counts[1000:])))
    np.testing.assert_array_equal(ours, jax.extend.random.threefry_2x32(key, jnp.asarray(counts)))


def test_uniform_numbers():
    u = np.asarray(uniform23(jax.random.key(1), 500, 512), np.float64)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    np.testing.assert_array_equal(u * 2**24 % 2, 1)  # the middles of 2^23 intervals
    n = u.size
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * n)
    counts = np.histogram(u, 256, (0, 1))[0]
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 4 * np.sqrt(2 * 255)
    # Numbers of other rows, columns and keys do not go together.
    quarters = u.reshape(500, 4, 128)
    for i in range(4):
        for j in range(i):
            assert abs(correlation(quarters[:, i], quarters[:, j])) < 4 / np.sqrt(n / 4)
    for step in (1, 2, 3):
        assert abs(correlation(u[:, :-step], u[:, step:])) < 4 / np.sqrt(n)
        assert abs(correlation(u[:-step], u[step:])) < 4 / np.sqrt(n)
    keys = [step_key(0, 0), step_key(0, 1), step_key(1, 0), jax.random.fold_in(step_key(0, 0), 1)]
    each = [np.asarray(uniform23(key, 500, 512), np.float64) for key in keys]
    for i in range(4):
        for j in range(i):
            assert abs(correlation(each[i], each[j])) < 4 / np.sqrt(n)
    assert len(np.unique(uniform23(jax.random.key(2), 8, 512))) > 4090


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def draw(key, *of):
    """Of one key, for each n and k."""
    sizes, counts = of[::2], of[1::2]
    return distinct(jnp.broadcast_to(jax.random.key_data(key), (len(sizes), 2)), sizes, counts)


@pytest.mark.parametrize("n", [*range(1, 10), 97, 1000, 65_537])
def test_distinct_of_all_is_a_permutation(n):
    (drawn,) = draw(step_key(3, n), n, n)
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(drawn), np.arange(n))


def many(n, k, draws):
    keys = jax.vmap(lambda step: step_key(0, step))(jnp.arange(draws))
    return np.asarray(jax.jit(jax.vmap(lambda key: draw(key, n, k)[0]))(keys))


def excess(counts, expected_variance=1.0):
    """Chi-square of counts that should be equal, in standard deviations above its mean."""
    counts = np.asarray(counts, np.float64)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / expected_variance
    return (chi_square - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize("n", [2, 3, 5, 7, 16])
def test_distinct_numbers_are_uniform_alone_and_in_pairs(n):
    drawn = many(n, 2, 30_000)
    pairs = np.bincount(drawn[:, 0] * n + drawn[:, 1], minlength=n * n).reshape(n, n)
    assert not pairs.diagonal().any()
    assert excess(pairs[~np.eye(n, dtype=bool)]) < 4
    for place in (0, 1):
        assert excess(np.bincount(drawn[:, place], minlength=n)) < 4


def test_which_numbers_are_included_is_uniform():
    n, k = 500, 50
    drawn = many(n, k, 4000)
    # Drawn without replacement, counts spread less.
    assert abs(excess(np.bincount(drawn.ravel(), minlength=n), 1 - k / n)) < 5
    # Numbers that follow each other keep no distance.
    assert excess(np.bincount(((drawn[:, 1:] - drawn[:, :-1]) % n).ravel(), minlength=n)[1:]) < 5


@pytest.mark.parametrize("n", [2**31 - 1, 2**30])
def test_distinct_of_the_largest_ranges(n):
    drawn = np.asarray(draw(step_key(1, 2), n, 20_000)[0])
    assert len(np.unique(drawn)) == 20_000
    assert 0 <= drawn.min() < n / 1000
    assert n - n / 1000 < drawn.max() < n
    assert excess(np.histogram(drawn, 100, (0, n))[0]) < 5


def test_distinct_of_several_are_those_of_each():
    """In one loop, of which the last to fall inside decides the length."""
    sizes, counts = (1000, 7, 1, 65_537), (100, 7, 0, 3)
    words = jax.vmap(lambda step: jax.random.key_data(step_key(5, step)))(jnp.arange(4))
    together = jax.jit(lambda words: distinct(words, sizes, counts))(words)
    for got, word, n, k in zip(together, words, sizes, counts, strict=True):
        np.testing.assert_array_equal(got, distinct(word[None], [n], [k])[0])


def test_distinct_refuses():
    assert draw(step_key(0, 0), 5, 0)[0].shape == (0,)
    for n, k, message in ((0, 0, "n=0"), (2**31, 1, "n=2147483648"), (3, 4, "k=4"), (3, -1, "k=-1")):
        with pytest.raises(ValueError, match=f"{message} must be from"):
            draw(step_key(0, 0), 5, 2, n, k)


@every_context
@pytest.mark.parametrize("own", [False, True])
def test_distinct_in_every_context(context, own):
    def worker(i):
        return draw(step_key(0, i if own else 7), 1000, 100)[0][None]

    steps = jnp.arange(4)
    spec = jax.sharding.PartitionSpec("data")
    got = {
        "vmap": lambda: jax.vmap(worker)(steps),
        "pmap": lambda: jax.pmap(worker, devices=jax.devices()[:4])(steps),
    }.get(context) or jax.jit(
        lambda: jax.shard_map(
            lambda i: worker(i[0] if own else 0),
            mesh=gc.make_mesh(4),
            in_specs=spec,
            out_specs=spec if own else jax.sharding.PartitionSpec(),  # checked: known to be the same
            check_vma=context == "checked",
        )(steps)
    )
    rows = np.asarray(got()).reshape(-1, 100)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, draw(step_key(0, i if own else 7), 1000, 100)[0])


@pytest.mark.parametrize("on_cpus", [True, False])
def test_a_window_is_added_where_it_lies(on_cpus, monkeypatch):
    """Inside, over either end, and beyond it; by places on CPUs, elsewhere by a slice."""
    monkeypatch.setattr(views, "on_cpus", lambda: on_cpus)
    y, window = jnp.ones((2, 7)), jnp.arange(1.0, 7.0).reshape(2, 3)
    add = jax.jit(lambda start: views.add_window(y, window, start))  # compiled anew, for this platform
    for start in (-20, -3, -2, 0, 3, 4, 5, 6, 7, 20):
        expected = np.array(y)
        for place in range(3):
            if 0 <= start + place < 7:
                expected[:, start + place] += window[:, place]
        np.testing.assert_array_equal(add(jnp.int32(start)), expected, err_msg=str(start))
