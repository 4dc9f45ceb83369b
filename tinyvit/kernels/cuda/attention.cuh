// What attention forward and backward share: products of 16 x 16 tiles on the tensor cores, and rows of a head.
//
// A warp multiplies 16 x 16 tiles: c (m x n) += a (m x k) b (k x n). Accumulators are float[8] a lane, with group =
// lane / 4 and pair = lane % 4: element i stands in row group + 8 (i / 2 % 2) and column 8 (i / 4) + 2 pair + i % 2.
// The sums are fp32; products of fp32 operands are made of three tf32 products of their upper and lower halves, which
// leaves an error near 2^-21, or with TF32 = 1 of one, of operands rounded to tf32, with an error near 2^-11.
#pragma once
#include "common.cuh"

DEVICE int tile_row(int i) { return threadIdx.x % 32 / 4 + 8 * (i / 2 % 2); }
DEVICE int tile_column(int i) { return 8 * (i / 4) + threadIdx.x % 4 * 2 + i % 2; }

template <class T>
struct Operand {
    unsigned x[4];
};

// In fp32 the k axis is permuted: slots p and p + 4 of an instruction hold k = 2 p and 2 p + 1 of its eight, so that
// a lane reads neighbours, and accumulators serve as the next product's operand where they are.
template <>
struct Operand<float> {
    float x[8];
};

template <class T>
DEVICE void multiply(float (&c)[8], const Operand<T>& a, const Operand<T>& b) {
    Scalar<T>::mma(c, a.x, b.x);
    Scalar<T>::mma(c + 4, a.x, b.x + 2);
}

DEVICE float upper_half(float x) { return __int_as_float(__float_as_int(x) & 0xffffe000); }

DEVICE void multiply(float (&c)[8], const Operand<float>& a, const Operand<float>& b) {
    float upper_a[8], lower_a[8], upper_b[8], lower_b[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        upper_a[i] = TF32 ? round_tf32(a.x[i]) : upper_half(a.x[i]);
        lower_a[i] = a.x[i] - upper_a[i];
        upper_b[i] = TF32 ? round_tf32(b.x[i]) : upper_half(b.x[i]);
        lower_b[i] = b.x[i] - upper_b[i];
    }
#pragma unroll
    for (int half = 0; half < 2; half++)  // of the columns
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if constexpr (!TF32) {
                mma_tf32(c + 4 * half, lower_a + 4 * k, upper_b + 4 * half + 2 * k);
                mma_tf32(c + 4 * half, upper_a + 4 * k, lower_b + 4 * half + 2 * k);
            }
            mma_tf32(c + 4 * half, upper_a + 4 * k, upper_b + 4 * half + 2 * k);
        }
}

// Accumulators as the left operand of a further product.
template <class T>
DEVICE void as_left(Operand<T>& a, const float (&c)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a.x[i] = Scalar<T>::pack(c[2 * i], c[2 * i + 1]);
}

DEVICE void as_left(Operand<float>& a, const float (&c)[8]) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        a.x[4 * k] = c[4 * k];
        a.x[4 * k + 1] = c[4 * k + 2];
        a.x[4 * k + 2] = c[4 * k + 1];
        a.x[4 * k + 3] = c[4 * k + 3];
    }
}

// The left operand from shared memory: rows of m, `stride` numbers apart.
template <class T>
DEVICE void load_left(Operand<T>& a, const T* tile, int stride) {
    const int lane = threadIdx.x % 32;
    ldmatrix(a.x, tile + lane % 16 * stride + lane / 16 * 8);
}

// The same from rows of k.
template <class T>
DEVICE void load_left_transposed(Operand<T>& a, const T* tile, int stride) {
    const int lane = threadIdx.x % 32;
    ldmatrix_transposed(a.x, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

// The right operand from rows of k.
template <class T>
DEVICE void load_right(Operand<T>& b, const T* tile, int stride) {
    const int lane = threadIdx.x % 32;
    ldmatrix_transposed(b.x, tile + lane % 16 * stride + lane / 16 * 8);
}

// The right operand from rows of n: the product with a transposed matrix.
template <class T>
DEVICE void load_right_transposed(Operand<T>& b, const T* tile, int stride) {
    const int lane = threadIdx.x % 32;
    ldmatrix(b.x, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

DEVICE void load_left(Operand<float>& a, const float* tile, int stride) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {  // of the rows
            const float2 v = *reinterpret_cast<const float2*>(tile + (group + 8 * half) * stride + 8 * k + 2 * pair);
            a.x[4 * k + half] = v.x;
            a.x[4 * k + half + 2] = v.y;
        }
}

DEVICE void load_left_transposed(Operand<float>& a, const float* tile, int stride) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) a.x[i] = tile[(8 * (i / 4) + 2 * pair + i / 2 % 2) * stride + group + 8 * (i % 2)];
}

DEVICE void load_right(Operand<float>& b, const float* tile, int stride) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) b.x[i] = tile[(8 * (i / 2 % 2) + 2 * pair + i % 2) * stride + group + 8 * (i / 4)];
}

DEVICE void load_right_transposed(Operand<float>& b, const float* tile, int stride) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++)  // of the columns
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float2 v = *reinterpret_cast<const float2*>(tile + (group + 8 * half) * stride + 8 * k + 2 * pair);
            b.x[4 * half + 2 * k] = v.x;
            b.x[4 * half + 2 * k + 1] = v.y;
        }
}

// Accumulators into memory as numbers of type T.
template <class T>
DEVICE void store_tile(T* tile, int stride, const float (&c)[8], float factor = 1.0f) {
#pragma unroll
    for (int i = 0; i < 8; i += 2)
        store_pair(tile + tile_row(i) * stride + tile_column(i), c[i] * factor, c[i + 1] * factor);
}

