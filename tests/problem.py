"""A small regression that the tests of whole steps train on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

WORKERS = 4


def params():
    rng = np.random.default_rng(0)
    return {
        "layer1": {"kernel": jnp.asarray(rng.standard_normal((64, 64)) * 0.15, jnp.float32), "bias": jnp.zeros(64)},
        "layer2": {"kernel": jnp.asarray(rng.standard_normal((64, 8)) * 0.15, jnp.float32), "bias": jnp.zeros(8)},
    }


def predict(params, x):
    hidden = jnp.tanh(x @ params["layer1"]["kernel"] + params["layer1"]["bias"][None])
    return hidden @ params["layer2"]["kernel"] + params["layer2"]["bias"][None]


def loss_fn(params, batch):
    return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2)


def batches(steps, size=32):
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((64, 8)) * 0.5
    for _ in range(steps):
        x = rng.standard_normal((size, 64))
        yield {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(np.tanh(x @ truth), jnp.float32)}


def optimizer(codec):
    return optax.chain(codec, optax.sgd(0.05, momentum=0.9))


def dense_training(steps):
    """Plain jax on the whole batch: what workers without compression must reproduce."""
    tx = optax.sgd(0.05, momentum=0.9)
    p = params()
    state = tx.init(p)
    for batch in batches(steps):
        updates, state = tx.update(jax.grad(loss_fn)(p, batch), state, p)
        p = optax.apply_updates(p, updates)
    return p
