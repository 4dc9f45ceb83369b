// What follows a linear layer's product: a bias with GELU, or GELU alone, and sums over rows for the bias's gradient.
//
// bias_gelu_forward and scaled read and write rows * columns numbers; bias_gelu_backward and add_scaled read twice and
// write once as many; column_sums reads once. At most 40 FLOPs a number: bound by memory.
//
// A thread takes VECTOR neighbouring columns (16 bytes) of every row with the same remainder, whose loads are
// independent; a block has 32 x 8 threads: 32 vectors wide, 8 rows high. gridDim.y blocks share the rows. Sums stay
// in registers, are added up over a block's 8 rows of threads in shared memory, and go to `partial` (gridDim.y,
// columns) in fp32, which `sum_partials` adds up: two stages, always in the same order.
//
// Compile with SCALAR, VECTOR (16 / sizeof(SCALAR) if it divides the columns, else 1) and APPROXIMATE (see gelu.cuh).
#include "gelu.cuh"

using T = SCALAR;
using V = Vector<T, VECTOR>;

constexpr int HEIGHT = 8;   // rows of threads in a block
constexpr int SUMMED = 16;  // the same in the second stage
constexpr int MANY = 64;    // sums of one launch of it

// This thread's first column and first row; rows that it takes are `row_step()` apart.
DEVICE int first_column() { return (blockIdx.x * 32 + threadIdx.x) * VECTOR; }
DEVICE long long first_row() { return 1LL * blockIdx.y * HEIGHT + threadIdx.y; }
DEVICE long long row_step() { return 1LL * gridDim.y * HEIGHT; }

// y = residual + scale x, where `share` neighbouring rows, those of a sample, have one scale
extern "C" __global__ void __launch_bounds__(256)
    add_scaled(const T* __restrict__ residual, const T* __restrict__ x, const T* __restrict__ scale, T* __restrict__ y,
               long long share, long long rows, int columns) {
    const int column = first_column();
    if (column >= columns) return;
#pragma unroll 4
    for (long long row = first_row(); row < rows; row += row_step()) {
        const V r = load<VECTOR>(residual + row * columns + column);
        V v = load<VECTOR>(x + row * columns + column);
        const float factor = to_float(scale[row / share]);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v.set(i, fmaf(factor, v[i], r[i]));
        store(y + row * columns + column, v);
    }
}

// y = gelu(x + bias); bias may be null
extern "C" __global__ void __launch_bounds__(256) bias_gelu_forward(const T* __restrict__ x, const T* __restrict__ bias,
                                                                    T* __restrict__ y, long long rows, int columns) {
    const int column = first_column();
    if (column >= columns) return;
    const V b = bias ? load<VECTOR>(bias + column) : V{};
#pragma unroll 4
    for (long long row = first_row(); row < rows; row += row_step()) {
        V v = load<VECTOR>(x + row * columns + column);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v.set(i, gelu<T>(v[i] + b[i]));
        store(y + row * columns + column, v);
    }
}

// Adds up the sums of the block's rows of threads and writes them; `memory` holds 256 VECTOR floats.
DEVICE void write_sums(float* partial, const float (&sums)[VECTOR], int columns, unsigned char* memory) {
    float* scratch = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) scratch[(threadIdx.y * VECTOR + i) * 32 + threadIdx.x] = sums[i];
    __syncthreads();
    const int column = first_column();
    if (threadIdx.y > 0 || column >= columns) return;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        float total = 0.0f;
#pragma unroll
        for (int y = 0; y < HEIGHT; y++) total += scratch[(y * VECTOR + i) * 32 + threadIdx.x];
        partial[1LL * blockIdx.y * columns + column + i] = total;
    }
}

// dx = dy gelu'(x + bias), and the sums of its columns; bias may be null. Shared memory: 256 VECTOR floats
extern "C" __global__ void __launch_bounds__(256)
    bias_gelu_backward(const T* __restrict__ x, const T* __restrict__ bias, const T* __restrict__ dy,
                       T* __restrict__ dx, float* __restrict__ partial, long long rows, int columns) {
    const int column = first_column();
    float sums[VECTOR] = {};
    if (column < columns) {
        const V b = bias ? load<VECTOR>(bias + column) : V{};
#pragma unroll 2
        for (long long row = first_row(); row < rows; row += row_step()) {
            const V v = load<VECTOR>(x + row * columns + column);
            V g = load<VECTOR>(dy + row * columns + column);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                const float d = g[i] * gelu_slope<T>(v[i] + b[i]);
                g.set(i, d);
                sums[i] += d;
            }
            store(dx + row * columns + column, g);
        }
    }
    DYNAMIC_SHARED(memory);
    write_sums(partial, sums, columns, memory);
}

// dx = scale dy, as above, and the sums of its columns. Shared memory: 256 VECTOR floats
extern "C" __global__ void __launch_bounds__(256)
    scaled(const T* __restrict__ dy, const T* __restrict__ scale, T* __restrict__ dx, float* __restrict__ partial,
           long long share, long long rows, int columns) {
    const int column = first_column();
    float sums[VECTOR] = {};
    if (column < columns) {
#pragma unroll 4
        for (long long row = first_row(); row < rows; row += row_step()) {
            V v = load<VECTOR>(dy + row * columns + column);
            const float factor = to_float(scale[row / share]);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                v.set(i, factor * v[i]);
                sums[i] += v[i];
            }
            store(dx + row * columns + column, v);
        }
    }
    DYNAMIC_SHARED(memory);
    write_sums(partial, sums, columns, memory);
}

// shared memory: 256 VECTOR floats
extern "C" __global__ void __launch_bounds__(256)
    column_sums(const T* __restrict__ x, float* __restrict__ partial, long long rows, int columns) {
    const int column = first_column();
    float sums[VECTOR] = {};
    if (column < columns) {
#pragma unroll 4
        for (long long row = first_row(); row < rows; row += row_step()) {
            const V v = load<VECTOR>(x + row * columns + column);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) sums[i] += v[i];
        }
    }
    DYNAMIC_SHARED(memory);
    write_sums(partial, sums, columns, memory);
}

// Sums of the second stage: of the columns of partial (rows, columns), of which the first `split` belong to to[0], as many
// to to[1], and the others to to[2]. Blocks from `first` on do it.
struct Sum {
    const float* partial;
    T* to[3];
    int rows, columns, split, first;
};

struct Sums {
    Sum of[MANY];
};

// The second stage, for `count` of them. Blocks of 32 x SUMMED threads, a thread for a column; shared memory: 32 SUMMED
// floats.
extern "C" __global__ void __launch_bounds__(32 * SUMMED) sum_partials(const __grid_constant__ Sums sums, int count) {
    DYNAMIC_SHARED(memory);
    float* scratch = reinterpret_cast<float*>(memory);
    int mine = 0;
    while (mine + 1 < count && int(blockIdx.x) >= sums.of[mine + 1].first) mine++;
    const Sum& s = sums.of[mine];
    const int column = (blockIdx.x - s.first) * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < s.columns)
#pragma unroll 8
        for (int row = threadIdx.y; row < s.rows; row += SUMMED) sum += s.partial[1LL * row * s.columns + column];
    scratch[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= s.columns) return;
#pragma unroll
    for (int y = 1; y < SUMMED; y++) sum += scratch[y * 32 + threadIdx.x];
    T* to = column < s.split ? s.to[0] : column < 2 * s.split ? s.to[1] : s.to[2];
    to[column % s.split] = Scalar<T>::from(sum);
}
