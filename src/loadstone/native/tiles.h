// AMX: one instruction multiplies tiles, of 16 rows of 64 bytes. A panel's steps are such rows as they lie; tokens lie
// in blocks of 16, a row each, step by step: 16 pairs of bfloat16, or the 32 int8 of a group.
#pragma once
#include "products.h"

namespace loadstone::LEVEL {

constexpr int BLOCK = 16;  // tokens
static_assert(BLOCK <= WIDEST && TILE <= WIDEST && SLOTS % GROUP == 0, "what attention has room for");

// Which of these forms a call's tokens take in blocks.
static ALWAYS int in_blocks(int forms, int cols, int n_tokens) {
    return !AMX || n_tokens <= DECODE ? 0 : forms & (cols % GROUP ? AS_I8 : AS_I8 | AS_BF16);
}

static ALWAYS void put_in_block(Acts& a, const float* row, size_t token, int cols, int forms) {
    const size_t first = token / BLOCK * BLOCK, t = token % BLOCK;
    int32_t* to = a.bf16 + first * size_t(cols / 2) + t * LANES;
    for (int k = 0; k < cols && forms & AS_BF16; k += GROUP, to += BLOCK * LANES)
        put_bf16(to, row + k, LANES), put_bf16(to + LANES / 2, row + k + LANES, LANES);
    if (forms & AS_I8) quantise(a, row, first, BLOCK, int(t), cols, true);
}

// A panel's whole numbers, signed: what has an offset, without it.
template <class In>
static ALWAYS void to_signed(const uint8_t* w, int groups, uint8_t* out) {
    for (int g = 0; g < groups; g++, w += In::BYTES)
        UNROLL for (int j = 0; j < 8; j++, out += 64) store(out, (v16)((b64)In::quad(w, j) - uint8_t(In::OFFSET)));
}

// Where tokens lie, and their products: bytes from a token to the next, from a step of 32 numbers to the next, and from
// a block; floats from a token's sums to the next's, and from a panel's.
struct Layout { int row, step; size_t block; int sums, panel; };

#if defined(__AMX_TILE__)

// What lies there is what tiles will read: the compiler does not know that their instructions do.
static ALWAYS void in_memory(const void* p) { __asm__ volatile("" ::"r"(p) : "memory"); }

// Four tiles of sums, two of tokens, with rows of so many bytes, and two of weights. 0: none, so nobody saves them.
static ALWAYS void shape_tiles(int bytes) {
    struct alignas(64) { uint8_t palette, start, zeros[14]; uint16_t width[16]; uint8_t rows[16]; } shape = {};
    shape.palette = bytes > 0;
    for (int i = 0; i < 8 && bytes; i++) {
        shape.width[i] = uint16_t(i / 2 == 2 ? bytes : 64);
        shape.rows[i] = uint8_t(i / 2 == 3 ? bytes / 4 : BLOCK);
    }
    in_memory(&shape);
    _tile_loadconfig(&shape);
    in_memory(&shape);
}

// c = (or, ADD, +=) P panels times B blocks.
template <int P, int B, bool ADD>
static ALWAYS void multiply_tiles(const uint8_t* w, size_t stride, const void* tokens, Layout at, int steps, float* c) {
    const auto* x = static_cast<const uint8_t*>(tokens);
    in_memory(x);
    const int row = at.sums * int(sizeof(float));
    static_assert(!ADD || B == 1);
    if (ADD) {
        _tile_loadd(0, c, row);
        if (P > 1) _tile_loadd(2, c + at.panel, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < steps; k++, w += 1024, x += at.step) {
        _tile_loadd(4, x, at.row);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (P > 1) {
            _tile_loadd(7, w + stride, 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (B > 1) {
            _tile_loadd(5, x + at.block, at.row);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (B > 1 && P > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    if (B > 1) _tile_stored(1, c + BLOCK * at.sums, row);
    if (P > 1) _tile_stored(2, c + at.panel, row);
    if (B > 1 && P > 1) _tile_stored(3, c + BLOCK * at.sums + at.panel, row);
}

// c = a panel, of which `bytes` holds the numbers, times a block: the sums of `multiply_groups`, to the bit.
template <class In>
static ALWAYS void multiply_group_tiles(const uint8_t* w, const uint8_t* bytes, const Acts& a, size_t first, int groups,
                                        v16 (&c)[BLOCK]) {
    const int32_t *x = a.i8 + first * 8, *sums = a.sum + first;
    const float* scale = a.scale + first;
    alignas(64) int32_t total[BLOCK][LANES];
    v16 y[BLOCK] = {};
    in_memory(bytes);
    for (int g = 0; g < groups; g++, w += In::BYTES, bytes += 512, x += 8 * BLOCK, scale += BLOCK, sums += BLOCK) {
        _tile_loadd(4, x, 32);
        _tile_loadd(6, bytes, 64);
        _tile_zero(0);
        _tile_dpbssd(0, 4, 6);
        _tile_stored(0, total, 64);
        const v16 d = In::scale(w), m = In::minimum(w);
        UNROLL for (int t = 0; t < BLOCK; t++) {
            y[t] += __builtin_convertvector(load_int(total[t]), v16) * (d * scale[t]);
            if (In::MINIMUM) y[t] += m * (scale[t] * float(sums[t]));
        }
    }
    UNROLL for (int t = 0; t < BLOCK; t++) c[t] = y[t];
}

#else  // named, never called

static ALWAYS void shape_tiles(int) {}
template <int P, int B, bool ADD>
static ALWAYS void multiply_tiles(const uint8_t*, size_t, const void*, Layout, int, float*) {}
template <class In>
static ALWAYS void multiply_group_tiles(const uint8_t*, const uint8_t*, const Acts&, size_t, int, v16 (&)[BLOCK]) {}

#endif

}  // namespace loadstone::LEVEL
