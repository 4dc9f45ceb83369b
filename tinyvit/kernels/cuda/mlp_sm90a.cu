// A whole MLP in one kernel on Hopper, for predictions: y = residual + gelu(x W1^T + b1) W2^T + b2, whose hidden numbers
// never leave the registers. x, residual and y are (rows, WIDTH), W1 (HIDDEN, WIDTH), W2 (WIDTH, HIDDEN).
//
// That reads two arrays (rows, WIDTH) and writes one, reads both weights from the second-level cache for every 128 rows,
// and takes 4 rows WIDTH HIDDEN FLOPs and about 28 instructions a hidden number.
//
// It is attention with rows of W1 as keys and columns of W2 as values (attention_forward_sm90a.cu). A block takes tiles of
// 128 rows, 64 a warpgroup. Rows of x and of the result stay in registers; 64 hidden numbers of a row are made at a time,
// and their weights come through a ring of STAGES chunks. While a chunk's GELU is taken, the products of the chunk before
// it and W2 run, and those of the other warpgroup.
//
// Compile for sm_90a with SCALAR (bf16 or f16), WIDTH (64, 128 or 192), HIDDEN (a multiple of 64), STAGES (at least 3) and
// APPROXIMATE (see gelu.cuh).
#include "gelu.cuh"
#include "warpgroup.cuh"

using T = SCALAR;

constexpr int THREADS = 256, STEPS = WIDTH / 16, PANELS = WIDTH / 64, CHUNKS = HIDDEN / 64;
constexpr int PANEL = 64 * 128;  // bytes of 64 rows of 64 numbers
constexpr int STAGE = 2 * PANELS * PANEL;

static_assert(WIDTH % 64 == 0 && HIDDEN % 64 == 0 && STAGES >= 3, "whole panels, and a chunk to wait for");

// c (64 x 64) = the rows a times a chunk of W1.
DEVICE void first_products(float (&c)[32], const unsigned (&a)[STEPS][4], const unsigned char* stage) {
#pragma unroll
    for (int k = 0; k < STEPS; k++) wgmma<T, 64, false>(c, a[k], stage + k / 4 * PANEL + k % 4 * 32, k > 0);
    wgmma_commit();
}

// result (64 x WIDTH) += hidden numbers (64 x 64) times a chunk of W2.
DEVICE void second_products(float (&result)[WIDTH / 2], const unsigned (&hidden)[4][4], const unsigned char* stage,
                            bool add) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma<T, 64, false>(result + 32 * panel, hidden[k], stage + (PANELS + panel) * PANEL + k * 32, add || k > 0);
    wgmma_commit();
}

// grid: as many blocks as share the rows; shared memory: STAGES stages.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mlp_sm90a(const T* __restrict__ residual, const T* __restrict__ x, const T* __restrict__ weight1,
              const T* __restrict__ bias1, const T* __restrict__ weight2, const T* __restrict__ bias2,
              T* __restrict__ y, int rows) {
    DYNAMIC_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, group = lane / 4, pair = lane % 4, row_step = 128 * gridDim.x;
    const int tiles = (rows - 128 * static_cast<int>(blockIdx.x) + row_step - 1) / row_step, end = tiles * CHUNKS;

    // Starts copying a chunk of the weights, in the order that wgmma reads. Chunks are numbered over all tiles.
    auto copy_chunk = [&](int chunk) {
        const int first = chunk % CHUNKS * 64, row = thread / 8, column = thread % 8;
        const T* from1 = weight1 + (first + row) * WIDTH + column * 8;
        const T* from2 = weight2 + row * HIDDEN + first + column * 8;
        unsigned char* to = memory + chunk % STAGES * STAGE + place(64, row, column);
#pragma unroll
        for (int i = 0; i < 2 * PANELS; i++) {  // 32 rows each
            const int panel = i / 2, half = i % 2;
            cp_async(to + panel * PANEL + half * 4096, from1 + panel * 64 + half * 32 * WIDTH, true);
            cp_async(to + (PANELS + panel) * PANEL + half * 4096, from2 + (panel * 64 + half * 32) * HIDDEN, true);
        }
    };
    for (int chunk = 0; chunk < STAGES; chunk++) {
        if (chunk < end) copy_chunk(chunk);
        cp_async_commit();
    }

    unsigned a[STEPS][4], hidden[4][4];
    float result[WIDTH / 2];
    int chunk = 0;
    auto wait_for_results = [&] {  // after which the hidden numbers may change
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 16; i++) pin(hidden[i / 4][i % 4]);
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) pin(result[i]);
    };
#pragma unroll 1
    for (int first = 128 * blockIdx.x; first < rows; first += row_step) {
        const int row = first + thread / 32 * 16 + group;  // this lane's first one; the other one is row + 8
#pragma unroll
        for (int i = 0; i < 4 * STEPS; i++) {
            const int token = row + i % 2 * 8, column = i / 4 * 16 + i / 2 % 2 * 8 + 2 * pair;
            a[i / 4][i % 4] = token < rows ? *reinterpret_cast<const unsigned*>(x + token * WIDTH + column) : 0;
        }

        // The next chunk: its hidden numbers, beside them the results of the chunk before it.
        auto step = [&](int part, auto is_first) {
            cp_async_wait<STAGES - 3>();
            fence_for_wgmma();
            __syncthreads();  // this chunk is here, and nobody needs the last but one any more
            if (chunk >= 2 && chunk - 2 + STAGES < end) copy_chunk(chunk - 2 + STAGES);
            cp_async_commit();
            float c[32];
            wgmma_fence();
            first_products(c, a, memory + chunk % STAGES * STAGE);
            if constexpr (is_first.value) {
                wgmma_wait<0>();
            } else {
                second_products(result, hidden, memory + (chunk - 1) % STAGES * STAGE, part > 1);
                wgmma_wait<1>();
            }
#pragma unroll
            for (int i = 0; i < 32; i++) pin(c[i]);
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const T* shift = bias1 + 64 * part + i / 4 * 8 + 2 * pair;
                c[i] = gelu<T>(c[i] + half_of_word<T>(*reinterpret_cast<const unsigned*>(shift), i % 2));
            }
            if constexpr (!is_first.value) wait_for_results();
#pragma unroll
            for (int i = 0; i < 16; i++) hidden[i / 4][i % 4] = Scalar<T>::pack(c[2 * i], c[2 * i + 1]);
            chunk++;
        };
        step(0, Number<1>());
#pragma unroll 1
        for (int part = 1; part < CHUNKS; part++) step(part, Number<0>());
        wgmma_fence();
        second_products(result, hidden, memory + (chunk - 1) % STAGES * STAGE, CHUNKS > 1);
        wait_for_results();

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = row + 8 * half;
            unsigned added[WIDTH / 8];
            load_row<T, WIDTH>(added, residual + token * WIDTH, token < rows);
#pragma unroll
            for (int i = 0; i < WIDTH / 4; i++) {
                const unsigned shift = *reinterpret_cast<const unsigned*>(bias2 + i / 2 * 8 + 2 * pair);
                result[i / 2 * 4 + 2 * half + i % 2] +=
                    half_of_word<T>(shift, i % 2) + half_of_word<T>(added[i / 2], i % 2);
            }
            store_row<T, WIDTH>(y + token * WIDTH, result, half, 1.0f, token < rows);
        }
    }
}
