"""What a process knows of the others that train the same model, and how it talks to them."""

from __future__ import annotations

from typing import Any

from tinyvit.backend.arrays import Array


class DistributedError(Exception):
    """Processes that cannot train together; the message is one line."""


class Failed(Exception):
    """Another process of the group failed, and says why itself; the message is its rank and its reason."""


class Group:
    """A process alone. `mpi.MPIGroup`, which has the same methods, is one of several.

    Attributes:
        rank, size: which of how many processes this is.
        local_rank, local_size: the same among those of its machine.
        threads: how many threads each process may use without two of them sharing a core; None alone, for the usual.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    threads: int | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """Which of `count` things are this process's: from the first number up to the second."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def exchange(self, value: Any, patience: float | None = None) -> list[Any]:
        """The values that all processes gave, by rank. Every process has to call it.

        Args:
            value: small, as it is pickled.
            patience: seconds to wait for a process, if longer than usual.

        Raises:
            DistributedError: a process did not answer.
            Failed: a process failed.
        """
        return [value]

    def from_first(self, value: Any, patience: float | None = None) -> Any:
        """The value that rank 0 gave."""
        return self.exchange(value if self.leads else None, patience)[0]

    def fail(self, reason: str) -> bool:
        """Tell the others that this process cannot go on. Returns whether it is the one that should say why."""
        return True

    def reduction(self, like: list[Array], shards: int) -> Any:
        """What adds up arrays like these over the processes, in a fixed order; see `reduction.Reduction`."""
        raise NotImplementedError("a process alone has nothing to reduce")


ALONE = Group()
