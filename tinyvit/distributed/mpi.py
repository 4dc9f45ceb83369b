"""A group of processes that MPI connects, through mpi4py."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.backend import arrays, parallel
from tinyvit.distributed.group import DistributedError, Failed, Group
from tinyvit.distributed.reduction import Reduction

PATIENCE = 50.0  # seconds that a process may keep the others waiting in a step
GRACE = 1.0  # seconds in which several processes may fail for the same reason
SPIN = 2e-4  # seconds of waiting without a pause, which a short answer takes
PAUSE = 1e-4  # seconds between two looks after that: a waiting process should leave its core to others
VALUE, FAILURE = 30_000, 30_001  # tags; those below belong to the buckets of a reduction


class MPIGroup(Group):
    """All processes of `communicator`, an mpi4py communicator that nothing else uses.

    Waiting is done by looking for messages, never within MPI, so that a process that is gone can be named.
    """

    def __init__(self, communicator: Any) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, communicator
        self.rank, self.size = communicator.rank, communicator.size
        self._failures: dict[int, str] = {}
        mine = platform.node(), _affinity(), parallel.cgroup_cores(Path("/sys/fs/cgroup"))
        self._names = [f"rank {self.rank} (process {os.getpid()} on {platform.node()})"] * self.size
        self._names = self.exchange(self._names[0], patience=float("inf"))
        everyone = self.exchange(mine, patience=float("inf"))
        here = [rank for rank, (host, _, _) in enumerate(everyone) if host == mine[0]]
        self.local_rank, self.local_size = here.index(self.rank), len(here)
        self.threads = min(self.exchange(_share_of_cores(mine[1], [everyone[rank][1] for rank in here], mine[2])))

    def exchange(self, value: Any, patience: float | None = None) -> list[Any]:
        packed = self._mpi.pickle.dumps(value)  # once, as features of a data set are large
        others = [rank for rank in range(self.size) if rank != self.rank]
        sent = {rank: self._comm.Isend([packed, self._mpi.BYTE], rank, VALUE) for rank in others}
        values = {self.rank: value}

        def missing() -> set[int]:
            for rank in sent:
                if rank not in values and (message := self._comm.improbe(rank, VALUE)) is not None:
                    values[rank] = message.recv()
            return {rank for rank, request in sent.items() if rank not in values or not request.Test()}

        self.wait(missing, patience)
        return [values[rank] for rank in range(self.size)]

    def wait(self, missing: Callable[[], set[int]], patience: float | None = None) -> None:
        """Wait until no process is missing any more. Raises DistributedError, Failed."""
        begun = time.monotonic()
        patience = PATIENCE if patience is None else patience
        while ranks := missing():
            waited = time.monotonic() - begun
            if waited < SPIN:
                continue
            self._look_for_failures()
            if self._failures:
                raise Failed(self._failure())
            if waited > patience:
                who = ", ".join(self._names[rank] for rank in sorted(ranks))
                raise DistributedError(f"no answer for {waited:.0f} s from {who}")
            time.sleep(PAUSE)

    def send(self, array: np.ndarray, rank: int, tag: int) -> Any:
        """Begin to send an array, which must not change until the request that is returned is done."""
        return self._comm.Isend(array, rank, tag)

    def receive(self, array: np.ndarray, rank: int, tag: int) -> Any:
        """Begin to receive into an array."""
        return self._comm.Irecv(array, rank, tag)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                if not self.leads:
                    warnings.simplefilter("ignore")
                yield
        except Failed:
            self._end_within(PATIENCE)
            raise
        except (Exception, KeyboardInterrupt) as error:
            self._end_within(5 if isinstance(error, DistributedError) else PATIENCE)
            if not self._says_why(f"{type(error).__name__}: {error}"):
                raise Failed(self._failure()) from None
            raise

    def _end_within(self, seconds: float) -> None:
        """Let the system end this process, and so its launcher all others: MPI's own end waits for those that hang."""
        if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(math.ceil(seconds))

    def _says_why(self, reason: str) -> bool:
        """Tell the others that this process cannot go on. Returns whether it is the first of those that cannot."""
        for rank in range(self.size):
            if rank != self.rank:
                self._comm.isend(reason, rank, FAILURE)
        end = time.monotonic() + GRACE
        while time.monotonic() < end and len(self._failures) < self.size - 1:
            self._look_for_failures()
            time.sleep(PAUSE)
        return min(self._failures, default=self.size) > self.rank

    def _look_for_failures(self) -> None:
        status = self._mpi.Status()
        while (message := self._comm.improbe(self._mpi.ANY_SOURCE, FAILURE, status)) is not None:
            self._failures[status.source] = message.recv()

    def _failure(self) -> str:
        rank = min(self._failures)
        return f"{self._names[rank]}: {self._failures[rank]}"

    def reduction(self, like: Sequence[Any], shards: int) -> Any:
        if arrays.on_host(like[0]):
            return Reduction(self, like, shards)
        from tinyvit.distributed.nccl import NCCLReduction

        return NCCLReduction(self, like)


def _affinity() -> frozenset[int]:
    """The cores on which this process may run."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def _share_of_cores(mine: frozenset[int], local: Sequence[frozenset[int]], quota: int | None) -> int:
    """How many threads a process may use where the processes of its machine may run on the cores `local`."""
    share = sum(1 / sum(core in cores for cores in local) for core in mine)
    if quota is not None:
        share = min(share, quota / len(local))
    return max(1, int(share + 1e-9))
