"""Training programs on several real processes: the numbers of one process, one writer, and nobody is left waiting."""

import functools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import checkpoints, records
from tests.small_training import figures, only_run

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 400
VERSE = ("".join(map(chr, range(97, 113))) + "to be or not to be ").encode() * 60
# 120 steps of four sequences over all workers, whose periods end in every third.
SMALL = ["--context=8", "--width=16", "--blocks=1", "--heads=2", "--validation_tokens=64", "--every=3", "--tokens=3840"]
SMALL += ["--method=sparseloco", "--eval_every=60", "--log_every=5", "--checkpoint_every=10"]
DIGITS = ["--batch_size=256", "--epochs=1", "--warmup_epochs=0", "--log_every=1", "--nomeasured"]  # 5 steps
DIGITS += ["--codec=powersgd,qsgd"]


@functools.cache
def home():
    """A folder for everything here, until this process ends."""
    folder = tempfile.TemporaryDirectory()
    (pathlib.Path(folder.name) / "verse.txt").write_bytes(VERSE)
    return folder


def folder_of(name):
    return pathlib.Path(home().name) / name


# How processes find each other: (rank, processes, a free port) -> their arguments, their environment.


def by_address(rank, processes, port):
    at = f"--coordinator_address=localhost:{port}"
    return [at, f"--num_processes={processes}", f"--process_id={rank}"] if processes > 1 else [], {}


def by_slurm(rank, processes, port):
    told = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": processes, "PROCID": rank, "LOCALID": rank}
    return ["--cluster"], {"JAX_COORDINATOR_PORT": port} | {f"SLURM_{key}": value for key, value in told.items()}


def by_open_mpi(rank, processes, port):
    told = {"SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
    uri = {"JAX_COORDINATOR_PORT": port, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
    return ["--cluster"], uri | {f"OMPI_COMM_WORLD_{key}": value for key, value in told.items()}


class Run:
    """A program in several processes; each has an --out_dir of its own, as hosts have."""

    def __init__(self, name, processes, *args, program="lm", found=by_address, of_rank=lambda rank: []):
        self.folder = folder_of(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        self.children = []
        for rank in range(processes):
            joining, environment = found(rank, processes, port)
            command = [sys.executable, "-m", f"experiments.{program}", *args, *joining, *of_rank(rank)]
            if program == "lm":
                command[3:3] = [*SMALL, f"--text={folder_of('verse.txt')}"]
            command[3:3] = [f"--out_dir={self.folder}/out{rank or ''}", f"--checkpoint_dir={self.folder}/checkpoints"]
            env = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            env |= {key: str(value) for key, value in environment.items()}
            with self.log(rank).open("wb") as log:
                self.children.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))

    def log(self, rank):
        return self.folder / f"log{rank}"

    def said(self):
        """What each process printed, but for what its libraries did."""
        logs = [self.log(rank).read_text() for rank in range(len(self.children))]
        return ["".join(line for line in log.splitlines(True) if "[Gloo]" not in line) for log in logs]

    def wait(self, code=0):
        """Until all have ended, with that code."""
        end = time.monotonic() + SECONDS
        try:
            while None in (codes := [child.poll() for child in self.children]):
                # One that fails alone must not leave the others waiting.
                assert time.monotonic() < end, (codes, self.said())
                time.sleep(0.05)
        finally:
            for child in self.children:
                child.kill()
        assert codes == [code] * len(codes), self.said()
        return self

    def when(self, step):
        """Waits until it has recorded that step."""
        while not any(f'"train", "step": {step},' in path.read_text() for path in self.folder.glob("out/*.jsonl")):
            assert None in [child.poll() for child in self.children], self.said()
            time.sleep(0.002)
        return self

    def signal(self, number, ranks):
        for rank in ranks:
            self.children[rank].send_signal(number)
        return self


def of(run, name, before=None):
    """A folder with the records and checkpoints of a run, for another to go on from; `before`: without that step's."""
    shutil.copytree(run.folder, folder_of(name))
    if before:
        shutil.rmtree(only_run(folder_of(name)) / str(before))
    return name


def state(run):
    """The step and the arrays of the newest checkpoint, whichever processes wrote it."""
    step = max(int(path.name) for path in only_run(run.folder).iterdir() if path.name.isdigit())
    path = only_run(run.folder) / str(step) / "state"
    with ocp.StandardCheckpointer() as reader:
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), reader.metadata(path).item_metadata)
        return step, reader.restore(path, like)


def record(run):
    (path,) = run.folder.glob("out/*.jsonl")
    return records.read(path)


def assert_same_figures(run, expected, rel):
    """All figures of all runs but those that tell of time, and whether one process stood for several workers."""
    paths = sorted(run.folder.glob("out/*.jsonl"))
    assert [path.name for path in paths] == [path.name for path in sorted(expected.folder.glob("out/*.jsonl"))]
    for path in paths:
        (first, *lines), (other, *others) = (
            figures(folder / "out" / path.name) for folder in (run.folder, expected.folder)
        )
        apart = {"emulated": None, "processes": None}
        assert first | apart == other | apart
        for line, wanted in zip(lines, others, strict=True):
            near = {key: pytest.approx(x, rel=rel) if isinstance(x, float) else x for key, x in wanted.items()}
            assert line == near, path


