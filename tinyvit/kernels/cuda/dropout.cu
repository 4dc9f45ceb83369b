// Dropout masks: the very numbers that random.keep_mask draws on the host.
//
// Writes a mask; reads nothing. About 60 integer instructions a number: bound by them or by memory, whichever is less
// generous. A thread makes 8 neighbouring numbers of one sample from one block of random bits; samples are the
// second dimension of blocks and grid, so that nothing is divided.
//
// The generator is Philox-4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), its key hashed
// from (seed, step, place) as in NumPy's SeedSequence. The step may lie in device memory, so that a captured graph
// draws other numbers each time it is replayed.
//
// Compile with SCALAR.
#include "common.cuh"

using T = SCALAR;
using Word = unsigned long long;

constexpr int WIDTH = 8;  // draws of 32 bits in a block of random bits

struct Key {
    Word x[2];
};

// NumPy's SeedSequence((seed, step, place)).generate_state(2, uint64), each number below 2^32.
DEVICE Key seed_sequence(unsigned seed, unsigned step, unsigned place) {
    unsigned pool[4] = {seed, step, place, 0}, constant = 0x43b0d7e5u;
    auto hash = [&](unsigned x) {
        x ^= constant;
        constant *= 0x931e8875u;
        x *= constant;
        return x ^ x >> 16;
    };
#pragma unroll
    for (int i = 0; i < 4; i++) pool[i] = hash(pool[i]);
#pragma unroll
    for (int from = 0; from < 4; from++)
#pragma unroll
        for (int to = 0; to < 4; to++) {
            if (from == to) continue;
            const unsigned x = 0xca01f9ddu * pool[to] - 0x4973f715u * hash(pool[from]);
            pool[to] = x ^ x >> 16;
        }
    constant = 0x8b51f9ddu;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned x = pool[i] ^ constant;
        constant *= 0x58f38dedu;
        x *= constant;
        pool[i] = x ^ x >> 16;
    }
    return {{pool[0] | Word(pool[1]) << 32, pool[2] | Word(pool[3]) << 32}};
}

// The 256 bits that belong to a counter, whose upper 192 bits are 0.
DEVICE void philox(Word (&bits)[4], Word counter, Key key) {
    bits[0] = counter;
    bits[1] = bits[2] = bits[3] = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const Word a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        const Word upper_a = __umul64hi(a, bits[0]), upper_b = __umul64hi(b, bits[2]);
        const Word lower_a = a * bits[0], lower_b = b * bits[2];
        bits[0] = upper_b ^ bits[1] ^ key.x[0];
        bits[1] = lower_b;
        bits[2] = upper_a ^ bits[3] ^ key.x[1];
        bits[3] = lower_a;
        key.x[0] += 0x9E3779B97F4A7C15ull;
        key.x[1] += 0xBB67AE8584CAA73Bull;
    }
}

// mask (samples, size): `scale` where a draw is at least `threshold`, else 0. `step_on_device`
// replaces step, unless null.
extern "C" __global__ void __launch_bounds__(256)
    dropout_mask(T* __restrict__ mask, long long samples, long long size, unsigned seed, unsigned step,
                 const long long* __restrict__ step_on_device, unsigned place, long long first_sample,
                 unsigned threshold, float scale) {
    const Key key = seed_sequence(seed, step_on_device ? unsigned(*step_on_device) : step, place);
    const long long blocks = (size + WIDTH - 1) / WIDTH;  // of a sample
    const long long first = 1LL * blockIdx.x * blockDim.x + threadIdx.x, across = 1LL * gridDim.x * blockDim.x;
    const long long down = 1LL * gridDim.y * blockDim.y;
    for (long long sample = 1LL * blockIdx.y * blockDim.y + threadIdx.y; sample < samples; sample += down) {
        for (long long i = first; i < blocks; i += across) {
            Word bits[4];
            philox(bits, (first_sample + sample) * blocks + i + 1, key);  // NumPy counts before it draws
            T* to = mask + sample * size;
            const long long at = i * WIDTH;
            Vector<T, WIDTH / 2> halves[2];
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const unsigned draw = unsigned(bits[j / 2] >> 32 * (j % 2));
                halves[j / 4].set(j % 4, draw >= threshold ? scale : 0.0f);
            }
            if (size % WIDTH == 0) {
                store(to + at, halves[0]);
                store(to + at + WIDTH / 2, halves[1]);
            } else {
#pragma unroll
                for (int j = 0; j < WIDTH; j++)
                    if (at + j < size) to[at + j] = halves[j / 4].x[j % 4];
            }
        }
    }
}
