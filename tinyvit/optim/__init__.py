"""Optimizers with torch's semantics, learning-rate schedules, gradient clipping and averaged weights."""
# ruff: noqa: F401

from tinyvit.optim.ema import EMA
from tinyvit.optim.muon import Muon
from tinyvit.optim.optimizers import SGD, Adam, AdamW, Optimizer, clip_grad_norm
from tinyvit.optim.param_groups import param_groups
from tinyvit.optim.schedules import Step, WarmupCosine
