// Products of a matrix in panels with tokens in tiles: one function, `multiply`, in one form for each way of storing
// numbers (and one more for whole numbers in groups), for P panels times T tokens.
#pragma once
#include <type_traits>

#include "vectors.h"

namespace loadstone::LEVEL {

enum Form { AS_F32 = 1, AS_BF16 = 2, AS_I8 = 4 };  // of tokens

// ---- the forms of weights ----

// Floats: how a step (or a pair of steps) of a panel and a token's number become vectors, and what a product adds.
struct Floats {
    static constexpr Form FORM = AS_F32;
    typedef float Number;
    static ALWAYS int steps(int cols) { return cols; }
    static ALWAYS v16 add(v16 sum, v16 w, v16 x) { return sum + w * x; }
};
struct InF32 : Floats { static ALWAYS v16 step(const uint8_t* w, size_t k) { return load(w + k * 64); } };
struct InF16 : Floats { static ALWAYS v16 step(const uint8_t* w, size_t k) { return load_half(w + k * 32); } };
struct InBF16 : Floats {
    static ALWAYS v16 step(const uint8_t* w, size_t k) {
        const i16 pair = load_int(w + k / 2 * 64);
        return (v16)(k & 1 ? pair & int32_t(0xffff0000) : pair << 16);
    }
};
struct Pairs {  // of bfloat16, both in the panel and in the token
    static constexpr Form FORM = AS_BF16;
    typedef pair_u Number;
    static ALWAYS int steps(int cols) { return (cols + 1) / 2; }
    static ALWAYS i16 step(const uint8_t* w, size_t k) { return load_int(w + k * 64); }
    static ALWAYS v16 add(v16 sum, i16 w, i16 x) { return dot_bf16(sum, w, x); }
};

// Groups of 32 whole numbers from 0 to LEVELS, OFFSET too large; a scale, and perhaps a minimum, in the HEADER.
template <Type TYPE, int OFFSET_, int LEVELS_, bool MINIMUM_>
struct Groups {
    static constexpr Form FORM = AS_I8;
    static constexpr size_t BYTES = panel_bytes(TYPE, GROUP), HEADER = MINIMUM_ ? 64 : 32;
    static constexpr int OFFSET = OFFSET_, LEVELS = LEVELS_, WORDS = LEVELS > 15 ? 8 : 4;
    static constexpr bool MINIMUM = MINIMUM_;
    static ALWAYS i16 quad(const uint8_t* group, int j) {  // 4 steps, a byte each
        const i16 words = load_int(group + HEADER + 64 * (j % WORDS));
        return WORDS == 8 ? words : (j < 4 ? words : words >> 4) & 0x0f0f0f0f;
    }
    static ALWAYS v16 scale(const uint8_t* group) { return load_half(group); }
    static ALWAYS v16 minimum(const uint8_t* group) { return MINIMUM ? load_half(group + 32) : v16{}; }
};
typedef Groups<Q8, 128, 255, false> InQ8;
typedef Groups<Q4, 8, 15, false> InQ4;
typedef Groups<Q4M, 0, 15, true> InQ4M;

template <class Work>
static ALWAYS void by_type(int32_t type, Work work) {
    switch (type) {
        case F32: return work(InF32{});
        case F16: return work(InF16{});
        case BF16: return work(InBF16{});
        case Q8: return work(InQ8{});
        case Q4: return work(InQ4{});
        default: return work(InQ4M{});
    }
}

// One row, as products see it.
static void unpack(const Matrix& m, int row, float* out) {
    const uint8_t* w = m.panel(row / LANES);
    const int lane = row % LANES;
    by_type(m.type, [&](auto in) {
        typedef decltype(in) In;
        for (int k = 0; k < m.cols; k++) {
            if constexpr (In::FORM == AS_F32) {
                out[k] = In::step(w, size_t(k))[lane];
            } else {
                const uint8_t* group = w + size_t(k / GROUP) * In::BYTES;
                const int32_t q = In::quad(group, k % GROUP / 4)[lane] >> k % 4 * 8 & 255;
                out[k] = float(q - In::OFFSET) * In::scale(group)[lane] + In::minimum(group)[lane];
            }
        }
    });
}

// ---- the forms of tokens ----

// 32 numbers to whole ones of up to 127 steps; what is left of the last group is zeros.
static ALWAYS void quantise(Acts& a, const float* row, size_t token, int T, int t, int cols, bool in_block = false) {
    const int groups = (cols + GROUP - 1) / GROUP;
    for (int g = 0; g < groups; g++) {
        float last[GROUP] = {};
        const float* from = row + g * GROUP;
        if ((g + 1) * GROUP > cols) from = static_cast<float*>(memcpy(last, from, size_t(cols - g * GROUP) * 4));
        const v16 x[2] = {load(from), load(from + LANES)};
        float most = largest(larger(absolute(x[0]), absolute(x[1])));
        if (!(most <= 3.4e38f)) most = NAN;  // infinite, or no number: nor is what follows
        const float inverse = most > 0 ? 127 / most : 0;
        int32_t* to = a.i8 + (token * groups + size_t(g) * T) * 8 + (in_block ? t * 8 : t);
        i16 sums = {};
        for (int half = 0; half < 2; half++) {
            // Within 127 but for what is no number, and for groups so small that their inverse is infinite.
            const i16 q = rounded(larger(smaller(x[half] * inverse, splat(127.0f)), splat(-127.0f)));
            sums += q;
            const b16 bytes = __builtin_convertvector(q, b16);
            int32_t quads[4];
            memcpy(quads, &bytes, 16);
            UNROLL for (int i = 0; i < 4; i++) to[size_t(half * 4 + i) * size_t(in_block ? 1 : T)] = quads[i];
        }
        a.scale[token * groups + size_t(g) * T + t] = most / 127;
        a.sum[token * groups + size_t(g) * T + t] = sum(sums);
    }
}

// One token into the forms that products will read: the t-th of the tile of T tokens that begins at `token`.
static ALWAYS void put_token(Acts& a, const float* row, size_t token, int T, int t, int cols, int forms) {
    if (forms & AS_F32) {
        float* to = a.f32 + token * cols + t;
        for (int k = 0; k < cols; k++) to[size_t(k) * T] = row[k];
    }
    if (forms & AS_BF16) {
        const int pairs = Pairs::steps(cols);
        int32_t* to = a.bf16 + token * pairs + t;
        for (int i = 0; i < pairs; i += LANES / 2) {
            int32_t some[LANES / 2];
            put_bf16(some, row + 2 * i, least(cols - 2 * i, LANES));
            for (int j = 0; j < least(pairs - i, LANES / 2); j++) to[size_t(i + j) * T] = some[j];
        }
    }
    if (forms & AS_I8) quantise(a, row, token, T, t, cols);
}

// ---- products ----

// c[p][t] = sum over k of panel p's step k times x[k * KS + t * TS]; a lone one as so many SUMS, added at the end.
template <class In, int P, int T, int KS, int TS, int SUMS = 1>
static ALWAYS void multiply(const uint8_t* w, size_t stride, const typename In::Number* x, int steps, v16 (&c)[P][T]) {
    static_assert(SUMS == 1 || P * T == 1);
    v16 total[SUMS][P][T] = {};
    const auto step = [&](v16(&sums)[P][T], int k) {
        decltype(In::step(w, 0)) wk[P];
        UNROLL for (int p = 0; p < P; p++) wk[p] = In::step(w + p * stride, size_t(k));
        UNROLL for (int t = 0; t < T; t++) {
            const auto xk = splat(x[size_t(k) * KS + t * TS]);
            UNROLL for (int p = 0; p < P; p++) sums[p][t] = In::add(sums[p][t], wk[p], xk);
        }
    };
    int k = 0;
    for (; k + SUMS <= steps; k += SUMS) UNROLL for (int i = 0; i < SUMS; i++) step(total[i], k + i);
    for (; k < steps; k++) step(total[0], k);
    UNROLL for (int i = 1; i < SUMS; i++) total[0][0][0] += total[i][0][0];
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int t = 0; t < T; t++) c[p][t] = total[0][p][t];
}

