// Fused multi-head self-attention, forward: softmax(q k^T / sqrt(D)) v, without the N x N matrix in memory.
//
// q, k and v are read from the packed activation (B, N, 3, H, D) where they lie; the result is (B, Q, H, D) for the
// first Q of the N tokens, often all. That moves 4 activations (B, N, H, D) and 4 bytes a row, and takes 4 N^2 D
// FLOPs a head, on tensor cores.
//
// Dao 2023 (arXiv:2307.08691), algorithm 1. A block takes WARPS * TILES tiles of 16 queries of one head, a warp
// TILES of them, whose scores and results stay in its registers. Keys and values pass through shared memory KEYS at a
// time, the next ones on their way while these are computed with; of the last ones whole tiles beyond N are left out,
// so N = 65 costs 80. A row is shared by four lanes: they exchange its maximum in each step, its sum only at the end.
//
// With DROPOUT = 1 each weight is multiplied by a number of `dropout_mask` (B, H, Q, N): N^2 numbers a head more.
//
// Compile with SCALAR, HEAD_DIM (a multiple of 8, up to 128), WARPS, TILES (1 or 2), KEYS (a multiple of 16), ONCE (1 if
// N <= KEYS: no earlier result is rescaled then), DROPOUT, TF32 (1 rounds fp32 operands of products) and RESIDENT (the number
// of blocks that should fit on a multiprocessor, which limits their registers).
#include "attention.cuh"

constexpr int ROWS = 16 * TILES;  // queries of a warp

static_assert(KEYS % 16 == 0, "keys come in whole tiles");

// grid: heads of all samples * blocks_per_head; shared memory: WARPS * ROWS + 4 KEYS rows of STRIDE numbers, or 2
// KEYS if N <= KEYS. out (B, N, H, D); row_log (B, H, N), the base-2 logarithm of each row's sum of exponentials, may
// be null.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_forward(const T* __restrict__ qkv, const T* __restrict__ dropout_mask, T* __restrict__ out,
                      float* __restrict__ row_log, int heads, int n, int n_queries, int blocks_per_head, float scale) {
    DYNAMIC_SHARED(memory);
    const int warp = warp_index();
    T* own_rows = reinterpret_cast<T*>(memory);    // the block's queries, in the end its results
    T* stages = own_rows + WARPS * ROWS * STRIDE;  // two stages of KEYS keys and KEYS values
    T* mine = own_rows + warp * ROWS * STRIDE;     // this warp's rows

    const int head = blockIdx.x / blocks_per_head % heads;
    const long long sample = blockIdx.x / blocks_per_head / heads;
    const int row_stride = 3 * heads * D, out_stride = heads * D;  // N rows hold fewer than 2^31 numbers
    const T* q = qkv + sample * n * row_stride + head * D;
    const T* k = q + heads * D;
    const T* v = k + heads * D;
    const int block_row = blockIdx.x % blocks_per_head * WARPS * ROWS;
    const int row = block_row + warp * ROWS;  // this warp's first query
    const float exponent = scale * LOG2_E;
    dropout_mask += (sample * heads + head) * n_queries * n;

    auto copy_keys = [&](int key, T* stage) {
        const int count = least(KEYS, 16 * tiles_of(n - key));
        copy_rows(stage, k, row_stride, key, count, n);
        copy_rows(stage + KEYS * STRIDE, v, row_stride, key, count, n);
    };
    copy_rows(own_rows, q, row_stride, block_row, WARPS * ROWS, n_queries);
    copy_keys(0, stages);
    cp_async_commit();

    float result[TILES][DEPTH][8] = {}, highest[TILES][2], sum[TILES][2] = {};
#pragma unroll
    for (int t = 0; t < TILES; t++) highest[t][0] = highest[t][1] = minus_infinity();

    for (int key = 0; key < (ONCE ? 1 : n); key += KEYS) {
        T* keys = stages + key / KEYS % 2 * 2 * KEYS * STRIDE;
        T* values = keys + KEYS * STRIDE;
        cp_async_wait<0>();
        __syncthreads();  // these keys are here, and nobody needs the previous ones any more
        if (key + KEYS < n) copy_keys(key + KEYS, stages + (key / KEYS + 1) % 2 * 2 * KEYS * STRIDE);
        cp_async_commit();
        if (row >= n_queries) continue;

        const int live = least(KEYS / 16, tiles_of(n - key));  // tiles with keys
        float score[TILES][KEYS / 16][8] = {};
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            Operand<T> a[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) load_left(a[t], mine + 16 * t * STRIDE + 16 * d, STRIDE);
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                if (j >= live) continue;
                Operand<T> b;
                load_right_transposed(b, keys + 16 * j * STRIDE + 16 * d, STRIDE);
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(score[t][j], a[t], b);
            }
        }
        if (key + KEYS > n) {
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (key + 16 * j + tile_column(i) >= n)
#pragma unroll
                        for (int t = 0; t < TILES; t++) score[t][j][i] = minus_infinity();
        }

#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {  // a lane's two rows of a tile: elements i with i / 2 % 2 == half
                float high = highest[t][half];
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++)
                    if (j < live)
#pragma unroll
                        for (int i = 0; i < 4; i++) high = fmaxf(high, score[t][j][2 * half + i % 2 + 4 * (i / 2)]);
                high = warp_max<4>(high);
                const float offset = high * exponent;
                if constexpr (!ONCE) {
                    const float shrink = exp2_fast((highest[t][half] - high) * exponent);
                    sum[t][half] *= shrink;
#pragma unroll
                    for (int d = 0; d < DEPTH; d++)
#pragma unroll
                        for (int i = 0; i < 4; i++) result[t][d][2 * half + i % 2 + 4 * (i / 2)] *= shrink;
                }
                highest[t][half] = high;
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++)
                    if (j < live)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            float& s = score[t][j][2 * half + i % 2 + 4 * (i / 2)];
                            s = exp2_fast(fmaf(s, exponent, -offset));
                            sum[t][half] += s;
                            if constexpr (DROPOUT) {
                                const int query = row + 16 * t + tile_row(2 * half);
                                const int column = key + 16 * j + tile_column(i % 2 + 4 * (i / 2));
                                s *= dropout_factor(dropout_mask, query, column, n_queries, n);
                            }
                        }
            }

#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            if (j >= live) continue;
            Operand<T> p[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) as_left(p[t], score[t][j]);
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                Operand<T> b;
                load_right(b, values + 16 * j * STRIDE + 16 * d, STRIDE);
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(result[t][d], p[t], b);
            }
        }
    }

    if (row >= n_queries) return;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float total = warp_sum<4>(sum[t][half]), share = 1.0f / total;
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
#pragma unroll
                for (int i = 0; i < 4; i++) result[t][d][2 * half + i % 2 + 4 * (i / 2)] *= share;
            const int query_row = row + 16 * t + tile_row(2 * half);
            if (row_log && threadIdx.x % 4 == 0 && query_row < n_queries)
                row_log[(sample * heads + head) * n_queries + query_row] =
                    highest[t][half] * exponent + log2_fast(total);
        }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int d = 0; d < DEPTH; d++) store_tile(mine + 16 * t * STRIDE + 16 * d, STRIDE, result[t][d]);
    __syncwarp();
    write_rows(out + sample * n_queries * out_stride + head * D, out_stride, mine, row, ROWS, n_queries);
}
