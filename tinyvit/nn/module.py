"""Parameters, buffers and modules: what a model is made of."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from tinyvit.backend import arrays, devices
from tinyvit.engine.tape import recording
from tinyvit.engine.tensor import Array, Tensor, array_of

T = TypeVar("T")
Hook = Callable[["Module", tuple[Any, ...]], None]

_evaluating: ContextVar[bool] = ContextVar("tinyvit_evaluating", default=False)
_pre_hook: ContextVar[Hook | None] = ContextVar("tinyvit_pre_hook", default=None)


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """Within this context, in this thread, all modules are in evaluation mode. Nothing is written into them."""
    token = _evaluating.set(True)
    try:
        yield
    finally:
        _evaluating.reset(token)


@contextlib.contextmanager
def forward_pre_hook(hook: Hook) -> Iterator[None]:
    """Within this context, in this thread, `hook(module, args)` is called before the forward of every module."""
    token = _pre_hook.set(hook)
    try:
        yield
    finally:
        _pre_hook.reset(token)


def only_output_counts() -> bool:
    """Whether nothing is recorded and no hook is called: one operation may replace what several modules do."""
    return not recording.get() and _pre_hook.get() is None


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Parameter, Any], Parameter]:
    """The method of `Parameter` that writes the result of an operation into its array."""

    def method(self: Parameter, other: Any) -> Parameter:
        if recording.get() and (self.requires_grad or getattr(other, "requires_grad", False)):
            raise RuntimeError(
                "a parameter that requires a gradient cannot be changed in place; do it under tinyvit.no_grad()"
            )
        other = array_of(other)
        self.data = operation(self.data, arrays.convert(other, self.data) if arrays.is_array(other) else other)
        return self

    return method


class Parameter(Tensor):
    """A tensor that an optimizer may change, as an attribute of a module.

    Args:
        data: an array; or a Tensor, whose array is shared.
        requires_grad: whether it learns.

    `+=`, `-=`, `*=` and `/=` write into its array. As in torch they raise RuntimeError where a gradient is recorded.
    """

    __slots__ = ()

    def __init__(self, data: Array | Tensor, requires_grad: bool = True) -> None:
        super().__init__(array_of(data), requires_grad)

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)


class Buffer(Tensor):
    """A tensor of a module that does not learn: it is moved by `to`, but is no parameter.

    As in torch it is in the state dict unless `persistent` is False, for what the module itself can compute.
    """

    __slots__ = ("persistent",)

    def __init__(self, data: Array | Tensor, persistent: bool = True) -> None:
        super().__init__(array_of(data))
        self.persistent = persistent


class UnmatchedKeys(NamedTuple):
    """What `load_state_dict` found besides what fits: names without arrays, and names that the module does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """A part of a model: a `forward`, and attributes that are parameters, buffers or other modules.

    These may also stand in lists and tuples, but are not found in other containers. Their names, joined by dots, are
    the names of the state dict: `blocks.0.norm1.weight`.

    Attributes:
        training: whether dropout and drop path are on; always False within `evaluating`.
        frozen: stays in evaluation mode, whatever `train` says, until `requires_grad_(True)`.
    """

    _training: bool = True
    frozen: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook = _pre_hook.get()
        if hook is not None:
            hook(self, args)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Raises TypeError for a parameter or module that would get lost."""
        old = vars(self).get(name)
        if isinstance(old, Buffer) and value is not None and not isinstance(value, Buffer):
            value = Buffer(value, old.persistent)
        elif isinstance(old, Parameter) and value is not None and not isinstance(value, Parameter):
            raise TypeError(
                f"{name} is a parameter of {type(self).__name__} and cannot become a {type(value).__name__}; assign "
                f"nn.Parameter(...), or change its values under tinyvit.no_grad() or by {name}.data = array"
            )
        elif isinstance(old, Module) and value is not None and not isinstance(value, Module):
            raise TypeError(
                f"{name} is a module of {type(self).__name__} and cannot become a {type(value).__name__}; assign an "
                "nn.Module or None"
            )
        super().__setattr__(name, value)

    def register_buffer(self, name: str, tensor: Array | Tensor | None, persistent: bool = True) -> None:
        """The same as `self.name = nn.Buffer(tensor, persistent)`."""
        setattr(self, name, None if tensor is None else Buffer(tensor, persistent))

    def _members(self) -> list[tuple[str, Any]]:
        """The parameters, buffers and modules among the attributes, with their names."""
        return _flatten("", vars(self).items())

    def _named(self, kind: type[T] | tuple[type[T], ...], prefix: str = "") -> list[tuple[str, T]]:
        """All members of a kind, of this module and those below; one that is used twice comes twice."""
        members = self._members()
        found = [(prefix + name, m) for name, m in members if isinstance(m, kind) and not isinstance(m, Module)]
        for name, member in members:
            if isinstance(member, Module):
                if isinstance(member, kind):
                    found.append((prefix + name, member))
                found += member._named(kind, f"{prefix}{name}.")
        return found

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """This module ("") and all below it, each once, with their dotted names."""
        yield "", self
        yield from _distinct(self._named(Module))

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters, each once, with their state-dict names."""
        return _distinct(self._named(Parameter))

    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of `named_parameters`."""
        return [p for _, p in self.named_parameters()]

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """All buffers, each once, with their state-dict names."""
        return _distinct(self._named(Buffer))

    def buffers(self) -> list[Buffer]:
        """All buffers, in the order of `named_buffers`."""
        return [b for _, b in self.named_buffers()]

    def num_parameters(self) -> int:
        """The number of values in all parameters."""
        return sum(p.size for p in self.parameters())

    def apply(self, function: Callable[[Module], Any]) -> Self:
        """Call `function(module)` for every module below this one, then for this one."""
        for _, member in self._members():
            if isinstance(member, Module):
                member.apply(function)
        function(self)
        return self

    @property
    def training(self) -> bool:
        return self._training and not _evaluating.get()

    @training.setter
    def training(self, mode: bool) -> None:
        self._training = mode

    def train(self, mode: bool = True) -> Self:
        """Switch dropout and drop path on (or off) in this module and all below; frozen ones stay off."""
        for module in self.modules():
            module.training = mode and not module.frozen
        return self

    def eval(self) -> Self:
        """Switch dropout and drop path off."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Thaw (or freeze) all parameters; modules of thawed ones follow `train` again."""
        for p in self.parameters():
            p.requires_grad = requires_grad
        if requires_grad:
            for module in self.modules():
                module.frozen = False
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, or with `set_to_none=False` put zeros in their place."""
        for p in self.parameters():
            none = set_to_none or p.grad is None
            p.grad = None if none else arrays.namespace(p.grad).zeros_like(p.grad)

    def to(self, *targets: Any) -> Self:
        """Move to a device or array library and/or a floating dtype.

        Args:
            targets: "cpu" (NumPy), "cuda" or "cuda:1" (CuPy), an array-API namespace module, or a floating dtype. A
                dtype leaves buffers of whole numbers as they are.

        `TrainStep` and `predict` work on the GPU that the parameters are on. CuPy itself works on its current one, so
        calls of a module on "cuda:1", and steps of an optimizer, belong under `with cupy.cuda.Device(1):`.

        Raises:
            RuntimeError: CuPy, its driver or a GPU is missing.
            ValueError: an unknown target.
        """
        movers = [devices.mover(target) for target in targets]
        for t in (*self.parameters(), *self.buffers()):
            for move in movers:
                t.data = move(t.data)
                t.grad = None if t.grad is None else move(t.grad)
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and persistent buffers as NumPy arrays, by name."""
        return {name: np.array(t.numpy()) for name, t in self._state()}

    def _state(self) -> list[tuple[str, Tensor]]:
        """All parameters and persistent buffers."""
        return [(name, t) for name, t in self._named((Parameter, Buffer)) if getattr(t, "persistent", True)]

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True, *, copy: bool = True) -> UnmatchedKeys:
        """Take over parameters and buffers by name.

        A float64 state makes a float64 module; other dtypes are cast to the module's.

        Args:
            state: arrays by state-dict name.
            strict: refuse missing and unexpected names; with False they are passed over and returned.
            copy: with False the module keeps, and changes, the very arrays of `state` that have its dtype.

        Returns:
            (missing_keys, unexpected_keys), as torch's.

        Raises:
            ValueError: names every missing, unexpected and mis-shaped entry; nothing was changed then.
        """
        own = dict(self._state())
        keys = UnmatchedKeys([n for n in own if n not in state], [n for n in state if n not in own])
        problems = []
        if strict:
            problems += [f"missing {name}" for name in keys.missing_keys]
            problems += [f"unexpected {name}" for name in keys.unexpected_keys]
        problems += [
            f"{name} has shape {tuple(state[name].shape)}, expected {t.shape}"
            for name, t in own.items()
            if name in state and tuple(state[name].shape) != t.shape
        ]
        if problems:
            raise ValueError("the weights do not fit the model: " + "; ".join(problems))
        if any(arrays.dtype_name(state[name].dtype) == "float64" for name in own if name in state):
            self.to("float64")
        for name, t in own.items():
            if name in state:
                value = arrays.astype(arrays.convert(state[name], t.data), t.dtype)
                if copy:
                    value = arrays.namespace(value).asarray(value, copy=True, device=arrays.device(value))
                t.data = value
        return keys

    def __repr__(self) -> str:
        """The tree of modules with their settings and the shapes of their tensors."""
        named = vars(self).items()
        plain = ((name, value) for name, value in named if not name.startswith("_") and (name != "frozen" or value))
        own = [f"{name}={value!r}" for name, value in plain if isinstance(value, (bool, int, float, str))]
        members = self._members()
        own += [f"{name}: {member.shape}" for name, member in members if isinstance(member, Tensor)]
        children = [(name, repr(member)) for name, member in members if isinstance(member, Module)]
        if not children:
            return f"{type(self).__name__}({', '.join(own)})"
        lines = [", ".join(own)] if own else []
        for _, group in itertools.groupby(children, lambda child: (_list_name(child[0]), child[1])):
            alike = list(group)
            first, text = alike[0]
            times = f"({first}) to ({alike[-1][0]}): {len(alike)} x" if len(alike) > 1 else f"({first}):"
            lines.append(f"{times} {text}")
        return f"{type(self).__name__}(\n" + "\n".join(lines).replace("\n", "\n  ").join(("  ", "\n)"))


