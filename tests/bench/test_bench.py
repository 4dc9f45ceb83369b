"""The benchmarks run, say what they should, and notice wrong results. Nothing here depends on how fast anything is."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from running import environment

from tinyvit.evaluation import metrics
from tinyvit.models import registry

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import attention_bench
import attention_chart
import attention_contenders
import devices
import isolation
import peers
import train_bench
from matplotlib import image
from matplotlib.colors import to_rgb

torch.set_num_threads(1)  # the shapes are tiny

SMALL = ["--device", "cpu", "--cases", "cifar-p8", "--batches", "3", "--rounds", "1"]


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(devices.Host, "settle", 0.0)
    monkeypatch.setattr(devices.Host, "turn", 0.0)
    monkeypatch.setattr(devices.Host, "matmul_rate", lambda self, dtype: 1e11)
    monkeypatch.setattr(devices.Host, "copy_rate", lambda self: 1e10)


# --- attention_bench ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a run of all contenders on the CPU writes and prints."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "a.json"), "--plot", str(folder / "a.png")]
    said = folder / "said.txt"
    with pytest.MonkeyPatch.context() as patch, said.open("w") as file, contextlib.redirect_stdout(file):
        hurry.__wrapped__(patch)
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


@pytest.mark.parametrize("program", [attention_bench, train_bench])
def test_without_a_gpu(program, monkeypatch):
    def no_gpu(target):
        raise RuntimeError("device cuda needs CuPy")

    monkeypatch.setattr(metrics.arrays, "mover", no_gpu)
    with pytest.raises(SystemExit, match=rf"^{program.__name__}: error: [^\n]*device cuda needs CuPy[^\n]*$"):
        program.main(["--device", "cuda"])


def test_attention_on_a_cpu_is_in_float32():
    with pytest.raises(SystemExit, match="device cpu expected float32, got bfloat16"):
        attention_bench.main(["--device", "cpu", "--dtypes", "bfloat16"])


# --- train_bench ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(train_bench.CASES, "micro", ("vit_nano_patch8_32", {"num_classes": 7}, 5))
    monkeypatch.setattr(train_bench, "SETTLE", 0.0)
    monkeypatch.setattr(train_bench, "sgemm_rate", lambda: 1e11)


def test_training_on_the_cpu(nano, tmp_path, capsys):
    names = ["tinyvit", "torch", "torch bf16"]
    arguments = [
        "--device",
        "cpu",
        "--cases",
        "micro",
        "--steps",
        "3",
        "--no-memory",
        "--json",
        str(tmp_path / "t.json"),
    ]
    train_bench.main([*arguments, "--peers", *names])
    (result,) = json.loads((tmp_path / "t.json").read_text())["results"]
    assert (result["batch"], list(result["peers"])) == (5, names)
    assert result["difference"]["loss"] < 1e-6 and 0 < result["difference"]["gradients"] < 1e-4
    for row in result["peers"].values():
        for kind in ("step", "infer"):
            assert len(row[kind]["seconds"]) == 3
            assert row[kind]["images_per_second"] == pytest.approx(5 / np.median(row[kind]["seconds"]))
        training, inference = (row[kind]["gflops"] / row[kind]["images_per_second"] for kind in ("step", "infer"))
        assert training == pytest.approx(3 * inference)
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(lines) == 3 + len(names) and all("%" in line for line in lines[3:])
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines[1:]}) == 1


def test_training_peers_begin_alike_and_learn(nano):
    """The losses of the first steps agree; whoever did not update its weights would stay behind."""
    both = [train_bench.make_peer("micro", name, "cpu") for name in ("tinyvit", "torch")]
    losses = [[peer.loss() for _ in range(4)] for peer in both]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.01


def test_training_goes_on_without_a_contender_that_fails(nano, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(train_bench.PEERS, "JAX", (None, broken))
    arguments = ["--device", "cpu", "--cases", "micro", "--steps", "1", "--no-memory"]
    train_bench.main([*arguments, "--peers", "tinyvit", "JAX"])
    said = capsys.readouterr()
    assert said.err == "JAX: RuntimeError: no such thing\n"
    assert "tinyvit  " in said.out and "JAX" not in said.out.partition("machine:")[0]


def test_training_goes_on_without_a_contender_that_fails_later(nano, monkeypatch, capsys, tmp_path):
    """As where memory runs out in the third reading; what was measured until then is kept."""

    def failing(*arguments):
        peer, calls = peers.tinyvit_peer(*arguments), []

        def infer(batches, infer=peer.infer):
            calls.append(batches)
            if len(calls) == 3:
                raise MemoryError("no more of it")
            return infer(batches)

        peer.infer = infer
        return peer

    freed = []
    monkeypatch.setattr(devices.Host, "free", lambda self: freed.append(1))
    monkeypatch.setitem(train_bench.PEERS, "JAX", (None, failing))
    arguments = ["--device", "cpu", "--cases", "micro", "--steps", "2", "--no-memory", "--peers", "tinyvit", "JAX"]
    train_bench.main([*arguments, "--json", str(tmp_path / "t.json")])
    said = capsys.readouterr()
    assert said.err == "JAX: MemoryError: no more of it\n" and len(freed) == 2  # once more at the end
    (result,) = json.loads((tmp_path / "t.json").read_text())["results"]
    assert list(result["peers"]["tinyvit"]) == ["step", "infer"] and list(result["peers"]["JAX"]) == ["step"]
    lines = said.out.split("\n\n")[0].splitlines()
    assert lines[-1].startswith("JAX ") and "failed" in lines[-1]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines[1:]}) == 1


def test_training_cases_are_written_as_they_come(nano, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(train_bench.CASES, "tiny-cifar", ("no such model", {}, 5))
    written, table = [], train_bench.table
    file = tmp_path / "t.json"
    arguments = ["--device", "cpu", "--steps", "1", "--no-memory", "--peers", "tinyvit", "--json", str(file)]
    monkeypatch.setattr(train_bench, "table", lambda result: written.append(file.exists()) or table(result))
    with pytest.raises(SystemExit) as stop:
        train_bench.main([*arguments, "--cases", "micro", "tiny-cifar", "micro"])
    assert stop.value.code == 1 and written == [False, True]
    assert [r["case"] for r in json.loads(file.read_text())["results"]] == ["micro", "micro"]
    assert "tiny-cifar: " in capsys.readouterr().err


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


def test_training_memory(nano, capsys):
    train_bench.main(["--device", "cpu", "--cases", "micro", "--memory-of", "tinyvit"])
    assert 20 < float(capsys.readouterr().out) < 1 << 20  # MiB


def test_training_flops():
    """Published figures count one multiply-add as one: 17.6 G for ViT-B/16 (DeiT's table 5), 1.26 G for DeiT-Ti."""
    for name, published in (("vit_base_patch16_224", 17.58e9), ("vit_tiny_patch16_224", 1.26e9)):
        assert train_bench.flops(registry.model_config(name)) == pytest.approx(2 * published, rel=0.02)


def test_readings_on_a_gpu_are_of_many_steps():
    done = []
    peer = peers.Peer("x", lambda: done.append("s"), lambda n: done.append(f"i{n}"), None, lambda: done.append("|"))
    steps, batches = (train_bench.GPU_REPEATS[kind] for kind in ("step", "infer"))
    times = train_bench.interleave({"x": peer}, "step", 2, "cuda")
    assert "".join(done) == ("s|" + "s" * steps + "|") * 5  # three of them to warm up
    assert len(times["x"]) == 2
    done.clear()
    train_bench.interleave({"x": peer}, "infer", 1, "cuda")
    assert done == ["i1", f"i{batches}"] * 4


def test_short_steps_of_a_cpu_are_counted_only_when_they_have_run_for_a_while(monkeypatch):
    monkeypatch.setattr(train_bench, "SETTLE", 0.0)
    monkeypatch.setattr(train_bench, "UNCOUNTED", 0.1)
    pauses = iter([0.06] * 2 + [0.01] + [0.2, 0.02])  # the first two, and the third of 0.2 s, are not counted
    peer = peers.Peer("x", lambda: time.sleep(next(pauses)), None, None)
    (seconds,) = train_bench.interleave({"x": peer}, "step", 1)["x"]
    assert 0.015 < seconds < 0.1


def test_training_peers_give_the_same_logits(nano):
    ours, torchs = (train_bench.make_peer("micro", name, "cpu").infer(3) for name in ("tinyvit", "torch"))
    assert ours.shape == (15, 7)
    np.testing.assert_allclose(ours, torchs, rtol=1e-4, atol=1e-5)


def test_training_table_of_a_gpu():
    row = {kind: {"images_per_second": 117000.0, "gflops": 250e3} for kind in ("step", "infer")} | {"peak_mib": 81234.0}
    result = {"case": "tiny-cifar", "model": "m", "batch": 1024, "device": "cuda", "bf16_gflops": 790e3}
    result |= {"peers": {"tinyvit": row, "torch.compile": row}, "first_loss": {"tinyvit": 2.3, "torch.compile": 2.31}}
    lines = train_bench.table(result).splitlines()
    assert lines[0].endswith("bf16 790 TFLOP/s") and lines[-1].endswith("tinyvit 2.30000, torch.compile 2.31000")
    assert all("32%" in line and "250" in line and line.endswith("|81234") for line in lines[3:5])
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines[1:5]}) == 1


