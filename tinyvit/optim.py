"""Optimizers with torch's semantics, learning-rate schedules, gradient clipping and averaged weights.

The arithmetic for one parameter's arrays is in `tinyvit.kernels.reference_optim`, with faster versions beside it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from tinyvit import arrays, kernels, shards
from tinyvit.groups import param_groups as param_groups
from tinyvit.kernels.reference_optim import adamw, lerp, sgd, sum_of_squares

Array = Any
Parameter = Any  # anything with .data, .grad and .changed(): a tinyvit.nn.Parameter
Params = Iterable[Parameter | Mapping[str, Any]]  # parameters, or groups with options of their own
State = dict[str, np.ndarray]
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
        weight_decay = _number("weight_decay", weight_decay)
        self.lr = lr
        self._slots = []
        for parameter, options in _flatten(params):
            p = parameter.data
            if not arrays.is_floating(p):
                raise TypeError(f"parameter {len(self._slots)} must be floating, got {p.dtype}")
            self._slots.append(
                _Slot(
                    parameter,
                    lr_scale=_number("lr_scale", options.get("lr_scale", 1.0)),
                    weight_decay=_number("weight_decay", options.get("weight_decay", weight_decay)),
                    state={name: _zeros_like(p) for name in state_names},
                )
            )

    @property
    def lr(self) -> float:
        """The learning rate; a group's own is this times its `lr_scale`."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = _number("lr", value)

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
            _check_like(f"the gradient of parameter {i}", slot.parameter.grad, p)
            for name, value in slot.state.items():
                _check_like(f"the optimizer's {name} of parameter {i}", value, p)
        if self.step_together() is not None:
            return
        if kernels.capturing():
            raise kernels.NotCapturable(f"{type(self).__name__} updates one parameter after the other")
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
        copies = {key: _copy_to_numpy(value) for key, value in self._arrays().items()}
        return {"lr": np.array(self.lr), "steps": steps} | copies

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state`, as `state_dict` gave it for the same parameters.

        Raises:
            ValueError: keys that are missing or unexpected, arrays of another shape or dtype (all are named).
        """
        own = self._arrays()
        expected = {"lr": np.array(self.lr), "steps": np.zeros(len(self._slots), np.int64)} | own
        _check_state("optimizer state", state, expected)
        self.lr = float(state["lr"])
        for i, slot in enumerate(self._slots):
            slot.steps = int(state["steps"][i])
            slot.state = {name: _copy_like(state[f"{i}.{name}"], value) for name, value in slot.state.items()}

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
        self._momentum = _number("momentum", momentum)
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
        self._beta1, self._beta2 = (_number(f"betas[{i}]", beta, below=1.0) for i, beta in enumerate(betas))
        self._eps = _number("eps", eps)
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
            self._many = make(arrays.namespace(parameters[0]), beta1=self._beta1, beta2=self._beta2, eps=self._eps)
        self._together = slots
        if kernels.capturing():
            kernels.after_capture(self.count_step)
        else:
            self.count_step()
        self._many.update(
            parameters, gradients, m, v,
            lr_scales=[slot.lr_scale for slot in slots], weight_decays=[slot.weight_decay for slot in slots],
            max_norm=max_norm, loss_scale=loss_scale, copies=[(copies or {}).get(id(slot.parameter)) for slot in slots],
        )  # fmt: skip
        return self._many.get("norm")

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
        if self._many is not None:  # which has not counted steps whose gradients overflowed
            for slot in self._together:
                slot.steps = int(self._many.get("step"))
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

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def step_together(
        self, max_norm: float = math.inf, loss_scale: Any = None, copies: Mapping[int, Array] | None = None
    ) -> None:
        return None  # the kernels' decay is decoupled

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
    max_norm = max_norm if max_norm == math.inf else _number("max_norm", max_norm)
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
        return shards.each(function, items, [x.size for x in data])
    return [function(item) for item in items]


# --- schedules --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """The same learning rate at every step."""

    lr: float

    def __call__(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True)
class Step:
    """The learning rate `lr`, multiplied by `gamma` every `step_size` steps."""

    lr: float
    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.step_size < 1:
            raise ValueError(f"step_size must be at least 1, got {self.step_size}")

    def __call__(self, step: int) -> float:
        return self.lr * self.gamma ** (step // self.step_size)


@dataclass(frozen=True)
class WarmupCosine:
    """A straight rise over `warmup_steps`, then half a cosine down to `final_lr` (Loshchilov & Hutter 2017, eq. 5).

    Step 0 already learns: its rate is lr / (warmup_steps + 1). Step `warmup_steps` has the full rate, step
    `total_steps` (the first one after the training) and all later ones `final_lr`.
    """

    lr: float
    total_steps: int
    warmup_steps: int = 0
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps must be between 0 and total_steps = {self.total_steps}, got {self.warmup_steps}"
            )

    def __call__(self, step: int) -> float:
        if step >= self.total_steps:
            return self.final_lr
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2


# --- averaged weights -------------------------------------------------------------------------------------


class EMA:
    """An exponential moving average of a model's parameters that are not frozen, which starts as a copy of them.

    Each `update` does average = decay average + (1 - decay) parameter (Polyak & Juditsky 1992).
    """

    def __init__(self, model: Any, decay: float) -> None:
        self._decay = _number("decay", decay, below=1.0)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {
            name: arrays.namespace(p.data).asarray(p.data, copy=True, device=arrays.device(p.data))
            for name, p in self._parameters.items()
        }
        self._applied = False
        self._many: Any = None

    def update(self) -> None:
        """Move the average towards the present parameters."""
        self._refuse_if_applied("update")
        if self._update_together():
            return
        for name, p in self._parameters.items():
            _check_like(f"the average of {name}", self._average[name], p.data)
            xp = arrays.namespace(p.data)
            average = kernels.best(lerp, xp)(xp, self._average[name], p.data, weight=1 - self._decay)
            self._average[name] = average

    def _update_together(self) -> bool:
        """Update all averages in one go; False, and nothing done, where that cannot be."""
        averages, targets = list(self._average.values()), [p.data for p in self._parameters.values()]
        make = kernels.together("lerp", arrays.namespace(targets[0])) if targets else None
        if make is None or not make.covers(averages, targets):
            return False
        self._many = self._many or make(arrays.namespace(targets[0]))
        self._many.update(averages, targets, 1 - self._decay)
        return True

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
        return {name: _copy_to_numpy(value) for name, value in self._average.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state`; errors as for `Optimizer.load_state_dict`."""
        self._refuse_if_applied("load_state_dict")
        _check_state("averaged weights", state, self._average)
        self._average = {name: _copy_like(state[name], value) for name, value in self._average.items()}


# --- checks and copies ------------------------------------------------------------------------------------


def _number(name: str, value: Any, below: float = math.inf) -> float:
    if not (isinstance(value, Real) and 0 <= value < below):
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be a number of at least 0{limit}, got {value!r}")
    return float(value)


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


def _check_like(what: str, value: Array, p: Array) -> None:
    if tuple(value.shape) != tuple(p.shape):
        raise ValueError(f"{what} has shape {tuple(value.shape)}, the parameter has {tuple(p.shape)}")
    if arrays.namespace(value) is not arrays.namespace(p):
        raise TypeError(f"{what} is of {type(value).__module__}, the parameter of {type(p).__module__}")
    if value.dtype != p.dtype:
        raise TypeError(f"{what} is {value.dtype}, the parameter is {p.dtype}")


def _check_state(what: str, state: Mapping[str, np.ndarray], expected: Mapping[str, Array]) -> None:
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    for key in expected.keys() & state.keys():
        given, wanted = _describe(state[key]), _describe(expected[key])
        if given != wanted:
            problems.append(f"{key} is {given}, expected {wanted}")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(sorted(problems)))


def _describe(x: Array) -> str:
    return f"{arrays.dtype_name(x.dtype)} {tuple(x.shape)}"


def _zeros_like(x: Array) -> Array:
    with arrays.on_device_of(x):
        return arrays.namespace(x).zeros_like(x)


def _copy_to_numpy(x: Array) -> np.ndarray:
    return np.array(arrays.to_numpy(x))


def _copy_like(x: np.ndarray, like: Array) -> Array:
    """A copy of `x` in the library and on the device of `like`."""
    return arrays.convert(np.array(x), like)
