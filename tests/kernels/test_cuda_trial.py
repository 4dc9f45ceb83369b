"""Kernels are tried in a process of their own before they are used. Children and kernels are stand-ins here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import cuda_sim
import numpy as np
import pytest
from cuda_checks import check, draw

from tinyvit.backend import cuda_graph
from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import attention, attention_sm90a, attention_trial, comparison, trial

HOPPER = {"capability": 90, "shared_limit": 227 << 10, "multiprocessors": 1}
NAMES = ("forward", "backward")

needs_simulator = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")

# --- the child and what is kept of it ---------------------------------------------------------------------------------

FORWARD, BACKWARD = (f"print('tinyvit trial: ' + {found!r}, flush=True); " for found in (
    '["forward", null]', '["backward", "dq differs"]'
))  # fmt: skip
GOOD = FORWARD + BACKWARD
HANG = "import time; time.sleep(60)"
CHILDREN = {  # what they do, what is then said of the backward kernel, whether that is kept
    "good": (GOOD, "dq differs", True),
    "chatty": (f"print('found [what a library prints'); print('tinyvit trial: [\"forw'); {GOOD}", "dq differs", True),
    "crash at its end": (f"{GOOD}import os; os.abort()", "dq differs", True),
    # these say nothing of the kernels
    "crash": (f"{FORWARD}import os; os.abort()", "their trial ended with status -6", False),
    "hang": (FORWARD + HANG, "their trial did not end within 1 s", False),
    "stuck": (FORWARD + HANG, "their trial did not end within 1 s", False),
    "silent": ('sys.stderr.write("\\n"); sys.exit(3)', "their trial ended with status 3", False),
    "no memory": ('raise MemoryError("1 GiB")', "their trial ended with status 1 (MemoryError: 1 GiB)", False),
}  # fmt: skip


@pytest.fixture
def children(tmp_path, monkeypatch):
    """Writes what a child does; the request that each one got, in their order."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_gpu", lambda: ("0000:17:00.0", "H100", 90, 13000, [13, 0], "14.0"))
    begin = f"import sys; open({str(tmp_path / 'requests')!r}, 'a').write(sys.argv[1] + '\\n'); "

    def write(text: str) -> None:
        (tmp_path / "child_of_a_test.py").write_text(begin + text)

    def requests() -> list:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
        return []

    return SimpleNamespace(write=write, requests=requests, cache=tmp_path / "cache")


def find(names=NAMES, n=197, sources=("a", "b")):
    return trial.verdicts("child_of_a_test", names, {"n": n}, sources)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("kind", CHILDREN)
def test_what_children_find(children, monkeypatch, kind):
    text, problem, is_kept = CHILDREN[kind]
    if HANG in text:
        monkeypatch.setattr(trial, "SECONDS", 1)
    if kind == "stuck":  # in the driver
        monkeypatch.setattr(trial, "KILL_WAIT", 0.1)
        monkeypatch.setattr(subprocess.Popen, "kill", lambda child: stuck.append(child.pid))
    children.write(text)
    start, stuck = time.monotonic(), []
    assert find() == {"forward": None if FORWARD in text else problem, "backward": problem}
    again = find()["backward"]
    assert time.monotonic() - start < 30
    for pid in stuck:
        os.kill(pid, signal.SIGKILL)
    assert again.startswith(problem) and again.endswith(".json says: delete it to try again") == is_kept
    assert children.requests() == [{"gpu": "0000:17:00.0", "n": 197}] * (1 if is_kept else 2)


def test_what_is_kept_is_of_one_machine_and_one_text(children, monkeypatch):
    children.write(GOOD)
    find(), find()
    assert len(children.requests()) == 1
    find(n=577), find(sources=("a", "c"))
    assert len(children.requests()) == 3
    machines = ("0000:65:00.0", "H200", 91, 13010, [13, 1], "14.1")
    for i, value in enumerate(machines):  # the same card elsewhere is the same
        machine = ["0000:17:00.0", "H100", 90, 13000, [13, 0], "14.0"]
        machine[i] = value
        monkeypatch.setattr(trial, "_gpu", lambda machine=machine: tuple(machine))
        find()
        assert len(children.requests()) == 3 + i
    monkeypatch.setattr(cuda, "OPTIONS", ("-std=c++20",))
    find()
    assert len(children.requests()) == 9


