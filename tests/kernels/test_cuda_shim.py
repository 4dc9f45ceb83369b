"""The CPU shim itself: it runs right kernels and finds the mistakes that are planted in wrong ones."""

from __future__ import annotations

from pathlib import Path

import cuda_sim
import numpy as np
import pytest
from cuda_sim import decode, encode, guarded

from tinyvit.kernels import cuda

pytestmark = pytest.mark.skipif(cuda_sim.COMPILER is None, reason="no C++ compiler")

SOURCE = """
#include "common.cuh"

// y = x in the opposite order, through shared memory
extern "C" __global__ void reverse(const float* x, float* y, int with_barrier) {
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    shared[threadIdx.x] = x[threadIdx.x];
    if (with_barrier) __syncthreads();
    y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// y = x, four numbers a thread, copied asynchronously
extern "C" __global__ void copy(const float* x, float* y, int wait, int first) {
    DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory) + 4 * threadIdx.x;
    cp_async(shared, x + first + 4 * threadIdx.x, true);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = shared[i];
    cp_async_wait<0>();
}

extern "C" __global__ void never_wait(const float* x) {
    DYNAMIC_SHARED(memory);
    cp_async(memory + 16 * threadIdx.x, x, true);
}

extern "C" __global__ void sum(const float* x, float* y) { y[threadIdx.x] = warp_sum(x[threadIdx.x]); }

extern "C" __global__ void part_of_a_block_at_a_barrier() {
    if (threadIdx.x < 32) __syncthreads();
}

extern "C" __global__ void part_of_a_warp_at_a_shuffle(float* y) {
    if (threadIdx.x < 16) y[threadIdx.x] = warp_sum(1.0f);
}

extern "C" __global__ void two_operations(float* y) {
    y[threadIdx.x] = threadIdx.x < 16 ? warp_sum(1.0f) : float(exp2_fast(0.0f));
    if (threadIdx.x >= 16) __syncwarp();
}

extern "C" __global__ void write_at(float* y, int i) { y[i] = 1.0f; }

extern "C" __global__ void write_shared(int i) {
    DYNAMIC_SHARED(memory);
    memory[i] = 1;
}
"""


