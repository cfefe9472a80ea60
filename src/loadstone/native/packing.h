// Packing: rows of an array, or of ggml's blocks, become panels of a matrix. One step: 32 numbers of 16 rows.
#pragma once
#include "products.h"

namespace loadstone::LEVEL {

struct Packer {
    const Packing& work;
    const Matrix& m;
    const bool blocks = work.kind >= FROM_Q8_0;
    const int size = work.kind == FROM_F32 ? 4 : 2;  // bytes of a number
    const int header = work.kind == FROM_Q4_1 ? 4 : 2, words = work.kind == FROM_Q8_0 ? 8 : 4;  // bytes, words of a block
    const bool across = !blocks && work.row_stride == size;  // 16 rows of a column lie together
    const int panels = (work.rows + LANES - 1) / LANES, groups = (m.cols + GROUP - 1) / GROUP;

    // A thread takes rows, or columns, that lie together in the source: some 512 KB, as its pages stay till it is done.
    const int64_t stride = across ? work.col_stride * GROUP : work.row_stride * LANES;
    const int take = 1 + int((1 << 19) / (stride > 0 ? stride : 1 << 19));  // panels or groups
    int items() const { return ((across ? groups : panels) + take - 1) / take; }

    void item(int index) const {
        const int begin = index * take, end = least(begin + take, across ? groups : panels);
        for (int panel = across ? 0 : begin; panel < (across ? panels : end); panel++)
            for (int g = across ? begin : 0; g < (across ? end : groups); g++) step(panel, g);
        if (!work.mapped) return;
        const int64_t row = blocks ? groups * (header + 4 * words) : (m.cols - 1) * work.col_stride + size;
        const int64_t whole = (work.rows - 1) * work.row_stride + row;  // and no more, as other pages may follow
        give_back(work.source + begin * stride, work.source + (end * stride < whole ? end * stride : whole));
    }

    void step(int panel, int g) const {
        const int n = least(work.rows - panel * LANES, LANES), steps = least(m.cols - g * GROUP, GROUP);
        const uint8_t* from = work.source + panel * LANES * work.row_stride;
        uint8_t* to = m.data + (size_t(work.first) / LANES + size_t(panel)) * m.stride() +
                      panel_bytes(m.type, size_t(g) * GROUP);
        if (blocks) return copy_blocks(from, g, n, to);
        alignas(64) float own[GROUP * LANES];
        float* x = m.type == F32 && steps == GROUP ? reinterpret_cast<float*>(to) : own;
        from += g * GROUP * work.col_stride;
        for (int k = 0; across && k < GROUP; k++)
            store(x + k * LANES, k < steps ? line(from + k * work.col_stride, work.row_stride, n) : v16{});
        for (int k = 0; !across && k < GROUP; k += LANES) {
            v16 y[LANES] = {};
            const uint8_t* at = from + k * work.col_stride;
            for (int lane = 0; lane < n; lane++, at += work.row_stride)
                y[lane] = line(at, work.col_stride, least(steps - k, LANES));
            exchange<8>(y), exchange<4>(y), exchange<2>(y), exchange<1>(y);
            UNROLL for (int i = 0; i < LANES; i++) store(x + (k + i) * LANES, y[i]);
        }
        if (x == own) encode(x, steps, to);
    }

    // A part of a transposition: squares of D x D that lie across from one another change places.
    template <int D>
    static ALWAYS void exchange(v16 (&x)[LANES]) {
        const i16 upper = (LANE & D) != i16{};
        UNROLL for (int i = 0; i < LANES; i++) {
            if (i & D) continue;
            const v16 a = x[i], b = x[i + D];
            x[i] = __builtin_shuffle(a, b, upper ? LANE - D + LANES : LANE);
            x[i + D] = __builtin_shuffle(a, b, upper ? LANE + LANES : LANE + D);
        }
    }

    // Up to 16 numbers of the source; the others are zeros.
    ALWAYS v16 line(const uint8_t* at, int64_t stride, int count) const {
        if (stride == size && count == LANES) return widened(at);
        uint8_t some[64] = {};
        for (int i = 0; i < count; i++) memcpy(some + i * size, at + i * stride, size_t(size));
        return widened(some);
    }

