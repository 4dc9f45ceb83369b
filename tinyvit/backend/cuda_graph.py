"""CUDA graphs: the launches of a function on a GPU, captured once and then repeated by a single call.

A small model's training step is hundreds of launches, each of which costs Python more time than it keeps the GPU busy.
A graph repeats them, with the same addresses and the same numbers, without Python: so what changes from one time to the
next must lie in device memory, and nothing may be read from the host or by it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any

Array = Any
Results = tuple[Array, ...]

_waiting: ContextVar[list[Callable[[], None]] | None] = ContextVar("tinyvit_waiting", default=None)


class NotCapturable(RuntimeError):
    """Work that depends on the host each time, which a captured graph would repeat as it was."""


def capturing() -> bool:
    """Whether a device's launches are being recorded into a graph, not run."""
    return _waiting.get() is not None


def after_capture(work: Callable[[], None]) -> None:
    """Leave `work` for the time between a capture and the first launch of its graph; it lives as long as that."""
    waiting = _waiting.get()
    if waiting is None:
        raise RuntimeError("after_capture needs a capture under way")
    waiting.append(work)


@contextlib.contextmanager
def capture() -> Iterator[list[Callable[[], None]]]:
    """Within this context `capturing` holds; the list that is given takes what `after_capture` is given."""
    waiting: list[Callable[[], None]] = []
    token = _waiting.set(waiting)
    try:
        yield waiting
    finally:
        _waiting.reset(token)


class Graphed:
    """A function of CuPy arrays that runs as a CUDA graph where it can.

    The first call of a kind runs in single launches, which compiles kernels and finds plans; the second one in a row is
    captured, and later ones repeat it. Calls of other kinds (the last, short batch) run in single launches, too; two of
    them in a row replace the graph. What cannot be captured always does, after one warning that says why.

    Args:
        function: takes arrays, gives a tuple of arrays; may change arrays that live on, always in place.
        depends_on: what of a graph's surroundings makes its kind, beside the shapes and dtypes of the inputs: settings,
            and addresses of arrays that it uses.
        on_replay: the host's share of a call that is repeated.
        can_retry: whether a call that found no memory beside the graph of another kind may be made again without it.

    Attributes:
        reason: why the last call ran in single launches; None if it did not.
    """

    def __init__(
        self,
        function: Callable[..., Results],
        depends_on: Callable[[], Hashable] = tuple,
        on_replay: Callable[[], None] = lambda: None,
        can_retry: Callable[[], bool] = lambda: False,
    ) -> None:
        self._function, self._depends_on, self._on_replay = function, depends_on, on_replay
        self._can_retry = can_retry
        self._graph: _Graph | None = None
        self._kind: Hashable = None  # the graph's
        self._last_kind: Hashable = None
        self._failures: dict[Hashable, str] = {}  # of kinds that could not be captured
        self.reason: str | None = None

    def __call__(self, *inputs: Array) -> Results:
        kind = (tuple((x.shape, x.dtype.str, x.dtype.name) for x in inputs), self._depends_on())
        again, self._last_kind = kind == self._last_kind, kind
        self.reason = None
        if self._graph is not None and kind == self._kind:
            return self._graph.replay(inputs, self._on_replay)
        if again and kind not in self._failures and self._capture(kind, inputs):
            assert self._graph is not None
            return self._graph.replay(inputs, lambda: None)  # the host did its share while capturing
        self.reason = self._failures.get(kind, "the first call with arrays of these shapes and addresses")
        try:
            return self._function(*inputs)
        except MemoryError:
            if self._graph is None or not self._can_retry():
                raise
        self._graph = None  # frees its memory
        return self._function(*inputs)

    def _capture(self, kind: Hashable, inputs: tuple[Array, ...]) -> bool:
        self._graph = None  # frees its memory
        try:
            self._graph, self._kind = _Graph(self._function, inputs), kind
        except Exception as error:  # whatever a library says to a call that cannot be captured
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if failure not in self._failures.values():
                warnings.warn(f"the GPU runs without CUDA graphs: {failure}", stacklevel=4)
            self._failures[kind] = failure
        return self._graph is not None


@functools.cache
def _stream(device: int) -> Any:
    """The one stream of a device that all graphs run on: they share the room that cuBLASLt works in."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


_turn = threading.RLock()  # one thread at a time works on that stream


def _once(size: int) -> Any:
    """Memory of the device for a graph's pool. Where there is none a pool of CuPy's own gives back what it has free and
    tries again; but launches that were captured before use that.
    """
    import cupy

    try:
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise NotCapturable(f"no memory for a graph: {error}") from None


_left: list[tuple[Any, Any]] = []  # devices and pools of graphs that are gone, but for arrays that somebody holds


def _give_back() -> None:
    """Free the memory of graphs that are gone: what a pool of CuPy's holds when it is dropped is lost for good."""
    for device, pool in list(_left):
        with device:
            pool.free_all_blocks()
            empty = not pool.total_bytes()
        if empty and (device, pool) in _left:
            _left.remove((device, pool))


class _Graph:
    """One captured call, with all memory that it works in: a pool of its own, which nothing else allocates from."""

    def __init__(self, function: Callable[..., Results], inputs: tuple[Array, ...]) -> None:
        import cupy

        gc.collect()  # unreachable graphs, whose memory is given back then, as CuPy's own pools do when memory runs out
        _give_back()
        cupy.get_default_memory_pool().free_all_blocks()  # what calls in single launches needed, the graph needs now
        self._device, self._pool = cupy.cuda.Device(), cupy.cuda.MemoryPool(_once)
        self._pool.set_limit(size=0)  # at a limit of the environment's, too, the pool would give back what it has free
        self._inputs = [x.copy() for x in inputs]
        self._stream = _stream(self._device.id)
        with self._after_current(), capture() as self._waiting, cupy.cuda.using_allocator(self._pool.malloc):
            self._stream.begin_capture()
            try:
                self._outputs = function(*self._inputs)
            except BaseException:
                with contextlib.suppress(Exception):  # the capture may have broken off already
                    self._stream.end_capture()
                raise
            self._graph = self._stream.end_capture()
        with self._after_current():
            for work in self._waiting:
                work()

    def __del__(self, exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if exiting() or "_pool" not in vars(self):
            return
        _left.append((self._device, self._pool))
        vars(self).clear()  # the graph and its arrays, before their memory
        if not capturing():
            _give_back()

    def replay(self, inputs: tuple[Array, ...], on_replay: Callable[[], None]) -> Results:
        """Repeat the call with other inputs; copies are given, which the next call does not write over."""
        with self._after_current():
            for own, x in zip(self._inputs, inputs, strict=True):
                own[...] = x
            on_replay()
            self._graph.launch(self._stream)
            return tuple(x.copy() for x in self._outputs)

    @contextlib.contextmanager
    def _after_current(self) -> Any:
        """Within this context work goes to the graph's stream, in its place among that of the current one."""
        import cupy

        current = cupy.cuda.get_current_stream()
        with _turn:
            self._stream.wait_event(current.record())
            try:
                with self._stream:
                    yield
            finally:
                current.wait_event(self._stream.record())
