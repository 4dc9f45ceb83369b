"""What this machine offers, what of it tinyvit may use, and which settings leave speed behind."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from tinyvit._version import __version__
from tinyvit.backend import devices, parallel
from tinyvit.kernels import bf16, int8, jit

# OpenBLAS's kernels by the vector width that they use (its names for core types).
_AVX512_CORES = {"skylakex", "cooperlake", "sapphirerapids", "zen4", "zen5"}
_AVX2_CORES = {"haswell", "zen", "excavator"}
_INSTRUCTIONS = {"fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
_INSTRUCTIONS |= {"asimd", "asimdhp", "bf16", "i8mm", "sve"}  # ARM's
_OF_FLOAT32 = {"fma", "avx2", "avx512f", "asimd", "sve"}  # that compilers use for it
_GAIN = "training is 1.05 (ViT-B/16) to 1.8 times as fast (cct_2_3x3_32)"
_SETTINGS = ("OPENBLAS_", "OMP_", "MKL_", "GOTO_", "BLIS_", "VECLIB_", "TINYVIT_")


@dataclass(frozen=True)
class SystemInfo:
    """What `tinyvit info` shows.

    Attributes:
        versions: package or program name -> version; None where it is not installed.
        processor: its name; vector: its widest vector instructions ("avx512", "avx2" or ""); instructions: those of its
            instruction sets that matter to products of matrices.
        cores: processors of the machine; affinity: those this process may run on; quota: cores that the cgroup
            grants, None without a limit; usable: what tinyvit uses.
        blas: NumPy's BLAS: library, version, core type, threads; None if none is known.
        kernels: which of them compute on a CPU, and what numba's would bring.
        settings: environment variables that steer tinyvit, BLAS or its threads.
        memory_gib: physical memory.
        gpu: each GPU's name, memory and compute capability, or the reason why there is none.
        cache: where downloads go.
    """

    versions: dict[str, str | None]
    processor: str
    vector: str
    instructions: list[str]
    cores: int
    affinity: int
    quota: int | None
    usable: int
    blas: dict[str, Any] | None
    kernels: str
    settings: dict[str, str]
    memory_gib: float | None
    gpu: list[str]
    cache: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the findings."""
        return asdict(self) | {"findings": slowdowns(self)}


def collect(environment: Mapping[str, str] = os.environ) -> SystemInfo:
    """What this machine offers."""
    from tinyvit.data.sources.download import cache_directory

    name, flags = processor()
    meminfo = _field(_read("/proc/meminfo"), "MemTotal").split()
    return SystemInfo(
        versions={"tinyvit": __version__, "python": platform.python_version(), "numpy": np.__version__}
        | {name: _version(name) for name in ("array-api-compat", "pillow", "safetensors", "matplotlib", "numba")}
        | {"cupy": _version("cupy-cuda12x") or _version("cupy-cuda13x") or _version("cupy")}
        | {name: _version(name) for name in ("nvmath-python", "ml_dtypes")}
        | devices.cuda_versions(),
        processor=name,
        vector="avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "",
        instructions=instruction_sets(flags),
        cores=os.cpu_count() or 1,
        affinity=len(parallel.affinity()),
        quota=parallel.cgroup_cores(Path("/sys/fs/cgroup")),
        usable=parallel.available_cores(),
        blas=numpy_blas(),
        kernels=cpu_kernels(environment),
        settings={k: v for k, v in sorted(environment.items()) if k.startswith(_SETTINGS)},
        memory_gib=round(int(meminfo[0]) / 2**20, 1) if meminfo else None,
        gpu=devices.describe_gpus(),
        cache=str(cache_directory()),
    )


