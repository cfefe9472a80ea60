// What threads share: a call's tokens brought into the forms that products read, and the products' items.
#pragma once
#include "tiles.h"

namespace loadstone::LEVEL {

// Calls work(item) for items that no other thread has, until all are taken.
template <class Work>
static ALWAYS void share(Team& team, int total, int grain, Work work) {
    for (int first; (first = team.take(grain)) < total;)
        for (int item = first; item < least(total, first + grain); item++) work(item);
}

// Which part an item lies in, of parts of count(part) items each; the item becomes its place there.
template <class Count>
static ALWAYS int part_of(int& item, Count count) {
    int part = 0;
    for (int n; item >= (n = count(part)); part++) item -= n;
    return part;
}

struct Worker {
    Engine& e;
    const Config& config;
    const Call& call;
    Own& own;
    const int M;

    Worker(Engine& engine, const Call& of, int thread)
        : e(engine), config(engine.config), call(of), own(engine.own[thread]), M(of.n_tokens) {}

    const Matrix* matrix(int layer, int which) const { return &e.matrices[layer * MATRICES + which]; }
    const float* vector(int layer, int which) const { return e.vectors[layer * VECTORS + which]; }
    const float* other(int which) const { return e.vectors[config.layers * VECTORS + which]; }

    // One of the call's tokens, as a span of its own.
    Span place(int token) const {
        int behind = token;
        const Span& span = call.spans[part_of(behind, [&](int i) { return call.spans[i].count; })];
        return {span.row, token, 1, span.start + behind};
    }

    // Brings `n_tokens` rows of `cols` floats into the forms that products with these matrices read; fill(token, row)
    // gives a row, or a pointer to one. A single token is brought by every thread for itself. Which forms depends on
    // all the call's tokens, not on the ones at hand: the head's are the same however many logits are wanted.
    template <class Fill>
    const Acts& prepare(const Matrix* const* matrices, int count, int n_tokens, Fill fill) {
        const int cols = matrices[0]->cols;
        int forms = 0;
        for (int i = 0; i < count; i++) forms |= form(*matrices[i], M);
        const int blocks = in_blocks(forms, cols, M);
        if (n_tokens == 1 && !blocks) return put_token(own.acts, fill(0, own.row), 0, 1, 0, cols, forms), own.acts;
        share(e.team, (n_tokens + TILE - 1) / TILE, 1, [&](int item) {
            in_tiles(least(n_tokens - item * TILE, TILE), [&](auto size, int first) {
                const int token = item * TILE + first;
                for (int t = 0; t < size; t++) {
                    const float* x = fill(token + t, own.row);
                    put_token(e.acts, x, size_t(token), size, t, cols, forms & ~blocks);
                    put_in_block(e.acts, x, size_t(token + t), cols, blocks);
                }
            });
        });
        e.team.barrier();
        return e.acts;
    }

    // Calls put(which, panel, token, y) with the rows of a panel of matrix `which` times a token.
    template <class Put>
    void products(const Matrix* const* matrices, int count, const Acts& a, int n_tokens, Put put) {
        const auto items = [&](int which) { return (matrices[which]->panels() + PANELS - 1) / PANELS; };
        int total = 0;
        for (int i = 0; i < count; i++) total += items(i);
        share(e.team, total, grain(total, n_tokens), [&](int item) {
            const int which = part_of(item, items), first = item * PANELS;
            const Matrix& m = *matrices[which];
            in_runs<PANELS, 1>(least(m.panels() - first, PANELS), [&](auto panels, int panel) {
                const auto put_here = [&](int p, int token, v16 y) { put(which, first + panel + p, token, y); };
                if (in_blocks(form(m, M), m.cols, M))
                    return products_in_blocks<decltype(panels)::value>(m, first + panel, a, n_tokens, put_here);
                in_tiles(n_tokens, [&](auto size, int token) {
                    v16 c[decltype(panels)::value][decltype(size)::value];
                    multiply_tile(m, first + panel, a, size_t(token), M, c);
                    for (int t = 0; t < size; t++)
                        for (int p = 0; p < panels; p++) put_here(p, token + t, c[p][t]);
                });
            });
        });
    }

    // The same of P panels with all tokens, by tiles.
    template <int P, class Put>
    void products_in_blocks(const Matrix& m, int panel, const Acts& a, int n_tokens, Put put) {
        const auto put_block = [&](int p, int token, const v16* y) {
            for (int t = 0; t < least(BLOCK, n_tokens - token); t++) put(p, token + t, y[t]);
        };
        const int n_blocks = (n_tokens + BLOCK - 1) / BLOCK, groups = (m.cols + GROUP - 1) / GROUP;
        shape_tiles(form(m, M) == AS_BF16 ? 64 : 32);
        by_type(m.type, [&](auto in) {
            typedef decltype(in) In;
            if constexpr (In::FORM == AS_F32)  // bfloat16, of those that lie in blocks
                in_runs<2, 1>(n_blocks, [&](auto count, int block) {
                    constexpr int B = decltype(count)::value;
                    v16 y[P][B][BLOCK];
                    const size_t length = size_t(BLOCK) * size_t(m.cols);
                    multiply_tiles<P, B, false>(m.panel(panel), m.stride(), a.bf16 + size_t(block) * length / 2,
                                                {64, 1024, length * 2, LANES, B * BLOCK * LANES}, groups,
                                                reinterpret_cast<float*>(y));
                    for (int p = 0; p < P; p++)
                        for (int b = 0; b < B; b++) put_block(p, (block + b) * BLOCK, y[p][b]);
                });
            else
                for (int p = 0; p < P; p++) {
                    const uint8_t* w = m.panel(panel + p);
                    to_signed<In>(w, groups, own.numbers);
                    for (int block = 0; block < n_blocks; block++) {
                        v16 y[BLOCK];
                        multiply_group_tiles<In>(w, own.numbers, a, size_t(block) * BLOCK * size_t(groups), groups, y);
                        put_block(p, block * BLOCK, y);
                    }
                }
        });
    }

    // How many items a thread takes at once: few tokens make small items, so more of them.
    int grain(int total, int n_tokens) const {
        const int share = total / (8 * e.team.size);
        return n_tokens > DECODE || share < 1 ? 1 : share;
    }
};

}  // namespace loadstone::LEVEL
