"""Curves drawn as text."""

import re

import pytest
from running import NANO, assert_one_line_error, make_images, tinyvit

from tinyvit.cli import main
from tinyvit.training.progress import Progress
from tinyvit.viz.watch import CLEAR, chart

ROWS = [dict(epoch=i, train_accuracy=t, val_accuracy=v) for i, t, v in ((1, 0.25, 0.5), (2, 0.75, 0.75), (3, 1.0, 0.5))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    images = make_images(folder / "images")
    result = tinyvit("train", "--data", images, *NANO, "--epochs", 2, "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_a_chart_is_what_one_would_draw():
    """From 1 to 0.2125, lines are 0.1575 apart: 1, 0.75, 0.5 and 0.25 are on the lines 0, 2, 3 and 5."""
    assert [line.rstrip() for line in chart(ROWS, "accuracy", 24, 6, False)] == [
        "     accuracy: . training, o validation",
        "100% +              ....",
        " 80% +         ......",
        "     |    oooooooooo",
        " 60% +ooooo..      ooooo",
        " 40% + ...",
        "     |..",
        "      1                3",
    ]


def test_one_epoch_is_a_point():
    picture = chart(ROWS[:1], "accuracy", 60, 9, False)
    assert "".join(picture[1:]).count("o") == "".join(picture[1:]).count(".") == 1 and picture[-1].split() == ["1"]


@pytest.mark.parametrize("columns, lines", [(1, 1), (80, 24), (140, 50)])
def test_it_fits_and_without_a_terminal_is_drawn_once(run, monkeypatch, capsys, columns, lines):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    assert main(["watch", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown and "epoch 2/2  training loss" in shown and "\x1b" not in shown and shown.isascii()
    if columns > 1:
        *picture, _ = shown.splitlines()
        assert len(picture) < lines and max(map(len, picture)) <= columns


@pytest.mark.parametrize("no_colour", [False, True])
def test_a_terminal_is_drawn_on_until_the_run_ends(run, monkeypatch, capsys, no_colour):
    """It begins after one epoch; while it waits, the second one ends."""
    read, ended = Progress.read, []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1" if no_colour else "")
    monkeypatch.setattr("time.sleep", ended.append)

    def progress(path):
        found = read(path)
        found.finished, found.history = bool(ended), found.history[: 1 + len(ended)]
        return found

    monkeypatch.setattr(Progress, "read", progress)
    assert main(["watch", str(run)]) == 0
    nothing, first, second = capsys.readouterr().out.split(CLEAR)
    assert not nothing and "ago" in first and "epoch 1/2" in first and "finished" in second and "epoch 2/2" in second
    assert (set(re.findall(r"\x1b\[\d*m", second)) == set()) == no_colour


def test_a_terminal_waits_for_a_run_to_begin(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("time.sleep", lambda seconds: run.rename(tmp_path / "later"))
    try:
        assert main(["watch", str(tmp_path / "later")]) == 0
    finally:
        (tmp_path / "later").rename(run)
    _, first, second = capsys.readouterr().out.split(CLEAR)
    assert first.split() == f"waiting for a run to begin in {tmp_path / 'later'}".split() and "finished" in second


def test_a_terminal_does_not_wait_for_a_file_to_become_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["watch", str(tmp_path / "model.safetensors")]) == 1
    assert "there is no such directory" in capsys.readouterr().err


def test_what_cannot_be_watched(run, tmp_path, monkeypatch):
    assert "is not a run: it has no last.safetensors" in assert_one_line_error(tinyvit("watch", tmp_path), 1)
    monkeypatch.setattr(Progress, "read", lambda path: Progress())
    assert tinyvit("watch", run).stdout == "vit_nano_patch8_32 on images: no epoch has ended yet\n"
