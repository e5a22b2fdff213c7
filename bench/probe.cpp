// What one core can do, for bench/roofline.py, which compiles this for the processor it runs on and calls it.
// A function takes a number and does so many of what its name says.
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EACH _Pragma("GCC unroll 12") for (int i = 0; i < 12; ++i)
// Twelve sums, enough to hide the latency of an instruction; a number that the compiler does not know stays one.
#define KEPT(sums) EACH asm volatile("" : "+x"(sums[i]))
#define KEPT_WIDE(sums) EACH asm volatile("" : "+v"(sums[i]))

extern "C" {

// Additions that wait for one another: one a cycle.
int64_t chain(int64_t count) {
    int64_t x = 0;
    for (int64_t i = 0; i < count; i += 16)
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
            x += 1;
            asm volatile("" : "+r"(x));
        }
    return x;
}

// Bytes read, a multiple of 512.
typedef int64_t line __attribute__((vector_size(64)));
int64_t read_bytes(const char *from, int64_t bytes) {
    line sums[8] = {};
    for (int64_t at = 0; at < bytes; at += 512)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] |= *reinterpret_cast<const line *>(from + at + 64 * i);
    line all = {};
    for (int i = 0; i < 8; ++i) all |= sums[i];
    int64_t out = 0;
    for (int i = 0; i < 8; ++i) out |= all[i];
    return out;
}

// Products, each with an addition; how many an instruction makes is in roofline.py.
#if defined(__SSE2__)
void floats_4(int64_t count) {
    __m128 sums[12] = {}, x = _mm_set1_ps(1.5f);
    asm volatile("" : "+x"(x));
    for (int64_t n = 0; n < count; n += 4 * 12) {
        EACH sums[i] = _mm_add_ps(sums[i], _mm_mul_ps(x, x));
        KEPT(sums);
        asm volatile("" : "+x"(x));
    }
}
#endif
#if defined(__FMA__)
void floats_8(int64_t count) {
    __m256 sums[12] = {}, x = _mm256_set1_ps(1.5f);
    for (int64_t n = 0; n < count; n += 8 * 12) {
        EACH sums[i] = _mm256_fmadd_ps(x, x, sums[i]);
        KEPT(sums);
    }
}
#endif
#if defined(__AVX2__)
void bytes_32(int64_t count) {
    __m256i sums[12] = {}, x = _mm256_set1_epi8(3);
    for (int64_t n = 0; n < count; n += 32 * 12) {
        EACH {
            asm volatile("" : "+x"(x)); // else one product would do for all
            sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(x, x));
        }
        KEPT(sums);
    }
}
#endif
#if defined(__AVX512BW__)
void floats_16(int64_t count) {
    __m512 sums[12] = {}, x = _mm512_set1_ps(1.5f);
    for (int64_t n = 0; n < count; n += 16 * 12) {
        EACH sums[i] = _mm512_fmadd_ps(x, x, sums[i]);
        KEPT_WIDE(sums);
    }
}
void bytes_64(int64_t count) {
    __m512i sums[12] = {}, x = _mm512_set1_epi8(3);
    for (int64_t n = 0; n < count; n += 64 * 12) {
        EACH {
            asm volatile("" : "+v"(x));
            sums[i] = _mm512_add_epi16(sums[i], _mm512_maddubs_epi16(x, x));
        }
        KEPT_WIDE(sums);
    }
}
#endif
#if defined(__AVX512VNNI__)
void dots_64(int64_t count) {
    __m512i sums[12] = {}, x = _mm512_set1_epi8(3);
    for (int64_t n = 0; n < count; n += 64 * 12) {
        EACH sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
        KEPT_WIDE(sums);
    }
}
#endif
}
