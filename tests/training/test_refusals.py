"""What a run refuses: directories, options and damaged files."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import NANO, assert_one_line_error, make_images, tinyvit
from runs import OPTIONS, snapshot

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.training.config import FIELDS, UsageError, channel_values
from tinyvit.training.run import train
from tinyvit.training.run_directory import RunDirectory


def test_a_run_is_never_overwritten(unbroken, images, tmp_path):
    out, _ = unbroken
    before = snapshot(out)
    message = assert_one_line_error(tinyvit("train", "--data", images, "--out", out, *OPTIONS), 2)
    assert str(out) in message and "--resume" in message and "--out" in message
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("In the beginning")
    for name in ("thesis", "thesis/chapter1.txt", "thesis/chapter1.txt/a/b"):
        other = tmp_path / name
        message = assert_one_line_error(tinyvit("train", "--data", images, "--out", other, *NANO), 2)
        assert str(other).removesuffix("/a/b") in message
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "In the beginning"
    assert len(list((tmp_path / "thesis").iterdir())) == 1
    assert snapshot(out) == before


def test_a_directory_that_cannot_be_written_is_refused_before_images_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path or not mode & os.W_OK)
    with pytest.raises(UsageError, match=f"{tmp_path} cannot be written to: choose another --out"):
        train({"data": str(tmp_path / "missing"), "out": str(tmp_path / "some" / "run")})


def test_the_default_directory_is_named_after_data_and_model_and_kept(images, tmp_path):
    arguments = ["train", "--data", images, *NANO, "--epochs", "1", "--batch-size", "24"]
    assert tinyvit(*arguments, cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "images-vit_nano_patch8_32"
    before = snapshot(run)
    assert "runs/images-vit_nano_patch8_32" in assert_one_line_error(tinyvit(*arguments, cwd=tmp_path), 2)
    assert "finished" in tinyvit(*arguments, "--resume", cwd=tmp_path).stdout
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--model", "vit_micro_patch4_32"], ["--model vit_nano_patch8_32", "--model vit_micro_patch4_32"]),
        (["--lr", "0.5"], ["--lr 0.001", "--lr 0.5"]),
        (["--epochs", "9"], ["--epochs 4", "--init"]),
        (["--epochs", "2"], ["--epochs 4", "--epochs 2"]),
        (["--minutes", "9"], ["without --minutes"]),
        (["--no-augment"], ["--augment", "--no-augment"]),
        (["--seed", "0"], ["--seed 3"]),
        (["--data", "OTHER"], ["images", "other"]),
    ],
)
def test_resume_refuses_what_contradicts_the_run(unbroken, tmp_path, given, named):
    out, _ = unbroken
    before = snapshot(out)
    if "OTHER" in given:
        given = ["--data", make_images(tmp_path / "other", train=25, test=4)]
    message = assert_one_line_error(tinyvit("train", "--out", out, "--resume", *given), 2)
    assert all(part in message for part in named), message
    assert snapshot(out) == before


def test_other_images_under_the_same_name_are_refused(unbroken, images, tmp_path):
    other = make_images(tmp_path / "images", train=25, test=4)
    message = assert_one_line_error(tinyvit("train", "--out", unbroken[0], "--resume", "--data", other), 2)
    assert "other images" in message


def break_last(run, change):
    path = run / "last.safetensors"
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        from tinyvit.checkpoints.native_file import read, save

        tensors, metadata = read(path)
        if change == "nan":
            tensors["optimizer.0.m"][:] = np.nan
        elif change == "key":
            del tensors["optimizer.0.v"]
        elif change == "progress":
            del metadata["progress"]
        metadata.get("progress", {})["finished"] = False
        save(path, tensors, metadata)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("missing", "no last.safetensors"),
        ("truncated", "not a readable safetensors file"),
        ("nan", "optimizer.0.m holds values that are not finite"),
        ("key", "missing 0.v"),
        ("progress", "the progress of its run is damaged"),
    ],
)
def test_resume_needs_a_sound_checkpoint(unbroken, tmp_path, change, named):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    break_last(run, change)
    before = snapshot(run)
    assert named in assert_one_line_error(tinyvit("train", "--out", run, "--resume"), 1)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"options": {}}', '{"options": {"speed": 9}}', '{"options": {}, "plan": {"total_steps": "x"}}']
)
def test_resume_needs_a_sound_config(unbroken, tmp_path, text):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    (run / "config.json").write_text(text)
    assert "config.json" in assert_one_line_error(tinyvit("train", "--out", run, "--resume"), 1)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("options", "seed", None),
        ("options", "batch_size", "many"),
        ("options", "data", ["shapes"]),
        ("options", "augment", "yes"),
        ("plan", "warmup_steps", 0.5),
        ("plan", "steps_per_epoch", 0),
        ("plan", "total_steps", 0),
        ("data", "fingerprint", None),
    ],
)
def test_resume_needs_sound_values_in_the_config(unbroken, tmp_path, part, name, value):
    config = json.loads((unbroken[0] / "config.json").read_text())
    config[part][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "last.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RunDirectory(tmp_path).read_record()


def test_a_run_of_a_version_with_fewer_options_can_be_resumed(unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    config = json.loads((run / "config.json").read_text())
    del config["options"]["cutmix"], config["options"]["threads"]
    (run / "config.json").write_text(json.dumps(config))
    assert "finished" in tinyvit("train", "--out", run, "--resume").stdout
    assert "--cutmix 0.0, not --cutmix 1.0" in tinyvit("train", "--out", run, "--resume", *OPTIONS).stderr


def test_a_batch_larger_than_the_data_is_refused(images, tmp_path):
    result = tinyvit("train", "--data", images, "--out", tmp_path / "run", *NANO, "--batch-size", "73")
    message = assert_one_line_error(result, 2)
    assert "73" in message and "72 training images" in message
    assert not (tmp_path / "run").exists()


def test_a_batch_holds_all_variants_of_its_images(images, tmp_path):
    command = ["train", "--data", images, "--out", tmp_path / "run", *NANO, "--repeats", 7, "--epochs", 1]
    for given, fitting in ((16, 14), (3, 7)):
        message = assert_one_line_error(tinyvit(*command, "--batch-size", given), 2)
        assert message == f"--batch-size {given}: expected a multiple of --repeats 7, such as {fitting}"
    assert tinyvit(*command).returncode == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["batch_size"] == 14


def test_images_that_the_patch_does_not_divide_are_refused(images, tmp_path):
    result = tinyvit("train", "--data", images, "--out", tmp_path / "run", *NANO, "--image-size", "33")
    problem = "vit_nano_patch8_32: image size 33x33 is not divisible by patch size 8: try 32x32 or 40x40"
    assert assert_one_line_error(result, 1) == problem


def test_a_checkpoint_that_must_not_be_read_is_not_called_missing(unbroken, monkeypatch):
    out, _ = unbroken
    original = Path.stat

    def stat(path, **how):
        if path.name == "last.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(PermissionError, match="Permission denied"):
        RunDirectory(out).read_record()


def test_a_missing_checkpoint_is_called_missing(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="there is no such directory"):
            RunDirectory(path).read_record()
    with pytest.raises(CheckpointError, match=r"is not a run: it has no last\.safetensors$"):
        RunDirectory(tmp_path).read_record()
    (tmp_path / "config.json").write_text('{"options": {}, "plan": {}}')
    with pytest.raises(CheckpointError, match="begins anew by its command without --resume"):
        RunDirectory(tmp_path).read_record()


@pytest.mark.parametrize("text", ["0.48145466,0.4578275,0.40821073", "0.5", "1,0.1,0.30000000000000004"])
def test_statistics_are_recorded_to_the_last_digit(text):
    expected = tuple(float(value) for value in text.split(","))
    for parse in (FIELDS["mean"].metadata["parse"], FIELDS["std"].metadata["parse"]):
        assert channel_values(parse(text)) == expected
        assert parse(parse(text)) == parse(text)


@pytest.mark.parametrize("text", ["123.7,116.3,103.5", "-0.1", "nan", "inf", "", "0.5,", "a"])
def test_statistics_are_those_of_pixels_from_0_to_1(text):
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match="expected numbers from 0 to 1"):
            FIELDS[name].metadata["parse"](text)
