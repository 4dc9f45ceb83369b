"""The specification: every operation against the array API standard alone, forward and backward side by side."""
# ruff: noqa: F401, I001

from tinyvit.kernels.reference.block import encoder_block, no_gradient
from tinyvit.kernels.reference.convolution import (
    Padding, conv2d, group_norm, max_pool2d, output_size, relu, weight_standardize,
)  # fmt: skip
from tinyvit.kernels.reference.indexing import sum_at
from tinyvit.kernels.reference.layers import (
    add_linear, add_scaled, attention, cross_entropy, dropout_mask, dropout_scale, erf, gelu, layer_norm, linear,
    linear_gelu, log_softmax, mlp, patchify, qkv_attention, softmax,
)  # fmt: skip
from tinyvit.kernels.reference.muon import update_muon
from tinyvit.kernels.reference.optimizers import (
    UpdateState, adamw, lerp, limited_norm, sgd, sum_of_squares, update_adamw, update_average, update_sgd,
)  # fmt: skip
from tinyvit.kernels.reference.variants import rms_norm, rotary, silu, swiglu
