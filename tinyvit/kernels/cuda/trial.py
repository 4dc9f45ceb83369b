"""Whether kernels that hardly any GPU has run are right on this one: a process of its own tries them, once.

A kernel that touches a wrong address ends its process' use of the GPU, and another may never end: so it is a child,
with a time limit, that runs them. What it finds is kept beside CuPy's compiled kernels, for each kind of GPU, driver,
compiler, CuPy and text of the sources. Where it does not come to an end nothing is kept, for the fault may lie
elsewhere: this process does without the kernels, and the next one tries again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from tinyvit.distributed.launch import launched
from tinyvit.files.atomic import write_text
from tinyvit.files.text import one_line
from tinyvit.kernels import cuda

COMPILER = 12, 9  # the first that takes Hopper's architecture from us beside CuPy's own option
SECONDS = 90  # of a trial: a few kernels are compiled in it
KILL_WAIT = 5  # seconds until a killed child is left to itself: the driver may hold it
FOUND = "tinyvit trial: "  # what a child prints before each JSON [name, problem]
SLOWER = "it is slower"  # so begins a problem that is not worth a warning

Verdicts = dict[str, str | None]  # of each kernel: what is wrong with it, None if nothing


def hopper_verdicts(
    owner: str, case: str, module: str, names: tuple[str, ...], request: dict[str, Any], sources: list[str]
) -> Verdicts:
    """`verdicts` on the kernels of `owner` for Hopper, with a warning of those that are not used for the case."""
    found: Verdicts
    if (compiler := cuda.compiler()) < COMPILER:
        found = dict.fromkeys(names, "it needs NVRTC {}.{}, found {}.{}".format(*COMPILER, *compiler))
    else:
        sources = [*sources, (cuda.FOLDER / "comparison.py").read_text()]
        found = verdicts(module, names, request, sources)
    for problem in filter(None, dict.fromkeys(found.values())):
        if not problem.startswith(SLOWER):
            kernels = " and ".join(name for name in names if found[name] == problem)
            warnings.warn(
                f"{owner}'s {kernels} kernel for Hopper is not used for {case}: {problem} "
                "(TINYVIT_WGMMA=0 does not try it)",
                stacklevel=2,
            )
    return found


def verdicts(module: str, names: tuple[str, ...], request: dict[str, Any], sources: list[str]) -> Verdicts:
    """What `python -m MODULE REQUEST` finds wrong with the kernels of these names."""
    address, *machine = _gpu()
    told = module, request, machine, cuda.OPTIONS, Path(__file__).read_text(), *sources
    path = cuda.cache_file(f"tinyvit-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}.json")
    if kept := _kept(path, names):
        return kept
    found, fault = _try(module, {"gpu": address} | request)
    if kept := _kept(path, names):  # another process of this run was the first: all are to decide alike
        return kept
    if found.keys() == {*names}:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(found))
    return dict.fromkeys(names, fault) | found


def _kept(path: Path, names: tuple[str, ...]) -> Verdicts | None:
    """The verdicts that a file holds, if it is whole."""
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text())
        if isinstance(kept, dict) and kept.keys() == {*names} and all(isinstance(p, str | None) for p in kept.values()):
            cure = f", as {path} says: delete it to try again"
            return {name: problem and problem + cure for name, problem in kept.items()}
    return None


def _try(module: str, request: dict[str, Any]) -> tuple[Verdicts, str]:
    """What the child found, and what became of it."""
    if launched()[2] == 0:  # the first process says it
        print(f"tinyvit: trying kernels on this GPU, once: at most {SECONDS} seconds", file=sys.stderr, flush=True)
    command = [sys.executable or "python", "-P", "-m", module, json.dumps(request)]
    # It finds what this process finds, and where. Our own place comes last: what lies beside it is not to be preferred.
    paths = os.pathsep.join(filter(None, map(str, [*sys.path, cuda.FOLDER.parents[2]])))
    pipe, errors = subprocess.PIPE, b""
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=os.environ | {"PYTHONPATH": paths}
        )
    except OSError as error:
        return {}, f"their trial did not begin: {error}"
    try:
        output, errors = child.communicate(timeout=SECONDS)
        fault = f"their trial ended with status {child.returncode}"
    except subprocess.TimeoutExpired as error:
        output, fault = error.stdout or b"", f"their trial did not end within {SECONDS} s"
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=KILL_WAIT)
    except BaseException:
        child.kill()
        raise
    for line in errors.decode(errors="replace").strip().splitlines()[-1:]:
        fault += f" ({one_line(line)})"
    found: Verdicts = {}
    for line in output.decode(errors="replace").splitlines():
        if line.startswith(FOUND):
            with contextlib.suppress(ValueError):  # the last one of a child that was ended
                name, found[name] = json.loads(line.removeprefix(FOUND))
    return found, fault


def _gpu() -> tuple[str, str, int, int, list[int], str]:
    """The current device's place, which other processes know it by; its name and capability, driver, compiler, CuPy."""
    import cupy

    place, driver = cupy.cuda.Device(cuda.device()).pci_bus_id, cupy.cuda.runtime.driverGetVersion()
    return place, cuda.device_name(), cuda.capability(), driver, [*cuda.compiler()], cupy.__version__
