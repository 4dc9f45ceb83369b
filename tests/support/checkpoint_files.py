"""Shared by the tests of checkpoints: outputs that agree, files of ours, files that are refused, hostile pickles."""

import json

import numpy as np
import pytest

import tinyvit
from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.models.preprocessing import Preprocessing


def assert_equal(found, expected, relative=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def write_own(model, path, names=()):
    """A file of ours, for a name that ends in .safetensors, or a directory."""
    model.class_names, model.preprocessing = names, Preprocessing((0.4,) * 3, (0.2,) * 3)
    tinyvit.save_model(model, path)


def change_config(directory, **changes):
    """Change a directory's config.json; a value of ... leaves a field out."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refusal(path, **overrides):
    """The message, in one line, with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        tinyvit.load_model(path, **overrides)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


class Call:
    """Pickles as a call of `function`, which reading then would make."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call
