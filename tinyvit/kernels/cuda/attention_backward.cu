// Fused multi-head self-attention, backward, without the N x N matrices in memory: the gradient of the packed
// activation.
//
// Of the N tokens the first Q ask, often all; y, dy and row_log have Q rows.
//
// Moves 8 activations (B, N, H, D) (q, k, v, y, dy in, dq, dk, dv out) and 4 bytes a row, dy once more through the
// second-level cache; takes 10 N^2 D FLOPs a head, on tensor cores.
//
// A block takes a head, a warp TILES tiles of 16 keys of it, whose dk and dv stay in its registers; queries and dy
// pass through shared memory QUERIES at a time. Scores are computed transposed (keys x queries), so that their
// accumulators are at once the left operands for dv = P^T dy and dk = dS^T q. For dq = dS k, which sums over the keys
// of all warps, the block's dS goes through shared memory. Where a block's warps hold fewer than N keys it goes over
// the queries once for each portion of keys and adds up dq in fp32 (`dq_sum`), always in the same order: no atomics
// anywhere.
//
// With DROPOUT = 1 the weights were multiplied by `dropout_mask` (B, H, Q, N), and so are their gradients.
//
// Compile with SCALAR, HEAD_DIM (a multiple of 8, up to 128), WARPS, TILES (1 or 2), QUERIES (a multiple of 16), DROPOUT,
// TF32 (1 rounds fp32 operands of products) and RESIDENT (the number of blocks that shall fit on a multiprocessor, which
// limits their registers).
#include "attention.cuh"

static_assert(QUERIES % 16 == 0, "queries come in whole tiles");

constexpr int ROWS = 16 * TILES;  // keys of a warp
constexpr int SCORES_STRIDE = QUERIES + 8;

// grid: heads of all samples; shared memory: 2 WARPS * ROWS + 4 QUERIES rows of STRIDE and WARPS * ROWS of
// SCORES_STRIDE numbers, and 2 floats for each of Q rows rounded up to 16. dqkv (B, N, 3, H, D); dq_sum (B, H, Q, D)
// fp32, scratch, is only touched if N > WARPS * ROWS. sums (B, 3, H, D) fp32, of dqkv over each sample's tokens, may be null.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_backward(const T* __restrict__ qkv, const T* __restrict__ dropout_mask, const T* __restrict__ y,
                       const T* __restrict__ dy, const float* __restrict__ row_log, T* __restrict__ dqkv,
                       float* dq_sum, float* sums, int heads, int n, int n_queries, float scale) {
    DYNAMIC_SHARED(memory);
    const int warp = warp_index();
    constexpr int portion = WARPS * ROWS;  // keys at a time
    T* keys = reinterpret_cast<T*>(memory);
    T* values = keys + portion * STRIDE;
    T* stages = values + portion * STRIDE;      // two stages of QUERIES queries and QUERIES rows of dy
    T* scores = stages + 4 * QUERIES * STRIDE;  // dS: portion x QUERIES
    float* delta = reinterpret_cast<float*>(scores + portion * SCORES_STRIDE);
    float* logs = delta + 16 * tiles_of(n_queries);

    const int head = blockIdx.x % heads;
    const long long sample = blockIdx.x / heads;
    const int row_stride = 3 * heads * D, out_stride = heads * D;  // N rows hold fewer than 2^31 numbers
    const long long first_element = sample * n * row_stride + head * D;
    const T* q = qkv + first_element;
    T* dq = dqkv + first_element;
    y += sample * n_queries * out_stride + head * D;
    dy += sample * n_queries * out_stride + head * D;
    dq_sum += 1LL * blockIdx.x * n_queries * D;
    dropout_mask += 1LL * blockIdx.x * n_queries * n;
    const float exponent = scale * LOG2_E;

    auto copy_queries = [&](int query, T* stage) {
        const int count = least(QUERIES, 16 * tiles_of(n_queries - query));
        copy_rows(stage, q, row_stride, query, count, n_queries);
        copy_rows(stage + QUERIES * STRIDE, dy, out_stride, query, count, n_queries);
    };

    for (int i = threadIdx.x; i < (n - n_queries) * (D / CHUNK); i += THREADS) {  // tokens that are no queries
        const int row = n_queries + i / (D / CHUNK), column = i % (D / CHUNK) * CHUNK;
        store(reinterpret_cast<float*>(dq + row * row_stride + column), Vector<float, 4>{});
    }

    for (int first_key = 0; first_key < n; first_key += portion) {
        const int live = least(WARPS * TILES, tiles_of(n - first_key));  // tiles with keys
        const int row = first_key + warp * ROWS;                         // this warp's first key
        T* my_keys = keys + warp * ROWS * STRIDE;
        T* my_values = values + warp * ROWS * STRIDE;
        __syncthreads();  // the previous portion of keys is done with
        copy_rows(keys, q + heads * D, row_stride, first_key, 16 * live, n);
        copy_rows(values, q + 2 * heads * D, row_stride, first_key, 16 * live, n);
        copy_queries(0, stages);
        cp_async_commit();
        if (first_key == 0)
            row_statistics(delta, logs, y, dy, out_stride, row_log + 1LL * blockIdx.x * n_queries, n_queries,
                           16 * tiles_of(n_queries));

        float dk[TILES][DEPTH][8] = {}, dv[TILES][DEPTH][8] = {};
        for (int query = 0; query < n_queries; query += QUERIES) {
            T* queries = stages + query / QUERIES % 2 * 2 * QUERIES * STRIDE;
            T* dys = queries + QUERIES * STRIDE;
            cp_async_wait<0>();
            __syncthreads();  // these queries are here, and nobody needs the previous ones and their dS any more
            if (query + QUERIES < n_queries)
                copy_queries(query + QUERIES, stages + (query / QUERIES + 1) % 2 * 2 * QUERIES * STRIDE);
            cp_async_commit();

#pragma unroll 1
            for (int j = 0; j < QUERIES; j += 16) {
                if (query + j >= n_queries || row >= n) continue;
                float p[TILES][8] = {}, ds[TILES][8] = {};
#pragma unroll
                for (int d = 0; d < DEPTH; d++) {
                    Operand<T> b, b_dy;
                    load_right_transposed(b, queries + j * STRIDE + 16 * d, STRIDE);
                    load_right_transposed(b_dy, dys + j * STRIDE + 16 * d, STRIDE);
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        if (row + 16 * t >= n) continue;
                        Operand<T> a;
                        load_left(a, my_keys + 16 * t * STRIDE + 16 * d, STRIDE);
                        multiply(p[t], a, b);
                        load_left(a, my_values + 16 * t * STRIDE + 16 * d, STRIDE);
                        multiply(ds[t], a, b_dy);
                    }
                }
                float log_of[4], delta_of[4];  // of this lane's four columns
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = query + j + tile_column(i % 2 + 4 * (i / 2));
                    log_of[i] = logs[column];
                    delta_of[i] = delta[column];
                }
                Operand<T> left_p[TILES], left_ds[TILES];
#pragma unroll
                for (int t = 0; t < TILES; t++) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const int c = i % 2 + 2 * (i / 4);
                        const bool is_key = row + 16 * t + tile_row(i) < n;
                        p[t][i] = is_key ? exp2_fast(fmaf(p[t][i], exponent, -log_of[c])) : 0.0f;
                        float factor = 1.0f;
                        if constexpr (DROPOUT)
                            factor = dropout_factor(dropout_mask, query + j + tile_column(i),
                                                    row + 16 * t + tile_row(i), n_queries, n);
                        ds[t][i] = p[t][i] * (ds[t][i] * factor - delta_of[c]);
                        p[t][i] *= factor;
                    }
                    as_left(left_p[t], p[t]);
                    as_left(left_ds[t], ds[t]);
                    if (row + 16 * t < n)
                        store_tile(scores + (warp * ROWS + 16 * t) * SCORES_STRIDE + j, SCORES_STRIDE, ds[t]);
                }
