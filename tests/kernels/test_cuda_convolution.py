"""The CUDA kernels of convolutions and max-pooling, run on the CPU, against the reference in float64."""

from __future__ import annotations

import cuda_sim
import numpy as np
import pytest
from cublas_sim import CuBLASLt
from cuda_checks import both, check, draw
from cuda_sim import cuda_version, decode, encode, error, guarded

import tinyvit
from tinyvit.engine.tensor import grad
from tinyvit.kernels import reference

pytestmark = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")

CONVOLUTIONS = [  # scalar, images (B, C, H, W), outputs, kernel, stride, padding
    ("bf16", (3, 3, 6, 5), 16, (3, 3), (1, 1), ((1, 1), (1, 1))),  # as CCT's first
    ("bf16", (2, 16, 5, 4), 8, (3, 3), (1, 1), ((1, 1), (1, 1))),  # channels in whole vectors
    ("float", (2, 3, 7, 9), 5, (3, 2), (2, 3), ((0, 1), (2, 0))),
    ("f16", (1, 8, 4, 4), 3, (1, 1), (2, 2), ((0, 0), (0, 0))),
]


@pytest.mark.parametrize("scalar, images, outputs, kernel, stride, padding", CONVOLUTIONS)
def test_conv2d(folder, scalar, images, outputs, kernel, stride, padding):
    weight = draw(1, (outputs, images[1], *kernel)) / np.sqrt(images[1] * kernel[0] * kernel[1])
    check(
        folder, "conv2d", scalar, [draw(0, images), weight], {"stride": stride, "padding": padding}, library=CuBLASLt()
    )


POOLS = [
    ("bf16", (2, 8, 6, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),  # CCT's
    ("float", (3, 5, 7, 4), (2, 3), (1, 2), ((0, 1), (1, 0))),
    ("f16", (1, 16, 8, 8), (2, 2), (2, 2), ((0, 0), (0, 0))),
]


@pytest.mark.parametrize("scalar, images, kernel, stride, padding", POOLS)
def test_max_pool2d(folder, scalar, images, kernel, stride, padding):
    """Of whole numbers, among which many are equal: the first gets the gradient."""
    x = np.random.default_rng(0).integers(-2, 3, images).astype(np.float64)
    check(folder, "max_pool2d", scalar, [x], {"kernel": kernel, "stride": stride, "padding": padding})


def test_the_largest_of_infinities_and_nan(folder):
    x = np.array([[-np.inf, -np.inf, 1, np.nan], [-np.inf, -np.inf, np.inf, 2]])[None, None]
    params = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))}
    (y, dx), _ = both(folder, "max_pool2d", "float", [x], params)
    assert y[0, 0, 0, 0] == -np.inf and np.isnan(y[0, 0, 0, 1])
    dy = draw(9, y.shape).astype(np.float32)
    assert dx[0, 0].tolist() == [[dy[0, 0, 0, 0], 0, 0, dy[0, 0, 0, 1]], [0, 0, 0, 0]]


def test_channels_stay_last_from_layer_to_layer(folder):
    """Nothing is copied between a convolution, its pooling and the tokens."""
    images = encode(draw(0, (2, 8, 6, 6)), "f16")
    with cuda_sim.device(folder, library=CuBLASLt()) as xp:
        geometry = {"stride": (1, 1), "padding": ((1, 1), (1, 1))}
        weight = encode(draw(1, (16, 8, 3, 3)) / 9, "f16")
        y, _ = cuda_version(reference.conv2d)(xp, guarded(images), guarded(weight), needs=(True, True), **geometry)
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous
        z, _ = cuda_version(reference.max_pool2d)(
            xp, y, kernel=(3, 3), stride=(2, 2), padding=((1, 1), (1, 1)), needs=(True,)
        )
    tokens = z.reshape(2, 16, 9).transpose(0, 2, 1)
    assert tokens.flags.c_contiguous and np.shares_memory(tokens, z)


def test_a_compact_transformer_is_the_cpus(folder):
    """Loss and all gradients, in float32."""
    model = tinyvit.create_model(
        "cct_6_3x1_32", image_size=8, depth=1, embed_dim=32, num_heads=2, num_classes=3, seed=0
    )
    model.head.weight.data = draw(2, model.head.weight.shape).astype(np.float32)
    images, labels = draw(0, (2, 3, 8, 8)).astype(np.float32), np.array([0, 2])

    def gradients() -> list[np.ndarray]:
        return grad(tinyvit.functional.cross_entropy(model(images), labels), model.parameters())

    expected = gradients()
    with cuda_sim.everything_on_device(folder, library=CuBLASLt()):
        actual = gradients()
    for ours, right in zip(actual, expected, strict=True):
        assert error(decode(ours), right) < 2e-5 or np.abs(right).max() < 1e-6
