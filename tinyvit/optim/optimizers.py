"""Optimizers with torch's semantics, learning-rate schedules, gradient clipping and averaged weights.

The arithmetic for one parameter's arrays is in `tinyvit.kernels.reference_optim`, with faster versions beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays, cuda_graph, parallel
from tinyvit.kernels.reference.optimizers import adamw, sgd, sum_of_squares
from tinyvit.optim.state import State, check_like, check_state, copy_like, copy_to_numpy, number, zeros_like

Array = Any
Parameter = Any  # anything with .data, .grad and .changed(): a tinyvit.nn.Parameter
Params = Iterable[Parameter | Mapping[str, Any]]  # parameters, or groups with options of their own
S = TypeVar("S")
T = TypeVar("T")


# --- optimizers -------------------------------------------------------------------------------------------


@dataclass
class _Slot:
    """One parameter with what its optimizer keeps about it."""

    parameter: Parameter
    lr_scale: float
    weight_decay: float
    state: dict[str, Array]
    steps: int = 0


class Optimizer:
    """What SGD, Adam and AdamW share: parameters in groups, their state, saving and loading it."""

    def __init__(self, params: Params, lr: float, weight_decay: float, state_names: tuple[str, ...]) -> None:
        weight_decay = number("weight_decay", weight_decay)
        self.lr = lr
        self._slots = []
        for parameter, options in _flatten(params):
            p = parameter.data
            if not arrays.is_floating(p):
                raise TypeError(f"parameter {len(self._slots)} must be floating, got {p.dtype}")
            self._slots.append(
                _Slot(
                    parameter,
                    lr_scale=number("lr_scale", options.get("lr_scale", 1.0)),
                    weight_decay=number("weight_decay", options.get("weight_decay", weight_decay)),
                    state={name: zeros_like(p) for name in state_names},
                )
            )

    @property
    def lr(self) -> float:
        """The learning rate; a group's own is this times its `lr_scale`."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = number("lr", value)

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
        pending = [(i, slot) for i, slot in enumerate(self._slots) if slot.parameter.grad is not None]
        for i, slot in pending:
            p = slot.parameter.data
            check_like(f"the gradient of parameter {i}", slot.parameter.grad, p)
            for name, value in slot.state.items():
                check_like(f"the optimizer's {name} of parameter {i}", value, p)
        if self.step_together() is not None:
            return
        if cuda_graph.capturing():
            raise cuda_graph.NotCapturable(f"{type(self).__name__} updates one parameter after the other")
        _each(self._step, [slot for _, slot in pending], [slot.parameter.data for _, slot in pending])

    def step_together(
        self, max_norm: float = math.inf, loss_scale: Any = None, copies: Mapping[int, Array] | None = None
    ) -> Array | None:
        """`limit_grad_norm` and `step` in a few launches that read nothing from the host, where kernels for that exist.

        Args:
            max_norm: as in `limit_grad_norm`.
            loss_scale: what the gradients are to be divided by, a `precision.LossScale`; it is kept up to date, and a
                gradient that is not finite updates nothing.
            copies: arrays of one dtype that follow the parameters, by the parameters' `id`.

        Returns:
            the gradients' norm, an array without dimensions; None, with nothing done, where there are no such kernels.
        """
        return None

    def _step(self, slot: _Slot) -> None:
        slot.steps += 1
        p = slot.parameter.data
        xp = arrays.namespace(p)
        new, slot.state = self._update(xp, p, xp.asarray(slot.parameter.grad), slot)
        if new is p:
            slot.parameter.changed()
        else:
            slot.parameter.data = new

    def _update(self, xp: ModuleType, p: Array, g: Array, slot: _Slot) -> tuple[Array, dict[str, Array]]:
        raise NotImplementedError

    def state_dict(self) -> State:
        """Copies of all state: "lr", "steps" (int64, one per parameter) and "<index>.<name>" for each array."""
        steps = np.array([slot.steps for slot in self._slots], dtype=np.int64)
        copies = {key: copy_to_numpy(value) for key, value in self._arrays().items()}
        return {"lr": np.array(self.lr), "steps": steps} | copies

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
        self,
        params: Params,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self._momentum = number("momentum", momentum)
        self._nesterov = nesterov
        if nesterov and not momentum:
            raise ValueError(f"nesterov expects a momentum above 0, got {momentum}")
        super().__init__(params, lr, weight_decay, ("m",) if momentum else ())

    def _update(self, xp: ModuleType, p: Array, g: Array, slot: _Slot) -> tuple[Array, dict[str, Array]]:
        new, m = kernels.best(sgd, xp)(
            xp, p, g, slot.state.get("m"),
            lr=self.lr * slot.lr_scale, momentum=self._momentum, nesterov=self._nesterov,
            weight_decay=slot.weight_decay,
        )  # fmt: skip
        return new, {} if m is None else {"m": m}


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
        self._many: Any = None  # what updates all parameters together, with numbers of its own on the device
        self._told: tuple[float, int] | None = None  # the learning rate and the steps done, as they are there
        self._together: list[_Slot] = []
        super().__init__(params, lr, weight_decay, ("m", "v"))

    def step_together(
        self, max_norm: float = math.inf, loss_scale: Any = None, copies: Mapping[int, Array] | None = None
    ) -> Array | None:
        slots = [slot for slot in self._slots if slot.parameter.grad is not None]
        parameters, gradients = [slot.parameter.data for slot in slots], [slot.parameter.grad for slot in slots]
        make = kernels.together("adamw", arrays.namespace(parameters[0])) if slots else None
        m, v = ([slot.state[name] for slot in slots] for name in ("m", "v"))
        same_steps = len({slot.steps for slot in slots}) == 1
        if make is None or not same_steps or not make.covers(parameters, gradients, m, v):
            return None
        if self._many is None:
            numbers = {"beta1": self._beta1, "beta2": self._beta2, "eps": self._eps}
            self._many = make(arrays.namespace(parameters[0]), **numbers, decoupled=self._decoupled)
        self._together = slots
        if cuda_graph.capturing():
            cuda_graph.after_capture(self.count_step)
        else:
            self.count_step()
        self._many.update(
            parameters, gradients, m, v,
            lr_scales=[slot.lr_scale for slot in slots], weight_decays=[slot.weight_decay for slot in slots],
            max_norm=max_norm, loss_scale=loss_scale, copies=[(copies or {}).get(id(slot.parameter)) for slot in slots],
        )  # fmt: skip
        return self._many.get("norm")

    @property
    def gradient_scale(self) -> float:
        """What the last `step_together` multiplied the gradients by, to limit them and to take out the loss's scale."""
        return float(self._many.get("gradient_scale"))

    @property
    def skipped(self) -> Array:
        """Not 0 if the last `step_together` updated nothing, for the gradient overflowed: always the same array."""
        return self._many.skipped

    def count_step(self) -> None:
        """The host's share of `step_together`, which a captured graph leaves to its caller each time it is replayed."""
        steps = self._together[0].steps
        if self._told is None or self._told[0] != self.lr:
            self._many.set("lr", self.lr)
        if self._told is None or self._told[1] != steps:
            self._many.set("step", steps)
        for slot in self._together:
            slot.steps += 1
            slot.parameter.changed()
        self._told = self.lr, steps + 1

    def state_dict(self) -> State:
        if self._told is not None:  # the device has counted since, and left out gradients that overflowed
            steps = int(self._many.get("step"))
            for slot in self._together:
                slot.steps = steps
            self._told = None
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self._told = None

    def _update(self, xp: ModuleType, p: Array, g: Array, slot: _Slot) -> tuple[Array, dict[str, Array]]:
        return self._adamw(xp, p, g, slot, slot.weight_decay)

    def _adamw(
        self, xp: ModuleType, p: Array, g: Array, slot: _Slot, weight_decay: float
    ) -> tuple[Array, dict[str, Array]]:
        new, m, v = kernels.best(adamw, xp)(
            xp, p, g, slot.state["m"], slot.state["v"],
            lr=self.lr * slot.lr_scale, beta1=self._beta1, beta2=self._beta2, eps=self._eps,
            weight_decay=weight_decay, step=slot.steps,
        )  # fmt: skip
        return new, {"m": m, "v": v}


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

    def _update(self, xp: ModuleType, p: Array, g: Array, slot: _Slot) -> tuple[Array, dict[str, Array]]:
        if slot.weight_decay:
            g = g + slot.weight_decay * p
        return self._adamw(xp, p, g, slot, weight_decay=0.0)


