"""Vision Transformers on NumPy and CuPy, with an autograd engine of their own."""

import importlib
from typing import TYPE_CHECKING, Any

from tinyvit import functional, nn, optim
from tinyvit.inference import predict
from tinyvit.step import TrainStep
from tinyvit.tensor import Tensor, grad, no_grad
from tinyvit.vit import VisionTransformer, ViTConfig
from tinyvit.zoo import create_model, list_models, model_config

if TYPE_CHECKING:
    from tinyvit.checkpoint import load_model
    from tinyvit.data import load_data

__version__ = "0.1.0"
__all__ = [
    "Tensor",
    "TrainStep",
    "ViTConfig",
    "VisionTransformer",
    "create_model",
    "functional",
    "grad",
    "list_models",
    "load_data",
    "load_model",
    "model_config",
    "nn",
    "no_grad",
    "optim",
    "predict",
]

# Loaded when asked for: they bring Pillow and safetensors along.
_LAZY = {"load_model": "tinyvit.checkpoint", "load_data": "tinyvit.data"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tinyvit' has no attribute {name!r}")
