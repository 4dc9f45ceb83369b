"""Features of a data set: the outputs of a model's body, computed once and used in place of the images."""

from __future__ import annotations

import dataclasses

import numpy as np

from tinyvit import nn
from tinyvit.data import Augment, Data, Split
from tinyvit.data.splits import ArraySplit
from tinyvit.distributed import ALONE, Group
from tinyvit.distributed.group import SLOW
from tinyvit.evaluation.metrics import in_step, outputs_of, progress, share


class FeatureSplit(ArraySplit):
    """A split with features (N, D) float32 in place of its images."""


def with_features(
    body: nn.Module, data: Data, threads: int | None = None, precision: str = "fp32", group: Group = ALONE
) -> Data:
    """`data` with the features of its training and validation images in place of the images.

    Args:
        body: images (B, C, H, W) -> features (B, D), such as `inspection.Features`.
        threads, precision: as for `tinyvit.predict`.
        group: the processes that share the images; all get the features of all.
    """

    def features(split: Split) -> FeatureSplit:
        own, _ = share(split, group)
        outputs = outputs_of(body, own, Augment(data.mean, data.std), threads or group.threads, precision, done)
        computed = list(in_step(outputs, len(split), group))
        everyone = [part for parts in group.exchange(computed, SLOW) for part in parts if len(part)]
        return FeatureSplit(np.concatenate(everyone), split.labels, split.skipped)

    with progress(group, data.train, data.validation) as done:
        return dataclasses.replace(data, train=features(data.train), val=features(data.validation))
