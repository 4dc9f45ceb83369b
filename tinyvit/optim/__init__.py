"""Optimizers with torch's semantics, learning-rate schedules, gradient clipping and averaged weights."""

from tinyvit.optim.ema import EMA as EMA
from tinyvit.optim.muon import Muon as Muon
from tinyvit.optim.optimizers import (
    SGD as SGD,
)
from tinyvit.optim.optimizers import (
    Adam as Adam,
)
from tinyvit.optim.optimizers import (
    AdamW as AdamW,
)
from tinyvit.optim.optimizers import (
    Optimizer as Optimizer,
)
from tinyvit.optim.optimizers import (
    clip_grad_norm as clip_grad_norm,
)
from tinyvit.optim.optimizers import (
    limit_grad_norm as limit_grad_norm,
)
from tinyvit.optim.param_groups import param_groups as param_groups
from tinyvit.optim.schedules import Constant as Constant
from tinyvit.optim.schedules import Step as Step
from tinyvit.optim.schedules import WarmupCosine as WarmupCosine