def test_a_child_finds_what_its_parent_finds(children, monkeypatch, tmp_path):
    """Also by a path that is no string; and what lies beside the package does not stand before the standard library."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/module_of_a_test.py").touch()
    (tmp_path / "beside/tinyvit/kernels").mkdir(parents=True)
    (tmp_path / "beside/argparse.py").write_text("raise RuntimeError('a backport')")
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path / "elsewhere"])
    monkeypatch.setattr(cuda, "FOLDER", tmp_path / "beside/tinyvit/kernels/cuda")
    children.write(f"import argparse, module_of_a_test; {GOOD}")
    assert find() == {"forward": None, "backward": "dq differs"}


def test_the_first_process_says_that_it_tries(children, monkeypatch, capsys):
    children.write(GOOD)
    for rank in (0, 1):
        monkeypatch.setattr(trial, "launched", lambda rank=rank: ("WORLD_SIZE", 2, rank))
        find(n=rank)
        assert capsys.readouterr().err.count("trying kernels on this GPU, once: at most 90 seconds\n") == 1 - rank


@pytest.mark.parametrize("text", ["", "{", "[]", '{"forward": null}', '{"forward": null, "backward": 3}', "\udcff"])
def test_damaged_files_are_written_anew(children, text):
    children.write(GOOD)
    right = find()
    (file,) = children.cache.iterdir()
    whole = file.read_text()
    file.write_text(text, errors="surrogateescape")
    assert find() == right and file.read_text() == whole and len(children.requests()) == 2


def test_processes_that_try_at_once_decide_alike(children, monkeypatch):
    """By the verdict that was kept first: of times, one's may differ."""
    children.write(GOOD)
    find()
    (file,) = children.cache.iterdir()
    kept = file.read_text()
    file.unlink()

    def try_longer(*_):
        file.write_text(kept)
        return {"forward": "it is slower", "backward": None}, ""

    monkeypatch.setattr(trial, "_try", try_longer)
    found = find()
    assert found["forward"] is None and found["backward"].startswith("dq differs") and file.read_text() == kept


def test_without_a_place_to_keep_it_each_process_tries(children, monkeypatch):
    children.write(GOOD)
    children.cache.write_text("a file")
    assert find() == find() == {"forward": None, "backward": "dq differs"}
    assert len(children.requests()) == 2


def test_without_an_interpreter_nothing_is_used(children, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(children.cache / "python"))
    assert all(problem.startswith("their trial did not begin") for problem in find().values())
    assert not children.cache.exists()


# --- attention for Hopper ---------------------------------------------------------------------------------------------


def problems(folder, backward=True):
    with cuda_sim.device(folder, **HOPPER) as xp:
        return dict(attention_trial.problems(xp, scalar="f16", n=130, queries=70, dim=32, backward=backward))


@needs_simulator
def test_the_child_runs_the_kernels_on_the_device_that_it_is_told(folder, children, monkeypatch):
    """From `takes` to the verdict, on the simulator."""
    monkeypatch.setattr(attention_sm90a, "_verdicts", {})
    code = f"""
import contextlib
from pathlib import Path
from types import SimpleNamespace
import cuda_sim
from tinyvit.kernels.cuda import attention_trial, comparison
with contextlib.ExitStack() as stack:
    use = lambda: stack.enter_context(cuda_sim.device(Path({str(folder)!r}), **{HOPPER}))
    devices = {{"0000:17:00.0": SimpleNamespace(use=use)}}
    device = SimpleNamespace(from_pci_bus_id=devices.__getitem__)
    sys.modules["cupy"] = SimpleNamespace(cuda=SimpleNamespace(Device=device))
    sys.modules["array_api_compat.cupy"] = cuda_sim.Namespace()
    comparison.main(attention_trial.problems)
"""
    children.write(code)
    verdicts_in = trial.verdicts
    monkeypatch.setattr(trial, "verdicts", lambda module, *rest: verdicts_in("child_of_a_test", *rest))
    with warnings.catch_warnings(), cuda_sim.device(folder, **HOPPER):
        warnings.simplefilter("error")
        for _ in range(2):
            for backward in (False, True):
                qkv = np.zeros((1, 130, 3 * 2 * 32), np.float16)
                assert attention_sm90a.takes(qkv, cuda.NULL, 2, 70, backward)
    shape = {"scalar": "f16", "n": 130, "queries": 70, "dim": 32, "backward": True}
    assert children.requests() == [{"gpu": "0000:17:00.0"} | shape]


@needs_simulator
def test_a_trial_fills_the_gpu(folder, monkeypatch):
    heads, original = [], attention_sm90a.backward

    def backward(xp, qkv, factors, num_heads, *rest):
        heads.append(len(qkv) * num_heads)
        return original(xp, qkv, factors, num_heads, *rest)

    monkeypatch.setattr(attention_sm90a, "backward", backward)
    assert problems(folder) == {"forward": None, "backward": None}
    assert len(heads) == 2 and all(5 <= count < 9 for count in heads)  # on one multiprocessor
    monkeypatch.setattr(attention_trial, "MOST_BYTES", 6 * 130 * 3 * 32)  # many tokens: no more than fit
    heads.clear()
    assert problems(folder) == {"forward": None, "backward": None} and heads == [3, 3]


