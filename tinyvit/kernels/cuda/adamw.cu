// AdamW and Adam (Loshchilov & Hutter 2019, algorithm 2) in one launch over many parameters, the gradient's norm, and what
// Muon does beside its products of matrices.
//
// adamw reads p, m, v (fp32) and the gradient and writes p, m, v and, where wanted, a copy of p in the low precision:
// 28 bytes a number in fp32, 30 with a 16-bit gradient and copy instead of 32 with both in fp32; 15 FLOPs.
// squares_many reads the gradients. Both are bound by memory.
//
// The parameters stand in a table in device memory. Each is cut into pieces of PIECE numbers, and block i takes the
// i-th piece of all; which parameter that belongs to it finds by bisection. Sums of squares are doubles: fp32 squares
// overflow beyond 1.8e19, and a sum over 10^8 of them loses digits. What changes from step to step lies in device
// memory too (`control`), so that a captured graph can be replayed.
//
// Compile with SCALAR, the type of the gradients, and COPY, that of the low-precision copies (SCALAR if not defined);
// the parameters themselves are fp32.
#include "common.cuh"

#ifndef COPY
#define COPY SCALAR
#endif

using T = SCALAR;
using C = COPY;

constexpr int PIECE = 4096;

struct Parameter {  // 64 bytes; the table's layout in Python is TABLE in optimizers.py
    float *p, *m, *v;
    const T* g;
    C* copy;  // may be null
    long long size;
    long long first_piece;
    float lr_scale, weight_decay;
};

struct Control {                      // doubles, so that Python can hold them in one array: CONTROL in optimizers.py
    double lr, step;                  // set by the caller; prepare_adamw counts the step
    double correction, rate_over_lr;  // of this step: sqrt(1 - beta2^step), and that over 1 - beta1^step
    double gradient_scale;            // the gradients are multiplied by it: 1 / loss_scale, and clipping
    double norm;                      // of the gradient (without the loss scale), before clipping
    double skip;                      // 1: the gradient overflowed, nothing is to be updated
};

// The parameter that a piece belongs to: the last one whose first piece is not beyond it.
DEVICE const Parameter& parameter_of(const Parameter* table, int count, long long piece) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table[middle].first_piece <= piece)
            low = middle;
        else
            high = middle;
    }
    return table[low];
}

// One thread. Counts the step and prepares what all parameters share.
extern "C" __global__ void prepare_adamw(Control* control, double beta1, double beta2) {
    if (threadIdx.x > 0 || control->skip != 0.0) return;
    control->step += 1.0;
    control->correction = sqrt(1.0 - pow(beta2, control->step));
    control->rate_over_lr = control->correction / (1.0 - pow(beta1, control->step));
}

// New shares (1 - beta1, 1 - beta2) are numbers of their own: 1 - 0.999f is off by 1e-5. eps and rate include their
// corrections. Weight decay: AdamW has keep = 1 - lr weight_decay, Adam has l2 = weight_decay, added to the gradient.
struct Step {
    float new1, beta2, new2, eps, rate, keep, l2;
};

DEVICE void update(float& p, float& m, float& v, float g, const Step& s) {
    g = fmaf(s.l2, p, g);
    m = fmaf(s.new1, g - m, m);
    v = fmaf(s.new2 * g, g, v * s.beta2);
    p = p * s.keep - s.rate * (m / (sqrtf(v) + s.eps));
}

