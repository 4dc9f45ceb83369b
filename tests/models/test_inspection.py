"""Attention maps, features and rollout against plain torch, transformers, and a calculation by hand."""

import numpy as np
import pytest
import torch
from drawing import BACKENDS, LIBRARIES, error, host
from reference_models import SMALL, VARIANTS, build, torch_twin

import tinyvit
from tinyvit.engine.tensor import grad
from tinyvit.models import inspection, vit
from tinyvit.models.inspection import Features, rollout


def random_images(config, count=3):
    rng = np.random.default_rng(2)
    return rng.standard_normal((count, config.in_chans, *config.image_size)).astype(np.float32)


def watched(twin, images):
    """The torch model's attention weights (depth, B, H, N, N), its tokens after each block, and the head's input."""
    maps, tokens, pooled = [], [], []

    def attention(module, inputs, _):
        q, k, _ = module.queries_keys_values(inputs[0])
        maps.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1))

    for block in twin.blocks:
        block.attn.register_forward_hook(attention)
        block.register_forward_hook(lambda _, __, y: tokens.append(y))
    twin.head.register_forward_hook(lambda _, inputs, __: pooled.append(inputs[0]))
    with torch.no_grad():
        logits = twin(torch.tensor(images, dtype=torch.float64))
    return torch.stack(maps).numpy(), torch.stack(tokens).numpy(), pooled[0].numpy(), logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_maps_and_features_agree_with_torch(name):
    model = build("float64", **VARIANTS[name])
    images = random_images(model.config)
    maps, tokens, pooled, logits = watched(torch_twin(model), images)
    c = model.config
    ours = model.attention_maps(images)
    assert ours.shape == (c.depth, 3, c.num_heads, c.num_tokens, c.num_tokens)
    assert error(ours.numpy(), maps) < 1e-10
    np.testing.assert_allclose(ours.numpy().sum(axis=-1), 1, rtol=1e-12)
    for layer in range(-c.depth, c.depth):
        assert error(model.features(images, layer=layer).numpy(), tokens[layer]) < 1e-10
    assert error(model.features(images).numpy(), pooled) < 1e-10
    both = Features(model, logits=True)(images).numpy()
    assert error(both, np.concatenate([pooled, logits], axis=1) if c.num_classes else pooled) < 1e-10


def test_the_pooled_feature_is_what_a_model_without_a_head_gives():
    for name in ("plain", "average with register tokens", "distilled", "pre-logits"):
        model = build(**VARIANTS[name])
        bare = build(**{**VARIANTS[name], "num_classes": 0})
        bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head")})
        images = random_images(model.config)
        assert np.array_equal(model.features(images).numpy(), bare(images).numpy()), name


@pytest.mark.parametrize("layer", [2, -3])
def test_a_block_that_is_not_there(layer):
    model = build()
    with pytest.raises(IndexError) as caught:
        model.features(random_images(model.config), layer=layer)
    assert str(caught.value) == f"layer {layer} given, the model's blocks are 0 ... 1 (or -2 ... -1)"


def test_maps_leave_the_mode_alone_and_know_no_dropout():
    model = build(attn_drop_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5, drop_path=0.5).train()
    images = random_images(model.config)
    maps = model.attention_maps(images)
    assert np.array_equal(maps.numpy(), model.attention_maps(images).numpy()) and not maps.requires_grad
    assert all(part.training for _, part in model.named_modules())
    model.blocks[0].eval()
    model.attention_maps(images)
    assert [block.training for block in model.blocks] == [False, True]


class Sharper(vit.Attention):
    """A user's attention with weights of its own: half of each is the token's own."""

    def attention_weights(self, x):
        return super().attention_weights(x) * 0.5 + np.eye(x.shape[1], dtype=np.float32) * 0.5

    def forward(self, x):
        batch, tokens, dim = x.shape
        v = self.qkv(x)[:, :, 2 * dim :].reshape(batch, tokens, self.num_heads, -1).permute_dims(0, 2, 1, 3)
        y = (self.attention_weights(x) @ v).permute_dims(0, 2, 1, 3).reshape(batch, tokens, dim)
        return self.proj(y)


class Halved(vit.Attention):
    """A user's attention that changes the outputs and says nothing of the weights."""

    def forward(self, x):
        return super().forward(x) * 0.5


