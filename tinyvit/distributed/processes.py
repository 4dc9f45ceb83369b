"""A group of several processes, whatever carries their messages."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinyvit.backend import arrays, parallel
from tinyvit.distributed.group import DistributedError, Failed, Group
from tinyvit.distributed.reduction import Reduction
from tinyvit.errors import Stopped

PATIENCE = 50.0  # seconds that a process may keep the others waiting in a step
BEAT = 2.0  # seconds between two signs of life; a process that gives none within PATIENCE is lost
END, END_OF_HANGING = 50, 5  # seconds that a process has to end once it has failed; once another hangs or is gone
LAST_WORDS = 8.0  # seconds that a process goes on for after another has failed: it may hang, with none to end it
GRACE = 1.0  # seconds in which several processes may fail for the same reason
SPIN = 2e-4  # seconds of waiting without a pause, which a short answer takes
PAUSE = 1e-4  # seconds between two looks after that: a waiting process should leave its core to others
VALUE, FAILURE, ALIVE = 30_000, 30_001, 30_002  # tags; those below belong to the buckets of a reduction


class Transport(Protocol):
    """Carries messages between processes: `mpi.MPITransport`, `tcp.TCPTransport`. No method waits.

    Attributes:
        rank, size: which of how many processes this is.
        gone: the ranks from which nothing will come any more, as far as the transport notices, and why.
        heard: those of which a part of a message has come, as far as the transport notices; for the caller to clear.
        threaded: whether several threads may call the methods at the same time.
    """

    rank: int
    size: int
    gone: dict[int, str]
    heard: set[int]
    threaded: bool

    def send(self, data: Any, rank: int, tag: int) -> Any:
        """Begin to send bytes or an array, which must not change until `Test()` of the result is true."""

    def receive(self, array: np.ndarray, rank: int, tag: int) -> Any:
        """Begin to receive into an array; `Test()` of the result is true once it is there."""

    def take(self, rank: int, tag: int) -> bytes | bytearray | None:
        """A message of any length, None if there is none."""


class _Interrupted(BaseException):
    """Raised wherever the main thread is; no Exception, which those who read files would take for a broken one."""


class Processes(Group):
    """All processes that `transport` connects.

    Waiting is done by looking for messages, so that a process that is gone can be named. Within `together` each
    process tells the others that it is alive, from a thread: one that is stopped, or whose machine is gone, does not.
    """

    def __init__(self, transport: Transport, local_rank: int | None = None) -> None:
        self._transport, self.rank, self.size = transport, transport.rank, transport.size
        self.send, self.receive = transport.send, transport.receive
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._failures: dict[int, str] = {}
        self._lost = ""  # what became of a process that cannot say it itself
        self._silent = dict.fromkeys(self._others, -math.inf)  # beats without a sign of life, of those `together`
        self._names = [f"rank {rank}" for rank in range(self.size)]
        host, cores, quota = platform.node(), sorted(parallel.affinity()), parallel.cgroup_cores(Path("/sys/fs/cgroup"))
        name = f"rank {self.rank} (process {os.getpid()} on {host})"
        everyone = self.exchange([name, host, cores], patience=math.inf)
        self._names = [name for name, _, _ in everyone]
        here = [rank for rank, (_, other, _) in enumerate(everyone) if other == host]
        self.local_rank = here.index(self.rank) if local_rank is None else local_rank
        self.local_size = len(here)
        share = _share_of_cores(frozenset(cores), [frozenset(everyone[rank][2]) for rank in here], quota)
        self.threads = min(self.exchange(share))

    def exchange(self, value: Any, patience: float | None = None) -> list[Any]:
        packed = pack(value)
        sent = {rank: self.send(packed, rank, VALUE) for rank in self._others}
        found: dict[int, bytes | bytearray] = {self.rank: packed}

        def missing() -> set[int]:
            for rank in sent:
                if rank not in found and (message := self._transport.take(rank, VALUE)) is not None:
                    found[rank] = message
            return {rank for rank, request in sent.items() if rank not in found or not request.Test()}

        self.wait(missing, patience)
        return [unpack(found[rank]) for rank in range(self.size)]

    def wait(self, missing: Callable[[], set[int]], patience: float | None = None) -> None:
        """Wait until no process is missing any more. Raises DistributedError, Failed."""
        begun = time.monotonic()
        patience = PATIENCE if patience is None else patience
        while True:
            gone = dict(self._transport.gone)  # before the last look at what they sent
            if not (ranks := missing()):
                return
            waited = time.monotonic() - begun
            if waited < SPIN:
                continue
            self._look_for_failures()
            if ended := ranks & gone.keys():
                self._lost = f"{self._names[min(ended)]} {gone[min(ended)]}"
            self._raise_if_broken()
            if waited > patience:
                names = ", ".join(self._names[rank] for rank in sorted(ranks))
                raise DistributedError(f"no answer for {waited:.0f} s from {names}")
            time.sleep(PAUSE)

    def _raise_if_broken(self) -> None:
        if self._failures:
            raise Failed(self._failure())
        if self._lost:
            raise DistributedError(self._lost)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings(), self._watching():
                if not self.leads:
                    warnings.simplefilter("ignore")
                yield
        except Stopped:  # all have agreed to stop, and saved
            raise
        except Failed:
            self._end_within(END)
            raise
        except (Exception, KeyboardInterrupt) as error:
            self._end_within(END_OF_HANGING if isinstance(error, DistributedError) else END)
            if not self._says_why(f"{type(error).__name__}: {error}"):
                raise Failed(self._failure()) from None
            raise

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Meanwhile a thread gives signs of life, and interrupts the main thread once another process cannot go on."""
        left = threading.Event()

        def interrupt(*_: Any) -> None:
            if not left.is_set():
                raise _Interrupted

        main = hasattr(signal, "pthread_kill") and threading.current_thread() is threading.main_thread()
        watch = threading.Thread(target=self._watch, args=[left, threading.get_ident() if main else None], daemon=True)
        before = signal.signal(signal.SIGALRM, interrupt) if main else None
        try:
            try:
                if self._transport.threaded:
                    watch.start()
                yield
            finally:
                left.set()
        except _Interrupted:
            left.set()  # if it came just before
            self._raise_if_broken()
        finally:
            if watch.ident is not None:
                watch.join()
                self._told = [self.send(b"left", rank, ALIVE) for rank in self._others]
            if main:
                signal.signal(signal.SIGALRM, before)

    def _watch(self, left: threading.Event, main: int | None) -> None:
        beats: dict[int, Any] = {}
        while True:
            gone = dict(self._transport.gone)  # before the last look at what they sent
            for rank in self._others:
                if rank not in beats or beats[rank].Test():
                    beats[rank] = self.send(b"", rank, ALIVE)
                self._silent[rank] += 1  # not the time, as this process may have been stopped meanwhile
                if rank in self._transport.heard:  # signs of life may come behind a large message
                    self._transport.heard.remove(rank)
                    self._silent[rank] = min(self._silent[rank], 0)
                while (message := self._transport.take(rank, ALIVE)) is not None:
                    self._silent[rank] = -math.inf if message else 0
                if rank in gone and self._silent[rank] >= 0:
                    self._lost = f"{self._names[rank]} {gone[rank]}"
                elif self._silent[rank] * BEAT > PATIENCE:
                    self._lost = f"no sign of life for {PATIENCE:.0f} s from {self._names[rank]}"
            self._look_for_failures()
            if main is not None and (self._failures or self._lost):
                signal.pthread_kill(main, signal.SIGALRM)
                if self._failures and not left.wait(LAST_WORDS):
                    os._exit(1)
            if left.wait(BEAT):
                return

    def _end_within(self, seconds: int) -> None:
        """Let the system end this process, and so its launcher all others: MPI's own end waits for those that hang."""
        if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            if seconds < END:  # this process is to name another, also where the launcher saw that one end
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _says_why(self, reason: str) -> bool:
        """Tell the others that this process cannot go on, unless one has told before. Returns whether it is to say why.

        Of several that told at the same time, the first does.
        """
        self._look_for_failures()
        if self._failures:
            return False
        words = reason.encode(errors="backslashreplace")  # names of files may be no UTF-8
        self._told = [self.send(words, rank, FAILURE) for rank in self._others]
        end = time.monotonic() + GRACE
        while time.monotonic() < end and len(self._failures) < self.size - 1:
            self._look_for_failures()
            time.sleep(PAUSE)
        return min(self._failures, default=self.size) > self.rank

    def _look_for_failures(self) -> None:
        for rank in self._others:
            if (reason := self._transport.take(rank, FAILURE)) is not None:
                self._failures[rank] = reason.decode()

    def _failure(self) -> str:
        rank = min(self._failures)
        return f"{self._names[rank]}: {self._failures[rank]}"

    def reduction(self, like: Sequence[Any], shards: int) -> Any:
        if arrays.on_host(like[0]):
            return Reduction(self, like, shards)
        from tinyvit.distributed.nccl import NCCLReduction

        return NCCLReduction(self, like)


