"""The specification: every operation against the array API standard alone, forward and backward side by side."""

from tinyvit.kernels.reference.convolution import (
    Padding as Padding,
)
from tinyvit.kernels.reference.convolution import (
    conv2d as conv2d,
)
from tinyvit.kernels.reference.convolution import (
    group_norm as group_norm,
)
from tinyvit.kernels.reference.convolution import (
    max_pool2d as max_pool2d,
)
from tinyvit.kernels.reference.convolution import (
    output_size as output_size,
)
from tinyvit.kernels.reference.convolution import (
    relu as relu,
)
from tinyvit.kernels.reference.convolution import (
    weight_standardize as weight_standardize,
)
from tinyvit.kernels.reference.layers import (
    attention as attention,
)
from tinyvit.kernels.reference.layers import (
    cross_entropy as cross_entropy,
)
from tinyvit.kernels.reference.layers import (
    dropout_mask as dropout_mask,
)
from tinyvit.kernels.reference.layers import (
    erf as erf,
)
from tinyvit.kernels.reference.layers import (
    gelu as gelu,
)
from tinyvit.kernels.reference.layers import (
    kept as kept,
)
from tinyvit.kernels.reference.layers import (
    layer_norm as layer_norm,
)
from tinyvit.kernels.reference.layers import (
    linear as linear,
)
from tinyvit.kernels.reference.layers import (
    linear_gelu as linear_gelu,
)
from tinyvit.kernels.reference.layers import (
    log_softmax as log_softmax,
)
from tinyvit.kernels.reference.layers import (
    patchify as patchify,
)
from tinyvit.kernels.reference.layers import (
    qkv_attention as qkv_attention,
)
from tinyvit.kernels.reference.layers import (
    softmax as softmax,
)
from tinyvit.kernels.reference.optimizers import (
    adamw as adamw,
)
from tinyvit.kernels.reference.optimizers import (
    lerp as lerp,
)
from tinyvit.kernels.reference.optimizers import (
    sgd as sgd,
)
from tinyvit.kernels.reference.optimizers import (
    sum_of_squares as sum_of_squares,
)
