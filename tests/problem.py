"""A small regression that the tests of whole steps train on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

WORKERS = 4
LEARNING_RATE = 0.05


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
    return optax.chain(codec, optax.sgd(LEARNING_RATE, momentum=0.9))


def history(step, params, state, steps):
    """(parameters, state) on the host, at the begin and after each step."""
    seen = [(params, state)]
    for batch in batches(steps):
        seen.append(step(*seen[-1], batch)[:2])
    return jax.device_get(seen)


def again(step, history, lies):
    """What a step makes of each (parameters, state) of a history but the last, laid on devices as `lies` does.

    So the rounding of another program has one step to grow in, whatever the codec makes of it.
    """
    for (before, after), batch in zip(itertools.pairwise(history), batches(len(history) - 1), strict=True):
        leaves, placed = jax.tree.leaves(before), jax.tree.leaves(lies)
        placed = [jax.device_put(x, like.sharding) for x, like in zip(leaves, placed, strict=True)]
        yield jax.device_get(step(*jax.tree.unflatten(jax.tree.structure(lies), placed), batch)[:2]), after


def dense_training(steps):
    """Plain jax on the whole batch: what workers without compression must reproduce."""
    tx = optax.sgd(0.05, momentum=0.9)
    p = params()
    state = tx.init(p)
    for batch in batches(steps):
        updates, state = tx.update(jax.grad(loss_fn)(p, batch), state, p)
        p = optax.apply_updates(p, updates)
    return p
