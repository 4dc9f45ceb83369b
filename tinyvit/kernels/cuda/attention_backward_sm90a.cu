// Fused multi-head self-attention, backward, on Hopper: what attention_backward.cu computes, for 128 tokens and more.
//
// Moves 8 activations (B, N, H, D) (q, k, v, y, dy in, dq, dk, dv out) and 4 bytes a row, q and dy once more for each
// further portion of keys, and dq in fp32; takes 10 N^2 D FLOPs a head.
//
// A block takes a head, and of its keys a portion of 128 after the other: 64 for each of two warpgroups, whose dk and dv
// stay in its registers, as do its keys and values. Queries and dy pass through shared memory 64 at a time, in the last
// step as many whole tiles of 16 as there are. Scores are computed transposed (keys x queries), so that their accumulators
// are at once the left operands for dv = P^T dy and dk = dS^T q. dS goes through shared memory for dq = dS k, which sums
// over the keys of both warpgroups: after every second step each warpgroup makes dq of one of the last two. The portions
// add up dq in fp32 (`dq_sum`, scratch), always in the same order: no atomics anywhere.
//
// Compile for sm_90a with SCALAR (bf16 or f16), HEAD_DIM (a multiple of 16, up to 64), WARPS = 8 and LAST (the queries of
// the last step, rounded up to 16).
#define TF32 0  // of products of fp32 operands, which are not here
#include "attention.cuh"
#include "warpgroup.cuh"

constexpr int WARPGROUPS = WARPS / 4, KEYS = WARPS * 16, QUERIES = 64;
constexpr int BUFFERS = 2 * WARPGROUPS;  // of dS: those that dq is made of, and those that come next
constexpr int KEY_PANEL = KEYS * 128, QUERY_PANEL = QUERIES * 128;
constexpr int SUM_ROWS = THREADS / 4, SUM_STRIDE = D + 8;  // so that the rows of half a warp lie in different banks

static_assert(D % 16 == 0 && D <= 64, "a row is one panel wide");
static_assert(LAST % 16 == 0 && LAST > 0 && LAST <= QUERIES, "queries come in whole tiles");

// Starts copying 64 or 128 rows of a matrix of n into a panel, zeros where there are none.
template <int rows>
DEVICE void copy_panel(unsigned char* panel, const T* from, int stride, int first, int n) {
#pragma unroll
    for (int i = threadIdx.x; i < rows * (D / 8); i += THREADS) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const bool inside = first + row < n;
        cp_async(panel + place(rows, row, chunk), from + (inside ? (first + row) * stride : 0) + chunk * 8, inside);
    }
}

// Waits until what all threads copied is there, for wgmma too.
DEVICE void wait_for_copies() {
    cp_async_wait<0>();
    fence_for_wgmma();
    __syncthreads();
}

template <int count>
DEVICE void pin_all(float (&c)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) pin(c[i]);
}

// Adds this thread's two rows of a product, times `factor`, to its own sums of their columns.
DEVICE void add_rows(float* sums, const float (&c)[D / 2], float factor) {
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        float2* sum = reinterpret_cast<float2*>(sums + 8 * j);
        const float x = c[4 * j] + c[4 * j + 2], y = c[4 * j + 1] + c[4 * j + 3];
        *sum = float2{fmaf(x, factor, sum->x), fmaf(y, factor, sum->y)};
    }
}

