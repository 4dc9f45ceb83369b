"""What the tests of the benchmarks share: scripts in reach, no waiting, and NumPy in CuPy's place."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import devices

torch.set_num_threads(1)  # the shapes are tiny


@pytest.fixture(autouse=True, scope="module")
def hurry():
    """No pauses between contenders, no measured peaks, and no more inputs than fill a small cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices.Host, "settle", 0.0)
        patch.setattr(devices.Host, "turn", 0.0)
        patch.setattr(devices.Host, "cache", 1 << 16)
        patch.setattr(devices.Host, "matmul_rate", lambda self, dtype: 1e11)
        patch.setattr(devices.Host, "copy_rate", lambda self: 1e10)
        yield


class Stream:
    """Of CuPy: as far as the timing needs it."""

    def __init__(self, non_blocking):
        self.capturing, self.work = False, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        assert not self.capturing

    def begin_capture(self):
        self.capturing = True

    def end_capture(self):
        self.capturing = False
        return types.SimpleNamespace(launch=lambda stream: self.work.append("graph"))


class Event:
    clock = 0.0

    def record(self, stream):
        self.at = Event.clock = Event.clock + 1.0

    def synchronize(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    cuda = types.SimpleNamespace(Stream=Stream, Event=Event, get_elapsed_time=lambda a, b: 1e3 * (b.at - a.at))
    cuda.Device = lambda: types.SimpleNamespace(id=0, synchronize=lambda: None, attributes={"L2CacheSize": 1 << 17})
    cuda.runtime = types.SimpleNamespace(getDeviceProperties=lambda number: {"name": b"a GPU"})
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    torch_cuda = types.SimpleNamespace(empty_cache=lambda: None)
    numpy = {name: getattr(np, name) for name in ("asarray", "copyto", "empty_like", "resize")}
    cupy = types.SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool, __version__="0", **numpy)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "ml_dtypes", types.SimpleNamespace(bfloat16=np.float16))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=torch_cuda))
    monkeypatch.setattr(devices, "pick_device", lambda name: "cuda")
    return devices.Gpu()
