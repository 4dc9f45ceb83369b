"""Averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays
from tinyvit.kernels.reference.optimizers import UpdateState, update_average
from tinyvit.optim.state import Array, State, check_like, check_state, copy_like, copy_to_numpy, number


class EMA:
    """An exponential moving average of a model's parameters that are not frozen, which starts as a copy of them.

    Each `update` does average = decay average + (1 - decay) parameter (Polyak & Juditsky 1992).
    """

    def __init__(self, model: Any, decay: float) -> None:
        self._decay = number("decay", decay, below=1.0)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {
            name: arrays.namespace(p.data).asarray(p.data, copy=True, device=arrays.device(p.data))
            for name, p in self._parameters.items()
        }
        self._applied = False
        self._state: UpdateState | None = None

    def update(self, skipped: Array | None = None) -> None:
        """Move the average towards the present parameters.

        Args:
            skipped: a float64 array without dimensions, beside the parameters: not 0 if the step before changed none
                of them, and the average is not to move either. It is not read from the device.
        """
        self._refuse_if_applied("update")
        if hasattr(skipped, "parameters"):
            raise TypeError("update takes no model: an EMA follows the one that it was made with; use ema.update()")
        for name, p in self._parameters.items():
            check_like(f"the average of {name}", self._average[name], p.data)
        averages, targets = list(self._average.values()), [p.data for p in self._parameters.values()]
        if not averages:
            return
        xp = arrays.namespace(averages[0])
        if self._state is None:
            self._state = kernels.best(UpdateState, xp)(xp)
        update = kernels.best(update_average, xp)
        new = update(xp, averages, targets, state=self._state, weight=1 - self._decay, skipped=skipped)
        self._average = dict(zip(self._average, new, strict=True))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged parameters; afterwards it has its own again."""
        self._refuse_if_applied("applied")
        self._applied = True
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self._applied = False

    def _swap(self) -> None:
        for name, p in self._parameters.items():
            self._average[name], p.data = p.data, self._average[name]

    def _refuse_if_applied(self, what: str) -> None:
        if self._applied:
            raise RuntimeError(f"{what} needs the model's own parameters, but the averaged ones are applied")

    def arrays(self) -> list[Array]:
        """The averages, which `update` changes in place."""
        return list(self._average.values())

    def state_dict(self) -> State:
        """Copies of the averaged parameters, under their names in the model."""
        self._refuse_if_applied("state_dict")
        return {name: copy_to_numpy(value) for name, value in self._average.items()}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_state": None}  # a copy makes its own, beside its own arrays

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state`; errors as for `Optimizer.load_state_dict`."""
        self._refuse_if_applied("load_state_dict")
        check_state("averaged weights", state, self._average)
        self._average = {name: copy_like(state[name], value) for name, value in self._average.items()}
