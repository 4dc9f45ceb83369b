"""Every CUDA source compiles for the architectures that matter, without a GPU; none spills registers or has a stack."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_sim import kernel_names

from tinyvit.kernels import cuda
from tinyvit.kernels.cuda import attention, attention_sm90a, linear_gelu_sm90a

SHARED_LIMIT, HOPPERS_SHARED_LIMIT = 163 << 10, 227 << 10  # of sm_80 and sm_90
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
CUPYS = ("-ftz=true", "--device-as-default-execution-space")  # what CuPy adds, and an architecture


def nvcc(source: str, options: list[str], folder: Path) -> tuple[str, str]:
    """What ptxas reports, and the PTX."""
    (folder / "kernel.cu").write_text(source)
    options = [option for option in options if option != CUPYS[1]]  # of the run-time compiler alone
    command = ["nvcc", "-cubin", "--keep", "-Xptxas", "-v", *options, "kernel.cu", "-o", "kernel.cubin"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stderr, (folder / "kernel.ptx").read_text()


def toolkits() -> Iterator[tuple[list[Path], Path]]:
    """Libraries of NVIDIA's run-time compiler and the headers of the same release, from its Python packages."""
    spec = importlib.util.find_spec("nvidia")
    for root in map(Path, spec.submodule_search_locations if spec else []):
        for lib, include in (("cu13/lib", "cu13/include"), ("cuda_nvrtc/lib", "cuda_runtime/include")):
            # libnvrtc-builtins comes first: the other looks for it by its name
            libraries = sorted(p for p in (root / lib).glob("libnvrtc*.so.*") if ".alt." not in p.name)
            if libraries and (root / include / "cuda_bf16.h").exists():
                yield libraries, root / include


def nvrtc() -> Callable[[str, list[str], Path], tuple[str, str]] | None:
    """The same through NVIDIA's run-time compiler, which is CuPy's too, if its packages are installed."""
    libraries, headers = next(toolkits(), ([], None))
    if not libraries:
        return None
    for path in libraries:
        library = ctypes.CDLL(str(path))

    def compile_source(source: str, options: list[str], folder: Path) -> tuple[str, str]:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        options = [*options, "--ptxas-options=-v", f"-I{headers}"]
        assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
        encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = library.nvrtcCompileProgram(program, len(options), encoded)
        texts = {}
        for kind in ("ProgramLog", "PTX"):
            getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            getattr(library, f"nvrtcGet{kind}")(program, text)
            texts[kind] = text.value.decode()
        library.nvrtcDestroyProgram(ctypes.byref(program))
        assert status == 0, texts["ProgramLog"]
        return texts["ProgramLog"], texts["PTX"]

    return compile_source


COMPILER = nvrtc() or (nvcc if shutil.which("nvcc") else None)
# NVIDIA's packages exist for these alone (pyproject.toml says the same).
INSTALLABLE = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


Variant = tuple[str, str, dict[str, Any]]  # architecture, file, constants


def attention_variants() -> Iterator[Variant]:
    """Those that the wrappers choose for the ViTs' shapes, with dropout of the attention weights and without.

    Each for the newest architecture that takes it in earnest: sm_90, but where Hopper has kernels of its own.
    """
    shapes = [("bf16", 64, n, dropout, 0) for n, dropout in ((65, 0), (65, 1), (197, 0), (197, 1))]
    shapes += [("f16", 80, 197, 1, 0), ("bf16", 128, 197, 0, 0), ("float", 64, 197, 0, 0), ("float", 64, 197, 0, 1)]
    for scalar, dim, n, dropout, tf32 in shapes:
        size = 4 if scalar == "float" else 2
        forward = attention.forward_tiling(n, n, dim, size)
        backward = attention.backward_tiling(n, n, dim, size, dropout=bool(dropout))
        hoppers = size == 2 and n >= attention_sm90a.LEAST_TOKENS and not dropout
        for file, plan, other in (("forward", forward, hoppers), ("backward", backward, hoppers and dim <= 64)):
            constants = {"SCALAR": scalar, "HEAD_DIM": dim, "DROPOUT": dropout, "TF32": tf32} | plan.constants
            yield "sm_80" if other else "sm_90", f"attention_{file}", constants


