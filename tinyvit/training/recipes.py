"""Recipes: options that go together under a name, each a TOML file in `recipes/` with what is known about it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = {path.stem: path for path in sorted(Path(__file__).with_suffix("").glob("*.toml"))}
# What runs that choose no recipe get, by data and device.
BEST = {
    ("shapes", "cpu"): "shapes",
    ("cifar10", "cpu"): "cifar10-cpu-30min",
    ("cifar10", "cuda"): "cifar10-gpu-1min",
}


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        options: fields of TrainConfig.
        device, accuracy: what was measured on what, in words.
    """

    name: str
    options: Mapping[str, Any]
    device: str
    accuracy: str


def read_recipe(name: str) -> Recipe:
    """The recipe of this name, one of FILES."""
    table = tomllib.loads(FILES[name].read_text("utf-8"))
    return Recipe(name, table["options"], **table["about"])


def best_recipe(given: Mapping[str, Any], on_gpu: bool) -> str | None:
    """The recipe for options without one, and without weights; one that has a model is for runs that choose none."""
    name = BEST.get((given.get("data", "shapes"), "cuda" if on_gpu else "cpu"))
    if name is None or given.get("recipe") or given.get("init"):
        return None
    return None if given.get("model") and "model" in read_recipe(name).options else name
