"""Auxiliary outputs: averaged, summed exactly, or each worker's own."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradcomp_jax as gc
from gradcomp_jax import beside
from tests.table import BY_ID
from tests.test_refusals import refuses

PARAMS = {"w": np.ones((16, 8), np.float32)}
BATCH = {"x": np.arange(8 * 16.0, dtype=np.float32).reshape(8, 16), "n": np.arange(8, dtype=np.int32)}
KINDS = ("sharded", "unchecked", "simulated")


def outputs(aux_fn, kind, reduce_aux=None, workers=2, codec=None):
    loss_fn = lambda p, b: (jnp.mean(b["x"] @ p["w"]), aux_fn(b))  # noqa: E731
    tx = optax.chain(codec or gc.none(), optax.sgd(0.1))
    if kind == "simulated":
        where, step = workers, gc.simulate(loss_fn, tx, workers, has_aux=True, reduce_aux=reduce_aux)
    else:
        where = gc.make_mesh(workers)
        checked = kind == "sharded"
        step = gc.train_step(loss_fn, tx, where, has_aux=True, reduce_aux=reduce_aux, check_vma=checked)
    return step(PARAMS, gc.init(tx, PARAMS, where), BATCH)[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_by_type(kind):
    """Floats are averaged, whole numbers and truth values summed."""
    aux = lambda b: {"mean": jnp.mean(b["x"]), "count": jnp.sum(b["n"] > 2), "any": jnp.any(b["n"] == 7)}  # noqa: E731
    got = outputs(aux, kind)
    np.testing.assert_allclose(got["mean"], BATCH["x"].mean(), rtol=1e-6)
    assert got["count"] == 5
    assert got["any"] == 1
    assert {got[name].dtype for name in ("count", "any")} == {jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("kind", KINDS)
def test_by_word(kind):
    aux = lambda b: {"rows": b["x"][:, 0], "more": {"n": b["n"], "loss": jnp.mean(b["x"])}}  # noqa: E731
    got = outputs(aux, kind, {"rows": "workers", "more": "sum"})
    np.testing.assert_array_equal(got["rows"].reshape(-1), BATCH["x"][:, 0])
    assert got["rows"].shape == (2, 4)
    np.testing.assert_array_equal(got["more"]["n"], BATCH["n"].reshape(2, 4).sum(0))
    np.testing.assert_allclose(got["more"]["loss"], 2 * BATCH["x"].mean(), rtol=1e-6)
    whole = outputs(lambda b: b["n"], kind, "mean")
    np.testing.assert_array_equal(whole, BATCH["n"].reshape(2, 4).mean(0))
    np.testing.assert_array_equal(outputs(lambda b: b["n"], kind, "workers"), BATCH["n"].reshape(2, 4))


@pytest.mark.parametrize("id", ["topk", "qsgd-4", "accordion-powersgd", "powersgd-4"])
def test_whole_numbers_are_exact_in_every_way(id):
    """Beside codes, in a front, and as they are; with the bits of the largest, and beyond what float32 holds."""
    numbers = np.random.default_rng(0).integers(-(2**31), 2**31, (4, 3), np.int64).astype(np.int32)
    wide = lambda b: jnp.asarray(numbers)[b["n"][0] // 2]  # noqa: E731
    expected = numbers.astype(np.int64).sum(0).astype(np.int32)  # which wraps, as int32 does
    row = next(row for row in BY_ID.values() if row.id.startswith(id))
    np.testing.assert_array_equal(outputs(wide, "simulated", workers=4, codec=row.make()), expected)


@pytest.mark.parametrize("id", ["accordion-powersgd", "onebit", "powersgd-4"])
def test_what_is_of_another_type_does_not_widen_the_gradients(id):
    """It is sent, and counted, by itself where it cannot ride."""
    row = next(row for row in BY_ID.values() if row.id.startswith(id))
    bits = []
    for aux in (lambda b: jnp.float32(1), lambda b: jnp.complex64(1 + 2j)):
        tx = optax.chain(row.make(), optax.sgd(0.1))
        step = gc.simulate(lambda p, b, aux=aux: (jnp.mean(b["x"]) * jnp.sum(p["w"]), aux(b)), tx, 4, has_aux=True)
        params = {"w": np.ones((128, 16), np.float32)}
        _, state, _, got = step(params, gc.init(tx, params, 4), BATCH)
        bits.append(gc.wire_bits(state).last)
    np.testing.assert_allclose(got, 1 + 2j)
    assert 0 < bits[1] - bits[0] <= 96  # of a complex number, by the ring law, instead of a float


@pytest.mark.parametrize("workers", [1, 3, 64, 1000, 2**14])
@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int16, np.int32, np.uint32])
def test_sums_of_whole_numbers_from_means_of_floats(dtype, workers):
    info = (0, 1) if dtype is np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    rows = np.random.default_rng(1).integers(*info, (workers, 2), endpoint=True).astype(dtype)
    rows[:, 0] = info[1]
    pieces = [beside.sent(x, "sum", workers)[0] for x in (jnp.asarray(rows[0]), jnp.asarray(rows[-1]))]
    assert len(pieces[0]) <= 32
    sent = jax.vmap(lambda x: tuple(beside.sent(x, "sum", workers)[0]))(rows)
    means = [jnp.sum(piece, axis=0) * jnp.float32(1 / workers) for piece in sent]  # as XLA may divide
    got = beside.arrived(jnp.asarray(rows[0]), "sum", [means], workers, lambda x: x)
    np.testing.assert_array_equal(got, rows.sum(0, dtype=got.dtype))


def test_rows_of_the_batch_are_not_averaged_in_silence():
    with pytest.warns(UserWarning, match=r"\['rows'\] of shape \(4,\) has as many rows.*reduce_aux='workers'"):
        outputs(lambda b: {"rows": b["x"][:, 0]}, "simulated")
    keyed = {"a key for each worker": np.arange(2), **BATCH}
    with pytest.warns(UserWarning, match="as many rows"):
        beside.reductions(None, {"rows": jnp.ones(4)}, {np.shape(x)[0] // 2 for x in jax.tree.leaves(keyed)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs(lambda b: {"rows": b["x"][:, 0]}, "simulated", "mean")
        outputs(lambda b: {"classes": b["x"][0]}, "simulated")


def test_refusals():
    with refuses("reduce_aux has 'max'", "'workers'"):
        outputs(lambda b: b["n"], "simulated", "max")
    for how in (None, "sum"):
        with refuses("auxiliary output ['k'] is a random key", "reduce_aux='workers'"):
            outputs(lambda b: {"k": jax.random.key(0)}, "simulated", how)
    with refuses("must be a prefix of the auxiliary outputs"):
        outputs(lambda b: {"a": b["n"]}, "simulated", {"b": "sum"})
