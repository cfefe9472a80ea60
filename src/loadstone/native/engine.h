// What the two halves of the engine share: the model's description and memory, and the team of threads that runs it.
//
// Shapes: M tokens of a call, C d_model, H query heads, K key/value heads, D head_dim, F d_ff, V vocabulary.
//
// A matrix [rows, cols] lies in panels of 16 rows, one row to a vector lane, so that a panel times a vector needs no
// sums across lanes: element (row, k) is lane row % 16 of step k of panel row / 16. Missing rows of the last panel and
// missing elements of the last group are zeros. Activations of several tokens lie in tiles, likewise step by step.
#pragma once
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>

namespace loadstone {

constexpr int LANES = 16;    // rows of a panel
constexpr int GROUP = 32;    // weights that share a scale
constexpr int WIDEST = 12;   // most tokens that are multiplied at once
constexpr int CHUNK = 512;   // most tokens that go through the layers together
constexpr int SLOTS = 256;   // cache slots that attention looks at together
constexpr int DECODE = 4;    // up to so many tokens, bf16 weights meet float32 activations

// How the numbers of a matrix are stored; bytes of one step (float types) or one group (others) of a panel.
enum Type : int32_t { F32, F16, BF16, Q8, Q4, Q4M, TYPES };  // Q4M: scale and minimum
// Where numbers come from: arrays of a type, or ggml's blocks of 32 (Q8_0, Q4_0, Q4_1).
enum Source : int32_t { FROM_F32, FROM_F16, FROM_BF16, FROM_Q8_0, FROM_Q4_0, FROM_Q4_1 };

#define ALWAYS inline __attribute__((always_inline))  // a weak copy compiled for AVX-512 must not be everybody's

static ALWAYS size_t panel_bytes(int32_t type, size_t cols) {
    const size_t groups = (cols + GROUP - 1) / GROUP;
    switch (type) {
        case F32: return cols * 64;
        case F16: return (cols * 32 + 63) / 64 * 64;
        case BF16: return (cols + 1) / 2 * 64;
        case Q8: return groups * 544;   // 16 scales in float16, 8 x 16 x 4 bytes
        case Q4: return groups * 288;   // 16 scales, 4 x 16 x 4 bytes of two nibbles
        default: return groups * 320;   // 16 scales, 16 minima, the same
    }
}

struct Matrix {
    int32_t type, rows, cols;
    uint8_t* data;
    ALWAYS int panels() const { return (rows + LANES - 1) / LANES; }
    ALWAYS size_t stride() const { return panel_bytes(type, cols); }
    ALWAYS const uint8_t* panel(int i) const { return data + size_t(i) * stride(); }
};

// All 32-bit, as Python's side mirrors it.
struct Config {
    int32_t vocab, context, d_model, layers, heads, kv_heads, head_dim, d_ff;
    int32_t rms, activation, gated, parallel, tied, learned, rope_dims, narrow_cache;
    float eps, rope_factor;
};

enum { Q, K, V, OUT, GATE, UP, DOWN, MATRICES };  // of a layer; then the head and, if it is not tied, the embedding
enum { NORM1, NORM1_B, Q_B, K_B, V_B, OUT_B, NORM2, NORM2_B, GATE_B, UP_B, DOWN_B, VECTORS };  // of a layer
enum { NORM, NORM_B, POSITIONS, FREQUENCIES, OTHERS };  // after the layers' vectors

// Tokens in the forms that products read, in tiles; a tile of T tokens from token t on begins at t times a row's length.
struct Acts {
    float* f32;       // [k][T]
    uint32_t* bf16;   // [k / 2][T], two bfloat16 each
    int32_t* i8;      // [k / 4][T], four int8 each
    float* scale;     // [k / 32][T]
    int32_t* sum;     // [k / 32][T], of the int8 of a group
};

struct Cache {
    int32_t rows, slots, narrow;  // slots: a multiple of 16; narrow: bfloat16, in pairs, instead of float32
    uint8_t* data;
    size_t bytes, head_bytes;  // head_bytes: of the keys, or the values, of one row, layer and head
};

// Tokens of one row that follow one another.
struct Span {
    int32_t row, first, count, start;  // first: among the call's tokens; start: position
};

struct Call {
    const int32_t* tokens;
    const Span* spans;
    Cache* cache;
    const int32_t* wanted;  // tokens whose logits are wanted
    float* logits;          // [n_wanted, V]
    int32_t n_tokens, n_spans, n_wanted;
};

struct Packing {
    Matrix* matrix;
    const uint8_t* source;
    int64_t row_stride, col_stride;  // bytes
    int32_t kind, first_panel, rows;
};

struct Engine;
typedef void (*Job)(Engine&, void*, int thread);

// Threads that run one job together. They spin between the parts of a job and a little after it, then sleep.
struct Team {
    alignas(64) std::atomic<uint32_t> ticket{0};      // of the job that is to be run
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> generation{0};  // barriers passed
    alignas(64) std::atomic<int> next{0};             // the first item that nobody has taken
    alignas(64) std::atomic<int> sleepers{0};
    int size = 1, started = 1, patience = 0;
    bool stop = false;
    Job job = nullptr;
    void* argument = nullptr;
    Engine* engine = nullptr;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    pthread_t threads[64];

    void barrier();
    ALWAYS int take(int grain) { return next.fetch_add(grain, std::memory_order_relaxed); }
};

// A thread's own memory.
struct Own {
    Acts acts;
    float *row, *queries, *scores, *out;  // [longest row], [D][WIDEST], [WIDEST][SLOTS], [WIDEST][D]
    float* panel;                         // [longest row, to whole groups][16], for packing
};

struct Level {
    const char* name;
    void (*forward)(Engine&, void* call, int thread);
    void (*pack)(Engine&, void* packing, int thread);
    void (*unpack)(const Matrix&, int row, float* out);
};

struct Engine {
    Config config;
    const Level* level;
    Matrix* matrices;   // MATRICES a layer, then head and embedding
    float** vectors;    // VECTORS a layer, then OTHERS; null where there is none
    uint8_t* arena;     // all matrices, in the order of use
    size_t arena_bytes;
    uint8_t* workspace;
    size_t workspace_bytes;
    float *x, *q, *k, *v, *attended, *hidden, *angles;  // of a call's tokens, rows padded to whole vectors
    Acts acts;
    Own own[64];
    Team team;
    int process;
};

static ALWAYS int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

}  // namespace loadstone
