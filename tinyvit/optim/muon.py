"""Muon."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tinyvit import kernels
from tinyvit.kernels.reference.muon import update_muon
from tinyvit.optim.optimizers import AdamW, Params, Slot, Updates, slot_arrays
from tinyvit.optim.state import number


class Muon(AdamW):
    """Momentum whose updates are made orthogonal, for hidden matrices; AdamW for all other parameters.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    Args:
        params: as for `AdamW`; in groups with `"muon": True`, matrices and convolutions (see `param_groups`).
        lr: of the matrices: the spectral norm of an update. Other groups have their own by `lr_scale`.
        momentum: how much of the running mean of the gradient is kept each step.
        betas, eps, weight_decay: as for `AdamW`; matrices decay in the same way.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self._momentum = number("momentum", momentum, below=1.0)
        super().__init__(params, lr, betas, eps, weight_decay)
        for i, slot in enumerate(self._slots):
            if slot.muon:
                if slot.parameter.data.ndim < 2:
                    raise ValueError(f"Muon expects matrices, parameter {i} has shape {slot.parameter.shape}")
                del slot.state["v"]

    def _update(self, xp: ModuleType, slots: list[Slot], **options: Any) -> Updates:
        m, v = ([slot.state.get(name) for slot in slots] for name in ("m", "v"))
        return kernels.best(update_muon, xp)(
            xp, *slot_arrays(slots), m, v, steps=[slot.steps for slot in slots], momentum=self._momentum,
            beta1=self._beta1, beta2=self._beta2, eps=self._eps, **options,
        )  # fmt: skip
