"""How far long work is, on a terminal and elsewhere."""

import io
import os
import sys
import time

import numpy as np
import pytest
from running import NANO, make_images

from tinyvit.cli import main
from tinyvit.data import load_data
from tinyvit.data.sources import listing, shapes
from tinyvit.distributed import Group
from tinyvit.evaluation.metrics import progress
from tinyvit.files import bar


def shown_within(read):
    """What is shown after 4 of 10 images, and after all."""
    with bar.bar("images", 10) as done:
        done(3)
        done(1)
        deadline = time.monotonic() + 10
        while " 4/10 " not in (text := read()):
            assert time.monotonic() < deadline, text
    return text, read()


@pytest.mark.parametrize("columns", [0, 50])
def test_a_terminal_gets_a_bar_that_vanishes(monkeypatch, columns):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(terminal, "fileno", lambda: 2)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns, 0)))
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(bar, "INTERVAL", 60)  # a busy machine may stand still for a second
    with bar.bar("images", 10) as done:
        done(10)
    assert terminal.getvalue() == "", "nothing for what is soon over"
    monkeypatch.setattr(bar, "INTERVAL", 0.01)
    text, whole = shown_within(terminal.getvalue)
    assert text.startswith("\rimages: ") and "\n" not in whole
    assert whole.split("\r")[-2:] == [" " * ((columns or 100) - 1), ""]


def test_a_file_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar.bar("images", 10) as done:
        done(10)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(bar, "SILENCE", 0.01)
    with bar.bar("nothing", 0):
        time.sleep(0.1)
    assert sys.stderr.getvalue() == ""
    _, whole = shown_within(sys.stderr.getvalue)
    assert all(line.startswith("images: ") for line in whole.splitlines()) and whole.endswith("\n")


@pytest.mark.parametrize("total, part", [(3000, " 1.50k/3.00k "), (None, "1.50kB ")])
def test_bytes_go_on_where_they_were(monkeypatch, capsys, total, part):
    monkeypatch.setattr(bar, "SILENCE", 0.001)
    with bar.bar("file", total, before=500, unit="B") as done:
        done(1000)
        time.sleep(0.3)
    assert part in (shown := capsys.readouterr().err) and "B/s" in shown


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("bar")
    make_images(home / "images", train=8)
    assert main(["train", "--data", str(home / "images"), *NANO, "--epochs", "1", "--out", str(home / "run")]) == 0
    return home


@pytest.mark.parametrize(
    "options",
    [
        ["eval", "run", "--data", "images"],
        ["eval", "run", "--data", "images", "--probe", "knn", "--json"],
        ["predict", "run", "images/test"],
        ["predict", "run", "images/test/red", "--attention", "attention", "--json"],
        ["report", "run"],
    ],
)
def test_commands_show_it_beside_the_same_output(home, monkeypatch, capsys, options):
    monkeypatch.chdir(home)
    assert main(options) == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    monkeypatch.setattr(bar, "SILENCE", 0.0001)
    assert main(options) == 0
    found = capsys.readouterr()
    assert found.out == plain.out and "images: " in found.err
    assert ("attention: " in found.err) == ("--attention" in options)


def test_drawing_and_reading_show_it(home, monkeypatch, capsys):
    def slowed(function):
        return lambda *inputs: (time.sleep(0.02), function(*inputs))[1]

    monkeypatch.setattr(bar, "SILENCE", 0.0001)
    monkeypatch.setattr(shapes, "draw_class", slowed(shapes.draw_class))
    monkeypatch.setattr(listing, "open_rgb", slowed(listing.open_rgb))
    shapes.draw(400, (32, 32), np.random.default_rng(0))
    assert "drawing shapes: " in (shown := capsys.readouterr().err) and "/400 " in shown
    load_data(home / "images")
    assert "reading train: " in (shown := capsys.readouterr().err) and "/24 " in shown


def test_the_first_of_several_processes_shows_it(monkeypatch, capsys):
    monkeypatch.setattr(bar, "SILENCE", 0.001)
    for rank in (0, 1):
        group = Group()
        group.rank, group.size = rank, 2
        with progress(group, range(7), range(4)) as done:
            done(2)
            time.sleep(0.1)
        found = capsys.readouterr().err
        assert ("| 2/5 " in found) == (rank == 0) and (rank == 0 or not found)
        load_data("shapes", image_size=8, group=group)
        assert ("drawing shapes: " in capsys.readouterr().err) == (rank == 0)