// grid: all pieces. decoupled: 1 for AdamW, 0 for Adam.
extern "C" __global__ void __launch_bounds__(256, 4)
    adamw_many(const Parameter* __restrict__ table, int count, const Control* __restrict__ control, float new1,
               float beta2, float new2, float eps, int decoupled) {
    if (control->skip != 0.0) return;
    const Parameter& parameter = parameter_of(table, count, blockIdx.x);
    const double lr = control->lr * parameter.lr_scale;
    const Step step = {new1,
                       beta2,
                       new2,
                       float(eps * control->correction),
                       float(lr * control->rate_over_lr),
                       decoupled ? float(1.0 - lr * parameter.weight_decay) : 1.0f,
                       decoupled ? 0.0f : parameter.weight_decay};
    const float scale = float(control->gradient_scale);
    const long long start = (blockIdx.x - parameter.first_piece) * PIECE;
    const long long end = start + PIECE < parameter.size ? start + PIECE : parameter.size;

    long long i = start + threadIdx.x * 4;
    for (; i + 4 <= end; i += blockDim.x * 4) {  // arrays start at 16-byte boundaries, and so do pieces
        Vector<float, 4> p = load<4>(parameter.p + i), m = load<4>(parameter.m + i), v = load<4>(parameter.v + i);
        const Vector<T, 4> g = load<4>(parameter.g + i);
        Vector<C, 4> copy;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            update(p.x[j], m.x[j], v.x[j], g[j] * scale, step);
            copy.set(j, p.x[j]);
        }
        store(parameter.p + i, p);
        store(parameter.m + i, m);
        store(parameter.v + i, v);
        if (parameter.copy) store(parameter.copy + i, copy);
    }
    for (; i < end; i++) {  // at most three numbers, by the one thread that they fall to
        update(parameter.p[i], parameter.m[i], parameter.v[i], to_float(parameter.g[i]) * scale, step);
        if (parameter.copy) parameter.copy[i] = Scalar<C>::from(parameter.p[i]);
    }
}

