"""Messages over TCP, where a launcher gives an address to meet at and nothing else, as torchrun does.

Rank 0 listens on MASTER_ADDR and MASTER_PORT. Every other process connects to it, and listens on a port that the
system chooses, on the address by which it reaches rank 0. Rank 0 tells all where the others are, and they connect in
pairs. Then nobody listens any more. Nothing is encrypted, and whoever can reach these ports while the processes meet
can pass for one of them: the network has to be a trusted one. Messages are bytes of arrays and JSON; none is executed.
"""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tinyvit.distributed.group import DistributedError

HELLO = struct.Struct("<8sIIH")  # MAGIC, rank, size, port
PLACES = struct.Struct("<8sI")  # MAGIC, bytes of JSON
MAGIC = b"tinyvit1"
HEADER = struct.Struct("<IQ")  # of a message: tag, bytes
GREETING = 5.0  # seconds that whoever connects has for HELLO


class TCPTransport:
    """Messages between `size` processes that meet at an address.

    Two threads for each of the others carry them, so that sums go on while the caller computes.

    Raises:
        DistributedError: the address is not there, or a process does not come within `patience` seconds.
    """

    threaded = True

    def __init__(self, rank: int, size: int, address: str, port: int, patience: float) -> None:
        self.rank, self.size = rank, size
        self.gone: dict[int, str] = {}
        self.heard: set[int] = set()
        self._lock = threading.Lock()  # for what follows, by rank and tag
        self._arrived: dict[tuple[int, int], deque[bytearray]] = {}
        self._coming: set[tuple[int, int]] = set()  # on its way into _arrived
        self._awaited: dict[tuple[int, int], _Receiving] = {}  # whose array the next message is read into
        self._outgoing: dict[int, queue.SimpleQueue[tuple[int, Any, _Sent]]] = {}
        for other, connection in _meet(rank, size, address, port, time.monotonic() + patience).items():
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._outgoing[other] = queue.SimpleQueue()
            for work in (self._read, self._write):
                threading.Thread(target=self._carry, args=(work, other, connection), daemon=True).start()

    def send(self, data: Any, rank: int, tag: int) -> _Sent:
        sent = _Sent()
        data = data.reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else data
        self._outgoing[rank].put((tag, memoryview(data), sent))
        return sent

    def receive(self, array: np.ndarray, rank: int, tag: int) -> _Receiving:
        return _Receiving(self, array, rank, tag)

    def take(self, rank: int, tag: int) -> bytearray | None:
        with self._lock:
            if not (messages := self._arrived.get((rank, tag))):
                return None
            message = messages.popleft()
            if not messages:
                del self._arrived[rank, tag]
            return message

    def _carry(self, work: Callable[[int, socket.socket], None], rank: int, connection: socket.socket) -> None:
        try:
            work(rank, connection)
        except (OSError, EOFError):
            if work == self._read:  # what came before has been read
                self.gone[rank] = "ended before the others"
        except Exception as error:
            self.gone[rank] = f"cannot be heard or told any more: {type(error).__name__}: {error}"

    def _write(self, rank: int, connection: socket.socket) -> None:
        while True:
            tag, data, sent = self._outgoing[rank].get()
            connection.sendall(HEADER.pack(tag, data.nbytes))
            connection.sendall(data)
            sent.done = True

    def _read(self, rank: int, connection: socket.socket) -> None:
        heard = partial(self.heard.add, rank)
        while True:
            tag, size = HEADER.unpack(_exactly(connection, HEADER.size))
            source = rank, tag
            with self._lock:
                if (awaited := self._awaited.pop(source, None)) is None:
                    self._coming.add(source)
            if awaited is not None:
                if size != len(awaited.bytes):
                    raise ValueError(f"{size} bytes came for an array of {len(awaited.bytes)}")
                _read_into(awaited.bytes, connection, heard)
                awaited.done = True
                continue
            data = _exactly(connection, size, heard)
            with self._lock:
                self._arrived.setdefault(source, deque()).append(data)
                self._coming.discard(source)


class _Sent:
    done = False

    def Test(self) -> bool:
        return self.done


