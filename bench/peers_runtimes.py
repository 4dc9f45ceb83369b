"""The same Vision Transformer in ONNX Runtime and OpenVINO, which only infer, from the graph that torch exports."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Peer
from peers_torch import vit

import tinyvit
from tinyvit.backend import parallel
from tinyvit.kernels import jit


def _graph(model: tinyvit.VisionTransformer, images: np.ndarray) -> bytes:
    """The model in ONNX's format, for batches like `images`."""
    net = vit(model.config).eval()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is called legacy
        torch.onnx.export(net, (torch.from_numpy(images),), buffer, dynamo=False, opset_version=18, input_names=["x"])
    return buffer.getvalue()


def _peer(name: str, run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> Peer:
    def no_training(*_: Any) -> Any:
        raise NotImplementedError(f"{name} does not train")

    return Peer(name, no_training, lambda batches: np.concatenate([run(images) for _ in range(batches)]), no_training)


def onnxruntime_peer(
    model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray, device: str, int8: bool = False
) -> Peer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = parallel.available_cores()
    graph = _in_8_bits(_graph(model, images)) if int8 else _graph(model, images)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return _peer("ONNX Runtime int8" if int8 else "ONNX Runtime", lambda x: session.run(None, {"x": x})[0], images)


def _in_8_bits(graph: bytes) -> bytes:
    """With weights in 8 bits, an output at a time, and activations that are rounded as they come.

    With AVX2 alone it adds pairs of products in 16 bits, which 8 bits of both would exceed: weights have 7 there.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.onnx")
        quantize_dynamic(
            onnx.load_from_string(graph),
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=jit.dot_instructions() in ("avx2", ""),
        )
        return file.read_bytes()


def openvino_peer(
    model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray, device: str, bf16: bool = False
) -> Peer:
    import openvino

    core = openvino.Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
    compiled = core.compile_model(core.read_model(_graph(model, images)), "CPU", hints)
    return _peer("OpenVINO bf16" if bf16 else "OpenVINO", lambda x: compiled([x])[0].copy(), images)
