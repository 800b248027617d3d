"""Two slices, or nodes, of two chips each: `across` compresses what goes between them, in shards of each chip.

python examples/two_slices.py
"""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradcomp_jax as gcj

jax.config.update("jax_num_cpu_devices", 4)  # the CPU stands for four devices; leave it out where there are some


def loss_fn(params, batch):
    """The loss on one chip's part of the batch."""
    hidden = jax.nn.relu(batch["image"] @ params["first"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["second"], batch["label"]).mean()


def main():
    """Trains for 60 steps, and tells what each chip sent over the slow and the fast links."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    sizes = {"first": (64, 256), "second": (256, 10)}
    params = {name: (rng.standard_normal(size) * 0.1).astype(np.float32) for name, size in sizes.items()}
    mesh = gcj.make_mesh({"slice": 2, "chip": 2})
    codec = gcj.qsgd(bits=4, min_size=0, error_feedback=True)
    tx = optax.chain(gcj.across(codec, slow="slice", fast="chip"), optax.adam(2e-3))
    step, opt_state = gcj.train_step(loss_fn, tx, mesh), gcj.init(tx, params, mesh)
    for i in range(60):
        rows = np.random.default_rng(i).integers(len(images), size=128)
        params, opt_state, loss = step(params, opt_state, {"image": images[rows], "label": labels[rows]})
        if i % 10 == 9:
            between, inside = (gcj.wire_bits(opt_state, link).last / 8e3 for link in ("between", "inside"))
            print(f"step {i}: loss {loss:.3f}; a chip sent {between:.1f} kB between slices, {inside:.1f} kB inside")


if __name__ == "__main__":
    main()