def slowdowns(info: SystemInfo) -> list[str]:
    """What leaves speed behind, each with what to do about it; empty if all is well. Nothing is changed."""
    out = []
    blas, settings = info.blas, info.settings
    core = str(blas["core_type"] or "").lower() if blas else ""
    if blas is None:
        out.append("NumPy's BLAS is not known to be fast: install NumPy from PyPI, whose wheels bring OpenBLAS")
    elif blas["library"] == "openblas":
        below = (info.vector == "avx512" and core not in _AVX512_CORES) or (
            info.vector == "avx2" and core not in _AVX2_CORES | _AVX512_CORES
        )
        if below and "OPENBLAS_CORETYPE" in settings:
            out.append(
                f"OPENBLAS_CORETYPE={settings['OPENBLAS_CORETYPE']} holds OpenBLAS below this processor's "
                f"{info.vector.upper()}: unset it"
            )
        elif below:
            out.append(
                f"OpenBLAS {blas['version']} uses its {blas['core_type']} kernels although the processor has "
                f"{info.vector.upper()}: a newer NumPy may know this processor"
            )
        for name in ("OPENBLAS_L2_SIZE", "OPENBLAS_BLOCK_FACTOR"):
            if name in settings:
                setting = f"{name}={settings[name]}"
                out.append(f"{setting} overrides OpenBLAS's own block sizes: unset it unless you measured it")
    if lacks := jit.missing(settings):
        out.append(f"on a CPU {_GAIN} with {lacks}, and some have fast bf16 and int8")
    limit = next((n for n in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS") if n in settings), None)
    if blas and blas["threads"] < info.usable:
        cause = f"{limit}={settings[limit]}" if limit else f"{blas['library']} was built or set so"
        out.append(
            f"BLAS uses {blas['threads']} of {info.usable} cores ({cause}); tinyvit's own steps run on all cores "
            f"all the same, other NumPy code does not: {'unset ' + limit if limit else 'use a threaded BLAS'}"
        )
    if info.affinity < info.cores:
        out.append(f"this process may run on {info.affinity} of {info.cores} cores: widen its affinity (taskset)")
    if info.quota is not None and info.quota < info.affinity:
        out.append(f"the cgroup grants {info.quota} of {info.affinity} cores: raise the container's --cpus")
    return out


def numpy_blas() -> dict[str, Any] | None:
    """What multiplies matrices for NumPy, as in `SystemInfo.blas`."""
    found = [library for library in threadpool_info() if library["user_api"] == "blas"]
    blas = next((library for library in found if "numpy" in library["filepath"]), found[0] if found else None)
    return blas and {
        "library": blas["internal_api"],
        "version": blas["version"],
        "core_type": blas.get("architecture"),
        "threads": blas["num_threads"],
    }


def arithmetic(precision: str) -> dict[str, Any]:
    """What decides the last bits of results on a CPU."""
    blas = numpy_blas() or {}
    return {
        "set of instructions": sorted(_OF_FLOAT32.intersection(processor()[1])),
        "kind of bf16": jit.dot_instructions() if precision == "bf16" and bf16.available() else None,
        "version of NumPy": np.__version__,
        "version of numba": _version("numba") if jit.wanted() else None,
        "BLAS": [blas.get(name) for name in ("library", "version", "core_type")],
    }


def processor() -> tuple[str, list[str]]:
    """The processor's name and its flags, as Linux lists them."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = _field(cpuinfo, "flags") or _field(cpuinfo, "Features")  # x86 or ARM
    return _field(cpuinfo, "model name") or platform.processor() or platform.machine(), flags.split()


def instruction_sets(flags: list[str]) -> list[str]:
    """Those among a processor's flags that matter to products of matrices."""
    return sorted(_INSTRUCTIONS.intersection(flags))


def cpu_kernels(environment: Mapping[str, str]) -> str:
    """Which kernels compute on a CPU, and what numba's bring."""
    if jit.wanted(environment):
        more = "; precision bf16 uses this processor's bfloat16 products" if bf16.possible() else ""
        more += "; predictions can have precision int8" if int8.possible() else ""
        return f"compiled by numba, the rest NumPy's: {_GAIN}{more}; TINYVIT_JIT=0 leaves them out"
    return f"NumPy's; {_GAIN} with {jit.missing(environment)}"


def one_line(info: SystemInfo, alone: bool = True) -> str:
    """For a training log: what computes, and the findings; not for a process that shares the machine on purpose."""
    blas = info.blas or {"library": "unknown BLAS", "core_type": ""}
    said = slowdowns(info) if alone else []
    rest = f"; slower than it could be: {'; '.join(said)}" if said else ""
    return f"{info.usable} cores, {blas['library']} {blas['core_type'] or ''}".rstrip() + rest


def as_table(info: SystemInfo) -> str:
    """For a terminal."""
    blas = info.blas
    quota = "no limit" if info.quota is None else f"{info.quota} cores"
    rows = [(name, version or "not installed") for name, version in info.versions.items()]
    rows += [
        ("processor", f"{info.processor} ({info.vector or 'no AVX2'})"),
        ("cores", f"{info.usable} used; machine {info.cores}, affinity {info.affinity}, cgroup {quota}"),
        ("memory", f"{info.memory_gib} GiB" if info.memory_gib else "unknown"),
        ("BLAS", "{library} {version}, {core_type} kernels, {threads} threads".format(**blas) if blas else "unknown"),
        ("kernels", info.kernels),
        ("settings", ", ".join(f"{k}={v}" for k, v in info.settings.items()) or "none that steer kernels or BLAS"),
        ("GPU", "; ".join(info.gpu)),
        ("cache", info.cache),
    ]
    lines = [f"{name:18} {value}" for name, value in rows]
    said = slowdowns(info)
    lines += ["", "Leaves speed behind:" if said else "Nothing found that leaves speed behind."]
    return "\n".join(lines + [f"  - {s}" for s in said])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """The value of the first "name : value" line."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