// The gradient of head `index` of all samples, computed by the whole block; `dq_sum` is the block's.
DEVICE void head_gradient(const T* __restrict__ qkv, const T* __restrict__ y, const T* __restrict__ dy,
                          const float* __restrict__ row_log, T* __restrict__ dqkv, float* dq_sum, float* sums, int heads,
                          int n, int n_queries, float scale, int index, unsigned char* memory) {
    unsigned char* keys = memory;
    unsigned char* values = keys + KEY_PANEL;
    unsigned char* stages = values + KEY_PANEL;        // two stages of queries and dy
    unsigned char* scores = stages + 4 * QUERY_PANEL;  // dS, transposed: rows of 64 queries
    float* delta = reinterpret_cast<float*>(scores + BUFFERS * KEY_PANEL);
    const int steps = (n_queries + QUERIES - 1) / QUERIES;
    float* logs = delta + QUERIES * steps;
    float* partials = logs + QUERIES * steps;  // of the columns of dq, dk and dv: SUM_ROWS rows each
    float* own_sums = partials + threadIdx.x / 4 * SUM_STRIDE + threadIdx.x % 4 * 2;

    const int warp = warp_index(), warpgroup = warp / 4, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int head = index % heads;
    const long long sample = index / heads;
    const int row_stride = 3 * heads * D, out_stride = heads * D;  // N rows hold fewer than 2^31 numbers
    const long long first_element = sample * n * row_stride + head * D;
    const T* q = qkv + first_element;
    T* dq = dqkv + first_element;
    y += sample * n_queries * out_stride + head * D;
    dy += sample * n_queries * out_stride + head * D;
    row_log += 1LL * index * n_queries;
    const float exponent = scale * LOG2_E;

    auto copy_queries = [&](int step) {
        unsigned char* stage = stages + step % 2 * 2 * QUERY_PANEL;
        copy_panel<QUERIES>(stage, q, row_stride, step * QUERIES, n_queries);
        copy_panel<QUERIES>(stage + QUERY_PANEL, dy, out_stride, step * QUERIES, n_queries);
    };

    for (int i = threadIdx.x; i < (n - n_queries) * (D / 8); i += THREADS)  // tokens that are no queries
        store(dq + (n_queries + i / (D / 8)) * row_stride + i % (D / 8) * 8, Vector<T, 8>{});

    for (int first_key = 0; first_key < n; first_key += KEYS) {
        __syncthreads();  // the previous portion of keys, or head, is done with
        copy_panel<KEYS>(keys, q + heads * D, row_stride, first_key, n);
        copy_panel<KEYS>(values, q + 2 * heads * D, row_stride, first_key, n);
        copy_queries(0);
        cp_async_commit();
        if (first_key == 0) {
            row_statistics(delta, logs, y, dy, out_stride, row_log, n_queries, QUERIES * steps);
#pragma unroll
            for (int i = 0; i < 3 * D / 8; i++)
                *reinterpret_cast<float2*>(own_sums + i / (D / 8) * SUM_ROWS * SUM_STRIDE + i % (D / 8) * 8) = float2{};
        }
        wait_for_copies();
        unsigned key[D / 16][4], value[D / 16][4];  // of this warp's 16 rows
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            ldmatrix(key[d], keys + place(KEYS, warp * 16 + lane % 16, 2 * d + lane / 16));
            ldmatrix(value[d], values + place(KEYS, warp * 16 + lane % 16, 2 * d + lane / 16));
        }

        // dq of the queries of `step`, from the dS of all keys of this portion.
        auto make_dq = [&](int step) {
            if (step >= steps) return;
            const unsigned char* ds = scores + step % BUFFERS * KEY_PANEL;
            unsigned left[KEYS / 16][4];
            float sum[D / 2];
            float4* kept = reinterpret_cast<float4*>(dq_sum + step * QUERIES * D) + threadIdx.x % 128;
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++)
                ldmatrix_transposed(left[k], ds + place(KEYS, 16 * k + lane % 8 + lane / 16 * 8,
                                                        warp % 4 * 2 + lane / 8 % 2));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) wgmma<T, D, true>(sum, left[k], keys + 2048 * k, k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            pin_all(sum);
#pragma unroll
            for (int k = 0; k < KEYS / 16 * 4; k++) pin(left[k / 4][k % 4]);
            if (first_key > 0)
#pragma unroll
                for (int i = 0; i < D / 8; i++) {
                    const float4 earlier = kept[128 * i];
                    sum[4 * i] += earlier.x, sum[4 * i + 1] += earlier.y;
                    sum[4 * i + 2] += earlier.z, sum[4 * i + 3] += earlier.w;
                }
            if (first_key + KEYS < n) {
#pragma unroll
                for (int i = 0; i < D / 8; i++)
                    kept[128 * i] = float4{sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
                return;
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int token = step * QUERIES + warp % 4 * 16 + group + 8 * half;
                store_row<T, D>(dq + token * row_stride, sum, half, scale, token < n_queries);
            }
            // A tile's rows beyond Q are 0; tiles wholly beyond Q hold arbitrary values.
            if (sums && step * QUERIES + warp % 4 * 16 < n_queries) add_rows(own_sums, sum, scale);
        };

        float dk[D / 2], dv[D / 2];
        // A step's scores and dS for its first `width` queries, and their shares of dk and dv.
        auto compute_step = [&](int step, auto width) {
            constexpr int count = width.value;
            const unsigned char* queries = stages + step % 2 * 2 * QUERY_PANEL;
            const unsigned char* dys = queries + QUERY_PANEL;
            if (step > 0) wait_for_copies();  // these queries are here, and the dS of all earlier ones
            if (step + 1 < steps) copy_queries(step + 1);
            cp_async_commit();
            if (step > 0 && step % WARPGROUPS == 0) make_dq(step - WARPGROUPS + warpgroup);

            float p[count / 2], ds[count / 2];
            wgmma_fence();
#pragma unroll
            for (int d = 0; d < D / 16; d++) wgmma<T, count, false>(p, key[d], queries + 32 * d, d > 0);
#pragma unroll
            for (int d = 0; d < D / 16; d++) wgmma<T, count, false>(ds, value[d], dys + 32 * d, d > 0);
            wgmma_commit();
            wgmma_wait<0>();
            pin_all(p);
            pin_all(ds);

            unsigned left_p[count / 16][4], left_ds[count / 16][4];
            unsigned char* mine = scores + step % BUFFERS * KEY_PANEL;
#pragma unroll
            for (int j = 0; j < count / 8; j++) {
                const int column = step * QUERIES + 8 * j + 2 * pair;
                const float2 log = *reinterpret_cast<const float2*>(logs + column);
                const float2 sum = *reinterpret_cast<const float2*>(delta + column);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = warp * 16 + group + 8 * half;
                    const bool is_key = first_key + row < n;
                    float* x = p + 4 * j + 2 * half;
                    float* dx = ds + 4 * j + 2 * half;
                    x[0] = is_key ? exp2_fast(fmaf(x[0], exponent, -log.x)) : 0.0f;
                    x[1] = is_key ? exp2_fast(fmaf(x[1], exponent, -log.y)) : 0.0f;
                    left_p[j / 2][j % 2 * 2 + half] = Scalar<T>::pack(x[0], x[1]);
                    const unsigned pack = Scalar<T>::pack(x[0] * (dx[0] - sum.x), x[1] * (dx[1] - sum.y));
                    left_ds[j / 2][j % 2 * 2 + half] = pack;
                    *reinterpret_cast<unsigned*>(mine + place(KEYS, row, j) + 4 * pair) = pack;
                }
            }

            wgmma_fence();
#pragma unroll
            for (int j = 0; j < count / 16; j++) wgmma<T, D, true>(dv, left_p[j], dys + 2048 * j, step > 0 || j > 0);
#pragma unroll
            for (int j = 0; j < count / 16; j++) wgmma<T, D, true>(dk, left_ds[j], queries + 2048 * j, step > 0 || j > 0);
            wgmma_commit();
            wgmma_wait<0>();
            pin_all(dk);
            pin_all(dv);
#pragma unroll
            for (int j = 0; j < count / 16 * 4; j++) {
                pin(left_p[j / 4][j % 4]);
                pin(left_ds[j / 4][j % 4]);
            }
        };
        const int whole = LAST < QUERIES ? steps - 1 : steps;
