"""A model in Equinox: its arrays are the parameters, the rest is put back inside the loss.

python examples/equinox_model.py
"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradcomp_jax as gcj

jax.config.update("jax_num_cpu_devices", 4)  # the CPU stands for four devices; leave it out where there are some


def main():
    """Trains for 60 steps."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    model = eqx.nn.MLP(64, 10, width_size=256, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        logits = jax.vmap(eqx.combine(params, static))(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    tx = optax.chain(gcj.powersgd(rank=2), optax.adam(2e-3))
    step, opt_state = gcj.train_step(loss_fn, tx), gcj.init(tx, params)
    for i in range(60):
        rows = np.random.default_rng(i).integers(len(images), size=128)
        batch = {"image": images[rows], "label": labels[rows]}
        params, opt_state, loss = step(params, opt_state, batch)
        if i % 10 == 9:
            print(f"step {i}: loss {loss:.3f}, {gcj.wire_bits(opt_state).last / 8e3:.1f} kB sent by each worker")
    model = eqx.combine(jax.device_get(params), static)
    right = np.mean(np.argmax(jax.vmap(model)(images), -1) == labels)
    print(f"{right:.1%} of all images right")


if __name__ == "__main__":
    main()
