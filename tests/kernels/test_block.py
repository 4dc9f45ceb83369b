"""A whole block in one operation, for predictions: its value, and when the model uses it."""

import importlib
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit import Tensor, create_model, nn, no_grad
from tinyvit import functional as F
from tinyvit import kernels as all_kernels
from tinyvit.backend import arrays
from tinyvit.kernels import reference
from tinyvit.models import vit

TABLES = {"jit": ("cpu", "jit"), "bf16": ("cpu", "jit", "bf16"), "int8": ("cpu", "jit", "int8")}


pytestmark = pytest.mark.usefixtures("numba_kernels")


def table(name):
    pytest.importorskip("numba")
    if name in ("bf16", "int8") and not importlib.import_module(f"tinyvit.kernels.{name}").available():
        pytest.skip(f"this processor has no instructions for {name}")
    return all_kernels._merged(*TABLES[name])


def weights_of(rng, dim, hidden, dtype=np.float32):
    shapes = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    shapes += [(dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)]
    return [(rng.standard_normal(s) * (0.3 if len(s) == 2 else 1.0)).astype(dtype) for s in shapes]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_it_is_torch_s_encoder_layer(approximate):
    rng = np.random.default_rng(0)
    weights, x = weights_of(rng, 24, 40, np.float64), rng.standard_normal((3, 7, 24))
    gelu = lambda x: torch.nn.functional.gelu(x, approximate=approximate)
    layer = torch.nn.TransformerEncoderLayer(
        24, 3, 40, 0.0, gelu, batch_first=True, norm_first=True, dtype=torch.float64
    )
    layer.norm1.eps, layer.norm2.eps = 1e-2, 1e-3
    attn = layer.self_attn
    parameters = (
        layer.norm1.weight, layer.norm1.bias, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight,
        attn.out_proj.bias, layer.norm2.weight, layer.norm2.bias, layer.linear1.weight, layer.linear1.bias,
        layer.linear2.weight, layer.linear2.bias,
    )  # fmt: skip
    with torch.no_grad():
        for p, w in zip(parameters, weights, strict=True):
            p.copy_(torch.tensor(w))
        expected = layer(torch.tensor(x)).numpy()
    y = F.encoder_block(x, *weights, num_heads=3, eps=(1e-2, 1e-3), approximate=approximate)
    assert np.abs(y.numpy() - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("name", TABLES)
@given(st.data())
def test_it_gives_the_bits_of_one_operation_after_the_other(name, data):
    kernels = table(name)
    heads, dim = data.draw(st.sampled_from([(1, 1), (1, 5), (2, 32), (3, 48), (4, 64), (1, 520)]))
    batch, tokens = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 5, 17, 65, 130, 300]))
    hidden, approximate = data.draw(st.sampled_from([1, 33, 96])), data.draw(st.sampled_from(["none", "tanh"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weights = weights_of(rng, dim, hidden)
    x = rng.standard_normal((tokens, batch, dim), np.float32).transpose(1, 0, 2)  # rows that lie apart
    more = dict(num_heads=heads, eps=(1e-6, 1e-3), approximate=approximate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_kernels, "best", lambda op, xp: kernels.get(op, op))
        y, _ = kernels[reference.encoder_block](arrays.numpy_namespace, x, *weights, needs=(False,) * 13, **more)
        expected, _ = reference.encoder_block(arrays.numpy_namespace, x, *weights, needs=(False,) * 13, **more)
    assert y.shape == x.shape and np.array_equal(y, expected)


def test_what_does_not_fit_is_refused():
    rng = np.random.default_rng(0)
    weights, x = weights_of(rng, 8, 16), rng.standard_normal((2, 3, 8), np.float32)
    more = dict(num_heads=2, eps=(1e-6, 1e-6))
    with pytest.raises(ValueError, match=r"encoder_block has no gradient: use it within tinyvit\.no_grad"):
        F.encoder_block(Tensor(x, requires_grad=True), *weights, **more)
    with pytest.raises(ValueError, match="encoder_block expects 12 weights, got 11"):
        F.encoder_block(x, *weights[:-1], **more)
    for i in range(12):
        wrong = [w[:-1] if j == i else w for j, w in enumerate(weights)]
        with pytest.raises(ValueError, match=r"encoder_block expects x \(B, N, D\) and weights"):
            F.encoder_block(x, *wrong, **more)
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"got .* with {heads} heads"):
            F.encoder_block(x, *weights, num_heads=heads, eps=(1e-6, 1e-6))


class OwnLinear(nn.Linear):
    """A user's own layer."""


def shifted(layer, method="forward"):
    """A method of a user's own, in place of the layer's."""
    usual = getattr(layer, method)
    setattr(layer, method, lambda *arguments, **more: usual(*arguments, **more) + 1.0)


def with_one_head(attn):
    """Two heads of which one was pruned."""
    attn.qkv, attn.proj, attn.num_heads = nn.Linear(32, 48), nn.Linear(16, 32), 1


CHANGES = {
    "an MLP of a user's own": lambda block: setattr(block, "mlp", nn.Sequential(nn.Linear(32, 32), nn.GELU())),
    "an attention of a user's own": lambda block: setattr(block, "attn", nn.Linear(32, 32)),
    "a layer of a user's own": lambda block: setattr(block.attn, "proj", OwnLinear(32, 32)),
    "a forward of a user's own": lambda block: shifted(block.mlp.fc1),
    "a method of a user's own": lambda block: shifted(block.attn, "queries_keys_values"),
    "a pruned head": lambda block: with_one_head(block.attn),
    "no bias": lambda block: setattr(block.mlp.fc2, "bias", None),
    "an RMS norm": lambda block: setattr(block, "norm2", nn.RMSNorm(32)),
    "layer scale": lambda block: setattr(block, "ls1", nn.LayerScale(32, 0.1)),
    "a norm within": lambda block: setattr(block.mlp, "norm", nn.LayerNorm(64)),
    "training with dropout": lambda block: (setattr(block.mlp.drop, "p", 0.5), block.train()),
    "training with attention's dropout": lambda block: (setattr(block.attn, "attn_drop_rate", 0.5), block.train()),
}
OTHER_MODELS = [dict(qk_norm=True), dict(swiglu=True), dict(act="quick_gelu"), dict(rope="axial", pos_embed="none")]


def calls(model, monkeypatch, images):
    """How many blocks were done in one operation, and the features."""
    counted = mock.Mock(wraps=F.encoder_block)
    with monkeypatch.context() as patch:
        patch.setattr(F, "encoder_block", counted)
        features = model.forward_features(images).numpy()
    return counted.call_count, features


def tiny(**overrides):
    settings = dict(image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=3)
    return create_model("vit_nano_patch8_32", **(settings | overrides))


IMAGES = np.random.default_rng(0).standard_normal((3, 3, 8, 8), np.float32)


def test_usual_blocks_are_one_operation_in_predictions_alone(monkeypatch):
    model = tiny().eval()
    recorded, expected = calls(model, monkeypatch, IMAGES)
    with no_grad():
        fused, y = calls(model, monkeypatch, IMAGES)
        with nn.forward_pre_hook(lambda module, args: None):
            watched, same = calls(model, monkeypatch, IMAGES)
    assert (recorded, fused, watched) == (0, 2, 0)
    assert np.array_equal(y, same) and np.abs(y - expected).max() < 1e-5


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_runs_as_it_is(change, monkeypatch):
    model = tiny().eval()
    CHANGES[change](model.blocks[0])
    _, expected = calls(model, monkeypatch, IMAGES)
    with no_grad():
        count, y = calls(model, monkeypatch, IMAGES)
    assert count == 1
    assert "dropout" in change or np.abs(y - expected).max() < 1e-5


CHANGED = [
    (vit.Attention, "forward"), (vit.Block, "_add"), (nn.LayerNorm, "forward"), (nn.Linear, "__call__"),
    (F, "qkv_attention"), (F, "mlp"),
]  # fmt: skip


@pytest.mark.parametrize("where, name", CHANGED)
def test_a_class_or_function_that_a_user_has_changed_runs_as_it_is(where, name, monkeypatch):
    usual = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *arguments, **more: usual(*arguments, **more) + 1.0)
    with no_grad():
        assert calls(tiny().eval(), monkeypatch, IMAGES)[0] == 0


@pytest.mark.parametrize("overrides", OTHER_MODELS, ids=lambda o: "-".join(o))
def test_other_kinds_of_blocks_run_as_they_are(overrides, monkeypatch):
    with no_grad():
        assert calls(tiny(**overrides).eval(), monkeypatch, IMAGES)[0] == 0


def test_every_layer_of_a_block_is_looked_at():
    """But at the norms of queries and keys, which are not used where `changes_queries` is False."""
    block = tiny().blocks[0]
    parts = [block, block.attn, block.mlp]
    layers = {id(layer) for part in parts for layer in vars(part).values() if isinstance(layer, nn.Module)}
    assert len({id(block), *layers}) - 2 == len(vit._USUAL_LAYERS)
