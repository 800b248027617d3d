"""Settings are Python's own, whatever numbers they are given as; seeds count with all their bits."""

import jax
import numpy as np
import optax
import pytest
from absl import flags

import gradcomp_jax as gc
from experiments import training
from gradcomp_jax.random import step_key
from gradcomp_jax.testing import trees
from tests.test_refusals import refuses

# Each factory's numbers and truth values, as numpy has them.
SETTINGS = {
    "cast": {"dtype": np.str_("float16"), "error_feedback": np.True_},
    "none": {"min_size": np.int64(3), "allow_dense": np.True_},
    "powersgd": {"rank": np.int64(2), "min_rate": np.float64(1.5), "refresh": np.int8(3), "error_feedback": np.True_},
    "qsgd": {"bits": np.int64(4), "bucket_size": np.int16(64), "levels": np.uint8(5), "shared_scale": np.False_},
    "onebit": {"axis": np.int64(-1), "second_residual": np.True_},
    "signnorm": {"majority": np.True_},
    "topk": {"fraction": np.float32(0.25), "min_size": np.int64(0)},
    "float4": {"bucket_size": np.int64(64)},
    "adaptive": {"proportion": np.int64(16), "capacity": np.float32(2), "sample": np.True_},
    "randomk": {"fraction": np.float64(0.1)},
    "randomblock": {"rank": np.array(2)},
    "gradiveq": {"k": np.int64(30), "ratio": np.int64(5), "train_steps": np.int64(8), "max_loss": np.float32(0.25)},
}
SEEDED = {
    "powersgd": lambda seed: gc.powersgd(2, seed=seed, refresh=1),
    "qsgd": lambda seed: gc.qsgd(2, seed=seed, min_size=0),
    "adaptive": lambda seed: gc.adaptive(seed=seed, sample=True),
    "randomk": lambda seed: gc.randomk(0.1, seed=seed),
    "randomblock": lambda seed: gc.randomblock(0.1, seed=seed),
    "hadamard": lambda seed: gc.transformed(gc.qsgd(2, min_size=0), "hadamard", seed=seed),
    "accordion": lambda seed: gc.accordion(*(gc.qsgd(b, seed=seed, min_size=0) for b in (4, 2)), interval=2),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_numpy(name):
    given = SETTINGS[name] | {"seed": np.int64(3)}
    codec = gc.CODECS[name](**given)
    assert codec == gc.CODECS[name](**{key: value.item() for key, value in given.items()})
    assert "np." not in repr(codec)
    assert "array" not in repr(codec)


def test_settings_of_numpy_for_chunks():
    codec = gc.topk(chunk=np.int64(64), k=np.uint8(8), bits=np.int32(2), levels=np.str_("sigma"))
    assert codec == gc.topk(chunk=64, k=8, bits=2, levels="sigma")
    assert "np." not in repr(codec)


def test_settings_of_numpy_around_codecs():
    numpys = {"interval": np.int64(3), "window": np.int64(2), "threshold": np.float32(0.5), "per_layer": np.True_}
    one, other = (
        gc.accordion(gc.powersgd(2), gc.powersgd(1), **given)
        for given in (numpys, {key: value.item() for key, value in numpys.items()})
    )
    assert one == other
    assert "np." not in repr(one)
    assert type(gc.Feedback(np.float32(0.5)).decay) is float
    assert gc.transformed(gc.topk(0.1), "dct", np.int64(8)) == gc.transformed(gc.topk(0.1), "dct", 8)
    params = trees.zeros({"w": (8, 4)})
    assert jax.tree.leaves(gc.init(gc.topk(0.5), params, np.int64(3)).residual)[0].shape == (3, 8, 4)
    step = gc.simulate(lambda p, x: (p["w"].mean() * x).mean(), gc.topk(0.5), np.int64(3))
    step.lower(params, gc.init(gc.topk(0.5), params, 3), np.ones(6, np.float32))


def drawn(codec):
    grads = trees.noise({"w": (64, 40), "v": (16, 16)}, 0, (2,))
    worker = lambda g, state: codec.update(g, state)[0]  # noqa: E731
    one = jax.tree.map(lambda x: x[0], grads)
    return jax.tree.leaves(jax.jit(jax.vmap(worker, (0, None), axis_name="data"))(grads, codec.init(one)))


@pytest.mark.parametrize("make", SEEDED.values(), ids=SEEDED)
def test_seeds_count_with_all_their_bits(make):
    outcomes = [drawn(make(seed)) for seed in (7, 7 + 2**32, 7 - 2**32, 7 + 2**62)]
    for i, one in enumerate(outcomes):
        assert not any(np.array_equal(one[0], other[0]) for other in outcomes[:i])


def test_small_seeds_are_as_jax_takes_them():
    for seed in (0, 7, 2**32 - 1):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 3)
        assert np.array_equal(jax.random.key_data(step_key(seed, 3)), jax.random.key_data(key))


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, "a", True, None])
@pytest.mark.parametrize("codec", [*gc.CODECS.values(), lambda **seed: gc.transformed(gc.topk(0.1), "dct", **seed)])
def test_what_is_no_seed(codec, seed):
    with refuses(f"seed={seed!r} must be a whole number from -2^63 to 2^63 - 1"):
        codec(seed=seed)


def test_seeds_of_runs_have_the_bits_that_jax_takes():
    """Flax and `jax.random.key` drop those above 32."""
    with pytest.raises(flags.IllegalFlagValueError, match=r"--seed=4294967296.*\[0, 4294967295\]"):
        training.FLAGS["seed"].parse(str(2**32))


def test_momentum_by_a_schedule():
    tx = optax.inject_hyperparams(gc.ef_momentum)(optax.linear_schedule(0.0, 0.5, 1))
    params = {"w": np.ones(3, np.float32)}
    state = tx.init(params)
    for expected in (2.0, 2.5):
        updates, state = jax.jit(tx.update)(params, state)
        np.testing.assert_allclose(updates["w"], expected)
