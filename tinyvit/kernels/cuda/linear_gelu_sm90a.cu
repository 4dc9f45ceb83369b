// A linear layer and its GELU in one kernel on Hopper, and the way back through the layer after them and GELU, where the
// products' inner dimension is short: what columns.cu does to the wide activation, before it leaves the chip.
//
// BACKWARD 0: hidden = x W^T and y = gelu(hidden + bias), of x (rows, INNER) and W (columns, INNER); hidden may be null.
// BACKWARD 1: y = (x W) gelu'(hidden + bias) and the sums of its columns, of x (rows, INNER) and W (INNER, columns): the
// gradient of the next layer's result, and that layer's weight.
// That reads and writes each array once, x once for every COLUMNS columns, and takes 2 rows columns INNER FLOPs and
// about 29 instructions a number of y, 40 backward.
//
// A block keeps COLUMNS columns of W in shared memory. Each of its warpgroups takes tiles of 64 rows by itself: x's rows
// stay in registers, and 64 columns after 64 columns are multiplied and finished. While one takes GELU, the tensor cores
// work for another. Sums of columns go to `partial` (blocks for the same columns, columns), which sum_partials adds up.
//
// Compile for sm_90a with SCALAR (bf16 or f16), INNER (a multiple of 64), COLUMNS (a multiple of 64 that divides the
// columns), WARPGROUPS, APPROXIMATE (see gelu.cuh) and BACKWARD.
#include "gelu.cuh"
#include "warpgroup.cuh"

using T = SCALAR;

constexpr int STEPS = INNER / 16, THREADS = 128 * WARPGROUPS;
constexpr int GROUP = INNER * 128;  // bytes of 64 columns of W

static_assert(INNER % 64 == 0 && COLUMNS % 64 == 0, "whole panels of 64 numbers");

// c (64 x 64) = the rows a times 64 columns of W. They lie in panels of 64 numbers: a panel of INNER rows backward, one of
// 64 rows, W's columns, for each 64 of INNER forward.
DEVICE void multiply_group(float (&c)[32], const unsigned (&a)[STEPS][4], const unsigned char* group) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        wgmma<T, 64, BACKWARD != 0>(c, a[k], group + (BACKWARD ? k * 2048 : k / 4 * 8192 + k % 4 * 32), k > 0);
    wgmma_commit();
}

// Adds up the sums of a warp's eight groups of lanes, which hold the same 16 columns: the lanes of group j are left with
// the sums of columns 2 j and 2 j + 1.
template <int half = 8>
DEVICE void sum_over_groups(float (&sums)[16]) {
    const bool upper = threadIdx.x & 2 * half;
#pragma unroll
    for (int i = 0; i < half; i++) {
        const float given = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
        sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, 2 * half);
    }
    if constexpr (half > 2) sum_over_groups<half / 2>(sums);
}

// grid: columns / COLUMNS times as many blocks as share the rows; shared memory: INNER COLUMNS numbers, and backward
// COLUMNS floats for each warp.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_gelu_sm90a(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, T* hidden,
                      T* __restrict__ y, float* __restrict__ partial, int rows, int columns) {
    DYNAMIC_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, group = lane / 4, pair = lane % 4;
    const int shares = columns / COLUMNS, first_column = blockIdx.x % shares * COLUMNS;
    float* sums = reinterpret_cast<float*>(memory + COLUMNS / 64 * GROUP) + thread / 32 * COLUMNS;  // this warp's

#pragma unroll 1
    for (int i = thread; i < INNER * COLUMNS / 8; i += THREADS) {
        constexpr int chunks = (BACKWARD ? COLUMNS : INNER) / 8;
        const int row = i / chunks, chunk = i % chunks;
        if constexpr (BACKWARD)
            cp_async(memory + place(INNER, row, chunk), weight + row * columns + first_column + chunk * 8, true);
        else
            cp_async(memory + row / 64 * GROUP + place(64, row % 64, chunk),
                     weight + (first_column + row) * INNER + chunk * 8, true);
    }
    cp_async_commit();
    if constexpr (BACKWARD)
        for (int i = lane; i < COLUMNS; i += 32) sums[i] = 0.0f;
    cp_async_wait<0>();
    fence_for_wgmma();
    __syncthreads();

    const int step = gridDim.x / shares * WARPGROUPS * 64;
    for (int first = (blockIdx.x / shares * WARPGROUPS + thread / 128) * 64; first < rows; first += step) {
        const int row = first + thread % 128 / 32 * 16 + group;  // this lane's first one; the other one is row + 8
        unsigned a[STEPS][4];
#pragma unroll
        for (int i = 0; i < 4 * STEPS; i++) {
            const int token = row + i % 2 * 8, column = i / 4 * 16 + i / 2 % 2 * 8 + 2 * pair;
            a[i / 4][i % 4] = token < rows ? *reinterpret_cast<const unsigned*>(x + token * INNER + column) : 0;
        }
#pragma unroll 1
        for (int part = 0; part < COLUMNS / 64; part++) {
            const int column = first_column + 64 * part;
            float c[32];
            multiply_group(c, a, memory + part * GROUP);
            unsigned inputs[8];  // the first row's while the products run
            if constexpr (BACKWARD) load_row<T, 64>(inputs, hidden + row * columns + column, row < rows);
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < 4 * STEPS; i++) pin(a[i / 4][i % 4]);
#pragma unroll
            for (int i = 0; i < 32; i++) pin(c[i]);

#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool inside = row + 8 * half < rows;
                const int first_number = (row + 8 * half) * columns + column;
                unsigned biases[8];
#pragma unroll
                for (int j = 0; j < 8; j++)
                    biases[j] = *reinterpret_cast<const unsigned*>(bias + column + 8 * j + 2 * pair);
                if constexpr (BACKWARD) {
                    if (half == 1) load_row<T, 64>(inputs, hidden + first_number, inside);
                } else if (hidden) {
                    store_row<T, 64>(hidden + first_number, c, half, 1.0f, inside);
                }
                if (!BACKWARD || inside)  // sums are 0 beyond the last row; and without it registers do not suffice
#pragma unroll
                    for (int i = 0; i < 16; i++) {
                        float& number = c[i / 2 * 4 + 2 * half + i % 2];
                        const float shift = half_of_word<T>(biases[i / 2], i % 2);
                        if constexpr (BACKWARD)
                            number *= gelu_slope<T>(half_of_word<T>(inputs[i / 2], i % 2) + shift);
                        else
                            number = gelu<T>(number + shift);
                    }
                store_row<T, 64>(y + first_number, c, half, 1.0f, inside);
            }
            if constexpr (BACKWARD) {
                float of_columns[16];
#pragma unroll
                for (int i = 0; i < 16; i++) of_columns[i] = c[i / 2 * 4 + i % 2] + c[i / 2 * 4 + i % 2 + 2];
                sum_over_groups(of_columns);
#pragma unroll
                for (int i = 0; i < 2; i++) sums[64 * part + 8 * group + 2 * pair + i] += of_columns[i];
            }
        }
    }

    if constexpr (BACKWARD) {
        __syncthreads();
        sums = reinterpret_cast<float*>(memory + COLUMNS / 64 * GROUP);
        for (int i = thread; i < COLUMNS; i += THREADS) {
            float total = 0.0f;
            for (int warp = 0; warp < THREADS / 32; warp++) total += sums[warp * COLUMNS + i];
            partial[blockIdx.x / shares * columns + first_column + i] = total;
        }
    }
}
