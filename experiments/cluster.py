"""The flags of programs that run as one of several processes, and the way in which such a process joins the others.

Without these flags a program is one process. On a cluster that jax knows (Slurm, Open MPI or any MPI by mpi4py,
Kubernetes, TPU hosts) --cluster finds the others. Anywhere else three flags tell a process who it is:

    python -m experiments.cifar --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0
"""

import sys

import jax
from absl import flags

FLAGS = flags.FLAGS

flags.DEFINE_boolean(
    "cluster",
    False,
    "Join the processes that Slurm, MPI, Kubernetes or a TPU started with this one, as jax finds them.",
)
flags.DEFINE_string("coordinator_address", None, "Of the first of several processes, with a port that is free there.")
flags.DEFINE_integer("num_processes", 1, "How many processes there are.", lower_bound=1)
flags.DEFINE_integer("process_id", 0, "The number of this process, from 0.", lower_bound=0)


def declare_key_flags() -> None:
    """Shows these flags in the --help of the calling program."""
    for name in ("cluster", "coordinator_address", "num_processes", "process_id"):
        flags.declare_key_flag(name)


def join() -> bool:
    """Joins the other processes, if the flags say that there are any. Call it before jax is used for anything else.

    Ends the program, with one sentence, if the flags do not go together or jax finds no cluster.

    Returns:
      Whether there are others.
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
    return bool(jax.distributed.is_initialized())
