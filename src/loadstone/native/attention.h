// Attention: the cache's keys lie in panels of 16 slots, its values in panels of 16 elements, so that both its products
// are as any other. Slots are looked at in blocks, with a softmax that goes on from one to the next.
#pragma once
#include "worker.h"

namespace loadstone::LEVEL {

struct Attention : Worker {
    using Worker::Worker;
    const int D = config.head_dim, group = config.heads / config.kv_heads;
    const bool narrow = call.cache->type == BF16, blocks = narrow && in_blocks(AS_BF16, D, M);
    const int queries = blocks ? BLOCK : TILE;  // that are looked at together
    const int width = padded(config.heads * D), kv_width = padded(config.kv_heads * D);

    // Keys of one row, layer and head; the values lie behind them.
    uint8_t* keys(int row, int layer, int head) const {
        const Cache& cache = *call.cache;
        return cache.data + ((size_t(row) * config.layers + layer) * config.kv_heads + head) * 2 * cache.head_bytes;
    }

    void rotate(float* head, int token) const {
        const int half = config.rope_dims / 2;
        const float *c = e.angles + size_t(token) * 2 * half, *s = c + half;
        for (int j = 0; j < half; j++) {
            const float a = head[j], b = head[j + half];
            head[j] = a * c[j] - b * s[j], head[j + half] = b * c[j] + a * s[j];
        }
    }

    // Turns q and k of each token and key/value head by their positions, and puts k and v into the cache.
    void remember(int layer) {
        share(e.team, M * config.kv_heads, M > DECODE ? 4 * config.kv_heads : 1, [&](int item) {
            const int token = item / config.kv_heads, h = item % config.kv_heads;
            const Span at = place(token);
            float* k = e.k + size_t(token) * kv_width + h * D;
            const float* v = e.v + size_t(token) * kv_width + h * D;
            if (config.rope_dims) {
                rotate(k, token);
                for (int g = 0; g < group; g++) rotate(e.q + size_t(token) * width + (h * group + g) * D, token);
            }
            uint8_t *key = keys(at.row, layer, h), *value = key + call.cache->head_bytes;
            put_key(key, at.start, k);
            put_value(value, at.start, v);
            // Products of pairs and tiles read whole steps of slots. What an earlier text left behind this one may be
            // no number, which a weight of zero does not hide.
            if (!narrow || !BF16_DOT || M <= DECODE || (token < M - 1 && place(token + 1).row == at.row)) return;
            for (int slot = at.start + 1; slot % (blocks ? GROUP : 2); slot++) put_value(value, slot, nullptr);
        });
        e.team.barrier();
    }

    // A key is a lane of a panel, as a token is of a tile.
    void put_key(uint8_t* to, int slot, const float* k) const {
        uint8_t* panel = to + slot / LANES * panel_bytes(call.cache->type, size_t(D));
        Acts acts = {reinterpret_cast<float*>(panel), reinterpret_cast<int32_t*>(panel), nullptr, nullptr, nullptr};
        put_token(acts, k, 0, LANES, slot % LANES, D, narrow ? AS_BF16 : AS_F32);
    }

    // A value is a step of panels; zeros, if none is given.
    void put_value(uint8_t* to, int slot, const float* v) const {
        to += narrow ? slot / 2 * 64 + slot % 2 * 2 : slot * 64;
        for (int d = 0; d < D; d += LANES, to += panel_bytes(call.cache->type, size_t(call.cache->slots))) {
            const int count = least(D - d, LANES);
            uint16_t halves[LANES] = {};
            if (narrow && v) put_bf16(halves, v + d, count);
            for (int i = 0; i < count && narrow; i++) memcpy(to + i * 4, halves + i, 2);
            if (!narrow) memcpy(to, v + d, size_t(count) * sizeof(float));
        }
    }

    // Items are tiles of a key/value head's queries: (token, query head of its group) one after the other.
    void attend(int layer) {
        const auto tiles = [&](int i) {
            return config.kv_heads * ((call.spans[i].count * group + queries - 1) / queries);
        };
        int total = 0;
        for (int i = 0; i < call.n_spans; i++) total += tiles(i);
        if (blocks) shape_tiles(64);
        share(e.team, total, 1, [&](int item) {
            item = total - 1 - item;  // the last tokens see most, so they come first
            const Span& span = call.spans[part_of(item, tiles)];
            const int h = item % config.kv_heads, first = item / config.kv_heads * queries;
            const int count = least(span.count * group - first, queries);
            in_runs<AMX ? BLOCK : TILE, TILE, 4, 2, 1>(count, [&](auto size, int query) {
                constexpr int T = decltype(size)::value;
                if (call.cache->type == F32)
                    attend_tile<InF32, T>(span, layer, h, first + query);
                else if (BF16_DOT && M > DECODE)  // queries and weights in bfloat16 too
                    attend_tile<Pairs, T>(span, layer, h, first + query);
                else
                    attend_tile<InBF16, T>(span, layer, h, first + query);
            });
        });
        e.team.barrier();
    }

