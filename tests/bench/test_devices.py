"""How calls are timed on a CPU and a GPU, and which device a benchmark takes."""

from __future__ import annotations

import os

import attention_bench
import devices
import pytest
import train_bench


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


@pytest.mark.parametrize("program", [attention_bench, train_bench])
def test_without_a_gpu(program, monkeypatch):
    def no_gpu(target):
        raise RuntimeError("device cuda needs CuPy")

    monkeypatch.setattr("tinyvit.backend.devices.mover", no_gpu)
    with pytest.raises(SystemExit, match=rf"^{program.__name__}: error: [^\n]*device cuda needs CuPy[^\n]*$"):
        program.main(["--device", "cuda"])


@pytest.mark.parametrize("visible, name, seen", [(None, "cuda:2", "2"), ("5,7", "cuda:1", "7")])
def test_one_of_several_gpus_is_chosen(gpu, monkeypatch, visible, name, seen):
    """For all libraries and all processes that are started later."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    assert devices.choose(name).name == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RuntimeError, match="no GPU cuda:1"):
        devices.choose("cuda:1")


@pytest.mark.parametrize("arguments", [["--device", "gpu"], ["--cases", "vit"], ["--nothing"]])
@pytest.mark.parametrize("program", [attention_bench, train_bench])
def test_bad_usage_is_one_line(program, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"{program.__name__}: error: ") and said.count("\n") == 1
