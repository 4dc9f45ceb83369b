// Fused multi-head self-attention, forward, on Hopper: what attention_forward.cu computes, for 128 tokens and more.
//
// q, k and v are read from the packed activation (B, N, 3, H, D) where they lie; the result is (B, Q, H, D) for the
// first Q of the N tokens. That moves 4 activations (B, N, H, D) and 4 bytes a row, and takes 4 N^2 D FLOPs a head.
//
// A warpgroup takes 64 queries of a head at a time, a block WARPGROUPS such tiles at once. The head's keys and values
// lie in shared memory in chunks of KEYS: all of them if STAGES chunks hold them, which are then read once for all the
// tiles that the block takes; else a ring of STAGES, for one tile each. Queries, scores, weights and results stay in
// registers. Scores are made a chunk at a time: while a chunk's exponentials are taken, the products of the weights and
// values of the one before it run; the rest of the tensor cores' time is filled by the other warpgroups of the
// multiprocessor. N is rounded up to 8 for the scores and to 16 for the results: 197 to 200 and 208.
//
// Compile for sm_90a with SCALAR (bf16 or f16), HEAD_DIM (a multiple of 16, up to 128), TOKENS (N), KEYS (a multiple of
// 16, up to 64), STAGES (at most ceil(N / KEYS), at least 3 if fewer), WARPGROUPS and RESIDENT (the number of blocks
// that shall fit on a multiprocessor, which limits their registers).
#include "warpgroup.cuh"

using T = SCALAR;

constexpr int D = HEAD_DIM, N = TOKENS;
constexpr int THREADS = 128 * WARPGROUPS;
constexpr int PANELS = (D + 63) / 64;           // of 64 columns
constexpr int STAGE = 2 * PANELS * KEYS * 128;  // bytes of a chunk's keys and values
constexpr int CHUNKS = (N + KEYS - 1) / KEYS;
constexpr int LAST = (N - (CHUNKS - 1) * KEYS + 7) / 8 * 8;  // keys of the last chunk
constexpr bool RING = STAGES < CHUNKS;
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(KEYS % 16 == 0 && KEYS <= 64 && D % 16 == 0 && D <= 128, "what wgmma takes");
static_assert(CHUNKS > 1 && STAGES <= CHUNKS, "the first chunk is a whole one");
static_assert(STAGES >= 3 || !RING, "a chunk to compute with, the one before it, and a next one");

// A chunk's panels, first of keys, then of values, hold whole tiles of 16 tokens.
DEVICE constexpr int panel_bytes(int keys) { return (keys + 15) / 16 * 2048; }

// A chunk's products with the rows of q: scores (64 x keys).
template <int keys>
DEVICE void score_products(float (&score)[keys / 2], const unsigned (&q)[D / 16][4], const unsigned char* stage) {
#pragma unroll
    for (int d = 0; d < D / 16; d++)
        wgmma<T, keys, false>(score, q[d], stage + d / 4 * panel_bytes(keys) + d % 4 * 32, d > 0);
    wgmma_commit();
}

// result (64 x D) += weights (64 x keys) times the chunk's values, a panel of 64 columns after the other.
template <int keys, int panel = 0>
DEVICE void result_products(float (&result)[D / 2], const unsigned (&weight)[KEYS / 16][4], const unsigned char* stage,
                            bool add) {
    constexpr int columns = D - 64 * panel < 64 ? D - 64 * panel : 64;
#pragma unroll
    for (int j = 0; j < (keys + 15) / 16; j++)
        wgmma<T, columns, true>(result + 32 * panel, weight[j],
                                stage + (PANELS + panel) * panel_bytes(keys) + j * 2048, add || j > 0);
    if constexpr (panel + 1 < PANELS)
        result_products<keys, panel + 1>(result, weight, stage, add);
    else
        wgmma_commit();
}

// Of a chunk's scores their exponentials, in their place; a row's highest score and its sum of exponentials so far, and
// what sums and results of earlier chunks are to be multiplied by. A lane has a quarter of two rows: element i is of row
// i / 2 % 2.
template <int keys>
DEVICE void exponentials(float (&score)[keys / 2], float exponent, float (&highest)[2], float (&sum)[2],
                         float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float high = highest[half], total = 0.0f;
#pragma unroll
        for (int i = 0; i < keys / 2; i++)
            if (i / 2 % 2 == half) high = fmaxf(high, score[i]);
        high = warp_max<4>(high);
        const float offset = high * exponent;
#pragma unroll
        for (int i = 0; i < keys / 2; i++)
            if (i / 2 % 2 == half) total += score[i] = exp2_fast(fmaf(score[i], exponent, -offset));
        shrink[half] = exp2_fast((highest[half] - high) * exponent);
        sum[half] = fmaf(sum[half], shrink[half], total);
        highest[half] = high;
    }
}

