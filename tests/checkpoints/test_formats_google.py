"""Google's .npz files, from the names and shapes of the original JAX code: read, transposed and run like it."""

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equal, refusal
from google_model import HEADS, PATCH, SIDE, D, fixture, jax_forward

from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model

torch.set_num_threads(1)  # the models are tiny


def big_vision(*, pool="gap", posemb="learn", stacked=False, head=True, prefix="params/", blocks=2):
    """The arrays of big_vision's vit.Model, made of those of the older code by its names."""
    old = fixture(pre_logits=D, blocks=blocks, classes=5 if head else 0)
    names = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "MlpBlock_3": "MlpBlock_0"}
    names |= {"LayerNorm_2": "LayerNorm_1", "Transformer/posembed_input/": ""}
    arrays = {}
    for name, array in old.items():
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        arrays[name] = array
    arrays["pos_embedding"] = arrays["pos_embedding"][:, 1:]
    if posemb != "learn":
        del arrays["pos_embedding"]
    if pool == "gap":
        del arrays["cls"]
    if stacked:
        first = "Transformer/encoderblock_0/"
        for name in [name for name in arrays if name.startswith(first)]:
            each = [arrays.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(blocks)]
            arrays[name.replace(first, "Transformer/encoderblock/")] = np.stack(each)
    return {prefix + name: a for name, a in arrays.items()}


def big_vision_forward(arrays, images, pool, posemb):
    """The forward pass of big_vision's vit.py through that of the older code, which differs in tokens and pooling."""
    w = {name.rpartition("params/")[2].removeprefix("img/"): a for name, a in arrays.items()}
    names = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "MlpBlock_0": "MlpBlock_3"}
    names |= {"LayerNorm_1": "LayerNorm_2"}
    old = {}
    for name, array in w.items():
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        if "/encoderblock/" in name:
            old |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): a for i, a in enumerate(array)}
        else:
            old[name] = array
    if posemb == "learn":
        positions = old.pop("pos_embedding")[0]
    else:  # as its docstring has it: "Follows the MoCo v3 logic"
        y, x = np.mgrid[:SIDE, :SIDE]
        omega = 1.0 / 10_000.0 ** (np.arange(D // 4) / (D // 4 - 1))
        y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
        positions = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    if pool == "tok":
        positions = np.concatenate([np.zeros((1, D)), positions])
    return jax_forward(old | {"Transformer/posembed_input/pos_embedding": positions[None]}, images)


def random_images(patch=PATCH):
    return np.random.default_rng(1).standard_normal((3, 3, SIDE * patch[0], SIDE * patch[1]), dtype=np.float32)


@pytest.mark.parametrize(
    "options",
    [{}, {"pre_logits": D}, {"pre_logits": 20}, {"classes": 0}, {"patch": (4, 8)}, {"prefix": "opt/target/"}],
)
def test_outputs_are_those_of_the_original_code(tmp_path, options):
    arrays = fixture(**options)
    np.savez(tmp_path / "a.npz", **arrays)
    images = random_images(options.get("patch", PATCH))
    expected = jax_forward(arrays, images.transpose(0, 2, 3, 1))
    model = load_model(tmp_path / "a.npz")
    assert model.config.num_heads == HEADS
    assert_equal(model(images).numpy(), expected)
    tanh = jax_forward(arrays, images.transpose(0, 2, 3, 1), approximate="tanh")
    assert_equal(load_model(tmp_path / "a.npz", act="gelu_tanh")(images).numpy(), tanh)
    convert(tmp_path / "a.npz", tmp_path / "own", "tinyvit")
    assert_equal(load_model(tmp_path / "own")(images).numpy(), expected)
    if "pre_logits" not in options or not options.get("classes", 5):
        for to in ("timm", "huggingface"):
            convert(tmp_path / "a.npz", tmp_path / to, to)
            assert_equal(load_model(tmp_path / to)(images).numpy(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "tok"},
        {"posemb": "sincos2d", "stacked": True},
        {"stacked": True, "head": False, "prefix": "params/img/"},
    ],
)
def test_big_vision_s_models(tmp_path, options):
    arrays = big_vision(**options)
    np.savez(tmp_path / "a.npz", **arrays)
    pool, posemb = options.get("pool", "gap"), options.get("posemb", "learn")
    model = load_model(tmp_path / "a.npz", image_size=SIDE * PATCH[0])
    expected = big_vision_forward(arrays, random_images().transpose(0, 2, 3, 1), pool, posemb)
    assert_equal(model(random_images()).numpy(), expected)
    assert (model.config.fc_norm, model.config.no_embed_class) == ((False, False) if pool == "gap" else (None, True))
    assert model.preprocessing.crop_mode == ("squash" if posemb == "learn" else "center")
    convert(tmp_path / "a.npz", tmp_path / "own", "tinyvit")
    assert_equal(load_model(tmp_path / "own", image_size=SIDE * PATCH[0])(random_images()).numpy(), expected)


def test_attention_pooling_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **big_vision(), **{"params/MAPHead_0/probe": np.ones((1, 1, D), np.float32)})
    assert "attention pooling (params/MAPHead_0/probe), which is not supported" in refusal(tmp_path / "a.npz")


