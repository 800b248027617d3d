"""A model in Haiku, with batch statistics as the step's model state and dropout by the step's key.

python examples/haiku_model.py
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradcomp_jax as gcj

jax.config.update("jax_num_cpu_devices", 4)  # the CPU stands for four devices; leave it out where there are some


@hk.transform_with_state
def network(images, train):
    """A perceptron, with batch normalisation and dropout."""
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(hk.Linear(256)(images), is_training=train)
    x = jax.nn.relu(x)
    return hk.Linear(10)(hk.dropout(hk.next_rng_key(), 0.2, x) if train else x)


def loss_fn(params, state, batch, key):
    """The loss on one worker's part of the batch, and the next batch statistics."""
    logits, state = network.apply(params, state, key, batch["image"], train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), state


def main():
    """Trains for 60 steps."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    params, state = network.init(jax.random.key(0), jnp.zeros((1, 64)), train=True)
    tx = optax.chain(gcj.qsgd(bits=4, min_size=1000), optax.adam(2e-3))
    step, opt_state = gcj.train_step(loss_fn, tx, has_state=True, rng=True), gcj.init(tx, params)
    for i in range(60):
        rows = np.random.default_rng(i).integers(len(images), size=128)
        batch, key = {"image": images[rows], "label": labels[rows]}, jax.random.key(i)
        params, opt_state, state, loss = step(params, opt_state, state, batch, key)
        if i % 10 == 9:
            print(f"step {i}: loss {loss:.3f}, {gcj.wire_bits(opt_state).last / 8e3:.1f} kB sent by each worker")
    logits, _ = network.apply(*jax.device_get((params, state)), None, images, train=False)
    print(f"{np.mean(np.argmax(logits, -1) == labels):.1%} of all images right")


if __name__ == "__main__":
    main()