class Counter:
    """A contender of another process."""

    count = 0

    def run(self, kind, repeats=1):
        self.count += repeats

    def loss(self):
        if not self.count:
            raise ValueError("nothing done yet")
        return float(self.count)


def test_isolated_contender():
    peer = isolation.start(Counter)
    with pytest.raises(RuntimeError, match="ValueError: nothing done yet"):
        peer.loss()
    peer.run("step", 3)
    peer.run("infer")
    assert peer.loss() == 4.0
    with pytest.raises(RuntimeError, match="ended before it answered"):
        isolation.start(os._exit, 3)


# --- devices --------------------------------------------------------------------------------------------------------


class Stream:
    """Of CuPy: as far as the timing needs it."""

    def __init__(self, non_blocking):
        self.capturing, self.work = False, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        assert not self.capturing

    def begin_capture(self):
        self.capturing = True

    def end_capture(self):
        self.capturing = False
        return types.SimpleNamespace(launch=lambda stream: self.work.append("graph"))


class Event:
    clock = 0.0

    def record(self, stream):
        self.at = Event.clock = Event.clock + 1.0

    def synchronize(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    cuda = types.SimpleNamespace(Stream=Stream, Event=Event, get_elapsed_time=lambda a, b: 1e3 * (b.at - a.at))
    cuda.Device = lambda: types.SimpleNamespace(id=0, synchronize=lambda: None, attributes={"L2CacheSize": 1 << 17})
    cuda.runtime = types.SimpleNamespace(getDeviceProperties=lambda number: {"name": b"a GPU"})
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    torch_cuda = types.SimpleNamespace(empty_cache=lambda: None)
    numpy = {name: getattr(np, name) for name in ("asarray", "copyto", "empty_like", "resize")}
    cupy = types.SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool, __version__="0", **numpy)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "ml_dtypes", types.SimpleNamespace(bfloat16=np.float16))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=torch_cuda))
    monkeypatch.setattr(devices, "pick_device", lambda name: "cuda")
    return devices.Gpu()