// The same where an only sum, which would wait for itself at each step, may be four; not in float32, where memory is
// slower still.
template <class In, int P, int T, int KS, int TS>
static ALWAYS void multiply_lone(const uint8_t* w, size_t stride, const typename In::Number* x, int steps,
                                 bool may, v16 (&c)[P][T]) {
    if constexpr (P * T == 1 && !std::is_same_v<In, InF32>)
        if (may) return multiply<In, P, T, KS, TS, 4>(w, stride, x, steps, c);
    multiply<In, P, T, KS, TS>(w, stride, x, steps, c);
}

// The same with groups of integers, exact within a group. Registers hold the integers of one group, memory c.
template <class In, int P, int T>
static ALWAYS void multiply_groups(const uint8_t* w, size_t stride, const Acts& a, size_t first, size_t groups,
                                   v16 (&c)[P][T]) {
    const int32_t *x = a.i8 + first * 8, *sums = a.sum + first;
    const float* scale = a.scale + first;
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int t = 0; t < T; t++) c[p][t] = v16{};
    for (size_t g = 0; g < groups; g++, w += In::BYTES, x += 8 * T, scale += T, sums += T) {
        i16 total[P][T];
        UNROLL for (int t = 0; t < T; t++) {
            const i16 start = In::OFFSET ? splat(-In::OFFSET * sums[t]) : i16{};
            UNROLL for (int p = 0; p < P; p++) total[p][t] = start;
        }
        UNROLL for (int j = 0; j < 8; j++) {
            i16 wj[P];
            UNROLL for (int p = 0; p < P; p++) wj[p] = In::quad(w + p * stride, j);
            UNROLL for (int t = 0; t < T; t++) {
                const i16 xj = splat(x[j * T + t]);
                UNROLL for (int p = 0; p < P; p++) total[p][t] = dot(total[p][t], wj[p], xj);
            }
        }
        if (T > 1) __asm__ volatile("" ::: "memory");  // c is read from here on, and not kept in registers before
        UNROLL for (int p = 0; p < P; p++) {
            const v16 d = In::scale(w + p * stride), m = In::minimum(w + p * stride);
            UNROLL for (int t = 0; t < T; t++) {
                v16 y = c[p][t] + __builtin_convertvector(total[p][t], v16) * (d * scale[t]);
                if (In::MINIMUM) y += m * (scale[t] * float(sums[t]));
                c[p][t] = y;
            }
        }
    }
}

