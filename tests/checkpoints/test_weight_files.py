"""From bytes to arrays: safetensors files, what a file is in spite of its name, and no second copy of the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import tinyvit
from tinyvit.checkpoints.checkpoint import LONGEST_MESSAGE, CheckpointError
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model
from tinyvit.checkpoints.readers.safetensors import LONGEST_HEADER, read_safetensors
from tinyvit.checkpoints.readers.weight_files import read_shards, read_weights

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


# --- safetensors ------------------------------------------------------------------------------------------------


def test_every_dtype_comes_back(tmp_path):
    values = torch.tensor([[0, 1, 2], [100, 7, 3]])
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "odd": torch.tensor([-0.0, np.inf, np.nan])}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        assert found[name].dtype == expected.dtype and found[name].flags.writeable and found[name].flags.aligned
        np.testing.assert_array_equal(found[name], expected)


@given(bits=st.integers(0, 2**16 - 1))
def test_bfloat16_is_widened_exactly(bits):
    from tinyvit.checkpoints.readers.common import widen

    expected = torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16).float().numpy()
    assert widen(np.array(bits, np.uint16)).tobytes() == expected.tobytes()


def header(entries, length=None):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(16)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header({"x": GOOD | {"data_offsets": [0, 12]}}), "not a readable safetensors file"),
        (header({"x": GOOD | {"data_offsets": [16, 32]}}), "not a readable safetensors file"),
        (header({"x": GOOD | {"data_offsets": [-16, 0]}}), "not a readable safetensors file"),
        (header({"x": GOOD | {"shape": [-2, -2]}}), "not a readable safetensors file"),
        (header({"x": GOOD | {"shape": [1 << 62, 1 << 62]}}), "not a readable safetensors file"),
        (header({"x": GOOD, "y": GOOD}), "not a readable safetensors file"),
        (header({"x": GOOD}) + b"\0", "not a readable safetensors file"),
        (header(b" " * (LONGEST_HEADER + 1)), "its header has"),
        (header({"x": GOOD | {"shape": "ab"}}), ""),
        (header({"x": GOOD | {"shape": [2.0, 2.0]}}), ""),
        (header({"x": GOOD | {"shape": None}}), ""),
        (header({"x": GOOD | {"data_offsets": [0]}}), ""),
        (
            header({"x": GOOD | {"dtype": "F8_E4M3", "shape": [4, 4]}}),
            "x is of dtype F8_E4M3, expected one of F64, F32",
        ),
        (header({"x": GOOD | {"dtype": ["F32"]}}), ""),
        (header({"x": 3}), ""),
        (header({"x": {}}), ""),
        (header([GOOD]), ""),
        (header(b"{" * 50_000), ""),
        (header(b"[" * 50_000), ""),
        (header({"x": GOOD}, length=1 << 40), ""),
        (header({"x": GOOD}, length=0), ""),
        (header({"x": GOOD}, length=3), ""),
    ],
)
def test_damaged_headers(tmp_path, content, problem):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header({"x": GOOD}))
    assert read_weights(path)["x"].tolist() == [[0.0, 0.0], [0.0, 0.0]], "the fixture itself must be readable"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert problem in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


# --- what a file is ---------------------------------------------------------------------------------------------


def test_damaged_numbers_of_an_npz_are_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, w=np.full(50, 1.5, np.float32))
    content = path.read_bytes()
    place = content.index(np.float32(1.5).tobytes() * 50)
    path.write_bytes(content[: place + 9] + b"\x01" + content[place + 10 :])
    with pytest.raises(CheckpointError, match=r"not a readable \.npz file: Bad CRC-32"):
        read_weights(path)


@pytest.mark.parametrize("name", ["a", "a.safetensors", "a.pth", "a.bin", "a.npz", "model.safetensors", "a.txt"])
def test_content_counts_and_not_the_name(tmp_path, name):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    def npz(path):
        with open(path, "wb") as file:
            np.savez(file, w=array)

    writers = {
        "safetensors": lambda path: save_file({"w": array}, path),
        "zip": lambda path: torch.save({"w": torch.from_numpy(array)}, path),
        "legacy": lambda path: torch.save({"w": torch.from_numpy(array)}, path, _use_new_zipfile_serialization=False),
        "npz": npz,
    }
    for write in writers.values():
        write(tmp_path / name)
        np.testing.assert_array_equal(read_weights(tmp_path / name)["w"], array)


@pytest.mark.parametrize("length", range(0, 4096, 128))
def test_a_safetensors_header_of_any_length_is_recognised(tmp_path, length):
    """The first byte of the file is the lowest of the header's length, and may be that of a pickle (0x80)."""
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "a", metadata={"pad": "x" * length})
    assert read_weights(tmp_path / "a")["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89HDF\r\n\x1a\n" + bytes(100), b"PK\x03\x04", bytes(64)])
@pytest.mark.parametrize("name", ["a", "a.safetensors", "a.pth", "a.npz", "a.h5"])
def test_files_that_are_nothing_of_the_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\A[^\n]*\Z"):
        load_model(tmp_path / name)


