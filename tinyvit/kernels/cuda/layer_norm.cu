// Layer normalisation over rows of DIM numbers (Ba et al. 2016, arXiv:1607.06450).
//
// Forward reads x and writes y, and 8 bytes a row; backward reads dy and x and writes dx. About 8 and 15 FLOPs a
// number: bound by memory.
//
// Forward: a warp takes a row and keeps it in registers, so that mean and variance cost no second reading; a lane
// holds VECTORS vectors of WIDTH numbers. Backward: a thread takes one vector of every row of its block, so that its
// share of dweight and dbias stays in registers; the block goes over the rows in steps of ROWS, whose loads are all
// under way at once. Each of a fixed number of blocks writes its dweight and dbias into `partial`, which
// `sum_partials` (columns.cu) adds up.
//
// Compile with SCALAR and DIM.
#include "common.cuh"

using T = SCALAR;

constexpr int FULL = 16 / sizeof(T);
constexpr int WIDTH = DIM % FULL == 0 ? FULL : DIM % 2 == 0 ? 2 : 1;  // rows start where such vectors may
constexpr int VECTORS = (DIM + 32 * WIDTH - 1) / (32 * WIDTH);
constexpr int THREADS = 32 * VECTORS;                      // of a block backward
constexpr int BLOCKS = THREADS < 512 ? 512 / THREADS : 1;  // of a multiprocessor backward: bounds the registers
constexpr int ROWS = 3;

using V = Vector<T, WIDTH>;

DEVICE int column(int vector) { return (vector * 32 + threadIdx.x % 32) * WIDTH; }

// grid: blocks of warps enough for all rows. mean and rstd may be null.
extern "C" __global__ void __launch_bounds__(256)
    layer_norm_forward(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                       T* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, long long rows,
                       float eps) {
    const long long row = 1LL * blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    V v[VECTORS];
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        const int c = column(k);
        if (c >= DIM) continue;
        v[k] = load<WIDTH>(x + row * DIM + c);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) total += v[k][i];
    }
    const float centre = warp_sum(total) * (1.0f / DIM);
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        if (column(k) >= DIM) continue;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) squares = fmaf(v[k][i] - centre, v[k][i] - centre, squares);
    }
    const float scale = rsqrtf(warp_sum(squares) * (1.0f / DIM) + eps);
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        const int c = column(k);
        if (c >= DIM) continue;
        const V w = load<WIDTH>(weight + c), b = load<WIDTH>(bias + c);
        V out;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) out.set(i, fmaf((v[k][i] - centre) * scale, w[i], b[i]));
        store(y + row * DIM + c, out);
    }
    if (mean && threadIdx.x % 32 == 0) {
        mean[row] = centre;
        rstd[row] = scale;
    }
}

// Blocks of THREADS; each writes a row of partial (blocks, 2 DIM): dweight, dbias. Shared memory: 4 ROWS THREADS / 32
// floats.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    layer_norm_backward(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ weight,
                        const float* __restrict__ mean, const float* __restrict__ rstd, T* __restrict__ dx,
                        float* __restrict__ partial, long long rows) {
    DYNAMIC_SHARED(memory);
    const int column = threadIdx.x * WIDTH;
    const bool inside = column < DIM;
    const V zero = {};
    const V w = inside ? load<WIDTH>(weight + column) : zero;
    float dweight[WIDTH] = {}, dbias[WIDTH] = {};
    int turn = 0;

    for (long long first = 1LL * blockIdx.x * ROWS; first < rows; first += 1LL * gridDim.x * ROWS, turn ^= 1) {
        V g[ROWS], n[ROWS];
        float centre[ROWS], scale[ROWS], sums[2 * ROWS];  // sums of g normal and of g, where g = dy weight
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool live = inside && first + r < rows;
            const long long at = (first + r) * DIM + column;
            g[r] = live ? load<WIDTH>(dy + at) : zero;
            n[r] = live ? load<WIDTH>(x + at) : zero;
            centre[r] = first + r < rows ? mean[first + r] : 0.0f;
            scale[r] = first + r < rows ? rstd[first + r] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float along = 0.0f, total = 0.0f;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const float normal = (n[r][i] - centre[r]) * scale[r];
                dweight[i] = fmaf(g[r][i], normal, dweight[i]);
                dbias[i] += g[r][i];
                along = fmaf(g[r][i] * w[i], normal, along);
                total = fmaf(g[r][i], w[i], total);
            }
            sums[2 * r] = along;
            sums[2 * r + 1] = total;
        }
        block_sums<2 * ROWS>(sums, reinterpret_cast<float*>(memory) + turn * 2 * ROWS * (THREADS / 32));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!inside || first + r >= rows) continue;
            const float along = sums[2 * r] * (1.0f / DIM), total = sums[2 * r + 1] * (1.0f / DIM);
            V out;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const float normal = (n[r][i] - centre[r]) * scale[r];
                out.set(i, scale[r] * (g[r][i] * w[i] - total - normal * along));
            }
            store(dx + (first + r) * DIM + column, out);
        }
    }

    if (!inside) return;
    float* to = partial + 2LL * DIM * blockIdx.x + column;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        to[i] = dweight[i];
        to[DIM + i] = dbias[i];
    }
}
