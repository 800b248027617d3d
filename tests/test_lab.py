"""The lab: hosts in network namespaces. What needs them is skipped where this machine may not make any."""

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments import lab

ROOT = pathlib.Path(__file__).parent.parent
# One host listens, the other sends a megabyte to it; both tell the seconds from connection to end.
TRANSFER = """
import socket, sys, time
host, address = int(sys.argv[1]), (sys.argv[2].split(":")[0], 5000)
if host == 0:
    with socket.create_server(address) as server:
        link, peer = server.accept()
    got = b"".join(iter(lambda: link.recv(65536), b""))
    assert got == bytes(10**6), len(got)
    link.sendall(peer[0].encode())
else:
    end = time.monotonic() + 20
    while True:
        try:
            link = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.05)
    began = time.monotonic()
    link.sendall(bytes(10**6))
    link.shutdown(socket.SHUT_WR)
    peer = link.recv(100).decode()
    print(socket.gethostname(), peer, time.monotonic() - began)
"""


@functools.cache
def refusal():
    """Why this machine can have no lab; empty if it can."""
    try:
        with lab.Lab(2, "1gbit"):
            return ""
    except lab.LabError as error:
        return str(error)


@pytest.fixture
def real():
    if why := refusal():
        pytest.skip(why)


def left():
    return [name for name in lab.namespaces() if name.startswith(f"{lab.TAG}-{os.getpid()}-")]


# On any machine


@pytest.mark.parametrize(
    ("rate", "bits", "packet"), [("100mbit", 1e8, 3125), ("1.5gbit", 1.5e9, 46875), ("9bit", 9, 3100)]
)
def test_a_rate_decides_on_the_largest_packet(rate, bits, packet):
    assert lab.bits_per_second(rate) == bits
    assert lab.packet_bytes(rate) == packet
    assert lab.packet_bytes("100gbit") == 65536


@pytest.mark.parametrize("rate", ["fast", "100", "0mbit", "-1mbit", "100mbps", ""])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(lab.LabError, match=rf"rate={rate} must be a number with one of bit, kbit, .* or none"):
        lab.Lab(2, rate)


def test_the_number_of_hosts_has_bounds():
    with pytest.raises(lab.LabError, match="hosts=201 must be from 1 to 200"):
        lab.Lab(201)


def test_each_host_has_its_own_command():
    assert lab.replaced(["a{id}of{hosts}", "--x={address}", "{join}", "{other}"], 1, 3, "1.2.3.4:5") == [
        *("a1of3", "--x=1.2.3.4:5"),
        *("--coordinator_address=1.2.3.4:5", "--num_processes=3", "--process_id=1", "{other}"),
    ]
    assert lab.replaced(["{join}"], 0, 1, "1.2.3.4:5") == []  # one host has no one to join
    assert lab.torch_environment(1, 3, "1.2.3.4", 5).items() >= {"RANK": "1", "WORLD_SIZE": "3"}.items()


def test_without_root_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(lab.LabError, match=r"has to be root: sudo .*python"), lab.Lab(2):
        pass


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab.shutil, "which", lambda tool: None if tool in ("ip", "tc") else tool)
    with pytest.raises(lab.LabError, match="needs ip, tc: install the packages iproute2 and util-linux"), lab.Lab(2):
        pass


def test_a_missing_feature_of_the_kernel_is_told(monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "Operation not supported\n")
    monkeypatch.setattr(lab.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        lab.LabError, match=r"`ip netns list` failed \(Operation not supported\): the lab needs a kernel"
    ):
        lab.namespaces()


# Where namespaces can be made


