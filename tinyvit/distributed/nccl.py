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
        self.first, self._nccl = 0, nccl
        unique = group.from_first(nccl.get_unique_id() if group.leads else None)
        self._communicator = nccl.NcclCommunicator(group.size, unique, group.rank)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._count = len(like)
        self._sums: dict[int, Any] = {}
        self._waiting: list[Any] = []

    def add(self, shard: int, number: int, array: Any) -> None:
        """Take array `number`, which is summed in place."""
        import cupy

        array = cupy.ascontiguousarray(array)
        self._sums[number] = array
        self._waiting.append(array)
        if len(self._sums) == self._count or sum(x.nbytes for x in self._waiting) >= BUCKET:
            self._start()

    def _start(self) -> None:
        """Sum what waits once the present stream has computed it."""
        import cupy

        self._stream.wait_event(cupy.cuda.get_current_stream().record())
        self._nccl.groupStart()
        for x in self._waiting:
            self._communicator.allReduce(x.data.ptr, x.data.ptr, x.size, TYPES[str(x.dtype)], SUM, self._stream.ptr)
        self._nccl.groupEnd()
        self._waiting = []

    def finish(self) -> list[Any]:
        """The sums; the present stream waits for them."""
        import cupy

        cupy.cuda.get_current_stream().wait_event(self._stream.record())
        sums = [self._sums[number] for number in range(self._count)]
        self._sums = {}
        return sums
