"""Several processes that train one model: MPI between them, NCCL between their GPUs.

A launcher starts them: `mpiexec -n 4 python train.py`, or `srun --mpi=pmi2 python train.py`. Each calls `init`.
"""

from tinyvit.distributed.group import ALONE, DistributedError, Failed, Group
from tinyvit.distributed.launch import init

__all__ = ["ALONE", "DistributedError", "Failed", "Group", "init"]
