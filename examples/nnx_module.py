"""A convolutional network in Flax NNX: `train_step` takes the module and its optimiser, and changes both in place.

python examples/nnx_module.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import gradcomp_jax as gcj

jax.config.update("jax_num_cpu_devices", 4)  # the CPU stands for four devices; leave it out where there are some


class Network(nnx.Module):
    """Two convolutions, with batch normalisation and dropout."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.second(nnx.relu(self.norm(self.first(images)))))
        return self.head(self.drop(x.reshape(len(x), -1)))


def loss_fn(model, batch):
    """The loss on one worker's part of the batch, and how many answers were right."""
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, jnp.sum(jnp.argmax(logits, -1) == batch["label"])


def main():
    """Trains for 60 steps."""
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(gcj.topk(fraction=0.05), optax.adam(2e-3)), wrt=nnx.Param)
    step = gcj.train_step(loss_fn, optimizer.tx, has_aux=True)
    for i in range(60):
        rows = np.random.default_rng(i).integers(len(images), size=128)
        loss, right = step(model, optimizer, {"image": images[rows], "label": labels[rows]})
        if i % 10 == 9:
            sent = gcj.wire_bits(optimizer.opt_state).last / 8e3
            print(f"step {i}: loss {loss:.3f}, {right} of 128 right, {sent:.1f} kB sent by each worker")


if __name__ == "__main__":
    main()