// --- rows of a head ------------------------------------------------------------------------------------------------

using T = SCALAR;

constexpr int D = HEAD_DIM;
constexpr int DEPTH = (D + 15) / 16;    // tiles across a row; beyond D they hold zeros
constexpr int STRIDE = 16 * DEPTH + 8;  // between rows in shared memory: eight neighbouring rows lie in different banks
constexpr int THREADS = 32 * WARPS;     // of a block
constexpr int CHUNK = 16 / sizeof(T);   // numbers of a copy
constexpr float LOG2_E = 1.4426950408889634f;

// This thread's warp in its block. Through a shuffle, so that the compiler knows it to be the same for all lanes and
// branches on it without providing for their parting.
DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int tiles_of(int rows) { return (rows + 15) / 16; }

// The factor of a weight that dropout keeps or drops; 0 beyond the ends.
DEVICE float dropout_factor(const T* dropout_mask, int query, int key, int queries, int keys) {
    return query < queries && key < keys ? to_float(dropout_mask[1LL * query * keys + key]) : 0.0f;
}

// Starts copying rows first ... first + count of a matrix of n rows into shared memory, zeros where there are none.
DEVICE void copy_rows(T* to, const T* from, int stride, int first, int count, int n) {
    constexpr int chunks = 16 * DEPTH / CHUNK;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * chunks; i += THREADS) {
        const int row = i / chunks, column = i % chunks * CHUNK;
        const bool inside = first + row < n && column < D;
        cp_async(to + row * STRIDE + column, inside ? from + (first + row) * stride + column : from, inside);
    }
}

// A warp's own `count` rows from shared memory into a matrix of n rows, from row `first` on.
DEVICE void write_rows(T* to, int stride, const T* from, int first, int count, int n) {
    constexpr int chunks = D / CHUNK;
    for (int i = threadIdx.x % 32; i < count * chunks; i += 32) {
        const int row = i / chunks, column = i % chunks * CHUNK;
        if (first + row < n)
            store(to + (first + row) * stride + column,
                  *reinterpret_cast<const Vector<T, CHUNK>*>(from + row * STRIDE + column));
    }
}

// --- backward ------------------------------------------------------------------------------------------------------

// The least power of two that is not below n.
__device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// The sums over a head's n rows of y dy, into delta, and row_log beside them, for `rows` rows in whole tiles. Beyond n
// q and dy are 0: any number does. The loads of four rows a thread are issued before the first sum.
DEVICE void row_statistics(float* delta, float* logs, const T* y, const T* dy, int stride, const float* row_log, int n,
                           int rows) {
    constexpr int chunks = D / CHUNK, lanes = power_of_two(chunks), height = THREADS / lanes, unrolled = 4;
    const int lane = threadIdx.x % lanes;
    for (int start = 0; start < rows; start += unrolled * height) {
        const int first = start + threadIdx.x / lanes;
        Vector<T, CHUNK> a[unrolled] = {}, b[unrolled] = {};
        float log[unrolled] = {};
#pragma unroll
        for (int turn = 0; turn < unrolled; turn++) {
            const int row = first + turn * height;
            if (row >= n || lane >= chunks) continue;
            a[turn] = load<CHUNK>(y + row * stride + lane * CHUNK);
            b[turn] = load<CHUNK>(dy + row * stride + lane * CHUNK);
            log[turn] = row_log[row];
        }
#pragma unroll
        for (int turn = 0; turn < unrolled; turn++) {  // as often for all: lanes meet in the sum
            float product = 0.0f;
#pragma unroll
            for (int i = 0; i < CHUNK; i++) product = fmaf(a[turn][i], b[turn][i], product);
            product = warp_sum<lanes>(product);
            const int row = first + turn * height;
            if (lane == 0 && row < rows) {
                delta[row] = product;
                logs[row] = log[turn];
            }
        }
    }
}

// The sums over the n rows of dq, of dk and of dv, which this block has written from `dq` on, into `sums`: three times D,
// as far apart as in a row. `memory` holds 3 CHUNK floats for each of the block's threads.
DEVICE void write_sums(float* sums, const T* dq, int heads, int n, unsigned char* memory) {
    constexpr int chunks = D / CHUNK, lanes = power_of_two(chunks), height = THREADS / lanes;
    const int lane = threadIdx.x % lanes;
    float* scratch = reinterpret_cast<float*>(memory) + threadIdx.x / lanes * 3 * D;
    float sum[3][CHUNK] = {};
    __syncthreads();  // the gradients are written, and nobody needs the memory any more
    if (lane < chunks) {
#pragma unroll 2
        for (int row = threadIdx.x / lanes; row < n; row += height)
#pragma unroll
            for (int part = 0; part < 3; part++) {  // not by `load`, which might move before the stores
                const T* from = dq + (3 * row + part) * heads * D + lane * CHUNK;
                const Vector<T, CHUNK> v = *reinterpret_cast<const Vector<T, CHUNK>*>(from);
#pragma unroll
                for (int i = 0; i < CHUNK; i++) sum[part][i] += v[i];
            }
#pragma unroll
        for (int i = 0; i < 3 * CHUNK; i++)
            scratch[i / CHUNK * D + lane * CHUNK + i % CHUNK] = sum[i / CHUNK][i % CHUNK];
    }
    __syncthreads();
    scratch = reinterpret_cast<float*>(memory);
    for (int i = threadIdx.x; i < 3 * D; i += THREADS) {
        float total = 0.0f;
        for (int row = 0; row < height; row++) total += scratch[row * 3 * D + i];
        sums[i / D * heads * D + i % D] = total;
    }
}