FAULTS = [
    "y", "logarithms", "the second tile of a block", "nan", "now and then", "refused",
    "dq", "dk", "dv", "sum of dq", "sum of dk", "sum of dv", "sum is nan",
]  # fmt: skip


@pytest.fixture(scope="module")
def remembered():
    """`attention.mma_forward` and `mma_backward` that compute the same only once."""
    known = {}

    def once(function):
        def call(xp, *given):
            key = function, *((x.tobytes(), x.shape) if isinstance(x, np.ndarray) else x for x in given)
            if key not in known:
                known[key] = function(xp, *given)
            return tuple(np.copy(x) for x in known[key])

        return call

    return once(attention.mma_forward), once(attention.mma_backward)


@needs_simulator
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(folder, monkeypatch, remembered, fault):
    """Each in one row, or in one number of float32; the other kernels stand for Hopper's."""
    calls = []
    monkeypatch.setattr(attention, "mma_forward", remembered[0])
    monkeypatch.setattr(attention, "mma_backward", remembered[1])

    def forward(*arguments):
        y, row_log = attention.mma_forward(*arguments[:7])
        calls.append(arguments[7])
        if fault == "refused":
            raise type("CompileException", (Exception,), {})("no such instruction\nmore")
        if fault == "y":
            y[-1, 66, 32:64] *= 1.05
        if fault == "logarithms":
            row_log[-1, -1, -1] += 1e-2
        if fault == "the second tile of a block" and arguments[7] == attention_sm90a.MANY:
            y[0, 64:] = 0
        if fault == "nan":
            y[0, 7, 5] = np.nan
        if fault == "now and then" and len(calls) == 2:
            y.view(np.uint16)[0, 0, 0] ^= 1
        return y, row_log

    def backward(*arguments):
        dqkv, sums = attention.mma_backward(*arguments)
        if fault in ("dq", "dk", "dv"):
            dqkv.reshape(-1, 130, 3, 3, 32)[-1, 69, ("dq", "dk", "dv").index(fault), -1] *= 1.05
        if fault.startswith("sum of"):  # by a hundredth of what it adds up
            column = 96 * ("dq", "dk", "dv").index(fault[-2:]) + 7
            sums[-1, column] += 0.01 * np.abs(dqkv[-1, :, column].astype(np.float32)).sum()
        if fault == "sum is nan":
            sums[0, 0] = np.nan
        return dqkv, sums

    monkeypatch.setattr(attention_sm90a, "forward", forward)
    monkeypatch.setattr(attention_sm90a, "backward", backward)
    named = {
        "logarithms": "a logarithm differs", "the second tile of a block": "y differs", "nan": "y differs by nan",
        "now and then": "y is not the same twice", "refused": "CompileException: no such instruction",
        "sum is nan": "a sum differs by nan", **dict.fromkeys(FAULTS[-4:-1], "a sum differs by"),
    }  # fmt: skip
    found = problems(folder)
    is_backward = fault in FAULTS[6:]
    assert found.pop("backward" if is_backward else "forward").startswith(named.get(fault, f"{fault} differs"))
    assert [*found.values()] == [None]
    assert is_backward is False or {1, attention_sm90a.MANY} == {*calls}


@needs_simulator
def test_after_a_wrong_address_there_is_a_verdict_on_both(folder, monkeypatch):
    said = "cudaErrorIllegalAddress: an illegal memory access was encountered"

    def dead(*arguments):
        raise type("CUDARuntimeError", (RuntimeError,), {})(said)

    monkeypatch.setattr(attention_sm90a, "forward", dead)
    monkeypatch.setattr(attention, "mma_backward", dead)
    assert problems(folder) == dict.fromkeys(NAMES, f"CUDARuntimeError: {said}")