def test_the_name_of_the_file_does_not_matter(tmp_path):
    with open(tmp_path / "checkpoint", "wb") as file:
        np.savez_compressed(file, **fixture())
    assert load_model(tmp_path / "checkpoint").config.depth == 2


def test_bfloat16_as_numpy_writes_it(tmp_path):
    arrays = {name: torch.from_numpy(a).bfloat16() for name, a in fixture().items()}
    raw = {name: a.view(torch.int16).numpy().view("V2") for name, a in arrays.items()}
    np.savez(tmp_path / "a.npz", **raw)
    assert np.load(tmp_path / "a.npz")["cls"].dtype == "V2"
    expected = jax_forward(
        {name: a.float().numpy() for name, a in arrays.items()}, random_images().transpose(0, 2, 3, 1)
    )
    assert_equal(load_model(tmp_path / "a.npz")(random_images()).numpy(), expected)


def test_preprocessing_and_fine_tuning(tmp_path):
    np.savez(tmp_path / "a.npz", **fixture(pre_logits=20))
    model = load_model(tmp_path / "a.npz", representation_size=None, num_classes=7, image_size=48)
    p = model.preprocessing
    assert p.mean == p.std == (0.5, 0.5, 0.5)
    assert (p.crop_mode, p.crop_pct, p.interpolation) == ("squash", 1.0, "bilinear")
    assert model(np.zeros((1, 3, 48, 48), np.float32)).shape == (1, 7)


def test_every_array_is_accounted_for(tmp_path):
    arrays, path = fixture(pre_logits=20), tmp_path / "a.npz"
    for name in arrays:
        np.savez(path, **{key: array for key, array in arrays.items() if key != name})
        message = refusal(path)
        problems = "missing", "there is no", "known layout", "unexpected", "17 position embeddings do not fit"
        assert any(problem in message for problem in problems), message
        np.savez(path, **arrays | {name: np.ones(())})
        refusal(path)
    np.savez(path, **arrays, extra=np.ones(2))
    assert "unexpected extra" in refusal(path)
    np.savez(path, **arrays | {"cls": np.full((1, 1, D), np.nan, np.float32)})
    assert "cls_token holds values that are not finite" in refusal(path)
    np.savez(path, **arrays | {"cls": np.zeros((1, 1, 3), np.float32)})
    assert "cls_token has shape (1, 1, 3), expected (1, 1, 48)" in refusal(path)
    np.savez(path, **arrays | {"Transformer/posembed_input/pos_embedding": np.zeros((1, 19, D), np.float32)})
    assert "19 position embeddings do not fit" in refusal(path)
    np.savez(path, **arrays | {"cls": np.array(["no"])})
    assert "cls_token is of dtype <U2" in refusal(path)


def test_damaged_archives(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **fixture())
    content = path.read_bytes()
    for length in (0, 3, 10, 1000, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        refusal(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    assert "not a readable .npz file" in refusal(path)