# The numbers


@functools.cache
def digits(processes, workers):
    return Run(f"digits{processes}of{workers}", processes, *DIGITS, f"--workers={workers}", program="cifar").wait()


@pytest.mark.parametrize("processes", [2, 4])
def test_image_classification_gives_the_numbers_of_one_process(processes):
    """To the last bit for two; gloo's ring adds more than two in another order, which PowerSGD's bases magnify."""
    rel = 0 if processes == 2 else 1e-3
    assert_same_figures(digits(processes, processes), digits(1, processes), rel)


@functools.cache
def whole():
    """A language model by two processes that find each other as under Slurm."""
    board = f"--tensorboard_dir={folder_of('whole')}/board"
    return Run("whole", 2, "--sequences=2", board, found=by_slurm).wait()


@functools.cache
def one():
    """The same, simulated by one process."""
    return Run("one", 1, "--sequences=2", "--workers=2").wait()


def test_a_language_model_gives_the_numbers_of_its_simulation():
    assert_same_figures(whole(), one(), 1e-4)


def test_the_first_process_writes_for_all():
    first, second = whole().said()
    assert "step 120/120" in first
    assert "sparseloco every=3" in first
    assert second == ""
    assert {path.suffix for path in (whole().folder / "out").iterdir()} == {".jsonl", ".png"}
    assert not (whole().folder / "out1").exists()
    assert len([*whole().folder.rglob("events.out.tfevents.*")]) == 1


# Stopped, killed, and on other processes


def test_killed_processes_end_as_those_that_were_not():
    """Found as under Open MPI. The last checkpoint is damaged meanwhile, so they go on from the one before it."""
    run = functools.partial(Run, "killed", 2, "--sequences=2", found=by_open_mpi)
    killed = run().when(25).signal(signal.SIGKILL, [0, 1]).wait(-signal.SIGKILL)
    before, last = sorted(int(path.name) for path in only_run(killed.folder).iterdir() if path.name.isdigit())
    part = only_run(killed.folder) / str(last) / "state" / "ocdbt.process_1"
    for path in [path for path in part.rglob("*") if path.is_file()]:
        path.write_bytes(bytes(path.stat().st_size))
    again = run().wait()
    assert f"The checkpoint of step {last} is damaged" in again.said()[0]
    assert [line["step"] for line in record(again).resumed] == [before]
    assert_same_figures(again, whole(), 0)
    chex.assert_trees_all_equal(state(again), state(whole()))


@functools.cache
def stopped():
    """Four processes, of which one got SIGTERM."""
    return Run("stopped", 4, "--sequences=1").when(10).signal(signal.SIGTERM, [2]).wait(130)


def test_a_signal_to_one_process_stops_all_after_the_same_step():
    step, _ = state(stopped())
    assert 10 <= step < 120
    assert f"was interrupted at step {step} of 120; the same command goes on from" in stopped().said()[0]


def test_other_processes_go_on():
    """Four workers of four processes are then those of two, and are simulated by one."""
    two = Run(of(stopped(), "two"), 2, "--sequences=1", "--workers=4").wait()
    simulated = Run(of(stopped(), "simulated"), 1, "--sequences=1", "--workers=4").wait()
    step, _ = state(stopped())
    for run in (two, simulated):
        assert [(line["step"], line["workers"]) for line in record(run).resumed] == [(step, 4)]
    assert_same_figures(two, simulated, 1e-4)


def test_fewer_workers_of_one_process_go_on():
    run = Run(of(stopped(), "fewer"), 1, "--sequences=2", "--workers=2").wait()
    assert "The checkpoint is of 4 workers, now there are 2" in run.said()[0]
    assert record(run).end["step"] == 120


def test_more_workers_of_several_processes_go_on():
    run = Run(of(one(), "more", before=120), 2, "--sequences=1", "--workers=4").wait()
    assert "The checkpoint is of 2 workers, now there are 4" in run.said()[0]
    assert [(line["step"], line["workers"]) for line in record(run).resumed] == [(110, 4)]
    assert record(run).end["step"] == 120


# What one process cannot do


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--text=/nowhere", "cannot read /nowhere"),
        ("--checkpoint_dir=/tmp/elsewhere", "file system that all processes see"),
    ],
)
def test_what_is_wrong_in_one_process_ends_all(wrong, message, tmp_path):
    wrong = wrong.replace("/tmp", str(tmp_path))
    run = Run(tmp_path.name, 2, "--sequences=2", of_rank=lambda rank: [wrong] * rank).wait(1)
    first, second = run.said()
    assert message in first
    assert first.startswith("error: process 1: ")
    assert message in second


def test_a_run_that_others_are_at_is_refused_in_all_processes():
    taken = folder_of("taken") / "checkpoints" / only_run(whole().folder).name
    with checkpoints.owned(taken):
        said = Run("taken", 2, "--sequences=2").wait(1).said()
    assert all("another process is at this run" in each for each in said)


def test_workers_that_do_not_divide_among_processes_are_refused():
    said = Run("three", 2, "--sequences=2", "--workers=3").wait(1).said()
    assert all("--workers=3 does not divide among 2 processes: give a multiple of them" in each for each in said)
