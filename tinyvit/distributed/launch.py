"""Finding out whether a launcher started this process with others, and joining them."""

from __future__ import annotations

import os
from functools import cache

from tinyvit.distributed.group import ALONE, DistributedError, Group

# What launchers say of the number of processes: MPICH and Slurm's PMI, Open MPI, Slurm's steps, torchrun and its like.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE")


@cache
def init() -> Group:
    """The group of the processes that a launcher started together with this one; `ALONE` if there is none.

    MPI opens its own connections between the machines of the group, on addresses that its launcher chooses, and none
    within one process; tinyvit itself opens none.

    Raises:
        DistributedError: mpi4py or an MPI library is missing, or MPI does not see the processes of the launcher.
    """
    name, size = launched()
    if size <= 1:
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        why = " ".join(str(error).split())[:120]
        raise DistributedError(
            f'{name} says that {size} processes train together, which needs MPI: pip install "tinyvit[mpi]" ({why})'
        ) from None
    if MPI.COMM_WORLD.size != size:
        raise DistributedError(
            f"{name} says that {size} processes train together, but MPI sees {MPI.COMM_WORLD.size}: start them with "
            "the mpiexec of the MPI library that mpi4py uses, or with srun --mpi=pmi2"
        )
    from tinyvit.distributed.mpi import MPIGroup

    return MPIGroup(MPI.COMM_WORLD.Dup())


def launched() -> tuple[str, int]:
    """The variable that says how many processes a launcher started, and their number; ("", 1) without a launcher."""
    for name in SIZES:
        if (value := os.environ.get(name, "")).isdecimal():
            return name, int(value)
    return "", 1
