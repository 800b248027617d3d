"""The flags of programs that run as one of several processes, and the way in which such a process joins the others.

Without these flags a program is one process. On a cluster that jax knows (Slurm, Open MPI, Kubernetes, TPU hosts)
--cluster finds the others. Anywhere else three flags tell a process who it is:

    python -m experiments.cifar --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0
"""

import contextlib
import os
import sys

import jax
from absl import flags
from jax._src import distributed  # nothing public tells the number of processes before jax has devices
from jax.sharding import Mesh

from gradcomp_jax import make_mesh

NO_REORDERING = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
FLAGS = flags.FLAGS

flags.DEFINE_boolean(
    "cluster",
    False,
    "Join the processes that Slurm, Open MPI, Kubernetes or a TPU started with this one, as jax finds them.",
)
flags.DEFINE_string("coordinator_address", None, "Of the first of several processes, with a port that is free there.")
flags.DEFINE_integer("num_processes", 1, "How many processes there are.", lower_bound=1)
flags.DEFINE_integer("process_id", 0, "The number of this process, from 0.", lower_bound=0)

flags.disclaim_key_flags()  # what follows declares them for the module that calls it


def declare_key_flags() -> None:
    """Shows these flags in the --help of the calling program."""
    for name in ("cluster", "coordinator_address", "num_processes", "process_id"):
        flags.declare_key_flag(name)


def join() -> int:
    """Joins the other processes, if the flags say that there are any. Call it before jax is used for anything else.

    Ends the program, with one sentence, if the flags do not go together or jax finds no cluster.

    Returns:
      The number of processes.
    """
    if FLAGS.cluster:
        if FLAGS.coordinator_address or FLAGS.num_processes > 1:
            sys.exit("error: --cluster finds the other processes itself: leave out --coordinator_address and the rest")
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            sys.exit(f"error: --cluster: jax finds no cluster here ({first_line}); give --coordinator_address instead")
    elif FLAGS.num_processes > 1:
        if not FLAGS.coordinator_address:
            sys.exit("error: --num_processes needs --coordinator_address, of the first process")
        if FLAGS.process_id >= FLAGS.num_processes:
            sys.exit(
                f"error: --process_id={FLAGS.process_id} must be less than --num_processes={FLAGS.num_processes}; "
                "numbers begin at 0"
            )
        jax.distributed.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    elif FLAGS.coordinator_address:
        sys.exit("error: --coordinator_address needs --num_processes, of 2 or more")
    return int(distributed.global_state.num_processes)


def mesh() -> Mesh | None:
    """Joins the other processes, if there are any, and makes a mesh of the devices of all; None for a single process.

    --workers counts devices over all processes. Each CPU emulates its share of them, one by default. Accelerators are
    all taken.

    Raises:
      ValueError: there are other numbers of devices than --workers.
    """
    processes = join()
    if processes == 1:
        return None
    workers = None if FLAGS["workers"].using_default_value else FLAGS.workers
    emulate(max(1, (workers or 0) // processes))
    if workers not in (None, jax.device_count()):
        rest = jax.default_backend() == "cpu" and workers % processes
        raise ValueError(
            f"--workers={workers} does not divide among {processes} processes: give a multiple of them, or leave it out"
            if rest
            else f"--workers={workers}: the {processes} processes have {jax.device_count()} devices of type "
            f"{jax.default_backend()!r}, and all of them work: leave --workers out"
        )
    return make_mesh()


def emulate(devices: int) -> None:
    """Has the CPU stand for at least so many devices, unless jax runs already."""
    # With reordering, emulated devices may meet in the collectives of a conditional, and in those beside it, in
    # different orders, and accordion's training crashes. jax reads the flag when it first runs.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_REORDERING}"
    if jax.config.values["jax_num_cpu_devices"] < devices:
        # jax refuses this if it runs already, perhaps with enough devices.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)
