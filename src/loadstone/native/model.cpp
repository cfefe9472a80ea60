// The model's arithmetic, compiled once per instruction set (LEVEL names it); every thread of the team runs `forward`.
//
// Vectors are GCC's and Clang's own (v16: 16 floats), which the compiler maps to whatever the instruction set has; only
// the integer and bfloat16 dot products and the float16 conversions are written per instruction set.
//
// One function does nearly all the work, in one form per way of storing numbers: `multiply`, P panels times T tokens.
// Attention is that product too: the cache keeps keys as panels of 16 slots, values as panels of 16 elements.
#include <math.h>
#include <string.h>

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "engine.h"

namespace loadstone {
namespace LEVEL {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef int8_t b16 __attribute__((vector_size(16)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef v16 v16u __attribute__((aligned(4), may_alias));  // as they lie in memory
typedef i16 i16u __attribute__((aligned(4), may_alias));
typedef b16 b16u __attribute__((aligned(1), may_alias));
typedef h16 h16u __attribute__((aligned(2), may_alias));

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

static INLINE v16 load(const void* p) { return *static_cast<const v16u*>(p); }
static INLINE i16 load_int(const void* p) { return *static_cast<const i16u*>(p); }
static INLINE void store(void* p, v16 x) { *static_cast<v16u*>(p) = x; }
static INLINE v16 splat(float x) { return x - v16{}; }  // x + 0 would be an addition, for the sake of -0
static INLINE i16 splat_int(int32_t x) { return i16{} + x; }
static INLINE v16 larger(v16 a, v16 b) { return a > b ? a : b; }
static INLINE v16 smaller(v16 a, v16 b) { return a < b ? a : b; }
static INLINE v16 to_float(i16 x) { return __builtin_convertvector(x, v16); }
static INLINE v16 absolute(v16 x) { return (v16)((i16)x & 0x7fffffff); }

template <class Vector, class Op>
static INLINE auto fold(Vector x, Op op) {
    x = op(x, __builtin_shuffle(x, i16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    x = op(x, __builtin_shuffle(x, i16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    x = op(x, __builtin_shuffle(x, i16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    x = op(x, __builtin_shuffle(x, i16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
    return x[0];
}
static INLINE float sum(v16 x) { return fold(x, [](v16 a, v16 b) { return a + b; }); }

// ---- what differs between instruction sets ----

// What the registers hold: 24 vectors of sums of 32, or, on halves of 16 vectors, 12 of 16.
#if defined(__AVX512F__)
constexpr int PANELS = 2, TILE = 12;
#elif defined(__AVX2__)
constexpr int PANELS = 1, TILE = 6;
#else
constexpr int PANELS = 1, TILE = 4;
#endif

#if !defined(__F16C__)
static float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits = rest << 13;
    float f;
    if (rest >= 0x7c00) {
        bits += 0x70000000;  // infinite, or no number
    } else if (rest >= 0x0400) {
        bits += 0x38000000;
    } else {  // subnormal: a multiple of 2^-24
        f = float(rest) * 0x1p-24f;
        memcpy(&bits, &f, 4);
    }
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t float_to_half(float f) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) {
        float magnitude;
        memcpy(&magnitude, &rest, 4);
        magnitude += 0.5f;  // whose last bit is 2^-24
        memcpy(&bits, &magnitude, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
}
#endif

static INLINE v16 load_half(const void* p) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    const __m128i* halves = static_cast<const __m128i*>(p);
    __m256 both[2] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    return load(both);
#else
    const uint16_t* h = static_cast<const uint16_t*>(p);
    v16 x;
    for (int i = 0; i < LANES; i++) x[i] = half_to_float(h[i]);
    return x;
#endif
}

static INLINE h16 to_half(v16 x) {
#if defined(__AVX512F__)
    return (h16)_mm512_cvtps_ph((__m512)x, 0);
#else
    h16 h;
#if defined(__F16C__)
    for (int i = 0; i < LANES; i++) h[i] = _cvtss_sh(x[i], 0);
#else
    for (int i = 0; i < LANES; i++) h[i] = float_to_half(x[i]);
#endif
    return h;
#endif
}

// sum + w . x per lane, of 4 bytes each: w unsigned, x signed.
static INLINE i16 dot(i16 sum, i16 w, i16 x) {
#if defined(__AVX512VNNI__)
    return (i16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8), odd = _mm512_srai_epi16((__m512i)x, 8);
    const __m512i low = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)), high = _mm512_srli_epi16((__m512i)w, 8);
    return sum + (i16)_mm512_madd_epi16(low, even) + (i16)_mm512_madd_epi16(high, odd);
#elif defined(__AVX2__)
    __m256i a[2], b[2], c[2];
    memcpy(a, &w, 64), memcpy(b, &x, 64);
    for (int i = 0; i < 2; i++) {
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(b[i], 8), 8), odd = _mm256_srai_epi16(b[i], 8);
        const __m256i low = _mm256_and_si256(a[i], _mm256_set1_epi16(255)), high = _mm256_srli_epi16(a[i], 8);
        c[i] = _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd));
    }
    i16 products;
    memcpy(&products, c, 64);
    return sum + products;
#else
    for (int byte = 0; byte < 4; byte++) sum += (w >> 8 * byte & 255) * (x << (24 - 8 * byte) >> 24);
    return sum;
#endif
}

#if defined(__AVX512BF16__)
constexpr bool BF16_DOT = true;
static INLINE v16 dot_bf16(v16 sum, i16 w, i16 x) { return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
#else
constexpr bool BF16_DOT = false;
#endif

// ---- elementary functions, to some 1e-7 ----

static INLINE v16 exponential(v16 x) {
    const v16 magic = splat(12582912.0f), low = smaller(larger(x, splat(-87.3f)), splat(88.7f));
    const v16 n = (low * 1.44269504f + magic) - magic;
    const v16 r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
    v16 p = splat(1.9875691e-4f);
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const i16 half = __builtin_convertvector(n, i16) >> 1, rest = __builtin_convertvector(n, i16) - half;
    const v16 y = p * (v16)((half + 127) << 23) * (v16)((rest + 127) << 23);
    return x < splat(-87.3f) ? v16{} : (x == x ? y : x);
}

static INLINE v16 error_function(v16 x) {  // Abramowitz and Stegun 7.1.26
    const v16 a = absolute(x), t = 1.0f / (0.3275911f * a + 1.0f);
    v16 p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const v16 y = 1.0f - p * t * exponential(-a * a);
    return x < splat(0) ? -y : y;
}

static INLINE v16 activate(int kind, v16 x) {
    switch (kind) {
        case 0: return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));  // GELU, tanh form
        case 1: return 0.5f * x * (1.0f + error_function(0.70710678f * x));                     // GELU
        case 2: return x / (1.0f + exponential(-x));                                            // SiLU
        default: return x < splat(0) ? v16{} : x;
    }
}

// ---- products ----

struct InF32 {
    static INLINE size_t bytes(size_t steps) { return steps * 64; }
    static INLINE v16 step(const uint8_t* w, size_t k) { return load(w + k * 64); }
};
struct InF16 {
    static INLINE v16 step(const uint8_t* w, size_t k) { return load_half(w + k * 32); }
};
struct InBF16 {
    static INLINE size_t bytes(size_t steps) { return (steps + 1) / 2 * 64; }
    static INLINE v16 step(const uint8_t* w, size_t k) {
        const i16 pair = load_int(w + k / 2 * 64);
        return (v16)(k & 1 ? pair & int32_t(0xffff0000) : pair << 16);
    }
};
struct InQ8 {
    static constexpr int BYTES = 544, OFFSET = 128;
    static constexpr bool MINIMUM = false;
    static INLINE i16 quad(const uint8_t* b, int j) { return load_int(b + 32 + 64 * j); }
};
template <int HEADER>
struct Nibbles {
    static INLINE i16 quad(const uint8_t* b, int j) {
        const i16 both = load_int(b + HEADER + 64 * (j & 3));
        return (j < 4 ? both : both >> 4) & 0x0f0f0f0f;
    }
};
struct InQ4 : Nibbles<32> {
    static constexpr int BYTES = 288, OFFSET = 8;
    static constexpr bool MINIMUM = false;
};
struct InQ4M : Nibbles<64> {
    static constexpr int BYTES = 320, OFFSET = 0;
    static constexpr bool MINIMUM = true;
};

// c[p][t] += sum over k of panel p's step k times x[k * KS + t * TS].
template <class In, int P, int T, int KS, int TS>
static INLINE void multiply(const uint8_t* w, size_t stride, const float* x, int cols, v16 (&c)[P][T]) {
    v16 total[P][T];
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int t = 0; t < T; t++) total[p][t] = v16{};
#pragma GCC unroll 2
    for (int k = 0; k < cols; k++) {
        v16 wk[P];
        UNROLL for (int p = 0; p < P; p++) wk[p] = In::step(w + p * stride, k);
        UNROLL for (int t = 0; t < T; t++) {
            const v16 xk = splat(x[size_t(k) * KS + t * TS]);
            UNROLL for (int p = 0; p < P; p++) total[p][t] += wk[p] * xk;
        }
    }
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int t = 0; t < T; t++) c[p][t] = total[p][t];
}

#if defined(__AVX512BF16__)
// The same with x in pairs, at x[pair * KS + t * TS].
template <int P, int T, int KS, int TS>
static INLINE void multiply_bf16(const uint8_t* w, size_t stride, const uint32_t* x, int pairs, v16 (&c)[P][T]) {
    v16 total[P][T];
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int t = 0; t < T; t++) total[p][t] = v16{};
    for (int k = 0; k < pairs; k++) {
        i16 wk[P];
        UNROLL for (int p = 0; p < P; p++) wk[p] = load_int(w + p * stride + size_t(k) * 64);
        UNROLL for (int t = 0; t < T; t++) {
            const i16 xk = splat_int(int32_t(x[size_t(k) * KS + t * TS]));
            UNROLL for (int p = 0; p < P; p++) total[p][t] = dot_bf16(total[p][t], wk[p], xk);
        }
    }
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int t = 0; t < T; t++) c[p][t] = total[p][t];
}
#endif

// The same with groups of integers: exact within a group, float32 across groups. The registers hold the integers of one
// group; c stays in memory.
template <class In, int P, int T>
static INLINE void multiply_int(const uint8_t* w, size_t stride, const int32_t* x, const float* scale, const int32_t* sums,
                         int groups, v16 (&c)[P][T]) {
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int t = 0; t < T; t++) c[p][t] = v16{};
    for (int g = 0; g < groups; g++, w += In::BYTES, x += 8 * T, scale += T, sums += T) {
        i16 total[P][T];
        UNROLL for (int t = 0; t < T; t++) {
            const i16 start = In::OFFSET ? splat_int(-In::OFFSET * sums[t]) : i16{};
            UNROLL for (int p = 0; p < P; p++) total[p][t] = start;
        }
        UNROLL for (int j = 0; j < 8; j++) {
            i16 wj[P];
            UNROLL for (int p = 0; p < P; p++) wj[p] = In::quad(w + p * stride, j);
            UNROLL for (int t = 0; t < T; t++) {
                const i16 xj = splat_int(x[j * T + t]);
                UNROLL for (int p = 0; p < P; p++) total[p][t] = dot(total[p][t], wj[p], xj);
            }
        }
        if (T > 1) __asm__ volatile("" ::: "memory");  // c is read from here on, and not kept in registers before
        UNROLL for (int p = 0; p < P; p++) {
            const v16 d = load_half(w + p * stride);
            const v16 m = In::MINIMUM ? load_half(w + p * stride + 32) : v16{};
            UNROLL for (int t = 0; t < T; t++) {
                v16 y = c[p][t] + to_float(total[p][t]) * (d * scale[t]);
                if (In::MINIMUM) y += m * (scale[t] * float(sums[t]));
                c[p][t] = y;
            }
        }
    }
}

