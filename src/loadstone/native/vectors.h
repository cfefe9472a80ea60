// Vectors of 16 numbers, and all that differs between instruction sets. Included once per instruction set (level.cpp).
//
// They are GCC's and Clang's own vector types, which the compiler maps to whatever the instruction set has; only dot
// products of integers and of bfloat16, and conversions of float16, are written per instruction set.
#pragma once
#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "engine.h"

namespace loadstone::LEVEL {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef int8_t b16 __attribute__((vector_size(16)));
typedef uint8_t b64 __attribute__((vector_size(64)));
typedef int16_t s32 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef v16 v16u __attribute__((aligned(4), may_alias));  // as they lie in memory
typedef i16 i16u __attribute__((aligned(4), may_alias));
typedef h16 h16u __attribute__((aligned(2), may_alias));
typedef int32_t pair_u __attribute__((may_alias));  // two bfloat16 in one of these, or one by one

#define UNROLL _Pragma("GCC unroll 16")

static ALWAYS v16 load(const void* p) { return *static_cast<const v16u*>(p); }
static ALWAYS i16 load_int(const void* p) { return *static_cast<const i16u*>(p); }
static ALWAYS void store(void* p, v16 x) { *static_cast<v16u*>(p) = x; }
static ALWAYS void store_short(void* p, h16 x) { *static_cast<h16u*>(p) = x; }
static ALWAYS v16 splat(float x) { return x - v16{}; }  // x + 0 would be an addition, for the sake of -0
static ALWAYS i16 splat(int32_t x) { return i16{} + x; }
static ALWAYS int least(int a, int b) { return a < b ? a : b; }
static ALWAYS v16 larger(v16 a, v16 b) { return a > b ? a : b; }
static ALWAYS v16 smaller(v16 a, v16 b) { return a < b ? a : b; }
static ALWAYS v16 absolute(v16 x) { return (v16)((i16)x & 0x7fffffff); }
// To the nearest, ties to even, for numbers below 2^22: what is added leaves no room for a fraction.
static ALWAYS i16 rounded(v16 x) { return (i16)(x + 12582912.0f) - 0x4b400000; }

static const i16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class Vector, class Op>
static ALWAYS auto fold(Vector x, Op op) {
    UNROLL for (int far = LANES / 2; far; far /= 2) x = op(x, __builtin_shuffle(x, LANE ^ far));
    return x[0];
}
template <class Vector>
static ALWAYS auto sum(Vector x) { return fold(x, [](Vector a, Vector b) { return a + b; }); }
static ALWAYS float largest(v16 x) { return fold(x, larger); }

// ---- what differs between instruction sets ----

// What the registers hold: 24 vectors of sums of 32, or, on halves of 16 vectors, 12 of 16.
#if defined(__AVX512F__)
constexpr int PANELS = 2, TILE = 12;
#elif defined(__AVX2__)
constexpr int PANELS = 1, TILE = 6;
#else
constexpr int PANELS = 1, TILE = 4;
#endif

#if defined(__AMX_TILE__)
constexpr bool AMX = true;
#else
constexpr bool AMX = false;
#endif

static ALWAYS v16 load_half(const void* p) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    const __m128i* halves = static_cast<const __m128i*>(p);
    __m256 both[2] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    return load(both);
#else
    const i16 h = __builtin_convertvector(*static_cast<const h16u*>(p), i16), rest = (h & 0x7fff) << 13;
    const i16 finite = (i16)((v16)rest * 0x1p112f);  // the exponents' origins are 112 apart, subnormal numbers' too
    return (v16)((rest < splat(0x7c00 << 13) ? finite : rest | 0x7f800000) | (h & 0x8000) << 16);
#endif
}

static ALWAYS h16 to_half(v16 x) {  // to the nearest, ties to even
#if defined(__AVX512F__)
    return (h16)_mm512_cvtps_ph((__m512)x, 0);
#else
    const i16 rest = (i16)absolute(x);
    const i16 subnormal = (i16)(absolute(x) + 0.5f) - 0x3f000000;  // the last bit of 0.5 is 2^-24
    const i16 normal = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
    const i16 finite = rest < splat(0x38800000) ? subnormal : normal;
    const i16 h = rest < splat(0x477ff000) ? finite : rest > splat(0x7f800000) ? splat(0x7e00) : splat(0x7c00);
    return __builtin_convertvector(h | ((i16)x >> 16 & 0x8000), h16);
#endif
}

