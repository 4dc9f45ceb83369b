"""Runs: what they write, that they can be killed and resumed to the same bits, and what they refuse."""

import json
import math
import shlex
import shutil
import signal
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import NANO, THREADS, assert_one_line_error, make_images, start, stop_when, tinyvit
from safetensors import safe_open
from safetensors.numpy import load_file

from tinyvit import optim
from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.training.config import TrainConfig
from tinyvit.training.run import train
from tinyvit.training.run_directory import read_config
from tinyvit.training.schedule import Deadline, learning_rate, make_plan, steps_that_fit
from tinyvit.training.trainer import Trainer, TrainError

KEYS = ["epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top5", "lr"]
KEYS += ["images_per_second", "seconds"]
TIMES = ("images_per_second", "seconds")
# Everything that has a state or draws random numbers is on; 72 images make 9 steps an epoch.
OPTIONS = [*NANO, "--epochs", "4", "--batch-size", "8", "--ema", "0.9", "--dropout", "0.1", "--drop-path", "0.1"]
OPTIONS += ["--mixup", "0.4", "--cutmix", "1", "--seed", "3", "--accumulate", "2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def unbroken(images):
    """A finished run, and what its command printed."""
    out = images.parent / "unbroken"
    result = tinyvit("train", "--data", images, "--out", out, *OPTIONS)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def epochs_done(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def progress(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["tinyvit"])["progress"]


def snapshot(run):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}


def assert_same_run(a, b):
    """The two runs have the same bits in every array and the same metrics, times aside."""
    for name in ("last.safetensors", "best.safetensors"):
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        for key, array in left.items():
            assert array.tobytes() == right[key].tobytes(), f"{name}: {key} differs"
    assert without_times(metrics(a)) == without_times(metrics(b))
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())


# --- what a run writes ----------------------------------------------------------------------------------------


def test_a_run_writes_what_the_contract_says(unbroken, images):
    out, printed = unbroken
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "last.safetensors", "best.safetensors", "curves.png"
    }  # fmt: skip
    rows = metrics(out)
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [9, 18, 27, 36]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("train_accuracy", "val_accuracy", "val_top5"))
    assert all(row["val_top5"] == 1 for row in rows), "three classes: the true one is always among five"
    assert rows == sorted(rows, key=lambda row: row["seconds"]) and rows[0]["seconds"] > 0

    config = json.loads((out / "config.json").read_text())
    assert config["options"]["batch_size"] == 8 and config["options"]["lr"] == 1e-3
    assert config["class_names"] == ["blue", "green", "red"]
    assert config["config"]["num_classes"] == 3 and config["config"]["embed_dim"] == 64
    assert config["data"]["train"] == 72 and config["data"]["test"] == 18
    assert config["plan"] == {"total_steps": 36, "steps_per_epoch": 9, "warmup_steps": 4}
    assert len(config["mean"]) == len(config["std"]) == 3
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    lines = printed.splitlines()
    assert len(lines) == 7, printed  # what is trained and where, four epochs, the best
    assert " cores, " in lines[1]
    best = max(row["val_accuracy"] for row in rows)
    assert f"{best:.2%}" in lines[-1] and str(out / "best.safetensors") in lines[-1]


def test_best_holds_the_averaged_weights_of_the_best_epoch(unbroken):
    out, _ = unbroken
    where = progress(out / "last.safetensors")
    rows = metrics(out)
    ranking = [(row["val_accuracy"], -row["val_loss"]) for row in rows]
    assert where["best_epoch"] == 1 + ranking.index(max(ranking))
    last, best = load_file(out / "last.safetensors"), load_file(out / "best.safetensors")
    assert best.keys() == {name for name in last if not name.startswith(("optimizer.", "ema."))}
    if where["best_epoch"] == 4:
        assert all(np.array_equal(array, last[f"ema.{name}"]) for name, array in best.items())
    assert any(not np.array_equal(array, last[name]) for name, array in best.items())