class _Receiving:
    """A message for an array: read into it, or copied if it came before it was asked for."""

    def __init__(self, transport: TCPTransport, array: np.ndarray, rank: int, tag: int) -> None:
        assert array.flags.c_contiguous
        self._transport, self._source, self.done = transport, (rank, tag), False
        self.bytes = array.reshape(-1).view(np.uint8).data
        with transport._lock:
            places = transport._arrived, transport._coming, transport._awaited
            self._directly = not any(self._source in place for place in places)
            if self._directly:
                transport._awaited[self._source] = self

    def Test(self) -> bool:
        if not (self.done or self._directly) and (data := self._transport.take(*self._source)) is not None:
            self.bytes[:] = data
            self.done = True
        return self.done


def _exactly(connection: socket.socket, size: int, heard: Callable[[], None] = lambda: None) -> bytearray:
    """The next `size` bytes, of which each part that comes is `heard`. Raises EOFError."""
    data = bytearray(size)
    _read_into(memoryview(data), connection, heard)
    return data


def _read_into(view: memoryview, connection: socket.socket, heard: Callable[[], None]) -> None:
    while view:
        if not (count := connection.recv_into(view)):
            raise EOFError
        heard()
        view = view[count:]


def _meet(rank: int, size: int, address: str, port: int, end: float) -> dict[int, socket.socket]:
    """Connections to all others, by rank: to lower ranks that listen, and from higher ones."""
    found: dict[int, socket.socket] = {}
    listens_on, places = (address, port), {0: (address, port)}
    if rank:
        found[0] = _connect(address, port, end, f"rank {rank} cannot reach rank 0")
        listens_on = found[0].getsockname()[0], 0
    with _listen(*listens_on, size) as listener:
        place = f"{listens_on[0]}:{listener.getsockname()[1]}"
        hello = HELLO.pack(MAGIC, rank, size, listener.getsockname()[1])
        for other in range(rank):
            if other:
                found[other] = _connect(*places[other], end, f"rank {rank} cannot reach rank {other}")
            found[other].sendall(hello)
            if not other:
                found[0].settimeout(max(0.1, end - time.monotonic()) + GREETING)  # rank 0 is to give up first
                places = dict(enumerate(_places(rank, found[0], f"{address}:{port}"), 1))
        while missing := set(range(rank + 1, size)) - found.keys():
            try:
                if (left := end - time.monotonic()) <= 0:  # strangers may come all the time
                    raise TimeoutError
                listener.settimeout(left)
                connection, (host, *_) = listener.accept()
            except TimeoutError:
                problem = f"rank {min(missing)} of {size} has not come to rank {rank} at {place}"
                raise DistributedError(problem) from None
            connection.settimeout(GREETING)
            try:
                magic, other, its_size, its_port = HELLO.unpack(_exactly(connection, HELLO.size))
            except (OSError, EOFError):
                magic = b""
            if magic != MAGIC:  # a stranger
                connection.close()
            elif its_size != size or other not in missing:
                raise DistributedError(f"rank {other} of {its_size} came, expected rank {min(missing)} of {size}")
            else:
                found[other], places[other] = connection, (host, its_port)
    if rank == 0:
        text = json.dumps([places[other] for other in range(1, size)]).encode()
        for connection in found.values():
            connection.sendall(PLACES.pack(MAGIC, len(text)) + text)
    return found


def _places(rank: int, first: socket.socket, place: str) -> list[tuple[str, int]]:
    """Where the ranks from 1 on listen, as rank 0 says."""
    try:
        magic, length = PLACES.unpack(_exactly(first, PLACES.size))
        if magic == MAGIC:
            return json.loads(_exactly(first, length))
    except TimeoutError:
        magic = b""
    except (OSError, EOFError):
        raise DistributedError(f"rank {rank} was turned away at {place}: rank 0 gave up, or it is not there") from None
    what = "an answer of another program" if magic else "no answer from rank 0"
    raise DistributedError(f"rank {rank} has {what} at {place}")


def _listen(address: str, port: int, size: int) -> socket.socket:
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=size)
    except OSError as error:
        raise DistributedError(f"cannot listen on {address}:{port}: {error.strerror}") from None


def _connect(address: str, port: int, end: float, problem: str) -> socket.socket:
    """A connection, for which the other may not yet be ready."""
    while True:
        left = max(0.1, end - time.monotonic())
        try:
            connection = socket.create_connection((address, port), left)
            if connection.getsockname() != connection.getpeername():  # with itself: so it may be where nobody listens
                return connection
            connection.close()
        except OSError as error:
            if time.monotonic() > end:
                raise DistributedError(f"{problem} at {address}:{port}: {error.strerror or error}") from None
        time.sleep(0.1)