def test_gpu_times_graphs_and_what_cannot_be_captured(gpu):
    numbers = []

    def refuses(i):
        if gpu.stream.capturing:
            raise NotImplementedError

    def fails(i):
        raise MemoryError("out of it")

    times = gpu.times({"captured": numbers.append, "refuses": refuses, "fails": fails}, sets=3, rounds=4)
    second = [1.0 / gpu.calls] * 4  # between the events, shared by the calls
    assert times["captured"] == times["refuses"] == second
    assert str(times["fails"]) == "out of it"
    assert gpu.eager == {"refuses"}
    gpu.times({"refuses": lambda i: None}, sets=1, rounds=1)  # captured this time
    assert not gpu.eager
    assert numbers == [0, 1, 2] + [i % 3 for i in range(gpu.calls)]  # to warm up, and to be captured once
    assert gpu.stream.work == ["graph"] * (6 + 3)  # two more than are counted
    assert not gpu.stream.capturing


def test_a_gpus_rate_is_that_of_the_faster_product(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "_times", lambda name, product, sets, rounds: [1.0 if product(0) == "Lt" else 2.0])
    for found, seconds in (("Lt", 1.0), (None, 2.0)):  # None: not to be had
        monkeypatch.setattr(devices.cublas, "input_gradient", lambda xp, a, b, found=found: found)
        assert gpu.matmul_rate("float32", size=1) == 2 / seconds


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax_runs_xlas_attention_where_cudnns_is_refused():
    """In a process of its own: JAX does not like others to fork."""
    program = """
import jax, peers_jax
print(peers_jax.implementation((2, 5, 3, 8), jax.numpy.bfloat16))
jax.nn.dot_product_attention = lambda q, k, v, implementation: q
print(peers_jax.implementation((2, 5, 3, 8), jax.numpy.bfloat16))
"""
    command, env = [sys.executable, "-c", program], environment(first=Path(train_bench.__file__).parent)
    result = subprocess.run(command, capture_output=True, text=True, env=env | {"JAX_PLATFORMS": "cpu"}, check=True)
    assert result.stdout.split() == ["xla", "cudnn"]
    assert result.stderr.startswith("JAX: attention is XLA's, for cuDNN's is refused (")
    assert result.stderr.count("\n") == 1


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
