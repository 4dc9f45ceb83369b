"""Sums of gradients between GPUs, by NCCL. The launches can be captured into a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinyvit.distributed.group import DistributedError, Group

TYPES = {"int64": 4, "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}  # ncclDataType_t
SUM = 0  # ncclRedOp_t
BUCKET = 1 << 24  # bytes that are sent together, about


class NCCLReduction:
    """Adds up CuPy arrays over the GPUs of a group, each of which has computed one shard.

    It has the methods of `reduction.Reduction`. Buckets are summed on a stream of their own, beside the backward pass.
    The order of summation is NCCL's, which is the same in every run on the same machines.
    """

    def __init__(self, group: Group, like: Sequence[Any]) -> None:
        import cupy

        try:
            from cupy.cuda import nccl
        except ImportError as error:
            raise DistributedError(f"several GPUs need NCCL: pip install nvidia-nccl-cu12 or -cu13 ({error})") from None
        unique = group.from_first(nccl.get_unique_id() if group.leads else None)
        try:
            self._communicator = nccl.NcclCommunicator(group.size, tuple(unique), group.rank)
        except nccl.NcclError as error:  # such as two processes on one GPU
            raise DistributedError(f"NCCL does not connect the {group.size} GPUs: {error}") from None
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._count = len(like)
        self._sums: dict[int, Any] = {}  # by number
        self._waiting: dict[int, Any] = {}

    def begin(self) -> None:
        """Forget what a step gave that broke off, such as a capture that failed."""
        self._sums, self._waiting = {}, {}

    def add(self, shard: int, number: int, array: Any) -> None:
        """Take array `number`, which is read at once in the order of the present stream."""
        self._waiting[number] = array
        is_last = len(self._sums) + len(self._waiting) == self._count
        if is_last or sum(x.nbytes for x in self._waiting.values()) >= BUCKET:
            self._start()

    def _start(self) -> None:
        """Sum what waits once the present stream has computed it: a copy of each dtype's, as the backward pass may
        still read a gradient.
        """
        import cupy

        by_type: dict[Any, list[int]] = {}
        for number, array in self._waiting.items():
            by_type.setdefault(array.dtype, []).append(number)
        buckets = []
        for dtype, numbers in by_type.items():
            bucket, first = cupy.empty(sum(self._waiting[n].size for n in numbers), dtype), 0
            for number in numbers:
                array = self._waiting[number]
                self._sums[number] = bucket[first : first + array.size].reshape(array.shape)
                self._sums[number][...] = array  # not cupy.concatenate, which a graph cannot repeat
                first += array.size
            buckets.append(bucket)
        self._stream.wait_event(cupy.cuda.get_current_stream().record())
        for x in buckets:
            self._communicator.allReduce(x.data.ptr, x.data.ptr, x.size, TYPES[str(x.dtype)], SUM, self._stream.ptr)
        self._waiting = {}

    def finish(self) -> list[Any]:
        """The sums; the present stream waits for them."""
        import cupy

        cupy.cuda.get_current_stream().wait_event(self._stream.record())
        sums, self._sums = self._sums, {}
        return [sums[number] for number in range(self._count)]