// Which form of the tokens products with this matrix read.
static ALWAYS int form(const Matrix& m, int n_tokens) {
    if (m.type == BF16 && BF16_DOT && n_tokens > DECODE) return AS_BF16;
    return m.type == F32 || m.type == F16 || m.type == BF16 ? AS_F32 : AS_I8;
}

template <int P, int T>
static void multiply_tile(const Matrix& m, int panel, const Acts& a, size_t token, int n_tokens, v16 (&c)[P][T]) {
    if constexpr (P > 1 && T == 1) {  // memory is the limit, so one stream of it
        for (int p = 0; p < P; p++) multiply_tile<1, T>(m, panel + p, a, token, n_tokens, *(v16(*)[1][T])c[p]);
        return;
    }
    const uint8_t* w = m.panel(panel);
    const size_t stride = m.stride(), cols = size_t(m.cols), groups = (cols + GROUP - 1) / GROUP;
    if (form(m, n_tokens) == AS_BF16) {
        const int pairs = Pairs::steps(m.cols);
        return multiply<Pairs, P, T, T, 1>(w, stride, a.bf16 + token * size_t(pairs), pairs, c);
    }
    by_type(m.type, [&](auto in) {
        typedef decltype(in) In;
        if constexpr (In::FORM != AS_F32) {
            multiply_groups<In, P, T>(w, stride, a, token * groups, groups, c);
        } else {
            multiply_lone<In, P, T, T, 1>(w, stride, a.f32 + token * cols, m.cols, n_tokens == 1, c);
        }
    });
}

// Cuts 0 ... n - 1 into runs of the given sizes, as many of the first as there is room for, then of the next. Calls
// work(size, first); `size` is a type, whose value is the run's length.
template <int... SIZES, class Work>
static ALWAYS void in_runs(int n, Work work) {
    int first = 0;
    const auto runs = [&](auto size) {
        for (; n - first >= size.value; first += size.value) work(size, first);
    };
    (runs(std::integral_constant<int, SIZES>{}), ...);
}

template <class Work>
static ALWAYS void in_tiles(int n_tokens, Work work) {
    in_runs<TILE, 4, 2, 1>(n_tokens, work);
}

}  // namespace loadstone::LEVEL
