"""Recipes: options that go together under a name, each a TOML file in `recipes/` with what is known about it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = {path.stem: path for path in sorted(Path(__file__).with_suffix("").glob("*.toml"))}
# What `--data cifar10` without a model runs: the most accurate recipe for the device.
BEST = {"cpu": "cifar10-cpu-30min", "cuda": "cifar10-gpu-1min"}


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
    """The recipe for options that leave the choice open: those of CIFAR-10 without a recipe, a model or weights."""
    if given.get("data") != "cifar10" or any(given.get(name) for name in ("recipe", "model", "init")):
        return None
    return BEST["cuda" if on_gpu else "cpu"]