#pragma unroll
                for (int d = 0; d < DEPTH; d++) {
                    Operand<T> b, b_dy;
                    load_right(b, queries + j * STRIDE + 16 * d, STRIDE);
                    load_right(b_dy, dys + j * STRIDE + 16 * d, STRIDE);
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        multiply(dv[t][d], left_p[t], b_dy);
                        multiply(dk[t][d], left_ds[t], b);
                    }
                }
            }

            __syncthreads();  // dS is complete

            // Tiles of dq.
            for (int item = warp; item < QUERIES / 16 * DEPTH; item += WARPS) {
                const int j = item / DEPTH * 16, d = item % DEPTH * 16;
                if (query + j >= n_queries) continue;
                float tile[8] = {}, odd[8] = {};  // two chains of products, so that one need not wait for the other
#pragma unroll 1
                for (int t = 0; t < live; t++) {
                    Operand<T> a, b;
                    load_left_transposed(a, scores + 16 * t * SCORES_STRIDE + j, SCORES_STRIDE);
                    load_right(b, keys + 16 * t * STRIDE + d, STRIDE);
                    multiply(tile, a, b);
                    if (++t == live) break;
                    load_left_transposed(a, scores + 16 * t * SCORES_STRIDE + j, SCORES_STRIDE);
                    load_right(b, keys + 16 * t * STRIDE + d, STRIDE);
                    multiply(odd, a, b);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) tile[i] += odd[i];
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    const int r = query + j + tile_row(i), column = d + tile_column(i);
                    if (r >= n_queries || column >= D) continue;
                    float* sum = dq_sum + r * D + column;
                    if (first_key > 0) tile[i] += sum[0], tile[i + 1] += sum[1];
                    if (first_key + portion < n)
                        store_pair(sum, tile[i], tile[i + 1]);
                    else
                        store_pair(dq + r * row_stride + column, tile[i] * scale, tile[i + 1] * scale);
                }
            }
        }

        if (row >= n) continue;
        // Both go out through the rows of this warp's own values, which only it reads.
        auto write = [&](const float (&gradient)[TILES][DEPTH][8], float factor, T* to) {
            __syncwarp();
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int d = 0; d < DEPTH; d++)
                    store_tile(my_values + 16 * t * STRIDE + 16 * d, STRIDE, gradient[t][d], factor);
            __syncwarp();
            write_rows(to, row_stride, my_values, row, ROWS, n);
        };
        write(dk, scale, dq + heads * D);
        write(dv, 1.0f, dq + 2 * heads * D);
    }
    if (sums) write_sums(sums + (sample * 3 * heads + head) * D, dq, heads, n, memory);
}
