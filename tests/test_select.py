"""Places of the true and of the largest, against numpy, on what the shortcuts must not fall for."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gradcomp_jax as gc
from gradcomp_jax import select
from tests.marks import every_context

N = 80_000  # so many go by the sample for k = 1 and 1000, for k = N - 1 by the search
assert N > select.SMALL

positions = jax.jit(select.positions, static_argnums=1)


def check(x, k, got=None):
    key = np.where(np.isnan(x), np.inf, np.abs(x.astype(np.float64)))
    expected = np.lexsort((np.arange(x.size), -key))[:k]
    np.testing.assert_array_equal(np.sort(select.largest(x, k) if got is None else got), np.sort(expected))


@hypothesis.given(n=st.sampled_from([32, 200]), fraction=st.sampled_from([0, 0.1, 1]), size=st.sampled_from([0, 250]))
def test_positions_are_those_of_the_true(n, fraction, size):
    mask = np.random.default_rng(n).random(n) < fraction
    true = np.flatnonzero(mask)
    got = np.asarray(positions(mask, size))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, np.concatenate([true, np.full(size, n)])[:size])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_words_hold_bits_in_order_along_an_axis(axis):
    mask = np.random.default_rng(0).random((3, 70, 33)) < 0.5
    words = np.asarray(select.bit_words(jnp.asarray(mask), axis))
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    n = mask.shape[axis]
    np.testing.assert_array_equal(bits[..., :n], np.moveaxis(mask, axis, -1))
    assert not bits[..., n:].any()


def test_positions_of_nothing():
    assert positions(np.zeros(0, bool), 3).tolist() == [0, 0, 0]


def vectors():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=N)
    periodic = rng.normal(size=N) * 0.01
    periodic[:: select.STRIDE] += 10  # all that the sample sees is large
    hidden = rng.normal(size=N)
    hidden[:: select.STRIDE] = 0  # all that the sample sees is zero
    infinite = normal.copy()
    infinite[rng.permutation(N)[:5]] = [np.nan, -np.nan, np.inf, -np.inf, np.nan]
    sparse = np.where(rng.random(N) < 0.0005, normal, 0)
    return {
        "normal": normal,
        "constant": np.full(N, -3.0),
        "zeros": np.where(rng.random(N) < 0.5, 0.0, -0.0),
        "ties": np.round(normal, 1),
        "two values": np.where(rng.random(N) < 0.5, 1.0, -2.0),
        "heavy tails": rng.standard_cauchy(N) ** 3,
        "rising": np.arange(N),
        "falling": -np.arange(N)[::-1],
        "periodic": periodic,
        "hidden": hidden,
        "mostly zero": sparse,
        "not finite": infinite,
        "all NaN": np.full(N, np.nan),
        "subnormal": normal * 1e-40,
        "one layer small": np.concatenate([normal[: N // 2] * 1e-6, normal[N // 2 :]]),
    }


@pytest.mark.parametrize("name", vectors())
def test_largest_are_numpys(name):
    for k in (1, 1000, N - 1):
        check(vectors()[name].astype(np.float32), k)


@hypothesis.given(
    sizes=st.sampled_from([(1, 1), (33, 5), (300, 300)]), levels=st.integers(1, 50), seed=st.integers(0, 99)
)
def test_largest_of_few_values(sizes, levels, seed):
    n, k = sizes
    check(np.random.default_rng(seed).integers(-levels, levels + 1, n).astype(np.float32), k)


def test_the_sample_suffices_but_where_it_misleads(monkeypatch):
    monkeypatch.setattr(select.lax, "cond", lambda enough, *rest: enough)
    enough = jax.jit(lambda x: select.largest.__wrapped__(x, 1000))  # traced anew
    misled = {name for name, x in vectors().items() if not enough(x.astype(np.float32))}
    # Numbers below the smallest normal one may compare as zeros.
    assert misled == {"periodic", "hidden", "subnormal"}


def test_refusals():
    assert select.largest(jnp.ones(3), 0).shape == (0,)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"k={k} must be from 0 to 3"):
            select.largest(jnp.ones(3), k)


@every_context
def test_every_context_gives_the_same(context):
    names = ("normal", "periodic", "not finite", "zeros")  # both branches at once
    x = np.stack([vectors()[name] for name in names]).astype(np.float32)
    run = {
        "vmap": lambda f: jax.vmap(f),
        "pmap": lambda f: jax.pmap(f, devices=jax.devices()[:4]),
    }.get(context) or (
        lambda f: jax.shard_map(
            lambda x: f(x[0])[None],
            mesh=gc.make_mesh(4), in_specs=P("data"), out_specs=P("data"), check_vma=context == "checked",
        )
    )  # fmt: skip
    got = jax.jit(run(lambda x: select.largest(x, 60)))(x)
    for row, out in zip(x, got, strict=True):
        check(row, 60, out)
