"""Parameters, modules and layers, with torch's names."""

from tinyvit.nn import init as init
from tinyvit.nn.init import no_init as no_init
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
    is_plain,
    linear_gelu,
)
from tinyvit.nn.module import Buffer, Module, ModuleList, Parameter, Sequential, evaluating, forward_pre_hook

__all__ = [
    "GELU",
    "Buffer",
    "Conv2d",
    "DropPath",
    "Dropout",
    "Embedding",
    "Identity",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Module",
    "ModuleList",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "evaluating",
    "forward_pre_hook",
    "init",
    "is_plain",
    "linear_gelu",
    "no_init",
]
