"""Parameters, modules and layers, with torch's names."""
# ruff: noqa: F401

from tinyvit.nn import init
from tinyvit.nn.init import no_init
from tinyvit.nn.layers import (
    GELU,
    Conv2d,
    Dropout,
    DropPath,
    Embedding,
    Identity,
    LayerNorm,
    LayerScale,
    Linear,
    ReLU,
    RMSNorm,
    add_drop_path,
    add_linear,
    is_idle,
    is_plain,
    linear_gelu,
)  # fmt: skip
from tinyvit.nn.module import (
    Buffer,
    Module,
    ModuleList,
    Parameter,
    Sequential,
    evaluating,
    forward_pre_hook,
    only_output_counts,
)  # fmt: skip
