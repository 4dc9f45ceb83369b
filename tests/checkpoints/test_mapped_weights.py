"""Weights that are mapped from their file: the same numbers, in pages that belong to it."""

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import tinyvit
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.checkpoints.readers.safetensors import mapped, read_safetensors


def owner(array):
    """Whose memory an array is in."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def test_a_mapped_model_lies_in_its_file_and_leaves_it_alone(tmp_path):
    path = tmp_path / "vit_nano_patch8_32.safetensors"
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    save_file(model.state_dict(), path)
    before = path.read_bytes()
    with mapped():
        opened = open_checkpoint(path).build(copy=False)
    for name, p in opened.named_parameters():
        assert isinstance(owner(p.data), mmap.mmap), name
        p.data += 1
        assert np.array_equal(p.data, model.state_dict()[name] + 1)
    assert path.read_bytes() == before and owner(read_safetensors(path)["norm.bias"]).dtype == np.uint8


@pytest.mark.parametrize("spaces", range(4))
def test_numbers_that_begin_anywhere_in_the_file(tmp_path, spaces):
    path, x = tmp_path / "a.safetensors", np.arange(6, dtype=np.float32)
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = json.dumps({"x": entry}).encode() + spaces * b" "
    path.write_bytes(len(header).to_bytes(8, "little") + header + x.tobytes())
    with mapped():
        read = read_safetensors(path)["x"]
    assert read.flags.aligned and np.array_equal(read, x.reshape(2, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_predict_holds_few_weights_at_a_time(tmp_path):
    """It takes less memory than the weights do, its libraries and the file's pages included."""
    model = tinyvit.create_model("vit_base_patch16_224", num_classes=3, image_size=32, depth=7)
    save_file(model.state_dict(), tmp_path / "vit_base_patch16_32.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    program = (
        "import re; from pathlib import Path; from tinyvit import cli;"
        "cli.main(['predict', 'vit_base_patch16_32.safetensors', 'x.png']);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert int(ran.stdout.split()[-1]) < 170_000, ran.stderr  # KiB; the weights are 196,000
