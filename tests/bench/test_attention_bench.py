"""attention_bench runs, says what it should, and notices wrong results. Nothing here depends on speed."""

from __future__ import annotations

import contextlib
import copy
import json

import attention_bench
import attention_chart
import attention_contenders
import devices
import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb

from tinyvit import kernels
from tinyvit.kernels import reference

SMALL = ["--device", "cpu", "--cases", "cifar-p8", "--batches", "3", "--rounds", "1"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a run of all contenders on the CPU writes and prints."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "a.json"), "--plot", str(folder / "a.png")]
    said = folder / "said.txt"
    with said.open("w") as file, contextlib.redirect_stdout(file):
        everybody = ["--contenders", *attention_bench.CONTENDERS]
        attention_bench.main([*SMALL, "--cases", "cifar-p8", "cifar-p4", *everybody, *files])
    return json.loads((folder / "a.json").read_text()), said.read_text(), folder / "a.png"


def test_attention_record(record):
    written, _, _ = record
    shapes = [(r["case"], r["batch"], r["tokens"]) for r in written["results"]]
    assert shapes == [("cifar-p8", 3, 17), ("cifar-p4", 3, 65)]
    for result in written["results"]:
        for kind in ("forward", "forward_backward"):
            rows = result[kind]["contenders"]
            assert list(rows) == list(attention_bench.CONTENDERS)
            for name in ("tinyvit", "reference", "torch flash", "torch math"):
                row = rows[name]
                assert 0 < row["error"] < 1e-6
                assert row["seconds"] == np.median(row["all_seconds"]) > 0
                assert row["flops_per_second"] * row["seconds"] == pytest.approx(result[kind]["flops"])
                assert row["roofline"] * row["seconds"] == pytest.approx(result[kind]["floor_seconds"])
            for name in ("torch cudnn", "torch efficient"):  # those of GPUs alone
                assert list(rows[name]) == ["refused"] and "backend" in rows[name]["refused"]
            best = min(rows["torch flash"]["seconds"], rows["torch math"]["seconds"])
            assert result[kind]["ratio"] == pytest.approx(best / rows["tinyvit"]["seconds"])


def test_attention_tables_line_up(record):
    _, said, _ = record
    blocks = said.split("\n\n")
    tables = [b.splitlines() for b in blocks if "GFLOP/s" in b and "|" in b]
    assert len(tables) == 2 and all(len(t) == 3 + len(attention_bench.CONTENDERS) for t in tables)
    for lines in tables:
        assert max(map(len, lines)) <= 110
        assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines[1:]}) == 1
    assert blocks[-1].count(" x (") == 4  # two shapes, two kinds


def test_attention_chart(record, tmp_path):
    """The area of each contender's colour is in proportion to its rates."""
    written, _, drawn = record
    assert drawn.read_bytes().startswith(b"\x89PNG")
    written = copy.deepcopy(written)
    speeds = {name: i + 1 for i, name in enumerate(attention_bench.CONTENDERS)}
    for result in written["results"]:
        for kind in attention_bench.KINDS:
            for name, row in result[kind]["contenders"].items():
                row["flops_per_second"] = 1e10 * speeds[name]
    attention_chart.draw(written, attention_bench.TITLES, tmp_path / "chart.png")
    pixels = image.imread(tmp_path / "chart.png")[..., :3]
    colours = {name: np.array(to_rgb(colour), np.float32) for name, colour in attention_chart.COLOURS.items()}
    areas = {name: (np.abs(pixels - colour).max(-1) < 0.01).sum() for name, colour in colours.items()}
    assert areas["reference"] < areas["torch flash"] < areas["torch cudnn"] < areas["torch efficient"]
    assert areas["torch math"] / areas["torch flash"] == pytest.approx(
        speeds["torch math"] / speeds["torch flash"], rel=0.1
    )


