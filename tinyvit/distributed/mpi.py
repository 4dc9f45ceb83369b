"""Messages by MPI, through mpi4py."""

from __future__ import annotations

from typing import Any

import numpy as np


class MPITransport:
    """Messages between all processes of `communicator`, an mpi4py communicator that nothing else uses."""

    def __init__(self, communicator: Any) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, communicator
        self.rank, self.size = communicator.rank, communicator.size
        self.gone: dict[int, str] = {}  # MPI does not say
        self.heard: set[int] = set()  # nor this
        self.threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE

    def send(self, data: Any, rank: int, tag: int) -> Any:
        return self._comm.Isend(data if isinstance(data, np.ndarray) else [data, self._mpi.BYTE], rank, tag)

    def receive(self, array: np.ndarray, rank: int, tag: int) -> Any:
        return self._comm.Irecv(array, rank, tag)

    def take(self, rank: int, tag: int) -> bytearray | None:
        status = self._mpi.Status()
        if (message := self._comm.Improbe(rank, tag, status)) is None:
            return None
        data = bytearray(status.Get_count(self._mpi.BYTE))
        message.Recv([data, self._mpi.BYTE])
        return data