def pack(value: Any) -> bytes:
    """Plain values and NumPy arrays in lists and dicts, as JSON with the arrays' bytes after it. Raises TypeError."""
    found: list[np.ndarray] = []

    def plain(x: Any) -> Any:
        if isinstance(x, np.generic):
            return x.item()
        if not isinstance(x, np.ndarray):
            raise TypeError(f"processes exchange plain values and NumPy arrays, got {type(x).__name__}")
        found.append(x)
        return {"dtype": x.dtype.str, "shape": x.shape}

    text = json.dumps(value, default=plain).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *(x.tobytes() for x in found)])


def unpack(data: bytes | bytearray) -> Any:
    """What `pack` was given, with lists for tuples."""
    place = 8 + int.from_bytes(data[:8], "little")

    def restored(x: dict[str, Any]) -> Any:
        nonlocal place
        if x.keys() != {"dtype", "shape"}:
            return x
        array = np.ndarray(x["shape"], x["dtype"], data, place).copy()
        place += array.nbytes
        return array

    return json.loads(data[8:place], object_hook=restored)


def _share_of_cores(mine: frozenset[int], local: Sequence[frozenset[int]], quota: int | None) -> int:
    """How many threads a process may use where the processes of its machine may run on the cores `local`."""
    share = sum(1 / sum(core in cores for cores in local) for core in mine)
    if quota is not None:
        share = min(share, quota / len(local))
    return max(1, int(share + 1e-9))
