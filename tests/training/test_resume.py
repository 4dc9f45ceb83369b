"""Runs that are killed or stopped resume to the same bits."""

import json
import math
import os
import shlex
import shutil
import signal

import pytest
from running import THREADS, start, stop_when, tinyvit, wait_until
from runs import OPTIONS, assert_same_run, epochs_done, interrupt_after, metrics, progress, snapshot, train_with_stops

from tinyvit.training import run_directory
from tinyvit.training.run import train
from tinyvit.training.trainer import Stopped


@pytest.fixture(scope="module")
def killed(images, tmp_path_factory):
    """What a run leaves that is killed after so many epochs: copies of its directory, made while it stands still."""
    folder = tmp_path_factory.mktemp("killed")
    process = start("train", "--data", images, "--out", folder / "3", *OPTIONS)
    for epochs in (0, 1):
        wait_until(process, lambda: (folder / "3/last.safetensors").exists() and epochs_done(folder / "3") >= epochs)  # noqa: B023
        process.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        shutil.copytree(folder / "3", folder / str(epochs))
        process.send_signal(signal.SIGCONT)
    stop_when(process, lambda: epochs_done(folder / "3") >= 3)
    assert process.returncode == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("epochs", [0, 3])  # from 1, below
def test_a_killed_run_resumes_to_the_same_bits(unbroken, killed, tmp_path, epochs):
    out = shutil.copytree(killed / str(epochs), tmp_path / "run")
    assert not progress(out / "last.safetensors")["finished"]
    result = tinyvit("train", "--out", out, "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_run(out, unbroken[0])


def test_signals_save_and_say_how_to_go_on(unbroken, images, tmp_path):
    out = tmp_path / "a run"
    arguments = ["train", "--data", images, "--out", out, *OPTIONS]
    for signum in (signal.SIGINT, signal.SIGTERM):
        done = epochs_done(out)
        process = start(*arguments)
        printed, errors = stop_when(process, lambda: epochs_done(out) > done, signum)  # noqa: B023
        assert process.returncode == 128 + signum, (printed, errors)
        assert errors == ""
        assert 9 * (done + 1) <= progress(out / "last.safetensors")["step"] < 36
        command = printed.splitlines()[-1].partition("to go on: ")[2]
        program, *arguments = shlex.split(command.removeprefix("python -m "))
        assert program == "tinyvit" and "--resume" in arguments
    result = tinyvit(*arguments)
    assert result.returncode == 0, result.stderr
    assert_same_run(out, unbroken[0])


def options_of(unbroken, out):
    """The options of the unbroken run, for one in this process."""
    given = json.loads((unbroken[0] / "config.json").read_text())["options"]
    given = {name: value for name, value in given.items() if value is not None}
    return given | {"out": str(out), "threads": THREADS}  # the command's: with others, sums are rounded otherwise


def test_stopping_inside_an_epoch_again_and_again_changes_nothing(unbroken, images, tmp_path, monkeypatch):
    """Stopped after every step and in every evaluation; in one process, as each start would take a second."""
    out = tmp_path / "run"
    monkeypatch.setattr(run_directory, "DRAW_EVERY", math.inf)
    assert train_with_stops(monkeypatch, options_of(unbroken, out), asked=2) > 15
    assert_same_run(out, unbroken[0])


def test_metrics_are_cut_back_to_the_checkpoint(unbroken, killed, tmp_path):
    """Killed between the writing of metrics.jsonl and of last.safetensors."""
    out = shutil.copytree(killed / "1", tmp_path / "run")
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


def test_a_moved_folder_is_the_same_data(unbroken, images, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupt_after(monkeypatch, 12)
    with pytest.raises(Stopped):
        train(options_of(unbroken, out))
    moved = tmp_path / "moved" / "images"
    shutil.copytree(images, moved)
    assert tinyvit("train", "--out", out, "--resume", "--data", moved).returncode == 0
    assert_same_run(out, unbroken[0])
