"""Cutting a batch into shards and running them side by side.

A shard is a range of a batch's samples that is computed on its own. Its result depends on nothing but the samples and
their places in the batch, and results are combined in the order of the shards, so that a run gives the same bits
whatever thread computed which shard when. NumPy releases Python's lock inside its loops, so that threads with one BLAS
thread each keep all cores busy, where a BLAS of many threads would parallelise the matrix products only.
"""

from __future__ import annotations

import bisect
import contextlib
import contextvars
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

S = TypeVar("S")
T = TypeVar("T")

WORTH_A_THREAD = 1 << 17  # array elements: below this, handing work to a thread costs more than it saves


def affinity() -> frozenset[int]:
    """The cores on which this process may run."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


@cache
def available_cores() -> int:
    """Cores that this process may use: its affinity, limited by the cgroup's quota (a container's --cpus)."""
    cores = len(affinity())
    return max(1, min(cores, cgroup_cores(Path("/sys/fs/cgroup")) or cores))


def cgroup_cores(root: Path) -> int | None:
    """Whole cores that the cgroup mounted at `root` allows (version 2 or 1), None without a limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((root / file).read_text() for file in files).split())
        except (OSError, ValueError):  # no such file, or no number in it ("max")
            continue
        if quota > 0 and period > 0:  # -1: no limit
            return max(1, quota // period)
    return None


_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("tinyvit_threads", default=None)


@contextlib.contextmanager
def limit(threads: int | None) -> Iterator[None]:
    """Within this context `plan` and `each` use at most `threads` threads by default; None changes nothing."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    token = _limit.set(_limit.get() if threads is None else threads)
    try:
        yield
    finally:
        _limit.reset(token)


def usual_threads() -> int:
    """The `limit` in force, else one thread for each core."""
    return _limit.get() or available_cores()


@dataclass(frozen=True)
class Shards:
    """How one batch is cut: ranges of samples, computed by `workers` threads with `blas_threads` BLAS threads each."""

    ranges: tuple[tuple[int, int], ...]
    workers: int
    blas_threads: int


def plan(samples: int, threads: int | None = None, shards: int | None = None) -> Shards:
    """Cut `samples` into `shards` ranges (one for each thread, if not said) that differ by at most one sample.

    Threads that a small batch leaves without a shard are given to BLAS.

    Raises:
        ValueError: fewer than one thread or shard.
    """
    threads = usual_threads() if threads is None else threads
    shards = threads if shards is None else shards
    if threads < 1 or shards < 1:
        raise ValueError(f"threads and shards must be at least 1, got {threads} and {shards}")
    shards = max(1, min(shards, samples))
    bounds = [samples * i // shards for i in range(shards + 1)]
    workers = min(threads, shards)
    return Shards(tuple(itertools.pairwise(bounds)), workers, threads // workers)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


class _BlasThreads:
    """A limit on BLAS's threads, which holds for the whole process.

    Among overlapping runs the first sets it and the last lifts it: if each restored what it had found, the limit of one
    could stay for good. They may be of different threads, and threadpoolctl (from 3.8 on) lets one thread alone set an
    OpenBLAS's limit until that is cleared.
    """

    def __init__(self) -> None:
        self.lock, self.runs = threading.Lock(), 0

    @contextlib.contextmanager
    def limit(self, threads: int) -> Iterator[None]:
        libraries = _blas().lib_controllers
        with self.lock:
            if not self.runs:
                self.before = [library.get_num_threads() for library in libraries]
                self._set([threads] * len(libraries))
            self.runs += 1
        try:
            yield
        finally:
            with self.lock:
                self.runs -= 1
                if not self.runs:
                    self._set(self.before)

    @staticmethod
    def _set(threads: Sequence[int]) -> None:
        for library, count in zip(_blas().lib_controllers, threads, strict=True):
            clear = getattr(library, "clear_controlling_thread", lambda force: None)
            clear(force=True)
            library.set_num_threads(count)
            clear(force=True)


_blas_threads = _BlasThreads()
_in_worker: contextvars.ContextVar[bool] = contextvars.ContextVar("tinyvit_in_worker", default=False)


def run(plan: Shards, function: Callable[[int, int], T]) -> Iterator[T]:
    """`function(start, stop)` for every range of the plan, at the same time; results in the order of the ranges.

    Context variables (gradient mode, random state) are the caller's. The first exception is raised as it is. Within
    such a function, as where a model asks another one for predictions, ranges are computed one after the other: threads
    that all waited for further threads of the same pool would wait for ever.
    """
    with _blas_threads.limit(plan.blas_threads):
        if plan.workers == 1 or _in_worker.get():
            for bounds in plan.ranges:
                yield contextvars.copy_context().run(function, *bounds)
            return
        pool = _pool(plan.workers)
        submit: Any = pool.submit
        token = _in_worker.set(True)
        contexts = [contextvars.copy_context() for _ in plan.ranges]
        _in_worker.reset(token)
        futures = [submit(c.run, function, *bounds) for c, bounds in zip(contexts, plan.ranges, strict=True)]
        try:
            while futures:
                yield futures.pop(0).result()  # popped: a result lives only as long as its receiver needs it
        finally:
            for future in futures:
                future.cancel()


def each(function: Callable[[S], T], items: Sequence[S], sizes: Sequence[int]) -> list[T]:
    """`function(item)` for every item, at the same time; results in the order of the items.

    Args:
        function: depends on and writes into nothing but its item.
        items: what to work on.
        sizes: how much work each is, in array elements; too little in all is not worth the threads.
    """
    total = sum(sizes)
    workers = max(1, min(usual_threads(), total // WORTH_A_THREAD, len(items)))
    reached = list(itertools.accumulate(sizes))
    bounds = [bisect.bisect_left(reached, total * i / workers) for i in range(workers)] + [len(items)]
    cut = Shards(tuple(itertools.pairwise(bounds)), workers, 1)
    parts = run(cut, lambda start, stop: [function(item) for item in items[start:stop]])
    return [result for part in parts for result in part]


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="tinyvit")


if hasattr(os, "register_at_fork"):  # a forked process has the pools, but none of their threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
