"""Parameters, modules and the layers of a Vision Transformer.

A module's parameters and sub-modules are its attributes (or lists of modules); their names joined by dots are the
names of the state dict.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Self

import numpy as np

from tinyvit import functional as F
from tinyvit.backend import arrays, random
from tinyvit.engine.ops import multiply
from tinyvit.engine.tensor import Array, Tensor

_initialise: ContextVar[bool] = ContextVar("tinyvit_initialise", default=True)


@contextlib.contextmanager
def no_init() -> Iterator[None]:
    """Within this context new parameters are zeros, not drawn: for weights that are loaded right afterwards."""
    token = _initialise.set(False)
    try:
        yield
    finally:
        _initialise.reset(token)


def xavier_uniform(shape: tuple[int, ...], fan_out: int | None = None) -> np.ndarray:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010); shape (out, in)."""
    bound = math.sqrt(6.0 / (shape[1] + (fan_out or shape[0])))
    return _draw(shape, lambda g: (g.random(shape, dtype=np.float32) * 2.0 - 1.0) * bound)


def normal(shape: tuple[int, ...], std: float) -> np.ndarray:
    """Normal with mean 0."""
    return _draw(shape, lambda g: g.standard_normal(shape, dtype=np.float32) * std)


def truncated_normal(shape: tuple[int, ...], std: float) -> np.ndarray:
    """Normal with mean 0, values beyond two standard deviations drawn again."""

    def draw(g: np.random.Generator) -> np.ndarray:
        x = g.standard_normal(shape, dtype=np.float32)
        while (far := np.abs(x) > 2.0).any():
            x[far] = g.standard_normal(int(far.sum()), dtype=np.float32)
        return x * std

    return _draw(shape, draw)


def lecun_normal(shape: tuple[int, ...]) -> np.ndarray:
    """Truncated normal whose variance is 1 / fan_in (LeCun et al. 1998); shape (out, in, ...)."""
    # 0.8796 is the standard deviation that is left after cutting a unit normal at +-2.
    return truncated_normal(shape, math.sqrt(1.0 / math.prod(shape[1:])) / 0.87962566103423978)


def _draw(shape: tuple[int, ...], draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
    generator = random.generator()
    return draw(generator).astype(np.float32) if _initialise.get() else np.zeros(shape, np.float32)


@contextlib.contextmanager
def evaluating(module: Module) -> Iterator[None]:
    """Within this context `module` and all below it are in evaluation mode; afterwards each is in its own again."""
    modes = [(part, part.training) for _, part in module.named_modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class Parameter(Tensor):
    """A tensor that a module owns and an optimizer may change."""

    __slots__ = ()

    def __init__(self, data: Array, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)


class Module:
    """A part of a model: attributes that are parameters or modules, and a `forward`.

    Attributes:
        training: whether dropout and drop path are on.
        frozen: stays in evaluation mode, whatever `train` says, until `requires_grad_(True)`.
    """

    training: bool = True
    frozen: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def _children(self) -> Iterator[tuple[str, Module]]:
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", m) for i, m in enumerate(value) if isinstance(m, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module ("") and all below it, with their dotted names."""
        yield prefix, self
        for name, child in self._children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters with their state-dict names."""
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield (f"{prefix}.{name}" if prefix else name), value

    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of `named_parameters`."""
        return [p for _, p in self.named_parameters()]

    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(p.size for p in self.parameters())

    def train(self, mode: bool = True) -> Self:
        """Switch dropout and drop path on (or off) in this module and all below; what is frozen stays off."""
        for _, module in self.named_modules():
            module.training = mode and not module.frozen
        return self

    def eval(self) -> Self:
        """Switch dropout and drop path off."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Thaw (or freeze) all parameters; thawed modules follow `train` again."""
        for p in self.parameters():
            p.requires_grad = requires_grad
        if requires_grad:
            for _, module in self.named_modules():
                module.frozen = False
        return self

    def to(self, *targets: Any) -> Self:
        """Move to a device or array library and/or a floating dtype.

        Args:
            targets: "cpu" (NumPy), "cuda" or "cuda:1" (CuPy), an array-API namespace module, or a floating dtype.

        `TrainStep` and `predict` work on the GPU that the parameters are on. CuPy itself works on its current one, so
        calls of a module on "cuda:1", and steps of an optimizer, belong under `with cupy.cuda.Device(1):`.

        Raises:
            RuntimeError: CuPy, its driver or a GPU is missing.
        """
        movers = [arrays.mover(target) for target in targets]
        for p in self.parameters():
            for move in movers:
                p.data = move(p.data)
                p.grad = None if p.grad is None else move(p.grad)
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters as NumPy arrays, by name."""
        return {name: np.array(p.numpy()) for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True, *, copy: bool = True) -> None:
        """Take over parameters by name; a float64 state makes a float64 module, other dtypes are cast to the module's.

        Args:
            state: arrays by state-dict name.
            strict: refuse missing and unexpected names (with False they are passed over).
            copy: False lets the module keep, and change, the very arrays of `state` that have its dtype.

        Raises:
            ValueError: names every missing, unexpected and mis-shaped entry; nothing was changed then.
        """
        own = dict(self.named_parameters())
        problems = []
        if strict:
            problems += [f"missing {name}" for name in own if name not in state]
            problems += [f"unexpected {name}" for name in state if name not in own]
        problems += [
            f"{name} has shape {tuple(state[name].shape)}, expected {p.shape}"
            for name, p in own.items()
            if name in state and tuple(state[name].shape) != p.shape
        ]
        if problems:
            raise ValueError("the weights do not fit the model: " + "; ".join(problems))
        if any(arrays.dtype_name(state[name].dtype) == "float64" for name in own if name in state):
            self.to("float64")
        for name, p in own.items():
            if name in state:
                value = arrays.astype(arrays.convert(state[name], p.data), p.dtype)
                if copy:
                    value = arrays.namespace(value).asarray(value, copy=True, device=arrays.device(value))
                p.data = value


class Identity(Module):
    """What stands where a layer is left out."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Linear(Module):
    """y = x W^T + b; weight (out_features, in_features), bias (out_features,) zeros."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_init: Callable[[tuple[int, ...]], np.ndarray] = xavier_uniform,
    ) -> None:
        self.weight = Parameter(weight_init((out_features, in_features)))
        self.bias = Parameter(np.zeros(out_features, np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Layer normalisation over the last axis of length `dim`."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        self.eps = eps
        self.weight = Parameter(np.ones(dim, np.float32))
        self.bias = Parameter(np.zeros(dim, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class LayerScale(Module):
    """A learned factor per channel (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, dim: int, init_value: float) -> None:
        self.gamma = Parameter(np.full(dim, init_value, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.gamma)


class Dropout(Module):
    """`functional.dropout` while training."""

    def __init__(self, p: float) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class DropPath(Module):
    """`functional.drop_path` while training."""

    def __init__(self, p: float) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.drop_path(x, self.p, self.training)