def test_an_index_that_names_itself(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": index.name}}))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_model(tmp_path)


# --- names and files that are not as usual ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.module.{}", "module._orig_mod.{}", "module.module.{}", "_orig_mod.module._orig_mod.{}",
        "backbone.{}", "module.backbone.{}", "_fsdp_wrapped_module.{}",
    ],
)  # fmt: skip
def test_what_wrappers_put_before_names(tmp_path, wrapped):
    weights = {name: torch.full((2,), float(i)) for i, name in enumerate(["cls_token", "blocks.0.norm1.weight"])}
    content = {wrapped.format(name): tensor for name, tensor in weights.items()} | {"n_averaged": torch.tensor(3)}
    torch.save(content, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert {name: array.tolist() for name, array in found.items()} == {n: t.tolist() for n, t in weights.items()}


def test_what_wrappers_put_inside_names(tmp_path):
    names = ["blocks.0._orig_mod.norm1.weight", "blocks.1._checkpoint_wrapped_module._fsdp_wrapped_module.norm1.weight"]
    save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / "a.safetensors")
    assert sorted(read_weights(tmp_path / "a.safetensors")) == ["blocks.0.norm1.weight", "blocks.1.norm1.weight"]
    save_file({n: np.ones(2, np.float32) for n in ("module.w", "w")}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="two of its tensors have the same name"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("part", ["model", "encoder", "net"])
def test_weights_of_a_model_within_another(tmp_path, part):
    """As Lightning's checkpoints have them, beside hyper-parameters and the optimizer's state."""
    model = tinyvit.create_model("vit_nano_patch8_32")
    state = model.state_dict()
    named = {f"{part}.{name}": torch.from_numpy(array) for name, array in state.items()}
    content = {"state_dict": named, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {}}], "epoch": 3}
    torch.save(content, tmp_path / "vit_nano_patch8_32.ckpt")
    found = load_model(tmp_path / "vit_nano_patch8_32.ckpt").state_dict()
    assert found.keys() == state.keys() and all(np.array_equal(found[name], state[name]) for name in state)
    torch.save({**named, "loss.weight": torch.ones(3)}, tmp_path / "vit_nano_patch8_32.ckpt")
    with pytest.raises(CheckpointError, match=f"known layout .*: it holds {part}"):
        load_model(tmp_path / "vit_nano_patch8_32.ckpt")


def test_averaged_weights_are_preferred_and_that_is_said(tmp_path):
    states = {
        name: {"cls_token": torch.full((2,), float(i))} for i, name in enumerate(["state_dict", "state_dict_ema"])
    }
    torch.save(states, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="holds weights and averaged ones: those under state_dict_ema are read"):
        assert read_weights(tmp_path / "a.pth")["cls_token"].tolist() == [1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes are files only on POSIX")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "best.safetensors")
    (tmp_path / "hub").mkdir()
    os.mkfifo(tmp_path / "hub" / "model.safetensors")
    (tmp_path / "config").mkdir()
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "config" / "model.safetensors")
    os.mkfifo(tmp_path / "config" / "config.json")
    for path in (tmp_path / "pipe.pth", tmp_path / "run", tmp_path / "hub", tmp_path / "config", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="expected a regular file") as caught:
            load_model(path)
        assert str(path) in str(caught.value)


def test_a_checkpoint_without_permission_is_not_called_missing(tmp_path, monkeypatch):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "a.safetensors")

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tinyvit.files.reading.open_regular", refuse)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: Permission denied"):
        load_model(tmp_path / "a.safetensors")


def test_a_long_message_keeps_its_start_and_its_end():
    message = str(CheckpointError("start " + "x" * 43_000_000 + "\nend"))
    assert len(message) <= LONGEST_MESSAGE and message.startswith("start ") and message.endswith(" end")


# --- memory -----------------------------------------------------------------------------------------------------

STATUS = Path("/proc/self/status")
NAME = "vit_small_patch16_224"
MEASURE = """
import re, sys
import tinyvit, tinyvit.checkpoints.loading
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model = tinyvit.load_model(sys.argv[1])
print((peak() - before) / (4 * model.num_parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 86 MB in several layouts."""
    folder = tmp_path_factory.mktemp("large")
    source = folder / f"{NAME}.pth"
    model = tinyvit.create_model(NAME, num_classes=10)
    weights = {name: torch.from_numpy(array) for name, array in model.state_dict().items()}
    torch.save({"model": {name: tensor.bfloat16() for name, tensor in weights.items()}}, folder / f"half_{source.name}")
    torch.save({"model": weights, "optimizer": {"state": weights}}, source)
    for to in ("tinyvit", "huggingface"):
        convert(source, folder / to, to)
    return folder


@pytest.mark.skipif(not STATUS.exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("name", [f"{NAME}.pth", f"half_{NAME}.pth", "tinyvit", "huggingface"])
def test_loading_holds_the_weights_once(large, name):
    result = subprocess.run([sys.executable, "-c", MEASURE, large / name], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.3, "the peak of memory, in multiples of the weights"


def test_the_index_says_which_of_two_shards_counts(tmp_path):
    weights = {name: np.full(3, i, np.float32) for i, name in enumerate(("weight", "bias"))}
    save_file(weights, tmp_path / "1.safetensors")
    save_file({name: weight + 9 for name, weight in weights.items()}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "1.safetensors", "bias": "2.safetensors"}}))
    found = read_shards(index)
    assert {name: array[0] for name, array in found.items()} == {"weight": 0, "bias": 10}
