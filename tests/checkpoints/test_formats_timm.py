"""timm's checkpoints, from its documented names and shapes: the families that ours are; the others refused by name."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equal, refusal, write_own
from reference_models import TorchViT
from safetensors.numpy import load_file, save_file

import tinyvit
from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model, open_checkpoint
from tinyvit.models.config import ViTConfig

torch.set_num_threads(1)  # the models are tiny
WIDTH, PATCH, SIDE, CLASSES = 64, 8, 32, 5
HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)


def shapes(
    *, tokens=1, positions=17, blocks=2, hidden=192, scale=False, norm="norm", qkv_bias=True, extra=(), head=True
):
    """Names and shapes of timm's vision_transformer.VisionTransformer."""
    d = WIDTH
    table = {"cls_token": (1, 1, d)} if tokens else {}
    table |= {"pos_embed": (1, positions, d), "patch_embed.proj.weight": (d, 3, PATCH, PATCH)}
    table |= {"patch_embed.proj.bias": (d,)}
    for i in range(blocks):
        block = {"norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d)}
        block |= {"attn.qkv.bias": (3 * d,)} if qkv_bias else {}
        block |= {"attn.proj.weight": (d, d), "attn.proj.bias": (d,)}
        block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)} if scale else {}
        block |= {"norm2.weight": (d,), "norm2.bias": (d,)}
        block |= {"mlp.fc1.weight": (hidden, d), "mlp.fc1.bias": (hidden,)}
        block |= {"mlp.fc2.weight": (d, hidden), "mlp.fc2.bias": (d,)}
        table |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    table |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    table |= {"head.weight": (CLASSES, d), "head.bias": (CLASSES,)} if head else {}
    return table | dict(extra)


DISTILLED = {"dist_token": (1, 1, WIDTH), "head_dist.weight": (CLASSES, WIDTH), "head_dist.bias": (CLASSES,)}
FAMILIES = {  # names and shapes, and the fields of our config that they mean
    "vit": (shapes(), {}),
    "deit distilled": (shapes(positions=18, extra=DISTILLED), {"distilled": True}),
    "deit3": (shapes(positions=16, scale=True), {"no_embed_class": True, "init_values": 1e-5}),
    "dinov2 reg4": (
        shapes(positions=16, scale=True, extra={"reg_token": (1, 4, WIDTH)}, head=False),
        {"no_embed_class": True, "reg_tokens": 4, "init_values": 1e-5, "num_classes": 0},
    ),
    "average pooling": (shapes(norm="fc_norm"), {"global_pool": "avg"}),
    "no class token": (
        shapes(tokens=0, positions=16, norm="fc_norm"),
        {"global_pool": "avg", "class_token": False},
    ),
    "gap": (shapes(tokens=0, positions=16), {"global_pool": "avg", "class_token": False, "fc_norm": False}),
    "in21k with pre_logits": (
        shapes(extra={"pre_logits.fc.weight": (WIDTH, WIDTH), "pre_logits.fc.bias": (WIDTH,)}),
        {"representation_size": WIDTH},
    ),
    "miil": (shapes(qkv_bias=False, hidden=100), {"qkv_bias": False, "mlp_ratio": 100 / WIDTH}),
}


def weights(table, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * (0.2 if len(shape) < 2 else shape[-1] ** -0.5)).astype(np.float32)
        for name, shape in table.items()
    }


def config(**changes):
    usual = dict(
        image_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=2, mlp_ratio=3.0, num_classes=CLASSES
    )
    return ViTConfig(**{**usual, **changes})


def reference(state, c, images):
    model = TorchViT(c).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def random_images(side=SIDE, width=None):
    return np.random.default_rng(1).standard_normal((3, 3, side, width or side), dtype=np.float32)


@pytest.fixture(params=FAMILIES)
def family(request):
    table, fields = FAMILIES[request.param]
    state = weights(table)
    return state, config(**fields), reference(state, config(**fields), random_images())


@pytest.fixture
def plain(tmp_path):
    """A state dict of the simplest family, and the file that holds it."""
    state = weights(FAMILIES["vit"][0])
    save_file(state, tmp_path / "vit_nano_patch8_32.safetensors")
    return state, tmp_path / "vit_nano_patch8_32.safetensors"


# --- reading ----------------------------------------------------------------------------------------------------


