"""How processes know of each other's death, and agree on it: signs of life and meetings, through jax's coordinator.

Process 0 holds jax's coordination service, and with it the run. Its store of keys carries everything here:

- A thread in each process writes a sign of life every half second, and reads the others'.
- At a meeting each process says whether all is well with it. Process 0 alone decides who is still there, so all that
  are there hear the same. It waits for whoever gives signs of life, at most for `timeout`.

When the connection to the coordinator breaks, jax's client ends its process at once, and no Python code can stop it.
So each process connects through a relay of its own, which keeps the client's side open. Then the process has time to
save what it has.
"""

import asyncio
import atexit
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax._src import distributed

from gradcomp_jax.contract import require_whole

LOGGER = logging.getLogger("gradcomp_jax.elastic")
TRY_AGAIN = 75
"""The exit code of a process that was ended: EX_TEMPFAIL of sysexits.h, which asks to be started again."""

# Seconds: between signs of life; without one, until a process counts as dead; that a worker waits inside a collective.
EVERY, SILENCE, STALL = 0.5, 5.0, 8
_KEYS = "gradcomp_jax/"
_FLAGS = {
    "xla_cpu_collective_timeout_seconds": STALL,
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": STALL,
}


class Met(NamedTuple):
    """What a meeting has found: the processes that are there, and whether all is well with all of them."""

    members: tuple[int, ...]
    well: bool


class Lifeline:
    """A process's connection to the others, from `initialize_elastic`; `elastic` takes it.

    Attributes:
      process: the number of this process.
      timeout: seconds after which a process that makes no progress counts as dead.
      members: the processes that are there, as the last meeting has found them.
      left: whether its loop has ended; a lifeline is for one loop.
    """

    def __init__(self, client: Any, process: int, processes: int, timeout: float, broken: threading.Event):
        self.process, self.timeout, self.members = process, timeout, tuple(range(processes))
        self.left = False
        self._client, self._broken = client, broken
        self._signs = dict.fromkeys(self.members, ("", time.monotonic()))
        self._gone: set[int] = set()
        self._heard, self._round = time.monotonic(), 0
        self._save: Callable[[], None] | None = None
        self._ending = threading.Lock()
        for run in (self._beat, self._watch):
            threading.Thread(target=run, daemon=True).start()
        atexit.register(self._farewell)

    def watch(self, save: Callable[[], None]) -> None:
        """From now on the process is ended when the others cannot be reached; `save` is called first."""
        self._save = save

    def leave(self) -> None:
        """Tells the others that this process comes to no more meetings. They need not wait for it."""
        self._client.key_value_set(f"{_KEYS}left/{self.process}", "", allow_overwrite=True)
        self._save, self.left = None, True

    def meet(self, well: bool) -> Met:
        """Waits for all processes that are there, and learns who that is. Ends the process if it is not among them."""
        self._round += 1
        self._client.key_value_set(self._key("in", self.process), json.dumps(well))
        if self.process == 0:
            met = self._judged()
            self._client.key_value_set(f"{_KEYS}members", json.dumps(met.members), allow_overwrite=True)
            self._client.key_value_set(self._key("out"), json.dumps(met))
            self._client.key_value_delete(f"{_KEYS}{self._round - 2}/")
        else:
            met = self._told()
        if self.process not in met.members:
            self._save = None  # the others are further on
            self.end("the others count it as dead, because it stood still or came too late")
        self.members = met.members
        return met

    def end(self, why: str) -> None:
        """Ends this process with a message, and saves what it has first."""
        save = self._save
        with self._ending:  # never released: a second thread waits until the process has ended
            hung = threading.Timer(self.timeout / 2, self._give_up)  # the save may wait for a device
            hung.daemon = True
            hung.start()
            LOGGER.critical("process %d ends: %s", self.process, why)
            try:
                if save is not None:
                    save()
            except Exception:
                LOGGER.exception("process %d could not save", self.process)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(TRY_AGAIN)  # jax's own end would wait for processes that are not there

    def _give_up(self) -> None:
        LOGGER.critical("process %d could not save in %.0f s", self.process, self.timeout / 2)
        os._exit(TRY_AGAIN)

    def _key(self, *names: Any) -> str:
        return "/".join(map(str, (f"{_KEYS}{self._round}", *names)))

    def _read(self, key: str) -> dict[int, str]:
        return {int(name.rsplit("/", 1)[1]): value for name, value in self._client.key_value_dir_get(key)}

    def _silent(self, process: int, seconds: float) -> bool:
        """Whether others were heard of and this one was not; a pause of this process is not a silence of the others."""
        return self._heard - self._signs[process][1] > seconds

    def _judged(self) -> Met:
        """Process 0 waits for all who may still come."""
        began = time.monotonic()
        for turn in itertools.count():
            there = self._read(self._key("in") + "/")
            missing = [k for k in self.members if k not in there]
            left = self._read(f"{_KEYS}left/") if missing else {}
            late = time.monotonic() - began > self.timeout
            gone = {k for k in missing if k in left or late or self._silent(k, SILENCE)}
            if len(gone) == len(missing):
                break
            time.sleep(min(0.001 * 1.2**turn, 0.05))
        members = tuple(k for k in self.members if k in there)
        return Met(members, all(json.loads(there[k]) for k in members))

    def _told(self) -> Met:
        """Another process waits for what process 0 says."""
        began = time.monotonic()
        while True:
            try:
                members, well = json.loads(self._client.blocking_key_value_get(self._key("out"), 1000))
                return Met(tuple(members), well)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    time.sleep(EVERY)  # the connection is lost, and `_watch` is about to end this process
            members = dict(self._client.key_value_dir_get(_KEYS)).get(f"{_KEYS}members")
            if members is not None and self.process not in json.loads(members):
                return Met(tuple(json.loads(members)), False)
            if 0 in self._read(f"{_KEYS}left/") and not self._client.key_value_dir_get(self._key("out")):
                self.end("process 0 has left the loop")
            if 0 in self._read(self._key("in") + "/"):
                began = time.monotonic()  # it waits for another, as long as it may
            if time.monotonic() - began > self.timeout:
                self.end(f"process 0 came to no meeting in {self.timeout:.0f} s")

    def _beat(self) -> None:
        """Writes signs of life, and notes when others' were last seen to change."""
        for count in itertools.count():
            try:
                self._client.key_value_set(f"{_KEYS}sign/{self.process}", str(count), allow_overwrite=True)
                signs = self._read(f"{_KEYS}sign/")
                self._gone = set(self._read(f"{_KEYS}left/"))  # not read by `_watch`, which must never wait
            except jax.errors.JaxRuntimeError:
                signs = {}
            now = time.monotonic()
            deaf = now - self._heard > SILENCE / 2  # it stood still, or heard nothing: then nobody else is to blame
            for process, sign in signs.items():
                if deaf or sign != self._signs[process][0]:
                    self._signs[process] = sign, now
            self._heard = now if signs else self._heard
            time.sleep(EVERY)

    def _watch(self) -> None:
        """Ends this process when nothing else can: its main thread may wait for the dead."""
        before = time.monotonic()
        while True:
            time.sleep(0.1)
            stood, before = time.monotonic() - before, time.monotonic()
            if self._save is None:
                continue
            if stood > self.timeout:
                self.end(f"it stood still for {stood:.0f} s, and the others count it as dead")
            if self._broken.is_set():
                self.end("process 0 is dead, and with it the coordinator of the run")
            if before - self._heard > self.timeout:
                self.end(f"no word from process 0 for {self.timeout:.0f} s")
            if silent := [k for k in self.members if k not in self._gone and self._silent(k, self.timeout)]:
                self.end(f"no word from process {silent[0]} for {self.timeout:.0f} s, and the step does not end")

    def _farewell(self) -> None:
        """Process 0 ends last, because the coordinator ends with it, and jax's client would abort its process."""
        if self._broken.is_set():
            with self._ending:  # so that a save that is under way comes to its end
                sys.stdout.flush()
                sys.stderr.flush()
                # Python notes an exception that ended the program in sys.last_value.
                os._exit(0 if self.left and not hasattr(sys, "last_value") else TRY_AGAIN)
        self._client.key_value_set(f"{_KEYS}gone/{self.process}", "", allow_overwrite=True)
        end = time.monotonic() + self.timeout
        while self.process == 0 and time.monotonic() < end:
            gone = self._read(f"{_KEYS}gone/")
            if all(k in gone or self._silent(k, SILENCE) for k in self.members):
                break
            time.sleep(0.05)
        if self.process == 0:
            time.sleep(EVERY)
        jax.distributed.shutdown()


