"""The search for matrix products' algorithms, and the file that it leaves, with a stand-in for cuBLASLt."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import cuda_sim
import numpy as np
import pytest
from cublas_sim import CuBLASLt

from tinyvit.kernels.cuda import cublas, product_file

TIMES = {7: 3.0, 8: 1.0, 9: 2.0}  # by algorithm; the first is what cuBLASLt chooses


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    product_file._read.cache_clear()
    yield product_file.path()
    product_file._read.cache_clear()


def multiply(xp: Any, scalar: type = np.float32) -> None:
    x, weight = (np.ones(shape, scalar) for shape in ((9, 8), (16, 8)))
    assert np.array_equal(cublas.linear(xp, x, weight, None), np.full((9, 16), 8))


def search(folder: Path, library: CuBLASLt) -> list[float]:
    with cuda_sim.device(folder, library=library) as xp:

        def measure() -> float:
            cublas.linear(xp, np.ones((9, 8), np.float32), np.ones((16, 8), np.float32), None)
            return TIMES[library.algorithms[-1]]

        multiply(xp)
        (key,) = cublas._plans
        times = cublas.search(key, measure)
        multiply(xp)
    product_file._read.cache_clear()  # as another process begins
    return times


def used(folder: Path, library: CuBLASLt, scalar: type = np.float32) -> int:
    """The algorithm that a process uses."""
    with warnings.catch_warnings(), cuda_sim.device(folder, library=library) as xp:
        warnings.simplefilter("error")
        multiply(xp, scalar)
    return library.algorithms[-1]


def test_the_fastest_is_used_from_then_on(folder, file):
    assert used(folder, CuBLASLt()) == 7 and not file.exists()
    library = CuBLASLt()
    assert search(folder, library) == [3.0, 1.0, 2.0]
    assert library.algorithms == [7, 7, 8, 9, 8]
    assert used(folder, CuBLASLt()) == 8
    assert used(folder, CuBLASLt(), np.float16) == 7  # of which nothing is known


def test_searches_add_to_the_file(folder, file):
    product_file.keep("another product", np.ones(64, np.uint8))
    search(folder, CuBLASLt())
    assert used(folder, CuBLASLt()) == 8 and (product_file.find("another product") == 1).all()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"of another process": 64 * "02"}))  # after this one has read it
    product_file.keep("a third", np.ones(64, np.uint8))
    assert json.loads(file.read_text()).keys() == {*kept, "of another process", "a third"}


def test_an_algorithm_is_for_its_device_and_version(folder, monkeypatch):
    search(folder, CuBLASLt())
    newer = CuBLASLt()
    newer.version += 1
    assert used(folder, newer) == 7
    with cuda_sim.device(folder, library=(library := CuBLASLt())) as xp, monkeypatch.context() as patch:
        patch.setattr(cublas.cuda, "device_name", lambda: "another")
        multiply(xp)
    assert library.algorithms == [7]
    monkeypatch.setattr(cublas, "WORKSPACE", 1 << 20)  # which an algorithm may need more of
    assert used(folder, CuBLASLt()) == 7


def test_an_algorithm_that_is_not_taken_is_forgotten_in_silence(folder):
    search(folder, CuBLASLt())
    library = CuBLASLt()
    library.unknown = (8,)
    assert used(folder, library) == 7


def test_a_search_leaves_out_what_is_refused(folder):
    library = CuBLASLt()
    library.unknown = (8,)
    with pytest.warns(UserWarning, match="cuBLASLt refuses"):
        assert search(folder, library) == [3.0, 2.0]
    assert used(folder, CuBLASLt()) == 9


def test_a_search_in_which_all_is_refused_keeps_nothing(folder, file):
    library = CuBLASLt()
    with cuda_sim.device(folder, library=library) as xp:
        multiply(xp)
        (key,) = cublas._plans

        def refuse() -> float:
            cublas._plans[key] = None
            return 1.0

        assert cublas.search(key, refuse) == [] and cublas._plans[key] is None
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 5}', '{"a": "77"}', '{"a": "x"}', b"\xff\xfe"])
def test_a_damaged_file_is_ignored_with_one_warning(folder, file, text):
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    library = CuBLASLt()
    with cuda_sim.device(folder, library=library) as xp, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        multiply(xp), multiply(xp, np.float16)
    assert library.algorithms == [7, 7] and len(caught) == 1 and f"{file} is ignored" in str(caught[0].message)
