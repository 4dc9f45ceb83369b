"""train_bench runs, says what it should, and goes on without a contender that fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import devices
import isolation
import numpy as np
import peers
import pytest
import train_bench
from running import environment

from tinyvit.kernels import int8
from tinyvit.models import registry


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(train_bench.CASES, "micro", ("vit_nano_patch8_32", {"num_classes": 7}, 5))
    monkeypatch.setattr(train_bench, "SETTLE", 0.0)
    monkeypatch.setattr(train_bench, "UNCOUNTED", 0.0)
    monkeypatch.setattr(train_bench, "sgemm_rate", lambda: 1e11)


def test_training_on_the_cpu(nano, tmp_path, capsys):
    names = ["tinyvit", "torch", "torch bf16"]
    options = ["--device", "cpu", "--cases", "micro", "--steps", "3", "--no-memory", "--json"]
    arguments = [*options, str(tmp_path / "t.json")]
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


@pytest.mark.parametrize("name", sorted(train_bench.ONLY_INFER))
def test_contenders_that_only_infer_give_tinyvit_s_logits(nano, name, capsys, monkeypatch):
    if not importlib.util.find_spec(train_bench.PEERS[name][0] or "numba"):
        pytest.skip(f"{train_bench.PEERS[name][0]} is not installed")
    if name == "tinyvit int8":
        monkeypatch.setenv("TINYVIT_JIT", "1")
        if not int8.available():
            pytest.skip("this processor has no instructions for products of bytes")
    theirs, ours = (train_bench.make_peer("micro", peer, "cpu").infer(2) for peer in (name, "tinyvit"))
    assert np.abs(theirs - ours).max() < (0.05 if name.endswith(("bf16", "int8")) else 1e-5) and len(theirs) == 10
    train_bench.main(["--device", "cpu", "--cases", "micro", "--steps", "1", "--no-memory", "--peers", name])
    row = capsys.readouterr().out.split("\n\n")[0].splitlines()[-1].split("|")
    assert row[0].strip() == name and not row[1].strip() and "%" in row[2]


def test_a_disturbed_measurement_is_said(nano, monkeypatch, capsys):
    rates = iter([1e11, 0.7e11, 1e11])
    monkeypatch.setattr(train_bench, "sgemm_rate", lambda: next(rates))
    train_bench.main(["--device", "cpu", "--cases", "micro", "--steps", "1", "--no-memory", "--peers", "tinyvit"])
    assert capsys.readouterr().err == (
        "micro: a matrix product ran at 70 to 100 GFLOP/s: other processes disturb this measurement\n"
    )


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