enum { AS_F32 = 1, AS_BF16 = 2, AS_I8 = 4 };

// Which form of the activations products with this matrix read.
static INLINE int form(const Matrix& m, int n_tokens) {
    if (m.type == F32 || m.type == F16) return AS_F32;
    if (m.type == BF16) return BF16_DOT && n_tokens > DECODE ? AS_BF16 : AS_F32;
    return AS_I8;
}

template <int P, int T>
static void multiply_any(const Matrix& m, int panel, const Acts& a, size_t token, [[maybe_unused]] int n_tokens,
                         v16 (&c)[P][T]) {
    const uint8_t* w = m.panel(panel);
    const size_t stride = m.stride(), groups = (m.cols + GROUP - 1) / GROUP;
    const float* x = a.f32 + token * m.cols;
    const int32_t* quads = a.i8 + token * groups * 8;
    const float* scale = a.scale + token * groups;
    const int32_t* sums = a.sum + token * groups;
    switch (m.type) {
        case F32: return multiply<InF32, P, T, T, 1>(w, stride, x, m.cols, c);
        case F16: return multiply<InF16, P, T, T, 1>(w, stride, x, m.cols, c);
        case BF16:
#if defined(__AVX512BF16__)
            if (form(m, n_tokens) == AS_BF16) {
                const size_t pairs = (m.cols + 1) / 2;
                return multiply_bf16<P, T, T, 1>(w, stride, a.bf16 + token * pairs, int(pairs), c);
            }
#endif
            return multiply<InBF16, P, T, T, 1>(w, stride, x, m.cols, c);
        case Q8: return multiply_int<InQ8, P, T>(w, stride, quads, scale, sums, groups, c);
        case Q4: return multiply_int<InQ4, P, T>(w, stride, quads, scale, sums, groups, c);
        default: return multiply_int<InQ4M, P, T>(w, stride, quads, scale, sums, groups, c);
    }
}

