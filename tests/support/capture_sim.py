"""Replaces CuPy's streams, graphs and memory pools for the tests of `backend.cuda_graph`; arrays are NumPy's."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cuda_sim
import numpy as np
import pytest

from tinyvit.backend import cuda_graph


class Driver:
    """Records launches while a stream captures, and otherwise runs them; `room` is how many bytes are free."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] | None = None
        self.replays = 0
        self.room = 1 << 30
        self.pools: list[Pool] = []
        self.waited: list[Stream] = []  # which stream waited for another one, in their order
        self.current = Stream(self)

    @contextlib.contextmanager
    def using_allocator(self, malloc: Callable[[int], np.ndarray] | None) -> Iterator[None]:
        before, cuda_sim.allocate = cuda_sim.allocate, malloc
        try:
            yield
        finally:
            cuda_sim.allocate = before

    def memory(self, size: int) -> np.ndarray:
        """As `cupy.cuda.Memory` takes it from the device."""
        if size > self.room:
            raise CUDARuntimeError("out of memory")
        self.room -= size
        return np.zeros(size, np.uint8)

    def held(self) -> list[int]:
        """Bytes of all graphs' pools that hold any."""
        return [pool.total_bytes() for pool in self.pools if pool.total_bytes()]

    def launch(self, work: Callable[[], None]) -> None:
        work() if self.captured is None else self.captured.append(work)


class CUDARuntimeError(RuntimeError):
    pass


class Pool:
    """Of memory that is one split block: nothing goes back to the device while one piece is held; nor ever without
    `free_all_blocks`. What somebody has let go of the next one gets, as CuPy's pools do it."""

    def __init__(self, driver: Driver, allocator: Callable[[int], np.ndarray]) -> None:
        self._driver, self._allocator = driver, allocator
        self._blocks: dict[int, np.ndarray] = {}  # by address
        self._free: set[int] = set()
        self.limit: int | None = None
        driver.pools.append(self)

    def set_limit(self, size: int) -> None:
        self.limit = size

    def malloc(self, size: int) -> np.ndarray:
        fitting = [address for address in self._free if self._blocks[address].nbytes >= size]
        if fitting:
            address = min(fitting, key=lambda address: self._blocks[address].nbytes)
            self._free.remove(address)
        else:
            block = self._try_malloc(size)
            address = block.ctypes.data
            self._blocks[address] = block
        piece = (ctypes.c_uint8 * size).from_address(address)  # an owner of its own, whose end can be seen
        weakref.finalize(piece, self._free.add, address)
        return np.frombuffer(piece, np.uint8)

    def _try_malloc(self, size: int) -> np.ndarray:
        try:
            return self._allocator(size)
        except CUDARuntimeError:
            for address in self._free:
                self._driver.room += self._blocks.pop(address).nbytes
            self._free.clear()
            return self._allocator(size)

    def total_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def free_all_blocks(self) -> None:
        if len(self._free) == len(self._blocks):
            self._driver.room += self.total_bytes()
            self._blocks.clear()
            self._free.clear()


class Stream:
    def __init__(self, driver: Driver, **_: Any) -> None:
        self._driver = driver

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def wait_event(self, event: None) -> None:
        self._driver.waited.append(self)

    def begin_capture(self) -> None:
        self._driver.captured = []

    def end_capture(self) -> SimpleNamespace:
        work, self._driver.captured = self._driver.captured, None

        def launch(stream: Stream) -> None:
            self._driver.replays += 1
            for each in work:
                each()

        return SimpleNamespace(launch=launch)


class Device(contextlib.nullcontext):
    id = 0


@contextlib.contextmanager
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Within this context `import cupy` gives the stand-in, and `cuda_sim`'s kernels are launched through it."""
    driver = Driver()
    cuda = SimpleNamespace(
        Stream=lambda **options: Stream(driver, **options),
        get_current_stream=lambda: driver.current,
        Device=Device,
        MemoryPool=lambda allocator=driver.memory: Pool(driver, allocator),
        Memory=driver.memory,
        MemoryPointer=lambda memory, offset: memory,
        runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError),
        using_allocator=driver.using_allocator,
    )
    pool = SimpleNamespace(free_all_blocks=lambda: None, malloc=None)  # fresh memory each time
    module = SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool, ndarray=SimpleNamespace)
    monkeypatch.setattr(cuda_sim, "launch", driver.launch)
    monkeypatch.setitem(sys.modules, "cupy", module)
    cuda_graph._stream.cache_clear()
    yield driver
    cuda_graph._stream.cache_clear()
    cuda_graph._left.clear()
