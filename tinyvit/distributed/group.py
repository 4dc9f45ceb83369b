"""What a process knows of the others that train the same model, and how it talks to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tinyvit.errors import ReportedError

SLOW = 1800.0  # seconds to wait for a process that reads data or writes files, as long as it gives signs of life


class DistributedError(ReportedError):
    """Processes that cannot train together."""


class Failed(Exception):
    """Another process of the group failed, and says why itself; the message is its rank and its reason."""


class Group:
    """A process alone. `processes.Processes`, which has the same methods, is one of several.

    Attributes:
        rank, size: which of how many processes this is.
        local_rank, local_size: the same among those of its machine.
        threads: how many threads each process may use without two of them sharing a core; None alone, for the usual.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    threads: int | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within this context an error of one process ends all, and the first alone prints warnings.

        Raises Failed where another process has to say why.
        """
        yield

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """What to compute on where the user said `name`: each process of a machine has a GPU to itself.

        Raises:
            DeviceError: there is none, or there are fewer than processes.
        """
        from tinyvit.backend.devices import DeviceError, gpu_count, pick_device

        device = pick_device(name)
        if self.size == 1 or device == "cpu":
            return device
        if name not in ("auto", "cuda"):
            raise DeviceError(f"{name} is one GPU for {self.size} processes: expected cuda")
        count = gpu_count(name)
        if self.local_rank >= count > 1:
            raise DeviceError(f"{self.local_size} processes share {count} GPUs: start one for each GPU")
        return f"cuda:{self.local_rank if count > 1 else 0}"  # a launcher may show each process its own GPU alone

    def describe(self, batch: int, threads: int | None) -> str:
        """What each process has of a batch, in a line; `threads` on a CPU, None on a GPU."""
        part = f"{batch // self.size}" + (f" or {batch // self.size + 1}" if batch % self.size else "")
        return (
            f"{self.size} processes, {self.local_size} on this machine: each takes {part} of {batch} images a step"
            + (f", on a CPU with {threads} thread{'' if threads == 1 else 's'}" if threads else ", on a GPU of its own")
        )

    def part(self, count: int) -> tuple[int, int]:
        """Which of `count` things are this process's: from the first number up to the second."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def exchange(self, value: Any, patience: float | None = None) -> list[Any]:
        """The values that all processes gave, by rank. Every process has to call it.

        Args:
            value: numbers, strings, None and NumPy arrays, in lists and dicts, a few MB at most. Tuples come as lists.
            patience: seconds to wait for a process, if longer than usual.

        Raises:
            DistributedError: a process did not answer.
            Failed: a process failed.
        """
        return [value]

    def same(self, what: Mapping[str, Any]) -> None:
        """Refuse to go on unless all processes gave the same. Raises DistributedError, which names what differs."""
        everyone = self.exchange(dict(what), SLOW)
        for rank, others in enumerate(everyone):
            for name in everyone[0] | others:
                mine, first = others.get(name), everyone[0].get(name)
                if mine != first:
                    raise DistributedError(f"rank {rank} has another {name} than rank 0: {mine!r} and {first!r}")

    def from_first(self, value: Any, patience: float | None = None) -> Any:
        """The value that rank 0 gave."""
        return self.exchange(value if self.leads else None, patience)[0]

    def reduction(self, like: Sequence[Any], shards: int) -> Any:
        """What adds up arrays like these over the processes, in a fixed order; see `reduction.Reduction`."""
        raise NotImplementedError("a process alone has nothing to reduce")


ALONE = Group()