// How many of the tokens from `token` on are one tile: TILE, 4, 2 or 1.
static INLINE int tile_size(int left) { return left >= TILE ? TILE : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// Calls work(T, token) for each tile; T is a type, whose value is the tile's size.
template <class Work>
static INLINE void each_tile(int n_tokens, Work work) {
    for (int token = 0; token < n_tokens;) {
        const int size = tile_size(n_tokens - token);
        if (size == TILE)
            work(std::integral_constant<int, TILE>{}, token);
        else if (size == 4)
            work(std::integral_constant<int, 4>{}, token);
        else if (size == 2)
            work(std::integral_constant<int, 2>{}, token);
        else
            work(std::integral_constant<int, 1>{}, token);
        token += size;
    }
}

template <int P, int T>
static INLINE void multiply_tile(const Matrix& m, int panel, const Acts& a, size_t token, int n_tokens, v16 (&c)[P][T]) {
    if (P > 1 && T == 1) {  // one token: memory is the limit, so one stream of it
        for (int p = 0; p < P; p++) multiply_any<1, T>(m, panel + p, a, token, n_tokens, *(v16(*)[1][T])c[p]);
    } else {
        multiply_any<P, T>(m, panel, a, token, n_tokens, c);
    }
}

// ---- one thread's part of a call ----

struct Worker {
    Engine& e;
    const Config& config;
    const Call& call;
    Own& own;
    const int M;

    Worker(Engine& engine, const Call& of, int thread)
        : e(engine), config(engine.config), call(of), own(engine.own[thread]), M(of.n_tokens) {}

    // Calls work(item) for items that no other thread has, until all are taken.
    template <class Work>
    INLINE void share(int total, int grain, Work work) {
        for (int first; (first = e.team.take(grain)) < total;)
            for (int item = first; item < total && item < first + grain; item++) work(item);
    }

    const Matrix* matrix(int layer, int which) const { return &e.matrices[layer * MATRICES + which]; }
    const float* vector(int layer, int which) const { return e.vectors[layer * VECTORS + which]; }
    const float* other(int which) const { return e.vectors[config.layers * VECTORS + which]; }

    // Brings `n_tokens` rows of `cols` floats into the forms that products read; fill(token, row) gives a row, or a
    // pointer to one. A single token is brought by every thread for itself.
    template <class Fill>
    const Acts& prepare(int n_tokens, int cols, int forms, Fill fill) {
        if (n_tokens == 1) {
            pack_acts(own.acts, fill(0, own.row), 0, 1, 0, cols, forms);
            return own.acts;
        }
        const int tiles = n_tokens / TILE, rest = n_tokens % TILE;
        share(tiles + (rest > 0), 1, [&](int item) {
            for (int token = item * TILE; token < n_tokens && token < (item + 1) * TILE;) {
                const int size = tile_size(n_tokens - token);
                for (int t = 0; t < size; t++)
                    pack_acts(e.acts, fill(token + t, own.row), token, size, t, cols, forms);
                token += size;
            }
        });
        e.team.barrier();
        return e.acts;
    }

    // Token t of the tile of T tokens that begins at `token`.
    static void pack_acts(Acts& a, const float* row, size_t token, int T, int t, int cols, int forms) {
        if (forms & AS_F32) {
            float* to = a.f32 + token * cols + t;
            for (int k = 0; k < cols; k++) to[size_t(k) * T] = row[k];
        }
        if (forms & AS_BF16) {
            const int pairs = (cols + 1) / 2;
            uint32_t* to = a.bf16 + token * pairs + t;
            for (int i = 0; i < pairs; i++) {
                const uint32_t low = to_bf16(row[2 * i]), high = 2 * i + 1 < cols ? to_bf16(row[2 * i + 1]) : 0;
                to[size_t(i) * T] = low | high << 16;
            }
        }
        if (forms & AS_I8) quantise(a, row, token, T, t, cols);
    }

    static INLINE uint32_t to_bf16(float x) {  // to the nearest, ties to even
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
    }

    static INLINE h16 narrowed(v16 x) {
        const i16 bits = (i16)x;
        return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, h16);
    }

    static void quantise(Acts& a, const float* row, size_t token, int T, int t, int cols) {
        const int groups = (cols + GROUP - 1) / GROUP;
        for (int g = 0; g < groups; g++) {
            v16 x[2];
            if ((g + 1) * GROUP <= cols) {
                x[0] = load(row + g * GROUP), x[1] = load(row + g * GROUP + LANES);
            } else {
                float last[GROUP] = {};
                memcpy(last, row + g * GROUP, (cols - g * GROUP) * 4);
                x[0] = load(last), x[1] = load(last + LANES);
            }
            const v16 both = larger(absolute(x[0]), absolute(x[1]));
            float most = fold(both, [](v16 p, v16 q) { return larger(p, q); });
            if (!(most <= 3.4e38f)) most = NAN;  // infinite, or no number: nor is what follows
            const float inverse = most > 0 ? 127 / most : 0;
            i16 sums = {};
            int32_t* to = a.i8 + (token * groups + size_t(g) * T) * 8 + t;
            for (int half = 0; half < 2; half++) {
                const i16 q = (i16)(x[half] * inverse + 12582912.0f) - 0x4b400000;
                sums += q;
                const b16 bytes = __builtin_convertvector(q, b16);
                int32_t quads[4];
                memcpy(quads, &bytes, 16);
                UNROLL for (int i = 0; i < 4; i++) to[size_t(half * 4 + i) * T] = quads[i];
            }
            a.scale[token * groups + g * T + t] = most / 127;
            a.sum[token * groups + g * T + t] = fold(sums, [](i16 p, i16 q) { return p + q; });
        }
    }

    // Calls put(which, panel, token, c) with c[p][t] = the rows of panel + p of matrix `which`, for token + t.
    template <class Put>
    void products(const Matrix* const* matrices, int count, const Acts& a, int n_tokens, Put put) {
        int total = 0;
        for (int i = 0; i < count; i++) total += items(*matrices[i]);
        share(total, grain(total, n_tokens), [&](int item) {
            int which = 0;
            for (; item >= items(*matrices[which]); which++) item -= items(*matrices[which]);
            const Matrix& m = *matrices[which];
            const int panel = PANELS * item;
            if (panel + PANELS <= m.panels())
                column<PANELS>(m, panel, a, n_tokens, which, put);
            else
                column<1>(m, panel, a, n_tokens, which, put);
        });
    }

    static int items(const Matrix& m) { return (m.panels() + PANELS - 1) / PANELS; }

    template <int P, class Put>
    static void column(const Matrix& m, int panel, const Acts& a, int n_tokens, int which, Put put) {
        each_tile(n_tokens, [&](auto size, int token) {
            v16 c[P][size.value];
            multiply_tile(m, panel, a, token, n_tokens, c);
            put(which, panel, token, c);
        });
    }

    // hidden = activation(gate) * up, tile by tile.
    void gated(const Matrix& gate, const Matrix& up, const Acts& a, int n_tokens, const float* gate_bias,
               const float* up_bias) {
        const int total = gate.panels(), stride = padded(config.d_ff);
        share(total, grain(total, n_tokens), [&](int panel) {
            each_tile(n_tokens, [&](auto size, int token) {
                constexpr int T = size.value;
                v16 g[1][T], u[1][T];
                multiply_tile(gate, panel, a, token, n_tokens, g);
                multiply_tile(up, panel, a, token, n_tokens, u);
                const v16 gb = bias(gate_bias, panel), ub = bias(up_bias, panel);
                for (int t = 0; t < T; t++)
                    store(e.hidden + size_t(token + t) * stride + panel * LANES,
                          activate(config.activation, g[0][t] + gb) * (u[0][t] + ub));
            });
        });
    }

    int grain(int total, int n_tokens) const {
        const int share = total / (8 * e.team.size);
        return n_tokens > DECODE || share < 1 ? 1 : share;
    }

    static INLINE v16 bias(const float* b, int panel) { return b ? load(b + panel * LANES) : v16{}; }

    const float* normed(const float* x, const float* weight, const float* offset, float* out) const {
        const int C = config.d_model, whole = C / LANES * LANES;
        float mean = 0;
        if (!config.rms) {
            v16 total = {};
            for (int i = 0; i < whole; i += LANES) total += load(x + i);
            mean = sum(total);
            for (int i = whole; i < C; i++) mean += x[i];
            mean /= float(C);
        }
        v16 squares = {};
        for (int i = 0; i < whole; i += LANES) {
            const v16 d = load(x + i) - mean;
            squares += d * d;
        }
        float variance = sum(squares);
        for (int i = whole; i < C; i++) variance += (x[i] - mean) * (x[i] - mean);
        const float scale = 1 / sqrtf(variance / float(C) + config.eps);
        for (int i = 0; i < padded(C); i += LANES)  // what lies beyond C in x is zero
            store(out + i, (load(x + i) - mean) * scale * load(weight + i) + (offset ? load(offset + i) : v16{}));
        return out;
    }

    void embed() {
        const int C = padded(config.d_model), half = config.rope_dims / 2;
        const Matrix& table = e.matrices[config.layers * MATRICES + (config.tied ? 0 : 1)];
        share(call.n_spans, 1, [&](int i) {
            const Span& span = call.spans[i];
            for (int t = 0; t < span.count; t++) {
                const int token = span.first + t, position = span.start + t;
                float* x = e.x + size_t(token) * C;
                memset(x, 0, C * sizeof(float));
                unpack(table, call.tokens[token], x);
                if (config.learned) {
                    const float* p = other(POSITIONS) + size_t(position) * config.d_model;
                    for (int c = 0; c < config.d_model; c++) x[c] += p[c];
                }
                for (int j = 0; j < half; j++) {
                    const float angle = float(position) * other(FREQUENCIES)[j];
                    e.angles[size_t(token) * 2 * half + j] = cosf(angle) * config.rope_factor;
                    e.angles[(size_t(token) * 2 + 1) * half + j] = sinf(angle) * config.rope_factor;
                }
            }
        });
        e.team.barrier();
    }

    void rotate(float* head, int token) const {
        const int half = config.rope_dims / 2;
        const float *c = e.angles + size_t(token) * 2 * half, *s = c + half;
        for (int j = 0; j < half; j++) {
            const float a = head[j], b = head[j + half];
            head[j] = a * c[j] - b * s[j], head[j + half] = b * c[j] + a * s[j];
        }
    }

    uint8_t* keys(int row, int layer, int head) const {
        return call.cache->data + ((size_t(row) * config.layers + layer) * config.kv_heads + head) * 2 *
               call.cache->head_bytes;
    }

    // Turns q and k of each token and key/value head by their positions, and puts k and v into the cache.
    void remember(int layer) {
        const int D = config.head_dim, group = config.heads / config.kv_heads, slots = call.cache->slots;
        share(M * config.kv_heads, M > DECODE ? 4 * config.kv_heads : 1, [&](int item) {
            const int token = item / config.kv_heads, h = item % config.kv_heads;
            int i = 0;
            while (token >= call.spans[i].first + call.spans[i].count) i++;
            const int slot = call.spans[i].start + token - call.spans[i].first;
            float* k = e.k + size_t(token) * padded(config.kv_heads * D) + h * D;
            const float* v = e.v + size_t(token) * padded(config.kv_heads * D) + h * D;
            float* q = e.q + size_t(token) * padded(config.heads * D) + h * group * D;
            if (config.rope_dims) {
                rotate(k, token);
                for (int g = 0; g < group; g++) rotate(q + g * D, token);
            }
            uint8_t* to = keys(call.spans[i].row, layer, h);
            for (int d = 0; d < D; d++) {
                put_number(to, slot, D, d, k[d]);
                put_number(to + call.cache->head_bytes, d, slots, slot, v[d]);
            }
        });
        e.team.barrier();
    }

    // Into panels of 16 rows of `steps` steps.
    INLINE void put_number(uint8_t* to, int row, int steps, int step, float x) const {
        const int lane = row % LANES;
        if (call.cache->narrow) {
            const uint16_t bits = uint16_t(to_bf16(x));
            memcpy(to + row / LANES * InBF16::bytes(steps) + size_t(step / 2) * 64 + lane * 4 + step % 2 * 2, &bits, 2);
        } else {
            memcpy(to + row / LANES * InF32::bytes(steps) + size_t(step) * 64 + lane * 4, &x, 4);
        }
    }

    // Items of attention are tiles of a key/value head's queries: (token, query head of its group) one after the other.
    void attend(int layer) {
        const int group = config.heads / config.kv_heads;
        int total = 0;
        for (int i = 0; i < call.n_spans; i++)
            total += config.kv_heads * ((call.spans[i].count * group + TILE - 1) / TILE);
        share(total, 1, [&](int item) {
            item = total - 1 - item;  // the last tokens see most, so they come first
            int i = 0;
            for (int tiles;; i++, item -= tiles) {
                tiles = config.kv_heads * ((call.spans[i].count * group + TILE - 1) / TILE);
                if (item < tiles) break;
            }
            const int h = item % config.kv_heads, first = item / config.kv_heads * TILE;
            const int left = call.spans[i].count * group - first;
            each_tile(left < TILE ? left : TILE, [&](auto size, int query) {
                if (!call.cache->narrow)
                    attend_tile<InF32, size.value, false>(call.spans[i], layer, h, first + query);
                else if (BF16_DOT && M > DECODE)
                    attend_tile<InBF16, size.value, BF16_DOT>(call.spans[i], layer, h, first + query);
                else
                    attend_tile<InBF16, size.value, false>(call.spans[i], layer, h, first + query);
            });
        });
        e.team.barrier();
    }

    // DOT: queries and weights in bfloat16 too.
    template <class In, int T, bool DOT>
    void attend_tile(const Span& span, int layer, int h, int first) {
        const int D = config.head_dim, wide = padded(D), group = config.heads / config.kv_heads;
        const size_t stride = padded(config.heads * D), value_stride = In::bytes(call.cache->slots);
        const size_t key_stride = In::bytes(D);
        uint16_t* pairs = reinterpret_cast<uint16_t*>(own.queries);
        const uint8_t *k = keys(span.row, layer, h), *v = k + call.cache->head_bytes;
        const float scale = 1 / sqrtf(float(D));
        size_t place[T];
        int seen[T];
        float highest[T], total[T];
        UNROLL for (int t = 0; t < T; t++) {
            const int token = (first + t) / group, head = h * group + (first + t) % group;
            place[t] = (span.first + token) * stride + head * D;
            seen[t] = span.start + token + 1;
            highest[t] = -INFINITY, total[t] = 0;
            for (int d = 0; d < D; d++) {
                const float q = e.q[place[t] + d] * scale;
                if (DOT)
                    pairs[(d / 2 * T + t) * 2 + d % 2] = uint16_t(to_bf16(q));
                else
                    own.queries[d * T + t] = q;
            }
            if (DOT && D % 2) pairs[(D / 2 * T + t) * 2 + 1] = 0;
        }
        memset(own.out, 0, sizeof(float) * T * wide);
        for (int from = 0; from < seen[T - 1]; from += SLOTS) {
            const int n = seen[T - 1] - from < SLOTS ? seen[T - 1] - from : SLOTS, panels = (n + LANES - 1) / LANES;
            const uint8_t* block = k + from / LANES * key_stride;
            by_panels(panels, [&](auto count, int panel) {
                constexpr int P = count.value;
                v16 c[P][T];
                score<In, P, T, T, 1, DOT>(block + panel * key_stride, key_stride, own.queries, D, c);
                for (int p = 0; p < P; p++)
                    for (int t = 0; t < T; t++) store(own.scores + t * SLOTS + (panel + p) * LANES, c[p][t]);
            });
            for (int t = 0; t < T; t++)
                soften<DOT>(own.scores + t * SLOTS, seen[t] - from, panels, highest[t], total[t], own.out + t * wide, wide);
            by_panels(wide / LANES, [&](auto count, int panel) {
                constexpr int P = count.value;
                v16 c[P][T];
                const uint8_t* at = v + panel * value_stride + In::bytes(from);
                score<In, P, T, 1, SLOTS, DOT>(at, value_stride, own.scores, n, c);
                for (int p = 0; p < P; p++)
                    for (int t = 0; t < T; t++) {
                        float* out = own.out + t * wide + (panel + p) * LANES;
                        store(out, load(out) + c[p][t]);
                    }
            });
        }
        for (int t = 0; t < T; t++)
            for (int d = 0; d < D; d++) e.attended[place[t] + d] = own.out[t * wide + d] / total[t];
    }

    template <class In, int P, int T, int KS, int TS, bool DOT>
    static INLINE void score(const uint8_t* w, size_t stride, const float* x, int cols, v16 (&c)[P][T]) {
#if defined(__AVX512BF16__)
        if (DOT) return multiply_bf16<P, T, KS, TS>(w, stride, reinterpret_cast<const uint32_t*>(x), (cols + 1) / 2, c);
#endif
        multiply<In, P, T, KS, TS>(w, stride, x, cols, c);
    }

    // Scores of a block of slots -> weights relative to the highest score so far; what was summed before is scaled.
    template <bool DOT>
    static void soften(float* scores, int seen, int panels, float& highest, float& total, float* out, int wide) {
        v16 most = splat(highest);
        const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int i = 0; i < panels; i++) {
            const v16 s = lane + i * LANES < splat_int(seen) ? load(scores + i * LANES) : splat(-INFINITY);
            store(scores + i * LANES, s);
            most = larger(s, most);
        }
        const float high = fold(most, [](v16 a, v16 b) { return larger(a, b); });
        v16 sums = {};
        for (int i = 0; i < panels; i++) {
            const v16 weight = exponential(load(scores + i * LANES) - high);
            if (DOT)  // half as long, so nothing that is still to be read is overwritten
                *reinterpret_cast<h16u*>(reinterpret_cast<uint16_t*>(scores) + i * LANES) = narrowed(weight);
            else
                store(scores + i * LANES, weight);
            sums += weight;
        }
        const v16 keep = exponential(splat(highest - high));
        if (keep[0] != 1)
            for (int d = 0; d < wide; d += LANES) store(out + d, load(out + d) * keep);
        total = total * keep[0] + sum(sums);
        highest = high;
    }

    template <class Work>
    static INLINE void by_panels(int panels, Work work) {
        int panel = 0;
        for (; panel + PANELS <= panels; panel += PANELS) work(std::integral_constant<int, PANELS>{}, panel);
        if (panel < panels) work(std::integral_constant<int, 1>{}, panel);
    }

    void attention(int layer) {
        const int C = padded(config.d_model), q_width = padded(config.heads * config.head_dim);
        const int kv_width = padded(config.kv_heads * config.head_dim);
        const Matrix* qkv[] = {matrix(layer, Q), matrix(layer, K), matrix(layer, V)};
        const Acts& a = prepare(M, config.d_model, forms(qkv, 3, M), [&](int token, float* row) {
            return normed(e.x + size_t(token) * C, vector(layer, NORM1), vector(layer, NORM1_B), row);
        });
        float* to[] = {e.q, e.k, e.v};
        const int width[] = {q_width, kv_width, kv_width};
        const float* biases[] = {vector(layer, Q_B), vector(layer, K_B), vector(layer, V_B)};
        products(qkv, 3, a, M, [&](int which, int panel, int token, auto& c) {
            each(c, [&](int p, int t, v16 y) {
                float* at = to[which] + size_t(token + t) * width[which] + (panel + p) * LANES;
                store(at, y + bias(biases[which], panel + p));
            });
        });
        e.team.barrier();
        remember(layer);
        attend(layer);
    }

    void mlp_inner(int layer) {
        const int C = padded(config.d_model), wide = padded(config.d_ff);
        const Matrix* both[] = {matrix(layer, UP), matrix(layer, GATE)};
        const Acts& a = prepare(M, config.d_model, forms(both, config.gated ? 2 : 1, M), [&](int token, float* row) {
            return normed(e.x + size_t(token) * C, vector(layer, NORM2), vector(layer, NORM2_B), row);
        });
        const float* up_bias = vector(layer, UP_B);
        if (config.gated)
            gated(*both[1], *both[0], a, M, vector(layer, GATE_B), up_bias);
        else
            products(both, 1, a, M, [&](int, int panel, int token, auto& c) {
                each(c, [&](int p, int t, v16 y) {
                    store(e.hidden + size_t(token + t) * wide + (panel + p) * LANES,
                          activate(config.activation, y + bias(up_bias, panel + p)));
                });
            });
        e.team.barrier();
    }

    // x += matrix times what one of the branches ended in.
    void add_branch(int layer, int which, const float* from, int bias_of) {
        const int C = padded(config.d_model);
        const Matrix* m = matrix(layer, which);
        const float* offset = vector(layer, bias_of);
        const Acts& a = prepare(M, m->cols, forms(&m, 1, M),
                                [&](int token, float*) { return from + size_t(token) * padded(m->cols); });
        products(&m, 1, a, M, [&](int, int panel, int token, auto& c) {
            each(c, [&](int p, int t, v16 y) {
                float* x = e.x + size_t(token + t) * C + (panel + p) * LANES;
                store(x, load(x) + (y + bias(offset, panel + p)));
            });
        });
        e.team.barrier();
    }

    void head() {
        const int C = padded(config.d_model), n = call.n_wanted, V = config.vocab;
        const Matrix* m = &e.matrices[config.layers * MATRICES];
        if (!n) return;
        const Acts& a = prepare(n, config.d_model, forms(&m, 1, n), [&](int i, float* row) {
            return normed(e.x + size_t(call.wanted[i]) * C, other(NORM), other(NORM_B), row);
        });
        products(&m, 1, a, n, [&](int, int panel, int i, auto& c) {
            each(c, [&](int p, int t, v16 y) {
                const int row = (panel + p) * LANES, lanes = V - row < LANES ? V - row : LANES;
                float* at = call.logits + size_t(i + t) * V + row;
                if (lanes == LANES)
                    store(at, y);
                else
                    memcpy(at, &y, lanes * sizeof(float));
            });
        });
    }

    template <int P, int T, class Work>
    static INLINE void each(v16 (&c)[P][T], Work work) {
        for (int t = 0; t < T; t++)
            for (int p = 0; p < P; p++) work(p, t, c[p][t]);
    }

    static int forms(const Matrix* const* matrices, int count, int n_tokens) {
        int all = 0;
        for (int i = 0; i < count; i++) all |= form(*matrices[i], n_tokens);
        return all;
    }

    void run() {
        embed();
        for (int layer = 0; layer < config.layers; layer++) {
            attention(layer);
            if (config.parallel) mlp_inner(layer);
            add_branch(layer, OUT, e.attended, OUT_B);
            if (!config.parallel) mlp_inner(layer);
            add_branch(layer, DOWN, e.hidden, DOWN_B);
        }
        head();
    }

    static void unpack(const Matrix& m, int row, float* out) {
        const uint8_t* w = m.panel(row / LANES);
        const int lane = row % LANES;
        for (int k = 0; k < m.cols; k++) {
            switch (m.type) {
                case F32: out[k] = InF32::step(w, k)[lane]; break;
                case F16: out[k] = InF16::step(w, k)[lane]; break;
                case BF16: out[k] = InBF16::step(w, k)[lane]; break;
                case Q8: out[k] = unpack_int<InQ8>(w, k, lane); break;
                case Q4: out[k] = unpack_int<InQ4>(w, k, lane); break;
                default: out[k] = unpack_int<InQ4M>(w, k, lane);
            }
        }
    }

    template <class In>
    static float unpack_int(const uint8_t* w, int k, int lane) {
        w += size_t(k / GROUP) * In::BYTES;
        const int32_t q = In::quad(w, k % GROUP / 4)[lane] >> k % 4 * 8 & 255;
        return float(q - In::OFFSET) * load_half(w)[lane] + (In::MINIMUM ? load_half(w + 32)[lane] : 0);
    }
};

