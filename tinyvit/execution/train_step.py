"""Whole training steps at full speed: one update of a model's parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tinyvit import functional as F
from tinyvit import nn, optim
from tinyvit.backend import arrays, cuda_graph, parallel, random
from tinyvit.backend.cuda_graph import Graphed
from tinyvit.backend.memory import keep_freed_memory
from tinyvit.distributed import ALONE, Group
from tinyvit.distributed.reduction import sum_in_order
from tinyvit.engine.tensor import Array, Tensor, grad
from tinyvit.execution.precision import LossScale, Precision
from tinyvit.kernels import cuda


class StepResult(NamedTuple):
    """The numbers of one step, as arrays without dimensions where the model lies (NumPy: numbers).

    Reading one from a device waits until the step is done. Until then the next steps can be started.
    """

    loss: Any
    correct: Any
    grad_norm: Any


class _Part(NamedTuple):
    """A process's samples of a batch: from number `first` up to `last` of `batch`."""

    first: int
    last: int
    batch: int


_Sums = tuple[Array, Array, list[Array]]  # loss, hits and gradients of a part of the batch


class TrainStep:
    """One training step: forward, cross-entropy, backward, clipping, update.

    On a CPU the batch is cut into shards that run on threads. The result is the whole batch's, and the same bits come
    out of every run with the same settings; dropout masks depend on neither threads nor shards.

    Args:
        model: gives logits (B, num_classes) for images (B, C, H, W); it is put into training mode.
        optimizer: holds the model's parameters; set `optimizer.lr` between calls to follow a schedule.
        clip_norm: largest global norm of the gradient, None for no limit.
        label_smoothing: as in `functional.cross_entropy`.
        accumulate: computes a batch in this many parts, one after the other, to use less memory.
        ema: an average of the weights, whose `update()` is called after each step. One like `optim.EMA`, with
            `update(skipped)`, where `skipped` is not 0 if the weights were not updated, and `arrays()`, those that it
            changes in place, becomes part of a CUDA graph.
        seed: what dropout masks derive from, together with `step_index`.
        threads, shards: as in `parallel.plan`.
        class_weights: (num_classes,), what each class counts for: `functional.cross_entropy`'s `weight`, and exactly
            its mean over the whole batch, however that is cut.
        precision: "fp32", "tf32", "bf16" or "fp16", as in `precision.Precision`.
        group: the processes that share a batch, as `distributed.init()` gives them. Each calls the step with its part,
            `group.part(batch)`, as a `data.Loader` with the group gives it; the result is the whole batch's. `shards`
            are those of all processes together, by default one for each of their threads, and a number of shards gives
            the same bits on CPUs whatever number of processes shares them.

    In fp16 the loss is scaled while the gradient is computed, and a step whose gradient overflows changes nothing but
    the scale.

    A batch may lie on the host wherever the model is. On a device a call only starts the step; reading one of its
    numbers waits for its end. A CUDA graph keeps the settings of the model that it was captured with: after changing
    one, such as a dropout rate, make another TrainStep.

    Attributes:
        step_index: how many steps were done; settable, to go on with an interrupted run.
        result: loss, hits and norm of the last step, not yet read from the device.
        graph: makes CUDA graphs of steps; `graph.reason` says why the last step on a GPU was not one, None if it was.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        clip_norm: float | None = None,
        label_smoothing: float = 0.0,
        accumulate: int = 1,
        ema: Any = None,
        seed: int = 0,
        threads: int | None = None,
        shards: int | None = None,
        class_weights: Array | None = None,
        precision: str = "fp32",
        group: Group = ALONE,
    ) -> None:
        keep_freed_memory()
        if shards is not None and shards % group.size:
            raise ValueError(f"shards must be a multiple of the {group.size} processes, got {shards}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.clip_norm, self.label_smoothing, self.accumulate = clip_norm, label_smoothing, accumulate
        self.seed, self.threads, self.shards = seed, threads or group.threads, shards
        self.group = group
        self._all_parameters = model.parameters()
        self.parameters = [p for p in self._all_parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("a training step needs a model with parameters that require a gradient")
        like = self.parameters[0].data
        self.class_weights = None if class_weights is None else arrays.convert(arrays.as_array(class_weights), like)
        self.precision = Precision(precision, model.parameters())
        if self.precision.dtype is not None and not arrays.is_writable(like):
            raise ValueError(f"precision {precision} rounds weights in place, which these arrays refuse: expected fp32")
        self._scale = LossScale(self.parameters[0].data) if precision == "fp16" else None
        self.step_index = 0
        self.result = StepResult(math.nan, 0, math.nan)
        self._gradients: list[Array] = []
        self._reductions: dict[int, Any] = {}  # by the number of shards
        self.graph = Graphed(self._compute, self._graph_key, lambda: self.optimizer.begin_update())

    def __call__(self, images: Array, labels: Array) -> Tensor:
        """Do one step.

        Args:
            images: (B, C, H, W), floating; in a group this process's part of the batch.
            labels: class numbers (B,) or probabilities (B, num_classes).

        Returns:
            the mean loss over the batch before the update, without dimensions or history.
        """
        for name, x in (("images", images), ("labels", labels)):
            if not hasattr(x, "shape"):
                raise TypeError(f"{name} must be an array or a Tensor, got {type(x).__name__}; use numpy.asarray")
        batch, count = images.shape[0], labels.shape[0]
        if batch != count or batch == 0:
            raise ValueError(f"expected as many labels as images and at least one, got {batch} and {count}")
        self.model.train()
        like = self.parameters[0].data
        self._gradients = []  # the last step's: their memory is this one's
        with parallel.limit(self.threads), arrays.on_device_of(like):
            images, labels = (arrays.convert(_array(x), like) for x in (images, labels))
            self._part, every_label = self._place(labels)
            self.precision.refresh()  # not in the graph, which would repeat it
            if arrays.supports_graphs(like):
                step = arrays.convert(np.array(self.step_index), like)
                result, self._gradients = self.graph(images, labels, every_label, step)
            else:
                result, self._gradients = self._compute(images, labels, every_label, self.step_index)
        self.result = StepResult(*result)
        self.precision.note_rounded()  # the update did that
        self.step_index += 1
        return Tensor(self.result.loss)

    def _place(self, labels: Array) -> tuple[_Part, Array]:
        """Which part of the batch this process has, and the labels that class weights need: those of all processes."""
        count = labels.shape[0]
        if self.group.size == 1:
            return _Part(0, count, count), labels
        told = count if self.class_weights is None else arrays.to_numpy(labels)
        everyone = self.group.exchange(told)
        counts = everyone if self.class_weights is None else [len(x) for x in everyone]
        first = sum(counts[: self.group.rank])
        part = _Part(first, first + count, sum(counts))
        if (part.first, part.last) != self.group.part(part.batch):
            expected = self.group.part(part.batch)
            raise ValueError(
                f"rank {self.group.rank} has the images {part.first} to {part.last} of a batch of {part.batch}, "
                f"expected {expected[0]} to {expected[1]}: use a Loader with the group, or group.part"
            )
        if self.class_weights is None:
            return part, labels
        return part, arrays.convert(np.concatenate(everyone), labels)

    def _compute(
        self, images: Array, labels: Array, every_label: Array, step: int | Array
    ) -> tuple[StepResult, list[Array]]:
        """The step's arithmetic, with its gradients; a graph can repeat it where nothing of it depends on the host."""
        loss, correct, gradients = self._differentiate(images, labels, every_label, step)
        try:
            norm = self._update(gradients)
        finally:
            self.optimizer.zero_grad()  # also of a capture that fails, whose memory is wanted back
        return StepResult(loss, correct, norm), gradients

    def _update(self, gradients: list[Array]) -> Array:
        """Update the weights and their average, and return the norm of the gradients."""
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = self.optimizer.update(limit, self._scale, self.precision.rounded())
        if self.ema is not None:
            self._update_average(None if self._scale is None else self.optimizer.skipped)
        return norm

    def _update_average(self, skipped: Any) -> None:
        """Update the average unless `skipped`, which may lie on the device, is not 0."""
        if self._captures_average():
            self.ema.update(skipped)
            return
        if cuda_graph.capturing():
            raise cuda_graph.NotCapturable(f"{type(self.ema).__name__} may do something else each time")
        if skipped is None or not bool(skipped):
            self.ema.update()

    def _captures_average(self) -> bool:
        """Whether the average can be part of a CUDA graph."""
        return self.ema is not None and "skipped" in inspect.signature(self.ema.update).parameters

    def _graph_key(self) -> tuple:
        """What a captured graph of `_compute` depends on: the addresses of the arrays that it uses, and settings."""
        used = [p.data for p in self._all_parameters] + self.optimizer.arrays()
        used += self.ema.arrays() if self._captures_average() else []
        used += [] if self.class_weights is None else [self.class_weights]
        settings = (self.clip_norm, self.label_smoothing, self.accumulate, self.seed, id(self.optimizer), id(self.ema))
        trained = tuple(p.requires_grad for p in self.parameters)
        return settings, trained, self._part, tuple(map(cuda.address, used))

    @property
    def correct(self) -> int:
        """How many images of the last batch were classified correctly (by their likeliest label)."""
        return int(self.result.correct)

    @property
    def grad_norm(self) -> float:
        """Global norm of the last gradient before clipping."""
        return float(self.result.grad_norm)

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by while its gradient is computed: 1 except in fp16."""
        return 1.0 if self._scale is None else float(self._scale.value)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What an interrupted run needs besides weights, optimizer, average and `step_index`: fp16's loss scale."""
        return {} if self._scale is None else self._scale.state_dict()

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state`, as `state_dict` gave it in the same precision. Raises ValueError."""
        if self._scale is not None:
            self._scale.load_state_dict(state)
        elif state:
            raise ValueError(f"precision {self.precision.name} has no state, got {', '.join(sorted(state))}")

    @property
    def largest_grad(self) -> float:
        """The largest absolute entry of the last gradient (after clipping); NaN if there is one."""
        largest = [np.max(np.abs(arrays.to_numpy(g))) for g in self._gradients if g.size]
        return float(np.max(largest)) * self.optimizer.gradient_scale if largest else math.nan

    def _differentiate(
        self, images: Array, labels: Array, every_label: Array, step: int | Array
    ) -> tuple[Array, Array, list[Array]]:
        """Loss, hits and gradients of the batch, summed over its shards in a fixed order."""
        first, _, batch = self._part
        shards, mine = self._shards(batch)
        reduction = self._reduction(shards)
        numbers = {start: number for number, (start, _) in enumerate(mine.ranges, self.group.part(shards)[0])}
        like = self.parameters[0].data
        weighted = None
        if self.class_weights is not None:  # for the whole batch, since its labels decide what the mean is divided by
            weighted = F.weighted_targets(every_label, self.class_weights, self.label_smoothing, like=like)
        as_they_are = self.precision.dtype is None or (self.accumulate == 1 and arrays.supports_graphs(like))

        def widened(gradient: Array) -> Array:
            return gradient if as_they_are else arrays.astype(gradient, "float32")

        def part(start: int, stop: int, ready: Any) -> _Sums:
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
            gradients = grad(loss, self.parameters, None if self._scale is None else self._scale.value, ready=ready)
            return loss.data, _hits(logits.data, targets), [widened(g) for g in gradients]

        def shard(start: int, stop: int) -> _Sums:
            """The sums of a shard, whose parts are computed one after the other; a reduction gets them at once."""
            sums: _Sums | None = None
            parts = parallel.plan(stop - start, 1, self.accumulate).ranges

            def ready(place: int, gradient: Array) -> None:
                gradient = widened(gradient)
                reduction.add(numbers[start], place, gradient if sums is None else sums[2][place] + gradient)

            for a, b in parts:
                is_last = b == stop - start
                found = part(start + a, start + b, ready if reduction is not None and is_last else None)
                sums = found if sums is None else _add(sums, found, _add_arrays)
            assert sums is not None
            if reduction is not None:
                for place, value in enumerate(sums[:2], len(self.parameters)):
                    reduction.add(numbers[start], place, value)
            return sums

        with self.precision.applied():
            computed = parallel.run(mine, shard)
            if reduction is None:
                return sum_in_order(computed, shards, lambda a, b: _add(a, b, _add_arrays_in_threads))
            for _ in computed:
                pass
            *gradients, loss, correct = reduction.finish()
            return loss, correct, gradients

    def _shards(self, batch: int) -> tuple[int, parallel.Shards]:
        """The number of shards of the batch, and this process's."""
        threads = parallel.usual_threads() if arrays.on_host(self.parameters[0].data) else 1  # a device runs its own
        size = self.group.size
        shards = (self.shards or threads * size) if arrays.on_host(self.parameters[0].data) else size
        plan = parallel.plan(batch, threads, shards)
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
        return self._reductions[shards]


def _add(a: _Sums, b: _Sums, add: Any) -> _Sums:
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


def _array(x: Tensor | Array) -> Array:
    return x.data if isinstance(x, Tensor) else x


def _labels(labels: Array, logits: Tensor) -> Array:
    """Probabilities in the logits' dtype, class numbers as they are."""
    return arrays.astype(labels, logits.dtype) if arrays.is_floating(labels) else labels


def _hits(logits: Array, labels: Array) -> Array:
    """How many rows of logits are largest where the label is."""
    xp = arrays.namespace(logits)
    if labels.ndim == 2:
        labels = xp.argmax(labels, axis=1)
    return xp.sum(xp.astype(xp.argmax(logits, axis=1) == labels, xp.int64))
