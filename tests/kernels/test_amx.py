"""Products in 16 and 8 bits by AMX's instructions, on any processor: a handler of signals carries them out."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from tinyvit.kernels import jit

HERE = Path(__file__).parent
SUPPORT = HERE.parent / "support"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="handles Linux's signals on x86-64"
)
def test_the_tests_of_16_and_8_bits_pass(tmp_path):
    if not (compiler := shutil.which("cc")):
        pytest.skip("there is no C compiler")
    if not jit.has("avx512bf16"):
        pytest.skip("this processor does not round to bfloat16, as each with AMX does")
    library = tmp_path / "amx.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SUPPORT / "amx.c"], check=True)
    more = {"PYTHONPATH": str(SUPPORT), "AMX_EMULATOR": str(library), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    which = "products or special or a_step or many_tokens or finite"
    tests = [HERE / name for name in ("test_bf16.py", "test_int8.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-p",
        "no:faulthandler",
        "-p",
        "emulated_amx",
        "-k",
        which,
        *tests,
    ]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.search(r"AMX instructions: (\d+)", done.stdout)[1]) > 100_000


def test_linux_is_asked_for_tiles_and_may_refuse(monkeypatch):
    monkeypatch.setattr(jit, "has", lambda feature: feature.startswith("amx"))
    for permitted, found in ((True, "amx"), (False, "")):
        monkeypatch.setattr(jit, "_tiles_permitted", lambda permitted=permitted: permitted)
        assert jit.dot_instructions.__wrapped__() == found


def test_a_processor_without_tiles_is_not_permitted_to_use_them():
    assert jit.has("amx-tile") or not jit._tiles_permitted()
