"""Inference at full speed over many images: `predict`, and `predictions` for batches that come one by one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tinyvit import nn
from tinyvit.backend import arrays, parallel
from tinyvit.backend.cuda_graph import Graphed
from tinyvit.backend.memory import keep_freed_memory
from tinyvit.engine.tensor import Array, array_of, no_grad
from tinyvit.execution.precision import Precision
from tinyvit.kernels import cuda

SHARD_TOKENS = 1280  # that a shard computes, about: measured. Its activations then stay in a processor's caches


def predict(
    model: nn.Module,
    images: Array,
    batch_size: int = 256,
    threads: int | None = None,
    precision: str = "fp32",
) -> np.ndarray:
    """The model's outputs for any number of images, in evaluation mode and with nothing recorded.

    Args:
        model: gives (B, num_classes) for images (B, C, H, W).
        images: (N, C, H, W), floating.
        batch_size: how many images are computed at a time.
        threads: that share a batch on a CPU, as in `tinyvit.backend.parallel.plan`.
        precision: "fp32", "tf32", "bf16", "fp16" or "int8", as in `tinyvit.execution.precision.Precision`.

    On a GPU batches of one size, also of several calls, are one CUDA graph, whose memory is kept as long as the model.
    On a CPU the process keeps what is freed (glibc; set GLIBC_TUNABLES or a MALLOC_ variable to have it otherwise).

    Returns:
        (N, num_classes), NumPy; float32 also where the model computes in 16 bits for it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not hasattr(images, "shape") or not hasattr(images, "dtype"):
        given = type(images).__name__
        raise TypeError(
            f"predict expects an array (N, C, H, W), got {given}; for files and PIL images use tinyvit.classify"
        )
    if images.ndim == 3 and getattr(model, "config", None) is not None:
        raise ValueError(
            f"predict expects images (N, C, H, W), got one of shape {tuple(images.shape)}: use images[None]"
        )
    count = images.shape[0]
    starts = range(0, max(count, 1), batch_size)
    batches = (images[first : min(first + batch_size, count), ...] for first in starts)
    return np.concatenate(list(predictions(model, batches, threads, precision)))


def predictions(
    model: nn.Module,
    batches: Iterable[Array],
    threads: int | None = None,
    precision: str = "fp32",
    done: Callable[[int], object] = lambda count: None,
) -> Iterator[np.ndarray]:
    """The outputs of `predict` for batches (B, C, H, W), one after the other.

    `done` is called with the size of each shard when it is computed, on a CPU from several threads.

    A GPU computes a batch while the one before it is read, so a change of the weights between two outputs shows one
    output later; on a CPU it shows at once. On a CPU bf16 and int8 pack the weights once for all batches, and again
    where a Tensor says that it was changed: after writing into its array call `changed()`.
    """
    weights = model.parameters()
    like = weights[0].data
    if arrays.on_host(like):
        keep_freed_memory()
    unread: list[Callable[[], np.ndarray]] = []
    with _predictor(model, weights, precision) as (mode, compute):
        try:
            for images in batches:
                images = array_of(images)
                with no_grad(), nn.evaluating(), arrays.on_device_of(like), mode.products():
                    mode.refresh()
                    batch = arrays.convert(images, like)
                    shards = _shards(model, like, batch.shape[0], threads)

                    def run(start: int, stop: int, x: Array = batch) -> Array:
                        outputs = compute(x[start:stop, ...])
                        done(stop - start)
                        return outputs

                    computed = list(parallel.run(shards, run))
                    last, unread = unread, [arrays.start_copy_to_host(x) for x in computed]
                if arrays.on_host(like):
                    last, unread = unread, []
                if last:
                    yield np.concatenate([read() for read in last])
            last, unread = unread, []
            if last:
                yield np.concatenate([read() for read in last])
        finally:
            for read in unread:  # the copies to the host must end before their memory is freed
                read()


def _shards(model: nn.Module, like: Array, samples: int, threads: int | None) -> parallel.Shards:
    """How a batch is cut into shards of about SHARD_TOKENS tokens, as many for each thread."""
    if not arrays.on_host(like):  # a device runs its own threads
        return parallel.plan(samples, 1, 1)
    threads = parallel.usual_threads() if threads is None else threads
    tokens = samples * getattr(getattr(model, "config", None), "num_tokens", 1)
    return parallel.plan(samples, threads, threads * max(1, round(tokens / SHARD_TOKENS / max(1, threads))))


# --- what is kept between calls ---------------------------------------------------------------------------------------


class _Predictor(NamedTuple):
    """What computes the outputs of a model that is made of `parts`, whose parameters are of these `kinds`."""

    mode: Precision
    compute: Callable[[Array], Array]
    parts: list[Any]
    kinds: list[tuple]


_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, _Predictor]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _predictor(
    model: nn.Module, weights: list[nn.Parameter], precision: str
) -> Iterator[tuple[Precision, Callable[[Array], Array]]]:
    """The precision, and the function that computes the outputs; on a GPU those of the last call, with its graph.

    Within the context the graph is used by nobody else: it has room for one batch.
    """
    if not arrays.is_cupy(weights[0].data):
        yield _make(model, weights, precision)
        return
    parts, kinds = _parts(model), [(arrays.device_name(p.data), p.dtype) for p in weights]
    found = _kept.get(model, {}).pop(precision, None)
    if found is None or not (found.kinds == kinds and _same(found.parts, parts)):
        found = _Predictor(*_make(model, weights, precision), parts, kinds)
    try:
        yield found.mode, found.compute
    finally:
        _kept.setdefault(model, {})[precision] = found


def _parts(model: nn.Module) -> list[Any]:
    """Everything that the model's modules hold, but for their mode: what may be replaced between two calls."""
    return [x for _, module in model.named_modules() for name, x in vars(module).items() if name != "_training"]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _make(model: nn.Module, weights: list[nn.Parameter], precision: str) -> tuple[Precision, Callable[[Array], Array]]:
    buffers = [b for b in model.buffers() if arrays.is_floating(b.data)]
    mode = Precision(precision, [*weights, *buffers])
    copy = mode.copy_of(model)
    # A reference to the model itself would keep it alive, which the graph must not outlive.
    computing: Callable[[], Any] = weakref.ref(model) if copy is model else lambda: copy

    def compute(images: Array) -> Array:
        logits = computing()(images).data
        return logits if mode.dtype is None else arrays.astype(logits, "float32")

    if not arrays.is_cupy(weights[0].data):
        return mode, compute
    addresses = lambda: tuple(cuda.address(p.data) for p in weights)
    graph = Graphed(lambda images: (compute(images),), addresses, can_retry=lambda: True)
    return mode, lambda images: graph(images)[0]
