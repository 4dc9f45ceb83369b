"""Finding out whether a launcher started this process with others, and joining them."""

from __future__ import annotations

import atexit
import os
import signal
import time
from functools import cache

from tinyvit.distributed.group import ALONE, DistributedError, Group

# Where launchers say how many processes there are, and which one this is: MPICH and Slurm's PMI, Open MPI, Slurm's
# steps; and torchrun and its like, which also say where rank 0 is.
MPI_VARIABLES = {
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
TORCHRUN_VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
HEAD_START = 3.0  # seconds for the error of rank 0
AGENT_DISTANCE = 100  # from MASTER_PORT to rank 0's port where torchrun's agent listens on MASTER_PORT itself


@cache
def init() -> Group:
    """The group of the processes that a launcher started together with this one; `ALONE` if there is none.

    Under `mpiexec` and `srun` MPI connects them, which listens on addresses that it and its launcher choose. Where
    WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT are set it is TCP (`tcp`): rank 0 listens on that address and port
    until all have come; under torchrun, whose agent has that port, on MASTER_PORT + 100. LOCAL_RANK chooses the GPU.
    Without a launcher nothing listens.

    Raises:
        DistributedError: the variables contradict each other; mpi4py or an MPI library is missing, or MPI does not see
            the processes of the launcher; the others cannot be reached.
    """
    name, size, rank = launched()
    if size <= 1:
        return ALONE
    return _by_tcp(size, rank) if name == "WORLD_SIZE" else _by_mpi(name, size, rank)


def launched() -> tuple[str, int, int]:
    """The variable that says how many processes a launcher started, their number, and which this is.

    Without a launcher they are "", 1 and 0. Raises DistributedError.
    """
    env = os.environ
    name = next((name for name in MPI_VARIABLES if env.get(name, "").isdecimal()), "")
    size, rank = (_number(name), _number(MPI_VARIABLES[name])) if name else (1, 0)
    if "WORLD_SIZE" not in env or (size > 1 and not all(variable in env for variable in TORCHRUN_VARIABLES)):
        return name, size, rank
    world = _number("WORLD_SIZE"), _number("RANK")
    if size > 1 and (size, rank) != world and "TORCHELASTIC_RUN_ID" not in env and not name.startswith("SLURM"):
        raise _refusal(
            rank,
            f"{name} says that this is rank {rank} of {size}, WORLD_SIZE and RANK say {world[1]} of {world[0]}: "
            "unset those that another launcher left",
        )
    return "WORLD_SIZE", *world


def _number(name: str) -> int:
    """What an environment variable says, 0 without it. Raises DistributedError."""
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise DistributedError(f"{name} is {value!r}, expected a whole number")
    return int(value)


def _refusal(rank: int, problem: str) -> Exception:
    """What to raise for a problem that all processes may find: if rank 0 does, its launcher ends the others first."""
    if rank:
        time.sleep(HEAD_START)
    return DistributedError(problem)


def _by_mpi(name: str, size: int, rank: int) -> Group:
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
        atexit.register(os.kill, os.getpid(), signal.SIGTERM)  # MPICH's mpiexec else leaves the others in MPI_Init
        raise _refusal(rank, f"{name} says that {size} processes train together{problem}")
    from tinyvit.distributed.mpi import MPITransport
    from tinyvit.distributed.processes import Processes

    return Processes(MPITransport(MPI.COMM_WORLD.Dup()))


def _by_tcp(size: int, rank: int) -> Group:
    from tinyvit.distributed import processes, tcp

    if missing := [name for name in TORCHRUN_VARIABLES if not os.environ.get(name)]:
        raise _refusal(rank, f"WORLD_SIZE is {size} without {' and '.join(missing)}: start with torchrun or mpiexec")
    if rank >= size:
        raise DistributedError(f"RANK is {rank}, expected less than {size}, which is WORLD_SIZE")
    port = _number("MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port += AGENT_DISTANCE
    if not 0 < port < 1 << 16:
        raise _refusal(rank, f"MASTER_PORT {os.environ['MASTER_PORT']} makes {port}, expected a port from 1 to 65535")
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None
    transport = tcp.TCPTransport(rank, size, os.environ["MASTER_ADDR"], port, processes.PATIENCE)
    return processes.Processes(transport, local_rank)
