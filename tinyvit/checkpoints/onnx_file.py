"""ONNX: the model as a graph of standard operators (opset 17) that other runtimes execute.

Each kind of module has a function that adds its operators; the table WRITERS names them. A module of another kind is
refused. Written with the `onnx` package, which brings no runtime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit import functional as F
from tinyvit import nn
from tinyvit._version import __version__
from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.engine.tensor import no_grad
from tinyvit.errors import UsageError
from tinyvit.files.atomic import atomic_write
from tinyvit.models import parts, resnet, vit

OPSET = 17
LARGEST_FILE = 2 * 10**9  # bytes of weights in one protobuf message; more lie in a file beside it
SMALL_TENSOR = 1024  # bytes; shapes and the like stay in the file
INPUT, OUTPUT = "images", "output"


class Graph:
    """The operators and constants of a graph in the making; values are called by names."""

    def __init__(self, onnx: Any, dtype: type) -> None:
        self.onnx, self.dtype = onnx, dtype
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, array: Any, dtype: Any = None) -> str:
        """An array, in the graph's dtype unless another is given."""
        name = f"c{len(self.constants)}"
        value = np.ascontiguousarray(array, self.dtype if dtype is None else dtype).reshape(np.shape(array))
        self.constants.append(self.onnx.numpy_helper.from_array(value, name))
        return name

    def whole(self, *numbers: int) -> str:
        return self.constant(numbers, np.int64)

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """The value that an operator makes of others."""
        name = output or f"x{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def scaled(self, x: str, factor: float) -> str:
        return self.add("Mul", x, self.constant(factor))

    def reshape(self, x: str, *shape: int) -> str:
        """0 stands for a side that stays, -1 for what is left."""
        return self.add("Reshape", x, self.whole(*shape))

    def part(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        return self.add("Slice", x, self.whole(start), self.whole(stop), self.whole(axis), self.whole(step))

    def taken(self, x: str, axis: int, index: int) -> str:
        """One entry of an axis, which goes."""
        return self.add("Gather", x, self.constant(index, np.int64), axis=axis)

    def run(self, module: nn.Module | None, x: str) -> str:
        """What a module makes of x."""
        if module is None:
            return x
        writer = WRITERS.get(type(module))
        if writer is None or "forward" in vars(module):
            raise CheckpointError(f"ONNX has no operators here for a module of the kind {type(module).__name__}")
        return writer(self, module, x)


def linear(g: Graph, m: Any, x: str) -> str:
    y = g.add("MatMul", x, g.constant(m.weight.numpy().T))
    return y if m.bias is None else g.add("Add", y, g.constant(m.bias.numpy()))


def layer_norm(g: Graph, m: Any, x: str) -> str:
    weights = g.constant(m.weight.numpy()), g.constant(m.bias.numpy())
    return g.add("LayerNormalization", x, *weights, axis=-1, epsilon=float(m.eps))


def rms_norm(g: Graph, m: Any, x: str) -> str:
    square = g.add("ReduceMean", g.add("Mul", x, x), axes=[-1], keepdims=1)
    root = g.add("Sqrt", g.add("Add", square, g.constant(m.eps)))
    return g.add("Mul", g.add("Div", x, root), g.constant(m.weight.numpy()))


def group_norm(g: Graph, m: Any, x: str) -> str:
    """Of feature maps (B, C, H, W): instance normalisation of the groups."""
    groups = g.reshape(x, 0, resnet.GROUPS, -1)
    one, zero = (g.constant(np.full(resnet.GROUPS, value)) for value in (1, 0))
    normal = g.add("InstanceNormalization", groups, one, zero, epsilon=resnet.GROUP_EPS)
    weight, bias = (g.constant(p.numpy().reshape(-1, 1, 1)) for p in (m.weight, m.bias))
    return g.add("Add", g.add("Mul", g.add("Reshape", normal, g.add("Shape", x)), weight), bias)


def gelu(g: Graph, act: str, x: str) -> str:
    if act == "quick_gelu":
        return g.add("Mul", x, g.add("Sigmoid", g.scaled(x, parts.QUICK_GELU)))
    if act == "gelu_tanh":
        cubed = g.scaled(g.add("Mul", x, g.add("Mul", x, x)), 0.044715)
        inner = g.add("Tanh", g.scaled(g.add("Add", x, cubed), math.sqrt(2 / math.pi)))
    else:
        inner = g.add("Erf", g.scaled(x, math.sqrt(0.5)))
    return g.add("Mul", g.scaled(x, 0.5), g.add("Add", inner, g.constant(1.0)))


def mlp(g: Graph, m: vit.Mlp, x: str) -> str:
    return g.run(m.fc2, g.run(m.norm, gelu(g, m.act, g.run(m.fc1, x))))


def swiglu(g: Graph, m: parts.SwiGLU, x: str) -> str:
    x, width = g.run(m.fc1, x), m.fc2.weight.shape[1]
    gate, passing = g.part(x, -1, 0, width), g.part(x, -1, width, 2 * width)
    y = g.add("Mul", g.add("Mul", gate, g.add("Sigmoid", gate)), passing)
    return g.run(m.fc2, g.run(m.norm, y))


def rotary(g: Graph, m: parts.Rotary, x: str) -> str:  # (B, heads, N, D)
    cos_sin = [t.numpy() for t in m.cos_sin()]  # (heads or 1, N, D / 2)
    cos, sin, half = g.constant(cos_sin[0]), g.constant(cos_sin[1]), cos_sin[0].shape[2]
    if m.interleaved:
        a, b = (g.part(x, -1, i, 2 * half, 2) for i in (0, 1))
    else:
        a, b = g.part(x, -1, 0, half), g.part(x, -1, half, 2 * half)
    y = g.add("Sub", g.add("Mul", a, cos), g.add("Mul", b, sin))
    z = g.add("Add", g.add("Mul", b, cos), g.add("Mul", a, sin))
    if not m.interleaved:
        return g.add("Concat", y, z, axis=-1)
    last = g.whole(-1)
    return g.reshape(g.add("Concat", g.add("Unsqueeze", y, last), g.add("Unsqueeze", z, last), axis=-1), 0, 0, 0, -1)


def weighted_values(g: Graph, q: str, k: str, v: str, dim: int) -> str:
    """softmax(q k^T / sqrt(dim)) v, the heads side by side: (B, heads, N, dim) -> (B, N, heads * dim)."""
    scores = g.add("MatMul", g.scaled(q, dim**-0.5), g.add("Transpose", k, perm=[0, 1, 3, 2]))
    y = g.add("MatMul", g.add("Softmax", scores, axis=-1), v)
    return g.reshape(g.add("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, -1)


def attention(g: Graph, m: vit.Attention, x: str) -> str:
    dim = m.qkv.weight.shape[1] // m.num_heads
    packed = g.add("Transpose", g.reshape(g.run(m.qkv, x), 0, 0, 3, m.num_heads, dim), perm=[2, 0, 3, 1, 4])
    q, k, v = (g.taken(packed, 0, i) for i in range(3))
    q, k = g.run(m.rope, g.run(m.q_norm, q)), g.run(m.rope, g.run(m.k_norm, k))
    return g.run(m.proj, g.run(m.norm, weighted_values(g, q, k, v, dim)))


def block(g: Graph, m: vit.Block, x: str) -> str:
    x = g.add("Add", x, g.run(m.ls1, g.run(m.attn, g.run(m.norm1, x))))
    return g.add("Add", x, g.run(m.ls2, g.run(m.mlp, g.run(m.norm2, x))))


def attention_pool(g: Graph, m: parts.AttentionPool, x: str) -> str:  # (B, N, D)
    width = m.proj.weight.shape[0]
    dim = width // m.num_heads
    kv = g.add("Transpose", g.reshape(g.run(m.kv, x), 0, 0, 2, m.num_heads, dim), perm=[2, 0, 3, 1, 4])
    q = g.constant(m.q(m.latent).numpy().reshape(1, m.num_heads, 1, dim))
    y = g.run(m.proj, weighted_values(g, q, g.taken(kv, 0, 0), g.taken(kv, 0, 1), dim))
    return g.taken(g.add("Add", y, g.run(m.mlp, g.run(m.norm, y))), 1, 0)


def patch_embed(g: Graph, m: vit.PatchEmbed, x: str) -> str:
    x = g.run(m.proj, g.run(m.backbone, x))  # (B, D, rows, columns)
    width = m.proj.weight.shape[0]
    return g.run(m.norm, g.add("Transpose", g.reshape(x, 0, width, -1), perm=[0, 2, 1]))


def convolution(g: Graph, m: nn.Conv2d, x: str) -> str:
    weight = m.weight if not isinstance(m, resnet.StdConv) else F.weight_standardize(m.weight, resnet.WEIGHT_EPS)
    stride = [m.stride, m.stride] if isinstance(m.stride, int) else list(m.stride)
    sides = [m.padding, m.padding] if isinstance(m.padding, int) else list(m.padding)
    padding: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if m.padding == "same" else {"pads": sides * 2}
    bias = [] if m.bias is None else [g.constant(m.bias.numpy())]
    return g.add("Conv", x, g.constant(weight.numpy()), *bias, strides=stride, **padding)


def tokenizer(g: Graph, m: parts.ConvTokenizer, x: str) -> str:
    for conv in m.convs:
        x = g.add("MaxPool", g.run(conv, x), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        x = g.add("Relu", x)
    return g.add("Transpose", g.reshape(x, 0, 0, -1), perm=[0, 2, 1])


def sequence_pool(g: Graph, m: parts.SequencePool, x: str) -> str:
    weights = g.add("Softmax", g.run(m.weight, x), axis=1)
    return g.add("ReduceSum", g.add("Mul", weights, x), g.whole(1), keepdims=0)


def stem(g: Graph, m: resnet.Stem, x: str) -> str:
    x = g.add("Relu", g.run(m.norm, g.run(m.conv, x)))
    return g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")


def bottleneck(g: Graph, m: resnet.Bottleneck, x: str) -> str:
    y = g.add("Relu", g.run(m.norm1, g.run(m.conv1, x)))
    y = g.add("Relu", g.run(m.norm2, g.run(m.conv2, y)))
    return g.add("Relu", g.add("Add", g.run(m.downsample, x), g.run(m.norm3, g.run(m.conv3, y))))


def sequential(g: Graph, m: nn.Sequential, x: str) -> str:
    for module in m:
        x = g.run(module, x)
    return x


WRITERS: dict[type, Callable[[Graph, Any, str], str]] = {
    nn.Identity: lambda g, m, x: x,
    nn.Linear: linear,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.LayerScale: lambda g, m, x: g.add("Mul", x, g.constant(m.gamma.numpy())),
    nn.Conv2d: convolution,
    nn.Sequential: sequential,
    resnet.StdConv: convolution,
    resnet.GroupNorm: group_norm,
    resnet.Stem: stem,
    resnet.Bottleneck: bottleneck,
    resnet.Downsample: lambda g, m, x: g.run(m.norm, g.run(m.conv, x)),
    resnet.Stage: lambda g, m, x: g.run(m.blocks, x),
    resnet.ResNet: lambda g, m, x: g.run(m.stages, g.run(m.stem, x)),
    vit.PatchEmbed: patch_embed,
    vit.Attention: attention,
    vit.Mlp: mlp,
    vit.Block: block,
    vit.PreLogits: lambda g, m, x: g.add("Tanh", g.run(m.fc, x)),
    parts.ConvTokenizer: tokenizer,
    parts.SequencePool: sequence_pool,
    parts.SwiGLU: swiglu,
    parts.Rotary: rotary,
    parts.AttentionPool: attention_pool,
}


def embed(g: Graph, m: vit.VisionTransformer, x: str) -> str:
    """The first block's input, as `VisionTransformer.embed`."""
    x = g.run(m.patch_embed, x)
    positions = None if m.pos_embed is None else g.constant(m.pos_embed.numpy())
    if positions and m.config.no_embed_class:
        x, positions = g.add("Add", x, positions), None
    tokens = [t.numpy() for t in (m.cls_token, m.dist_token, m.reg_token) if t is not None]
    if tokens:
        prefix = np.concatenate(tokens, axis=1)
        batch = g.part(g.add("Shape", x), 0, 0, 1)
        shape = g.add("Concat", batch, g.whole(*prefix.shape[1:]), axis=0)
        x = g.add("Concat", g.add("Expand", g.constant(prefix), shape), x, axis=1)
    return g.run(m.norm_pre, g.add("Add", x, positions) if positions else x)


def head(g: Graph, m: vit.VisionTransformer, x: str) -> str:
    """Logits or features of the tokens after the last norm, as `VisionTransformer.forward_head`."""
    c = m.config
    patches = x if not c.num_prefix_tokens else g.part(x, 1, c.num_prefix_tokens, c.num_tokens)
    if m.attn_pool is not None:
        pooled = g.run(m.attn_pool, patches)
    elif m.seq_pool is not None:
        pooled = g.run(m.seq_pool, patches)
    elif c.global_pool == "avg":
        pooled = g.add("ReduceMean", patches, axes=[1], keepdims=0)
    else:
        pooled = g.taken(x, 1, 0)
    logits = g.run(m.head, g.run(m.pre_logits, g.run(m.fc_norm, pooled)))
    if m.head_dist is None:
        return logits
    return g.scaled(g.add("Add", logits, g.run(m.head_dist, g.taken(x, 1, 1))), 0.5)


def write_onnx(
    checkpoint: Checkpoint, path: Path, *, preprocess: bool = False, softmax: bool = False, precision: str = "fp32"
) -> None:
    """Write a model for inference: input "images" (batch, C, H, W), output "output", class names in the metadata.

    Args:
        checkpoint: the model and what describes it.
        path: ends in .onnx; weights above 2 GB go into a file beside it with ".data" behind its name.
        preprocess: take pixels from 0 to 255, of the model's size, and normalise them in the graph.
        softmax: give probabilities instead of logits.
        precision: "fp32", or "fp16" for weights and arithmetic in 16 bits; inputs and outputs stay float32.

    Raises:
        UsageError: the extra is missing, or `path` has another ending.
        CheckpointError: the model has a module that is not known here.
    """
    if path.suffix != ".onnx":
        raise UsageError(f"{path}: expected a name that ends in .onnx")
    if precision not in ("fp32", "fp16"):
        raise UsageError(f"--precision {precision} given, ONNX files are written in fp32 or fp16")
    try:
        import onnx
    except ImportError:
        raise UsageError('ONNX files need the onnx package: pip install "tinyvit[onnx]"') from None
    model, c = checkpoint.build(copy=False), checkpoint.config
    if softmax and not c.num_classes:
        raise UsageError("--softmax needs a model with classes; this one gives features")
    kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT
    g = Graph(onnx, np.float16 if precision == "fp16" else np.float32)
    with no_grad():
        x = INPUT
        if preprocess:  # in float32, before anything is rounded
            mean, std = (255.0 * np.reshape(values, (-1, 1, 1)) for values in checkpoint.preprocessing.statistics)
            x = g.add("Div", g.add("Sub", x, g.constant(mean, np.float32)), g.constant(std, np.float32))
        x = embed(g, model, g.add("Cast", x, to=kind))
        for module in model.blocks:
            x = g.run(module, x)
        x = g.add("Cast", head(g, model, g.run(model.norm, x)), to=onnx.TensorProto.FLOAT)
    g.add("Softmax" if softmax else "Identity", x, output=OUTPUT, **({"axis": -1} if softmax else {}))
    width = c.num_classes or c.representation_size or c.embed_dim
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        g.nodes,
        "tinyvit",
        [helper.make_tensor_value_info(INPUT, float32, ["batch", c.in_chans, *c.image_size])],
        [helper.make_tensor_value_info(OUTPUT, float32, ["batch", width])],
        g.constants,
    )
    found = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,  # that of opset 17
        producer_name="tinyvit",
        producer_version=__version__,
    )
    done = ("mean", "std") if preprocess else ()  # by the graph
    described: dict[str, Any] = {"class_names": list(checkpoint.class_names)}
    described["preprocessing"] = {k: v for k, v in checkpoint.preprocessing.to_dict().items() if k not in done}
    helper.set_model_props(found, {name: json.dumps(value) for name, value in described.items()})
    save(onnx, found, path)


def save(onnx: Any, model: Any, path: Path) -> None:
    """Write the file, checked by onnx; weights that are too large for it lie in a file beside it, written first."""
    tensors = model.graph.initializer
    apart = sum(len(tensor.raw_data) for tensor in tensors) > LARGEST_FILE
    if apart:
        data = path.with_name(path.name + ".data")
        with atomic_write(data) as beside, open(beside, "wb") as file:
            for tensor in (tensor for tensor in tensors if len(tensor.raw_data) > SMALL_TENSOR):
                start = file.tell()
                length = file.write(tensor.raw_data)
                onnx.external_data_helper.set_external_data(tensor, data.name, start, length)
                tensor.ClearField("raw_data")
    else:
        onnx.checker.check_model(model)
    with atomic_write(path) as beside:
        beside.write_bytes(model.SerializeToString())
        if apart:  # it looks for the weights beside the file; a pipe, which has none, cannot be read again
            onnx.checker.check_model(str(beside))
