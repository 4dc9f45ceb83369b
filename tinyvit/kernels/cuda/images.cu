// What convolutions and max-pooling do beside products of matrices: patches of images, and windows' largest entries.
//
// Images have their channels last: (batch, HEIGHT, WIDTH, CHANNELS). patches writes KERNEL_H KERNEL_W times what it
// reads (which mostly comes from the cache), from_patches reads as much; pooling reads each image once, up to the cache,
// and writes a byte beside each result, the place in its window: all bound by memory.
//
// A thread takes VECTOR neighbouring channels. Going back it gathers for one place of the image what all windows have
// for it, in their order, so that results repeat bit for bit.
//
// Compile with SCALAR; VECTOR, 16 / sizeof(SCALAR) if it divides the channels, else 1; the image's sizes and CHANNELS;
// ROWS and COLUMNS of windows; the window's KERNEL_H and KERNEL_W, steps STRIDE_H and STRIDE_W, and padding above and to
// the left, TOP and LEFT; and INNER, the numbers of a patch with those that fill it up.
#include "common.cuh"

using T = SCALAR;
using V = Vector<T, VECTOR>;
using Places = Vector<unsigned char, VECTOR>;

constexpr int GROUPS = CHANNELS / VECTOR;  // of channels

// This thread's number among all, and how many there are.
DEVICE long long first_work() { return 1LL * blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE long long work_step() { return 1LL * gridDim.x * blockDim.x; }

// to (batch ROWS COLUMNS, INNER): row by row, column by column of the window, all channels; then zeros.
extern "C" __global__ void __launch_bounds__(256) patches(const T* __restrict__ x, T* __restrict__ to, long long batch) {
    constexpr int VECTORS = INNER / VECTOR;
    for (long long i = first_work(); i < batch * ROWS * COLUMNS * VECTORS; i += work_step()) {
        const int vector = i % VECTORS, place = vector / GROUPS, group = vector % GROUPS;
        const long long window = i / VECTORS;
        const int row = window / COLUMNS % ROWS * STRIDE_H - TOP + place / KERNEL_W;
        const int column = window % COLUMNS * STRIDE_W - LEFT + place % KERNEL_W;
        V v = {};
        if (place < KERNEL_H * KERNEL_W && row >= 0 && row < HEIGHT && column >= 0 && column < WIDTH)
            v = load<VECTOR>(x + (((window / (ROWS * COLUMNS)) * HEIGHT + row) * WIDTH + column) * CHANNELS + group * VECTOR);
        store(to + i * VECTOR, v);
    }
}

// Calls take(window, place) for each window that sees a place of an image, in the order of the places within them.
template <class Take>
DEVICE void for_windows(long long image, int y, int x, Take take) {
#pragma unroll
    for (int i = 0; i < KERNEL_H; i++) {
        const int down = y + TOP - i;
        if (down < 0 || down % STRIDE_H || down / STRIDE_H >= ROWS) continue;
#pragma unroll
        for (int j = 0; j < KERNEL_W; j++) {
            const int right = x + LEFT - j;
            if (right < 0 || right % STRIDE_W || right / STRIDE_W >= COLUMNS) continue;
            take((image * ROWS + down / STRIDE_H) * COLUMNS + right / STRIDE_W, i * KERNEL_W + j);
        }
    }
}

// dx: for each number of the image the sum of what its places in the patches have.
extern "C" __global__ void __launch_bounds__(256)
    from_patches(const T* __restrict__ dpatches, T* __restrict__ dx, long long batch) {
    for (long long i = first_work(); i < batch * HEIGHT * WIDTH * GROUPS; i += work_step()) {
        const long long at = i / GROUPS;
        float sums[VECTOR] = {};
        for_windows(at / (HEIGHT * WIDTH), at / WIDTH % HEIGHT, at % WIDTH, [&](long long window, int place) {
            const V v = load<VECTOR>(dpatches + window * INNER + place * CHANNELS + i % GROUPS * VECTOR);
#pragma unroll
            for (int k = 0; k < VECTOR; k++) sums[k] += v[k];
        });
        V out;
#pragma unroll
        for (int k = 0; k < VECTOR; k++) out.set(k, sums[k]);
        store(dx + i * VECTOR, out);
    }
}

// y: the largest of each window, NaN if one is there, and its place, the first of equal ones.
extern "C" __global__ void __launch_bounds__(256)
    largest(const T* __restrict__ x, T* __restrict__ y, unsigned char* __restrict__ places, long long batch) {
    for (long long i = first_work(); i < batch * ROWS * COLUMNS * GROUPS; i += work_step()) {
        const long long window = i / GROUPS;
        const int top = window / COLUMNS % ROWS * STRIDE_H - TOP, left = window % COLUMNS * STRIDE_W - LEFT;
        const T* image = x + window / (ROWS * COLUMNS) * HEIGHT * WIDTH * CHANNELS + i % GROUPS * VECTOR;
        V best = {};
        Places where = {};
        bool first = true;
        for (int place = 0; place < KERNEL_H * KERNEL_W; place++) {
            const int row = top + place / KERNEL_W, column = left + place % KERNEL_W;
            if (row < 0 || row >= HEIGHT || column < 0 || column >= WIDTH) continue;
            const V v = load<VECTOR>(image + (row * WIDTH + column) * CHANNELS);
#pragma unroll
            for (int k = 0; k < VECTOR; k++)
                if (first || v[k] > best[k] || v[k] != v[k]) {
                    best.x[k] = v.x[k];
                    where.x[k] = place;
                }
            first = false;
        }
        store(y + i * VECTOR, best);
        store(places + i * VECTOR, where);
    }
}

// dx: for each number of the image the sum of dy over the windows whose largest it is.
extern "C" __global__ void __launch_bounds__(256)
    to_largest(const T* __restrict__ dy, const unsigned char* __restrict__ places, T* __restrict__ dx, long long batch) {
    for (long long i = first_work(); i < batch * HEIGHT * WIDTH * GROUPS; i += work_step()) {
        const long long at = i / GROUPS;
        float sums[VECTOR] = {};
        for_windows(at / (HEIGHT * WIDTH), at / WIDTH % HEIGHT, at % WIDTH, [&](long long window, int place) {
            const long long from = window * CHANNELS + i % GROUPS * VECTOR;
            const V v = load<VECTOR>(dy + from);
            const Places where = load<VECTOR>(places + from);
#pragma unroll
            for (int k = 0; k < VECTOR; k++) sums[k] += where.x[k] == place ? v[k] : 0.0f;
        });
        V out;
#pragma unroll
        for (int k = 0; k < VECTOR; k++) out.set(k, sums[k]);
        store(dx + i * VECTOR, out);
    }
}