// The sum of a double over the block's 256 threads, valid in the first one; `memory` holds 256 doubles.
DEVICE double block_sum(double x, unsigned char* memory) {
    double* scratch = reinterpret_cast<double*>(memory);
    scratch[threadIdx.x] = x;
    for (unsigned half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    return scratch[0];
}

// grid: all pieces; writes a sum for each. Shared memory here and in the next one: 256 doubles.
extern "C" __global__ void __launch_bounds__(256)
    squares_many(const Parameter* __restrict__ table, int count, double* __restrict__ partial) {
    const Parameter& parameter = parameter_of(table, count, blockIdx.x);
    const long long start = (blockIdx.x - parameter.first_piece) * PIECE;
    const long long end = start + PIECE < parameter.size ? start + PIECE : parameter.size;
    double sum = 0.0;
    long long i = start + threadIdx.x * 4;
    for (; i + 4 <= end; i += blockDim.x * 4) {
        const Vector<T, 4> g = load<4>(parameter.g + i);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += double(g[j]) * g[j];
    }
    for (; i < end; i++) sum += double(to_float(parameter.g[i])) * to_float(parameter.g[i]);
    DYNAMIC_SHARED(memory);
    sum = block_sum(sum, memory);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block: the sum of partial sums.
extern "C" __global__ void __launch_bounds__(256)
    sum_squares(const double* __restrict__ partial, int count, double* __restrict__ total) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    DYNAMIC_SHARED(memory);
    sum = block_sum(sum, memory);
    if (threadIdx.x == 0) *total = sum;
}

// One thread: the norm, and the factor that clips it (1 where the norm is not finite, as torch leaves such gradients
// alone). Where the loss was multiplied by `loss_scale` (else null) the gradients are divided by it, and it finds its
// size: a gradient that is not finite is skipped and halves it, grow_after good ones in a row double it
// (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; LossScale in precision.py).
extern "C" __global__ void clip_gradient(const double* __restrict__ total, double largest_norm, float* loss_scale,
                                         int* good, int grow_after, float largest_scale, Control* control) {
    if (threadIdx.x > 0) return;
    const double scale = loss_scale ? *loss_scale : 1.0f;
    const double norm = sqrt(*total) / scale, factor = largest_norm / (norm + 1e-6);
    const bool finite = norm * 0.0 == 0.0;
    control->norm = norm;
    control->gradient_scale = (factor < 1.0 && finite ? factor : 1.0) / scale;
    control->skip = loss_scale && !finite ? 1.0 : 0.0;
    if (!loss_scale) return;
    *good = finite ? *good + 1 : 0;
    const bool grown = *good >= grow_after;
    if (grown) *good = 0;
    const float next = float(scale) * (grown ? 2.0f : finite ? 1.0f : 0.5f);
    *loss_scale = fminf(fmaxf(next, 1.0f), largest_scale);
}

// --- Muon -----------------------------------------------------------------------------------------------------------
//
// Its parameters are the rows of the table from the piece `before` on. Where AdamW has v they have their place in an
// array of updates, which are made orthogonal by products of matrices between muon_normalise and muon_apply. There a
// matrix may start anywhere, so numbers are taken one by one. Grid: their pieces.

struct Range {
    long long start, end;
};

DEVICE Range range_of(const Parameter& parameter, long long piece) {
    const long long start = (piece - parameter.first_piece) * PIECE;
    return {start, start + PIECE < parameter.size ? start + PIECE : parameter.size};
}

// The momentum, and g + momentum (m - g) beside `away` numbers from v; the sum of its squares for each piece. Shared
// memory: 256 doubles.
extern "C" __global__ void __launch_bounds__(256)
    muon_direction(const Parameter* __restrict__ table, int count, long long before,
                   const Control* __restrict__ control, float momentum, long long away, double* __restrict__ partial) {
    const Parameter& parameter = parameter_of(table, count, blockIdx.x + before);
    const Range range = range_of(parameter, blockIdx.x + before);
    const float scale = float(control->gradient_scale);
    double sum = 0.0;
    for (long long i = range.start + threadIdx.x; i < range.end && control->skip == 0.0; i += blockDim.x) {
        const float g = to_float(parameter.g[i]) * scale, m = fmaf(1.0f - momentum, g - parameter.m[i], parameter.m[i]);
        const float direction = fmaf(momentum, m - g, g);
        parameter.m[i] = m;
        parameter.v[i + away] = direction;
        sum += double(direction) * direction;
    }
    DYNAMIC_SHARED(memory);
    sum = block_sum(sum, memory);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// v = that direction over its Frobenius norm (and 1e-7).
extern "C" __global__ void __launch_bounds__(256)
    muon_normalise(const Parameter* __restrict__ table, int count, long long before, long long away,
                   const double* __restrict__ partial) {
    const Parameter& parameter = parameter_of(table, count, blockIdx.x + before);
    const Range range = range_of(parameter, blockIdx.x + before);
    const long long first = parameter.first_piece - before, pieces = (parameter.size + PIECE - 1) / PIECE;
    double squares = 0.0;
    for (long long i = 0; i < pieces; i++) squares += partial[first + i];
    const float factor = float(1.0 / (sqrt(squares) + 1e-7));
    for (long long i = range.start + threadIdx.x; i < range.end; i += blockDim.x)
        parameter.v[i] = parameter.v[i + away] * factor;
}

// p = (1 - lr weight_decay) p - lr update, where the update lies `away` numbers from v.
extern "C" __global__ void __launch_bounds__(256)
    muon_apply(const Parameter* __restrict__ table, int count, long long before, const Control* __restrict__ control,
               long long away) {
    if (control->skip != 0.0) return;
    const Parameter& parameter = parameter_of(table, count, blockIdx.x + before);
    const Range range = range_of(parameter, blockIdx.x + before);
    const double lr = control->lr * parameter.lr_scale;
    const float keep = float(1.0 - lr * parameter.weight_decay), rate = float(lr);
    for (long long i = range.start + threadIdx.x; i < range.end; i += blockDim.x) {
        const float p = parameter.p[i] * keep - rate * parameter.v[i + away];
        parameter.p[i] = p;
        if (parameter.copy) parameter.copy[i] = Scalar<C>::from(p);
    }
}

// p += weight (m - p) for all rows of a table, of which it reads p and m: an average p that follows m. Reads 8
// bytes a number and writes 4. `skip`, unless null, points to a number that forbids it (control->skip). grid: all
// pieces.
extern "C" __global__ void __launch_bounds__(256, 4)
    lerp_many(const Parameter* __restrict__ table, int count, float weight, const double* __restrict__ skip) {
    if (skip && *skip != 0.0) return;
    const Parameter& parameter = parameter_of(table, count, blockIdx.x);
    const long long start = (blockIdx.x - parameter.first_piece) * PIECE;
    const long long end = start + PIECE < parameter.size ? start + PIECE : parameter.size;
    long long i = start + threadIdx.x * 4;
    for (; i + 4 <= end; i += blockDim.x * 4) {
        Vector<float, 4> average = load<4>(parameter.p + i), target = load<4>(parameter.m + i);
#pragma unroll
        for (int j = 0; j < 4; j++) average.x[j] = fmaf(weight, target.x[j] - average.x[j], average.x[j]);
        store(parameter.p + i, average);
    }
    for (; i < end; i++) parameter.p[i] = fmaf(weight, parameter.m[i] - parameter.p[i], parameter.p[i]);
}
