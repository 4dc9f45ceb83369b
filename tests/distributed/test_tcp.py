"""Messages over TCP between threads, and what processes exchange."""

import contextlib
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinyvit.distributed import DistributedError, Failed, processes, tcp
from tinyvit.errors import Stopped

HOME = "127.0.0.1"
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
leaves |= arrays(st.sampled_from(["<f4", "<f2", "<i8", "u1", "?"]), array_shapes(min_dims=0, min_side=0))
values = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3))


@pytest.fixture(autouse=True)
def no_alarm(monkeypatch):
    """A failed group lets the system end its process a little later: here that is pytest's."""
    monkeypatch.setattr(processes.Processes, "_end_within", lambda self, seconds: None)
    yield
    assert signal.alarm(0) == 0


def free_port():
    with socket.create_server((HOME, 0)) as server:
        return server.getsockname()[1]


def meet(*ranks, size=None, port=None, patience=10.0):
    """What becomes of processes of these ranks: transports, or what their errors say."""
    port = port or free_port()

    def one(rank):
        try:
            return tcp.TCPTransport(rank, size or len(ranks), HOME, port, patience)
        except (DistributedError, Failed) as error:
            return f"{type(error).__name__}: {error}"  # without what it refers to, such as connections

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def until(condition):
    end = time.monotonic() + 20
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.001)
    return result


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() and b.flags.writeable
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return same([*a.values()], [*b.values()]) and a.keys() == b.keys() if isinstance(a, dict) else a == b


@given(values)
def test_values_are_unpacked_as_they_were(value):
    assert same(value, processes.unpack(processes.pack(value)))


def test_what_is_not_plain_is_not_exchanged():
    with pytest.raises(TypeError, match="plain values and NumPy arrays, got object"):
        processes.pack([object()])


def test_messages_arrive_whole_and_in_order_and_then_nobody_listens():
    port = free_port()
    transports = meet(0, 1, 2, 3, port=port)
    rng = np.random.default_rng(0)
    sent = {(i, j): [rng.normal(size=n) for n in (300_000, 0, 3)] for i in range(4) for j in range(4) if i != j}
    requests = [transports[i].send(x, j, n % 2) for (i, j), these in sent.items() for n, x in enumerate(these)]
    for (i, j), (first, second, third) in sent.items():
        for tag, expected in ((1, second), (0, first), (0, third)):  # by tags, whichever came before
            receiving = transports[j].receive(found := np.empty_like(expected), i, tag)
            until(receiving.Test)
            assert found.tobytes() == expected.tobytes()
        assert transports[j].take(i, 0) is None and i in transports[j].heard
    assert all(until(request.Test) for request in requests)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOME, port))


def test_messages_are_read_into_the_arrays_that_wait_for_them():
    first, second = meet(0, 1)
    sent = [np.full(shape, i, np.float32) for i, shape in enumerate([(300, 1000), (0,), (7, 3)])]
    found = [np.empty_like(x) for x in sent]
    receiving = [second.receive(x, 0, 5) for x in found]  # the second and third wait behind the first
    assert not any(each.Test() for each in receiving)
    for x in sent:
        first.send(x, 1, 5)
    assert all(until(each.Test) for each in receiving)
    assert all(np.array_equal(x, y) for x, y in zip(found, sent, strict=True))
    assert not (second._arrived or second._coming or second._awaited)
    second.receive(np.empty(3, np.float32), 0, 5)
    first.send(np.ones(2, np.float32), 1, 5)
    until(lambda: second.gone)
    assert "8 bytes came for an array of 12" in second.gone[0]


