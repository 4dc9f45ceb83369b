"""What is written to: a new file, the one that a link leads to, a pipe."""

import os
import sys
import threading
from pathlib import Path

import pytest

from tinyvit.errors import UsageError
from tinyvit.files.atomic import check_output, write_text

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, there):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "table.csv", tmp_path / "link"
    link.symlink_to("second")
    (tmp_path / "second").symlink_to("far/table.csv")
    if there:
        target.write_text("old")
    check_output("--out", link)
    write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "second").is_symlink() and not target.is_symlink()
    assert target.read_text() == "new" and os.listdir(tmp_path / "far") == ["table.csv"]
    (tmp_path / "lost").symlink_to("nowhere/table.csv")
    with pytest.raises(UsageError, match=r"--out .*lost: there is no directory .*nowhere"):
        check_output("--out", tmp_path / "lost")


def test_a_pipe_is_written_to_straight(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        read = []
        reader = threading.Thread(target=lambda read=read: read.append(pipe.read_text()), daemon=True)
        reader.start()
        check_output("--out", path)
        write_text(path, "rows")
        reader.join(10)
        assert read == ["rows"] and pipe.is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_open_file_is_not_replaced_under_who_writes_to_it(tmp_path):
    refusal = r"--out /dev/fd/\d+ is the open file .*out.txt, expected a file or a pipe of its own"
    with open(tmp_path / "out.txt", "w") as file, pytest.raises(UsageError, match=refusal):
        check_output("--out", Path(f"/dev/fd/{file.fileno()}"))
