"""Settings shared by all tests."""

import os

# Before NumPy is imported. OpenBLAS's threads wait by spinning: where processes share the cores, they took twenty times
# the CPU time that one thread takes for the products of small models. Tests that run on more threads say so.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# XLA compiles each operation for each shape; its optimizations take longer than they save.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A hundred processes are started here: each would compile all modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import capture_sim
import pytest
import running  # noqa: F401  (it notes the real number of cores)
from hypothesis import HealthCheck, settings
from on_gpu import HAS_GPU

from tinyvit import kernels
from tinyvit.backend import parallel
from tinyvit.kernels import jit
from tinyvit.training import run_directory


def once(function: Callable) -> Callable:
    """`function` with its first result for every call."""
    results: list = []

    @functools.wraps(function)
    def first(*arguments: object) -> object:
        if not results:
            results.append(function(*arguments))
        return results[0]

    return first


# Derandomised: the same tree gives the same verdict on every machine. Deadlines say nothing on shared cores.
settings.register_profile(
    "tinyvit", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tinyvit")

# Where no test asks for those that numba compiles, NumPy's own kernels run, and commands need not load numba.
os.environ.setdefault("TINYVIT_JIT", "0")

# TINYVIT_TEST_THREADS=4 runs the tests as a machine with four cores would.
if "TINYVIT_TEST_THREADS" in os.environ:
    parallel.available_cores = lambda: int(os.environ["TINYVIT_TEST_THREADS"])

# A drawing of curves takes longer than most runs here, and waiting for the disk as long: no test cuts the power. The
# first curves of a process are drawn; tests of drawing call `curves_png.__wrapped__`.
run_directory.curves_png = once(run_directory.curves_png)
os.fsync = lambda descriptor: None


# Of a fresh checkout numba compiles for half a minute while the tests are collected. The first two workers begin with
# one half each, and find the other in numba's cache.
half = {"gw0": "loops", "gw1": "image_loops"}.get(os.environ.get("PYTEST_XDIST_WORKER", ""))
if half and importlib.util.find_spec("numba"):
    importlib.import_module(f"tinyvit.kernels.jit.{half}")


# What is imported and collected stays: looking through a million objects of it for garbage takes a tenth of a second,
# and some tests do that often.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no GPU."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="CuPy finds no GPU"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept, for all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def numba_kernels() -> Iterator[None]:
    """The processor decides on numba's kernels here, not the environment's TINYVIT_JIT; what it has, it gains from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYVIT_JIT", "1")
        patch.setattr(jit, "processor_name", lambda: "znver5")
        kernels._fastest.cache_clear()
        yield
    kernels._fastest.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[capture_sim.Driver]:
    """What stands for CuPy's streams, graphs and pools of memory during a test."""
    with capture_sim.driver(monkeypatch) as driver:
        yield driver