    template <class In, int T>
    void attend_tile(const Span& span, int layer, int h, int first) {
        constexpr int32_t TYPE = std::is_same_v<In, InF32> ? F32 : BF16;
        const int wide = padded(D), whole = blocks ? GROUP : LANES;  // slots
        const size_t key_stride = panel_bytes(TYPE, D), value_stride = panel_bytes(TYPE, call.cache->slots);
        const uint8_t *k = keys(span.row, layer, h), *v = k + call.cache->head_bytes;
        const void* asked = In::FORM == AS_BF16 ? static_cast<void*>(own.queries.bf16) : own.queries.f32;
        size_t at[T];
        int seen[T];
        float highest[T], total[T];
        UNROLL for (int t = 0; t < T; t++) {
            const int token = (first + t) / group, head = h * group + (first + t) % group;
            at[t] = size_t(span.first + token) * width + head * D;
            seen[t] = span.start + token + 1;
            highest[t] = -INFINITY, total[t] = 0;
            if (blocks)
                put_in_block(own.queries, e.q + at[t], size_t(t), D, AS_BF16);
            else
                put_token(own.queries, e.q + at[t], 0, T, t, D, In::FORM);
        }
        memset(own.out, 0, sizeof(float) * T * wide);
        for (int from = 0; from < seen[T - 1]; from += SLOTS) {
            const int n = least(seen[T - 1] - from, SLOTS), panels = (n + whole - 1) / whole * (whole / LANES);
            const uint8_t *key = k + from / LANES * key_stride, *value = v + panel_bytes(TYPE, size_t(from));
            if (blocks)
                put_tiles<false>(key, key_stride, asked, {64, 1024, 0, SLOTS, LANES}, D / GROUP, panels, own.scores);
            else
                put_sums<In, T, T, 1, false>(key, key_stride, asked, D, panels, own.scores, SLOTS);
            for (int t = 0; t < T; t++)
                soften<In>(own.scores + t * SLOTS, seen[t] - from, panels, highest[t], total[t], own.out + t * wide);
            if (blocks)
                put_tiles<true>(value, value_stride, own.scores, {4 * SLOTS, 64, 0, wide, LANES}, panels / 2,
                                wide / LANES, own.out);
            else
                put_sums<In, T, 1, SLOTS, true>(value, value_stride, own.scores, n, wide / LANES, own.out, wide);
        }
        for (int t = 0; t < T; t++)
            for (int d = 0; d < D; d++) e.attended[at[t] + d] = own.out[t * wide + d] / total[t];
    }

    // Each panel times each of T rows of x, into (or, ADD, added to) rows of `row` numbers.
    template <class In, int T, int KS, int TS, bool ADD>
    ALWAYS void put_sums(const uint8_t* w, size_t stride, const void* x, int cols, int panels, float* out,
                         int row) const {
        const auto* numbers = static_cast<const typename In::Number*>(x);
        in_runs<PANELS, 1>(panels, [&](auto count, int panel) {
            v16 c[decltype(count)::value][T];
            // Alone and among up to DECODE tokens a text is cut alike into tiles; in a longer call perhaps not.
            multiply_lone<In, decltype(count)::value, T, KS, TS>(w + panel * stride, stride, numbers, In::steps(cols),
                                                                 M <= DECODE, c);
            for (int t = 0; t < T; t++)
                for (int p = 0; p < count; p++) {
                    float* to = out + t * row + (panel + p) * LANES;
                    store(to, ADD ? load(to) + c[p][t] : c[p][t]);
                }
        });
    }

    // The same by tiles, of a block's rows.
    template <bool ADD>
    static ALWAYS void put_tiles(const uint8_t* w, size_t stride, const void* x, Layout at, int steps, int panels,
                                 float* out) {
        in_runs<2, 1>(panels, [&](auto count, int panel) {
            multiply_tiles<decltype(count)::value, 1, ADD>(w + panel * stride, stride, x, at, steps,
                                                           out + panel * LANES);
        });
    }

    // Scores of a block of slots -> weights relative to the highest score so far; what was summed before is scaled.
    template <class In>
    void soften(float* scores, int seen, int panels, float& highest, float& total, float* out) const {
        v16 most = splat(highest), sums = {};
        for (int i = 0; i < panels; i++) {
            const v16 s = LANE + i * LANES < splat(seen) ? load(scores + i * LANES) : splat(-INFINITY);
            store(scores + i * LANES, s);
            most = larger(s, most);
        }
        const float high = largest(most);
        for (int i = 0; i < panels; i++) {
            const v16 weight = exponential(load(scores + i * LANES) - high);
            if (In::FORM == AS_BF16)  // half as long, so nothing that is still to be read is overwritten
                store_short(reinterpret_cast<h16u*>(scores) + i, to_short_bf16(weight));
            else
                store(scores + i * LANES, weight);
            sums += weight;
        }
        const v16 keep = exponential(splat(highest - high));
        if (keep[0] != 1)
            for (int d = 0; d < padded(D); d += LANES) store(out + d, load(out + d) * keep);
        total = total * keep[0] + sum(sums);
        highest = high;
    }
};

}  // namespace loadstone::LEVEL
