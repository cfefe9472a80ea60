// What all parts of the engine share: the model's description, its memory, and the team of threads that runs it.
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
constexpr int WIDEST = 16;   // most tokens that are multiplied at once, in registers or as a block (tiles.h)
constexpr int CHUNK = 512;   // most tokens that go through the layers together
constexpr int SLOTS = 256;   // cache slots that attention looks at together
constexpr int DECODE = 4;    // up to so many tokens, bf16 weights meet float32 activations
constexpr int THREADS = 64;  // most threads of a team

// How the numbers of a matrix are stored.
enum Type : int32_t { F32, F16, BF16, Q8, Q4, Q4M, TYPES };  // Q4M: scale and minimum
// Where numbers come from: arrays of a type, or ggml's blocks of 32 (Q8_0, Q4_0, Q4_1).
enum Source : int32_t { FROM_F32, FROM_F16, FROM_BF16, FROM_Q8_0, FROM_Q4_0, FROM_Q4_1 };

#define ALWAYS inline __attribute__((always_inline))  // a weak copy compiled for AVX-512 must not be everybody's

// Bytes of a panel's first `cols` steps.
static ALWAYS constexpr size_t panel_bytes(int32_t type, size_t cols) {
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
    ALWAYS size_t stride() const { return panel_bytes(type, size_t(cols)); }
    ALWAYS uint8_t* panel(int i) const { return data + size_t(i) * stride(); }
};

// All 32-bit, as Python's side mirrors it.
struct Config {
    int32_t vocab, context, d_model, layers, heads, kv_heads, head_dim, d_ff;
    int32_t rms, activation, gated, parallel, tied, learned, rope_dims, narrow_cache;
    float eps, rope_factor;
};

enum { Q, K, V, OUT, GATE, UP, DOWN, MATRICES };  // of a layer; then the head and, if not tied, the embedding
enum { NORM1, NORM1_B, Q_B, K_B, V_B, OUT_B, NORM2, NORM2_B, GATE_B, UP_B, DOWN_B, VECTORS };  // of a layer
enum { NORM, NORM_B, POSITIONS, FREQUENCIES, OTHERS };  // after the layers' vectors

// Tokens in the forms that products read. A tile of T tokens from token t on begins at t times a row's length.
struct Acts {
    float* f32;      // [k][T]
    int32_t* bf16;   // [k / 2][T], two bfloat16 each
    int32_t* i8;     // [k / 4][T], four int8 each
    float* scale;    // [k / 32][T]
    int32_t* sum;    // [k / 32][T], of the int8 of a group
};

struct Cache {
    int32_t rows, slots, type;  // slots: a multiple of 32; type: F32 or BF16
    size_t bytes, head_bytes;   // head_bytes: of the keys, or the values, of one row, layer and head
    uint8_t* data;
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

// Rows of a matrix, from `first` (a multiple of 16) on, out of an array or ggml's blocks. Python's side mirrors it.
struct Packing {
    const uint8_t* source;
    int64_t row_stride, col_stride;  // bytes
    int32_t slot, kind, first, rows;
    int32_t mapped;  // the source is a file's mapping of its own, whose pages are given back when they are read
};

struct Packings { const Packing* works; int32_t count; };

struct Engine;
typedef void (*Job)(Engine&, void*, int thread);

struct Member {  // of the team
    Engine* engine;
    int number;
    uint32_t seen;  // ticket of the last job that it knows of
};

// Threads that run one job together. They spin between the parts of a job and a little after it, then sleep.
struct Team {
    alignas(64) std::atomic<uint32_t> ticket{0};      // of the job that is to be run
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> generation{0};  // barriers passed
    alignas(64) std::atomic<int> next{0};             // the first item that nobody has taken
    alignas(64) std::atomic<int> sleepers{0};
    int size = 1, patience = 0;
    int process = 0;  // that the threads belong to
    bool stop = false;
    Job job = nullptr;
    void* argument = nullptr;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    Member members[THREADS];
    pthread_t threads[THREADS];

    void barrier();
    ALWAYS int take(int grain) { return next.fetch_add(grain, std::memory_order_relaxed); }
};

int usable_cores();
void start_threads(Engine& e);
void stop_threads(Team& team);
void run(Engine& e, Job job, void* argument);

// Pages of a file's mapping that nobody will read again; the last one stays, as it may hold what follows.
void give_back(const uint8_t* from, const uint8_t* to);

// A thread's own memory.
struct Own {
    Acts acts, queries;         // of one token; of WIDEST, [D]
    float *row, *scores, *out;  // [longest row], [WIDEST][SLOTS], [WIDEST][D]
    uint8_t* numbers;           // of a panel of groups, a byte each
};

struct Level {
    const char* name;
    Job forward;  // of a Call
    Job pack;     // of Packings
    void (*unpack)(const Matrix&, int row, float* out);
};

struct Engine {
    Config config;
    const Level* level;
    uint8_t* memory;  // all matrices, in the order of use, then everything else
    size_t bytes, packed_bytes, scratch;  // scratch: where that of a call's tokens begins
    Matrix* matrices;  // MATRICES a layer, then head and embedding
    float** vectors;   // VECTORS a layer, then OTHERS; zeros where there is none
    float *x, *q, *k, *v, *attended, *hidden, *angles;  // of a call's tokens, rows padded to whole vectors
    Acts acts;
    Own own[THREADS];
    Team team;
};

static ALWAYS constexpr int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

}  // namespace loadstone