def test_outputs_are_equal(family, tmp_path):
    state, c, expected = family
    save_file(state, tmp_path / "vit_nano_patch8_32.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(tmp_path / "vit_nano_patch8_32.safetensors")
    assert model.config == c
    assert_equal(model(random_images()).numpy(), expected)
    assert model.class_names == tuple(map(str, range(c.num_classes)))


@pytest.mark.parametrize("container", ["bare", "model", "state_dict", "model_ema", "module.", "_orig_mod.", "legacy"])
def test_containers(plain, container, tmp_path):
    tensors = {name: torch.from_numpy(array) for name, array in plain[0].items()}
    content = {"epoch": 7, container: tensors}
    if container.endswith("."):
        content = {"state_dict": {f"{container}{name}": tensor for name, tensor in tensors.items()}}
    elif container in ("bare", "legacy"):
        content = tensors
    path = tmp_path / "vit_nano_patch8_32.pth"
    torch.save(content, path, _use_new_zipfile_serialization=container != "legacy")
    found = load_model(path)
    assert found.config == config()
    assert all(np.array_equal(array, plain[0][name]) for name, array in found.state_dict().items())


def test_half_precision(plain, tmp_path):
    state, c = plain[0], config()
    for dtype in (torch.float16, torch.bfloat16):
        halves = {name: torch.from_numpy(array).to(dtype) for name, array in state.items()}
        torch.save(halves, tmp_path / f"vit_nano_patch8_{SIDE}.pth")
        expected = reference({name: t.float().numpy() for name, t in halves.items()}, c, random_images())
        assert_equal(load_model(tmp_path / f"vit_nano_patch8_{SIDE}.pth")(random_images()).numpy(), expected)


def test_layer_scale_as_deit3_published_it(tmp_path):
    state = weights(FAMILIES["deit3"][0])
    old = {name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): a for name, a in state.items()}
    torch.save({"model": {name: torch.from_numpy(a) for name, a in old.items()}}, tmp_path / "vit_nano_patch8_32.pth")
    found = load_model(tmp_path / "vit_nano_patch8_32.pth").state_dict()
    assert all(np.array_equal(found[name], state[name]) for name in state)


def hub(path, state, **card):
    """A hub directory as timm's save_for_hf writes it."""
    path.mkdir(exist_ok=True)
    save_file(state, path / "model.safetensors")
    usual = {"architecture": "vit_nano_patch8_32", "num_classes": CLASSES, "pretrained_cfg": {"mean": HALF}}
    (path / "config.json").write_text(json.dumps({**usual, **card}))
    return path


def test_hub_directories(family, tmp_path):
    state, c, expected = family
    pretrained = {
        "input_size": [3, SIDE, SIDE], "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "crop_pct": 0.95,
        "interpolation": "bilinear", "crop_mode": "squash", "num_classes": c.num_classes,
    }  # fmt: skip
    names = [f"n{i}" for i in range(c.num_classes)]
    path = hub(
        tmp_path / "hub", state, architecture="some_vit", model_args={"num_heads": 2, "act_layer": "gelu_tanh"},
        pretrained_cfg=pretrained, label_names=names, label_descriptions={"n1": "goldfish"}, num_classes=c.num_classes,
    )  # fmt: skip
    model = load_model(path)
    tanh = c.replace(act="gelu_tanh")
    assert model.config == tanh
    assert_equal(model(random_images()).numpy(), reference(state, tanh, random_images()))
    assert_equal(load_model(path, act="gelu")(random_images()).numpy(), expected)
    assert model.class_names == tuple("goldfish" if name == "n1" else name for name in names)
    found = model.preprocessing
    assert (found.mean, found.std, found.crop_pct) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3), 0.95)
    assert (found.interpolation, found.crop_mode) == ("bilinear", "squash")
    assert load_model(path / "model.safetensors").class_names == model.class_names


