"""The gradient of a batch's loss, computed by shards that threads and processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinyvit import functional as F
from tinyvit import nn
from tinyvit.backend import arrays, parallel, random
from tinyvit.distributed import Group
from tinyvit.distributed.group import SLOW
from tinyvit.distributed.reduction import sum_in_order
from tinyvit.engine.tensor import Array, Tensor, grad
from tinyvit.execution import system_info
from tinyvit.execution.precision import LossScale, Precision
from tinyvit.kernels import cuda

Sums = tuple[Array, Array, list[Array]]  # loss, hits and gradients of a part of the batch


class _Part(NamedTuple):
    """A process's samples of a batch: from number `first` up to `last` of `batch`."""

    first: int
    last: int
    batch: int


class BatchGradient:
    """Loss, hits and gradients of a batch, summed over its shards in a fixed order.

    Args:
        model: gives logits (B, num_classes) for images (B, C, H, W).
        parameters: those of the model that the gradients are for.
        precision, scale: what the model computes in, and what the loss is multiplied by meanwhile, None for nothing.
        label_smoothing, accumulate, seed, shards, class_weights, group: as for `TrainStep`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        precision: Precision,
        scale: LossScale | None,
        *,
        label_smoothing: float,
        accumulate: int,
        seed: int,
        shards: int | None,
        class_weights: Array | None,
        group: Group,
    ) -> None:
        if shards is not None and shards % group.size:
            raise ValueError(f"shards must be a multiple of the {group.size} processes, got {shards}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        like = parameters[0].data
        self.model, self.parameters, self.precision, self.scale = model, parameters, precision, scale
        self.label_smoothing, self.accumulate, self.seed = label_smoothing, accumulate, seed
        self.shards, self.group = shards, group
        self.class_weights = None if class_weights is None else arrays.convert(arrays.as_array(class_weights), like)
        self.part = _Part(0, 0, 0)
        self._reductions: dict[int, Any] = {}  # by the number of shards
        self._compared = self._begun = False

    def place(self, labels: Array) -> Array:
        """Note which part of a batch this process has.

        Returns the labels that class weights need: those of all processes. Raises DistributedError where these have
        other weights, or round differently.
        """
        count = labels.shape[0]
        if self.group.size == 1:
            self.part = _Part(0, count, count)
            return labels
        if not self._compared:  # in the first step, as weights may be loaded after this was made
            state = self.model.state_dict()
            weights = {"checksum of the weights": arrays.checksum(state)}
            self.group.same(weights | (system_info.arithmetic(self.precision.name) if arrays.on_host(labels) else {}))
            self._compared = True
        everyone = self.group.exchange(count if self.class_weights is None else arrays.to_numpy(labels))
        counts = everyone if self.class_weights is None else [len(x) for x in everyone]
        first = sum(counts[: self.group.rank])
        self.part = part = _Part(first, first + count, sum(counts))
        expected = self.group.part(part.batch)
        if (part.first, part.last) != expected:
            raise ValueError(
                f"rank {self.group.rank} has the images {part.first} to {part.last} of a batch of {part.batch}, "
                f"expected {expected[0]} to {expected[1]}: use a Loader with the group, or group.part"
            )
        return labels if self.class_weights is None else arrays.convert(np.concatenate(everyone), labels)

    def key(self) -> tuple:
        """What a captured graph of a call depends on besides the parameters."""
        weights = None if self.class_weights is None else cuda.address(self.class_weights)
        return self.label_smoothing, self.accumulate, self.seed, self.part, weights

    def __call__(self, images: Array, labels: Array, every_label: Array, step: int | Array) -> Sums:
        """The sums over the batch of which this process has `images` and `labels`.

        Args:
            images: (B, C, H, W), floating.
            labels: class numbers (B,) or probabilities (B, num_classes).
            every_label: what `place` gave.
            step: what dropout masks derive from, with the seed.
        """
        weighted = None
        if self.class_weights is not None:  # for the whole batch, since its labels decide what the mean is divided by
            like = self.parameters[0].data
            weighted = F.weighted_targets(every_label, self.class_weights, self.label_smoothing, like=like)
        shards, mine = self._shards()
        reduction = self._reduction(shards)
        numbers = {start: number for number, (start, _) in enumerate(mine.ranges, self.group.part(shards)[0])}

        def shard(start: int, stop: int) -> Sums | None:
            """The sums of a shard, whose parts are computed one after the other; None if a reduction has them."""
            sums: Sums | None = None

            def ready(place: int, gradient: Array) -> None:  # of the last part
                gradient = self._widened(gradient)
                if sums is not None:
                    (gradient,) = _add_arrays([sums[2][place]], [gradient])
                reduction.add(numbers[start], place, gradient)

            for a, b in parallel.plan(stop - start, 1, self.accumulate).ranges:
                at_once = ready if reduction is not None and b == stop - start else None
                loss, hits, gradients = self._of_part(images, labels, weighted, step, start + a, start + b, at_once)
                if at_once is not None:
                    if sums is not None:
                        loss, hits = sums[0] + loss, sums[1] + hits
                    reduction.add(numbers[start], len(self.parameters), loss)
                    reduction.add(numbers[start], len(self.parameters) + 1, hits)
                    return None
                found = loss, hits, [self._widened(g) for g in gradients]
                sums = found if sums is None else _add(sums, found, _add_arrays)
            return sums

        with self.precision.applied():
            computed: Any = parallel.run(mine, shard)
            if reduction is None:
                return sum_in_order(computed, shards, lambda a, b: _add(a, b, _add_arrays_in_threads))
            for _ in computed:
                pass
            *gradients, loss, hits = reduction.finish()
            if not self._begun:  # in one process kernels may have been compiled and tried for longer than in another
                self.group.exchange(None, SLOW)
                self._begun = True
            return loss, hits, gradients

    def _of_part(
        self,
        images: Array,
        labels: Array,
        weighted: Array | None,
        step: int | Array,
        start: int,
        stop: int,
        ready: Callable[[int, Array], None] | None,
    ) -> Sums:
        """Loss, hits and gradients of the samples `start` up to `stop` of the batch; `ready` is as for `grad`."""
        first, _, batch = self.part
        here = slice(start - first, stop - first)
        with random.scope(self.seed, step, start):
            logits = self.model(images[here, ...])
        if self.precision.dtype is not None:
            logits = logits.astype("float32")
        targets = _labels(labels[here, ...], logits)
        if weighted is None:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        else:
            loss = F.cross_entropy(logits, weighted[start:stop, ...])
        loss = loss * ((stop - start) / batch)
        gradients = grad(loss, self.parameters, None if self.scale is None else self.scale.value, ready=ready)
        return loss.data, _hits(logits.data, targets), gradients

    def _widened(self, gradient: Array) -> Array:
        """A gradient in the dtype that it is summed in: float32, unless one sum on a GPU is all."""
        as_it_is = self.precision.dtype is None or (self.accumulate == 1 and arrays.is_cupy(gradient))
        return gradient if as_it_is else arrays.astype(gradient, "float32")

    def _shards(self) -> tuple[int, parallel.Shards]:
        """The number of shards of the batch, and this process's."""
        on_host = arrays.on_host(self.parameters[0].data)
        threads = parallel.usual_threads() if on_host else 1  # a device runs its own
        size = self.group.size
        plan = parallel.plan(self.part.batch, threads, (self.shards or threads * size) if on_host else size)
        if size == 1:
            return len(plan.ranges), plan
        mine = plan.ranges[slice(*self.group.part(len(plan.ranges)))]
        workers = min(threads, len(mine))
        return len(plan.ranges), parallel.Shards(mine, workers, threads // workers)

    def _reduction(self, shards: int) -> Any:
        """What adds up the sums of `shards` shards over the processes; None for a process alone."""
        if self.group.size == 1:
            return None
        if shards not in self._reductions:
            like = [p.data for p in self.parameters]
            scalar = arrays.namespace(like[0]).zeros_like(like[0].ravel()[0])
            self._reductions[shards] = self.group.reduction([*like, scalar, scalar], shards)
        self._reductions[shards].begin()
        return self._reductions[shards]


def _add(a: Sums, b: Sums, add: Any) -> Sums:
    return a[0] + b[0], a[1] + b[1], add(a[2], b[2])


def _add_arrays(a: list[Array], b: list[Array]) -> list[Array]:
    """The sums of two lists of gradients, on the host in the memory of `a`, which `grad` made for it alone."""
    if not a or not arrays.on_host(a[0]):
        return [x + y for x, y in zip(a, b, strict=True)]
    return [np.add(x, y, out=x) for x, y in zip(a, b, strict=True)]


def _add_arrays_in_threads(a: list[Array], b: list[Array]) -> list[Array]:
    """The same, in threads."""
    if not a or not arrays.on_host(a[0]):
        return _add_arrays(a, b)
    pairs = list(zip(a, b, strict=True))
    return parallel.each(lambda pair: np.add(*pair, out=pair[0]), pairs, [x.size for x in a])


def _labels(labels: Array, logits: Tensor) -> Array:
    """Probabilities in the logits' dtype, class numbers as they are."""
    return arrays.astype(labels, logits.dtype) if arrays.is_floating(labels) else labels


def _hits(logits: Array, labels: Array) -> Array:
    """How many rows of logits are largest where the label is."""
    xp = arrays.namespace(logits)
    if labels.ndim == 2:
        labels = xp.argmax(labels, axis=1)
    return xp.sum(xp.astype(xp.argmax(logits, axis=1) == labels, xp.int64))