def hopper_variants() -> Iterator[Variant]:
    """Attention with all chunks of keys in shared memory, in one to four blocks a multiprocessor, or a ring; GELU."""
    for scalar, dim, n in (("bf16", 64, 128), ("f16", 64, 197), ("bf16", 64, 257), ("bf16", 64, 577),
                           ("bf16", 64, 1025), ("bf16", 16, 197), ("f16", 48, 130), ("bf16", 96, 257),
                           ("bf16", 112, 197), ("f16", 128, 577)):  # fmt: skip
        constants = {"SCALAR": scalar, "HEAD_DIM": dim, "TOKENS": n} | attention_sm90a.forward_plan(n, n, dim, 1000)[0]
        yield "sm_90a", "attention_forward_sm90a", constants
    for scalar, dim, last in (("bf16", 64, 16), ("f16", 48, 32), ("f16", 32, 48), ("bf16", 16, 64)):
        constants = {"SCALAR": scalar, "HEAD_DIM": dim, "WARPS": 8, "LAST": last}
        yield "sm_90a", "attention_backward_sm90a", constants
    for scalar, inner, approximate, backward in (
        ("bf16", 192, 0, 0), ("bf16", 192, 0, 1), ("f16", 128, 1, 1), ("bf16", 256, 0, 1), ("bf16", 384, 0, 0)
    ):  # fmt: skip
        plan = linear_gelu_sm90a.plan(1 << 16, inner, 4 * inner, bool(backward))
        constants = {"SCALAR": scalar, "INNER": inner, "COLUMNS": plan.columns, "WARPGROUPS": plan.warpgroups}
        yield "sm_90a", "linear_gelu_sm90a", constants | {"APPROXIMATE": approximate, "BACKWARD": backward}
    for scalar, width, approximate in (("bf16", 192, 0), ("f16", 192, 1), ("bf16", 64, 0)):
        constants = {"SCALAR": scalar, "WIDTH": width, "HIDDEN": 4 * width, "APPROXIMATE": approximate}
        yield "sm_90a", "mlp_sm90a", constants | {"STAGES": linear_gelu_sm90a.mlp_stages(width)}


def other_variants() -> Iterator[Variant]:
    """They need few registers on any architecture."""
    found: list[tuple[str, dict]] = []
    for scalar, dim in (("bf16", 192), ("bf16", 768), ("f16", 1024), ("bf16", 1280), ("bf16", 4096), ("float", 768)):
        found.append(("layer_norm", {"SCALAR": scalar, "DIM": dim}))
    for scalar, vector, approximate in (("bf16", 8, 0), ("float", 4, 0), ("float", 4, 1), ("f16", 1, 1)):
        found.append(("columns", {"SCALAR": scalar, "VECTOR": vector, "APPROXIMATE": approximate}))
    found += [("cross_entropy", {"SCALAR": "bf16", "SOFT": 0}), ("cross_entropy", {"SCALAR": "float", "SOFT": 1})]
    for scalar, vector, channels, inner in (("bf16", 1, 3, 32), ("bf16", 8, 64, 576), ("float", 4, 64, 576)):
        sizes = {"HEIGHT": 32, "WIDTH": 32, "CHANNELS": channels, "ROWS": 32, "COLUMNS": 32, "INNER": inner}
        window = {"KERNEL_H": 3, "KERNEL_W": 3, "STRIDE_H": 1, "STRIDE_W": 1, "TOP": 1, "LEFT": 1}
        found.append(("images", {"SCALAR": scalar, "VECTOR": vector} | sizes | window))
    found += [("dropout", {"SCALAR": "bf16"}), ("dropout", {"SCALAR": "float"})]
    found += [("adamw", {"SCALAR": "float", "COPY": "bf16"}), ("adamw", {"SCALAR": "bf16"})]
    found += [("adamw", {"SCALAR": "float"})]
    return (("sm_80", *variant) for variant in found)


def variants() -> list[Variant]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "shared_limit", lambda: SHARED_LIMIT)
        found = [*attention_variants(), *other_variants()]
        patch.setattr(cuda, "shared_limit", lambda: HOPPERS_SHARED_LIMIT)
        patch.setattr(cuda, "multiprocessors", lambda: 132)
        return [*found, *hopper_variants()]


CASES = [pytest.param(*v, id="-".join(map(str, (v[1], v[0], *v[2].values())))) for v in variants()]


def test_every_source_is_compiled():
    assert {file for _, file, _ in variants()} == {path.stem for path in cuda.FOLDER.glob("*.cu")}


@pytest.mark.skipif(COMPILER is None and not INSTALLABLE, reason="no CUDA compiler can be installed here")
@pytest.mark.parametrize("architecture, file, constants", CASES)
def test_compiles_without_spills(architecture, file, constants, tmp_path):
    assert COMPILER, 'no CUDA compiler: pip install -e ".[test]" brings one'
    options = [*cuda.OPTIONS, *CUPYS, f"-arch={architecture}"]
    options += [f"-D{key}={value}" for key, value in constants.items()]
    report, ptx = COMPILER(cuda.source(file), options, tmp_path)
    assert "warning" not in report and "serialized" not in report, report
    kernels = re.findall(r"entry function '(\w+)'", report)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert set(kernels) == set(kernel_names(cuda.source(file)))
    assert len(frames) >= len(kernels)
    # A stack is where an array lies that is indexed by a number of the run time: no kernel needs one.
    assert {*frames} == {("0", "0", "0")}, report
    assert misused_registers(ptx) == ([] if file.endswith("_sm90a") else ["no products"])


