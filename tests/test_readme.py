"""README.md's code and commands run, and its links, paths and figures of size are right."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import tomllib

import numpy as np
import pytest
from PIL import Image
from running import NANO, ROOT, make_images, tinyvit
from test_structure import ROOMS

from tinyvit import cli, data
from tinyvit.data.sources import shapes
from tinyvit.training import run

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "bench/README.md", "tinyvit/README.md", ".github/CONTRIBUTING.md", ".github/CHANGELOG.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, text: str = README) -> list[str]:
    return [body for found, body in BLOCK.findall(text) if found == language]


def commands(block: str) -> list[list[str]]:
    """The commands of a shell block, split into words as the shell does."""
    lines = [part for line in block.splitlines() for part in line.split("#")[0].split("&&")]
    return [shlex.split(line) for line in lines if line.strip()]


COMMANDS = [command for block in blocks("sh") for command in commands(block)]
OURS = [command for command in COMMANDS if command[0] == "tinyvit"]
LONG = ("cifar10", "cuda")  # arguments of commands that download, or need a GPU


def test_there_is_something_to_test():
    assert len(blocks("python")) >= 1 and len(OURS) >= 10
    assert {command[0] for command in COMMANDS} <= {"pip", "python", "tinyvit"}


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs_as_it_stands(number, monkeypatch, tmp_path):
    """With few images, and of each epoch the first batch."""
    monkeypatch.chdir(tmp_path)  # it saves its model
    epoch = data.Loader.epoch
    monkeypatch.setattr(shapes, "TRAIN", 400)
    monkeypatch.setattr(shapes, "TEST", 40)
    monkeypatch.setattr(data.Loader, "epoch", lambda *a, **k: itertools.islice(epoch(*a, **k), 1))
    namespace: dict = {}
    exec(compile(blocks("python")[number], "README.md", "exec"), namespace)
    assert np.isfinite(float(namespace["loss"]))
    assert all(p.grad is not None for p in namespace["model"].parameters())


@pytest.mark.parametrize("command", OURS, ids=" ".join)
def test_the_command_line_takes_every_command(command):
    cli.parse(command[1:])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which IMAGES, CKPT and new.jpg are what README.md says of them."""
    place = tmp_path_factory.mktemp("readme")
    make_images(place / "IMAGES", train=5, test=2)
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(place / "new.jpg")
    result = tinyvit("train", "--data", "IMAGES", *NANO, "--epochs", 1, "--out", "CKPT", cwd=place)
    assert result.returncode == 0, result.stderr
    return place


def is_short(command: list[str]) -> bool:
    """Whether it needs no network, no GPU and no minutes."""
    return not any(word in command for word in LONG) and command != ["tinyvit", "train"]


RUNNABLE = [[c for c in commands(block) if c[0] == "tinyvit" and is_short(c)] for block in blocks("sh")]


@pytest.mark.parametrize("block", [b for b in RUNNABLE if b], ids=lambda b: " ".join(b[0][:4]))
def test_commands_run_one_after_the_other(block, place, tmp_path, monkeypatch):
    """Each block in a directory of its own, with few epochs."""
    monkeypatch.setattr(run, "EPOCHS", 2)
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    for command in block:
        result = tinyvit(*command[1:], cwd=tmp_path)
        assert result.returncode == 0, (command, result.stderr)
        assert "Traceback" not in result.stderr


def test_what_pip_installs_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {extra for found in re.findall(r"\.\[([\w,]+)\]", README) for extra in found.split(",")}
    assert wanted <= set(project["optional-dependencies"])
    for pinned in re.findall(r"torch==[\d.]+", README):
        assert pinned in project["optional-dependencies"]["test"]


def test_the_first_block_after_the_marker_is_the_test_command():
    """CI reads it from there."""
    after = README.partition("<!-- test command -->\n")[2]
    assert after.startswith("```sh\n") and "pytest" in after.splitlines()[1] and after.splitlines()[2] == "```"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    document = ROOT / name
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS[:-1])  # the changelog also names what is gone
def test_scripts_that_are_named_exist(name):
    for script in re.findall(r"(?:bench|tests)/[\w/]+\.(?:py|png)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / script).exists(), script


def test_the_map_names_every_room_in_its_order():
    text = (ROOT / "tinyvit/README.md").read_text(encoding="utf-8")
    rooms = [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^\| `(\w+(?:/|\.py))` \|", text, re.M)]
    assert rooms == [room for room in ROOMS if not room.startswith("_")]
    paths = {*re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", text)}
    within = {"formats/", "readers/", "sources/", "reference/", "cpu/", "jit/", "bf16/", "int8/", "cuda/",
              "tests/test_structure.py"}  # fmt: skip
    for path in paths - within:
        assert (ROOT / "tinyvit" / path).exists(), path


def test_line_counts():
    """Within a tenth."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    counts = {name: len((ROOT / "tinyvit" / name).read_text(encoding="utf-8").splitlines()) for name, _ in rows}
    for name, said in rows:
        assert abs(int(said) - counts[name]) <= 0.1 * counts[name], f"{name} has {counts[name]} lines"
    (total,) = re.findall(r"About ([\d,]+) lines", README)
    assert abs(int(total.replace(",", "")) - sum(counts.values())) <= 0.1 * sum(counts.values()), sum(counts.values())


def test_sizes():
    """One page, and a small picture."""
    assert len(README.encode()) < 9500
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size < 100_000


@pytest.mark.parametrize("number", range(2))
def test_the_operations_of_contributing_work(number):
    """The sketches of operations run, and their gradients are those of finite differences."""
    from tinyvit import Tensor, ops
    from tinyvit.engine.tensor import apply

    text = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    namespace: dict = {}
    exec(blocks("python", text)[number], namespace)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape) for shape in ((3, 4), (3,))][: 1 + number]
    op = namespace["atan"] if number == 0 else lambda *x: apply(namespace["scale_rows"], *x)
    tensors = [Tensor(x, requires_grad=True) for x in inputs]
    ops.sum(op(*tensors)).backward()
    for x, tensor in zip(inputs, tensors, strict=True):
        step = np.zeros_like(x)
        step.flat[1] = 1e-6
        above, below = (float(ops.sum(op(*(y + sign * step if y is x else y for y in inputs)))) for sign in (1, -1))
        assert tensor.grad.flat[1] == pytest.approx((above - below) / 2e-6, rel=1e-6)