def test_older_hub_directories_have_one_level(plain, tmp_path):
    path = hub(tmp_path / "hub", plain[0])
    card = {"architecture": "vit_nano_patch8_32", "mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.8, "num_heads": 2}
    (path / "config.json").write_text(json.dumps(card))
    assert load_model(path).preprocessing.mean == (0.1, 0.1, 0.1)
    assert load_model(path).preprocessing.crop_pct == 0.8


def test_a_directory_with_one_file_of_weights(plain, tmp_path):
    folder = tmp_path / "vit_nano_patch8_32"
    folder.mkdir()
    save_file(plain[0], folder / "weights.safetensors")
    assert load_model(folder).config == config()
    save_file(plain[0], folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more\.safetensors, weights\.safetensors\): give one of them"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "dim", "heads"),
    [
        ("vit_tiny_patch16_224.augreg_in21k.safetensors", 192, 3),
        ("deit_tiny_distilled_patch16_224-b40b3cf7.pth", 192, 3),
        ("flexivit_small.bin", 384, 6),
        ("vit_huge_patch14_gap_224.pt", 1280, 16),
        ("vit_giant_patch14_224.safetensors", 1408, 16),
        ("vit_so400m_patch14_siglip_gap_224.safetensors", 1152, 16),
        ("vit_giantopt_patch16_siglip_gap_256.safetensors", 1536, 16),
        ("vit_base_patch16_gap_224.safetensors", 768, 16),
        ("aimv2_large_patch14_224.apple_pt.safetensors", 1024, 8),
        ("aimv2_huge_patch14_448.apple_pt.safetensors", 1536, 12),
        ("vit_huge_plus_patch16_dinov3.lvd1689m.safetensors", 1280, 20),
        ("vit_pe_lang_gigantic_patch14_448.fb.safetensors", 1536, 16),
        ("vit_7b_patch16_dinov3.lvd1689m.safetensors", 4096, 32),
        ("vit_small_r26_s32_384.augreg_in21k.safetensors", 384, 6),
        ("jx_vit_base_resnet50_384-9fd3c705.pth", 768, 12),
        ("vit_nano_patch8_32.safetensors", 64, 2),
        ("vit_micro_patch4_32.safetensors", 128, 4),
    ],
)
def test_heads_by_name(name, dim, heads):
    from tinyvit.checkpoints.formats.timm import count_heads
    from tinyvit.checkpoints.readers.weight_files import WeightFiles

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_heads(WeightFiles(name, {}), {}, name, dim) == heads


def test_a_number_in_a_name_is_no_size():
    """Though there is a "cct_2" of that width."""
    from tinyvit.checkpoints.formats.timm import count_heads
    from tinyvit.checkpoints.readers.weight_files import WeightFiles

    with pytest.warns(UserWarning, match="2 are assumed"):
        assert count_heads(WeightFiles("epoch_2.pth", {}), {}, "epoch_2.pth", 128) == 2


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("vit_base_patch32_siglip_gap_256", "gelu_tanh"),
        ("vit_so400m_patch16_siglip_gap_512", "gelu_tanh"),
        ("vit_giantopt_patch16_siglip_gap_384", "gelu_tanh"),
        ("vit_large_patch16_siglip_gap_512", "gelu_tanh"),
        ("vit_large_patch16_siglip_gap_384", "gelu"),
        ("vit_so400m_patch14_siglip_gap_224", "gelu"),
    ],
)
def test_activations_by_name(tmp_path, name, act):
    """timm gives these models the tanh GELU without a word in their files."""
    save_file(weights(FAMILIES["gap"][0]), tmp_path / f"{name}.safetensors")
    assert load_model(tmp_path / f"{name}.safetensors", num_heads=2, image_size=SIDE).config.act == act


def test_weights_of_pretraining_are_passed_over(plain, tmp_path):
    state, _ = plain
    save_file(state | {"mask_token": np.zeros((1, WIDTH), np.float32)}, tmp_path / "a.safetensors")
    found = load_model(tmp_path / "a.safetensors", num_heads=2).state_dict()
    assert found.keys() == state.keys() and all(np.array_equal(found[name], state[name]) for name in state)


def test_heads_that_nothing_tells_are_warned_of(plain, tmp_path):
    state, _ = plain
    path = tmp_path / "mine.safetensors"
    save_file(state, path)
    with pytest.warns(UserWarning, match="nothing says how many attention heads the model has, 1 are assumed"):
        assert load_model(path).config.num_heads == 1
    with pytest.warns(UserWarning, match="normalised") as caught:
        assert load_model(path, num_heads=2).config == config()
    assert len(caught) == 1


def test_weights_that_a_hub_directory_lost_are_missed(plain, tmp_path):
    for lost, problem, fitting, given in (
        ("blocks.1.", "has 1 blocks, and its config.json says 2: weights are missing", {"depth": 1}, {}),
        ("norm.", "no norm behind the blocks, which vit_nano_patch8_32 has", {"final_norm": False}, {}),
        ("head.", "it has no head, and its config.json says 5 classes", {}, {"num_classes": 0}),
    ):
        state = {name: array for name, array in plain[0].items() if not name.startswith(lost)}
        assert problem in refusal(hub(tmp_path / "hub", state))
        load_model(hub(tmp_path / "hub", state, model_args=fitting), **given)