def test_eval_finds_the_accuracy_that_training_recorded(unbroken, images):
    out, _ = unbroken
    scores = json.loads(tinyvit("eval", out, "--data", images, "--json").stdout)
    best = metrics(out)[progress(out / "last.safetensors")["best_epoch"] - 1]
    assert scores["accuracy"] == best["val_accuracy"]
    assert scores["loss"] == pytest.approx(best["val_loss"], rel=1e-6)


def test_another_seed_gives_other_weights(unbroken, images, tmp_path):
    arguments = [option if option != "3" else "4" for option in OPTIONS]
    assert tinyvit("train", "--data", images, "--out", tmp_path / "run", *arguments).returncode == 0
    ours, theirs = (load_file(run / "last.safetensors")["head.weight"] for run in (tmp_path / "run", unbroken[0]))
    assert not np.array_equal(ours, theirs)


# --- stopping and going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_killed_run_resumes_to_the_same_bits(unbroken, images, tmp_path, epochs):
    out = tmp_path / "run"
    process = start("train", "--data", images, "--out", out, *OPTIONS)
    stop_when(process, lambda: (out / "last.safetensors").exists() and epochs_done(out) >= epochs)
    assert process.returncode == -signal.SIGKILL
    assert not progress(out / "last.safetensors")["finished"]
    result = tinyvit("train", "--out", out, "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_run(out, unbroken[0])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(unbroken, images, tmp_path, signum):
    out = tmp_path / "a run"
    process = start("train", "--data", images, "--out", out, *OPTIONS)
    printed, errors = stop_when(process, lambda: epochs_done(out) >= 1, signum)
    assert process.returncode == 128 + signum, (printed, errors)
    assert errors == ""
    where = progress(out / "last.safetensors")
    assert 9 <= where["step"] < 36
    command = printed.splitlines()[-1].partition("to go on: ")[2]
    program, *arguments = shlex.split(command.removeprefix("python -m "))
    assert program == "tinyvit" and "--resume" in arguments
    result = tinyvit(*arguments)
    assert result.returncode == 0, result.stderr
    assert_same_run(out, unbroken[0])


def test_stopping_inside_an_epoch_again_and_again_changes_nothing(unbroken, images, tmp_path, monkeypatch):
    """Stopped after every step and in every evaluation; in one process, as each start would take a second."""
    from tinyvit.training import run as module
    from tinyvit.training import trainer

    out, stops = tmp_path / "run", 0
    given = json.loads((unbroken[0] / "config.json").read_text())["options"]
    given = {name: value for name, value in given.items() if value is not None} | {"out": str(out)}
    given["threads"] = THREADS  # the command's: with others, sums are rounded otherwise

    class At:
        """Asks to stop the second time it is asked."""

        def __init__(self):
            self.asked = 0

        def __call__(self):
            self.asked += 1
            return signal.SIGINT if self.asked >= 2 else None

    class Context:
        def __enter__(self):
            return At()

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(module, "stop_on_signals", Context)
    monkeypatch.setattr(trainer.run_directory, "DRAW_EVERY", math.inf)
    resume = False
    while True:
        try:
            train(given, resume=resume)
            break
        except trainer.Stopped:
            stops, resume = stops + 1, True
    assert stops > 15
    assert_same_run(out, unbroken[0])


def test_metrics_are_cut_back_to_the_checkpoint(unbroken, images, tmp_path):
    """Killed between the writing of metrics.jsonl and of last.safetensors."""
    out = tmp_path / "run"
    process = start("train", "--data", images, "--out", out, *OPTIONS)
    stop_when(process, lambda: epochs_done(out) >= 2)
    done = progress(out / "last.safetensors")["epoch"]
    rows = metrics(unbroken[0])
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: done + 1]) + '{"epoch": ')
    assert tinyvit("train", "--out", out, "--resume").returncode == 0
    assert_same_run(out, unbroken[0])


