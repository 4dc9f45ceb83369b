"""Sums between GPUs: on stand-ins for CuPy's streams and NCCL, and with one process on a GPU."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from on_gpu import needs_gpu

from tinyvit.backend.cuda_graph import Graphed
from tinyvit.distributed import ALONE, DistributedError, nccl

LIKE = [("float32", (3, 5)), ("float16", (7,)), ("float32", (2, 4)), ("float32", ()), ("int64", ())]


class Stream:
    """Keeps what it is given to do, for `run`; its number is its pointer."""

    everyone: ClassVar[list[Stream]] = []

    def __init__(self, **_):
        self.work, self.ptr = [], len(Stream.everyone)
        Stream.everyone.append(self)

    def record(self):
        return self, len(self.work)

    def wait_event(self, event):
        self.work.append(event)

    @staticmethod
    def run(order):
        """Do everything, as the events allow, and otherwise what an earlier stream of `order` has first."""
        done = [0] * len(order)
        while any(done[s.ptr] < len(s.work) for s in order):
            for stream in order:
                if done[stream.ptr] < len(stream.work):
                    work = stream.work[done[stream.ptr]]
                    if callable(work):
                        work()
                    elif done[work[0].ptr] < work[1]:
                        continue
                    done[stream.ptr] += 1
                    break


class Array(np.ndarray):
    """In whose memory the present stream writes, later."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    def __setitem__(self, where, value):
        Stream.everyone[0].work.append(lambda: np.ndarray.__setitem__(self, where, value))


class Communicator:
    """Of two processes that give the same: a sum is twice what one gives."""

    sent: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, size, unique, rank):
        if unique != (1, -2):
            raise NcclError("bad id")

    def allReduce(self, source, target, size, kind, operation, stream):
        assert source == target and operation == nccl.SUM
        dtype = np.dtype({number: name for name, number in nccl.TYPES.items()}[kind])
        memory = np.frombuffer((ctypes.c_char * (size * dtype.itemsize)).from_address(source), dtype)
        Stream.everyone[stream].work.append(lambda: np.multiply(memory, 2, out=memory))
        self.sent.append((dtype.name, size))


class NcclError(RuntimeError):
    pass


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setattr(Stream, "everyone", [])
    monkeypatch.setattr(Communicator, "sent", [])
    current = Stream()
    names = dict(NcclCommunicator=Communicator, NcclError=NcclError, get_unique_id=lambda: (1, -2))
    cuda = SimpleNamespace(Stream=Stream, get_current_stream=lambda: current, nccl=SimpleNamespace(**names))
    module = SimpleNamespace(cuda=cuda, empty=lambda size, dtype: np.full(size, 99, dtype).view(Array))
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return module


@pytest.mark.parametrize("backwards", [False, True], ids=["backward first", "sums first"])
def test_sums_wait_for_gradients_and_the_step_for_sums(cupy, monkeypatch, backwards):
    """Whatever runs first where no event says otherwise, and when all is repeated with other gradients, as a graph."""
    monkeypatch.setattr(nccl, "BUCKET", 40)
    gradients = [np.zeros(shape, dtype).view(Array) for dtype, shape in LIKE]
    reduction, current = nccl.NCCLReduction(ALONE, gradients), cupy.cuda.get_current_stream()
    factor, seen, results = [0], [], []
    reduction.add(0, 1, gradients[1])  # of a step that broke off
    reduction.begin()
    for number in reversed(range(len(LIKE))):
        g = gradients[number]
        current.work.append(lambda g=g, n=number: np.ndarray.__setitem__(g, ..., factor[0] * (n + 1)))
        reduction.add(0, number, g)
        current.work.append(lambda g=g: seen.append(g.copy()))  # the backward pass goes on with it
    assert Communicator.sent[:3] == [("int64", 1), ("float32", 9), ("float16", 7)]  # the first bucket is full
    assert Communicator.sent[3:] == [("float32", 15)]
    sums = reduction.finish()
    current.work.append(lambda: results.extend(np.array(x) for x in sums))
    for factor[0] in (1, 3):
        seen.clear(), results.clear()
        Stream.run(Stream.everyone[:: -1 if backwards else 1])
        for number, (dtype, shape) in enumerate(LIKE):
            assert results[number].dtype == dtype and results[number].shape == shape
            assert np.all(results[number] == 2 * factor[0] * (number + 1)), number
            assert np.all(seen[-1 - number] == factor[0] * (number + 1)), number


def test_what_nccl_refuses_is_one_line(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.nccl, "get_unique_id", lambda: (0,))
    with pytest.raises(DistributedError, match="NCCL does not connect the 1 GPUs: bad id"):
        nccl.NCCLReduction(ALONE, [])
    del cupy.cuda.nccl
    with pytest.raises(DistributedError, match="several GPUs need NCCL: pip install nvidia-nccl-cu12"):
        nccl.NCCLReduction(ALONE, [])


@needs_gpu
def test_a_graph_holds_the_sums(monkeypatch):
    """With one process, whose sums are what it gives."""
    import cupy

    pytest.importorskip("cupy.cuda.nccl", exc_type=ImportError)
    monkeypatch.setattr(nccl, "BUCKET", 40)
    reduction = nccl.NCCLReduction(ALONE, LIKE)

    def step(x):
        reduction.begin()
        for number in reversed(range(len(LIKE))):
            dtype, shape = LIKE[number]
            reduction.add(0, number, (cupy.ones(shape) * x * (number + 1)).astype(dtype))
        return tuple(reduction.finish())

    graph = Graphed(step)
    for i in range(5):
        results = graph(cupy.array(float(i)))
        for number, (dtype, shape) in enumerate(LIKE):
            assert results[number].dtype == dtype and results[number].shape == shape
            assert bool((results[number] == i * (number + 1)).all())
    assert graph.reason is None
