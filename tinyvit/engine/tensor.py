"""The engine: a Tensor, the tape behind it, and reverse-mode differentiation.

An operation is a plain function of arrays that returns its result and its vector-Jacobian product (vjp)
side by side::

    def multiply(xp, a, b, *, needs):
        def vjp(dy):
            return dy * b, dy * a
        return a * b, vjp

`xp` is the array library (array API standard), `needs` says which inputs need a gradient. `apply` runs an
operation on Tensors and, where a gradient is needed, records a Node on the tape. `grad` walks the tape
backwards, newest node first. A node is always newer than its inputs, so this is a topological order, and
nothing recurses however deep the graph is.

Two rules keep the gradients right. A vjp may return one array for several inputs (an addition does), so the
engine never writes into a gradient: it adds into fresh arrays. And a vjp never writes into the gradient that
it receives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array
from tinyvit.engine import checks
from tinyvit.engine.tape import Node, freed, recording
from tinyvit.engine.tape import no_grad as no_grad


class Tensor:
    """An array and, where needed, its gradient.

    Args:
        data: an array of any array-API library or a NumPy scalar, whose dtype is kept, or a Python number or nested
            list (NumPy; floats become float32).
        requires_grad: whether `backward` fills `.grad`; only for floating dtypes.

    Attributes:
        data: the array itself.
        grad: an array of the same shape and dtype, or None.
    """

    __slots__ = ("__weakref__", "_data", "_origin", "_version", "grad", "requires_grad")
    __array_ufunc__ = None  # NumPy leaves `array + tensor` to Tensor.__radd__

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if type(data) is not np.ndarray:
            data = _as_array(data)
        self._data = data
        self.grad: Array | None = None
        self._origin: tuple[Node, int] | None = None  # the operation that made it, and which of its outputs it is
        self.requires_grad = False
        if requires_grad:
            self.requires_grad_()
        self._version: checks.Version = [0]

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
        """Note that the array was changed in place, so that a backward pass that relied on it can refuse."""
        self._version[0] += 1

    @property
    def version(self) -> int:
        """How often the array was changed in place, through this tensor or one that shares its memory."""
        return self._version[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self._data.shape)

    @property
    def dtype(self) -> Any:
        return self._data.dtype

    @property
    def device(self) -> Any:
        """Where the array lies, as its library says it."""
        return arrays.device(self._data)

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded operation made this tensor."""
        return self._origin is None

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set, in place, whether `backward` fills `.grad`, and return this tensor.

        Raises:
            TypeError: a gradient of a tensor that is not floating.
            RuntimeError: the result of a recorded operation is to have none; detach() gives one without.
        """
        if requires_grad and not arrays.is_floating(self._data):
            raise TypeError(f"only floating tensors can require a gradient, got {self.dtype}")
        if not requires_grad and not self.is_leaf:
            raise RuntimeError("only leaves can stop requiring a gradient, not results of operations; use detach()")
        self.requires_grad = requires_grad
        return self

    def numel(self) -> int:
        """The number of entries, as `size`."""
        return self.size

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

    def __contains__(self, value: Any) -> bool:
        equal = self == value
        return isinstance(equal, Tensor) and bool(equal.numpy().any())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What NumPy's functions see: the values, without their history."""
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", threshold=100, prefix="Tensor(")
        return f"Tensor({values}, dtype={self.dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __format__(self, spec: str) -> str:
        """As in torch: a tensor without dimensions is formatted as its number, others take no format."""
        return super().__format__(spec) if self.shape else format(self.item(), spec)

    __hash__ = object.__hash__  # by identity, although == compares entries

    def detach(self) -> Tensor:
        """The same array without its history."""
        other = Tensor(self._data)
        other._version = self._version
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

    # The operations, which `tinyvit.engine.ops` attaches. Arithmetic and comparisons are elementwise.
    __add__: Operator
    __radd__: Operator
    __sub__: Operator
    __rsub__: Operator
    __mul__: Operator
    __rmul__: Operator
    __truediv__: Operator
    __rtruediv__: Operator
    __pow__: Operator
    __rpow__: Operator
    __matmul__: Operator
    __rmatmul__: Operator
    if TYPE_CHECKING:

        def __eq__(self, other: Any) -> Tensor: ...  # type: ignore[override]
        def __ne__(self, other: Any) -> Tensor: ...  # type: ignore[override]

    __lt__: Operator
    __le__: Operator
    __gt__: Operator
    __ge__: Operator
    __neg__: Method
    __pos__: Method
    __getitem__: Operator
    abs: Method
    exp: Method
    log: Method
    sqrt: Method
    tanh: Method
    sigmoid: Method
    clip: Method
    sum: Method
    mean: Method
    var: Method
    std: Method
    max: Method
    min: Method
    argmax: Method
    reshape: Method
    view: Method
    flatten: Method
    permute: Method
    permute_dims: Method
    transpose: Method
    broadcast_to: Method
    astype: Method
    T: Tensor


Operator = Callable[[Tensor, Any], Tensor]
Method = Callable[..., Tensor]
Source = Tensor | tuple[Node, int]  # where a gradient goes: a leaf, or an operation's output


@np.errstate(all="ignore")  # infinities and NaN show in the result, as in torch
def apply(op: Callable[..., Any], *inputs: Tensor | Array | float | None, **parameters: Any) -> Any:
    """Run an operation on tensors, arrays, numbers or None, and record it where a gradient is needed.

    The fastest kernel for the operation and the array library runs in place of the reference `op`.

    Returns:
        A Tensor, or a tuple of Tensors if the operation returns a tuple of arrays.
    """
    name = op.__name__.lstrip("_")
    values = [x._data if isinstance(x, Tensor) else x for x in inputs]
    xp = checks.common_namespace(name, values, parameters)
    is_recording = recording.get()
    needs = tuple([is_recording and isinstance(x, Tensor) and x.requires_grad for x in inputs])
    result, vjp = kernels.best(op, xp)(xp, *values, needs=needs, **parameters)
    outputs = [Tensor(y) for y in result] if isinstance(result, tuple) else [Tensor(result)]
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    checks.share_versions(tensors, outputs)
    if True in needs and arrays.is_floating(outputs[0]._data):
        sources = tuple([_source(x) if need else None for x, need in zip(inputs, needs, strict=True)])
        node = Node(name, sources, vjp, [(t._version, t._version[0]) for t in tensors + outputs], len(outputs))
        for number, output in enumerate(outputs):
            output.requires_grad, output._origin = True, (node, number)
    return tuple(outputs) if isinstance(result, tuple) else outputs[0]


@overload
def grad(
    output: Tensor, inputs: Tensor, gradient: Array | Tensor | None = None, retain_graph: bool = False
) -> Array: ...


@overload
def grad(
    output: Tensor,
    inputs: Iterable[Tensor],
    gradient: Array | Tensor | None = None,
    retain_graph: bool = False,
    ready: Callable[[int, Array], None] | None = None,
) -> list[Array]: ...


def grad(
    output: Tensor,
    inputs: Tensor | Iterable[Tensor],
    gradient: Array | Tensor | None = None,
    retain_graph: bool = False,
    ready: Callable[[int, Array], None] | None = None,
) -> Array | list[Array]:
    """The gradients of `output` with respect to `inputs`, as arrays in the order of `inputs`.

    Nothing is written into any tensor, so several threads may differentiate with respect to the same
    parameters at once. An input that `output` does not depend on gets zeros.

    Args:
        output: a tensor that an operation made while recording.
        inputs: one tensor (one array is returned) or several (a list is returned); they need not be leaves.
        gradient: what to start from, of the shape and dtype of `output`; may be left out for one element.
        retain_graph: keep what was saved, so that another backward pass can run through the same graph.
        ready: called with the place of an input and its gradient, which it must not change, as soon as that is found.
    """
    targets = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    for t in targets:
        if not t.requires_grad:
            raise ValueError(f"grad expects inputs that require a gradient, got one of shape {t.shape} that does not")
    nodes, _ = _tape(output)
    gradients = _backward(output, gradient, nodes, targets, retain_graph, ready)
    return gradients[0] if isinstance(inputs, Tensor) else gradients


def _tape(output: Tensor) -> tuple[list[Node], list[Tensor]]:
    """All nodes that lead to `output`, newest first, and the leaves that require a gradient."""
    if not output.requires_grad:
        raise ValueError("this tensor has no graph to go back through: nothing it depends on requires a gradient")
    nodes: set[Node] = set()
    leaves: dict[Tensor, None] = {}  # in the order in which they are found
    pending = [_source(output)]
    while pending:
        source = pending.pop()
        if isinstance(source, Tensor):
            leaves[source] = None
        elif source[0] not in nodes:
            nodes.add(source[0])
            pending.extend(s for s in source[0].inputs if s is not None)
    return sorted(nodes, key=lambda node: node.order, reverse=True), list(leaves)


def _source(t: Any) -> Source:
    return t if t._origin is None else t._origin


@np.errstate(all="ignore")
def _backward(
    output: Tensor,
    gradient: Array | Tensor | None,
    nodes: list[Node],
    targets: list[Tensor],
    retain_graph: bool,
    ready: Callable[[int, Array], None] | None = None,
) -> list[Array]:
    """Carry `gradient` from `output` back through `nodes`; the gradients that reach `targets`."""
    collected = {_source(output): _start(output, gradient)}
    target_sources = {_source(t) for t in targets}
    for node in nodes:  # all of them first, so that a refusal leaves the graph as it was
        if node.vjp is freed:
            freed()
        checks.check_unchanged(node.name, node.versions)
    waiting = {} if ready is None else {_source(t): place for place, t in enumerate(targets)}
    uses = Counter(source for node in nodes for source in node.inputs if source in waiting)
    notes = kernels.Notes()
    token = kernels.notes.set(notes)
    try:
        for node in nodes:
            outputs: list[Source] = [(node, number) for number in range(node.n_outputs)]
            dys = [collected.get(o) if o in target_sources else collected.pop(o, None) for o in outputs]
            sources = node.inputs
            if any(dy is not None for dy in dys):
                # A kernel that can adds what has reached its first input from elsewhere, which saves a pass over it.
                other = collected.pop(sources[0], None) if getattr(node.vjp, "adds", False) else None
                notes.finish(*dys, other)
                gradients = node.vjp(*dys) if other is None else node.vjp(*dys, other)
                for source, g in zip(sources, gradients, strict=True):
                    if source in collected:
                        notes.finish(collected[source], g)
                        collected[source] = collected[source] + g
                    elif source is not None:
                        collected[source] = g
                if not retain_graph:
                    node.release()
            for source in sources:
                if source in waiting:
                    uses[source] -= 1
                    if not uses[source] and source in collected and ready is not None:
                        notes.finish(collected[source])
                        ready(waiting.pop(source), collected[source])
        notes.finish()
    finally:
        kernels.notes.reset(token)
    found = _distinct([collected.get(_source(t)) for t in targets], targets, gradient)
    for place in waiting.values():  # of what nothing led to, or of the output itself
        if ready is not None:
            ready(place, found[place])
    return found


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
    returned = {id(start._data if isinstance(start, Tensor) else start)}
    out = []
    for g, t in zip(gradients, targets, strict=True):
        xp = arrays.namespace(t._data)
        if g is None:
            g = xp.zeros_like(t._data)
        elif id(g) in returned or not arrays.owns_memory(g):
            g = xp.asarray(g, copy=True)
        g = arrays.as_array(g)
        returned.add(id(g))
        out.append(g)
    return out


def _as_array(data: Any) -> Array:
    """`data` as an array, for what is not a NumPy array."""
    if isinstance(data, Tensor):
        raise TypeError("Tensor expects an array, got a Tensor; use tensor.detach()")
    data = arrays.as_array(data)
    if arrays.is_array(data):
        return data
    data = np.asarray(data)
    if data.dtype == np.float64:
        return data.astype(np.float32)
    if data.dtype.kind not in "biuf":
        raise TypeError(f"Tensor expects numbers, got {data.dtype}")
    return data


def array_of(x: Tensor | Array) -> Array:
    return x.data if isinstance(x, Tensor) else x