class ModuleList(Module):
    """A list of modules. A plain list that is an attribute of a module does the same, and is no module itself."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> Self:
        setattr(self, str(len(self)), module)
        return self

    def _list(self) -> list[Module]:
        return [module for name, module in vars(self).items() if name.isdecimal()]

    def __len__(self) -> int:
        return len(self._list())

    def __iter__(self) -> Iterator[Module]:
        return iter(self._list())

    def __getitem__(self, index: Any) -> Any:
        """The module at a number, or a list of the modules in a slice."""
        return self._list()[index]

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, str(range(len(self))[index]), module)


class Sequential(ModuleList):
    """Modules that run one after the other."""

    def __init__(self, *modules: Module) -> None:
        super().__init__(modules)

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x


def _flatten(prefix: str, named: Iterable[tuple[Any, Any]]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in named:
        if isinstance(value, (Parameter, Buffer, Module)):
            found.append((f"{prefix}{name}", value))
        elif isinstance(value, (list, tuple)):
            found += _flatten(f"{prefix}{name}.", enumerate(value))
    return found


def _distinct(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Each object under its first name only."""
    seen: set[int] = set()
    for name, value in named:
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _list_name(name: str) -> str:
    """The name of the list that a member stands in ("blocks" for "blocks.3"), else the member's own name."""
    return "" if name.isdecimal() else name.rpartition(".")[0] or name