// grid: heads of all samples * blocks_per_head; shared memory: STAGES stages, or as much as N tokens rounded up to 16
// take. out (B, Q, H, D); row_log (B, H, Q), the base-2 logarithm of each row's sum of exponentials, may be null.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_forward_sm90a(const T* __restrict__ qkv, T* __restrict__ out, float* __restrict__ row_log, int heads,
                            int n_queries, int blocks_per_head, float scale) {
    DYNAMIC_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, group = lane / 4, pair = lane % 4;
    const int head = blockIdx.x / blocks_per_head % heads;
    const long long sample = blockIdx.x / blocks_per_head / heads;
    const int row_stride = 3 * heads * D, out_stride = heads * D;  // N rows hold fewer than 2^31 numbers
    const T* q = qkv + sample * N * row_stride + head * D;
    const T* k = q + heads * D;
    const float exponent = scale * LOG2_E;

    // Starts copying a chunk of keys and values, zeros beyond the last, in the order that wgmma reads.
    auto copy_chunk = [&](int chunk) {
        unsigned char* stage = memory + chunk % STAGES * STAGE;
        const int panel = panel_bytes(chunk == CHUNKS - 1 ? LAST : KEYS), rows = panel / 128;
#pragma unroll 1
        for (int i = thread; i < rows * (D / 8); i += THREADS) {
            const int row = i / (D / 8), column = i % (D / 8), token = chunk * KEYS + row;
            unsigned char* to = stage + place(rows, row, column);
            const T* from = k + (token < N ? token * row_stride : 0) + column * 8;
            cp_async(to, from, token < N);
            cp_async(to + PANELS * panel, from + heads * D, token < N);
        }
    };
    for (int chunk = 0; chunk < STAGES; chunk++) {
        copy_chunk(chunk);
        cp_async_commit();
    }

    unsigned queries[D / 16][4], weight[KEYS / 16][4];
    float result[D / 2];
    bool arriving = true;  // in the block's first tiles chunks are waited for
    for (int first = blockIdx.x % blocks_per_head * WARPGROUPS * 64; first < n_queries;
         first += blocks_per_head * WARPGROUPS * 64) {
        const int row = first + thread / 32 * 16 + group;  // this lane's first one; the other one is row + 8
        if (!arriving && first + thread / 128 * 64 >= n_queries) break;
#pragma unroll
        for (int i = 0; i < D / 16 * 4; i++) {
            const int token = row + i % 2 * 8, column = i / 4 * 16 + i / 2 % 2 * 8 + 2 * pair;
            const T* from = q + token * row_stride + column;
            queries[i / 4][i % 4] = token < n_queries ? *reinterpret_cast<const unsigned*>(from) : 0;
        }
        const bool occupied = __shfl_sync(0xffffffffu, row, 0) < n_queries;  // by a query of this warp's rows
        float highest[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};

        // Chunk by chunk: scores, beside them the results of the chunk before it, then what its own need.
        auto step = [&](int chunk, auto keys, auto is_first) {
            const unsigned char* stage = memory + chunk % STAGES * STAGE;
            if (arriving) {
                cp_async_wait<RING ? STAGES - 3 : STAGES - 1>();
                fence_for_wgmma();
                __syncthreads();  // this chunk is here, and nobody needs the last but one any more
                if (RING && chunk >= 2 && chunk - 2 + STAGES < CHUNKS) copy_chunk(chunk - 2 + STAGES);
                cp_async_commit();
            }
            float score[keys.value / 2];
            wgmma_fence();
            score_products<keys.value>(score, queries, stage);
            if constexpr (is_first.value) {
                wgmma_wait<0>();
            } else {
                result_products<KEYS>(result, weight, memory + (chunk - 1) % STAGES * STAGE, chunk > 1);
                wgmma_wait<1>();
            }
#pragma unroll
            for (int i = 0; i < keys.value / 2; i++) {
                pin(score[i]);
                if (keys.value == LAST && chunk * KEYS + i / 4 * 8 + 2 * pair + i % 2 >= N)
                    score[i] = minus_infinity();
            }
            float shrink[2] = {1.0f, 1.0f};
            if (occupied) exponentials<keys.value>(score, exponent, highest, sum, shrink);
            if constexpr (!is_first.value) {
                wgmma_wait<0>();
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++) pin(weight[i / 4][i % 4]);
#pragma unroll
                for (int i = 0; i < D / 2; i++) {
                    pin(result[i]);
                    result[i] *= shrink[i / 2 % 2];
                }
            }
#pragma unroll
            for (int i = 0; i < (keys.value + 15) / 16 * 4; i++)
                weight[i / 4][i % 4] = 2 * i < keys.value / 2 ? Scalar<T>::pack(score[2 * i], score[2 * i + 1]) : 0;
        };
        constexpr Number<KEYS> whole;
        constexpr Number<LAST> last;
        step(0, whole, Number<1>());
        if constexpr (CHUNKS > 2) {
            unsigned end = CHUNKS - 1;
            pin(end);  // hides it from the compiler: a single turn of the loop would be unrolled, and take more registers
#pragma unroll 1
            for (unsigned chunk = 1; chunk < end; chunk++) step(chunk, whole, Number<0>());
        }
        step(CHUNKS - 1, last, Number<0>());
        wgmma_fence();
        result_products<LAST>(result, weight, memory + (CHUNKS - 1) % STAGES * STAGE, CHUNKS > 1);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < (LAST + 15) / 16 * 4; i++) pin(weight[i / 4][i % 4]);
#pragma unroll
        for (int i = 0; i < D / 2; i++) pin(result[i]);
        arriving = false;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float total = warp_sum<4>(sum[half]), share = 1.0f / total;
            const int token = row + 8 * half;
            if (row_log && pair == 0 && token < n_queries)
                row_log[(sample * heads + head) * n_queries + token] =
                    highest[half] * exponent + log2_fast(total);
            store_row<T, D>(out + (sample * n_queries + token) * out_stride + head * D, result, half, share,
                            token < n_queries);
        }
    }
}
