"""What measurements tell of the host that they ran on, and the bytes that its interface sends."""

import os
import pathlib
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

INTERFACES = pathlib.Path("/sys/class/net")


def hardware() -> dict[str, Any]:
    """The processor's name, and the cores that this process may run on."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": named[0] if named else platform.machine(), "cores": cores}


def settings() -> dict[str, str]:
    """The variables of the environment that decide on the speed of XLA's programs and of memory."""
    return {key: value for key, value in os.environ.items() if key.startswith(("XLA_", "MALLOC_", "GLIBC_"))}


def only_interface() -> str | None:
    """The one network interface of this host beside that to itself; None if there are others, or none."""
    found = [path.name for path in INTERFACES.glob("*") if path.name != "lo"]
    return found[0] if len(found) == 1 else None


def counter_of(interface: str | None) -> Callable[[], Sequence[int]]:
    """A function that tells the bytes and packets that an interface has sent; nothing without one.

    Ends the program if there is no such interface.
    """
    if interface is None:
        return tuple
    paths = [INTERFACES / interface / "statistics" / name for name in ("tx_bytes", "tx_packets")]
    if not paths[0].exists():
        sys.exit(f"error: --interface={interface} is none of this host's; see {INTERFACES}")
    return lambda: [int(path.read_text()) for path in paths]
