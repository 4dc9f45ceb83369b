"""timm's own models, shrunk and with random weights, as a reference.

timm imports torchvision, whose compiled part from PyPI does not load beside the CPU build of torch. Its models use
nothing of it, so that empty modules stand in for it while timm is imported: `pip install --no-deps timm` is enough.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import Any

import pytest
import torch


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(types.ModuleType):
    """A module in which every name is a class with every attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


_finder = _Finder()
sys.meta_path.insert(0, _finder)
try:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps timm")
finally:
    sys.meta_path.remove(_finder)
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]


def pretrained() -> dict[str, dict[str, list[str]]]:
    """The tags of timm's pretrained weights by module ("vision_transformer", "eva", …) and architecture."""
    from timm.models import _registry as registry

    found: dict[str, dict[str, list[str]]] = {}
    for name in timm.list_models(pretrained=True):
        architecture, _, tag = name.partition(".")
        module = registry._model_to_module[architecture]
        found.setdefault(module, {}).setdefault(architecture, []).append(tag)
    return found


def small(architecture: str, **changes: Any) -> torch.nn.Module:
    """timm's model of this name with two blocks, and random weights that are nowhere 0 or 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(architecture, **{"num_classes": 5, "depth": 2, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * noise + name.endswith(("weight", "gamma", "gamma_1", "gamma_2")))
            elif name == "rope.freqs":
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise * (0.5 if "token" in name or "pos_embed" in name else p[0].numel() ** -0.5))
    return model