// ---- packing: 16 rows of a source into one panel ----

struct Packer {
    const Packing& work;
    float* rows;  // [cols, padded to groups][16]

    float number(const uint8_t* at) const {
        if (work.kind == FROM_F32) return load_number<float>(at);
        const uint16_t bits = load_number<uint16_t>(at);
        if (work.kind == FROM_BF16) {
            const uint32_t wide = uint32_t(bits) << 16;
            return load_number<float>(reinterpret_cast<const uint8_t*>(&wide));
        }
        uint16_t many[LANES] = {bits};
        return load_half(many)[0];
    }

    template <class Number>
    static Number load_number(const uint8_t* at) {
        Number n;
        memcpy(&n, at, sizeof n);
        return n;
    }

    void panel(int index) const {
        const Matrix& m = *work.matrix;
        const int first = index * LANES, n = work.rows - first < LANES ? work.rows - first : LANES;
        const uint8_t* from = work.source + first * work.row_stride;
        uint8_t* to = m.data + size_t(work.first_panel + index) * m.stride();
        if (work.kind >= FROM_Q8_0) return blocks(from, n, to);
        const int wide = (m.cols + GROUP - 1) / GROUP * GROUP, size = work.kind == FROM_F32 ? 4 : 2;
        if (n < LANES || wide > m.cols) memset(rows, 0, size_t(wide) * LANES * 4);
        const bool across = work.row_stride == size && n == LANES;
        if (across && work.kind == FROM_F32) {
            for (int k = 0; k < m.cols; k++) store(rows + k * LANES, load(from + k * work.col_stride));
        } else if (across && work.kind == FROM_F16) {
            for (int k = 0; k < m.cols; k++) store(rows + k * LANES, load_half(from + k * work.col_stride));
        } else {
            for (int begin = 0; begin < m.cols; begin += 128)  // a part of the panel that stays in the cache
                for (int lane = 0; lane < n; lane++)
                    for (int k = begin; k < m.cols && k < begin + 128; k++)
                        rows[k * LANES + lane] = number(from + lane * work.row_stride + k * work.col_stride);
        }
        encode(m, to);
    }

