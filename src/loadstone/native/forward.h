// The model: tokens through the embedding, the layers and the head; every thread of the team runs this together.
#pragma once
#include "attention.h"

namespace loadstone::LEVEL {

struct Forward : Attention {
    using Attention::Attention;
    const int C = config.d_model, row = padded(C), inner = padded(config.d_ff);

    void run() {
        embed();
        for (int layer = 0; layer < config.layers; layer++) {
            attention(layer);
            if (config.parallel) mlp_inner(layer);
            add_branch(layer, OUT, e.attended, OUT_B);
            if (!config.parallel) mlp_inner(layer);
            add_branch(layer, DOWN, e.hidden, DOWN_B);
        }
        if (call.n_wanted) head();
        if (AMX && M > DECODE) shape_tiles(0);
    }

    void embed() {
        const int half = config.rope_dims / 2;
        const Matrix& table = e.matrices[config.layers * MATRICES + (config.tied ? 0 : 1)];
        share(e.team, M, 1, [&](int token) {
            const int position = place(token).start;
            float *x = e.x + size_t(token) * row, *angle = e.angles + size_t(token) * 2 * half;
            memset(x, 0, size_t(row) * sizeof(float));
            unpack(table, call.tokens[token], x);
            const float* learned = other(POSITIONS) + size_t(position) * C;
            for (int c = 0; config.learned && c < C; c++) x[c] += learned[c];
            for (int j = 0; j < half; j++) {
                const float turn = float(position) * other(FREQUENCIES)[j];
                angle[j] = cosf(turn) * config.rope_factor, angle[half + j] = sinf(turn) * config.rope_factor;
            }
        });
        e.team.barrier();
    }

    // What lies beyond C in x is zero.
    const float* normed(const float* x, const float* weight, const float* offset, float* out) const {
        v16 total = {}, squares = {};
        for (int i = 0; i < row && !config.rms; i += LANES) total += load(x + i);
        const float mean = sum(total) / float(C);
        for (int i = 0; i < row; i += LANES) {
            const v16 d = LANE + i < splat(C) ? load(x + i) - mean : v16{};
            squares += d * d;
        }
        const float scale = 1 / sqrtf(sum(squares) / float(C) + config.eps);
        for (int i = 0; i < row; i += LANES)
            store(out + i, (load(x + i) - mean) * scale * load(weight + i) + load(offset + i));
        return out;
    }

    void attention(int layer) {
        const Matrix* qkv[] = {matrix(layer, Q), matrix(layer, K), matrix(layer, V)};
        const Acts& a = prepare(qkv, 3, M, [&](int token, float* to) {
            return normed(e.x + size_t(token) * row, vector(layer, NORM1), vector(layer, NORM1_B), to);
        });
        float* to[] = {e.q, e.k, e.v};
        const int widths[] = {width, kv_width, kv_width};
        const float scales[] = {1 / sqrtf(float(D)), 1, 1};  // queries, for attention
        products(qkv, 3, a, M, [&](int which, int panel, int token, v16 y) {
            const v16 offset = load(vector(layer, Q_B + which) + panel * LANES);
            store(to[which] + size_t(token) * widths[which] + panel * LANES, (y + offset) * scales[which]);
        });
        e.team.barrier();
        remember(layer);
        attend(layer);
    }

    // hidden = activation(up), or activation(gate) * up: in two passes, so that one product serves both kinds.
    void mlp_inner(int layer) {
        const Matrix* both[] = {matrix(layer, UP), matrix(layer, GATE)};
        const Acts& a = prepare(both, config.gated ? 2 : 1, M, [&](int token, float* to) {
            return normed(e.x + size_t(token) * row, vector(layer, NORM2), vector(layer, NORM2_B), to);
        });
        const auto pass = [&](const Matrix* m, int bias_of, auto value) {
            const float* bias = vector(layer, bias_of);
            products(&m, 1, a, M, [&](int, int panel, int token, v16 y) {
                float* to = e.hidden + size_t(token) * inner + panel * LANES;
                store(to, value(y + load(bias + panel * LANES), to));
            });
            e.team.barrier();
        };
        const auto activated = [&](v16 y, const float*) { return activate(config.activation, y); };
        if (!config.gated) return pass(both[0], UP_B, activated);
        pass(both[1], GATE_B, activated);
        pass(both[0], UP_B, [](v16 y, const float* gate) { return load(gate) * y; });
    }

    // x += matrix times what one of the branches ended in.
    void add_branch(int layer, int which, const float* from, int bias_of) {
        const Matrix* m = matrix(layer, which);
        const float* offset = vector(layer, bias_of);
        const Acts& a = prepare(&m, 1, M, [&](int token, float*) { return from + size_t(token) * padded(m->cols); });
        products(&m, 1, a, M, [&](int, int panel, int token, v16 y) {
            float* x = e.x + size_t(token) * row + panel * LANES;
            store(x, load(x) + (y + load(offset + panel * LANES)));
        });
        e.team.barrier();
    }

    void head() {
        const Matrix* m = &e.matrices[config.layers * MATRICES];
        const Acts& a = prepare(&m, 1, call.n_wanted, [&](int i, float* to) {
            return normed(e.x + size_t(call.wanted[i]) * row, other(NORM), other(NORM_B), to);
        });
        products(&m, 1, a, call.n_wanted, [&](int, int panel, int i, v16 y) {
            float* to = call.logits + size_t(i) * config.vocab + panel * LANES;
            const int lanes = config.vocab - panel * LANES;
            if (lanes >= LANES)
                store(to, y);
            else
                memcpy(to, &y, size_t(lanes) * sizeof(float));
        });
    }
};

}  // namespace loadstone::LEVEL