// a . b per lane, of 2 int16 each.
static ALWAYS i16 dot_short(i16 a, i16 b) {
#if defined(__AVX512BW__)
    return (i16)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    __m256i x[2], y[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64);
    for (int i = 0; i < 2; i++) x[i] = _mm256_madd_epi16(x[i], y[i]);
    return load_int(x);
#else
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// sum + w . x per lane, of 4 bytes each: w unsigned, x signed.
static ALWAYS i16 dot(i16 sum, i16 w, i16 x) {
#if defined(__AVX512VNNI__)
    return (i16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
    const s32 even = (s32)x << 8 >> 8, odd = (s32)x >> 8;
    return sum + dot_short(w & 0x00ff00ff, (i16)even) + dot_short(w >> 8 & 0x00ff00ff, (i16)odd);
#endif
}

// sum + w . x per lane, of 2 bfloat16 each.
#if defined(__AVX512BF16__)
constexpr bool BF16_DOT = true;
static ALWAYS v16 dot_bf16(v16 sum, i16 w, i16 x) {
    return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
#else
constexpr bool BF16_DOT = false;
static ALWAYS v16 dot_bf16(v16 sum, i16, i16) { return sum; }  // only named where BF16_DOT is false, never called
#endif

// To bfloat16, to the nearest, ties to even: of each lane, and of up to 16 numbers that lie together, then zeros.
static ALWAYS i16 to_bf16(v16 x) {
    const i16 bits = (i16)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
    return x == x ? rounded : splat(0x7fc0);
}
static ALWAYS h16 to_short_bf16(v16 x) {
#if defined(__AVX512BF16__)
    return (h16)_mm512_cvtneps_pbh((__m512)x);  // subnormal numbers become zeros
#else
    return __builtin_convertvector(to_bf16(x), h16);
#endif
}
static ALWAYS void put_bf16(void* to, const float* from, int count) {
    v16 x = count == LANES ? load(from) : v16{};
    if (count < LANES) memcpy(&x, from, size_t(count) * sizeof(float));
    store_short(to, to_short_bf16(x));
}

// ---- elementary functions, to some 1e-7 ----

// c[0] x^n + ... + c[n].
template <size_t N>
static ALWAYS v16 polynomial(v16 x, const float (&c)[N]) {
    v16 y = splat(c[0]);
    UNROLL for (size_t i = 1; i < N; i++) y = y * x + c[i];
    return y;
}

static ALWAYS v16 exponential(v16 x) {  // 0 below -87.3, and no more than at 87.3: what it divides is nothing there
    const v16 magic = splat(12582912.0f), low = smaller(larger(x, splat(-87.3f)), splat(87.3f));
    const v16 shifted = low * 1.44269504f + magic, n = shifted - magic;
    const v16 r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
    const float c[] = {1.9875691e-4f, 1.3981999e-3f, 8.3334519e-3f, 4.1665795e-2f, 1.6666665e-1f, 0.5f, 1.0f, 1.0f};
    const v16 y = polynomial(r, c) * (v16)(((i16)shifted << 23) + (127 << 23));  // n stands in shifted's last bits
    return x < splat(-87.3f) ? v16{} : (x == x ? y : x);
}

static ALWAYS v16 error_function(v16 x) {  // Abramowitz and Stegun 7.1.26
    const v16 a = absolute(x), t = 1.0f / (0.3275911f * a + 1.0f);
    const float c[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f};
    const v16 y = 1.0f - polynomial(t, c) * exponential(-a * a);
    return x < v16{} ? -y : y;
}

static ALWAYS v16 activate(int kind, v16 x) {  // numbered as config/base.py's ACTIVATIONS
    switch (kind) {
        case 0: return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));  // GELU, tanh form
        case 1: return 0.5f * x * (1.0f + error_function(0.70710678f * x));                     // GELU
        case 2: return x / (1.0f + exponential(-x));                                            // SiLU
        default: return x < v16{} ? v16{} : x;
    }
}

}  // namespace loadstone::LEVEL
