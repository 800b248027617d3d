"""A run of four workers is killed, and goes on with two: `restore` keeps what the residuals of all four still owe.

python examples/fewer_workers.py
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import gradcomp_jax as gcj


def loss_fn(params, batch):
    """The loss on one worker's part of the batch."""
    hidden = jax.nn.relu(batch["image"] @ params["first"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["second"], batch["label"]).mean()


def train(directory, until, dies):
    """Goes on from the last checkpoint, if there is one; dies without a warning, or ends, after so many steps."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    sizes = {"first": (64, 256), "second": (256, 10)}
    params = {name: (rng.standard_normal(size) * 0.1).astype(np.float32) for name, size in sizes.items()}
    tx = optax.chain(gcj.topk(fraction=0.05), optax.adam(2e-3))
    step, run, first = gcj.train_step(loss_fn, tx), {"params": params, "opt_state": gcj.init(tx, params)}, 0
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(save_interval_steps=10)) as manager:
        if manager.latest_step() is not None:
            run, first = gcj.restore(directory, run), manager.latest_step() + 1
            print(f"goes on at step {first} with {jax.device_count()} workers", flush=True)
        for i in range(first, until):
            rows = np.random.default_rng(i).integers(len(images), size=128)
            batch = {"image": images[rows], "label": labels[rows]}
            params, opt_state, loss = step(run["params"], run["opt_state"], batch)
            run = {"params": params, "opt_state": opt_state}
            manager.save(i, args=ocp.args.StandardSave(run))
            if i % 10 == 9:
                print(f"step {i}: loss {loss:.3f}", flush=True)
        if dies:
            manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    """Starts a run with four workers that dies, and one with two that goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, metavar=("DIRECTORY", "WORKERS"), help="one run, by so many workers")
    args = parser.parse_args()
    if args.run:
        jax.config.update("jax_num_cpu_devices", int(args.run[1]))  # the CPU stands for so many devices
        train(args.run[0], until=60, dies=False) if args.run[1] == "2" else train(args.run[0], until=35, dies=True)
        return
    with tempfile.TemporaryDirectory() as directory:
        killed = subprocess.run([sys.executable, __file__, "--run", directory, "4"])
        print(f"the run of four workers ended by signal {-killed.returncode}", flush=True)
        subprocess.run([sys.executable, __file__, "--run", directory, "2"], check=True)


if __name__ == "__main__":
    main()