def test_strangers_do_not_disturb(monkeypatch):
    monkeypatch.setattr(tcp, "GREETING", 1.0)
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(meet, 0, size=2, port=port)
        strangers = [tcp._connect(HOME, port, time.monotonic() + 9, "") for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        strangers[1].close()
        (second,), (first,) = meet(1, size=2, port=port), meeting.result()
    assert (first.rank, second.rank) == (0, 1)
    first.send(b"hello", 1, 7)
    assert until(lambda: second.take(0, 7)) == b"hello"


@pytest.fixture
def connections(monkeypatch):
    """Those of each transport, by rank of the other."""
    found, meeting = {}, tcp._meet
    monkeypatch.setattr(tcp, "_meet", lambda rank, *given: found.setdefault(rank, meeting(rank, *given)))
    return found


def test_a_process_that_ends_is_noticed_after_what_it_sent(connections):
    first, second = meet(0, 1)
    until(second.send(np.ones(100_000), 0, 1).Test)
    connections[1][0].shutdown(socket.SHUT_RDWR)
    until(lambda: first.gone)
    assert first.gone == {1: "ended before the others"} and len(first.take(1, 1)) == 800_000


def test_an_error_in_a_thread_that_carries_messages_is_told():
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(processes.Processes, meet(0, 1))
    second._transport._outgoing[0].put((processes.VALUE, SimpleNamespace(nbytes=1 << 62), None))
    for group, error in ((first, "rank 1 .*: MemoryError"), (second, "rank 0 .*: TypeError")):
        with pytest.raises(DistributedError, match=error.replace("*", "* cannot be heard or told any more")):
            group.exchange(None, 5)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_busy_process_is_interrupted_where_another_is_gone_that_has_not_left(leaves, connections, monkeypatch):
    monkeypatch.setattr(processes, "BEAT", 0.02)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(processes.Processes, meet(0, 1))
        seen = threading.Event()

        def together():
            with second.together():
                assert seen.wait(20)
                if not leaves:
                    connections[1][0].shutdown(socket.SHUT_RDWR)
                    until(lambda: second._transport.gone)

        pool.submit(together)
        error = pytest.raises(DistributedError, match=r"rank 1 .* ended before the others")
        with contextlib.nullcontext() if leaves else error, first.together():
            until(lambda: first._silent[1] >= 0)
            seen.set()
            if leaves:
                until(lambda: first._silent[1] < 0)
                connections[1][0].shutdown(socket.SHUT_RDWR)
                until(lambda: first._transport.gone)
            time.sleep(0.2 if leaves else 20)


def test_errors_are_told_whatever_their_letters_and_stops_are_not():
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(processes.Processes, meet(0, 1)))

        def together(group, error):
            with pytest.raises(type(error), match=str(error)), group.together():
                if group.rank:
                    raise error
                group.exchange(None)

        second = pool.submit(together, groups[1], ValueError("\udcff.png"))
        together(groups[0], Failed(r"rank 1 .*: ValueError: \\udcff.png"))
        second.result()
    with pytest.raises(Stopped), groups[1].together():
        raise Stopped(2, "run")
    groups[1].send(b"", 0, processes.VALUE)
    until(lambda: groups[0]._transport.take(1, processes.VALUE) is not None)
    assert groups[0]._transport.take(1, processes.FAILURE) is None


def test_those_who_do_not_meet_say_why(monkeypatch):
    monkeypatch.setattr(tcp, "GREETING", 1.0)
    with socket.create_server((HOME, 0)) as taken:
        port = taken.getsockname()[1]
        (error,) = meet(0, size=2, port=port)
        assert error.startswith(f"DistributedError: cannot listen on {HOME}:{port}: Address already in use")
        (error,) = meet(1, size=2, port=port, patience=0.3)
        assert error.startswith("DistributedError: rank 1 has no answer from rank 0 at 127.0.0.1:")
        with ThreadPoolExecutor(1) as pool:
            meeting = pool.submit(meet, 1, size=2, port=port)
            taken.accept()[0].close()  # which the last one left
            taken.accept()[0].sendall(b"HTTP/1.0 400 Bad request\r\n")
            assert meeting.result() == [f"DistributedError: rank 1 has an answer of another program at {HOME}:{port}"]
    (error,) = meet(1, size=2, patience=0.3)
    assert error.startswith("DistributedError: rank 1 cannot reach rank 0 at 127.0.0.1:")
    first, second = meet(0, 1, size=3, patience=0.5)
    assert first.startswith("DistributedError: rank 2 of 3 has not come to rank 0 at 127.0.0.1:")
    assert second.startswith("DistributedError: rank 1 was turned away at 127.0.0.1:")
    first, *others = meet(0, 1, 1)
    assert first == "DistributedError: rank 1 of 3 came, expected rank 2 of 3"
    assert all("was turned away at 127.0.0.1:" in other for other in others)
