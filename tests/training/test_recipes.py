"""Named recipes: options that go together, and that those given beside them override."""

import json

import pytest
from running import assert_one_line_error, make_images, tinyvit

import tinyvit as package
from tinyvit.models.summary import summarise
from tinyvit.training.config import FIELDS, UsageError, check_same, with_recipe
from tinyvit.training.recipes import BEST, FILES, best_recipe, read_recipe


@pytest.mark.parametrize("name", list(FILES))
def test_a_recipe_is_made_of_options(name):
    recipe = read_recipe(name)
    for option, value in recipe.options.items():
        assert FIELDS[option].metadata["parse"](str(value)) == value, option
    assert recipe.options.get("model") in (None, *package.list_models())
    assert name in tinyvit("recipes").stdout


def test_a_run_without_a_choice_gets_the_best_recipe_for_its_data_and_device():
    for (data, device), name in BEST.items():
        assert best_recipe({"data": data, "lr": 0.1}, on_gpu=device == "cuda") == name
        assert read_recipe(name).options["data"] == data
    assert best_recipe({}, on_gpu=False) == best_recipe({"model": "m"}, on_gpu=False) == "shapes"
    for given in ({"data": "mine"}, {"init": "w"}, {"data": "cifar10", "model": "m"}, {"recipe": "finetune"}):
        assert best_recipe(given, on_gpu=False) is None


def test_what_is_given_counts_more():
    given = {"recipe": "keras-cifar10", "lr": 0.5, "data": "mine"}
    options = with_recipe(given)
    assert (options["lr"], options["data"], options["weight_decay"]) == (0.5, "mine", 1e-4)
    assert options["recipe"] == "keras-cifar10" and options["epochs"] == 100
    assert "epochs" not in with_recipe(given | {"minutes": 3})
    assert with_recipe({"lr": 0.5}) == {"lr": 0.5}


def test_keras_s_model():
    """The example's numbers: 144 patches of 108 values, 8 layers of width 64 with 4 heads and MLPs of 128 and 64.

    Its own parameter count minus what we leave out: each layer has 2 norms, attention (here 4 heads of 16), and an MLP.
    """
    config = package.model_config(read_recipe("keras-cifar10").options["model"], num_classes=10)
    assert (config.image_size, config.patch_size, config.num_patches, config.num_tokens) == ((72, 72), (6, 6), 144, 144)
    assert (config.depth, config.embed_dim, config.num_heads, config.mlp_dim) == (8, 64, 4, 128)
    layer = 2 * 2 * 64 + 4 * (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64)
    expected = (108 * 64 + 64) + 144 * 64 + 8 * layer + 2 * 64 + (64 * 10 + 10)
    assert package.create_model("vit_keras_patch6_72").num_parameters() == expected == summarise(config).parameters


def test_keras_s_recipe_trains_on_images_of_any_size(tmp_path):
    images = make_images(tmp_path / "images", train=8, test=2, size=20)
    (tmp_path / "more.toml").write_text('recipe = "keras-cifar10"\nbatch-size = 12\n')
    out = tmp_path / "run"
    command = ["train", "--config", tmp_path / "more.toml", "--data", images, "--epochs", 2, "--out", out]
    result = tinyvit(*command)
    assert result.returncode == 0, result.stderr
    assert "vit_keras_patch6_72" in result.stdout and "72x72" in result.stdout
    config = json.loads((out / "config.json").read_text())
    options = config["options"]
    assert (options["lr"], options["weight_decay"], options["batch_size"], options["epochs"]) == (1e-3, 1e-4, 12, 2)
    assert (options["recipe"], options["schedule"], options["label_smoothing"]) == ("keras-cifar10", "constant", 0.0)
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert row["lr"] == 1e-3 and row["val_top5"] == 1
    assert "finished" in tinyvit("train", "--out", out, "--resume", "--recipe", "keras-cifar10").stdout
    check_same(options, {"recipe": "keras-cifar10"}, out)
    with pytest.raises(UsageError, match=r"--lr 0\.001, not --lr 0\.5"):
        check_same(options, {"lr": 0.5}, out)


def test_an_unknown_recipe_is_refused(tmp_path):
    result = tinyvit("train", "--recipe", "keras", "--out", tmp_path / "run")
    assert ", keras-cifar10 or shapes, got 'keras'" in assert_one_line_error(result, 2)


def test_fine_tuning_needs_weights(tmp_path):
    result = tinyvit("train", "--recipe", "finetune", "--out", tmp_path / "run")
    assert "--recipe finetune goes on from the weights of --init, and there is none" in assert_one_line_error(result, 2)
    assert not (tmp_path / "run").exists()
