"""Finding out whether a launcher started this process with others, and joining them."""

from __future__ import annotations

import os
from functools import cache

from tinyvit.distributed.group import ALONE, DistributedError, Failed, Group

# Where launchers say how many processes there are, and which one this is: MPICH and Slurm's PMI, Open MPI, Slurm's
# steps, torchrun and its like.
VARIABLES = {
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "WORLD_SIZE": "RANK",
}


@cache
def init() -> Group:
    """The group of the processes that a launcher started together with this one; `ALONE` if there is none.

    MPI listens on addresses that it and its launcher choose, also where all processes are on one machine
    (`bench/README.md`); tinyvit itself listens on none, and without a launcher nothing does.

    Raises:
        DistributedError: mpi4py or an MPI library is missing, or MPI does not see the processes of the launcher.
        Failed: the same in a process that is not the first, which says why.
    """
    name, size, rank = launched()
    if size <= 1:
        return ALONE
    problem = ""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        why = " ".join(str(error).split())[:120]
        problem = f', which needs MPI: pip install "tinyvit[mpi]" ({why})'
    else:
        if MPI.COMM_WORLD.size != size:
            problem = (
                f", but MPI sees {MPI.COMM_WORLD.size}: start them with "
                "the mpiexec of the MPI library that mpi4py uses, or with srun --mpi=pmi2"
            )
    if problem:
        problem = f"{name} says that {size} processes train together{problem}"
        raise Failed(f"rank 0: {problem}") if rank else DistributedError(problem)
    from tinyvit.distributed.mpi import MPIGroup

    return MPIGroup(MPI.COMM_WORLD.Dup())


def launched() -> tuple[str, int, int]:
    """The variable that says how many processes a launcher started, their number, and which this is.

    Without a launcher they are "", 1 and 0.
    """
    for name, rank in VARIABLES.items():
        if (size := os.environ.get(name, "")).isdecimal():
            number = os.environ.get(rank, "")
            return name, int(size), int(number) if number.isdecimal() else 0
    return "", 1, 0
