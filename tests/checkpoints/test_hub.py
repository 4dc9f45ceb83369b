"""Checkpoints by name, from a server on this machine that answers as the Hugging Face hub does."""

import hashlib
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from reference_models import build
from running import COMMAND, environment

import tinyvit
from tinyvit.checkpoints import hub
from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.formats import WRITERS
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.checkpoints.native_file import save_model
from tinyvit.models.preprocessing import Preprocessing

SHA = {"main": "1" * 40, "v2": "2" * 40}


class Hub(BaseHTTPRequestHandler):
    """`files` by revision; `break_off` ends the first download of the weights after so many bytes."""

    files: ClassVar[dict] = {}
    break_off = 0
    ranges: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def send(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def answer(self, body):
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        names = {sha: revision for revision, sha in SHA.items()}
        if parts[:4] == ["api", "models", "owner", "vit"]:
            revision = parts[5] if parts[4:5] == ["revision"] else parts[5] if parts[4:5] == ["tree"] else "main"
            revision = names.get(revision, revision)
            if revision not in self.files:
                self.wfile.write(self.send(404, b"{}", X_Error_Code="RevisionNotFound"))
                return
            found = self.files[revision]
            if parts[4:5] == ["tree"]:
                content = [
                    {"type": "file", "path": name, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                    for name, x in found.items()
                ]
            else:
                content = {"id": "owner/vit", "sha": SHA[revision], "siblings": [{"rfilename": name} for name in found]}
            text = self.send(200, json.dumps(content).encode(), Content_Type="application/json")
        elif parts[:3] == ["owner", "vit", "resolve"]:
            revision, name = names.get(parts[3], parts[3]), "/".join(parts[4:])
            content = self.files.get(revision, {}).get(name)
            if content is None:
                self.wfile.write(self.send(404, X_Error_Code="EntryNotFound"))
                return
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": SHA[revision]}
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if body and start:
                type(self).ranges.append(start)
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            text = self.send(206 if start else 200, content[start:], Accept_Ranges="bytes", **headers)
            if body and self.break_off and name.endswith(".safetensors"):
                text, type(self).break_off = text[: self.break_off], 0
                self.wfile.write(text)
                self.connection.close()
                return
        else:
            text = self.send(404, b"{}", X_Error_Code="RepoNotFound")
        if body:
            self.wfile.write(text)


@pytest.fixture
def server(tmp_path, monkeypatch):
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{httpd.server_port}"
    import huggingface_hub.constants as constants

    for module_name, value in (("ENDPOINT", endpoint), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setattr(constants, module_name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which other tests turn on
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "ranges", [])
    monkeypatch.setattr(Hub, "files", {})
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def directory(tmp_path, seed):
    """A Hugging Face directory of a small model, as a dictionary of its files, and the model."""
    model = build(embed_dim=32, num_heads=2, depth=1 + seed)
    model.class_names, model.preprocessing = (), Preprocessing((0.5,) * 3, (0.5,) * 3)
    save_model(model, tmp_path / f"{seed}.safetensors")
    WRITERS["huggingface"](open_checkpoint(tmp_path / f"{seed}.safetensors"), tmp_path / f"hf{seed}")
    return {path.name: path.read_bytes() for path in (tmp_path / f"hf{seed}").iterdir()}, model


def test_a_model_by_name_and_by_revision(server, tmp_path, monkeypatch):
    Hub.files["main"], newest = directory(tmp_path, 0)
    Hub.files["v2"], other = directory(tmp_path, 1)
    Hub.files["main"]["pytorch_model.bin"] = b"not to be fetched"
    for name, expected in (
        ("hf:owner/vit", newest),
        ("hf:owner/vit@v2", other),
        (f"hf:owner/vit@{SHA['main']}", newest),
    ):
        state = tinyvit.load_model(name).state_dict()
        for key, array in expected.state_dict().items():
            assert np.array_equal(state[key], array), (name, key)
    assert not list((tmp_path / "cache").rglob("*.bin"))
    server.shutdown()  # what is in the cache needs no network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert np.array_equal(
        tinyvit.load_model("hf:owner/vit").state_dict()["pos_embed"], newest.state_dict()["pos_embed"]
    )
    with pytest.raises(CheckpointError, match="not in the cache, and the hub cannot be reached"):
        tinyvit.load_model("hf:owner/absent")


def test_a_broken_download_is_continued(server, tmp_path, monkeypatch):
    Hub.files["main"], model = directory(tmp_path, 0)
    monkeypatch.setattr(Hub, "break_off", 20_000)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    state = tinyvit.load_model("hf:owner/vit").state_dict()
    assert Hub.ranges == [20_000]
    assert np.array_equal(state["head.weight"], model.state_dict()["head.weight"])


def test_what_is_not_there_is_one_line_with_the_cure(server, tmp_path, monkeypatch):
    Hub.files["main"] = {"config.json": b"{}", "README.md": b"x"}
    for name, message in (
        ("hf:owner/vit", "it has no weights that are named model.safetensors or pytorch_model.bin"),
        ("hf:owner/vit@v9", "hf:owner/vit@v9: .*"),
        ("hf:owner/other", "hf:owner/other: .*"),
        ("hf:not a name", "hf:not a name: .*"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            tinyvit.load_model(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "tinyvit\[hub\]"'):
        hub.fetch("hf:owner/vit")


def test_the_command_line(server, tmp_path):
    Hub.files["main"], _ = directory(tmp_path, 0)
    for arguments in (
        ["summary", "hf:owner/vit"],
        ["convert", "hf:owner/vit", str(tmp_path / "ours"), "--to", "tinyvit"],
    ):
        result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment(), timeout=60)
        assert result.returncode == 0, result.stderr
    assert open_checkpoint(tmp_path / "ours").config.embed_dim == 32
