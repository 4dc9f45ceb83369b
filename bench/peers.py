"""What a contender of the training benchmark is, and tinyvit as one; peers_torch.py and peers_jax.py have the others.

Every builder takes a tinyvit model, copies its weights and returns a `Peer`. On "cpu" all compute in float32 where
their name does not say otherwise; on "cuda" in bfloat16 with weights, statistics, softmax and loss in float32, the
batch lying on the device already.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import tinyvit
from tinyvit.backend import arrays, devices
from tinyvit.execution.inference import predictions

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.05
CHECKED = 16  # images of which gradients are compared on a GPU, in float32


@dataclass
class Peer:
    """One contender.

    Attributes:
        step: trains on its batch and gives the loss; on a GPU it may return before that is done.
        infer: gives the logits of as many copies of its batch as it is given, on the host.
        gradients: loss and gradients at the current weights, in float32 on a GPU too.
        wait: returns once all steps are done.
    """

    name: str
    step: Callable[[], Any]
    infer: Callable[[int], np.ndarray]
    gradients: Callable[[], tuple[float, dict[str, np.ndarray]]]
    wait: Callable[[], object] = lambda: None

    def run(self, kind: str, repeats: int = 1) -> None:
        """Do "step" or "infer" so many times and wait for the end of the last."""
        if kind == "infer":
            self.infer(repeats)
            return
        for _ in range(repeats):
            self.step()
        self.wait()

    def loss(self) -> float:
        """Do one step and read its loss."""
        return float(self.step())


def tinyvit_peer(
    model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray, device: str = "cpu", precision: str = ""
) -> Peer:
    """In `precision`; by default in float32, on a GPU in bfloat16."""
    model.to(device)
    move = devices.mover(device)
    images, labels = move(images), move(labels)
    precision = precision or ("fp32" if device == "cpu" else "bf16")
    optimizer = tinyvit.optim.AdamW(model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY)
    step = tinyvit.TrainStep(model, optimizer, precision="fp32" if precision == "int8" else precision)

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        part = slice(None if device == "cpu" else CHECKED)
        with step.precision.products():
            loss = tinyvit.functional.cross_entropy(model(images[part]), labels[part])
            found = map(arrays.to_numpy, tinyvit.grad(loss, parameters))
        return float(loss), dict(zip(names, found, strict=True))

    if device == "cpu":
        stream = predictions(model, itertools.repeat(images), precision=precision)  # which packs weights once

        def infer_one_by_one(batches: int) -> np.ndarray:
            return np.concatenate([next(stream) for _ in range(batches)])

        return Peer("tinyvit", lambda: float(step(images, labels)), infer_one_by_one, gradients)
    import cupy

    @functools.cache
    def repeated(batches: int) -> Any:
        return images if batches == 1 else arrays.namespace(images).concat([images] * batches)

    def infer(batches: int) -> np.ndarray:
        return tinyvit.predict(model, repeated(batches), batch_size=len(images), precision=precision)

    return Peer("tinyvit", lambda: step(images, labels), infer, gradients, cupy.cuda.Device().synchronize)