@pytest.mark.usefixtures("real")
def test_hosts_talk_at_the_rate_of_their_links_and_nothing_is_left():
    with lab.Lab(2, "50mbit") as hosts:
        words = [sys.executable, "-c", TRANSFER, "{id}", "{address}"]
        ran = hosts.run(words, timeout=60)
        assert not lab.ended(ran, hosts)
        assert ran.codes == [0, 0]
        name, peer, seconds = hosts.log(1).read_text().split()
        assert name == peer == hosts.address(1)
        assert float(seconds) > 0.15
        first, second = hosts.sent()
        assert 1e6 < second.sent < 1.1e6
        assert second.sent == pytest.approx(first.received, abs=1000)  # a last acknowledgement may be under way
        hosts.shape("none")
        assert not hosts.run(words, timeout=60).failed
        assert float(hosts.log(1).read_text().split()[2]) < 0.15
        assert left()
    assert not left()


@pytest.mark.usefixtures("real")
def test_a_failure_ends_all_hosts():
    with lab.Lab(2) as hosts:
        ran = hosts.run(["sh", "-c", "[ {id} = 0 ] && sleep 1000; echo the reason; exit 3"], timeout=60, grace=0.1)
        assert (ran.codes, ran.failed, ran.late) == ([-9, 3], [1], False)
        assert re.search(
            r"^--- host 1, exit code 3\nthe reason\nerror: host 1 ended with exit code 3 after", lab.ended(ran, hosts)
        )
    assert not left()


@pytest.mark.usefixtures("real")
def test_survivors_go_on_if_asked():
    with lab.Lab(2) as hosts:
        processes = hosts.start(["sh", "-c", "[ {id} = 1 ] && exec sleep 1000; sleep 0.5; echo went on"])
        os.kill(processes[1].pid, signal.SIGKILL)
        ran = hosts.wait(60, grace=0, survive=True)
        assert (ran.codes, ran.failed, ran.late) == ([0, -9], [1], False)
        assert hosts.log(0).read_text() == "went on\n"


@pytest.mark.usefixtures("real")
def test_time_up_ends_all_hosts_and_what_they_started():
    with lab.Lab(2) as hosts:
        ran = hosts.run(["sh", "-c", "setsid sleep 1000 & exec sleep 1000"], timeout=0.3)
        assert (ran.codes, ran.failed, ran.late) == ([-9, -9], [], True)
        assert "error: time was up after" in lab.ended(ran, hosts)
        assert not [name for name in left() if lab.iproute("ip", "netns", "pids", name).split()]
    assert not left()


def begun(*words):
    """The program, with a command that does not end, and the names of its namespaces once the command runs."""
    line = [sys.executable, "-m", "experiments.lab", "--", "sh", "-c", "echo started; exec sleep 1000"]
    # A shell's background processes ignore SIGINT, and hand that down.
    line = ["env", "--default-signal=INT", *line]
    program = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert program.stdout.readline() == "started\n"
    return program, [name for name in lab.namespaces() if f"-{program.pid}-" in name]


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(how, code):
    program, names = begun()
    assert len(names) == 3
    program.send_signal(how)
    assert program.wait(30) == code
    assert not set(names) & set(lab.namespaces())


@pytest.mark.usefixtures("real")
def test_the_next_lab_removes_what_a_killed_one_left():
    program, names = begun()
    pids = [pid for name in names for pid in lab.iproute("ip", "netns", "pids", name).split()]
    program.kill()
    program.wait()
    assert len(pids) == 2
    assert set(names) <= set(lab.namespaces())
    with lab.Lab(1):
        assert not set(names) & set(lab.namespaces())
    end = time.monotonic() + 20
    while any(pathlib.Path("/proc", pid).exists() for pid in pids):  # killed, until their new parent has seen it
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.usefixtures("real")
def test_the_program_tells_bytes_and_fails_with_the_command():
    line = [sys.executable, "-m", "experiments.lab", "--rate=1gbit", "--grace=0", "--", "sh", "-c", "exit {id}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"^host 0: sent \S+ MB, received \S+ MB\nhost 1: ", done.stdout)
    assert "error: host 1 ended with exit code 1 after" in done.stderr