def test_weights_are_those_of_the_attention_that_runs():
    model = build(depth=3)
    images = random_images(model.config)
    plain = model.attention_maps(images).numpy()
    model.blocks[1].attn.__class__ = Sharper
    maps = model.attention_maps(images).numpy()
    np.testing.assert_allclose(maps[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(maps[1], 0.5 * plain[1] + 0.5 * np.eye(plain.shape[-1]), rtol=1e-5)
    assert not np.allclose(maps[2], plain[2], rtol=1e-3)  # what it reads went through the user's attention
    tokens = model.features(images, layer=1)
    block = model.blocks[2]
    np.testing.assert_allclose(maps[2], block.attn.attention_weights(block.norm1(tokens)).numpy(), rtol=1e-5)


def test_an_attention_that_does_not_define_its_weights_is_refused():
    model = build()
    model.blocks[1].attn.__class__ = Halved
    for function in (inspection.attention_maps, rollout):
        with pytest.raises(TypeError) as caught:
            function(model, random_images(model.config))
        assert str(caught.value) == (
            "Halved has a forward of its own but no attention_weights: define the method, "
            "or attention_weights = Attention.attention_weights if the weights are the same"
        )
    Halved.attention_weights = vit.Attention.attention_weights
    try:
        assert model.attention_maps(random_images(model.config)).shape == (2, 3, 3, 5, 5)
    finally:
        del Halved.attention_weights


def test_features_carry_gradients():
    model = build()
    loss = model.features(random_images(model.config), layer=0).sum()
    assert any(np.any(g) for g in grad(loss, [p for p in model.blocks[0].parameters()]))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_array_library(backend):
    xp = LIBRARIES[backend]
    model = build(distilled=True)
    images = random_images(model.config)
    expected = model.attention_maps(images).numpy(), model.features(images, layer=0).numpy(), rollout(model, images)
    model.to(xp)
    images = xp.asarray(images)
    ours = model.attention_maps(images).data, model.features(images, layer=0).data
    assert all(type(x) is type(xp.asarray(0.0)) for x in ours)
    for got, want in zip((*ours, rollout(model, images)), expected, strict=True):
        assert error(host(got), want) < 1e-5


# --- rollout --------------------------------------------------------------------------------------------------


def rollout_by_hand(maps, read, prefix):
    """Token by token: what flows from each patch to the tokens `read`, half of it past each attention."""
    depth, _, tokens, _ = maps.shape
    flow = np.eye(tokens)
    for layer in range(depth):
        new = np.zeros((tokens, tokens))
        for i in range(tokens):
            for j in range(tokens):
                new[i] += 0.5 * maps[layer, :, i, j].mean() * flow[j]
            new[i] += 0.5 * flow[i]
        flow = new
    return np.mean([flow[i] for i in read], axis=0)[prefix:]


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        (dict(image_size=(8, 12)), [0]),
        (dict(distilled=True), [0, 1]),
        (dict(reg_tokens=2), [0]),
        (dict(resnet_layers=(), image_size=(33, 24), patch_size=(3, 2)), [0]),
        (dict(global_pool="avg", reg_tokens=2), [3, 4, 5, 6]),
        (dict(global_pool="avg", class_token=False), [0, 1, 2, 3]),
    ],
)
def test_rollout(settings, read):
    model = build("float64", **settings)
    images = random_images(model.config)
    shares = rollout(model, images)
    assert shares.shape == (3, *model.config.grid_size)
    maps = model.attention_maps(images).numpy()
    for k in range(3):
        expected = rollout_by_hand(maps[:, k], read, model.config.num_prefix_tokens)
        np.testing.assert_allclose(shares[k].ravel(), expected, rtol=1e-12)


def test_rollout_of_even_attention_is_even():
    """With all scores equal, a block gives each token (1/N of all + itself) / 2."""
    model = build("float64", depth=1)
    model.blocks[0].attn.qkv.weight.data = np.zeros_like(model.blocks[0].attn.qkv.weight.data)
    model.blocks[0].attn.qkv.bias.data = np.zeros_like(model.blocks[0].attn.qkv.bias.data)
    np.testing.assert_allclose(rollout(model, random_images(SMALL, 1)), np.full((1, 2, 2), 0.5 / 5), rtol=1e-12)


# --- transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_maps_and_hidden_states_agree_with_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config_class = transformers.ViTConfig if kind.startswith("ViT") else transformers.DeiTConfig
    config = config_class(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8,
        num_labels=5, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 3, 24, 24)).astype(np.float32)
    with torch.no_grad():
        out = theirs(torch.tensor(images), output_attentions=True, output_hidden_states=True)
    model = tinyvit.load_model(tmp_path)
    maps = torch.stack(out.attentions).numpy()
    assert maps.std() > 0.01  # the maps differ from even ones
    assert error(model.attention_maps(images).numpy(), maps) < 1e-5
    for layer in range(2):  # whether the last hidden state is normalised depends on the version
        assert error(model.features(images, layer=layer).numpy(), out.hidden_states[layer + 1].numpy()) < 1e-5
