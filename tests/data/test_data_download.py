"""Downloads against a server of our own: resumed where they broke off, checked, unpacked whole or not at all."""

import contextlib
import hashlib
import http.server
import io
import re
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from tinyvit.data import DataError, load_data
from tinyvit.data.sources import download

RECORD = 3073


def archive(escape=False):
    """A tar.gz like CIFAR-10's, of few records."""
    files = {f"data_batch_{i}.bin": np.random.default_rng(i).bytes(RECORD * 40) for i in range(1, 6)}
    files["test_batch.bin"] = np.random.default_rng(6).bytes(RECORD * 20)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            records = np.frombuffer(content, np.uint8).reshape(-1, RECORD).copy()
            records[:, 0] %= 10
            add(tar, f"cifar-10-batches-bin/{name}", records.tobytes())
        if escape:
            add(tar, "../escaped.txt", b"out of the cache")
    return out.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `cuts` are the bytes after which the connection of each next request breaks."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cuts, self.requests, self.status = content, True, [], [], 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}/cifar-10-binary.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if server.status != 200:
            self.send_error(server.status)
            return
        if start >= len(server.content):
            self.send_error(416)
            return
        rest = server.content[start:]
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: server.cuts.pop(0)] if server.cuts else rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server(archive())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    serve(monkeypatch, server)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def serve(monkeypatch, server):
    monkeypatch.setattr(download, "CIFAR10_URL", server.url)
    monkeypatch.setattr(download, "CIFAR10_MD5", hashlib.md5(server.content).hexdigest())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download_and_cache(server, tmp_path, capfd):
    cache = tmp_path / "new" / "cache"
    data = load_data("cifar10", cache_dir=cache)
    assert (len(data.train), len(data.test), len(server.requests)) == (200, 100 // 5, 1)
    assert names(cache) == ["cifar-10-batches-bin"]  # neither the archive nor a part of anything is left
    again = load_data("cifar10", cache_dir=cache)
    assert again.fingerprint == data.fingerprint and len(server.requests) == 1
    assert capfd.readouterr() == ("", "")  # no bar where there is no terminal


def test_broken_connection_is_resumed(server, tmp_path, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def bar(what, total, before, unit):
        shown.append([what, total, before])
        yield shown[-1].append

    monkeypatch.setattr(download, "bar", bar)
    server.cuts = [1000, 70_000, 0]
    assert len(load_data("cifar10", cache_dir=tmp_path).train) == 200
    assert server.requests == [None, "bytes=1000-", "bytes=71000-", "bytes=71000-"]
    size = len(server.content)
    assert [(what, total, before) for what, total, before, *_ in shown] == [
        ("cifar-10-binary.tar.gz", size, before) for before in (0, 1000, 71_000, 71_000)
    ]
    assert [before + sum(done) for _, _, before, *done in shown] == [1000, 71_000, 71_000, size]


def test_broken_download_goes_on_in_the_next_run(server, tmp_path):
    server.cuts = [1000, 1000, 1000, 1000]
    total = len(server.content)
    message = rf"the connection ended after 4,000 of {total:,} bytes; run again to go on from there; give --data DIR"
    with pytest.raises(DataError, match=message):
        load_data("cifar10", cache_dir=tmp_path)
    assert names(tmp_path) == ["cifar-10-binary.tar.gz.part"]
    assert (tmp_path / "cifar-10-binary.tar.gz.part").read_bytes() == server.content[:4000]
    server.requests.clear()
    assert len(load_data("cifar10", cache_dir=tmp_path).train) == 200
    assert server.requests == ["bytes=4000-"] and names(tmp_path) == ["cifar-10-batches-bin"]


def test_server_without_ranges(server, tmp_path):
    server.ranges, server.cuts = False, [1000, 2000]
    assert len(load_data("cifar10", cache_dir=tmp_path).train) == 200


def test_part_that_is_already_whole(server, tmp_path):
    """As after a kill between the last byte and the rename."""
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(server.content)
    assert len(load_data("cifar10", cache_dir=tmp_path).train) == 200


def test_wrong_checksum(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CIFAR10_MD5", "0" * 32)
    with pytest.raises(DataError, match=r"had the MD5 sum [0-9a-f]{32}, expected 0{32}, and was removed"):
        load_data("cifar10", cache_dir=tmp_path)
    assert names(tmp_path) == []  # so that the next run starts afresh


def test_archive_brought_by_hand(server, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(server.content)
    assert len(load_data("cifar10", cache_dir=tmp_path).train) == 200 and server.requests == []


def test_a_directory_without_batches_is_replaced(server, tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "readme.html").touch()
    assert len(load_data("cifar10", cache_dir=tmp_path).train) == 200 and len(server.requests) == 1


def test_wrong_part_is_not_kept(server, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(b"something else")
    with pytest.raises(DataError, match="had the MD5 sum"):
        load_data("cifar10", cache_dir=tmp_path)
    assert len(load_data("cifar10", cache_dir=tmp_path).train) == 200


@pytest.mark.parametrize("status", [404, 503])
def test_refusal_of_the_server(server, tmp_path, status):
    server.status = status
    with pytest.raises(
        DataError, match=rf"\Acannot fetch CIFAR-10 into {re.escape(str(tmp_path))}: HTTP Error {status}"
    ):
        load_data("cifar10", cache_dir=tmp_path)
    assert names(tmp_path) == [] and len(server.requests) == 1


def test_no_network(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError) as error:
        load_data("cifar10", cache_dir=tmp_path)
    message = str(error.value)
    assert "\n" not in message and "refused" in message
    assert message.endswith("; give --data DIR with a copy of it, or --data shapes")


def test_archive_cannot_write_outside_the_cache(server, tmp_path, monkeypatch):
    server.content = archive(escape=True)
    serve(monkeypatch, server)
    load_data("cifar10", cache_dir=tmp_path / "cache")
    assert names(tmp_path) == ["cache"] and names(tmp_path / "cache") == ["cifar-10-batches-bin"]
    assert len(names(tmp_path / "cache" / "cifar-10-batches-bin")) == 6


def test_broken_archive(server, tmp_path, monkeypatch):
    server.content = server.content[:5000]
    serve(monkeypatch, server)
    (folder := tmp_path / "cifar-10-batches-bin").mkdir()
    (folder / "notes").touch()
    with pytest.raises(DataError, match="cannot fetch CIFAR-10"):
        load_data("cifar10", cache_dir=tmp_path)
    assert names(tmp_path) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]  # nothing half unpacked
    assert names(folder) == ["notes"]  # nor lost


def test_cache_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot fetch CIFAR-10 into .*file"):
        load_data("cifar10", cache_dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "HOME/.cache/tinyvit"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/tinyvit"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "HOME/Library/Caches/tinyvit"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/tinyvit"),
        ("linux", {"TINYVIT_CACHE": "/mine", "XDG_CACHE_HOME": "/x"}, "/mine"),
        ("linux", {"TINYVIT_CACHE": "~/mine"}, "HOME/mine"),
    ],
)
def test_cache_directory(monkeypatch, platform, variables, expected):
    for name in ("TINYVIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert download.cache_directory() == Path(expected.replace("HOME", str(Path.home())))
