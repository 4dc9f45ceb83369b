// The Gaussian error linear unit x Phi(x) and its derivative (Hendrycks & Gimpel 2016, arXiv:1606.08415).
//
// APPROXIMATE 0: Phi is the normal distribution; 1: its approximation 1/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
// For 16-bit numbers the normal distribution itself is computed as 1/2 (1 + tanh(x P(x^2))) with a fitted P (error
// below 3e-8): with one exponential and one division it keeps pace with memory, which erff does not.
#pragma once
#include "common.cuh"

template <class T>
DEVICE float exponential(float x) {
    if constexpr (Scalar<T>::wide) return expf(x);
    return exp2_fast(1.4426950408889634f * x);
}

struct Logistic {
    float value, slope;
};

// 1 / (1 + exp(-x)) = 1/2 (1 + tanh(x / 2)) and its derivative, through exp(-|x|): nothing overflows or cancels.
template <class T>
DEVICE Logistic logistic(float x) {
    const float e = exponential<T>(-fabsf(x)), share = Scalar<T>::wide ? 1.0f / (1.0f + e) : __fdividef(1.0f, 1.0f + e);
    return {x < 0.0f ? e * share : share, e * share * share};
}

// sqrt(2/pi), and 0.044715 times that
[[maybe_unused]] constexpr float TANH_1 = 0.7978845608028654f, TANH_3 = 0.035677408136300125f;

// Beyond 1e6 Phi is 0 or 1, and its powers might overflow.
DEVICE float bounded_square(float x) { return fminf(x * x, 1e6f); }

template <class T>
DEVICE Logistic approximate_phi(float x) {
    return logistic<T>(2.0f * x * fmaf(bounded_square(x), TANH_3, TANH_1));
}

template <class T>
DEVICE float normal_phi(float x) {
    if constexpr (Scalar<T>::wide) return fmaf(0.5f, erff(x * 0.7071067811865476f), 0.5f);
    const float s = bounded_square(x);
    float p = 1.7562791371999588e-09f;
    p = fmaf(p, s, -1.3226633536777985e-07f);
    p = fmaf(p, s, 3.964773804837876e-06f);
    p = fmaf(p, s, -5.530632001072468e-05f);
    p = fmaf(p, s, -3.2594736610835285e-05f);
    p = fmaf(p, s, 0.03633308440312559f);
    p = fmaf(p, s, 0.7978849414909825f);
    return logistic<T>(2.0f * x * p).value;
}

template <class T>
DEVICE float gelu(float x) {
    if constexpr (APPROXIMATE) return x * approximate_phi<T>(x).value;
    return x * normal_phi<T>(x);
}

template <class T>
DEVICE float gelu_slope(float x) {
    if constexpr (APPROXIMATE) {
        const Logistic phi = approximate_phi<T>(x);
        return fmaf(2.0f * x * phi.slope, fmaf(bounded_square(x), 3.0f * TANH_3, TANH_1), phi.value);
    }
    const float density = 0.3989422804014327f * exponential<T>(-0.5f * x * x);
    return fmaf(x, density, normal_phi<T>(x));
}
