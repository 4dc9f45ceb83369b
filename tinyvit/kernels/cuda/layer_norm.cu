// Layer normalisation over rows of DIM numbers (Ba et al. 2016, arXiv:1607.06450).
//
// Forward reads x and writes y, and 8 bytes a row; backward reads dy and x, and where x has another gradient that, too,
// and writes dx. About 8 and 17 FLOPs a number: bound by memory.
//
// Forward: a warp takes a row and keeps it in registers, so that mean and variance cost no second reading; a lane
// holds VECTORS vectors of WIDTH numbers. Backward: a thread takes one vector of every row of its group of threads, so
// that its share of dweight, dbias and the sums of dx's columns (which the layer before needs, for its bias) stays in
// registers; a group goes over the rows in steps of ROWS. The next step's rows are copied to shared memory while this
// step is computed (double buffering); a thread reads only what it has copied, so no barrier is needed. Each block
// writes its sums into `partial`, which `sum_partials` (columns.cu) adds up.
//
// Compile with SCALAR and DIM.
#include "common.cuh"

using T = SCALAR;

constexpr int FULL = 16 / sizeof(T);
constexpr int WIDTH = DIM % FULL == 0 ? FULL : DIM % 2 == 0 ? 2 : 1;  // rows start where such vectors may
constexpr int VECTORS = (DIM + 32 * WIDTH - 1) / (32 * WIDTH);
constexpr int THREADS = 32 * VECTORS;                                      // of a group backward
constexpr int GROUPS = THREADS < 256 ? 256 / THREADS : 1;                  // of a block
constexpr int BLOCKS = THREADS < 768 ? 768 / (THREADS * GROUPS) : 1;       // of a multiprocessor: bounds the registers
constexpr int ROWS = 2;

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

// Blocks of THREADS x GROUPS; each writes a row of partial (blocks, 3 DIM): dweight, dbias, sums of dx. `other` may be
// null. Shared memory: 6 ROWS vectors a thread, then 4 ROWS GROUPS THREADS / 32 floats.
extern "C" __global__ void __launch_bounds__(THREADS* GROUPS, BLOCKS)
    layer_norm_backward(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ weight,
                        const float* __restrict__ mean, const float* __restrict__ rstd, const T* __restrict__ other,
                        T* __restrict__ dx, float* __restrict__ partial, long long rows) {
    DYNAMIC_SHARED(memory);
    V* slots = reinterpret_cast<V*>(memory);  // two stages of ROWS rows of dy, x and `other`, a vector for each thread
    float* shared = reinterpret_cast<float*>(slots + 6 * ROWS * THREADS * GROUPS);
    const int column = threadIdx.x * WIDTH;
    const bool inside = column < DIM;
    const V zero = {};
    const V w = inside ? load<WIDTH>(weight + column) : zero;
    const long long step = 1LL * gridDim.x * GROUPS * ROWS;
    float totals[3][WIDTH] = {};  // of dweight, dbias and dx
    float centre[ROWS], scale[ROWS], next_centre[ROWS], next_scale[ROWS];
    int stage = 0;

    auto slot = [&](int of_stage, int r, int array) {
        return slots + ((of_stage * ROWS + r) * 3 + array) * (THREADS * GROUPS) + threadIdx.y * THREADS + threadIdx.x;
    };
    auto copy = [&](const T* from, long long row, V* to) {
        const bool live = inside && row < rows;
        from = live ? from + row * DIM + column : weight;
        if constexpr (sizeof(V) == 16)
            cp_async(to, from, live);
        else
            *to = live ? load<WIDTH>(from) : zero;
    };
    auto fetch = [&](long long start, int to_stage) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const long long row = start + threadIdx.y * ROWS + r;
            copy(dy, row, slot(to_stage, r, 0));
            copy(x, row, slot(to_stage, r, 1));
            if (other) copy(other, row, slot(to_stage, r, 2));
            next_centre[r] = row < rows ? mean[row] : 0.0f;
            next_scale[r] = row < rows ? rstd[row] : 0.0f;
        }
        cp_async_commit();
    };

    fetch(1LL * blockIdx.x * GROUPS * ROWS, 0);
    for (long long start = 1LL * blockIdx.x * GROUPS * ROWS; start < rows; start += step, stage ^= 1) {
        const long long first = start + threadIdx.y * ROWS;
        float sums[2 * ROWS];  // of g normal and of g, where g = dy weight
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            centre[r] = next_centre[r];
            scale[r] = next_scale[r];
        }
        fetch(start + step, stage ^ 1);
        cp_async_wait<1>();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const V g = *slot(stage, r, 0), n = *slot(stage, r, 1);
            float along = 0.0f, total = 0.0f;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const float normal = (n[i] - centre[r]) * scale[r];
                totals[0][i] = fmaf(g[i], normal, totals[0][i]);
                totals[1][i] += g[i];
                along = fmaf(g[i] * w[i], normal, along);
                total = fmaf(g[i], w[i], total);
            }
            sums[2 * r] = along;
            sums[2 * r + 1] = total;
        }
        block_sums<2 * ROWS>(sums, shared + (threadIdx.y * 2 + stage) * 2 * ROWS * (THREADS / 32));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!inside || first + r >= rows) continue;
            const V g = *slot(stage, r, 0), n = *slot(stage, r, 1), more = other ? *slot(stage, r, 2) : zero;
            const float along = sums[2 * r] * (1.0f / DIM), total = sums[2 * r + 1] * (1.0f / DIM);
            V out;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const float normal = (n[i] - centre[r]) * scale[r];
                const float d = fmaf(scale[r], g[i] * w[i] - total - normal * along, more[i]);
                totals[2][i] += d;
                out.set(i, d);
            }
            store(dx + (first + r) * DIM + column, out);
        }
    }

    cp_async_wait<0>();
    shared = reinterpret_cast<float*>(slots);
    for (unsigned group = 1; group < GROUPS; group++) {  // their sums join those of the first, one group after the other
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 3 * WIDTH; i++)
            if (threadIdx.y == group) shared[i * THREADS + threadIdx.x] = totals[i / WIDTH][i % WIDTH];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 3 * WIDTH; i++)
            if (threadIdx.y == 0) totals[i / WIDTH][i % WIDTH] += shared[i * THREADS + threadIdx.x];
    }
    if (!inside || threadIdx.y > 0) return;
#pragma unroll
    for (int i = 0; i < 3 * WIDTH; i++)
        partial[3LL * DIM * blockIdx.x + i / WIDTH * DIM + column + i % WIDTH] = totals[i / WIDTH][i % WIDTH];
}