def clip_grad_norm(params: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients together so that their common Euclidean norm is at most `max_norm`, as torch does.

    Works in place on `.grad`, and adds the squares up in float64. With `max_norm` infinite it only measures.

    Returns:
        The norm before. A norm that is not finite is returned as it is, with the gradients left as they are,
        so that the caller can see what is wrong with them.
    """
    return float(limit_grad_norm(params, max_norm))


def limit_grad_norm(params: Iterable[Parameter], max_norm: float, divisor: Array | None = None) -> Array | float:
    """`clip_grad_norm` that reads nothing from a device: the norm (float64) comes as an array without dimensions.

    The gradients are divided by `divisor` (an array without dimensions) before anything else.
    """
    max_norm = max_norm if max_norm == math.inf else number("max_norm", max_norm)
    with_grad = [p for p in params if p.grad is not None]
    gradients = [p.grad for p in with_grad]
    squares = sum(_each(_sum_of_squares, gradients, gradients))
    if isinstance(squares, (Real, np.ndarray)):
        unit = 1.0 if divisor is None else float(divisor)
        norm = math.sqrt(float(squares)) / unit
        scale = max_norm / (norm + 1e-6)
        scale = (scale if math.isfinite(norm) and scale < 1 else 1.0) / unit
        if scale != 1:
            for p in with_grad:
                p.grad *= scale
        return norm
    xp = arrays.namespace(squares)
    unit = xp.ones_like(squares) if divisor is None else xp.astype(divisor, squares.dtype)
    norm = xp.sqrt(squares) / unit
    if max_norm < math.inf or divisor is not None:
        scale = max_norm / (norm + 1e-6)
        scale = xp.where(xp.isfinite(norm) & (scale < 1), scale, xp.ones_like(scale)) / unit
        for p in with_grad:
            p.grad *= xp.astype(scale, p.grad.dtype)
    return norm


def _sum_of_squares(x: Array) -> Array | float:
    xp = arrays.namespace(x)
    return kernels.best(sum_of_squares, xp)(xp, x)


def _each(function: Callable[[S], T], items: list[S], data: list[Array]) -> list[T]:
    """`function` of every item, on all cores where the items' arrays are on the host."""
    if data and arrays.on_host(data[0]):
        return parallel.each(function, items, [x.size for x in data])
    return [function(item) for item in items]


def _flatten(params: Params) -> list[tuple[Parameter, Mapping]]:
    """Every parameter with its group's options."""
    flat: list[tuple[Parameter, Mapping]] = []
    for item in params:
        if not isinstance(item, Mapping):
            flat.append((item, {}))
            continue
        if unknown := item.keys() - {"params", "weight_decay", "lr_scale"}:
            raise ValueError(f"a group has params, weight_decay, lr_scale, got {', '.join(sorted(unknown))}")
        flat.extend((p, item) for p in item["params"])
    if not flat:
        raise ValueError("an optimizer expects at least one parameter, got none")
    first: dict[int, int] = {}
    for i, (p, _) in enumerate(flat):
        if id(p) in first:
            raise ValueError(f"parameters {first[id(p)]} and {i} are one and the same")
        first[id(p)] = i
    return flat
