// A vector of LANES floats, one lane per channel, in GCC/Clang vector extensions: the same source compiles to
// AVX-512, AVX2 or whatever the target has. Included by scan_impl.h only, inside a namespace of its own per level.

#ifndef LANES
#error "define LANES before including simd.h"
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef double dvec __attribute__((vector_size(8 * LANES)));

static inline vec splat(float value) { return value - vec{}; }

static inline vec load(const float *from) {
    vec out;
    std::memcpy(&out, from, sizeof(vec));
    return out;
}

// The first `lanes` channels of a partial block; the others are zero, and zero inputs keep every state at zero.
static inline vec load(const float *from, int lanes) {
    if (lanes == LANES) return load(from);
    vec out{};
    std::memcpy(&out, from, sizeof(float) * lanes);
    return out;
}

static inline void store(float *to, vec value, int lanes) {
    if (lanes == LANES)
        std::memcpy(to, &value, sizeof(vec));
    else
        std::memcpy(to, &value, sizeof(float) * lanes);
}

static inline float sum(vec value) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += value[lane];
    return total;
}

static inline int32_t sum(ivec value) {
    int32_t total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += value[lane];
    return total;
}

// The nearest integers, ties to even. No sum that a compiler could fuse with the product before it.
static inline ivec nearest(vec x) {
#if defined(__AVX512F__) && LANES == 16
    return ivec(_mm512_cvtps_epi32(__m512(x)));
#elif defined(__AVX2__) && LANES == 8
    return ivec(_mm256_cvtps_epi32(__m256(x)));
#elif defined(__SSE2__) && LANES == 4
    return ivec(_mm_cvtps_epi32(__m128(x)));
#elif defined(__aarch64__) && LANES == 4
    return ivec(vcvtnq_s32_f32(float32x4_t(x)));
#else
    ivec out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = static_cast<int32_t>(std::nearbyintf(x[lane]));
    return out;
#endif
}

static constexpr float EXP2_1 = 0.693147004f, EXP2_2 = 0.240222424f, EXP2_3 = 0.0555073358f, EXP2_4 = 0.00967151299f,
                       EXP2_5 = 0.00132647273f;

// 2^x to about 1e-7 relative, exactly 1 at 0 (slow states must not drift). Far below zero the result is exactly 0 (a
// memoryless entry has x ~ -1e16); NaN stays NaN. The polynomial is a minimax fit of degree 5 with constant term 1.
static inline vec exp2_fraction(vec f) { // f in [-0.5, 0.5]
    vec p = splat(EXP2_5) * f + splat(EXP2_4);
    p = p * f + splat(EXP2_3);
    p = p * f + splat(EXP2_2);
    p = p * f + splat(EXP2_1);
    return p * f + splat(1.0f);
}

static inline vec exp2v(vec x) {
#if defined(__AVX512F__) && LANES == 16
    const vec f = vec(_mm512_reduce_ps(__m512(x), 0)); // x minus the nearest integer; 0 for infinities
    return vec(_mm512_scalef_ps(__m512(exp2_fraction(f)), __m512(x - f)));
#else
#if defined(__AVX2__) && LANES == 8
    x = vec(_mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), __m256(x))));
#else
    x = x < splat(-127.0f) ? splat(-127.0f) : x;
    x = x > splat(128.0f) ? splat(128.0f) : x;
#endif
    // Rounding by the 1.5 * 2^23 trick leaves the integer part in the low bits, ready to become the exponent.
    const vec shifted = x + splat(12582912.0f);
    const vec p = exp2_fraction(x - (shifted - splat(12582912.0f)));
    ivec bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127 << 23);
    vec scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
#endif
}

static constexpr float LOG2E = 1.44269504088896341f;

static inline vec sigmoid(vec x) { return splat(1.0f) / (splat(1.0f) + exp2v(x * splat(-LOG2E))); }

// log(1 + e^x), to about 1e-7: log(1 + t) is 2 artanh(t / (2 + t)), whose series ends early as t <= 1.
static inline vec softplus(vec x) {
    const vec t = exp2v((x > splat(0.0f) ? -x : x) * splat(LOG2E));
    const vec s = t / (splat(2.0f) + t), q = s * s;
    vec p = splat(1.0f / 15) * q + splat(1.0f / 13);
    p = p * q + splat(1.0f / 11);
    p = p * q + splat(1.0f / 9);
    p = p * q + splat(1.0f / 7);
    p = p * q + splat(1.0f / 5);
    p = p * q + splat(1.0f / 3);
    p = p * q + splat(1.0f);
    return (x > splat(0.0f) ? x : vec{}) + (s + s) * p;
}