def test_a_finished_run_is_left_as_it_is(unbroken, images):
    out, _ = unbroken
    before = snapshot(out)
    for more in ([], ["--data", images], OPTIONS, ["--threads", "1", "--device", "cpu"]):
        result = tinyvit("train", "--out", out, "--resume", *more)
        assert result.returncode == 0 and "finished" in result.stdout, result.stderr
        assert len(result.stdout.splitlines()) == 1 and result.stderr == ""
    assert snapshot(out) == before


def test_a_moved_folder_is_the_same_data(unbroken, images, tmp_path):
    out = tmp_path / "run"
    process = start("train", "--data", images, "--out", out, *OPTIONS)
    stop_when(process, lambda: epochs_done(out) >= 1)
    moved = tmp_path / "moved" / "images"
    shutil.copytree(images, moved)
    assert tinyvit("train", "--out", out, "--resume", "--data", moved).returncode == 0
    assert_same_run(out, unbroken[0])


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten(unbroken, images, tmp_path):
    out, _ = unbroken
    before = snapshot(out)
    message = assert_one_line_error(tinyvit("train", "--data", images, "--out", out, *OPTIONS), 2)
    assert str(out) in message and "--resume" in message and "--out" in message
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("In the beginning")
    for other in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.txt"):
        message = assert_one_line_error(tinyvit("train", "--data", images, "--out", other, *NANO), 2)
        assert str(other) in message
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "In the beginning"
    assert len(list((tmp_path / "thesis").iterdir())) == 1
    assert snapshot(out) == before


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
        (["--epochs", "9"], ["--epochs 4", "--epochs 9"]),
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
        ("progress", "does not say where the run is"),
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
    ],
)
def test_resume_needs_sound_values_in_the_config(unbroken, tmp_path, part, name, value):
    config = json.loads((unbroken[0] / "config.json").read_text())
    config[part][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "last.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


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


def test_images_that_the_patch_does_not_divide_are_refused(images, tmp_path):
    result = tinyvit("train", "--data", images, "--out", tmp_path / "run", *NANO, "--image-size", "33")
    assert "image size 33x33 is not divisible by patch size 8" in assert_one_line_error(result, 1)


# --- trouble on the way ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path):
    out = tmp_path / "run"
    arguments = ["--optimizer", "sgd", "--lr", "1e30", "--warmup", "0", "--clip-norm", "0", "--schedule", "constant"]
    result = tinyvit("train", "--data", images, "--out", out, *NANO, *arguments, "--weight-decay", "0")
    message = assert_one_line_error(result, 1)
    assert "at step " in message and "learning rate 1e+30" in message and "largest gradient" in message
    assert str(out / "last.safetensors") in message
    assert all(np.all(np.isfinite(array)) for array in load_file(out / "last.safetensors").values())


NEVER = property(lambda self: 1e9, lambda self, value: None)  # for Trainer.read_every: seconds until numbers are read


def test_numbers_read_late_from_a_device_are_the_same(images, tmp_path, monkeypatch):
    """Whether each step is read at once or, as from a device, many of them later."""
    given = dict(data=str(images), model="vit_nano_patch8_32", batch_size=8, epochs=2, device="cpu", seed=3)
    train({**given, "out": str(tmp_path / "at_once")})
    monkeypatch.setattr(Trainer, "read_every", NEVER, raising=False)
    train({**given, "out": str(tmp_path / "late")})
    assert_same_run(tmp_path / "at_once", tmp_path / "late")


def test_a_loss_read_late_names_its_step(images, tmp_path, monkeypatch):
    given = dict(data=str(images), model="vit_nano_patch8_32", batch_size=8, epochs=2, device="cpu", seed=3)
    messages = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(Trainer, "read_every", NEVER, raising=False)
        with np.errstate(all="ignore"), pytest.raises(TrainError) as caught:
            wild = {"optimizer": "sgd", "lr": 1e30, "warmup": 0.0, "clip_norm": 0.0}
            train({**given, **wild, "out": str(tmp_path / str(late))})
        messages.append(str(caught.value).partition(" (")[0])
    assert messages[0] == messages[1] and "at step 2" in messages[0]


@pytest.mark.skipif(sys.platform == "win32", reason="limits a file's size with setrlimit")
def test_a_full_disk_ends_the_run_in_one_line(images, tmp_path):
    import resource

    out = tmp_path / "run"
    result = tinyvit(
        "train", "--data", images, "--out", out, *NANO,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert str(out / "last.safetensors") in assert_one_line_error(result, 1)
    assert not [path for path in out.iterdir() if path.suffix in (".tmp", ".safetensors")]


def test_images_that_cannot_be_read(images, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(images, damaged)
    broken = damaged / "train" / "red" / "07.png"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = ["train", "--data", damaged, "--out", tmp_path / "run", *NANO, "--epochs", "1"]
    message = assert_one_line_error(tinyvit(*arguments), 1)
    assert "07.png" in message and "--skip-corrupt" in message
    result = tinyvit(*arguments, "--skip-corrupt")
    assert result.returncode == 0, result.stderr
    assert "71 training" in result.stdout and "07.png" in result.stdout


def test_training_works_outside_the_main_thread(images, tmp_path):
    given = {"data": str(images), "out": str(tmp_path / "run"), "model": "vit_nano_patch8_32", "epochs": 1}
    thread = threading.Thread(target=train, args=(given,))
    thread.start()
    thread.join(60)
    assert metrics(tmp_path / "run")[0]["epoch"] == 1


# --- how long a run is ----------------------------------------------------------------------------------------


@given(seconds=st.floats(0.01, 1e5), step=st.floats(1e-3, 10), end=st.floats(0, 100), per_epoch=st.integers(1, 10_000))
def test_as_many_steps_as_fit(seconds, step, end, per_epoch):
    def cost(n):
        return n * step + math.ceil(n / per_epoch) * end

    n = steps_that_fit(seconds, step, end, per_epoch)
    assert n == 1 or cost(n) <= seconds * (1 + 1e-9)
    assert cost(n + 1) > seconds * (1 - 1e-9)


@given(
    total=st.integers(10, 10_000),
    per_epoch=st.integers(1, 1000),
    warmup=st.floats(0, 1.5),
    slower=st.floats(0.2, 5),
    end=st.floats(0, 1) | st.none(),
)
def test_the_number_of_steps_is_corrected_to_what_still_fits(total, per_epoch, warmup, slower, end):
    deadline = object.__new__(Deadline)
    deadline.plan = make_plan(total, per_epoch, warmup)
    deadline.step_seconds, deadline.end_seconds, deadline.moment = 0.01, 0.1, 1000.0
    step, done = math.ceil(total / 10), total // 20
    deadline.corrected_at = (done, 7.0)
    batch, cost = step % per_epoch, 0.01 * slower
    with mock.patch("tinyvit.training.schedule.time.monotonic", return_value=1000.0 - 0.9 * total * 0.01):
        plan = deadline.corrected(step, batch, 7.0 + (step - done) * cost, end)
    ends = end if end is not None else 0.1 * slower

    def needed(steps):
        return steps * cost + math.ceil((batch + steps) / per_epoch) * ends

    left = plan.total_steps - step
    assert left == 1 or needed(left) <= 0.9 * total * 0.01 * (1 + 1e-9)
    assert needed(left + 1) > 0.9 * total * 0.01 * (1 - 1e-9)
    assert plan.steps_per_epoch == per_epoch
    learning_rate(TrainConfig(lr=1.0), plan)(step)  # a warm-up longer than the run would be refused


@given(total=st.integers(1, 5000), per_epoch=st.integers(1, 500), warmup=st.floats(0, 20))
def test_warm_up_is_a_share_or_epochs(total, per_epoch, warmup):
    plan = make_plan(total, per_epoch, warmup)
    wanted = warmup * total if warmup < 1 else warmup * per_epoch
    assert plan.warmup_steps == min(round(wanted), total - 1)
    for name in ("cosine", "step", "constant"):
        rate = learning_rate(TrainConfig(schedule=name, lr=2.0), plan)
        rates = [rate(i) for i in range(total)]
        assert all(0 < r <= 2 * (1 + 1e-9) for r in rates)
        rising = rates[: plan.warmup_steps + 1]
        if name != "step":
            assert rising == sorted(rising) and max(rates) == pytest.approx(rates[plan.warmup_steps])


def test_schedules():
    plan = make_plan(90, 10, 0)
    rate = learning_rate(TrainConfig(schedule="step", lr=1.0), plan)
    assert [rate(i) for i in (0, 29, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert {learning_rate(TrainConfig(schedule="constant", lr=1.0), plan)(i) for i in range(90)} == {1.0}
    cosine = learning_rate(TrainConfig(schedule="cosine", lr=1.0), make_plan(90, 10, 2))
    assert [cosine(i) for i in range(90)] == [optim.WarmupCosine(1.0, 90, 20)(i) for i in range(90)]


def test_minutes_fix_the_steps_so_that_the_schedule_ends_then(images, tmp_path):
    out, minutes = tmp_path / "run", 0.06
    begun = time.monotonic()
    result = tinyvit("train", "--data", images, "--out", out, *NANO, "--batch-size", "8", "--minutes", minutes)
    took = time.monotonic() - begun
    assert result.returncode == 0, result.stderr
    plan = json.loads((out / "config.json").read_text())["plan"]
    last = metrics(out)[-1]
    assert last["step"] == plan["total_steps"] == progress(out / "last.safetensors")["step"]
    assert last["epoch"] == math.ceil(plan["total_steps"] / 9)
    assert last["lr"] == optim.WarmupCosine(1e-3, plan["total_steps"], plan["warmup_steps"])(plan["total_steps"] - 1)
    assert "steps fit into 0:0" in result.stdout
    assert 0.5 < took / (60 * minutes) < 2.5, "other tests share the cores, so this is no measurement"


def test_a_run_of_some_minutes_keeps_its_steps_when_resumed(images, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "--data", images, "--out", out, *NANO, "--minutes", "0.05"]
    stop_when(start(*arguments), lambda: epochs_done(out) >= 1)
    plan = json.loads((out / "config.json").read_text())["plan"]
    assert tinyvit(*arguments, "--resume").returncode == 0
    assert json.loads((out / "config.json").read_text())["plan"] == plan
    assert metrics(out)[-1]["step"] == plan["total_steps"]


# --- what is shown --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_a_terminal_gets_a_bar_and_the_log_stays_clean(images, tmp_path):
    import os
    import pty
    import subprocess

    from running import COMMAND, environment

    master, slave = pty.openpty()
    command = [*COMMAND, "train", "--data", str(images), "--out", str(tmp_path / "run"), *NANO, "--epochs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True, env=environment())
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    log = process.communicate(timeout=60)[0]
    os.close(master)
    assert process.returncode == 0
    bar = shown.decode()
    assert "epoch 2" in bar and "loss " in bar and "images/s" in bar and "accuracy" in bar and "16/16" in bar
    model, _, *rest = (line.split()[0] for line in log.splitlines())
    assert (model, rest) == ("vit_nano_patch8_32", ["epoch", "epoch", "best"])


def test_long_epochs_get_lines_where_there_is_no_terminal(monkeypatch, capsys):
    from tinyvit.training import progress as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    display = module.Display()
    display.start(1000, 100)
    for done in range(101, 301):
        now[0] += 1.0
        display.step(done, 3, 1.5, 0.25, 640.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == "epoch 3  step 160/1000  loss 1.500  accuracy 25.0%  640 images/s  14:00 left"
