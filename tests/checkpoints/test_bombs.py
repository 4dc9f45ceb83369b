"""Small files that ask for much: refused within seconds, in one line, in little more memory than twice their size."""

import subprocess
import sys
from pathlib import Path

import bombs
import pytest

from tinyvit.checkpoints.checkpoint import LONGEST_MESSAGE

STATUS = Path("/proc/self/clear_refs")
SECONDS, MEMORY = 10, 300_000_000  # at most; most are refused within a tenth of a second and 20 MB


def size(path):
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


@pytest.mark.skipif(not STATUS.exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("writers", bombs.WRITERS, ids=["torch", "others"])
def test_bombs(tmp_path, writers):
    """In two processes, for each takes half a second to start."""
    for write in writers:
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
    paths = sorted(tmp_path.glob("*/*"))
    command = [sys.executable, "-c", bombs.MEASURE, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.returncode, result.stdout[-500:], result.stderr[-1000:])
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths), "one line for each"
    for path, line in zip(paths, lines, strict=True):
        seconds, peak, error, message = line.split("\t")
        assert error in ("CheckpointError", "DataError"), line
        assert str(path) in message and len(message) <= LONGEST_MESSAGE, line
        assert float(seconds) < SECONDS and int(peak) < MEMORY + 2 * size(path), line