def test_rectangles(tmp_path):
    state = weights(shapes(positions=25))  # 4 x 6 patches and a class token, or 5 x 5 without
    path = tmp_path / "vit_nano_patch8.safetensors"
    save_file(state, path)
    with pytest.warns(UserWarning, match="25 position embeddings are taken for 5x5 patches without a class token"):
        assert load_model(path).config.image_size == (40, 40)
    c = config(image_size=(32, 48))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(path, image_size=(32, 48), no_embed_class=False)
        directory = hub(tmp_path / "hub", state, pretrained_cfg={"input_size": [3, 32, 48]})
        assert load_model(directory).config == c
    assert model.config == c
    assert_equal(model(random_images(32, 48)).numpy(), reference(state, c, random_images(32, 48)))


def test_preprocessing_of_a_bare_state_dict(plain, tmp_path):
    """By timm's names; else assumed, which is said."""
    clip, names = (
        0.48145466,
        {"vit_base_patch16_224.augreg_in1k": 0.5, "my_deit": 0.485, "vit_nano_patch8_32.mae": 0.485},
    )
    names |= {"vit_base_patch16_clip_224.openai": clip, "vit_large_patch14_clip_224.laion2b": 0.5, "mine": None}
    for name, mean in names.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(plain[0], path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_model(path, num_heads=2).preprocessing.mean[0] == (mean or 0.5)
        told = [w for w in caught if "nothing says how images are normalised" in str(w.message)]
        assert len(told) == (mean is None)
    grey = plain[0] | {"patch_embed.proj.weight": plain[0]["patch_embed.proj.weight"][:, :1]}
    save_file(grey, tmp_path / "deit_1.pth")
    with pytest.warns(UserWarning, match="normalised"):
        assert load_model(tmp_path / "deit_1.pth", num_heads=2).preprocessing.mean == (0.5,)


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_round_trip(family, tmp_path, ending):
    state, c, expected = family
    source, target = tmp_path / "vit_nano_patch8_32.safetensors", tmp_path / f"back_vit_nano_patch8_32{ending}"
    save_file(state, source)
    if c.representation_size:
        with pytest.raises(CheckpointError, match="pre_logits"):
            convert(source, target, "timm")
        return
    convert(source, target, "timm")
    assert_equal(load_model(target)(random_images()).numpy(), expected)
    written = load_file(target if ending else target / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(np.array_equal(written[name], state[name]) for name in state)
    if not ending:
        assert load_model(target).config == c
        assert load_model(target).preprocessing == load_model(source).preprocessing
        card = json.loads((target / "config.json").read_text())
        assert card["architecture"] in tinyvit.list_models() and card["num_classes"] == c.num_classes
        assert card["model_args"]["embed_dim"] == WIDTH and card["pretrained_cfg"]["input_size"] == [3, SIDE, SIDE]


def test_an_epsilon_that_timm_cannot_say_is_warned_of_and_kept_for_us(tmp_path):
    model = tinyvit.create_model("vit_nano_patch8_32", norm_eps=1e-3)
    names = tuple(f"class {i}" for i in range(10))
    write_own(model, tmp_path / "own.safetensors", names)
    with pytest.warns(UserWarning, match=r"timm's layer norms have epsilon 1e-06, this model's 0\.001"):
        convert(tmp_path / "own.safetensors", tmp_path / "timm", "timm")
    assert load_model(tmp_path / "timm").config == model.config
    assert open_checkpoint(tmp_path / "timm").class_names == names


def test_fixed_positions_are_written_as_learned_ones(tmp_path):
    model = tinyvit.create_model("vit_nano_patch8_32", pos_embed="sincos2d").eval()
    model.head.weight.data = np.random.default_rng(0).standard_normal(model.head.weight.shape, dtype=np.float32)
    write_own(model, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "timm", "timm")
    found = load_model(tmp_path / "timm")
    assert found.config == model.config.replace(pos_embed="learn")
    assert_equal(found(random_images()).numpy(), reference(model.state_dict(), found.config, random_images()))


# --- refusing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "name", "problem"),
    [
        (
            shapes(extra={"blocks.0.attn.gate.weight": (WIDTH, WIDTH)}),
            "",
            "gated attention (blocks.0.attn.gate.weight)",
        ),
        (shapes(extra={"blocks.0.attn.lambda_q1": (32,)}), "", "differential attention"),
        (shapes(extra={"blocks.0.attns.0.ls.gamma": (WIDTH,)}), "", "several attentions side by side"),
        (shapes(extra={"blocks.0.in_proj.weight": (WIDTH, WIDTH)}), "", "attention and MLP side by side"),
        (shapes(), "vit_pe_core_base_patch16_224", "attention pooling of the class token, too"),
        (shapes(), "vit_large_patch16_sapiens2", "fewer keys than queries"),
        (shapes(tokens=0) | {"pos_embed": (1, 0, WIDTH)}, "", "pos_embed has the shape (1, 0, 64)"),
        (shapes(extra={"blocks.0.attn.rel_pos.mlp.fc1.weight": (2, 2)}), "", "relative positions"),
        (shapes(extra={"patch_embed.backbone.conv1.0.weight": (2, 3, 7, 7)}), "", "a convolutional stem of another"),
        (shapes(extra={"patch_embed.backbone.stem.norm.weight": (64,)}), "", "no patch_embed.backbone.stem.conv"),
        (shapes(extra={"decoder_embed.weight": (2, 2)}), "", "a decoder"),
        (shapes(extra={"fc_norm.weight": (WIDTH,)}), "", "layer norms before and after pooling"),
        (shapes(), "vit_base_patch16_rpn_224", "norms behind attention and MLP (rpn)"),
        (shapes(positions=20), "", "20 position embeddings do not fit a square of patches and 1 other tokens"),
        (shapes(blocks=0), "", "there is no blocks.0.mlp.fc2.weight"),
        (shapes(extra={"blocks.0.attn.q_bias": (WIDTH,)}), "", "its weights describe no model of ours: there is no"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_models_are_refused_by_name(tmp_path, table, name, problem):
    path = tmp_path / f"{name or 'vit_nano_patch8_32'}.safetensors"
    save_file(weights(table), path)
    assert problem in refusal(path)


def test_every_weight_is_accounted_for(plain):
    state, path = plain
    optional = {"head.weight", "head.bias"}  # without head.weight the model gives features
    for name in state.keys() - optional:
        save_file({key: array for key, array in state.items() if key != name}, path)
        assert re.search("missing|there is no|has no position|17 position embeddings do not fit", refusal(path))
    for name, problem in (("head.bias", "missing head.bias"), ("head.weight", "unexpected head.bias")):
        save_file({key: array for key, array in state.items() if key != name}, path)
        assert problem in refusal(path)
    save_file(state | {"norm.weight": np.full(WIDTH, np.inf, np.float32)}, path)
    assert "norm.weight holds values that are not finite" in refusal(path)
    save_file(state | {"norm.weight": np.ones(3, np.float32)}, path)
    assert "norm.weight has shape (3,), expected (64,)" in refusal(path)
    for name in state:
        save_file(state | {name: np.ones((), np.float32)}, path)
        refusal(path)
    save_file({"a": np.ones(2, np.float32)}, path)
    assert "not the weights of a ViT in a known layout (huggingface, timm, google): it holds a" in refusal(path)


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ({"model_args": {"global_pool": "avg"}}, "global_pool is 'avg'"),
        ({"model_args": {"pool_include_prefix": True}}, "class and register tokens, too (pool_include_prefix)"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer is 'relu'"),
        ({"model_args": {"num_heads": "two"}}, "num_heads"),
        ({"model_args": {"num_heads": 3}}, "not divisible by num_heads 3"),
        ({"pretrained_cfg": {"mean": 3}}, "config.json cannot be followed"),
        ({"pretrained_cfg": {"crop_pct": "much"}}, "config.json cannot be followed"),
    ],
)
def test_hub_directories_that_do_not_fit(plain, tmp_path, card, problem):
    assert problem in refusal(hub(tmp_path / "hub", plain[0], **card))


def test_a_run_that_is_renamed_is_still_ours(tmp_path):
    model = tinyvit.create_model("vit_nano_patch8_32", norm_eps=1e-3)
    write_own(model, tmp_path / "own.safetensors")
    (tmp_path / "own.safetensors").rename(tmp_path / "renamed.pth")
    assert load_model(tmp_path / "renamed.pth").config == model.config
