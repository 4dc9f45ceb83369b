"""What `tinyvit info` finds: every setting that leaves speed behind is named, and nothing else is."""

import json
import subprocess
import sys

import pytest

from tinyvit.backend import parallel
from tinyvit.execution.system_info import SystemInfo, as_table, collect, cpu_kernels, one_line, slowdowns
from tinyvit.kernels import jit

GOOD = SystemInfo(
    versions={"tinyvit": "1", "cupy": None},
    processor="a processor",
    vector="avx512",
    instructions=["avx2", "avx512f"],
    cores=8,
    affinity=8,
    quota=None,
    usable=8,
    blas={"library": "openblas", "version": "0.3.31", "core_type": "SkylakeX", "threads": 8},
    kernels="NumPy's",
    settings={},
    memory_gib=16.0,
    gpu=["none (no CuPy)"],
    cache="/cache",
)


def changed(**changes):
    fields = {name: getattr(GOOD, name) for name in SystemInfo.__dataclass_fields__}
    return SystemInfo(**(fields | changes))


def blas(**changes):
    return GOOD.blas | changes


def test_a_machine_without_faults_has_no_findings(monkeypatch):
    monkeypatch.setattr(jit, "_installed", lambda: True)
    assert slowdowns(GOOD) == []
    assert one_line(GOOD) == "8 cores, openblas SkylakeX"
    assert "Nothing found" in as_table(GOOD)


def test_the_kernels_in_use_are_named(monkeypatch):
    monkeypatch.setattr(jit, "_installed", lambda: True)
    assert "unset TINYVIT_JIT" in cpu_kernels({"TINYVIT_JIT": "0"})
    assert cpu_kernels({}).startswith("compiled by numba") and "times as fast" in cpu_kernels({})
    monkeypatch.setattr(jit, "_installed", lambda: False)
    assert cpu_kernels({}).startswith(
        "NumPy's"
    ) and 'with numba 0.62 or newer (pip install "tinyvit[jit]")' in cpu_kernels({})
    (finding,) = slowdowns(GOOD)
    assert 'pip install "tinyvit[jit]"' in finding


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(blas=blas(core_type="Haswell"), settings={"OPENBLAS_CORETYPE": "Haswell"}),
            ["OPENBLAS_CORETYPE=Haswell", "AVX512", "unset"],
        ),
        (dict(blas=blas(core_type="Haswell")), ["Haswell kernels", "AVX512", "newer NumPy"]),
        (dict(vector="avx2", blas=blas(core_type="Nehalem")), ["Nehalem kernels", "AVX2"]),
        (dict(settings={"OPENBLAS_L2_SIZE": "512"}), ["OPENBLAS_L2_SIZE=512", "unset"]),
        (dict(settings={"TINYVIT_JIT": "0"}), ["numba", "unset TINYVIT_JIT"]),
        (dict(blas=blas(threads=1), settings={"OMP_NUM_THREADS": "1"}), ["1 of 8 cores", "OMP_NUM_THREADS=1", "unset"]),
        (dict(blas=blas(threads=1)), ["1 of 8 cores", "threaded BLAS"]),
        (dict(affinity=2), ["2 of 8 cores", "affinity"]),
        (dict(quota=3), ["3 of 8 cores", "--cpus"]),
        (dict(blas=None), ["BLAS", "NumPy from PyPI"]),
    ],
)
def test_each_fault_is_named_with_its_remedy(changes, words, monkeypatch):
    monkeypatch.setattr(jit, "_installed", lambda: True)
    machine = changed(**changes)
    (finding,) = slowdowns(machine)
    for word in words:
        assert word in finding
    assert finding in one_line(machine) and finding in as_table(machine)
    assert "\n" not in one_line(machine) and finding not in one_line(machine, alone=False)


def test_settings_that_cost_nothing_are_shown_but_not_blamed(monkeypatch):
    monkeypatch.setattr(jit, "_installed", lambda: True)
    machine = changed(vector="avx2", blas=blas(core_type="Zen"), settings={"OMP_NUM_THREADS": "8"})
    assert slowdowns(machine) == []
    assert "OMP_NUM_THREADS=8" in as_table(machine)


@pytest.mark.parametrize("value", ["0", "off ", " No", "n", "FALSE"])
def test_a_variable_says_no(value):
    assert jit.refused("TINYVIT_JIT", {"TINYVIT_JIT": value})
    assert not any(jit.refused("TINYVIT_JIT", given) for given in ({}, {"TINYVIT_JIT": ""}, {"TINYVIT_JIT": "1"}))


def test_this_machine_can_be_examined():
    settings = {"OPENBLAS_CORETYPE": "Prescott", "TINYVIT_WGMMA": "0"}
    machine = collect({**settings, "HOME": "/home"})
    assert machine.settings == settings
    assert 1 <= machine.usable == parallel.available_cores()
    assert json.loads(json.dumps(machine.to_dict()))["findings"] == slowdowns(machine)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's own count of page faults")
def test_freed_memory_is_kept_from_step_to_step():
    """Without it each round would fault in its 64 MiB again: 16,384 pages, or 32 huge ones."""
    script = """
import resource, sys
import numpy as np
from tinyvit.backend.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(2**21, np.float32) + np.ones(2**21, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "leave")
    )
    assert kept < 10 and returned > 40, (kept, returned)
