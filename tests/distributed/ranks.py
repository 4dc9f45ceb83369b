"""What the ranks of the tests run; `python -m ranks NAME SHARDS OUT` under mpiexec, or alone for the reference."""

import sys

import numpy as np

import tinyvit
from tinyvit import data, distributed, optim
from tinyvit.data import Augment

SIZE = dict(image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2)


def steps(group, shards, batch, threads=1, **options):
    """Weights, losses and hits after four steps on batches of `batch` images of `shapes`, with all that is random."""
    shapes = data.load_data("shapes", image_size=8).train.take(np.arange(4 * batch))
    model = tinyvit.create_model("vit_micro_patch4_32", num_classes=10, proj_drop_rate=0.1, drop_path=0.1, **SIZE)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    step = tinyvit.TrainStep(model, optimizer, clip_norm=1.0, threads=threads, shards=shards, group=group, **options)
    mean, std = (0.5,) * 3, (0.2,) * 3
    augment = Augment(mean, std, flip=True, padding=2, erasing=0.3, turn=5, mixup=0.4, cutmix=1.0, num_classes=10)
    loader = data.Loader(shapes, batch, transform=augment, alternate_flip=True, group=group)
    found = [[float(step(*part)), step.correct, step.grad_norm] for part in loader.epoch(0)]
    return {**model.state_dict(), "found": np.array(found)}


if __name__ == "__main__":
    shards, batch, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    group = distributed.init()
    result = steps(group, shards, batch)
    np.savez(f"{out}-{group.rank}.npz", **result)
