"""What a run shows while it trains."""

import sys

import pytest
from running import NANO


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
    from tinyvit.training import display as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    display = module.Display()
    display.start(1000, 100)
    for done in range(101, 301):
        now[0] += 1.0
        display.step(done, 3, 1.5, 0.25, 640.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0] == "epoch 3  step 130/1000  loss 1.500  accuracy 25.0%  640 images/s  14:30 left"


def test_a_long_evaluation_gets_lines_where_there_is_no_terminal(monkeypatch, capsys):
    from tinyvit.training import display as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    display = module.Display()
    display.start(1000, 100)
    for _ in range(100):
        now[0] += 1.0
        display.evaluating(3, 5000)
    assert capsys.readouterr().out.splitlines() == 3 * ["epoch 3  evaluating 5000 validation images"]