    void encode(const Matrix& m, uint8_t* to) const {
        if (m.type == F32) {
            memcpy(to, rows, size_t(m.cols) * 64);
        } else if (m.type == F16) {
            for (int k = 0; k < m.cols; k++) *reinterpret_cast<h16u*>(to + k * 32) = to_half(load(rows + k * LANES));
        } else if (m.type == BF16) {
            for (int k = 0; k < m.cols; k += 2) {
                uint32_t pairs[LANES];
                for (int lane = 0; lane < LANES; lane++) {
                    const uint32_t high = k + 1 < m.cols ? Worker::to_bf16(rows[(k + 1) * LANES + lane]) : 0;
                    pairs[lane] = Worker::to_bf16(rows[k * LANES + lane]) | high << 16;
                }
                memcpy(to + k / 2 * 64, pairs, 64);
            }
        } else {
            const int groups = (m.cols + GROUP - 1) / GROUP, bytes = m.type == Q8 ? 544 : m.type == Q4 ? 288 : 320;
            for (int g = 0; g < groups; g++) group(m.type, rows + g * GROUP * LANES, to + g * bytes);
        }
    }

    // 32 steps of 16 rows -> one group of each row. Levels of q are whole numbers from 0 on.
    static void group(int type, const float* x, uint8_t* to) {
        v16 scale, minimum = {};
        float offset = 0, levels = 15;
        if (type == Q8) {
            v16 most = {};
            for (int k = 0; k < GROUP; k++) most = larger(absolute(load(x + k * LANES)), most);
            scale = most / 127.0f, offset = 128, levels = 255;
        } else if (type == Q4) {
            scale = best_scale(x), offset = 8;
        } else {
            v16 low = load(x), high = low;
            for (int k = 1; k < GROUP; k++)
                low = smaller(low, load(x + k * LANES)), high = larger(high, load(x + k * LANES));
            scale = (high - low) / 15.0f, minimum = low;
        }
        *reinterpret_cast<h16u*>(to) = to_half(scale);
        if (type == Q4M) *reinterpret_cast<h16u*>(to + 32) = to_half(minimum);
        scale = load_half(to);  // as it will be read
        minimum = type == Q4M ? load_half(to + 32) : minimum;
        const v16 inverse = scale == splat(0) ? v16{} : 1.0f / scale;
        uint8_t* quads = to + (type == Q4M ? 64 : 32);
        const int half = type == Q8 ? 32 : 16;  // steps that have bytes of their own; the others share these
        memset(quads, 0, size_t(half) * LANES);
        for (int k = 0; k < GROUP; k++) {
            const i16 q = quantised(load(x + k * LANES) - minimum, inverse, offset, levels);
            uint8_t* at = quads + k % half / 4 * 64 + k % 4;
            for (int lane = 0; lane < LANES; lane++) at[lane * 4] |= uint8_t(q[lane] << (k >= half ? 4 : 0));
        }
    }

