"""Kills a worker of a run again and again, and measures when the others have done their next step.

    python -m experiments.survival --kills=30 --hosts=3
    python -m experiments.survival --kills=2 --out=/tmp/survival.jsonl

Each time real processes begin to train on this machine, and after a random time any of them but the first is killed by
kill -9. Then the survivors must do three more steps. Their results are compared, bit for bit, with those of fresh
processes, which begin with the survivors' rows and do the same steps. A table tells the seconds from the kill to the
end of the next step of the slowest survivor; a line of JSON for each kill goes to `--out`. The exit status is the
number of kills after which a bit differed or the next step took longer than `--within` seconds.
"""

import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from rich.table import Table
from sklearn.datasets import load_digits

import gradcomp_jax as gcj
from experiments import cluster, command, display
from gradcomp_jax.survivors import save_part

FLAGS = flags.FLAGS
AFTER = 3  # steps that the survivors do, and that are compared

flags.DEFINE_integer("kills", 30, "How many runs lose a worker.", lower_bound=1)
flags.DEFINE_integer("hosts", 3, "With how many processes each run begins.", lower_bound=3)
flags.DEFINE_float("moments", 3.0, "A worker is killed at a random time of so many seconds.", lower_bound=0)
flags.DEFINE_float("within", 15.0, "Seconds in which the next step should end.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Decides who is killed, and when.")
flags.DEFINE_string("out", None, "A file for lines of JSON, one for each kill.")
flags.DEFINE_string("folder", None, "For the processes that this program starts: where they write.")
flags.DEFINE_boolean("resized", False, "For the processes that this program starts: begin with the survivors' rows.")


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """The loss on one worker's rows."""
    hidden = jax.nn.relu(batch["image"] @ params["first"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["second"], batch["label"]).mean()


def worker(folder: pathlib.Path) -> None:
    """Trains as one of the processes of a run; writes down when steps end, and what it has around the first loss."""
    rank = FLAGS.process_id
    jax.config.update("jax_num_cpu_devices", 1)
    lifeline = gcj.initialize_elastic(FLAGS.coordinator_address, FLAGS.num_processes, rank)
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    sizes = {"first": (64, 256), "second": (256, 10)}
    params = gcj.place({name: (rng.standard_normal(size) * 0.1).astype(np.float32) for name, size in sizes.items()})
    tx = optax.chain(gcj.topk(fraction=0.05), optax.sgd(0.1, momentum=0.9))
    state = {"params": params, "opt_state": gcj.init(tx, params), "step": 0}
    if FLAGS.resized:
        state = gcj.restore(folder / "lost", state)
    first: int | None = state["step"] if FLAGS.resized else None

    def make(mesh: Any) -> Any:
        train, (mine, parts) = gcj.train_step(loss_fn, tx, mesh), gcj.share_of(mesh)

        def run(state: Any, step: int) -> Any:
            nonlocal first
            if first is None and parts < FLAGS.num_processes:
                first = step
                save_part(folder / "lost", rank, step, state)
            rows = np.random.default_rng(step).integers(len(images), size=(parts, 32))[mine]
            batch = gcj.shard_batch({"image": images[rows], "label": labels[rows]}, mesh)
            params, opt_state, loss = train(state["params"], state["opt_state"], batch)
            return {"params": params, "opt_state": opt_state, "step": step + 1}, loss

        return run

    name = "resized" if FLAGS.resized else "survived"
    with (folder / f"{name}-{gcj.share_of().part}.jsonl").open("w") as ends:
        for step, now, _ in gcj.elastic(lifeline, make, state, range(state["step"], 10**9)):
            print(json.dumps({"step": step, "time": time.time(), "left": len(lifeline.members)}), file=ends, flush=True)
            if first is not None and step + 1 == first + AFTER:
                save_part(folder / name, rank, step + 1, now)
                return


def started(folder: pathlib.Path, hosts: int, *more: str) -> list[subprocess.Popen]:
    """The processes of a run."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    children = []
    for rank in range(hosts):
        args = [f"--folder={folder}", f"--coordinator_address={address}", f"--num_processes={hosts}"]
        command_line = [sys.executable, "-m", "experiments.survival", *args, f"--process_id={rank}", *more]
        with (folder / f"{rank}{''.join(more)}.log").open("w") as log:
            children.append(subprocess.Popen(command_line, stdout=log, stderr=log, env=os.environ))
    return children


def ends_of(folder: pathlib.Path, rank: int) -> list[dict[str, Any]]:
    """The steps that a process has ended."""
    file = folder / f"survived-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait(until: Any, seconds: float = 180.0) -> None:
    """Waits until something is true; ends the program if that takes too long."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            sys.exit(f"error: the processes got no further in {seconds:.0f} s")
        time.sleep(0.05)


def killed(folder: pathlib.Path, hosts: int, victim: int, moment: float) -> dict[str, Any]:
    """What became of a run whose process `victim` was killed `moment` seconds after its first steps."""
    living = [rank for rank in range(hosts) if rank != victim]
    children = started(folder, hosts)
    try:
        wait(lambda: all(len(ends_of(folder, rank)) > 1 for rank in range(hosts)))
        time.sleep(moment)
        at = time.time()
        os.kill(children[victim].pid, signal.SIGKILL)
        for rank in living:
            children[rank].wait(180)
        children += started(folder, hosts - 1, "--resized")
        for child in children[hosts:]:
            child.wait(180)
    finally:
        for child in children:
            child.kill()
            child.wait()
    after = [next(x for x in ends_of(folder, rank) if x["left"] < hosts and x["time"] > at) for rank in living]
    seconds = max(x["time"] for x in after) - at
    pairs = [(part(folder / "survived", old), part(folder / "resized", new)) for new, old in enumerate(living)]
    same = all(np.array_equal(old[name], new[name]) for old, new in pairs for name in old)
    return {"victim": victim, "moment": round(moment, 3), "seconds": round(seconds, 2), "same_bits": same}


def part(folder: pathlib.Path, rank: int) -> dict[str, np.ndarray]:
    """What a process saved."""
    (file,) = folder.glob(f"*/{rank}.npz")
    return dict(np.load(file))


def main() -> None:
    """Runs as one process of a run if the flags say so; otherwise starts runs and kills."""
    if FLAGS.folder:
        worker(pathlib.Path(FLAGS.folder))
        return
    draw, results = random.Random(FLAGS.seed), []
    for _ in range(FLAGS.kills):
        victim, moment = draw.randrange(1, FLAGS.hosts), draw.uniform(0, FLAGS.moments)
        with tempfile.TemporaryDirectory() as folder:
            results.append(killed(pathlib.Path(folder), FLAGS.hosts, victim, moment))
        if FLAGS.out:
            with pathlib.Path(FLAGS.out).open("a") as out:
                print(json.dumps({"hosts": FLAGS.hosts, "jax": jax.__version__, **results[-1]}), file=out)
    seconds = [result["seconds"] for result in results]
    same = sum(result["same_bits"] for result in results)
    table = Table("kills", "median s", "longest s", "same bits")
    table.add_row(str(len(results)), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}", str(same))
    display.console().print(table)
    sys.exit(sum(result["seconds"] > FLAGS.within or not result["same_bits"] for result in results))


if __name__ == "__main__":
    cluster.declare_key_flags()
    command.run(main)
