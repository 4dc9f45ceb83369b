"""Parts of the compact transformers for small data (Hassani et al. 2021, arXiv:2104.05704)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tinyvit import functional as F
from tinyvit import nn
from tinyvit.engine.tensor import Tensor


class ConvTokenizer(nn.Module):
    """Images -> one token for each place of what convolutions with pooling make of them.

    Each is 3x3 pixels wide, followed by a ReLU and 3x3 max-pooling in steps of 2 (Hassani et al. 2021,
    arXiv:2104.05704, section 3.3). The ReLU comes last here: it changes no order, and has a quarter of the values left.
    """

    def __init__(self, chans: Sequence[int]) -> None:
        self.convs = [
            nn.Conv2d(before, after, 3, padding=1, bias=False, weight_init=nn.init.he_normal)
            for before, after in itertools.pairwise(chans)
        ]

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W)
        x = images
        for conv in self.convs:
            x = F.relu(F.max_pool2d(conv(x), 3, stride=2, padding=1))
        return x.reshape(*x.shape[:2], -1).transpose()  # (B, rows x columns, D)


class SequencePool(nn.Module):
    """The mean of all tokens with learned weights (Hassani et al. 2021, arXiv:2104.05704, section 3.2)."""

    def __init__(self, dim: int) -> None:
        self.weight = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        return (F.softmax(self.weight(x), axis=1) * x).sum(axis=1)  # (B, D)
