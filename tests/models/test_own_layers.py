"""Blocks, norms and attentions of a user's own: the model runs them as they are."""

from collections import Counter

import numpy as np
import pytest
import torch
from drawing import error
from reference_models import randomise

from tinyvit import Tensor, create_model, nn
from tinyvit import functional as F
from tinyvit.backend import random
from tinyvit.engine.tensor import _tape, grad
from tinyvit.models import vit


class Bypassed(nn.Module):
    """A user's own block around another one."""

    def __init__(self, block):
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class BypassedBlock(vit.Block):
    """A user's subclass of the block."""

    def forward(self, x):
        return x + super().forward(x)


class MeanAttention(nn.Module):
    """A user's own attention: every token reads the mean of all."""

    def __init__(self, dim):
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(x - x.mean(axis=1, keepdims=True))


class ShiftedNorm(nn.LayerNorm):
    """A user's own norm."""

    def forward(self, x):
        return super().forward(x) + 0.5


class TokenNorm(nn.Module):
    """A user's norm that mixes the tokens."""

    def forward(self, x):
        return x - x.mean(axis=1, keepdims=True)


class MixingMlp(vit.Mlp):
    """A user's MLP that mixes the tokens."""

    def forward(self, x):
        return super().forward(x + x.mean(axis=1, keepdims=True))


def wrap(block):
    return Bypassed(block)


def subclass(block):
    block.__class__ = BypassedBlock
    return block


def own_attention(block):
    block.attn = MeanAttention(block.attn.proj.weight.shape[0])
    return block


def own_function(block):
    block.attn.forward = MeanAttention(block.attn.proj.weight.shape[0]).forward
    return block


def own_output(block):
    block.attn.proj = Bypassed(block.attn.proj)
    return block


class LowRank(nn.Linear):
    """A user's linear layer with a low-rank addition, as in LoRA (Hu et al. 2021)."""

    def forward(self, x):
        return super().forward(x) + x[..., :1] * 0.5


def own_hidden_layer(block):
    block.mlp.fc1.__class__ = LowRank
    return block


def own_norm(block):
    block.norm2.__class__ = ShiftedNorm
    return block


def own_mixing_norm(block):
    block.norm2 = TokenNorm()
    return block


def own_mixing_mlp(block):
    block.mlp.__class__ = MixingMlp
    return block


OWN_LAYERS = [
    wrap,
    subclass,
    own_attention,
    own_function,
    own_output,
    own_hidden_layer,
    own_norm,
    own_mixing_norm,
    own_mixing_mlp,
]


def deep_model(**changes):
    with random.scope(3):
        model = create_model("vit_micro_patch4_32", image_size=8, depth=3, num_classes=5, **changes)
    return randomise(model).eval()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("change", OWN_LAYERS)
def test_the_model_runs_a_user_s_own_layers(change, place):
    """They take one argument and know of no shortcut; the model is what its blocks compute for all tokens."""
    model = deep_model()
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    plain = model(images).numpy()
    with random.scope(4):
        model.blocks[place] = change(model.blocks[place])
    x = model.embed(images)
    for block in model.blocks:
        x = block(x)
    expected = model.forward_head(model.norm(x)).numpy()
    assert np.allclose(model(images).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(plain, expected, rtol=1e-2)


def test_the_mlp_and_the_patches_go_through_a_user_s_own_layers():
    model = deep_model()
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    mlp, x = model.blocks[0].mlp, model.embed(images)
    fc1 = mlp.fc1
    fused = mlp(x).numpy()
    mlp.fc1 = nn.Sequential(fc1)
    assert np.allclose(mlp(x).numpy(), fused, atol=1e-5)
    mlp.fc1 = nn.Linear(*fc1.weight.shape[::-1], bias=False)
    mlp.fc1.weight = fc1.weight
    fc1.bias.data = np.zeros_like(fc1.bias.data)
    expected = mlp.fc2(F.gelu(fc1(x))).numpy()
    assert np.allclose(mlp(x).numpy(), expected, atol=1e-5)

    patches = model.patch_embed
    fused = patches(Tensor(images)).numpy()
    patches.proj = nn.Sequential(patches.proj)
    assert np.allclose(patches(Tensor(images)).numpy(), fused, atol=1e-5)
    patches.proj[0].__class__ = Shifted
    assert np.allclose(patches(Tensor(images)).numpy(), fused + 1, atol=1e-5)
    assert model(images).shape == (2, 5)


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1.0


class MeanPool(vit.VisionTransformer):
    """A user's own pooling: the mean of all tokens."""

    def pool(self, x):
        return x.mean(axis=1)


class Reversed(vit.VisionTransformer):
    """A user's own forward pass of the tokens."""

    def forward_features(self, images):
        return super().forward_features(images)[:, ::-1, :]


@pytest.mark.parametrize("change", ["pool", "features", "norm", "head"])
def test_the_model_runs_a_user_s_own_methods_and_last_norm(change):
    model = deep_model()
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    plain = model(images).numpy()
    if change == "norm":
        model.norm = TokenNorm()
    elif change == "head":
        model.forward_head = lambda x: model.head(x.mean(axis=1))
    else:
        model.__class__ = {"pool": MeanPool, "features": Reversed}[change]
    expected = model.forward_head(model.forward_features(images)).numpy()
    assert np.array_equal(model(images).numpy(), expected) and not np.allclose(plain, expected, rtol=1e-2)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("change", OWN_LAYERS)
def test_features_and_maps_run_a_user_s_own_layers(change, pool):
    """Each method computes with the model's own blocks, whatever their place."""
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for place in range(3):
        model = deep_model(global_pool=pool)
        with random.scope(4):
            model.blocks[place] = change(model.blocks[place])
        x, inputs = model.embed(images), []
        for i, block in enumerate(model.blocks):
            inner = block.block if isinstance(block, Bypassed) else block
            inputs.append(inner.norm1(x))
            x = block(x)
            assert np.array_equal(model.features(images, layer=i).numpy(), x.numpy())
        assert np.allclose(model.features(images).numpy(), model.pool(model.norm(x)).numpy(), atol=1e-5)
        if change in (own_attention, own_function):
            with pytest.raises(TypeError) as caught:
                model.attention_maps(images)
            assert change is own_function or str(caught.value) == (
                f"block {place} (Block) has no attention whose weights are known: "
                "give its attention module a method attention_weights(x), (B, N, D) -> (B, heads, N, N)"
            )
            continue
        for i, got in enumerate(model.attention_maps(images).numpy()):
            inner = model.blocks[i].block if change is wrap and i == place else model.blocks[i]
            assert np.allclose(got, inner.attn.attention_weights(inputs[i]).numpy(), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(distilled=True), dict(init_values=0.5)])