    static INLINE i16 quantised(v16 x, v16 inverse, float offset, float levels) {
        const v16 q = smaller(larger(x * inverse + offset, v16{}), splat(levels));
        return (i16)(q + 12582912.0f) - 0x4b400000;
    }

    // Scale of (q - 8) * scale with the least squared error among some around the one that keeps the largest number:
    // for given q the best scale is <q, x> / <q, q>, and what it explains of x is <q, x>^2 / <q, q>.
    static v16 best_scale(const float* x) {
        v16 most = {}, best = {}, explained = splat(-1);
        for (int k = 0; k < GROUP; k++) {
            const v16 y = load(x + k * LANES);
            most = absolute(y) > absolute(most) ? y : most;
        }
        for (int step = -5; step <= 5; step++) {
            const v16 inverse = most == splat(0) ? v16{} : (-8 + 0.2f * float(step)) / most;
            v16 qx = {}, qq = {};
            for (int k = 0; k < GROUP; k++) {
                const v16 y = load(x + k * LANES), q = to_float(quantised(y, inverse, 8, 15)) - 8.0f;
                qx += q * y, qq += q * q;
            }
            const v16 scale = qq > splat(0) ? qx / qq : v16{};
            const i16 better = scale * qx > explained;
            explained = better ? scale * qx : explained, best = better ? scale : best;
        }
        return best;
    }

