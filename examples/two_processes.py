"""Two processes, each with data of its own, as two machines would run it.

python examples/two_processes.py                                               # starts both here
python examples/two_processes.py --coordinator=HOST:PORT --process=0           # on the first of two machines
python examples/two_processes.py --coordinator=HOST:PORT --process=1           # on the second
"""

import argparse
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


def train(process):
    """What each process runs: the same program, with its own half of the images."""
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)[process::2]
    labels = digits.target.astype(np.int32)[process::2]
    rng = np.random.default_rng(0)  # of one seed, as the parameters must be the same in each process
    sizes = {"first": (64, 256), "second": (256, 10)}
    params = {name: (rng.standard_normal(size) * 0.1).astype(np.float32) for name, size in sizes.items()}
    tx = optax.chain(gcj.onebit(), optax.sgd(0.1, momentum=0.9))
    params = gcj.place(params)  # on the devices of all processes
    step, opt_state = gcj.train_step(loss_fn, tx), gcj.init(tx, params)
    for i in range(60):
        rows = np.random.default_rng(i).integers(len(images), size=64)
        batch = gcj.shard_batch({"image": images[rows], "label": labels[rows]})  # one batch of both processes' rows
        params, opt_state, loss = step(params, opt_state, batch)
        if i % 10 == 9 and process == 0:
            print(
                f"step {i}: loss {loss:.3f}, {gcj.wire_bits(opt_state).last / 8e3:.1f} kB sent by each worker",
                flush=True,
            )


def main():
    """Joins the other process and trains; without arguments starts both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", help="address of the first process")
    parser.add_argument("--process", type=int, help="0 or 1")
    args = parser.parse_args()
    if args.coordinator is None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        both = [
            subprocess.Popen([sys.executable, __file__, f"--coordinator={address}", f"--process={k}"]) for k in (0, 1)
        ]
        sys.exit(max(process.wait() for process in both))
    jax.distributed.initialize(args.coordinator, num_processes=2, process_id=args.process)
    train(args.process)


if __name__ == "__main__":
    main()