def test_the_shortcut_of_the_last_block_changes_neither_logits_nor_gradients(changes):
    model = deep_model(**changes).to("float64")
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    logits, whole = model(images), model.forward_head(model.forward_features(images))
    assert error(logits.numpy(), whole.numpy()) < 1e-12
    weight = np.random.default_rng(1).standard_normal(logits.shape)
    for got, want in zip(*(grad(y, model.parameters(), weight) for y in (logits, whole)), strict=True):
        assert error(got, want, floor=1e-6) < 1e-10


def test_the_last_block_computes_only_the_tokens_that_are_read(monkeypatch):
    model = create_model("vit_micro_patch4_32", image_size=8, depth=2, num_classes=5)
    seen = []
    forward = vit.Mlp.forward
    monkeypatch.setattr(
        vit.Mlp, "forward", lambda self, x, **how: seen.append(tuple(x.shape)) or forward(self, x, **how)
    )
    model(np.zeros((2, 3, 8, 8), np.float32))
    assert seen == [(2, 5, 128), (2, 1, 128)]


@pytest.mark.parametrize(
    "setting, additions, mlps",
    [({}, 2, 2), ({"drop_path": 0.5}, 1, 2), ({"proj_drop_rate": 0.1}, 0, 0), ({"init_values": 0.1}, 0, 2)],
)
def test_a_branch_is_few_operations_where_nothing_is_between_its_layers(setting, additions, mlps):
    """The residual is added with attention's last product, and an MLP is one operation; the first of two blocks never
    drops its path."""
    model = create_model("vit_nano_patch8_32", image_size=8, depth=2, global_pool="avg", **setting)
    randomise(model)
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    with random.scope(0):
        count = Counter(node.name for node in _tape(model(images).sum())[0])
    assert (count["add_linear"], count["mlp"]) == (additions, mlps)
    model.blocks[0].mlp.fc2.forward = model.blocks[0].mlp.fc2.forward  # a user's own
    with random.scope(0):
        count = Counter(node.name for node in _tape(model(images).sum())[0])
    assert (count["add_linear"], count["mlp"]) == (additions, max(0, mlps - 1))


# --- what torch's modules have ----------------------------------------------------------------------------------------


def test_gradients_are_dropped_or_zeroed_as_in_torch():
    ours, theirs = nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for model in (ours, theirs):
        model.bias.requires_grad_(False)
        (model(np.ones((1, 3), np.float32)) if model is ours else model(torch.ones(1, 3))).sum().backward()
        model.zero_grad(set_to_none=False)
        assert model.weight.grad.shape == (2, 3) and not model.weight.grad.any() and model.bias.grad is None
        model.zero_grad()
        assert model.weight.grad is None


@pytest.mark.parametrize("state", [{"weight": np.ones((2, 3), np.float32), "other": np.ones(1, np.float32)}, {}])
def test_what_was_not_loaded_is_returned_as_in_torch(state):
    found = nn.Linear(3, 2).load_state_dict(state, strict=False)
    theirs = torch.nn.Linear(3, 2).load_state_dict({n: torch.tensor(x) for n, x in state.items()}, strict=False)
    assert tuple(found) == tuple(theirs) and found._fields == theirs._fields
    whole = nn.Linear(3, 2)
    assert whole.load_state_dict(whole.state_dict()) == ([], [])


def test_a_thawed_model_looks_as_before():
    model = nn.Sequential(nn.Linear(3, 2), nn.GELU())
    text = repr(model)
    assert repr(model.requires_grad_(True)) == text
    model[0].frozen = True
    assert "frozen=True" in repr(model)
