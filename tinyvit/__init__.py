"""Vision Transformers on NumPy and CuPy, with an autograd engine of their own."""

import importlib
from typing import TYPE_CHECKING, Any

from tinyvit import functional, nn, optim
from tinyvit.engine import ops
from tinyvit.engine.ops import concat, stack, where
from tinyvit.engine.tensor import Tensor, grad, no_grad
from tinyvit.execution.inference import predict
from tinyvit.execution.train_step import TrainStep
from tinyvit.models.config import ViTConfig
from tinyvit.models.registry import create_model, list_models, model_config
from tinyvit.models.vit import VisionTransformer

if TYPE_CHECKING:
    from tinyvit.checkpoints.loading import load_model
    from tinyvit.data import load_data

from tinyvit._version import __version__ as __version__

__all__ = [
    "Tensor",
    "TrainStep",
    "ViTConfig",
    "VisionTransformer",
    "concat",
    "create_model",
    "functional",
    "grad",
    "list_models",
    "load_data",
    "load_model",
    "model_config",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "predict",
    "stack",
    "where",
]

# Loaded when asked for: they bring Pillow and safetensors along.
_LAZY = {"load_model": "tinyvit.checkpoints", "load_data": "tinyvit.data"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tinyvit' has no attribute {name!r}")
