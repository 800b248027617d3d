"""The experiments' learning rates and optimisers, against the recipes of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optimizers
from gradcomp_jax import none, simulate
from gradcomp_jax.sharding import init

STEPS = 100  # an epoch


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        yield


def rates(schedule, epochs):
    return [float(schedule(round(STEPS * epoch))) for epoch in epochs]


def test_powersgd_scales_linearly_in_five_epochs_and_falls_tenfold_twice():
    """Its code: lr (1 + (W - 1) min(epoch / 5, 1)), a tenth at 150 and 250 of 300 epochs; W = 16."""
    schedule = optimizers.schedule("step", 0.1, 16, STEPS, 300, 5, [150, 250])
    epochs = [0, 1, 2.5, 5, 100, 149.99, 150.01, 249.99, 250.01, 299]
    expected = [0.1, 0.4, 0.85, 1.6, 1.6, 1.6, 0.16, 0.16, 0.016, 0.016]
    np.testing.assert_allclose(rates(schedule, epochs), expected, rtol=1e-6)


def test_without_warm_up_the_rate_is_at_its_highest_at_once():
    assert rates(optimizers.schedule("step", 0.1, 4, STEPS, 10, 0, []), [0, 9]) == pytest.approx([0.4, 0.4])


def test_the_cosine_rises_from_zero_and_ends_there():
    schedule = optimizers.schedule("cosine", 0.1, 4, STEPS, 10, 2, [150])
    expected = [0, 0.2, 0.4, 0.2, 0]
    np.testing.assert_allclose(rates(schedule, [0, 1, 2, 6, 10]), expected, atol=1e-7)


@pytest.mark.parametrize("warmup", [1, 4])
def test_a_training_no_longer_than_its_warm_up_ends_within_it(warmup):
    schedule = optimizers.schedule("cosine", 0.1, 4, STEPS, 1, warmup, [])
    np.testing.assert_allclose(rates(schedule, [0, 0.5, 1]), [0, 0.2 / warmup, 0.4 / warmup], atol=1e-7)


def trained(name, steps=3):
    """A kernel and a bias of ones, after steps with a gradient of 0.5."""
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = optimizers.optimizer(name, none(), optax.constant_schedule(0.1), 0.9, 0.2)
    step = simulate(lambda p, batch: 0.5 * sum(jnp.sum(x) for x in jax.tree.leaves(p)), tx, 2)
    opt_state = init(tx, params, 2)
    for _ in range(steps):
        params, opt_state, _ = step(params, opt_state, jnp.zeros(2))
    assert len(set(np.asarray(params["kernel"]).ravel())) == len(set(np.asarray(params["bias"]))) == 1
    return float(params["kernel"][0, 0]), float(params["bias"][0])


@pytest.mark.parametrize("name", ["sgd", "ef_momentum"])
def test_momentum_and_decay_are_those_of_the_recipe(name):
    """Heavy ball steps by m, PowerSGD's Algorithm 2 by D + m; decay is in D, and of the kernel alone."""
    expected = []
    for decay in (0.2, 0.0):
        x, m = 1.0, 0.0
        for _ in range(3):
            d = 0.5 + decay * x
            m = 0.9 * m + d
            x -= 0.1 * (d + m if name == "ef_momentum" else m)
        expected.append(x)
    assert trained(name) == pytest.approx(expected, rel=1e-6)


def test_adagrad_divides_by_the_root_of_all_squares_before_momentum():
    """1-bit SGD, section 3.4: h += g^2, g / (sqrt(h) + eps); decay is apart from it, and of the kernel."""
    expected = []
    for decay in (0.2, 0.0):
        x, m, h = 1.0, 0.0, 0.0
        for _ in range(3):
            h += 0.5**2
            m = 0.9 * m + 0.5 / (h**0.5 + 1e-7) + decay * x
            x -= 0.1 * m
        expected.append(x)
    assert trained("adagrad") == pytest.approx(expected, rel=1e-6)


def test_adagrad_takes_gradients_of_zero_and_damps_those_below_eps():
    tx = optimizers.scale_by_adagrad(eps=1e-3)
    grads = {"w": jnp.array([0.0, 1e-6, 1.0])}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["w"], [0, 1e-6 / (1e-6 + 1e-3), 1 / 1.001], rtol=1e-4)


def test_adam_decays_apart_from_the_gradient():
    """A constant gradient makes adam step by the learning rate; decoupled decay takes lr 0.2 x more of the kernel."""
    kernel, bias = trained("adam", steps=1)
    assert bias == pytest.approx(1 - 0.1, rel=1e-5)
    assert kernel == pytest.approx(1 - 0.1 - 0.1 * 0.2, rel=1e-5)