def initialize_elastic(
    coordinator_address: str, num_processes: int, process_id: int, *, timeout: float = 60, **settings: Any
) -> Lifeline:
    """Joins processes like `jax.distributed.initialize`, so that they can outlive one of them.

    It sets what must be set before jax starts: `jax_enable_recoverability`, and XLA's time limits for collectives on
    CPUs, which otherwise wait for half an hour. Limits that stand in XLA_FLAGS already stay.

    Args:
      coordinator_address: host and port of process 0.
      num_processes: how many processes there are.
      process_id: the number of this process.
      timeout: seconds. A process that gives signs of life, but does not come to the end of a step that the others have
        ended, counts as dead after this time. If the survivors cannot go on, they end within one and a half times
        this time, of which a third is for the save. It must be longer than the longest pause of a process between two
        steps.
      settings: further arguments of `jax.distributed.initialize`, but for heartbeat_timeout_seconds.

    Returns:
      What `elastic` needs.

    Raises:
      RuntimeError: jax was used before.
      ValueError: timeout is not longer than 10 s.
    """
    require_whole("num_processes", num_processes, 1)
    require_whole("process_id", process_id, 0)
    if not timeout > 2 * SILENCE:
        raise ValueError(f"timeout={timeout} must be longer than {2 * SILENCE:.0f} seconds: death is noticed after 5")
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in _FLAGS.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join((flags, *missing)).strip()
    jax.config.update("jax_enable_recoverability", True)
    broken = threading.Event()
    if process_id != 0:
        coordinator_address = _relay(coordinator_address, broken)
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=int(2 * timeout),  # later than `_watch`, because jax ends a process unsaved
        **settings,
    )
    return Lifeline(distributed.global_state.client, process_id, num_processes, timeout, broken)


def _relay(address: str, broken: threading.Event) -> str:
    """An address of this process whose connections go on to another; they stay open when the other's side closes."""
    host, port = address.rsplit(":", 1)
    kept: list[Any] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, RuntimeError):  # RuntimeError: Python ends, and starts no more threads
            if not broken.is_set():
                writer.close()  # the coordinator is not up yet; the client tries again
            kept.append(writer)
            return
        kept.append((asyncio.ensure_future(pump(reader, onward[1])), writer))
        await pump(onward[0], writer)
        broken.set()

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result()
    return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
