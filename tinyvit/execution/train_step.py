"""Whole training steps at full speed: one update of a model's parameters."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tinyvit import nn, optim
from tinyvit.backend import arrays, parallel
from tinyvit.backend.cuda_graph import Graphed
from tinyvit.backend.memory import keep_freed_memory
from tinyvit.distributed import ALONE, Group
from tinyvit.engine.tensor import Array, Tensor, array_of
from tinyvit.execution.gradients import BatchGradient
from tinyvit.execution.precision import LossScale, Precision
from tinyvit.kernels import cuda


class StepResult(NamedTuple):
    """The numbers of one step, as arrays without dimensions where the model lies (NumPy: numbers).

    Reading one from a device waits until the step is done. Until then the next steps can be started.
    """

    loss: Any
    correct: Any
    grad_norm: Any


class TrainStep:
    """One training step: forward, cross-entropy, backward, clipping, update.

    On a CPU the batch is cut into shards that run on threads. The result is the whole batch's, and the same bits come
    out of every run with the same settings; dropout masks depend on neither threads nor shards.

    Args:
        model: gives logits (B, num_classes) for images (B, C, H, W); it is put into training mode.
        optimizer: holds the model's parameters, or those of them that are to learn; set `optimizer.lr` between calls
            to follow a schedule.
        clip_norm: largest global norm of the gradient, None for no limit.
        label_smoothing: as in `functional.cross_entropy`.
        accumulate: computes a batch in this many parts, one after the other, to use less memory.
        ema: an average of the weights, which follows after each step.
        seed: what dropout masks derive from, together with `step_index`.
        threads, shards: as in `tinyvit.backend.parallel.plan`.
        class_weights: (num_classes,), what each class counts for: `functional.cross_entropy`'s `weight`, and exactly
            its mean over the whole batch, however that is cut.
        precision: "fp32", "tf32", "bf16" or "fp16", as in `tinyvit.execution.precision.Precision`.
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
        ema: optim.EMA | None = None,
        seed: int = 0,
        threads: int | None = None,
        shards: int | None = None,
        class_weights: Array | None = None,
        precision: str = "fp32",
        group: Group = ALONE,
    ) -> None:
        keep_freed_memory()
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.clip_norm, self.threads, self.group = clip_norm, threads or group.threads, group
        self._all_parameters = model.parameters()
        held = {*map(id, optimizer.parameters)}
        if strangers := held - {*map(id, self._all_parameters)}:
            raise ValueError(
                f"the optimizer holds {len(strangers)} parameters that are not the model's: make it after the model's "
                "last change, such as a new head"
            )
        self.parameters = [p for p in self._all_parameters if p.requires_grad and id(p) in held]
        if not self.parameters:
            raise ValueError("a training step needs an optimizer of parameters that require a gradient")
        like = self.parameters[0].data
        self.precision = Precision(precision, model.parameters(), gradients=True)
        if self.precision.dtype is not None and not arrays.is_writable(like):
            raise ValueError(f"precision {precision} rounds weights in place, which these arrays refuse: expected fp32")
        self._scale = LossScale(like) if precision == "fp16" else None
        self._differentiate = BatchGradient(
            model, self.parameters, self.precision, self._scale,
            label_smoothing=label_smoothing, accumulate=accumulate, seed=seed,
            shards=shards, class_weights=class_weights, group=group,
        )  # fmt: skip
        self.step_index = 0
        self.result = StepResult(math.nan, 0, math.nan)
        self._has_effects = False  # whether a step that fails has changed something already

    @cached_property
    def graph(self) -> Graphed:
        # The graph and its memory go with the step, without waiting for a garbage collection.
        weak_self = weakref.proxy(self)
        return Graphed(
            lambda *inputs: weak_self._compute(*inputs), lambda: weak_self._graph_key(),
            lambda: weak_self.optimizer.begin_update(),
            can_retry=lambda: not weak_self._has_effects,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name != "graph"}  # a copy makes its own

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
        # Other processes would not repeat their all-reduce, and a module may change its buffers.
        self._has_effects = self.group.size > 1 or any(True for _ in self.model.buffers())
        with parallel.limit(self.threads), arrays.on_device_of(like):
            images, labels = (arrays.convert(array_of(x), like) for x in (images, labels))
            every_label = self._differentiate.place(labels)
            self.precision.refresh()  # not in the graph, which would repeat it
            if arrays.is_cupy(like):
                step = arrays.convert(np.array(self.step_index), like)
                result = self.graph(images, labels, every_label, step)
            else:
                result = self._compute(images, labels, every_label, self.step_index)
        self.result = StepResult(*result)
        self.precision.note_rounded()  # the update did that
        self.step_index += 1
        return Tensor(self.result.loss)

    def _compute(self, images: Array, labels: Array, every_label: Array, step: int | Array) -> StepResult:
        """The step's arithmetic; a graph can repeat it where nothing of it depends on the host."""
        loss, correct, gradients = self._differentiate(images, labels, every_label, step)
        try:
            norm = self._update(gradients)
        finally:
            self.optimizer.zero_grad()  # also of a capture that fails, whose memory is wanted back
        return StepResult(loss, correct, norm)

    def _update(self, gradients: list[Array]) -> Array:
        """Update the weights and their average, and return the norm of the gradients."""
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        limit = math.inf if self.clip_norm is None else self.clip_norm
        self._has_effects = True
        norm = self.optimizer.update(limit, self._scale, self.precision.rounded())
        if self.ema is not None:
            self.ema.update(None if self._scale is None else self.optimizer.skipped)
        return norm

    def _graph_key(self) -> tuple:
        """What a captured graph of `_compute` depends on: the addresses of the arrays that it uses, and settings."""
        used = [p.data for p in self._all_parameters] + self.optimizer.arrays()
        used += [] if self.ema is None else self.ema.arrays()
        settings = self.clip_norm, id(self.optimizer), id(self.ema), self._differentiate.key()
        trained = tuple(p.requires_grad for p in self.parameters)
        return settings, trained, tuple(map(cuda.address, used))

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
