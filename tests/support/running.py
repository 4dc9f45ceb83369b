"""Shared by the tests of runs and of the command line: small images, and the real command in a subprocess."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from on_gpu import HAS_GPU
from PIL import Image

from tinyvit import cli
from tinyvit.backend import parallel

THREADS = parallel.available_cores()  # of a command in a process of its own
ROOT = Path(__file__).parents[2]
SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has none
COMMAND = [sys.executable, "-m", "tinyvit"]
NANO = ["--model", "vit_nano_patch8_32"]


def make_images(directory, *, train=24, test=6, size=32, noise=160, seed=0):
    """An image folder of three classes that differ in their colour, below some noise."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = directory / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, noise, (size, size, 3))
                pixels[..., channel] += 15
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return directory


def count_decoded(monkeypatch):
    """A list that grows by the source of each image that is opened from now on, in this process."""
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source, **how: (opened.append(source), original(source, **how))[1])
    return opened


def environment(first=None):
    """The environment of a command: this tinyvit, no GPU, and output at once even where it is a pipe.

    Modules in the directory `first` go before all others.
    """
    paths = [str(path) for path in (first, ROOT, os.environ.get("PYTHONPATH")) if path]
    ours = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | ours


def tinyvit(*arguments, cwd=None):
    """Run `tinyvit ARGUMENTS` to its end.

    It runs in this process, which has loaded everything already, where that makes no difference: without a GPU, and
    with the real number of cores. A traceback fails the test as it is.
    """
    words = [*map(str, arguments)]
    if HAS_GPU or "TINYVIT_TEST_THREADS" in os.environ:
        command, env = [*COMMAND, *words], environment()
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, env=env)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    with (
        contextlib.chdir(cwd or "."),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
    ):
        warnings.resetwarnings()  # those of pytest, and then Python's own: deprecations are not shown
        warnings.simplefilter("ignore", DeprecationWarning)
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the command changes it
        patch.setattr(warnings, "showwarning", lambda *given: err.write(warnings.formatwarning(*given[:4])))
        try:
            status = cli.main(words)
        except SystemExit as end:  # --help, --version
            status = end.code or 0
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err) if stream.flush() is None)
    return SimpleNamespace(returncode=status, stdout=out, stderr=err)


def start(*arguments, cwd=None):
    """Start `tinyvit ARGUMENTS` in the background."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment()
    )


def wait_until(process, reached, timeout=60):
    """Wait until `reached()`, which is to be while the process runs."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert process.poll() is None, f"ended before it could be stopped: {process.communicate()}"
        assert time.monotonic() < deadline, "did not get there in time"
        time.sleep(0.005)


def stop_when(process, reached, signum=SIGKILL, timeout=60):
    """Send the process a signal once `reached()`; returns its output and errors."""
    wait_until(process, reached, timeout)
    process.send_signal(signum)
    return process.communicate(timeout=timeout)


def assert_one_line_error(result, status):
    """The command failed with this status and exactly one line on standard error. Returns the message."""
    assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
    assert result.stderr.startswith("tinyvit: error: "), result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    return result.stderr.removeprefix("tinyvit: error: ").strip()
