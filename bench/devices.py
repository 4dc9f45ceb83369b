"""The CPU and the GPU as the benchmarks see them: inputs, two measured peaks, and a fair way to time calls."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import tinyvit
from tinyvit.backend import memory, parallel
from tinyvit.backend.devices import DeviceError, pick_device
from tinyvit.execution import system_info
from tinyvit.kernels.cuda import cublas

Call = Callable[[int], Any]  # does the work on the inputs of this number and gives its results
Times = list[float]  # seconds of one call each


class Parser(argparse.ArgumentParser):
    """The options of a benchmark; an error is one line, without the usage text."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def choose(name: str) -> Host | Gpu:
    """The device called "cpu", "cuda", "cuda:N" or "auto": the GPU where one works.

    Of several GPUs only the chosen one stays visible, also to other libraries and to processes that are started later.

    Raises:
        RuntimeError: "cuda" without CuPy, its driver or a GPU.
    """
    if name.startswith("cuda:"):
        name, _, number = name.partition(":")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if visible != [""] and int(number) >= len(visible):
            raise RuntimeError(f"there is no GPU cuda:{number} among CUDA_VISIBLE_DEVICES={','.join(visible)}")
        os.environ["CUDA_VISIBLE_DEVICES"] = number if visible == [""] else visible[int(number)]
    try:
        return Host() if pick_device(name) == "cpu" else Gpu()
    except DeviceError as problem:
        raise RuntimeError(str(problem)) from None


def timed(function: Callable[[], object]) -> float:
    """Seconds until it returns."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sgemm_rate(size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of NumPy's float32 matrix product, the best of several."""
    a, b = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    a @ b
    return max(2 * size**3 / timed(lambda: a @ b) for _ in range(repeats))


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)


