"""Real hosts on one Linux machine: a command once for each, joined by links of a given rate.

    sudo .venv/bin/python -m experiments.lab --hosts=4 --rate=1gbit -- .venv/bin/python -m experiments.hosts {join}

A host is a network namespace with a name, an address, and a veth pair to a bridge, which lies in a namespace of its
own. Nothing touches the machine's own network, and no route leads out. tc's token bucket holds each link to the rate in
both directions. The hosts share the machine's cores and memory. From some rate on these are the limit, not the link.

In COMMAND, {join} stands for the flags with which our programs join each other; {id}, {hosts} and {address} stand for
the number of the host, the number of hosts, and the first host's address with a free port. PyTorch's RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME are in the environment, and the rate as LAB_RATE. Programs and tests
take `Lab`:

    with Lab(hosts=4, rate="1gbit") as lab:
        ran = lab.run(["python", "-m", "experiments.hosts", "{join}"])
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import command

FLAGS = flags.FLAGS

SUBNET = "10.77.9"  # of each lab: labs do not see each other
TAG = "gradcomp-lab"  # how the names of namespaces begin, before the process that made them
MOST = 200  # hosts
LINES = 15  # of a failed host's output
UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_serial = itertools.count()


class LabError(Exception):
    """There can be no lab here, or a setting is wrong; one sentence."""


class Traffic(NamedTuple):
    """The bytes that a host's interface counted: those of Ethernet frames, with one header for each GSO packet.

    A GSO packet becomes many packets on a wire, so the headers are somewhat fewer here than there.

    Attributes:
      sent: the bytes that it sent.
      received: the bytes that it received.
    """

    sent: int
    received: int


class Ran(NamedTuple):
    """How a command ended.

    Attributes:
      codes: each host's exit code; minus the signal's number if a signal ended it, such as -9.
      failed: the hosts that failed by themselves, in the order in which that was seen.
      late: whether time was up.
      seconds: the time from the start to the last end.
    """

    codes: list[int]
    failed: list[int]
    late: bool
    seconds: float


class Lab:
    """Hosts with shaped links, as a context; on leaving it, all their processes are killed and nothing is left.

    Args:
      hosts: how many, from 1 to 200.
      rate: the rate of each host's link in each direction, such as "100mbit"; "none" leaves it as fast as it is.
      logs: the directory of the hosts' output, `host<i>.txt`; by default one that is removed at the end.

    Raises:
      LabError: a setting is wrong, or this machine lacks something: Linux, root, iproute2, or a feature of its kernel.
    """

    def __init__(self, hosts: int, rate: str = "none", logs: pathlib.Path | None = None):
        if not 1 <= hosts <= MOST:
            raise LabError(f"hosts={hosts} must be from 1 to {MOST}")
        bits_per_second(rate)
        self.hosts, self.rate = hosts, rate
        self._tag = f"{TAG}-{os.getpid()}-{next(_serial)}"
        self._temporary = tempfile.TemporaryDirectory() if logs is None else None
        self.logs = pathlib.Path(self._temporary.name) if self._temporary else pathlib.Path(str(logs))
        self._runs = itertools.count()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._began = 0.0

    def __enter__(self) -> "Lab":
        require_tools()
        remove_leftovers()
        try:
            self._build()
            self.shape(self.rate)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
        remove(name for name in namespaces() if name.startswith(f"{self._tag}-"))
        if self._temporary:
            self._temporary.cleanup()

    def address(self, host: int) -> str:
        """A host's address."""
        return f"{SUBNET}.{host + 1}"

    def log(self, host: int) -> pathlib.Path:
        """The file with a host's output."""
        return self.logs / f"host{host}.txt"

    def shape(self, rate: str) -> None:
        """Gives all links another rate."""
        for namespace, device in self._ends():
            packet = "65536" if rate == "none" else str(packet_bytes(rate))
            iproute("ip", "-n", namespace, "link", "set", device, "gso_max_size", packet)
            if self.rate != "none":
                iproute("tc", "-n", namespace, "qdisc", "del", "dev", device, "root", may_fail=True)
            if rate != "none":
                # Two packets: a larger bucket would let short messages through at once. The queue holds whatever TCP
                # has under way: lost packets are not what is emulated.
                bucket = ("rate", rate, "burst", str(2 * int(packet) + 200), "limit", "8000000")
                iproute("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *bucket)
        self.rate = rate

    def sent(self) -> list[Traffic]:
        """What each host's interface has counted since the lab was made."""
        counted = []
        for host in range(self.hosts):
            told = json.loads(iproute("ip", "-n", self._host(host), "-s", "-j", "link", "show", "eth0"))[0]["stats64"]
            counted.append(Traffic(told["tx"]["bytes"], told["rx"]["bytes"]))
        return counted

    def run(self, words: Sequence[str], timeout: float = 300.0, **settings: Any) -> Ran:
        """Runs a command on all hosts, to its end: `start` and `wait`, whose further settings it takes."""
        waiting = {key: settings.pop(key) for key in ("grace", "survive") if key in settings}
        self.start(words, **settings)
        return self.wait(timeout, **waiting)

    def start(
        self, words: Sequence[str], show: bool = False, pin: bool = False, env: Mapping[str, str] | None = None
    ) -> list[subprocess.Popen[bytes]]:
        """Starts a command on every host.

        Args:
          words: the command; see the module for what is replaced in it.
          show: whether the first host writes to the terminal and not to its file.
          pin: whether host i has core i alone, or core i mod the number of cores.
          env: more of the environment.

        Returns:
          The process of each host. Its pid is that of the command itself.
        """
        assert not self._processes, "one command at a time: wait for the last"
        port, cores = 29500 + next(self._runs), sorted(os.sched_getaffinity(0))
        self.logs.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        for host in range(self.hosts):
            # gloo listens at the address of the host's name, so that the name is the address.
            named = ("unshare", "--uts", "sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"')
            pinned = ("taskset", "-c", str(cores[host % len(cores)])) if pin else ()
            prefix = ("ip", "netns", "exec", self._host(host), *named, self.address(host), *pinned)
            told = torch_environment(host, self.hosts, self.address(0), port) | {"LAB_RATE": self.rate}
            told = os.environ | told | dict(env or {})
            line = [*prefix, *replaced(words, host, self.hosts, f"{self.address(0)}:{port}")]
            with self.log(host).open("wb") as log:
                out = None if show and not host else log
                process = subprocess.Popen(line, env=told, stdout=out, stderr=out, start_new_session=True)
            self._processes.append(process)
        return list(self._processes)

    def wait(self, timeout: float = 300.0, grace: float = 5.0, survive: bool = False) -> Ran:
        """Waits for the command to end on all hosts; at the end all its processes are gone.

        Args:
          timeout: the seconds after the start when all that still run are killed.
          grace: the seconds that the others have when one has failed.
          survive: whether the others go on, however long, when one has failed.
        """
        failed: list[int] = []
        end, late = self._began + timeout, False
        while None in (codes := [process.poll() for process in self._processes]):
            news = [host for host, code in enumerate(codes) if code and host not in failed]
            if news and not failed and not survive and time.monotonic() + grace < end:
                end = time.monotonic() + grace
            failed += news
            if time.monotonic() > end:
                late = survive or not failed
                break
            time.sleep(0.05)
        else:
            failed += [host for host, code in enumerate(codes) if code and host not in failed]
        seconds = time.monotonic() - self._began
        return Ran(self.kill(), failed, late, seconds)

    def kill(self) -> list[int]:
        """Kills what the hosts still run, and gives the exit codes."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it may not have entered its namespace yet
        codes = [process.wait() for process in self._processes]
        self._processes = []
        for name in namespaces():
            if name.startswith(f"{self._tag}-"):
                kill_inside(name)
        return codes

    def _host(self, host: int) -> str:
        return f"{self._tag}-{host}"

    def _ends(self) -> list[tuple[str, str]]:
        """Both ends of each host's link, as namespace and device: its own sends, the bridge's sends to it."""
        hub = f"{self._tag}-hub"
        return [end for host in range(self.hosts) for end in ((self._host(host), "eth0"), (hub, f"port{host}"))]

    def _build(self) -> None:
        hub = f"{self._tag}-hub"
        iproute("ip", "netns", "add", hub)
        iproute("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        for host in range(self.hosts):
            name, port = self._host(host), f"port{host}"
            iproute("ip", "netns", "add", name)
            iproute("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", hub)
            iproute("ip", "-n", hub, "link", "set", port, "master", "bridge")
            iproute("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            iproute("ip", "-n", name, "link", "set", "lo", "up")
        for namespace, device in [*self._ends(), (hub, "bridge")]:
            iproute("ip", "-n", namespace, "link", "set", device, "addrgenmode", "none")  # no messages of IPv6's own
            iproute("ip", "-n", namespace, "link", "set", device, "up")
        for host in range(self.hosts):  # whatever the machine's own default is
            route = (f"{SUBNET}.0/24", "dev", "eth0", "src", self.address(host), "congctl", "cubic")
            iproute("ip", "-n", self._host(host), "route", "replace", *route)


def bits_per_second(rate: str) -> float:
    """A rate in tc's words, such as "1.5gbit", as a number; infinite for "none". Raises LabError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?bit)", rate)
    if rate != "none" and (found is None or not float(found[1])):
        raise LabError(f"rate={rate} must be a number with one of {', '.join(UNITS)}, such as 100mbit, or none")
    return float(found[1]) * UNITS[found[2]] if found else float("inf")


def mbit_here() -> float | None:
    """In a command that a lab runs: its links' rate in Mbit/s. None elsewhere, and without a rate."""
    bits = bits_per_second(os.environ.get("LAB_RATE", "none"))
    return None if bits == float("inf") else bits / 1e6


def packet_bytes(rate: str) -> int:
    """The largest packet that a host hands to its link: 0.25 ms of the rate, at least two frames, at most 64 KiB.

    tc's bucket has to hold a packet, and whatever fits into the bucket is sent at once.
    """
    return int(min(65536, max(3100, bits_per_second(rate) / 8 * 0.25e-3)))


def replaced(words: Sequence[str], host: int, hosts: int, address: str) -> list[str]:
    """A command for one host."""
    join = [f"--coordinator_address={address}", f"--num_processes={hosts}", f"--process_id={host}"]
    named = {"{id}": str(host), "{hosts}": str(hosts), "{address}": address}
    line = []
    for word in words:
        for name, value in named.items():
            word = word.replace(name, value)
        line += (join if hosts > 1 else []) if word == "{join}" else [word]
    return line


def torch_environment(host: int, hosts: int, address: str, port: int) -> dict[str, str]:
    """The variables by which PyTorch's processes find each other."""
    numbers = {"RANK": host, "WORLD_SIZE": hosts, "LOCAL_RANK": 0, "MASTER_PORT": port}
    return {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": "eth0"} | {key: str(x) for key, x in numbers.items()}


def require_tools() -> None:
    """Raises LabError, with the way out, if this machine cannot have a lab; the kernel tells its part later."""
    if sys.platform != "linux":
        raise LabError(f"the lab is made of Linux's network namespaces, and this is {sys.platform}")
    if os.geteuid():
        raise LabError(f"the lab makes network namespaces, for which it has to be root: sudo {sys.executable} ...")
    missing = [tool for tool in ("ip", "tc", "unshare", "taskset") if not shutil.which(tool)]
    if missing:
        raise LabError(f"the lab needs {', '.join(missing)}: install the packages iproute2 and util-linux")


def namespaces() -> list[str]:
    """The names of the machine's network namespaces."""
    return [line.split()[0] for line in iproute("ip", "netns", "list").splitlines()]


def remove_leftovers() -> None:
    """Removes the namespaces, with their processes, of labs whose own process was killed."""
    made = ((name, re.match(rf"{TAG}-(\d+)-", name)) for name in namespaces())
    remove(name for name, found in made if found and not pathlib.Path("/proc", found[1]).exists())


def remove(names: Any) -> None:
    """Kills the processes in network namespaces, and removes these."""
    for name in list(names):
        kill_inside(name)
        iproute("ip", "netns", "del", name, may_fail=True)


def kill_inside(name: str) -> None:
    """Kills the processes in a network namespace."""
    for pid in iproute("ip", "netns", "pids", name, may_fail=True).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended meanwhile


def iproute(*words: str, may_fail: bool = False) -> str:
    """What a command of iproute2 prints; raises LabError if it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise LabError(
            f"`{' '.join(words)}` failed ({done.stderr.strip()}): the lab needs a kernel with network namespaces, "
            "veth, bridge, tbf and cubic (NET_NS, VETH, BRIDGE, NET_SCH_TBF, TCP_CONG_CUBIC), and the right to use them"
        )
    return done.stdout


def ended(ran: Ran, lab: Lab) -> str:
    """Why a command failed, with the last lines of each host that failed; empty if it did not."""
    if not ran.late and not ran.failed:
        return ""
    parts = []
    for host in ran.failed or [host for host, code in enumerate(ran.codes) if code]:
        lines = lab.log(host).read_text(errors="replace").splitlines()[-LINES:]
        parts += [f"--- host {host}, exit code {ran.codes[host]}", *lines]
    why = "time was up" if ran.late else f"host {ran.failed[0]} ended with exit code {ran.codes[ran.failed[0]]}"
    return "\n".join([*parts, f"error: {why} after {ran.seconds:.1f} s"])


def _terminated(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that a second one leaves the removal alone
    sys.exit(143)


def main(words: Sequence[str]) -> None:
    """Runs the command, and tells the bytes of each host."""
    if not words:
        sys.exit("error: there is no command: give it after --, such as -- python -m experiments.hosts {join}")
    signal.signal(signal.SIGTERM, _terminated)
    logs = command.directory("out_dir", FLAGS.out_dir) if FLAGS.out_dir else None
    try:
        with Lab(FLAGS.hosts, FLAGS.rate, logs) as lab:
            ran = lab.run(words, FLAGS.timeout, show=True, pin=FLAGS.pin, grace=FLAGS.grace)
            for host, (sent, received) in enumerate(lab.sent()):
                print(f"host {host}: sent {sent / 1e6:.3f} MB, received {received / 1e6:.3f} MB", flush=True)
            why = ended(ran, lab)
    except LabError as error:
        sys.exit(f"error: {error}")
    if why:
        sys.exit(why)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_integer("hosts", 2, "How many hosts.", lower_bound=1, upper_bound=MOST)
    flags.DEFINE_string("rate", "none", "Of each host's link, such as 100mbit or 1gbit; none: as fast as it is.")
    flags.DEFINE_float("timeout", 3600.0, "Seconds after which the command is killed.", lower_bound=0.0)
    flags.DEFINE_float("grace", 5.0, "Seconds that the other hosts have when one has failed.", lower_bound=0.0)
    flags.DEFINE_boolean("pin", False, "Run host i on core i alone, modulo the number of cores.")
    flags.DEFINE_string("out_dir", None, "Keep the output of hosts 1, 2, ... here; host 0 writes to the terminal.")


if __name__ == "__main__":
    # Not at import: programs that take `Lab` have flags with these names.
    define_flags()
    command.run(main, words=True)
