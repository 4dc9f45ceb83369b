"""Muon, held against torch.optim.Muon, which here computes in float64 throughout."""

import types

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest
import torch
from drawing import BACKENDS, LIBRARIES, place
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvit import create_model, optim
from tinyvit.backend import arrays
from tinyvit.engine.tensor import Tensor
from tinyvit.execution.train_step import TrainStep
from tinyvit.kernels.reference.muon import orthogonalise
from tinyvit.optim.param_groups import param_groups

SHAPES = st.lists(st.sampled_from([(4, 4), (6, 3), (3, 6), (1, 5), (8, 2)]), min_size=1, max_size=5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(shapes=SHAPES, seed=st.integers(0, 2**32 - 1), lr=st.floats(1e-3, 0.5), decay=st.sampled_from([0.0, 0.3]))
def test_steps_are_torch_s(backend, shapes, seed, lr, decay):
    """Matrices go with torch.optim.Muon, the others with torch.optim.AdamW; shapes that repeat are done together."""
    rng = np.random.default_rng(seed)
    first = [rng.standard_normal(shape) for shape in [*shapes, (5,)]]
    ours = [Tensor(LIBRARIES[backend].asarray(x.copy()), requires_grad=True) for x in first]
    groups = [{"params": ours[:-1], "muon": True}, {"params": ours[-1:], "weight_decay": 0.1, "lr_scale": 0.5}]
    optimizer = optim.Muon(groups, lr=lr, momentum=0.9, weight_decay=decay)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in first]
    references = [
        torch.optim.Muon(theirs[:-1], lr=lr, momentum=0.9, weight_decay=decay, adjust_lr_fn="original"),
        torch.optim.AdamW(theirs[-1:], lr=0.5 * lr, weight_decay=0.1),
    ]
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            gradient = rng.standard_normal(q.shape)
            p.grad, q.grad = place(gradient, backend, "float64"), torch.tensor(gradient)
        with pytest.MonkeyPatch.context() as patch:  # torch makes updates orthogonal in bfloat16
            patch.setattr(torch.Tensor, "bfloat16", lambda x: x.double())
            for each in (optimizer, *references):
                each.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(arrays.to_numpy(p.data), q.detach().numpy(), rtol=1e-5, atol=1e-6)


@given(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2**32 - 1))
def test_singular_values_come_near_one(shape, seed):
    rng = np.random.default_rng(seed)
    q, r = (np.linalg.qr(rng.standard_normal((shape[0], n, n)))[0] for n in shape[1:])
    k = min(shape[1:])
    x = (q[:, :, :k] * rng.uniform(0.1, 1, (shape[0], 1, k))) @ r[:, :k, :] * 10 ** rng.uniform(-3, 3)
    values = np.linalg.svd(orthogonalise(numpy_namespace, x), compute_uv=False)
    assert values.min() > 0.65 and values.max() < 1.21


def test_the_hidden_matrices_of_a_model_are_orthogonalised_and_the_run_continues():
    model = create_model("cct_2_3x2_32")
    groups = param_groups(model, 0.1, adam_lr_scale=0.25)
    muon = {id(p) for group in groups if group.get("muon") for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    layers = [f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert names == {*layers, "patch_embed.convs.0.weight", "patch_embed.convs.1.weight"}
    assert {group["lr_scale"] for group in groups} == {1.0, 0.25}
    optimizer = optim.Muon(groups, lr=0.02)
    step = TrainStep(model, optimizer, clip_norm=1.0)
    images, labels = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32), np.arange(8)
    losses = [float(step(images, labels)) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    state = optimizer.state_dict()
    assert sum(key.endswith(".v") for key in state) == len(model.parameters()) - len(muon)
    again = optim.Muon(groups, lr=0.02)
    again.load_state_dict(state)
    assert all(np.array_equal(x, again.state_dict()[key]) for key, x in state.items())


def test_vectors_are_refused():
    model = types.SimpleNamespace(data=np.zeros(3), shape=(3,))
    with pytest.raises(ValueError, match=r"Muon expects matrices, parameter 0 has shape \(3,\)"):
        optim.Muon([{"params": [model], "muon": True}])