class Host:
    """NumPy on all cores. Contenders take turns, so that a machine whose speed drifts treats them alike."""

    name = "cpu"
    dtypes = ("float32",)
    settle = 0.1  # seconds between two contenders: threads of the one before keep spinning for a while
    turn = 0.05  # seconds of calls before it is the next one's turn; one call at least
    eager: frozenset[str] = frozenset()  # see Gpu

    def __init__(self) -> None:
        memory.keep_freed_memory()  # as training steps do

    def describe(self) -> str:
        return f"{parallel.available_cores()} cores"

    @property
    def cache(self) -> int:
        """Bytes of the largest cache."""
        sizes = []
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            number, unit = re.fullmatch(r"(\d+)([KM]?)\s*", file.read_text()).groups()
            sizes.append(int(number) << {"": 0, "K": 10, "M": 20}[unit])
        return max(sizes, default=32 << 20)

    def random(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Normal numbers, which repeat after a million."""
        return np.resize(_noise(), shape)

    def matmul_rate(self, dtype: str) -> float:
        """FLOP/s of a large matrix product."""
        return sgemm_rate(repeats=20)

    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a large copy on all cores."""
        source = self.random((1 << 26,), "float32")
        target = np.empty_like(source)
        plan = parallel.plan(source.size)

        def copy() -> None:
            list(parallel.run(plan, lambda a, b: np.copyto(target[a:b], source[a:b])))

        copy()
        return 2 * source.nbytes / min(timed(copy) for _ in range(5))

    def times(self, calls: dict[str, Call], sets: int, rounds: int) -> dict[str, Times | Exception]:
        """Seconds of many calls of each contender, which go through all sets of inputs in turn."""
        seconds: dict[str, Times] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                time.sleep(self.settle)
                calls[name](0)  # wakes threads up and fetches memory: not counted
                start = time.perf_counter()
                while True:
                    number = len(seconds[name]) % sets
                    seconds[name].append(timed(functools.partial(calls[name], number)))
                    if time.perf_counter() - start >= self.turn:
                        break
        return dict(seconds)

    def free(self) -> None:
        """Nothing is held back here."""


class Gpu:
    """CuPy on the current GPU. A call's time is the device's own, without the gaps between launches from Python: a CUDA
    graph of many calls is timed by events. What cannot be captured is launched one by one, and `eager` names it."""

    name = "cuda"
    dtypes = ("float32", "float16", "bfloat16")
    calls = 16  # of a graph, at least

    def __init__(self) -> None:
        import cupy

        try:
            import ml_dtypes
        except ImportError:
            raise RuntimeError("device cuda needs ml_dtypes for bfloat16: pip install ml_dtypes") from None
        self.cupy, self.bfloat16 = cupy, np.dtype(ml_dtypes.bfloat16)
        self.stream = cupy.cuda.Stream(non_blocking=True)  # the null stream cannot be captured
        self.eager: set[str] = set()

    def describe(self) -> str:
        return self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.Device().id)["name"].decode()

    @property
    def cache(self) -> int:
        """Bytes of the L2 cache."""
        return self.cupy.cuda.Device().attributes["L2CacheSize"]

    def random(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Normal numbers, which repeat after a million."""
        if dtype != "bfloat16":
            return self.cupy.resize(self.cupy.asarray(_noise().astype(dtype)), shape)
        bits = self.cupy.asarray(_noise().astype(self.bfloat16).view(np.uint16))
        return self.cupy.resize(bits, shape).view(self.bfloat16)

    def matmul_rate(self, dtype: str, size: int = 8192) -> float:
        """FLOP/s of a large matrix product, CuPy's or, where that is faster, cuBLASLt's."""
        a, b = (self.random((size, size), dtype) for _ in "ab")
        products = (lambda i: a @ b, lambda i: cublas.input_gradient(self.cupy, a, b))
        seconds = [np.median(self._times("", product, 1, 5)) for product in products if product(0) is not None]
        return 2 * size**3 / float(min(seconds))

    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a large copy on the device."""
        source = self.random((1 << 28,), "float32")
        target = self.cupy.empty_like(source)
        return 2 * source.nbytes / float(np.median(self._times("", lambda i: self.cupy.copyto(target, source), 1, 5)))

    def times(self, calls: dict[str, Call], sets: int, rounds: int) -> dict[str, Times | Exception]:
        """Seconds of a call of each contender, `rounds` times, each a mean over calls through all sets of inputs."""
        out: dict[str, Times | Exception] = {}
        for name, call in calls.items():
            try:
                out[name] = self._times(name, call, sets, rounds)
            except Exception as error:  # out of memory, for one: the others go on
                out[name] = error
            self.free()
        return out

    def _times(self, name: str, call: Call, sets: int, rounds: int) -> Times:
        self.eager.discard(name)
        count = max(sets, self.calls)
        self.cupy.cuda.Device().synchronize()  # inputs were made on another stream
        with self.stream, _torch_stream(self.stream, name):
            for i in range(sets):  # compiles; leaves memory in the pools
                call(i)
            self.stream.synchronize()
            launch = self._launcher(name, lambda: [call(i % sets) for i in range(count)])
            return [self._elapsed(launch) / count for _ in range(rounds + 2)][2:]

    def _elapsed(self, launch: Callable[[], object]) -> float:
        """Seconds on the device."""
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(self.stream)
        launch()
        end.record(self.stream)
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end) / 1e3

    def _launcher(self, name: str, body: Callable[[], list]) -> Callable[[], object]:
        """`body` as a graph, or where it cannot be captured `body` itself. Results live as long as the graph, so that
        each has memory of its own."""
        try:
            return _torch_graph(body) if name.startswith("torch") else self._cupy_graph(body)
        except Exception:
            self.eager.add(name)
            return body

    def _cupy_graph(self, body: Callable[[], list]) -> Callable[[], object]:
        self.stream.begin_capture()
        try:
            kept = body()
        except BaseException:
            with contextlib.suppress(Exception):  # it may have been broken off already
                self.stream.end_capture()
            raise
        graph = self.stream.end_capture()

        def launch(kept: list = kept) -> None:
            graph.launch(self.stream)

        return launch

    def free(self) -> None:
        """Give unused memory of all pools back, so that one library does not starve another."""
        self.cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


@contextlib.contextmanager
def _torch_stream(stream: Any, name: str) -> Iterator[None]:
    """Let torch's contenders work on CuPy's stream."""
    if not name.startswith("torch"):
        yield
        return
    import torch

    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        yield


def _torch_graph(body: Callable[[], list]) -> Callable[[], object]:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = body()

    def launch(kept: list = kept) -> None:
        graph.replay()

    return launch


def machine(device: Host | Gpu | None = None) -> dict:
    """What a record says of where it was made."""
    from threadpoolctl import threadpool_info

    versions = {"python": platform.python_version(), "numpy": np.__version__, "tinyvit": tinyvit.__version__}
    for name in ("numba", "torch", "jax", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if "cupy" in sys.modules:
        versions["cupy"] = sys.modules["cupy"].__version__
    libraries = [b for b in threadpool_info() if b["user_api"] == "blas"]
    blas = [f"{b['internal_api']} {b['version']} {b.get('architecture')}" for b in libraries]
    forced = {k: v for k, v in os.environ.items() if k.startswith(("OPENBLAS_", "OMP_", "MKL_"))}
    processor, flags = system_info.processor()
    gpu = {"gpu": device.describe()} if isinstance(device, Gpu) else {}
    return gpu | {
        "cores": parallel.available_cores(),
        "blas": blas,
        "kernels": system_info.cpu_kernels(os.environ),
        "versions": versions,
        "environment": forced,
        "processor": processor,
        "instructions": system_info.instruction_sets(flags),
        "date": time.strftime("%Y-%m-%d"),
    }