ERRORS = {  # as CuPy names and words them; whether the kernel is at fault
    ("CompileException", "/tmp/x.cu(12): error: expected a ';'\n1 error"): True,
    ("CUDADriverError", "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"): True,
    ("CUDARuntimeError", "cudaErrorMisalignedAddress: misaligned address"): True,
    ("CUDARuntimeError", "cudaErrorIllegalInstruction: an illegal instruction was encountered"): True,
    ("CUDARuntimeError", "cudaErrorInvalidPc: invalid program counter"): True,
    (
        "CUDADriverError",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE: operation not supported on global/shared address space",
    ): True,
    ("CUDADriverError", "CUDA_ERROR_HARDWARE_STACK_ERROR: hardware stack error"): True,
    ("CUDADriverError", "CUDA_ERROR_INVALID_VALUE: invalid argument"): False,
    ("CUDARuntimeError", "cudaErrorLaunchFailure: unspecified launch failure"): True,
    ("CUDADriverError", "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"): True,
    ("CUDADriverError", "CUDA_ERROR_LAUNCH_TIMEOUT: the launch timed out and was terminated"): True,
    ("CUDADriverError", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested for launch"): True,
    ("OutOfMemoryError", "Out of memory allocating 268,435,456 bytes"): False,
    ("CUDADriverError", "CUDA_ERROR_OUT_OF_MEMORY: out of memory"): False,
    ("CUDARuntimeError", "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable"): False,
    ("CUDARuntimeError", "cudaErrorECCUncorrectable: uncorrectable ECC error encountered"): False,
    ("OSError", "[Errno 28] No space left on device"): False,
    ("MemoryError", "1 GiB"): False,
}


@pytest.mark.parametrize("name, text", ERRORS)
def test_only_the_kernels_own_errors_are_verdicts(name, text):
    def run():
        raise type(name, (Exception,), {})(text)

    if ERRORS[name, text]:
        assert comparison.problem(np, run) == f"{name}: {text}".splitlines()[0]
    else:
        with pytest.raises(Exception, match=re.escape(text)):
            comparison.problem(np, run)


# --- what becomes of it -----------------------------------------------------------------------------------------------


@pytest.fixture
def found(monkeypatch):
    """What a trial finds; and which were made."""
    state = SimpleNamespace(problems=dict.fromkeys(NAMES), tried=[], sources=[])

    def find(module, names, request, sources):
        state.tried.append((names, request["n"], request["dim"]))
        state.sources = sources
        return {name: state.problems[name] for name in names}

    monkeypatch.setattr(attention_sm90a, "_verdicts", {})
    monkeypatch.setattr(trial, "verdicts", find)
    return state


@needs_simulator
@pytest.mark.parametrize("wrong", [(), ("forward",), ("backward",), NAMES])
def test_kernels_for_hopper_that_are_wrong_are_not_used(folder, found, monkeypatch, wrong):
    """One warning, and the other kernels' results."""
    used = set()

    def launched(file, name, **constants):
        used.add(file)
        return cuda_sim._kernel(folder, file, name, tuple(constants.items()))

    found.problems |= dict.fromkeys(wrong, "it is wrong")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(folder, "qkv_attention", "bf16", [draw(0, (1, 130, 3 * 2 * 32))], {"num_heads": 2}, **HOPPER)  # twice
        with cuda_sim.device(folder, **HOPPER) as xp, monkeypatch.context() as patch:
            patch.setattr(cuda, "kernel", launched)
            qkv = np.zeros((1, 130, 3 * 2 * 32), np.float16)
            y, vjp = attention.qkv_attention(xp, qkv, num_heads=2, needs=(True,))
            vjp(y)
    assert used == {f"attention_{name}" + "_sm90a" * (name not in wrong) for name in NAMES}
    names = " and ".join(wrong)
    assert {str(w.message) for w in caught} == ({
        f"attention's {names} kernel for Hopper is not used for 130 tokens and heads of 32: it is wrong "
        "(TINYVIT_WGMMA=0 does not try it)"
    } if wrong else set())  # fmt: skip
    assert len(caught) == 2 * bool(wrong) and found.tried == [(NAMES, 130, 32)] * 2  # for bf16 and for f16


def test_which_attention_takes_hoppers_kernels(folder, found, monkeypatch):
    def takes(n=197, dim=64, queries=None, dtype=np.float16, factors=cuda.NULL, backward=False, **machine):
        with cuda_sim.device(folder, **HOPPER | machine):
            return attention_sm90a.takes(np.zeros((1, n, 3 * 2 * dim), dtype), factors, 2, queries or n, backward)

    with cuda_graph.capture():
        assert not takes() and not found.tried  # nothing can be tried now
    assert takes() and takes(n=577) and takes(dim=128) and takes(backward=True)
    assert found.tried == [(NAMES, 197, 64), (NAMES, 577, 64), (("forward",), 197, 128)]
    assert {cuda.source("attention_backward"), Path(attention.__file__).read_text()} < {*found.sources}
    with cuda_graph.capture():
        assert takes() and takes(n=577, backward=True) and not takes(n=578)
    assert not any((takes(n=127), takes(dim=72), takes(queries=1), takes(dtype=np.float32), takes(capability=100)))
    assert not takes(dim=128, backward=True) and not takes(factors=np.ones(1))
    with pytest.warns(UserWarning, match="not used for 198 tokens and heads of 64: it needs NVRTC 12.9, found 12.8"):
        assert not takes(n=198, compiler=(12, 8))
    assert not takes(n=2048, shared_limit=140 << 10, backward=True)
    for text, wanted in ("0", False), ("1", True), ("False", False), ("", True), ("off", False):
        monkeypatch.setenv("TINYVIT_WGMMA", text)
        assert takes() is wanted
    assert len(found.tried) == 3
