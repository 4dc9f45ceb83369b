"""What a run shows while it trains."""

import sys
import time

import pytest
from running import NANO

from tinyvit.training import display
from tinyvit.training.run import train
from tinyvit.training.trainer import Trainer


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


def test_a_line_says_how_far_a_long_epoch_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = display.Display()
    shown.start(1000, 100)
    now[0] = display.SILENCE
    shown.step(130, 3, 1.5, 0.25, 640.0)
    printed = ""
    with shown:
        while not printed:
            printed = capsys.readouterr().out
    assert printed == "epoch 3  step 130/1000  loss 1.500  accuracy 25.0%  640 images/s  14:30 left\n"


def test_silence_ends_whatever_takes_long(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(display, "SILENCE", 0.001)
    monkeypatch.setattr(Trainer, "end_epoch", slowly(Trainer.end_epoch))
    given = {"data": str(images), "model": "vit_nano_patch8_32", "epochs": 1, "device": "cpu"}
    train({**given, "out": str(tmp_path / "run")})
    lines = capsys.readouterr().out.splitlines()
    began = {line.split("  loss")[0] for line in lines}
    assert {f"reading {images}", "epoch 1  step 0/8", "epoch 1  evaluating 18 validation images"} <= began
    time.sleep(0.01)
    assert not capsys.readouterr().out, "nothing is said once the run is over"


def slowly(function):
    """The function, and a while after it."""
    return lambda *arguments: (function(*arguments), time.sleep(0.01))[0]
