"""One of three workers is killed; the others go on without it, in the same processes.

python examples/lost_worker.py
"""

import logging
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradcomp_jax as gcj


def loss_fn(params, batch):
    """The loss on one worker's part of the batch."""
    hidden = jax.nn.relu(batch["image"] @ params["first"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["second"], batch["label"]).mean()


def train(address, process):
    """What each process runs. Process 2 kills itself meanwhile, as a machine would that loses its power."""
    logging.basicConfig(format="%(message)s")
    jax.config.update("jax_num_cpu_devices", 1)
    lifeline = gcj.initialize_elastic(address, num_processes=3, process_id=process)
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    sizes = {"first": (64, 256), "second": (256, 10)}
    params = gcj.place({name: (rng.standard_normal(size) * 0.1).astype(np.float32) for name, size in sizes.items()})
    tx = optax.chain(gcj.topk(fraction=0.05), optax.sgd(0.1, momentum=0.9))

    def make(mesh):
        """Makes the step for the workers that are left, and divides the rows among them."""
        step, (part, parts) = gcj.train_step(loss_fn, tx, mesh), gcj.share_of(mesh)

        def run(state, i):
            mine = np.array_split(np.random.default_rng(i).integers(len(images), size=192), parts)[part]
            batch = gcj.shard_batch({"image": images[mine], "label": labels[mine]}, mesh)
            params, opt_state, loss = step(state["params"], state["opt_state"], batch)
            return {"params": params, "opt_state": opt_state}, loss

        return run

    state = {"params": params, "opt_state": gcj.init(tx, params)}
    for i, _, loss in gcj.elastic(lifeline, make, state, range(60)):
        if i == 30 and process == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if i % 10 == 9 and process == 0:
            print(f"step {i}: loss {loss:.3f}, {len(lifeline.members)} workers", flush=True)


def main():
    """Starts the three processes."""
    if len(sys.argv) > 1:
        train(sys.argv[1], int(sys.argv[2]))
        return
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    all_of_them = [subprocess.Popen([sys.executable, __file__, address, str(k)]) for k in range(3)]
    print("the processes ended with", [process.wait() for process in all_of_them])


if __name__ == "__main__":
    main()
