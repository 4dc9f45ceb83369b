"""The engine: a Tensor, the tape behind it, and reverse-mode differentiation.

An operation is a plain function of arrays that returns its result and its vector-Jacobian product (vjp)
side by side::

    def multiply(xp, a, b, *, needs):
        def vjp(dy):
            return dy * b, dy * a
        return a * b, vjp

`xp` is the array library (array API standard), `needs` says for which inputs a gradient is wanted.
`apply` runs an operation on Tensors and, when a gradient is wanted, notes a Node on the tape. `grad`
walks the tape backwards: newest node first, which is a topological order because a node is always newer
than its inputs, so nothing recurses however deep the graph is.

Two rules keep the gradients right. An array handed out by a vjp may be shared (an addition gives the same
array to both parents), so the engine never writes into a gradient: it adds into fresh arrays. And a vjp
never writes into the gradient it is given.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays

Array = Any  # an array of any library that follows the array API standard

Source = Any  # a leaf Tensor, or (node, which of its outputs)

_recording: ContextVar[bool] = ContextVar("tinyvit_recording", default=True)
_order = itertools.count()  # numbers nodes by age; next() is atomic, so threads may share it


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Within this context (or decorated function, in this thread) operations record nothing for a backward pass."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def is_grad_enabled() -> bool:
    """Whether operations record what a backward pass needs: not within `no_grad`."""
    return _recording.get()


class Node:
    """One recorded operation: where its inputs came from and how to carry a gradient back to them.

    It refers to the operations that made its inputs, not to their Tensors, so that an array which no vjp saved is freed
    as soon as nobody else holds it.
    """

    __slots__ = ("inputs", "n_outputs", "name", "order", "seen", "vjp")

    def __init__(self, name: str, inputs: tuple[Source | None, ...], vjp: Callable, n_outputs: int) -> None:
        self.order = next(_order)
        self.name = name
        self.inputs = inputs  # None where no gradient is wanted
        self.vjp = vjp
        self.n_outputs = n_outputs
        self.seen: list[tuple[list[int], int]] = []  # (change counter, its value when recorded)

    def check_unchanged(self) -> None:
        if any(counter[0] != value for counter, value in self.seen):
            raise RuntimeError(
                f"an array that {self.name} saved for its gradient was changed in place after the forward pass; "
                "run the forward pass again after the change"
            )

    def release(self) -> None:
        """Let go of everything saved, so that memory falls while the backward pass runs."""
        self.inputs, self.seen, self.vjp = (), [], _freed


def _freed(*_: Array) -> None:
    raise RuntimeError(
        "the graph was freed by an earlier backward pass; "
        "run the forward pass again, or give that pass retain_graph=True"
    )


class Tensor:
    """An array and, where wanted, its gradient.

    Args:
        data: an array of any array-API library or a NumPy scalar, whose dtype is kept, or a Python number or nested
            list (NumPy; floats become float32).
        requires_grad: whether `backward` shall fill `.grad`; only for floating dtypes.

    Attributes:
        data: the array itself.
        grad: an array of the same shape and dtype, or None.
    """

    __slots__ = ("__weakref__", "_changes", "_data", "_origin", "grad", "requires_grad")
    __array_ufunc__ = None  # NumPy leaves `array + tensor` to Tensor.__radd__

    def __init__(self, data: Array, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            raise TypeError("Tensor expects an array, got a Tensor; use tensor.detach()")
        data = arrays.as_array(data)
        if not arrays.is_array(data):
            data = np.asarray(data)
            if data.dtype == np.float64:
                data = data.astype(np.float32)
            elif data.dtype.kind not in "biuf":
                raise TypeError(f"Tensor expects numbers, got {data.dtype}")
        if requires_grad and not arrays.is_floating(data):
            raise TypeError(f"only floating tensors can require a gradient, got {data.dtype}")
        self._data = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._origin: tuple[Node, int] | None = None  # the operation that made it, and which of its outputs it is
        self._changes = [0]

    @property
    def data(self) -> Array:
        return self._data

    @data.setter
    def data(self, value: Array) -> None:
        # `t.data += 1` changes the array and assigns it to itself. Another array leaves what the tape saved intact.
        if value is self._data:
            self.changed()
        elif not arrays.is_array(value):
            raise TypeError(f"data expects an array, got {type(value).__name__}")
        self._data = value

    def changed(self) -> None:
        """Note that the array was written in place, so that a backward pass that relied on it can refuse."""
        self._changes[0] += 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def size(self) -> int:
        return self._data.size

    @property
    def dtype(self) -> Any:
        return self._data.dtype

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded operation made this tensor."""
        return self._origin is None

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array, wherever the tensor lives (not a copy if they are one already)."""
        return arrays.to_numpy(self._data)

    def item(self) -> int | float | bool:
        """The value of a one-element tensor as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() expects one element, got shape {self.shape}")
        return self.numpy().item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What NumPy's functions see: the values, without their history."""
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", threshold=100, prefix="Tensor(")
        return f"Tensor({values}, dtype={self.dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def detach(self) -> Tensor:
        """The same array without its history."""
        other = Tensor(self._data)
        other._changes = self._changes
        return other

    def backward(self, gradient: Array | Tensor | None = None, retain_graph: bool = False) -> None:
        """Add the gradient of this tensor with respect to every leaf that requires one into its `.grad`.

        Args:
            gradient: the gradient of some scalar with respect to this tensor; may be left out for one element.
            retain_graph: keep what was saved, so that another backward pass can run through the same graph.
        """
        nodes, leaves = _tape(self)
        for leaf, g in zip(leaves, _backward(self, gradient, nodes, leaves, retain_graph), strict=True):
            leaf.grad = g if leaf.grad is None else arrays.as_array(leaf.grad + g)


def apply(op: Callable, *inputs: Tensor | Array | float | None, **params: Any) -> Any:
    """Run an operation on tensors, arrays, numbers or None, and record it where a gradient is wanted.

    The fastest kernel registered for the operation and the array library runs in place of the reference `op`.
    Returns a Tensor, or a tuple of Tensors if the operation returns a tuple of arrays.
    """
    values = [t._data if isinstance(t, Tensor) else t for t in inputs]
    name = op.__name__.lstrip("_")
    xp = arrays.common_namespace(name, values)
    for key, value in params.items():
        if isinstance(value, np.generic):
            params[key] = value.item()  # a np.float64 scalar would turn float32 arrays into float64
    recording = _recording.get()
    needs = tuple(recording and isinstance(t, Tensor) and t.requires_grad for t in inputs)
    result, vjp = kernels.best(op, xp)(xp, *values, needs=needs, **params)
    results = result if isinstance(result, tuple) else (result,)
    outputs = tuple(Tensor(r) for r in results)
    for t, view in itertools.product(inputs, outputs):
        if isinstance(t, Tensor) and arrays.is_view_of(view._data, t._data):
            view._changes = t._changes  # writing into one changes the other
    if True in needs and arrays.is_floating(outputs[0]._data):
        parents = tuple(_source(t) if need else None for t, need in zip(inputs, needs, strict=True))
        node = Node(name, parents, vjp, len(outputs))
        for t in (*inputs, *outputs):
            if isinstance(t, Tensor):
                node.seen.append((t._changes, t._changes[0]))
        for number, t in enumerate(outputs):
            t.requires_grad, t._origin = True, (node, number)
    return outputs if isinstance(result, tuple) else outputs[0]


def grad(
    output: Tensor,
    inputs: Tensor | Iterable[Tensor],
    gradient: Array | Tensor | None = None,
    retain_graph: bool = False,
) -> Any:
    """The gradients of `output` with respect to `inputs`, as arrays in the order of `inputs`.

    Nothing is written into any tensor, so several threads may differentiate with respect to the same
    parameters at once. An input that `output` does not depend on gets zeros.

    Args:
        output: a tensor that an operation made while recording.
        inputs: one tensor (one array is returned) or several (a list is returned); they need not be leaves.
        gradient: what to start from, of the shape and dtype of `output`; may be left out for one element.
        retain_graph: keep what was saved, so that another backward pass can run through the same graph.
    """
    targets = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    for t in targets:
        if not t.requires_grad:
            raise ValueError(f"grad expects inputs that require a gradient, got one of shape {t.shape} that does not")
    nodes, _ = _tape(output)
    gradients = _backward(output, gradient, nodes, targets, retain_graph)
    return gradients[0] if isinstance(inputs, Tensor) else gradients


def _tape(output: Tensor) -> tuple[list[Node], list[Tensor]]:
    """All nodes that lead to `output`, newest first, and the leaves that require a gradient."""
    if not output.requires_grad:
        raise ValueError("this tensor has no graph to go back through: nothing it depends on requires a gradient")
    nodes: set[Node] = set()
    leaves: list[Tensor] = []
    pending = [_source(output)]
    while pending:
        source = pending.pop()
        if isinstance(source, Tensor):
            leaves.append(source)
        elif source[0] not in nodes:
            nodes.add(source[0])
            pending.extend(s for s in source[0].inputs if s is not None)
    return sorted(nodes, key=lambda node: node.order, reverse=True), list(dict.fromkeys(leaves))


def _source(t: Tensor) -> Source:
    """Where a gradient of `t` goes: the output of the operation that made it, or the leaf itself."""
    return t if t._origin is None else t._origin


def _backward(
    output: Tensor, gradient: Array | Tensor | None, nodes: list[Node], targets: list[Tensor], retain_graph: bool
) -> list[Array]:
    """Carry `gradient` from `output` back through `nodes`; the gradients that reach `targets`."""
    collected = {_source(output): _start(output, gradient)}
    wanted = {_source(t) for t in targets}
    for node in nodes:  # all of them first, so that a refusal leaves the graph as it was
        if node.vjp is _freed:
            _freed()
        node.check_unchanged()
    for node in nodes:
        outputs = [(node, number) for number in range(node.n_outputs)]
        dys = [collected.get(o) if o in wanted else collected.pop(o, None) for o in outputs]
        if all(dy is None for dy in dys):
            continue
        for source, g in zip(node.inputs, node.vjp(*dys), strict=True):
            if source is not None:
                collected[source] = collected[source] + g if source in collected else g
        if not retain_graph:
            node.release()
    return _distinct([collected.get(_source(t)) for t in targets], targets, gradient)


def _start(output: Tensor, gradient: Array | Tensor | None) -> Array:
    """The gradient that a backward pass starts from."""
    if gradient is None:
        if output.size != 1:
            raise ValueError(
                f"a backward pass from shape {output.shape} needs a gradient to start from; "
                "only a single element does not"
            )
        return arrays.namespace(output._data).ones_like(output._data)
    seed = arrays.as_array(gradient._data if isinstance(gradient, Tensor) else gradient)
    if not arrays.is_array(seed):
        raise TypeError(f"the starting gradient must be an array, got {type(seed).__name__}")
    if tuple(seed.shape) != output.shape or seed.dtype != output.dtype:
        raise ValueError(
            f"the starting gradient must have shape {output.shape} and dtype {output.dtype}, "
            f"got {tuple(seed.shape)} and {seed.dtype}"
        )
    return seed


def _distinct(gradients: list[Array | None], targets: list[Tensor], start: Any) -> list[Array]:
    """Gradients that no other array shares memory with, so that a caller may scale one without changing another."""
    given = {id(start._data if isinstance(start, Tensor) else start)}
    out = []
    for g, t in zip(gradients, targets, strict=True):
        xp = arrays.namespace(t._data)
        if g is None:
            g = xp.zeros_like(t._data)
        elif id(g) in given or not arrays.owns_memory(g):
            g = xp.asarray(g, copy=True)
        g = arrays.as_array(g)
        given.add(id(g))
        out.append(g)
    return out
