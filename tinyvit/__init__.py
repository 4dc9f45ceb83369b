"""Vision Transformers on NumPy and CuPy, with an autograd engine of their own.

Every name below is imported when it is first used, so that `import tinyvit` costs next to nothing.
"""

import importlib

from tinyvit._version import __version__ as __version__

TYPE_CHECKING = False  # what type checkers take for true; importing `typing` would take longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from tinyvit import data, distributed, functional, nn, optim, viz
    from tinyvit.checkpoints.loading import load_model
    from tinyvit.checkpoints.native_file import save_model
    from tinyvit.data import load_data
    from tinyvit.engine import ops
    from tinyvit.engine.ops import concat, stack, where
    from tinyvit.engine.tensor import Tensor, grad, no_grad
    from tinyvit.evaluation.classify import classify
    from tinyvit.execution.inference import predict
    from tinyvit.execution.train_step import TrainStep
    from tinyvit.models.config import ViTConfig
    from tinyvit.models.registry import create_model, list_models, model_config
    from tinyvit.models.vit import VisionTransformer

__all__ = [
    "Tensor", "TrainStep", "ViTConfig", "VisionTransformer", "classify", "concat", "create_model", "data",
    "distributed", "functional", "grad", "list_models", "load_data", "load_model", "model_config", "nn", "no_grad",
    "ops", "optim", "predict", "save_model", "stack", "viz", "where",
]  # fmt: skip

_NAMES = {
    "checkpoints.loading": ("load_model",),
    "checkpoints.native_file": ("save_model",),
    "data": ("load_data",),
    "engine": ("ops",),
    "engine.ops": ("concat", "stack", "where"),
    "engine.tensor": ("Tensor", "grad", "no_grad"),
    "evaluation.classify": ("classify",),
    "execution.inference": ("predict",),
    "execution.train_step": ("TrainStep",),
    "models.config": ("ViTConfig",),
    "models.registry": ("create_model", "list_models", "model_config"),
    "models.vit": ("VisionTransformer",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> "Any":
    if name in _HOMES:
        value = getattr(importlib.import_module(f"tinyvit.{_HOMES[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"tinyvit.{name}")
    else:
        raise AttributeError(f"module 'tinyvit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
