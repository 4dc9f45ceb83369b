"""Choosing a device: what is said when CuPy, a driver or a GPU is missing, with a CuPy that is made up."""

import sys
import types

import numpy as np
import pytest
from drawing import BACKENDS, LIBRARIES
from on_gpu import HAS_GPU, needs_gpu

from tinyvit import __version__, create_model
from tinyvit.backend import arrays, devices
from tinyvit.backend.devices import DeviceError, pick_device
from tinyvit.execution import system_info

EXTRAS = 'pip install "tinyvit[cuda12]" or "tinyvit[cuda13]"'


class CUDARuntimeError(RuntimeError):
    """CuPy's."""


def made_up(count=1, error=None, driver=13000, needed=13000):
    """A `cupy` that finds so many GPUs, or fails to; its arrays are NumPy's."""

    def get_device_count():
        if error is not None:
            raise CUDARuntimeError(error)
        return count

    cupy, cuda, runtime = (types.ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.runtime"))
    cupy.cuda, cuda.runtime = cuda, runtime
    runtime.CUDARuntimeError = CUDARuntimeError
    runtime.getDeviceCount = get_device_count
    runtime.driverGetVersion, runtime.runtimeGetVersion = (lambda: driver), (lambda: needed)
    runtime.getDeviceProperties = lambda i: dict(name=b"NVIDIA H200", totalGlobalMem=140 << 30, major=9, minor=0)
    return cupy


@pytest.fixture
def install(monkeypatch):
    def install(cupy):
        for name in ("cupy", "cupy.cuda", "cupy.cuda.runtime"):
            module = cupy
            for part in name.split(".")[1:]:
                module = module and getattr(module, part)
            monkeypatch.setitem(sys.modules, name, module)

    return install


CASES = [
    (None, f"device cuda needs CuPy: {EXTRAS} (the CUDA version of the driver)"),
    (
        made_up(error="cudaErrorInsufficientDriver", driver=0),
        "device cuda cannot be used: there is no NVIDIA driver (cudaErrorInsufficientDriver)",
    ),
    (
        made_up(error="cudaErrorInsufficientDriver", driver=12040),
        f"device cuda cannot be used: the driver knows CUDA 12.4, CuPy is made for 13.0: {EXTRAS}, whichever fits",
    ),
    (
        made_up(error="cudaErrorNoDevice: no CUDA-capable device is detected"),
        "device cuda cannot be used: CuPy finds no GPU (cudaErrorNoDevice: no CUDA-capable device is detected)",
    ),
    (made_up(count=0), "device cuda cannot be used: the driver finds no GPU"),
]


@pytest.mark.parametrize("cupy, message", CASES, ids=["no-cupy", "no-driver", "old-driver", "no-device", "none"])
def test_what_is_missing_is_said_in_one_line(install, cupy, message):
    install(cupy)
    with pytest.raises(RuntimeError) as caught:
        create_model("vit_nano_patch8_32").to("cuda")
    assert str(caught.value) == message
    with pytest.raises(DeviceError) as caught:
        pick_device("cuda")
    assert str(caught.value) == f"no GPU can be used: {message}"
    assert pick_device("auto") == "cpu"
    assert system_info.collect().gpu == [f"none ({message.replace('device cuda', 'a GPU')})"]


@pytest.mark.parametrize("error", [ImportError("libcublas.so.13:\n cannot open"), OSError("broken"), KeyError("x")])
def test_a_cupy_that_cannot_be_imported(monkeypatch, tmp_path, error):
    (tmp_path / "cupy.py").write_text(f"raise {error!r}")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="device cuda needs CuPy, which cannot be imported") as caught:
        devices.mover("cuda")
    assert "\n" not in str(caught.value) and EXTRAS in str(caught.value)


@pytest.mark.parametrize(
    "count, target, there", [(1, "cuda:1", "is one GPU, cuda:0"), (4, "cuda:7", "are 4 GPUs, cuda:0 to cuda:3")]
)
def test_a_gpu_that_is_not_there(install, count, target, there):
    install(made_up(count))
    with pytest.raises(RuntimeError) as caught:
        devices.mover(target)
    assert str(caught.value) == f"device {target} does not exist: there {there}"
    with pytest.raises(DeviceError, match=f"no GPU can be used: device {target} does not exist"):
        pick_device(target)


@pytest.mark.parametrize("target", ["cuda:", "cuda:x", "cuda:-1", "cuda:1.0"])
def test_names_that_are_no_device(target):
    with pytest.raises(ValueError, match='expected "cuda" or "cuda:N", got'):
        devices.mover(target)


def test_a_gpu_whose_kernels_do_not_compile_is_not_taken(install, monkeypatch):
    """A driver alone is not enough: CuPy compiles its kernels with CUDA's headers."""
    install(made_up())

    def move(x):
        raise RuntimeError("Failed to find CUDA headers.\nPlease install CUDA toolkit headers")

    monkeypatch.setattr(devices, "mover", lambda target: move)
    assert pick_device("auto") == "cpu"
    with pytest.raises(DeviceError) as caught:
        pick_device("cuda:0")
    said = "no GPU can be used: Failed to find CUDA headers. Please install CUDA toolkit headers"
    assert str(caught.value) == said


def test_info_names_the_gpus_and_versions(install):
    install(made_up(2, driver=13020))
    found = system_info.collect()
    assert found.gpu == [f"cuda:{i} NVIDIA H200, 140 GiB, 9.0" for i in range(2)]
    assert found.versions["CUDA of the driver"] == "13.2" and found.versions["CUDA of CuPy"] == "13.0"
    assert {"cupy", "nvmath-python", "ml_dtypes"} <= found.versions.keys()
    assert "cuda:1 NVIDIA H200, 140 GiB, 9.0" in system_info.as_table(found)


def test_info_in_a_source_tree_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(system_info, "_version", lambda package: None)
    assert system_info.collect().versions["tinyvit"] == __version__


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_array_goes_to_the_place_of_another_and_back(backend):
    xp = LIBRARIES[backend]
    x = xp.asarray(np.arange(6.0))
    name = arrays.device_name(x)
    assert name == {"numpy": "cpu", "cupy": "cuda:0"}.get(backend, xp)
    moved = devices.mover(name)(np.arange(3))
    assert type(moved) is type(x) and arrays.namespace(moved) is xp
    assert devices.describe_device(x).startswith({"numpy": "cpu", "cupy": "cuda:0 "}.get(backend, xp.__name__))
    with arrays.on_device_of(x):
        assert arrays.to_numpy(x + x).tolist() == [0, 2, 4, 6, 8, 10]


def test_a_gpu_without_cublas_is_not_taken(monkeypatch):
    class Array(np.ndarray):
        def __matmul__(self, other):
            if min(self.shape) == 1:  # such products CuPy computes without cuBLAS
                return self * other
            raise ImportError("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr(devices, "mover", lambda target: lambda x: x.view(Array))
    assert pick_device("auto") == "cpu"
    with pytest.raises(DeviceError, match=r"^no GPU can be used: libcublas\.so\.13: cannot open"):
        pick_device("cuda")


@needs_gpu
def test_auto_takes_a_gpu_that_works():
    assert pick_device("auto") == "cuda" and pick_device("cuda:0") == "cuda:0"
    assert devices.free_memory("cuda:0") > 1 << 20


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_auto_is_the_cpu_without_a_gpu():
    assert pick_device("auto") == "cpu"
