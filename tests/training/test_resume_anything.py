"""Any run can be resumed: every size of image, every kind of data, other threads, more epochs."""

import json
import multiprocessing
import shutil
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image
from running import COMMAND, NANO, assert_one_line_error, environment, make_images, start, stop_when, tinyvit
from runs import assert_same_run, epochs_done, interrupt_after, metrics, snapshot
from safetensors.numpy import load_file

from tinyvit.errors import UsageError
from tinyvit.training import run_directory
from tinyvit.training.run import train
from tinyvit.training.trainer import Stopped

SIZES = {"28x28": (28, 28, 4), "64x64": (64, 64, 16), "16x64": (16, 64, 8), "64x16": (64, 16, 8)}


def sized_images(directory, height, width):
    """An image folder of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("dark", "light"):
            folder = directory / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (height, width, 3)) + 100 * (name == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return directory


def assert_resumes(given, tmp_path, monkeypatch, steps):
    """A run that is stopped and resumed ends with the bits of one that is not."""
    train({**given, "out": str(tmp_path / "unbroken")})
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Stopped):
            train({**given, "out": str(tmp_path / "resumed")})
    train({"out": str(tmp_path / "resumed")}, resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


@pytest.mark.parametrize("size", SIZES)
def test_images_of_every_size(size, tmp_path, monkeypatch):
    height, width, patch = SIZES[size]
    data = sized_images(tmp_path / "data", height, width)
    given = {"data": str(data), "epochs": 1, "batch_size": 4, "patch_size": patch, "device": "cpu"}
    assert_resumes(given, tmp_path, monkeypatch, steps=2)
    config = json.loads((tmp_path / "resumed" / "config.json").read_text())
    assert config["config"]["image_size"] == [height, width]


@pytest.mark.parametrize("kind", ["folder without splits", "csv", "parquet", "cifar", "shapes", "frozen"])
def test_data_of_every_kind(kind, tmp_path, monkeypatch):
    given = {"epochs": 2, "batch_size": 8, "device": "cpu", "model": "vit_nano_patch8_32"}
    images = make_images(tmp_path / "images", train=9, test=2)
    files = sorted((images / "train").glob("*/*.png"))
    if kind == "folder without splits":
        given["data"] = str(images / "train")
    elif kind == "csv":
        rows = "".join(f"{file},{file.parent.name}\n" for file in files)
        (tmp_path / "images.csv").write_text("path,label\n" + rows)
        given["data"] = str(tmp_path / "images.csv")
    elif kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
        parquet.write_table(pyarrow.table(table), tmp_path.parent / "train.parquet")
        given["data"] = str(tmp_path.parent / "train.parquet")
    elif kind == "cifar":
        rng = np.random.default_rng(0)
        folder = tmp_path / "cifar-10-batches-bin"
        folder.mkdir()
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            batch = rng.integers(0, 256, (10, 3073)).astype(np.uint8)
            batch[:, 0] = np.arange(10)
            (folder / name).write_bytes(batch.tobytes())
        names = "\n".join(f"class{i}" for i in range(10))
        (folder / "batches.meta.txt").write_text(names + "\n")
        given["data"] = str(folder)
    elif kind == "shapes":
        from tinyvit.data.sources import shapes

        monkeypatch.setattr(shapes, "TRAIN", 640)
        monkeypatch.setattr(shapes, "TEST", 200)
        given |= {"data": "shapes", "batch_size": 128, "epochs": 1}
    else:
        train({**given, "data": str(images), "out": str(tmp_path / "first")})
        del given["model"]
        given |= {"data": str(images), "init": str(tmp_path / "first"), "freeze": "all-but-head"}
    assert_resumes(given, tmp_path, monkeypatch, steps=4)


def test_another_number_of_threads_gives_the_same_weights(tmp_path, monkeypatch):
    """To the bit; an evaluation, which is cut by the number of threads, agrees to rounding."""
    given = {"data": str(make_images(tmp_path / "images", train=9)), "epochs": 2, "batch_size": 8, "device": "cpu",
             "model": "vit_nano_patch8_32", "threads": 2}  # fmt: skip
    train({**given, "out": str(tmp_path / "unbroken")})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stopped):
            train({**given, "out": str(tmp_path / "resumed")})
    train({"out": str(tmp_path / "resumed"), "threads": 1}, resume=True)
    a, b = (load_file(tmp_path / run / "last.safetensors") for run in ("unbroken", "resumed"))
    assert all(array.tobytes() == b[name].tobytes() for name, array in a.items())
    losses = [[row["val_loss"] for row in metrics(tmp_path / run)] for run in ("unbroken", "resumed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_finished_run_goes_on_where_its_schedule_allows(tmp_path):
    given = {"data": str(make_images(tmp_path / "images", train=9)), "batch_size": 8, "device": "cpu",
             "model": "vit_nano_patch8_32", "schedule": "constant", "warmup": 0.0}  # fmt: skip
    train({**given, "epochs": 3, "out": str(tmp_path / "whole")})
    train({**given, "epochs": 2, "out": str(tmp_path / "longer")})
    assert train({"out": str(tmp_path / "longer"), "epochs": 3}, resume=True).epoch == 3
    assert_same_run(tmp_path / "whole", tmp_path / "longer")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "vit"}')  # no record of ours
    data = make_images(tmp_path / "images", train=9)
    given = {"data": str(data), "epochs": 1, "batch_size": 8, "out": str(out), "model": "vit_nano_patch8_32"}
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        train(given)
    (out / "config.json").write_text('{"options": {}, "plan": {}}')
    (out / ".last.safetensors.123.tmp").write_bytes(b"half")
    train(given)
    assert not [path for path in out.iterdir() if path.name.startswith(".")] and len(metrics(out)) == 1


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fcntl")
def test_two_processes_do_not_share_a_directory(tmp_path):
    data, out = make_images(tmp_path / "images", train=9), tmp_path / "run"
    process = start("train", "--data", data, "--out", out, *NANO, "--epochs", "1000", "--batch-size", "8")
    stopped = []

    def resumed_meanwhile():
        if epochs_done(out) < 1:
            return False
        stopped.append(tinyvit("train", "--out", out, "--resume"))
        return True

    stop_when(process, resumed_meanwhile)
    assert "another process is training in it" in assert_one_line_error(stopped[0], 2)


def test_a_second_interrupt_ends_the_process_at_once(tmp_path):
    data, out = make_images(tmp_path / "images", size=64), tmp_path / "run"
    command = [*COMMAND, "train", "--data", str(data), "--out", str(out), "--model", "vit_tiny_patch16_224"]
    command += ["--batch-size", "4", "--epochs", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    while not (out / "last.safetensors").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    for _ in range(100):  # the second one must not come before the first is noted
        try:
            process.wait(0.02)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """One epoch of one step a class."""
    folder = tmp_path_factory.mktemp("short")
    data, out = make_images(folder / "cost$x_$5"), folder / "run"
    train({"data": str(data), "epochs": 1, "batch_size": 24, "out": str(out), "model": "vit_nano_patch8_32"})
    return out


def test_plot_draws_the_curves_later(short_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "curves_png", run_directory.curves_png.__wrapped__)
    out = shutil.copytree(short_run, tmp_path / "run")
    (out / "curves.png").unlink()
    before = snapshot(out)
    result = tinyvit("plot", out)
    assert result.returncode == 0 and str(out / "curves.png") in result.stdout, result.stderr
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    (out / "curves.png").unlink()
    assert snapshot(out) == before
    assert_one_line_error(tinyvit("plot", tmp_path), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_accuracy", 1e300), ("step", 10**400), ("step", -1), ("epoch", 2.5), ("seen", True), ("loss_sum", "1"),
     ("history", [{}]), ("history", {}), ("best_epoch", 7), ("finished", 0), ("seconds", float("nan"))],
)  # fmt: skip
def test_damaged_progress_is_refused(short_run, tmp_path, name, value):
    from tinyvit.checkpoints.native_file import read, save

    out = shutil.copytree(short_run, tmp_path / "run")
    tensors, metadata = read(out / "last.safetensors")
    metadata["progress"][name] = value
    save(out / "last.safetensors", tensors, metadata)
    assert "progress" in assert_one_line_error(tinyvit("train", "--out", out, "--resume"), 1)