    ALWAYS v16 widened(const uint8_t* at) const {
        if (work.kind == FROM_F32) return load(at);
        if (work.kind == FROM_F16) return load_half(at);
        return (v16)(__builtin_convertvector(*reinterpret_cast<const h16u*>(at), i16) << 16);
    }

    void encode(const float* x, int steps, uint8_t* to) const {
        switch (m.type) {
            case F32: memcpy(to, x, size_t(steps) * 64); break;
            case F16:
                for (int k = 0; k < steps; k++) store_short(to + k * 32, to_half(load(x + k * LANES)));
                break;
            case BF16:
                for (int k = 0; k < steps; k += 2, x += 2 * LANES, to += 64)
                    store(to, (v16)(to_bf16(load(x)) | to_bf16(load(x + LANES)) << 16));
                break;
            case Q8: quantise_group<InQ8>(x, to); break;
            case Q4: quantise_group<InQ4>(x, to); break;
            default: quantise_group<InQ4M>(x, to);
        }
    }

    template <class In>
    static void quantise_group(const float* x, uint8_t* to) {
        v16 low = load(x), high = low;
        for (int k = 1; k < GROUP; k++)
            low = smaller(low, load(x + k * LANES)), high = larger(high, load(x + k * LANES));
        const v16 most = absolute(low) > absolute(high) ? low : high;
        const v16 scale = In::MINIMUM      ? (high - low) / float(In::LEVELS)
                          : In::WORDS == 8 ? absolute(most) / 127.0f
                                           : most / -8.0f;  // ggml's rule: 16 levels, the largest number at the end
        store_short(to, to_half(scale));
        if (In::MINIMUM) store_short(to + 32, to_half(low));
        const v16 least = In::minimum(to), read = In::scale(to);  // as they will be read
        const v16 inverse = read == v16{} ? v16{} : 1.0f / read;
        auto* quads = static_cast<uint8_t*>(memset(to + In::HEADER, 0, In::BYTES - In::HEADER));
        for (int k = 0; k < GROUP; k++) {
            const i16 q = level(load(x + k * LANES) - least, inverse, In::OFFSET, In::LEVELS);
            uint8_t* at = quads + k / 4 % In::WORDS * 64 + k % 4;  // of 8 words, 4 may be the others' high halves
            for (int lane = 0; lane < LANES; lane++) at[lane * 4] |= uint8_t(q[lane] << (k / 4 >= In::WORDS ? 4 : 0));
        }
    }

    static ALWAYS i16 level(v16 x, v16 inverse, int offset, int levels) {
        return rounded(smaller(larger(x * inverse + float(offset), v16{}), splat(float(levels))));
    }

    // ggml's blocks keep their bits: only their 4-byte words change places, and signed bytes become unsigned.
    void copy_blocks(const uint8_t* from, int g, int n, uint8_t* to) const {
        const uint32_t flip = work.kind == FROM_Q8_0 ? 0x80808080 : 0;
        memset(to, 0, size_t(header) * LANES + size_t(words) * 64);
        for (int lane = 0; lane < n; lane++) {
            const uint8_t* block = from + lane * work.row_stride + size_t(g) * size_t(header + 4 * words);
            for (int i = 0; i < header; i += 2) memcpy(to + i * LANES + 2 * lane, block + i, 2);
            for (int j = 0; j < words; j++) {
                uint32_t word;
                memcpy(&word, block + header + 4 * j, 4);
                word ^= flip;
                memcpy(to + header * LANES + 64 * j + 4 * lane, &word, 4);
            }
        }
    }
};

static void pack(Engine& e, void* argument, int) {
    const Packings& list = *static_cast<Packings*>(argument);
    const auto packer = [&](int i) { return Packer{list.works[i], e.matrices[list.works[i].slot]}; };
    int total = 0;
    for (int i = 0; i < list.count; i++) total += packer(i).items();
    share(e.team, total, 1, [&](int item) {
        const int which = part_of(item, [&](int i) { return packer(i).items(); });
        packer(which).item(item);
    });
}

}  // namespace loadstone::LEVEL
