"""ONNX files, run in onnxruntime: the outputs of our models, for every kind of model."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoint_files import assert_equal
from reference_models import SMALL, VARIANTS, build
from running import tinyvit as run_tinyvit

from tinyvit.checkpoints import onnx_file
from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.native_file import write_checkpoint
from tinyvit.checkpoints.onnx_file import write_onnx
from tinyvit.errors import UsageError
from tinyvit.models.preprocessing import Preprocessing


def checkpoint(**changes):
    model = build(**changes)
    c, channels = model.config, model.config.in_chans
    names = tuple(f"class {i}" for i in range(c.num_classes))
    preprocessing = Preprocessing((0.4, 0.5, 0.6, 0.3)[:channels], (0.1, 0.2, 0.3, 0.4)[:channels])
    return Checkpoint("", c, model.state_dict(), names, preprocessing)


def images_for(config, count=3):
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, config.in_chans, *config.image_size), dtype=np.float32)


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


ROTARY = {f"rotary positions: {kind}": dict(rope=kind, rope_grid=(3, 3)) for kind in ("eva", "dinov3", "pe", "axial")}


@pytest.mark.parametrize("name", [*VARIANTS, *ROTARY])
def test_onnxruntime_gives_our_outputs(name, tmp_path):
    opened = checkpoint(**{**VARIANTS, **ROTARY}[name])
    write_onnx(opened, tmp_path / "a.onnx")
    model = opened.build()
    for count in (1, 3):  # the batch is of any size
        images = images_for(opened.config, count)
        assert_equal(run(tmp_path / "a.onnx", images), model(images).numpy())


def test_pixels_in_and_probabilities_out(tmp_path):
    opened = checkpoint()
    write_onnx(opened, tmp_path / "a.onnx", preprocess=True, softmax=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, *opened.config.image_size)).astype(np.float32)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in opened.preprocessing.statistics)
    logits = opened.build()(((pixels / 255 - mean) / std).astype(np.float32)).numpy().astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert_equal(run(tmp_path / "a.onnx", pixels), expected)
    described = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert not {"mean", "std"} & described["preprocessing"].keys()  # nobody is to normalise again


def test_what_the_file_says(tmp_path):
    opened = checkpoint()
    write_onnx(opened, tmp_path / "a.onnx")
    found = onnx.load(tmp_path / "a.onnx")
    described = {entry.key: json.loads(entry.value) for entry in found.metadata_props}
    assert described["class_names"] == list(opened.class_names)
    assert described["preprocessing"] == opened.preprocessing.to_dict()
    assert found.opset_import[0].version >= 17 and found.producer_name == "tinyvit"
    sides = [side.dim_param or side.dim_value for side in found.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", 3, 8, 8]


def test_sixteen_bits(tmp_path):
    opened = checkpoint(embed_dim=48)
    for precision in ("fp32", "fp16"):
        write_onnx(opened, tmp_path / f"{precision}.onnx", precision=precision)
    images = images_for(opened.config)
    assert_equal(run(tmp_path / "fp16.onnx", images), run(tmp_path / "fp32.onnx", images), relative=1e-2)
    sizes = [(tmp_path / f"{precision}.onnx").stat().st_size for precision in ("fp16", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    opened = checkpoint()
    write_onnx(opened, tmp_path / "a.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    images = images_for(opened.config)
    assert_equal(run(tmp_path / "a.onnx", images), opened.build()(images).numpy())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe.onnx").read_bytes)
        written = pool.submit(write_onnx, checkpoint(), tmp_path / "pipe.onnx")
        try:
            written.result(60)
        finally:  # whoever waits for the other end of the pipe goes on
            os.close(os.open(tmp_path / "pipe.onnx", os.O_RDWR | os.O_NONBLOCK))
    write_onnx(checkpoint(), tmp_path / "file.onnx")
    assert read.result() == (tmp_path / "file.onnx").read_bytes()


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"expected a name that ends in \.onnx"):
        write_onnx(checkpoint(), tmp_path / "a.pb")
    with pytest.raises(UsageError, match="--softmax needs a model with classes"):
        write_onnx(checkpoint(num_classes=0), tmp_path / "a.onnx", softmax=True)
    monkeypatch.delitem(onnx_file.WRITERS, onnx_file.vit.Mlp)
    with pytest.raises(CheckpointError, match="no operators here for a module of the kind Mlp"):
        write_onnx(checkpoint(), tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r'pip install "tinyvit\[onnx\]"'):
        write_onnx(checkpoint(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_at_the_command_line(tmp_path):
    write_checkpoint(checkpoint(), tmp_path / "own.safetensors")
    result = run_tinyvit("export", tmp_path / "own.safetensors", tmp_path / "a.onnx", "--softmax")
    assert result.returncode == 0, result.stderr
    assert run(tmp_path / "a.onnx", images_for(SMALL)).sum(axis=1) == pytest.approx(1.0)