    // ggml's blocks keep their bits: only their 4-byte words change places, and signed bytes become unsigned.
    void blocks(const uint8_t* from, int n, uint8_t* to) const {
        const Matrix& m = *work.matrix;
        const int groups = m.cols / GROUP, words = work.kind == FROM_Q8_0 ? 8 : 4;
        const int header = work.kind == FROM_Q4_1 ? 4 : 2;
        for (int g = 0; g < groups; g++) {
            uint8_t* quads = to + header * LANES;
            memset(to, 0, size_t(header) * LANES + size_t(words) * 64);
            for (int lane = 0; lane < n; lane++) {
                const uint8_t* block = from + lane * work.row_stride + size_t(g) * (header + 4 * words);
                memcpy(to + 2 * lane, block, 2);
                if (header == 4) memcpy(to + 32 + 2 * lane, block + 2, 2);
                for (int j = 0; j < words; j++) {
                    const uint32_t flip = work.kind == FROM_Q8_0 ? 0x80808080 : 0;
                    const uint32_t word = load_number<uint32_t>(block + header + 4 * j) ^ flip;
                    memcpy(quads + 64 * j + 4 * lane, &word, 4);
                }
            }
            to = quads + size_t(words) * 64;
        }
    }
};

static void forward(Engine& e, void* call, int thread) { Worker(e, *static_cast<Call*>(call), thread).run(); }

static void pack(Engine& e, void* argument, int thread) {
    const Packing& work = *static_cast<Packing*>(argument);
    const Packer packer{work, e.own[thread].panel};
    const int total = (work.rows + LANES - 1) / LANES;
    for (int first; (first = e.team.take(4)) < total;)
        for (int i = first; i < total && i < first + 4; i++) packer.panel(i);
}

static void unpack(const Matrix& m, int row, float* out) { Worker::unpack(m, row, out); }

}  // namespace LEVEL

#define NAME_OF(level) #level
#define NAME(level) NAME_OF(level)
#define TABLE_OF(level) level##_level
#define TABLE(level) TABLE_OF(level)
extern const Level TABLE(LEVEL);
const Level TABLE(LEVEL) = {NAME(LEVEL), LEVEL::forward, LEVEL::pack, LEVEL::unpack};

}  // namespace loadstone
