"""Which instructions products of 16 and 8 bits take; AMX's and AVX-VNNI's on other processors, by a signal handler."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinyvit.kernels import bf16, jit

HERE = Path(__file__).parent
SUPPORT = HERE.parent / "support"


@pytest.mark.parametrize(
    "instructions, name, has_bf16, gains",
    [
        ("avx512", "znver4", True, True),
        ("avx512", "znver4", False, False),
        ("avx512", "cooperlake", True, False),
        ("amx", "sapphirerapids", True, True),
        ("arm", "neoverse-v1", False, True),
        ("avx2", "haswell", False, False),
        ("avxvnni", "alderlake", False, False),
        ("", "nehalem", False, False),
    ],
)
def test_a_processor_gains_unless_it_is_intel_s_without_amx(monkeypatch, instructions, name, has_bf16, gains):
    monkeypatch.setattr(jit, "wanted", lambda: True)
    monkeypatch.setattr(jit, "processor_name", lambda: name)
    monkeypatch.setattr(jit, "has", lambda feature: has_bf16)
    monkeypatch.setattr(jit, "dot_instructions", lambda: instructions)
    assert bf16.possible() == gains


AMX = {"amx-bf16", "amx-int8", "avx512bf16", "avx512vnni"}


@pytest.mark.parametrize(
    "system, features, permitted, found",
    [
        ("linux", AMX, True, "amx"),
        ("linux", AMX, False, ""),
        ("win32", AMX, False, "avx512"),
        ("linux", AMX - {"avx512bf16"}, True, "avx512"),  # which rounds to bfloat16
        ("linux", {"avx512vnni"}, True, "avx512"),
        ("darwin", {"bf16", "i8mm"}, True, "arm"),
        ("linux", {"bf16"}, True, ""),
        ("linux", {"avx2", "fma"}, True, "avx2"),
        ("win32", {"avx2", "avxvnni"}, True, "avxvnni"),
        ("linux", {"avx2", "avxvnni", "avx512vnni"}, True, "avx512"),
        ("linux", {"sse4.2"}, True, ""),
    ],
)
def test_the_instructions_of_a_processor(monkeypatch, system, features, permitted, found):
    monkeypatch.setattr(jit.sys, "platform", system)
    monkeypatch.setattr(jit.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(jit, "has", lambda feature: feature in features)
    monkeypatch.setattr(jit, "_tiles_permitted", lambda: permitted)
    assert jit.dot_instructions.__wrapped__() == found


@pytest.mark.parametrize("answer", [0, -1])
def test_linux_is_asked_for_tiles_and_may_refuse(monkeypatch, answer):
    asked = []
    system_calls = SimpleNamespace(syscall=lambda *numbers: asked.append(numbers) or answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: system_calls)
    assert jit._tiles_permitted() == (answer == 0)
    assert asked == [(158, 0x1023, 18)]  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) of x86-64


@pytest.mark.parametrize(
    "system, machine, said, found",
    [
        ("darwin", "arm64", "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_I8MM: 0\n", {"bf16"}),
        ("darwin", "x86_64", "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_I8MM: 1\n", set()),  # under Rosetta
        ("linux", "aarch64", "Features : fp asimd i8mm svebf16 bf16\n", {"bf16", "i8mm"}),
        ("linux", "aarch64", "Features : fp asimd svebf16\n", set()),
    ],
)
def test_arm_s_features(monkeypatch, system, machine, said, found):
    monkeypatch.setattr(jit.sys, "platform", system)
    monkeypatch.setattr(jit.platform, "machine", lambda: machine)
    monkeypatch.setattr(jit.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    monkeypatch.setattr(jit.Path, "read_text", lambda path: said)
    assert jit._arm_features.__wrapped__() == found


def emulated(tmp_path, kind, command):
    """The output of `python COMMAND` where a signal handler carries out instructions of this kind."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the signal handler is Linux's on x86-64")
    pytest.importorskip("numba")
    if not (compiler := shutil.which("cc")):
        pytest.skip("there is no C compiler")
    library = tmp_path / "instructions.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SUPPORT / "instructions.c"], check=True)
    more = {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{HERE.parents[1]}", "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    environment = os.environ | more | {"EMULATOR": str(library), "EMULATED": kind}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_tests_of_16_and_8_bits_pass_by_amx(tmp_path):
    if jit.has("amx-tile") or not jit.has("avx512bf16"):
        pytest.skip("this processor has AMX itself, or does not round to bfloat16, as those with AMX do")
    options = ["-m", "pytest", "-n", "0", "-q", "-p", "no:faulthandler", "-p", "emulated", "-k"]
    which = "products or special or many_tokens or finite"
    out = emulated(tmp_path, "amx", [*options, which, *(HERE / name for name in ("test_bf16.py", "test_int8.py"))])
    assert "skipped" not in out and int(re.search(r"instructions: (\d+)", out)[1]) > 100_000, out[-3000:]


def test_blocks_of_bytes_by_avx_vnni(tmp_path):
    if jit.has("avxvnni") or not jit.has("avx2"):
        pytest.skip("this processor has AVX-VNNI itself, or not even AVX2")
    # 6 rows and 4 or 2 registers of columns, of 1, 2 and 77 groups
    assert emulated(tmp_path, "avxvnni", [SUPPORT / "emulated.py"]) == f"avxvnni instructions: {6 * (4 + 2) * 80}\n"