def test_attention_notices_wrong_results_and_refusals(monkeypatch, capsys):
    def wrong(inputs, backward):
        call = attention_contenders.tinyvit_calls(inputs, backward)
        return lambda i: [part * (1.0 if backward else 1.01) for part in call(i)]

    def nan(inputs, backward):
        call = attention_contenders.tinyvit_calls(inputs, backward)
        return lambda i: [np.where(np.arange(len(part))[:, None, None] > 0, np.nan, part) for part in call(i)]

    def broken(inputs, backward):
        raise MemoryError

    for name, function in (("tinyvit", wrong), ("torch flash", nan), ("torch math", broken)):
        monkeypatch.setitem(attention_bench.CONTENDERS, name, function)
    monkeypatch.setattr(devices.parallel, "available_cores", lambda: 1)
    attention_bench.main([*SMALL, "--contenders", "tinyvit", "torch flash", "torch math"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = {name.strip(): cells for name, *cells in lines}
    assert "1.0e-02" in rows["tinyvit"][0] and "1.0e-02" not in rows["tinyvit"][1]
    assert "nan" in rows["torch flash"][0] and "nan" in rows["torch flash"][1]
    assert rows["torch math"][0].strip() == "MemoryError"


@pytest.mark.parametrize("backward", [False, True])
def test_attention_is_timed_alone(monkeypatch, backward):
    """The fastest kernel of the arrays at hand; no sums for the layer before it, which a backward pass asks for."""
    notes, best = [], kernels.best

    def operation(xp, qkv, **options):
        y, vjp = best(reference.qkv_attention, xp)(xp, qkv, **options)
        return y, lambda dy: (notes.append(kernels.notes.get()), vjp(dy))[1]

    monkeypatch.setattr(kernels, "best", lambda op, xp: operation if op is reference.qkv_attention else best(op, xp))
    inputs = attention_contenders.Inputs(2, [np.ones((1, 5, 24), np.float32)], [np.ones((1, 5, 8), np.float32)])
    (result,) = attention_contenders.CONTENDERS["tinyvit"](inputs, backward)(0)
    assert result.shape == (1, 5, 24 if backward else 8) and notes == [None] * backward


def test_attention_says_why_a_backend_refuses():
    """As torch 2.13 puts it for flash attention in float32."""
    at = " (Triggered internally at /pytorch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:1.)"
    wanted = "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got Query dtype: float"
    told = ["Memory efficient kernel not used because:", "Memory Efficient attention has been runtime disabled."]
    told += ["Flash attention kernel not used because:", wanted]
    said = [text + at for text in told]
    assert attention_bench.reason(RuntimeError("No available kernel. Aborting execution."), said) == wanted
    assert attention_bench.reason(MemoryError("first line\nsecond")) == "first line"


@pytest.mark.parametrize(
    "case, batch, forward, both",
    [("cifar-p4", 1024, (3.3e9, 103e6), (11.6e9, 308e6)), ("base-224", 256, (30.5e9, 312e6), (106.5e9, 934e6))],
)
def test_attention_work(case, batch, forward, both):
    """bf16; worked out by hand: 4 B H N^2 D and 10 B H N^2 D operations, 4 and 8 arrays of B N H D numbers."""
    config = attention_bench.CASES[case]
    assert attention_bench.work(config, batch, 2, False) == pytest.approx(forward, rel=0.01)
    assert attention_bench.work(config, batch, 2, True) == pytest.approx(both, rel=0.01)


def test_attention_cases():
    """Tokens, heads and their width, from the papers' tables."""
    shapes = {k: (c.num_tokens, c.num_heads, c.embed_dim // c.num_heads) for k, c in attention_bench.CASES.items()}
    assert shapes == {
        "cifar-p4": (65, 3, 64), "cifar-p8": (17, 3, 64), "tiny-224": (197, 3, 64), "small-224": (197, 6, 64),
        "base-224": (197, 12, 64), "large-224": (197, 16, 64), "huge-224": (257, 16, 80), "tiny-384": (577, 3, 64),
        "small-384": (577, 6, 64), "base-384": (577, 12, 64), "large-384": (577, 16, 64), "huge-378": (730, 16, 80),
    }  # fmt: skip


def test_inputs_overflow_the_cache(monkeypatch):
    monkeypatch.setattr(devices.Host, "cache", 1 << 20)
    inputs = attention_bench.make_inputs(devices.Host(), attention_bench.CASES["cifar-p8"], 2, "float32")
    assert sum(x.nbytes for x in inputs.qkvs) >= 2 << 20
    assert len({x.ctypes.data for x in inputs.qkvs}) == len(inputs.qkvs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batches", "0"], "--batches must be at least 1"),
        (["--json", "nowhere/at/all.json"], "no directory"),
        (["--cases", "vit"], "invalid choice"),
    ],
)
def test_attention_bad_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        attention_bench.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_attention_on_a_cpu_is_in_float32():
    with pytest.raises(SystemExit, match="device cpu expected float32, got bfloat16"):
        attention_bench.main(["--device", "cpu", "--dtypes", "bfloat16"])


def test_attention_results_are_written_as_they_come(monkeypatch, tmp_path):
    """Whatever stops the run after the first of two shapes."""
    shown, table = [], attention_bench.table

    def stop(result, device):
        shown.append(result)
        if len(shown) == 2:
            raise KeyboardInterrupt
        return table(result, device)

    monkeypatch.setattr(attention_bench, "table", stop)
    file = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt):
        attention_bench.main([*SMALL, "--batches", "1", "2", "--contenders", "tinyvit", "--json", str(file)])
    record = json.loads(file.read_text())
    assert [r["batch"] for r in record["results"]] == [1] and record["peaks"]["copy"] == 1e10


def test_attention_on_a_gpu(gpu, monkeypatch, tmp_path, capsys):
    """NumPy stands for CuPy, and every graph takes a second: what the script itself does on a GPU."""
    monkeypatch.setattr(devices.Gpu, "matmul_rate", lambda self, dtype: 8e14)
    monkeypatch.setattr(devices.Gpu, "copy_rate", lambda self: 4e12)
    arguments = ["--cases", "cifar-p8", "--batches", "2", "--dtypes", "float32", "float16", "--rounds", "2"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    attention_bench.main([*arguments, "--contenders", "tinyvit", "reference", *files])
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["device"], written["machine"]["gpu"]) == ("cuda", "a GPU")
    calls = max(16, len(attention_bench.make_inputs(gpu, attention_bench.CASES["cifar-p8"], 2, "float32").qkvs))
    assert [r["dtype"] for r in written["results"]] == ["float32", "float16"]
    row = written["results"][0]["forward"]["contenders"]["tinyvit"]
    assert row["all_seconds"] == [1 / calls] * 2 and not row["eager"]
    said = capsys.readouterr().out
    assert said.startswith("a GPU: copies") and "TFLOP/s   GB/s" in said and f"{1e6 / calls:9.3f}" in said
