"""Damaged files are refused in one line, or read as the library that they belong to reads them."""

import io
import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from mutations import damaged_copies, strange_copies
from safetensors.numpy import save_file

import tinyvit
from tinyvit.checkpoints.checkpoint import LONGEST_MESSAGE, CheckpointError, describe
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model, open_checkpoint
from tinyvit.checkpoints.native_file import save
from tinyvit.checkpoints.readers.npz import read_npz
from tinyvit.checkpoints.readers.safetensors import read_safetensors
from tinyvit.checkpoints.readers.weight_files import read_weights
from tinyvit.data import DataError
from tinyvit.data.sources.cifar import class_names, read_pickled
from tinyvit.models.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore")


def outcome(read, *arguments, errors=CheckpointError):
    """What a reader gives, or None where it refuses in one line; any other error is a failure."""
    try:
        return read(*arguments)
    except errors as error:
        message = str(error)
        assert message and "\n" not in message and len(message) <= LONGEST_MESSAGE, message
        return None


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


# --- files of arrays ----------------------------------------------------------------------------------------------


def test_safetensors_files_are_read_exactly_as_by_the_library(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones(3, np.float16)}, path, {"k": "v"})
    read = 0
    for content in damaged_copies(path.read_bytes()):
        path.write_bytes(content)
        found = outcome(read_safetensors, path)
        try:
            expected = safetensors.numpy.load_file(path)
        except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
            expected = None  # some for dtypes that NumPy lacks
        assert (found is None) == (expected is None)
        if found is not None:
            assert_same(found, expected)
            read += 1
    assert read, "some damage is to numbers, and to names"


def test_npz_files_are_read_as_by_numpy(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "f": np.asfortranarray(np.ones((2, 3)))}
    for compressed in (False, True):
        with open(path, "wb") as file:
            (np.savez_compressed if compressed else np.savez)(file, **arrays)
        for content in damaged_copies(path.read_bytes(), seed=compressed):
            path.write_bytes(content)
            found = outcome(read_npz, path)
            if found is not None:
                with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as archive:  # np.load wants PK in front
                    assert_same(found, {name: archive[name] for name in archive.files})


def torch_file(content, layout):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=layout != "legacy")
    return file.getvalue()


def rezipped(whole, pickled):
    """An archive of torch's with another data.pkl, whose checksum is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return file.getvalue()


CONTENT = {
    "model": {"a.weight": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4, dtype=torch.float16)},
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    "epoch": 3,
}


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_torch_files_are_read_as_by_torch(tmp_path, layout):
    path = tmp_path / "a.pth"
    whole = torch_file(CONTENT, layout)
    if layout == "pickle":
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        copies = (rezipped(whole, copy) for copy in damaged_copies(pickled))
    else:
        copies = damaged_copies(whole)
    compared = 0
    for content in copies:
        path.write_bytes(content)
        found = outcome(read_weights, path)
        if found is None:
            continue
        try:
            expected = torch.load(path, weights_only=True)
        except Exception:  # torch refuses what has a stand-in here, and damage behind the weights
            continue
        while not any(isinstance(value, torch.Tensor) for value in expected.values()) and "model" in expected:
            expected = expected["model"]
        assert_same(found, {str(name): tensor.detach().numpy() for name, tensor in expected.items()})
        compared += 1
    assert compared


def test_every_flipped_bit_of_an_archive_leaves_the_weights_or_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    whole = torch_file({"w": torch.arange(4.0)}, "zip")
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    start = whole.index(pickled)
    for at in range(start, start + len(pickled)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"Bad CRC-32 for file 'archive/data\.pkl'"):
            read_weights(path)


def test_cifar_pickles(tmp_path):
    (tmp_path / "batches.meta").touch()
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], "filenames": ["a", "b"]}
    meta = {"label_names": ["a", "b"], "num_vis": 3072}
    for protocol in (0, 2, 4):
        for copy in damaged_copies(pickle.dumps(batch, protocol), seed=protocol):
            (tmp_path / "a").write_bytes(copy)
            if found := outcome(read_pickled, tmp_path / "a", 2, errors=DataError):
                images, labels = found
                assert images.shape[1:] == (3, 32, 32) and len(images) == len(labels) and max(labels) < 2
        for copy in damaged_copies(pickle.dumps(meta, protocol), seed=protocol):
            (tmp_path / "batches.meta").write_bytes(copy)
            if found := outcome(class_names, tmp_path, errors=DataError):
                assert all(isinstance(name, str) for name in found)


# --- what files say about the weights -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's file, and its metadata."""
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    about = describe(model.config, ("a", "b", "c"), Preprocessing((0.5,) * 3, (0.5,) * 3, 0.9), {"seed": 0})
    save(path, model.state_dict(), about)
    return path, about


def check_usable(path):
    """A checkpoint that is read must make a model that predicts, from an image that can be prepared."""
    checkpoint = open_checkpoint(path)
    model = load_model(path)
    config, preprocessing = checkpoint.config, checkpoint.preprocessing
    assert len(preprocessing.mean) == len(preprocessing.std) == config.in_chans
    assert len(checkpoint.class_names) == config.num_classes and all(isinstance(n, str) for n in checkpoint.class_names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = tinyvit.predict(model, np.zeros((1, config.in_chans, *config.image_size), np.float32))
    assert scores.shape == (1, config.num_classes or config.embed_dim)
    return model


def test_metadata_of_a_run(run, tmp_path):
    path, about = run
    weights = {name: array for name, array in load_model(path).state_dict().items()}
    for copy in strange_copies(json.loads(json.dumps(about))):
        save(tmp_path / "a.safetensors", weights, copy)
        outcome(check_usable, tmp_path / "a.safetensors")


def test_a_damaged_run_is_never_another_librarys_checkpoint(run, tmp_path):
    """Its heads and class names are its own, or it is refused."""
    path, _ = run
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    copies = [whole + b"\0", whole[:-1], *(copy + whole[length:] for copy in damaged_copies(whole[:length]))]
    for copy in copies:
        (tmp_path / "a.safetensors").write_bytes(copy)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*attention heads")
            outcome(load_model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_configs_beside_the_weights(run, tmp_path, layout):
    convert(run[0], tmp_path / "a", layout)
    for file in sorted((tmp_path / "a").glob("*.json")):
        whole = file.read_text()
        if layout == "timm" or file.name == "preprocessor_config.json":
            content = json.loads(whole)
        else:
            content = json.loads(whole) | {"pooler_act": "tanh", "do_rescale": True, "rescale_factor": 1 / 255}
        for copy in strange_copies(content):
            file.write_text(json.dumps(copy))
            outcome(check_usable, tmp_path / "a")
        for copy in damaged_copies(whole.encode()):
            file.write_bytes(copy)
            outcome(check_usable, tmp_path / "a")
        file.write_text(whole)
    check_usable(tmp_path / "a")
