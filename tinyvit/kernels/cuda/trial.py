"""Whether kernels that hardly any GPU has run are right on this one: a process of its own tries them, once.

A kernel that touches a wrong address ends its process' use of the GPU, and another may never end: so it is a child,
with a time limit, that runs them. What it finds is kept beside CuPy's compiled kernels, for each kind of GPU, driver,
compiler and text of the sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

from tinyvit.files.atomic import write_text
from tinyvit.files.text import one_line
from tinyvit.kernels import cuda

SECONDS = 120  # of a trial: a few kernels are compiled in it
# What a child prints before its first launch, for what goes wrong sooner says nothing of the kernels; and before each
# JSON [name, problem].
STARTED, FOUND = "started", "found "
_CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)  # not the signals that somebody sends to end a job

Verdicts = dict[str, str | None]  # of each kernel: what is wrong with it, None if nothing


def verdicts(module: str, names: tuple[str, ...], request: dict[str, Any], sources: list[str]) -> Verdicts:
    """What `python -m MODULE REQUEST` finds wrong with the kernels of these names."""
    address, *machine = _gpu()
    key = hashlib.sha256(json.dumps([module, request, machine, *sources]).encode()).hexdigest()[:32]
    path = cuda.cache_file(f"tinyvit-{key}.json")
    with contextlib.suppress(OSError, ValueError):  # none, or a damaged one
        kept = json.loads(path.read_text())
        if isinstance(kept, dict) and kept.keys() == {*names} and all(isinstance(p, str | None) for p in kept.values()):
            return {name: problem and f"{problem}, as {path} says" for name, problem in kept.items()}
    problems, is_final = _try(module, names, {"gpu": address} | request)
    if is_final:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(problems))
    return problems


def _try(module: str, names: tuple[str, ...], request: dict[str, Any]) -> tuple[Verdicts, bool]:
    """And whether it is the kernels that are at fault, if anything is."""
    command = [sys.executable or "python", "-P", "-m", module, json.dumps(request)]
    paths = os.pathsep.join(filter(None, [str(cuda.FOLDER.parents[2]), *sys.path]))  # it finds what this process finds
    env = os.environ | {"PYTHONPATH": paths}
    errors, ended = b"", True
    print(f"tinyvit: trying kernels on this GPU, once: at most {SECONDS} seconds", file=sys.stderr, flush=True)
    try:
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, env=env)
        output, errors, fault = child.stdout, child.stderr, f"their trial ended with status {child.returncode}"
        ended = child.returncode not in _CRASHES
    except subprocess.TimeoutExpired as error:
        output, fault, ended = error.stdout or b"", f"their trial did not end within {SECONDS} s", False
    except OSError as error:
        output, fault = b"", f"their trial did not begin: {error}"
    lines = output.decode(errors="replace").splitlines()
    for line in errors.decode(errors="replace").strip().splitlines()[-1:]:
        fault += f" ({one_line(line)})"
    problems: Verdicts = dict.fromkeys(names, fault)
    found = dict(json.loads(line.removeprefix(FOUND)) for line in lines if line.startswith(FOUND))
    return problems | found, problems.keys() == found.keys() or (STARTED in lines and not ended)


def _gpu() -> tuple[str, str, int, int, list[int]]:
    """The current device's place, which other processes know it by; its name and capability, driver and compiler."""
    import cupy

    number, runtime = cuda.device(), cupy.cuda.runtime
    name = runtime.getDeviceProperties(number)["name"].decode()
    place = cupy.cuda.Device(number).pci_bus_id
    return place, name, cuda.capability(), runtime.driverGetVersion(), [*cupy.cuda.nvrtc.getVersion()]
