"""The ViT's operations on Tensors: `layers` and `losses`, and the `variants` of later models.

Each checks its arguments (`checks`) and runs the fastest kernel that there is for the array library. What is computed
is defined in `tinyvit.kernels.reference`. Arrays are accepted wherever Tensors are, no operation writes into its
inputs, and arguments that do not fit raise TypeError or ValueError.

Names of torch's have its meaning, and its arguments by place, but for those that a ViT does without (`reduction`,
`ignore_index`, `dilation`, `groups`, `inplace`, …). Three differ: `layer_norm` and `rms_norm` take no normalized_shape
and have an eps of 1e-6, and `cross_entropy` takes class weights by name.
"""

from tinyvit.functional.layers import (  # noqa: I001
    add_drop_path, add_linear, attention, attention_weights, conv2d, drop_path, dropout, encoder_block, gelu,
    group_norm, layer_norm, linear, linear_gelu, log_softmax, max_pool2d, mlp, patch_embed, patchify, qkv_attention,
    relu, softmax, weight_standardize,
)  # fmt: skip
from tinyvit.functional.losses import cross_entropy, mse_loss, weighted_targets
from tinyvit.functional.variants import rms_norm, rotary, silu, swiglu

__all__ = [
    "add_drop_path", "add_linear", "attention", "attention_weights", "conv2d", "cross_entropy", "drop_path", "dropout",
    "encoder_block", "gelu", "group_norm", "layer_norm", "linear", "linear_gelu", "log_softmax", "max_pool2d",
    "mlp", "mse_loss", "patch_embed", "patchify", "qkv_attention", "relu", "rms_norm", "rotary", "silu", "softmax",
    "swiglu", "weight_standardize", "weighted_targets",
]  # fmt: skip