@pytest.fixture
def kernels(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls a kernel of SOURCE with one block of 64 threads and 1024 bytes of shared memory."""
    (tmp_path / "common.cuh").write_text((cuda.FOLDER / "common.cuh").read_text())
    (tmp_path / "planted.cu").write_text(SOURCE)
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)

    def run(name, *arguments, seed=0):
        with cuda_sim.device(folder, seed):
            cuda.kernel("planted", name)((1,), (64,), arguments, shared_mem=1024)

    return run


def test_all(kernels):
    """One test, because the sources are compiled once for it."""
    x = guarded(np.arange(1.0, 257.0, dtype=np.float32))
    y = cuda_sim.empty(256, np.float32)
    for seed in range(4):
        kernels("reverse", x, y, np.int32(1), seed=seed)
        assert np.array_equal(y[:64], x[63::-1])
        kernels("copy", x, y, np.int32(1), np.int32(0), seed=seed)
        assert np.array_equal(y, x)
        kernels("sum", x, y, seed=seed)
        assert (y[:64] == [sum(range(1, 33))] * 32 + [sum(range(33, 65))] * 32).all()

    kernels("reverse", x, y, np.int32(0))
    assert np.isnan(y[:64]).any()
    kernels("copy", x, y, np.int32(0), np.int32(0))
    assert np.isnan(y).all()
    kernels("copy", x, y, np.int32(1), np.int32(4))
    assert np.isnan(y[-4:]).all() and not np.isnan(y[:-4]).any()  # beyond the end of x

    for name, arguments, message in (
        ("copy", (x, y, np.int32(1), np.int32(1)), "misaligned"),
        ("never_wait", (x,), "without waiting"),
        ("part_of_a_block_at_a_barrier", (), "deadlock"),
        ("part_of_a_warp_at_a_shuffle", (y,), "deadlock"),
        ("two_operations", (y,), "different operations"),
        ("write_shared", (np.int32(1024),), "beyond the shared memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels(name, *arguments)
    with pytest.raises(AssertionError, match="beyond an array"):
        kernels("write_at", guarded(x), np.int32(-1))
    with pytest.raises(AssertionError, match="expects 4 bytes"):
        kernels("write_at", y, np.int64(0))
    with pytest.raises(AssertionError, match="would guess"):
        kernels("write_at", y, 0)


PRODUCTS = """
#include "warpgroup.cuh"

// c (64 x 40) = 2 a (64 x 16) b: b (16 x 40) lies by rows, its transpose (40 x 16) by columns. `mistake` plants one.
template <bool by_rows>
DEVICE void multiply(const f16* a, const f16* b, float* c, int mistake) {
    DYNAMIC_SHARED(memory);
    const int thread = threadIdx.x, rows = by_rows ? 16 : 40, chunks = by_rows ? 5 : 2;
    for (int i = thread; i < rows * chunks; i += 128) {
        const int row = i / chunks, chunk = i % chunks;
        unsigned char* to = memory + row * 128 + (mistake == 1 ? chunk : chunk ^ row % 8) * 16;
        if (mistake == 9)
            memcpy(to, b + i * 8, 16);
        else
            cp_async(to, b + i * 8, true);
    }
    cp_async_commit();
    if (mistake == 10) fence_for_wgmma();
    cp_async_wait<0>();
    if (mistake != 2 && mistake < 9) fence_for_wgmma();
    __syncthreads();
    const int row = thread / 32 * 16 + thread % 32 / 4;
    unsigned left[4];
    for (int i = 0; i < 4; i++)
        left[i] = *reinterpret_cast<const unsigned*>(a + (row + i % 2 * 8) * 16 + i / 2 * 8 + thread % 4 * 2);
    float sum[20];
    if (mistake != 3) wgmma_fence();
    wgmma<f16, 40, by_rows>(sum, left, memory + (mistake == 4 ? 512 : 0), false);
    wgmma<f16, 40, by_rows>(sum, left, memory, true);
    wgmma_commit();
    if (mistake == 5) left[0] = 0;
    if (mistake == 6) sum[0] = 0.0f;
    if (mistake == 7) memory[thread] = 0;
    if (mistake != 8) wgmma_wait<0>();
    pin(left[0]);
    for (int i = 0; i < 20; i++) {
        pin(sum[i]);
        c[(row + i / 2 % 2 * 8) * 40 + i / 4 * 8 + thread % 4 * 2 + i % 2] = sum[i];
    }
}

extern "C" __global__ void by_rows(const f16* a, const f16* b, float* c, int mistake) {
    multiply<true>(a, b, c, mistake);
}

extern "C" __global__ void by_columns(const f16* a, const f16* b, float* c, int mistake) {
    multiply<false>(a, b, c, mistake);
}

extern "C" __global__ void part_of_a_warpgroup() {
    if (threadIdx.x < 96) wgmma_wait<0>();
}
"""


def test_products_of_warpgroups(folder, tmp_path, monkeypatch):
    """Right ones are NumPy's; each mistake is an error, or at least a wrong result."""
    for name in ("common.cuh", "warpgroup.cuh"):
        (tmp_path / name).write_text((cuda.FOLDER / name).read_text())
    (tmp_path / "products.cu").write_text(PRODUCTS)
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    rng = np.random.default_rng(0)
    a, b = (encode(rng.standard_normal(shape), "f16") for shape in ((64, 16), (16, 40)))
    right = 2 * decode(a) @ decode(b)

    def run(name, *arguments, seed=0):
        with cuda_sim.device(folder, seed):
            cuda.kernel("products", name)((1,), (128,), arguments, shared_mem=40 * 128)

    def product(name, mistake, seed=0):
        c = cuda_sim.empty((64, 40), np.float32)
        run(name, guarded(a), guarded(b if name == "by_rows" else b.T.copy()), c, np.int32(mistake), seed=seed)
        return cuda_sim.error(decode(c), right)

    for name in ("by_rows", "by_columns"):
        assert product(name, 0) < 1e-6 and product(name, 0, seed=1) < 1e-6
        for mistake in (1, 5, 7):  # not permuted; operands overwritten before the product has been waited for
            assert not product(name, mistake) < 1e-3
        assert product(name, 6) < 1e-6  # what is written to accumulators is lost
        for mistake, message in (
            (2, "visible"), (3, "registers"), (4, "within an atom"), (8, "without waiting"), (9, "visible"),
            (10, "visible"),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=message):
                product(name, mistake)
    with pytest.raises(RuntimeError, match="deadlock"):
        run("part_of_a_warpgroup")
