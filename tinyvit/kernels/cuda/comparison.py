"""What a trial's child (`trial.py`) compares: kernels for Hopper with those for every GPU."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tinyvit.backend.arrays import Array
from tinyvit.kernels.cuda import trial

LIMITS = {"bf16": 1e-2, "f16": 2e-3}  # of a row's |difference| / |row|; both round to 16 bits
SUMS = {"bf16": 2**-9, "f16": 2**-12}  # of a sum's |difference| / sum of |summed|, which are rounded and it is not
FASTER = 0.95  # of the others' time at most is less, so that another trial decides alike
TINY = 1e-30  # beside which nothing is divided by zero
# The errors of a kernel itself, by CUDA's and the driver's names without "_": others say nothing of it, such as a full
# disk where CuPy keeps what it compiles, or a GPU that is lost.
FAULTS = re.compile(
    "compileexception|cudaerror(illegal(address|instruction)|invalid(addressspace|pc)|misalignedaddress|hardwarestack|launch)"
)

Comparisons = Iterator[tuple[str, Array, Array, float]]  # a name, our numbers, how far off they are and may be


def main(problems: Callable[..., Iterable[tuple[str, str | None]]]) -> None:
    """Print what `problems(xp, **request)` finds, on the GPU that the request on the command line names."""
    import array_api_compat.cupy as xp
    import cupy

    arguments = json.loads(sys.argv[1])
    cupy.cuda.Device.from_pci_bus_id(arguments.pop("gpu")).use()
    for found in problems(xp, **arguments):
        print(trial.FOUND + json.dumps(found), flush=True)


def problem(xp: Any, run: Callable[[], Comparisons]) -> str | None:
    """What is wrong with what `run` gives, if anything: NaN is, too, and two runs that differ in a bit."""
    try:
        for (name, ours, differences, limit), (_, again, *_) in zip(run(), run(), strict=True):
            difference = float(xp.max(differences))
            if not difference < limit:
                return f"{name} differs by {difference:.1e}, more than {limit:.0e}"
            bits, again_bits = (x.view(f"uint{8 * x.dtype.itemsize}") for x in (ours, again))
            if xp.any(bits != again_bits):
                return f"{name} is not the same twice"
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if not FAULTS.search(text.replace("_", "").lower()):
            raise
        return text
    return None


def of_rows(xp: Any, ours: Array, other: Array) -> Array:
    """|ours - other| / |other| of each row."""
    ours, other = ours.astype(xp.float32), other.astype(xp.float32)

    def norm(x: Array) -> Array:
        return xp.sqrt(xp.sum(x * x, axis=-1))

    return norm(ours - other) / (norm(other) + TINY)


def of_sums(xp: Any, sums: Array, summed: Array, axis: int) -> Array:
    """How far sums are from those of `summed` over an axis, beside those of its absolute values."""
    summed = summed.astype(xp.float32)
    return xp.abs(sums.astype(xp.float32) - xp.sum(summed, axis=axis)) / (xp.sum(xp.abs(summed), axis=axis) + TINY)


def slower(ours: Callable[[], Any], other: Callable[[], Any]) -> str | None:
    """Whether `ours` does not take less time, by more than the readings vary: medians of some in turn."""
    readings = [(seconds(ours), seconds(other)) for _ in range(7)]
    mine, theirs = (statistics.median(column) for column in zip(*readings, strict=True))
    return f"{trial.SLOWER}: {1e6 * mine:.0f} us beside {1e6 * theirs:.0f}" if mine > FASTER * theirs else None


def seconds(run: Callable[[], Any], calls: int = 5) -> float:
    """The time of a call on the GPU, as a graph: without Python's share."""
    import cupy

    start, end, stream = cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        kept = [run()]
        stream.begin_capture()
        kept = [run() for _ in range(calls)]
        graph = stream.end_capture()
        graph.launch(stream)  # the first launch is slower
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
    del kept
    return cupy.cuda.get_elapsed_time(start, end) / 1e3 / calls
