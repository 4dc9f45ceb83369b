"""Kernels for NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable

from tinyvit.kernels import numpy_optim

KERNELS: dict[str, Callable] = {**numpy_optim.KERNELS}
