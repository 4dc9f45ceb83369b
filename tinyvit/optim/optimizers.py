"""SGD, Adam, AdamW and gradient clipping, with torch's semantics.

The arithmetic is in `tinyvit.kernels.reference.optimizers`, with faster versions in the kernels of NumPy and CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays, cuda_graph
from tinyvit.backend.arrays import Array
from tinyvit.kernels.reference.optimizers import UpdateState, limited_norm, update_adamw, update_sgd
from tinyvit.optim.state import State, check_like, check_state, copy_like, copy_to_numpy, number, zeros_like

Parameter = Any  # anything with .data, .grad and .changed(): a tinyvit.nn.Parameter
Params = Iterable[Parameter | Mapping[str, Any]]  # parameters, or groups with options of their own
# The gradients' norm, and of each parameter its new array and state; None where a gradient overflowed.
Updates = tuple[Array | float, list[tuple[Array, ...]] | None]


# --- optimizers -------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """One parameter with what its optimizer keeps about it."""

    parameter: Parameter
    lr_scale: float
    weight_decay: float
    state: dict[str, Array]
    muon: bool
    steps: int = 0


class Optimizer:
    """What SGD, Adam and AdamW share: parameters in groups, their state, saving and loading it."""

    def __init__(self, params: Params, lr: float, weight_decay: float, state_names: tuple[str, ...]) -> None:
        weight_decay = number("weight_decay", weight_decay)
        self.lr = lr
        self._slots: list[Slot] = []
        self._updated: list[Slot] = []  # by the last update
        self._state: UpdateState | None = None
        for parameter, options in _flatten(params):
            p = parameter.data
            if not arrays.is_floating(p):
                raise TypeError(f"parameter {len(self._slots)} must be floating, got {p.dtype}")
            self._slots.append(
                Slot(
                    parameter,
                    lr_scale=number("lr_scale", options.get("lr_scale", 1.0)),
                    weight_decay=number("weight_decay", options.get("weight_decay", weight_decay)),
                    state={name: zeros_like(p) for name in state_names},
                    muon=bool(options.get("muon", False)),
                )
            )

    @property
    def lr(self) -> float:
        """The learning rate; a group's own is this times its `lr_scale`."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = number("lr", value)

    @property
    def parameters(self) -> list[Parameter]:
        """What it updates, in the order that it was given."""
        return [slot.parameter for slot in self._slots]

    def zero_grad(self) -> None:
        """Forget the gradients: `.grad` becomes None."""
        for slot in self._slots:
            slot.parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient, in place where its array library allows.

        Raises:
            ValueError, TypeError: a gradient of another shape, dtype or library than its parameter, or a
                parameter that moved to another dtype or library after the optimizer was made. Nothing is
                updated then.
        """
        for i, slot in enumerate(self._slots):
            if slot.parameter.grad is not None:
                check_like(f"the gradient of parameter {i}", slot.parameter.grad, slot.parameter.data)
        self.update()

    def update(
        self, max_norm: float = math.inf, loss_scale: Any = None, rounded: Mapping[int, Array] | None = None
    ) -> Array | float:
        """`step` with gradients whose common norm is limited first; they may be of another floating dtype.

        Where a kernel covers all parameters together, nothing is read from the device, and a graph can capture it.

        Args:
            max_norm, loss_scale: as in `reference.update_adamw`.
            rounded: arrays that are to hold the new parameters in 16 bits, by the `id` of the parameter.

        Returns:
            the norm of the gradients before clipping, an array without dimensions or a number.
        """
        self._updated = slots = [slot for slot in self._slots if slot.parameter.grad is not None]
        if not slots:
            return 0.0
        for i, slot in enumerate(self._slots):
            if slot.parameter.grad is not None:
                for name, value in slot.state.items():
                    check_like(f"the optimizer's {name} of parameter {i}", value, slot.parameter.data)
        xp = arrays.namespace(slots[0].parameter.data)
        if self._state is None:
            self._state = kernels.best(UpdateState, xp)(xp)
        if cuda_graph.capturing():
            cuda_graph.after_capture(self.begin_update)
        else:
            self.begin_update()
        norm, results = self._update(
            xp,
            slots,
            state=self._state,
            lr_scales=[slot.lr_scale for slot in slots],
            weight_decays=[slot.weight_decay for slot in slots],
            max_norm=max_norm,
            loss_scale=loss_scale,
            rounded=None if rounded is None else [rounded.get(id(slot.parameter)) for slot in slots],
        )
        if results is None:  # a gradient overflowed
            for slot in slots:
                slot.steps -= 1
            return norm
        for slot, (new, *state) in zip(slots, results, strict=True):
            slot.state = dict(zip(slot.state, state, strict=False))
            if new is not slot.parameter.data:
                slot.parameter.data = new
        return norm

    def _update(self, xp: ModuleType, slots: list[Slot], **options: Any) -> Updates:
        """Run the operation that updates all of `slots`, which takes `options`."""
        raise NotImplementedError

    def begin_update(self) -> None:
        """The host's part of `update`: count the step. A captured graph leaves it to its caller at each replay."""
        for slot in self._updated:
            slot.steps += 1
            slot.parameter.changed()
        assert self._state is not None
        self._state.begin(self.lr, self._updated[0].steps - 1)

    @property
    def skipped(self) -> Any:
        """Not 0 if the last `update` changed nothing because a gradient overflowed; on a device always one array."""
        return 0.0 if self._state is None else self._state.skipped

    def state_dict(self) -> State:
        """Copies of all state: "lr", "steps" (int64, one per parameter) and "<index>.<name>" for each array."""
        self._count_steps()
        steps = np.array([slot.steps for slot in self._slots], dtype=np.int64)
        copies = {key: copy_to_numpy(value) for key, value in self._arrays().items()}
        return {"lr": np.array(self.lr), "steps": steps} | copies

    def __getstate__(self) -> dict[str, Any]:
        self._count_steps()
        return vars(self) | {"_state": None}  # a copy makes its own, beside its own arrays

    def _count_steps(self) -> None:
        """Learn from a device how many steps were not skipped."""
        counted = None if self._state is None else self._state.steps_done()
        if counted is not None:
            for slot in self._updated:
                slot.steps = counted

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state`, as `state_dict` gave it for the same parameters.

        Raises:
            ValueError: keys that are missing or unexpected, arrays of another shape or dtype (all are named).
        """
        own = self._arrays()
        expected = {"lr": np.array(self.lr), "steps": np.zeros(len(self._slots), np.int64)} | own
        check_state("optimizer state", state, expected)
        self.lr = float(state["lr"])
        for i, slot in enumerate(self._slots):
            slot.steps = int(state["steps"][i])
            slot.state = {name: copy_like(state[f"{i}.{name}"], value) for name, value in slot.state.items()}
        if self._state is not None:
            self._state.updated_on_host()

    def arrays(self) -> list[Array]:
        """What it keeps about the parameters, arrays that `step` changes in place."""
        return list(self._arrays().values())

    def _arrays(self) -> dict[str, Array]:
        return {f"{i}.{name}": x for i, slot in enumerate(self._slots) for name, x in slot.state.items()}


class SGD(Optimizer):
    """Stochastic gradient descent, torch's: weight decay is added to the gradient, no dampening.

    Args:
        params: parameters, or groups `{"params": [...], "weight_decay": ..., "lr_scale": ...}`.
        lr, momentum, weight_decay: not negative.
        nesterov: needs a momentum.
    """

    def __init__(
        self, params: Params, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        self._momentum = number("momentum", momentum)
        self._nesterov = nesterov
        if nesterov and not momentum:
            raise ValueError(f"nesterov expects a momentum above 0, got {momentum}")
        super().__init__(params, lr, weight_decay, ("m",) if momentum else ())

    def _update(self, xp: ModuleType, slots: list[Slot], **options: Any) -> Updates:
        return kernels.best(update_sgd, xp)(
            xp, *slot_arrays(slots), [slot.state.get("m") for slot in slots],
            momentum=self._momentum, nesterov=self._nesterov, **options,
        )  # fmt: skip


class AdamW(Optimizer):
    """Adam with decoupled weight decay, torch's: it decays every parameter that it is given (see `param_groups`).

    Args:
        params: parameters, or groups `{"params": [...], "weight_decay": ..., "lr_scale": ...}`.
        lr, eps, weight_decay: not negative.
        betas: how much of the running means of the gradient and of its square is kept each step, in [0, 1).
    """

    _decoupled = True  # whether weight decay shrinks the parameters or is added to their gradients

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        self._beta1, self._beta2 = (number(f"betas[{i}]", beta, below=1.0) for i, beta in enumerate(betas))
        self._eps = number("eps", eps)
        super().__init__(params, lr, weight_decay, ("m", "v"))

    def _update(self, xp: ModuleType, slots: list[Slot], **options: Any) -> Updates:
        m, v = ([slot.state[name] for slot in slots] for name in ("m", "v"))
        return kernels.best(update_adamw, xp)(
            xp, *slot_arrays(slots), m, v, steps=[slot.steps for slot in slots],
            beta1=self._beta1, beta2=self._beta2, eps=self._eps, decoupled=self._decoupled, **options,
        )  # fmt: skip


class Adam(AdamW):
    """Adam (Kingma & Ba 2015), torch's: weight decay is added to the gradient (L2). Arguments as for `AdamW`."""

    _decoupled = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


def slot_arrays(slots: list[Slot]) -> tuple[list[Array], list[Array]]:
    """The parameters' arrays and their gradients."""
    return [slot.parameter.data for slot in slots], [slot.parameter.grad for slot in slots]


def clip_grad_norm(params: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients together so that their common Euclidean norm is at most `max_norm`, as torch does.

    Works in place on `.grad`, and adds the squares up in float64. With `max_norm` infinite it only measures.

    Returns:
        The norm before. A norm that is not finite is returned as it is, with the gradients left as they are,
        so that the caller can see what is wrong with them.
    """
    max_norm = max_norm if max_norm == math.inf else number("max_norm", max_norm)
    with_grad = [p for p in params if p.grad is not None]
    norm, factor = limited_norm([p.grad for p in with_grad], max_norm)
    for p in with_grad if factor is not None else ():
        p.grad *= factor if isinstance(factor, float) else arrays.astype(factor, p.grad.dtype)
    return float(norm)


def _flatten(params: Params) -> list[tuple[Parameter, Mapping]]:
    """Every parameter with its group's options."""
    flat: list[tuple[Parameter, Mapping]] = []
    for item in params:
        if not isinstance(item, Mapping):
            if not hasattr(item, "data"):
                raise TypeError(f"an optimizer expects parameters or groups of them, got {type(item).__name__}")
            flat.append((item, {}))
            continue
        if unknown := item.keys() - {"params", "weight_decay", "lr_scale", "muon"}:
            raise ValueError(f"a group has params, weight_decay, lr_scale, muon, got {', '.join(sorted(unknown))}")
        flat.extend((p, item) for p in item["params"])
    if not flat:
        raise ValueError("an optimizer expects at least one parameter, got none")
    first: dict[int, int] = {}
    for i, (p, _) in enumerate(flat):
        if id(p) in first:
            raise ValueError(f"parameters {first[id(p)]} and {i} are one and the same")
        first[id(p)] = i
    return flat