def misused_registers(ptx: str) -> list[str]:
    """Instructions that break PTX ISA's rules of wgmma, as far as the order of the text shows.

    Registers of a product may not be touched from its start until wgmma.wait_group has waited for its group; nor from
    the wgmma.fence before it on, which comes anew after each wait for all. Moving instructions there is the compiler's
    freedom, which `pin` and the order of asm volatile take away.
    """
    found, started, groups, touched, is_fenced, products = [], set(), [], set(), False, 0
    for line in ptx.splitlines():
        registers = set(re.findall(r"%(?:r|f|rd|rs)\d+", line))
        if product := re.search(r"wgmma\.mma_async[^{]*\{([^}]*)\}, \{([^}]*)\}", line):
            own, products = set(re.findall(r"%\w+", product[1] + product[2])), products + 1
            if own & touched or not is_fenced:
                found.append(line.strip())
            started |= own
        elif "wgmma.fence" in line:
            touched, is_fenced = set(), True
        elif "wgmma.commit_group" in line:
            groups, started = [*groups, started], set()
        elif waiting := re.search(r"wgmma\.wait_group\S* (\d+)", line):
            groups = groups[len(groups) - int(waiting[1]) :] if int(waiting[1]) else []
            is_fenced = is_fenced and bool(groups)
        else:
            touched |= registers
            if registers & started.union(*groups):
                found.append(line.strip())
    return found if products else [*found, "no products"]


PRODUCT = (
    "{ .reg .pred p; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2}, %rd1, p, 1, 1, 0; }"
)
FENCE, COMMIT, WAIT = ("wgmma." + x for x in (
    "fence.sync.aligned;", "commit_group.sync.aligned;", "wait_group.sync.aligned 0;"
))  # fmt: skip


@pytest.mark.parametrize(
    "wrong, lines",
    [
        ([], ["mov.u32 %r1, 1;", FENCE, "mov.u32 %r9, 1;", PRODUCT, PRODUCT, COMMIT, WAIT, "add.f32 %f1, %f1, %f2;"]),
        ([PRODUCT], [PRODUCT, COMMIT, WAIT]),
        ([PRODUCT], [FENCE, "cvt.rn.bf16x2.f32 %r2, %f8, %f9;", PRODUCT, COMMIT, WAIT]),
        ([PRODUCT], [FENCE, PRODUCT, COMMIT, WAIT, "add.f32 %f1, %f1, %f2;", PRODUCT, COMMIT, WAIT]),
        (["mov.f32 %f7, %f2;"], [FENCE, PRODUCT, "mov.f32 %f7, %f2;", COMMIT, WAIT]),
        (["mov.u32 %r1, 0;"], [FENCE, PRODUCT, COMMIT, WAIT.replace("0", "1"), "mov.u32 %r1, 0;", WAIT]),
    ],
)
def test_misused_registers_are_found(wrong, lines):
    assert misused_registers("\n".join(lines)) == wrong


@pytest.mark.parametrize("file", ["layer_norm", "attention_forward_sm90a"])
def test_cupys_options_are_not_given_twice(monkeypatch, file):
    """NVRTC before 12.9 refuses that, whatever it is; later ones take an architecture of ours for sm_90's."""
    given = []
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=lambda code, options: given.extend(options)))
    cuda._module.__wrapped__(0, file, (("DIM", 192),))
    assert given == ["-std=c++17", "-DDIM=192", *["-arch=sm_90a"] * file.endswith("_sm90a")]


def test_instructions_that_reach_memory_tell_the_compiler():
    """Else it may move other accesses past them, also past a barrier between."""
    text = "".join(path.read_text() for path in cuda.FOLDER.glob("*.cu*"))
    statements = re.findall(r"asm volatile\((.*?)\);\s", text, re.DOTALL)
    found = [statement for statement in statements if re.search(r'"(st|cp|ldmatrix)\.', statement)]
    assert len(found) == 7 and all('"memory"' in statement for statement in found), found


def test_the_extra_brings_the_compiler_that_is_tested_here():
    """A machine with nothing but a driver has no toolkit: what compiles here must come with the extra."""
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    names = {extra: {re.match(r"[\w-]+", line)[0] for line in extras[extra]} for extra in ("test", "cuda12", "cuda13")}
    compiler = {name for name in names["test"] if name.startswith("nvidia-")}
    assert len(compiler) == 2 and compiler | {"nvidia-cublas"} <= names["cuda13"]
    assert {f"{name}-cu12" for name in compiler | {"nvidia-cublas"}} <= names["cuda12"]
