"""A whole model computes on every array library what it computes on NumPy."""

import numpy as np
import pytest
from drawing import LIBRARIES, WITH_JAX, host

import tinyvit
from tinyvit import functional as F
from tinyvit.backend import arrays
from tinyvit.engine.tensor import grad


@pytest.mark.parametrize("backend", [backend for backend in WITH_JAX if backend != "numpy"])
def test_logits_loss_and_gradients_are_those_of_numpy(backend):
    xp = LIBRARIES[backend]
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=10)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    labels = np.array([1, 2])

    def results(asarray):
        logits = model(asarray(images))
        loss = F.cross_entropy(logits, asarray(labels))
        return [logits.data, loss.data, *grad(loss, model.parameters())]

    expected = results(np.asarray)
    model.to(xp)
    for ours, right in zip(results(xp.asarray), expected, strict=True):
        assert arrays.namespace(ours) is xp
        assert np.allclose(host(ours), right, rtol=1e-4, atol=1e-5)
