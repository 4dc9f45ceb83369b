// Mean cross-entropy of logits (B, C) with smoothed labels (Szegedy et al. 2016, arXiv:1512.00567, section 7), and
// its gradient.
//
// Forward reads the logits (twice, the second time from a cache) and soft labels, and keeps three floats a row;
// backward reads both again and writes as much as the logits. 5 FLOPs and one exponential a number: bound by memory,
// or by launches. A block takes a row.
//
// Compile with SCALAR and SOFT (1: labels are probabilities (B, C) of type SCALAR; 0: class numbers (B), 64 bits).
#include "common.cuh"

using T = SCALAR;

DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

#if SOFT
using Label = T;
#else
using Label = long long;
#endif

// What a row is to be: (1 - smoothing) label + smoothing / C. A class number that is no class makes it NaN, and so the
// loss: nothing on the way here has looked at the labels.
DEVICE float target(const Label* labels, long long row, int c, int classes, float smoothing) {
#if SOFT
    const float label = to_float(labels[row * classes + c]);
#else
    const long long number = labels[row];
    const float label = number == c ? 1.0f : number >= 0 && number < classes ? 0.0f : not_a_number();
#endif
    return fmaf(label, 1.0f - smoothing, smoothing / classes);
}

// statistics (B, 3): the largest logit, 1 / sum exp(logit - largest) and the sum of the targets. losses (B).
// Shared memory: 2 floats a warp.
extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_forward(const T* __restrict__ logits, const Label* __restrict__ labels,
                          float* __restrict__ statistics, float* __restrict__ losses, int classes, float smoothing) {
    DYNAMIC_SHARED(memory);
    float* scratch = reinterpret_cast<float*>(memory);
    const long long row = blockIdx.x;
    logits += row * classes;

    float largest = minus_infinity();
    for (int c = threadIdx.x; c < classes; c += blockDim.x) largest = fmaxf(largest, to_float(logits[c]));
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) largest = fmaxf(largest, scratch[warp]);
    __syncthreads();

    float sums[3] = {};  // of exp(logit - largest), of the targets, and of target (logit - largest)
    for (int c = threadIdx.x; c < classes; c += blockDim.x) {
        const float x = to_float(logits[c]) - largest, t = target(labels, row, c, classes, smoothing);
        sums[0] += expf(x);
        sums[1] += t;
        sums[2] += !SOFT && t == 0.0f ? 0.0f : t * x;  // a class number leaves out the others, even at -inf
    }
    block_sums(sums, scratch);
    if (threadIdx.x > 0) return;
    statistics[3 * row] = largest;
    statistics[3 * row + 1] = 1.0f / sums[0];
    statistics[3 * row + 2] = sums[1];
    losses[row] = sums[1] * logf(sums[0]) - sums[2];
}

// One block. loss (1): the mean of losses (B). Shared memory: a float a warp.
extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_mean(const float* __restrict__ losses, T* __restrict__ loss, int batch) {
    DYNAMIC_SHARED(memory);
    float sum[1] = {};
    for (int row = threadIdx.x; row < batch; row += blockDim.x) sum[0] += losses[row];
    block_sums(sum, reinterpret_cast<float*>(memory));
    if (threadIdx.x == 0) *loss = Scalar<T>::from(sum[0] / batch);
}

// dlogits = (softmax * sum of targets - target) dloss / B
extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_backward(const T* __restrict__ logits, const Label* __restrict__ labels,
                           const float* __restrict__ statistics, const T* __restrict__ dloss, T* __restrict__ dlogits,
                           int batch, int classes, float smoothing) {
    const long long row = blockIdx.x;
    const float largest = statistics[3 * row], factor = statistics[3 * row + 1], weight = statistics[3 * row + 2];
    const float scale = to_float(*dloss) / batch;
    for (int c = threadIdx.x; c < classes; c += blockDim.x) {
        const float p = expf(to_float(logits[row * classes + c]) - largest) * factor;
        const float d = (p * weight - target(labels, row, c, classes, smoothing)) * scale;
        dlogits[row * classes + c] = Scalar<T>::from(d);
    }
}
