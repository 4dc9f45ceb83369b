"""Class names come from id2label only where its keys number the classes; a directory without a head has no classes."""

import numpy as np
import pytest
from checkpoint_files import change_config, write_own
from safetensors.numpy import load_file, save_file

import tinyvit
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model, open_checkpoint

NUMBERED = ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.fixture
def directory(tmp_path):
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    write_own(model, tmp_path / "a.safetensors", ("a", "b", "c"))
    convert(tmp_path / "a.safetensors", tmp_path / "hf", "huggingface")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"2": "z", "0": "x", "1": "y"}, ("x", "y", "z")),
        ({"0": "x", "1": 7, "2": None}, ("x", "7", "LABEL_2")),
        (None, NUMBERED),
        (..., NUMBERED),
        ({}, NUMBERED),
    ],
)
def test_names_by_number(directory, labels, expected):
    change_config(directory, id2label=labels)
    assert open_checkpoint(directory).class_names == expected


@pytest.mark.parametrize(
    "labels",
    [
        {"1": "x", "2": "y", "3": "z"},
        {"0": "x", "1": "y"},
        {"0": "x", "1": "y", "02": "z"},
        {"a": "x", "b": "y", "c": "z"},
    ],
)
def test_names_that_do_not_number_the_classes_are_left_out_with_a_warning(directory, labels):
    change_config(directory, id2label=labels)
    with pytest.warns(UserWarning, match="keys of id2label are not the numbers 0 to 2"):
        checkpoint = open_checkpoint(directory)
    assert checkpoint.class_names == NUMBERED and not checkpoint.names_known


def test_a_directory_without_a_head_gives_the_feature(directory):
    """As Transformers writes it for num_labels=0."""
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    feature = tinyvit.predict(load_model(directory, num_classes=0), x)
    path = directory / "model.safetensors"
    save_file({name: array for name, array in load_file(path).items() if "classifier" not in name}, path)
    change_config(directory, id2label={}, label2id={})
    model = load_model(directory)
    assert model.config.num_classes == 0 and model.class_names == ()
    np.testing.assert_array_equal(tinyvit.predict(model, x), feature)
