"""Fixtures shared by the tests of training runs."""

import pytest
from running import NANO, make_images, tinyvit
from runs import OPTIONS


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def unbroken(images):
    """A finished run, and what its command printed."""
    out = images.parent / "unbroken"
    result = tinyvit("train", "--data", images, "--out", out, *OPTIONS)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder of images, a run that learned them, and the same images under other names."""
    folder = tmp_path_factory.mktemp("finetune")
    make_images(folder / "images")
    other = make_images(folder / "other", seed=1)
    for split in ("train", "test"):
        (other / split / "blue").rename(other / split / "azure")
    result = tinyvit("train", "--data", folder / "images", *NANO, "--epochs", 2, "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    return folder
