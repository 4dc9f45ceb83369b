"""The layers of a Vision Transformer and what they cost, computed from its configuration without building it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tinyvit.files.text import aligned
from tinyvit.models import resnet
from tinyvit.models.config import Size, ViTConfig
from tinyvit.models.vit import VisionTransformer

BACKBONE = "patch_embed.backbone"


@dataclass(frozen=True)
class Row:
    """One layer, for one image.

    Attributes:
        name: as in the state dict, where the layer has parameters.
        kind: what the layer does.
        output: shape of its result, the batch axis included.
        parameters: number of values in its parameters.
        flops: two for each multiply-add of its matrix product; 0 for layers without one.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Summary:
    """The layers of a model in the order they run in, and their totals for one image.

    `str()` gives the table of `as_table`.
    """

    config: ViTConfig
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Number of values in all parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, attention's two included; a multiply-add is two."""
        return sum(row.flops for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        """Memory of the parameters in float32."""
        return 4 * self.parameters

    @property
    def activation_bytes(self) -> int:
        """An estimate of what a training step saves for one image: every layer's output once, in float32."""
        return 4 * sum(math.prod(row.output) for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: every layer (no block is left out) and the totals."""
        layers = [{**vars(row), "output": list(row.output)} for row in self.rows]
        return {
            "config": self.config.to_dict(),
            "layers": layers,
            "parameters": self.parameters,
            "flops": self.flops,
            "parameter_bytes": self.parameter_bytes,
            "activation_bytes_estimate": self.activation_bytes,
        }

    def as_table(self) -> str:
        """The layers as aligned columns. All blocks, which are alike, make one line, and so does each ResNet stage."""
        cells: list[tuple[str, ...]] = [("layer", "kind", "output", "parameters", "FLOPs")]
        cells += [_cells(row) for row in self._table_rows()]
        cells.append(("total", "", "", f"{self.parameters:,}", short(self.flops)))
        lines = aligned(cells, left=3)
        rule = "-" * len(lines[0])
        height, width = self.config.image_size
        notes = [
            f"For one {height}x{width} image; indented: the layers of one block.",
            "FLOPs: 2 per multiply-add of the matrix products, attention's two included.",
            f"Memory in float32: parameters {_memory(self.parameter_bytes)}; in training, activations of about",
            f"{_memory(self.activation_bytes)} an image (an estimate: every output above, kept once).",
        ]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *notes])

    __str__ = as_table

    def _table_rows(self) -> list[Row]:
        """The rows, with one for all blocks, the layers of a single block after it, and one for each ResNet stage."""
        depth = self.config.depth
        blocks = [row for row in self.rows if row.name.startswith("blocks.")]
        first = self.rows.index(blocks[0])
        one = [replace(row, name="  " + row.name.removeprefix("blocks.0.")) for row in blocks[: len(blocks) // depth]]
        name = f"blocks.0-{depth - 1} (x{depth})" if depth > 1 else "blocks.0"
        title = _combined(name, "transformer blocks" if depth > 1 else "transformer block", blocks)
        before = [row for row in self.rows[:first] if ".stages." not in row.name]
        for i, count in enumerate(self.config.resnet_layers or ()):
            stage = [row for row in self.rows if row.name.startswith(f"{BACKBONE}.stages.{i}.")]
            before.insert(3 + i, _combined(f"{BACKBONE}.stages.{i}", f"residual blocks (x{count})", stage))
        return [*before, title, *one, *self.rows[first + len(blocks) :]]


def summarise(model: VisionTransformer | ViTConfig, image_size: Size | None = None) -> Summary:
    """The layers of a model, or of the one that a configuration describes.

    Args:
        model: a model, or a configuration, for which no weights are allocated.
        image_size: of the images, one number or (height, width); the config's if None.

    Raises:
        TypeError: neither a model nor a configuration.
        ValueError: an image size that the patch size does not divide.
    """
    config = model.config if isinstance(model, VisionTransformer) else model
    if not isinstance(config, ViTConfig):
        raise TypeError(f"summarise expects a VisionTransformer or a ViTConfig, got {type(model).__name__}")
    if image_size is not None:
        config = config.replace(image_size=image_size)
    return Summary(config, tuple(_rows(config)))


def _combined(name: str, kind: str, rows: list[Row]) -> Row:
    """One row for several."""
    return Row(name, kind, rows[-1].output, sum(row.parameters for row in rows), sum(row.flops for row in rows))


def _rows(c: ViTConfig) -> Iterator[Row]:
    dim, patch_values = c.embed_dim, c.feature_chans * math.prod(c.patch_size)
    if c.resnet_layers is not None:
        yield from _resnet(c.in_chans, c.image_size, c.resnet_layers)
    if c.tokenizer_chans:
        yield from _tokenizer(c.image_size, c.tokenizer_chans)
    else:
        yield _linear(
            "patch_embed.proj", (1, c.num_patches), patch_values, dim, bias=not c.pre_norm, kind="patch embedding"
        )
    tokens = {"cls_token": int(c.class_token), "dist_token": int(c.distilled), "reg_token": c.reg_tokens}
    for name, count in tokens.items():
        if count:
            yield Row(name, "token", (1, count, dim), count * dim)
    embedded = c.num_patches if c.no_embed_class else c.num_tokens
    kind = "position embedding" if c.pos_embed == "learn" else "fixed positions"
    if c.embed_norm:
        yield _norm(c, "patch_embed.norm", (1, c.num_patches, dim))
    if c.pos_embed != "none":
        yield Row("pos_embed", kind, (1, c.num_tokens, dim), embedded * dim)
    if c.pre_norm:
        yield _norm(c, "norm_pre", (1, c.num_tokens, dim))
    for i in range(c.depth):
        for row in _block(c):
            yield replace(row, name=f"blocks.{i}.{row.name}")
    if c.final_norm and not c.norm_after_pool:
        yield _norm(c, "norm", (1, c.num_tokens, dim))
    if c.global_pool == "map":
        yield from _attention_pool(c)
    elif c.global_pool == "seq":
        yield _linear("seq_pool.weight", (1, c.num_patches), dim, 1, kind="weights of patches")
        yield Row("pool", "weighted mean", (1, dim))
    else:
        yield Row("pool", "class token" if c.global_pool == "token" else "mean of patches", (1, dim))
    if c.final_norm and c.norm_after_pool:
        yield _norm(c, "fc_norm", (1, dim))
    if c.representation_size:
        yield _linear("pre_logits.fc", (1,), dim, c.representation_size, kind="linear, tanh")
    if c.num_classes:
        yield _linear("head", (1,), c.representation_size or dim, c.num_classes)
        if c.distilled:
            yield _linear("head_dist", (1,), dim, c.num_classes)


def _block(c: ViTConfig) -> Iterator[Row]:
    n, dim = c.num_tokens, c.embed_dim
    head = dim // c.num_heads
    yield _norm(c, "norm1", (1, n, dim))
    yield _linear("attn.qkv", (1, n), dim, 3 * dim, bias=c.qkv_bias)
    for name in ("attn.q_norm", "attn.k_norm") if c.qk_norm else ():
        yield _norm(c, name, (1, c.num_heads, n, head))
    if c.rope:
        learned = 2 * c.num_heads * (head // 2) if c.rope == "mixed" else 0
        yield Row("attn.rope", "rotary positions", (2, c.num_heads, n, head), learned)
    yield Row("attn.weights", "softmax(q k^T)", (1, c.num_heads, n, n), flops=2 * n * n * dim)
    yield Row("attn.values", "weights v", (1, n, dim), flops=2 * n * n * dim)
    if c.scale_attn_norm:
        yield _norm(c, "attn.norm", (1, n, dim))
    yield _linear("attn.proj", (1, n), dim, dim, bias=c.proj_bias)
    if c.init_values is not None:
        yield Row("ls1", "layer scale", (1, n, dim), dim)
    yield _norm(c, "norm2", (1, n, dim))
    yield from _mlp(c, "mlp", n)
    if c.init_values is not None:
        yield Row("ls2", "layer scale", (1, n, dim), dim)


def _mlp(c: ViTConfig, name: str, n: int, gated: bool | None = None) -> Iterator[Row]:
    """The MLP of a block, or that of attention pooling, which is never gated."""
    gated = c.swiglu if gated is None else gated
    yield _linear(f"{name}.fc1", (1, n), c.embed_dim, (1 + gated) * c.mlp_dim, bias=c.proj_bias)
    yield Row(f"{name}.act", "SwiGLU" if gated else c.act, (1, n, c.mlp_dim))
    if c.scale_mlp_norm:
        yield _norm(c, f"{name}.norm", (1, n, c.mlp_dim))
    yield _linear(f"{name}.fc2", (1, n), c.mlp_dim, c.embed_dim, bias=c.proj_bias)


def _attention_pool(c: ViTConfig) -> Iterator[Row]:
    n, dim = c.num_patches, c.embed_dim
    yield Row("attn_pool.latent", "query", (1, 1, dim), dim)
    yield _linear("attn_pool.q", (1, 1), dim, dim)
    yield _linear("attn_pool.kv", (1, n), dim, 2 * dim)
    yield Row("attn_pool.weights", "softmax(q k^T)", (1, c.num_heads, 1, n), flops=2 * n * dim)
    yield Row("attn_pool.values", "weights v", (1, 1, dim), flops=2 * n * dim)
    yield _linear("attn_pool.proj", (1, 1), dim, dim)
    yield _norm(c, "attn_pool.norm", (1, 1, dim))
    yield from _mlp(c, "attn_pool.mlp", 1, gated=False)


def _tokenizer(size: tuple[int, int], chans: tuple[int, ...]) -> Iterator[Row]:
    """The layers of a `ConvTokenizer`."""
    for i, (before, after) in enumerate(itertools.pairwise(chans)):
        weights = 9 * before * after
        name = f"patch_embed.convs.{i}"
        yield Row(name, "convolution 3x3", (1, after, *size), weights, 2 * weights * math.prod(size))
        size = -(-size[0] // 2), -(-size[1] // 2)
        yield Row(f"{name}.pool", "max-pooling, ReLU", (1, after, *size))


def _resnet(in_chans: int, image_size: tuple[int, int], layers: tuple[int, ...]) -> Iterator[Row]:
    """The layers of a hybrid's ResNet, as `resnet` builds them."""

    def at(stride: int) -> tuple[int, int]:
        return -(-image_size[0] // stride), -(-image_size[1] // stride)

    def unit(name: str, number: str, inputs: int, outputs: int, kernel: int, size: tuple[int, int]) -> Iterator[Row]:
        weights, output = inputs * outputs * kernel**2, (1, outputs, *size)
        flops = 2 * weights * math.prod(size)
        yield Row(f"{name}.conv{number}", f"convolution {kernel}x{kernel}", output, weights, flops)
        yield Row(f"{name}.norm{number}", "group norm", output, 2 * outputs)

    stem = BACKBONE + ".stem" if layers else BACKBONE
    width = resnet.channels(())
    yield from unit(stem, "", in_chans, width, 7, at(2))
    yield Row(f"{stem}.pool", "max-pooling", (1, width, *at(resnet.stride(()))))
    for i, depth in enumerate(layers):
        inputs, outputs = resnet.channels(layers[:i]), resnet.channels(layers[: i + 1])
        before, size = at(resnet.stride(layers[:i])), at(resnet.stride(layers[: i + 1]))
        inner = outputs // resnet.BOTTLENECK
        for j in range(depth):
            name = f"{BACKBONE}.stages.{i}.blocks.{j}"
            if j == 0:
                yield from unit(f"{name}.downsample", "", inputs, outputs, 1, size)
            yield from unit(name, "1", outputs if j else inputs, inner, 1, size if j else before)
            yield from unit(name, "2", inner, inner, 3, size)
            yield from unit(name, "3", inner, outputs, 1, size)


def _linear(name: str, rows: tuple[int, ...], n_in: int, n_out: int, *, bias: bool = True, kind: str = "linear") -> Row:
    return Row(name, kind, (*rows, n_out), (n_in + bias) * n_out, 2 * math.prod(rows) * n_in * n_out)


def _norm(c: ViTConfig, name: str, output: tuple[int, ...]) -> Row:
    layer = c.norm == "layer_norm"
    return Row(name, "layer norm" if layer else "RMS norm", output, (1 + layer) * output[-1])


def _cells(row: Row) -> tuple[str, ...]:
    parameters = f"{row.parameters:,}" if row.parameters else "-"
    return row.name, row.kind, str(row.output), parameters, short(row.flops) if row.flops else "-"


def short(count: int) -> str:
    """Four digits and a power of a thousand: 35128479744 -> "35.13 G"."""
    value, unit = float(count), 0
    while value >= 999.95 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:#.4g} {' KMGT'[unit]}".strip() if unit else str(count)


def _memory(size: int) -> str:
    value, unit = size / 2**10, 0
    while value >= 1024 and unit < 3:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[unit]}"
