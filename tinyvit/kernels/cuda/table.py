"""Every kernel for CuPy arrays. None covers float64, empty arrays, or a device that is too old for the sources."""

from tinyvit.kernels import Kernel, cuda, half_precision, reference
from tinyvit.kernels.cuda import attention, convolution, layers, linear, muon, optimizers

KERNELS = {
    reference.linear: Kernel(linear.linear, cuda.covers),
    reference.add_linear: Kernel(linear.add_linear, cuda.covers),
    reference.add_scaled: Kernel(linear.add_scaled, linear.covers_add_scaled),
    reference.linear_gelu: Kernel(linear.linear_gelu, cuda.covers),
    reference.mlp: Kernel(linear.mlp, linear.covers_mlp),
    reference.gelu: Kernel(linear.gelu, linear.covers_gelu),
    reference.layer_norm: Kernel(layers.layer_norm, layers.covers_layer_norm),
    reference.qkv_attention: Kernel(attention.qkv_attention, attention.covers_attention),
    reference.cross_entropy: Kernel(layers.cross_entropy, layers.covers_cross_entropy),
    reference.dropout_mask: Kernel(layers.dropout_mask, layers.covers_dropout_mask),
    reference.conv2d: Kernel(convolution.conv2d, cuda.covers),
    reference.max_pool2d: Kernel(convolution.max_pool2d, convolution.covers_max_pool2d),
    half_precision.sum_in_fp32: Kernel(linear.sum_in_fp32, linear.covers_sum),
    reference.sum_at: Kernel(layers.sum_at),
    **optimizers.KERNELS,
    reference.update_muon: Kernel(muon.update_muon, muon.covers_muon),
}
