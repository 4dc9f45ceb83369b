"""Several processes that train one model: MPI or TCP between them, NCCL between their GPUs.

A launcher starts them, one for each GPU or for each share of the cores: `mpiexec -n 4 python train.py`,
`srun -K --mpi=pmi2 --ntasks-per-node 4 --gpus-per-task 1 python train.py` or `torchrun --nproc-per-node 4 train.py`.
Each of them says

    group = distributed.init()
    with group.together():  # an error of one ends all within a minute, and so does one that stands still
        found = data.load_data(..., group=group)  # each decodes its share of the images, and has all of them
        loader = data.Loader(found.train, batch_size=512, ..., group=group)  # the whole batch's size
        step = TrainStep(model.to(group.device("auto")), ..., group=group)

and writes files where `group.leads`. `tinyvit train` and `tinyvit eval` do so. MPI, TCP and NCCL open connections
between the processes (see `bench/README.md`). Nothing that processes exchange is executed.
"""

from tinyvit.distributed.group import ALONE, DistributedError, Failed, Group
from tinyvit.distributed.launch import init

__all__ = ["ALONE", "DistributedError", "Failed", "Group", "init"]