#pragma unroll 1
        for (int step = 0; step < whole; step++) compute_step(step, Number<QUERIES>());
        if constexpr (LAST < QUERIES) compute_step(steps - 1, Number<LAST>());
        __syncthreads();  // dS is complete
        make_dq((steps - 1) / WARPGROUPS * WARPGROUPS + warpgroup);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = first_key + warp * 16 + group + 8 * half;
            store_row<T, D>(dq + token * row_stride + heads * D, dk, half, scale, token < n);
            store_row<T, D>(dq + token * row_stride + 2 * heads * D, dv, half, 1.0f, token < n);
        }
        if (sums) {  // rows beyond N are 0
            add_rows(own_sums + SUM_ROWS * SUM_STRIDE, dk, scale);
            add_rows(own_sums + 2 * SUM_ROWS * SUM_STRIDE, dv, 1.0f);
        }
    }
    cp_async_wait<0>();
    if (!sums) return;
    __syncthreads();  // all have added up theirs
    for (int i = threadIdx.x; i < 3 * D; i += THREADS) {
        float total = 0.0f;
        for (int row = 0; row < SUM_ROWS; row++) total += partials[(i / D * SUM_ROWS + row) * SUM_STRIDE + i % D];
        sums[((sample * 3 + i / D) * heads + head) * D + i % D] = total;
    }
}

// grid: as many blocks as run at once, each of which takes one of the `total_heads` heads of all samples after the other, so that
// their dq_sum stays in the second-level cache; shared memory: 2 KEY_PANEL + 4 QUERY_PANEL + BUFFERS * KEY_PANEL bytes, 2
// floats for each of Q rows rounded up to 64, and 3 SUM_ROWS * SUM_STRIDE floats. dqkv (B, N, 3, H, D); dq_sum (blocks, Q
// rounded up to 64, D) fp32 is only touched if N > KEYS. sums (B, 3, H, D) fp32, of dqkv before it is rounded, over each
// sample's tokens, may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_sm90a(const T* __restrict__ qkv, const T* __restrict__ y, const T* __restrict__ dy,
                             const float* __restrict__ row_log, T* __restrict__ dqkv, float* dq_sum, float* sums,
                             int total_heads, int heads, int n, int n_queries, float scale) {
    DYNAMIC_SHARED(memory);
    dq_sum += 1LL * blockIdx.x * ((n_queries + QUERIES - 1) / QUERIES) * QUERIES * D;
#pragma unroll 1
    for (int index = blockIdx.x; index < total_heads; index += gridDim.x)
        head_gradient(qkv, y, dy, row_log, dqkv, dq_sum, sums, heads, n, n_queries, scale, index, memory);
}
