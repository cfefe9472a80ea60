// Memory and the C interface of the engine. Whatever arrives from outside is checked here; the arithmetic (level.cpp)
// trusts it. No exceptions and no allocation but mmap, so nothing but libc is needed.
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <new>

#include "engine.h"

namespace loadstone {

// Weak, so null where the compiler was too old for one (build.py).
__attribute__((weak)) extern const Level avx2_level, avx512_level, avx512vnni_level, avx512bf16_level, amx_level;
extern const Level portable_level;

// From the plainest to the best.
static const Level* const LEVELS[] = {
    &portable_level,
#if defined(__x86_64__)
    &avx2_level, &avx512_level, &avx512vnni_level, &avx512bf16_level, &amx_level,
#endif
};
constexpr int N_LEVELS = sizeof LEVELS / sizeof *LEVELS;

#if defined(__x86_64__)
// Tiles must be asked for: their state is large, and the system saves it for those who do.
static bool has_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d = 0;
    const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1 && d >> 25 & 1;
    return known && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
#endif

static bool runs(int level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    unsigned a = 0, b, c, d;  // g++ 9 does not know its name
    const bool bf16 = vnni && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
    const bool can[] = {true, avx2, avx512, vnni, bf16, bf16 && level == N_LEVELS - 1 && has_tiles()};
    return level >= 0 && level < N_LEVELS && LEVELS[level] && can[level];
#else
    return level == 0;
#endif
}

constexpr size_t HUGE_PAGE = size_t(1) << 21;
static const size_t PAGE = size_t(sysconf(_SC_PAGESIZE));

// Zeroed and untouched, and null if there is none. Large pages spare the translation of addresses.
static uint8_t* reserve(size_t bytes, bool huge) {
    const size_t size = (bytes + PAGE - 1) / PAGE * PAGE, align = huge ? HUGE_PAGE : PAGE;
    void* at = mmap(nullptr, size + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    const size_t before = -reinterpret_cast<uintptr_t>(at) % align;
    uint8_t* aligned = static_cast<uint8_t*>(at) + before;
    if (before) munmap(at, before);
    munmap(aligned + size, align - before);
    if (huge) madvise(aligned, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // the last part would be rounded up
    return aligned;
}

void give_back(const uint8_t* from, const uint8_t* to) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(from) / PAGE, end = reinterpret_cast<uintptr_t>(to) / PAGE;
    if (begin < end) madvise(reinterpret_cast<void*>(begin * PAGE), (end - begin) * PAGE, MADV_DONTNEED);
}

// Hands out pieces of one block of memory; the first walk, without a block, only counts.
struct Pieces {
    uint8_t* base;
    size_t used = 0;
    template <class Number>
    Number* take(size_t count) {
        Number* piece = base ? reinterpret_cast<Number*>(base + used) : nullptr;
        used += (count * sizeof(Number) + 63) / 64 * 64;
        return piece;
    }
};

static bool sound(const Config& c) {
    const int32_t sizes[] = {c.vocab, c.context, c.d_model, c.layers, c.heads, c.kv_heads, c.head_dim, c.d_ff};
    for (const int32_t size : sizes)
        if (size < 1 || size > 1 << 28) return false;
    return c.heads % c.kv_heads == 0 && c.rope_dims >= 0 && c.rope_dims <= c.head_dim && c.rope_dims % 2 == 0 &&
           int64_t(c.heads) * c.head_dim < 1 << 28 && c.layers < 1 << 16;
}

static int count_matrices(const Config& c) { return c.layers * MATRICES + 2; }
static int count_vectors(const Config& c) { return c.layers * VECTORS + OTHERS; }

static Matrix matrix_of(const Config& c, int slot, int32_t type) {
    const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim, model = c.d_model, inner = c.d_ff;
    const int32_t shapes[MATRICES][2] = {
        {q, model}, {kv, model}, {kv, model}, {model, q}, {c.gated ? inner : 0, model}, {inner, model}, {model, inner}};
    if (slot < c.layers * MATRICES) return {type, shapes[slot % MATRICES][0], shapes[slot % MATRICES][1], nullptr};
    return {type, slot > c.layers * MATRICES && c.tied ? 0 : c.vocab, model, nullptr};
}

static size_t vector_length(const Config& c, int slot) {
    const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim, model = c.d_model, inner = c.d_ff;
    const int lengths[VECTORS] = {model, model, q, kv, kv, model, model, model, inner, inner, model};
    const size_t others[OTHERS] = {size_t(model), size_t(model), c.learned ? size_t(c.context) * size_t(model) : 0,
                                   size_t(c.rope_dims / 2)};
    return slot < c.layers * VECTORS ? size_t(lengths[slot % VECTORS]) : others[slot - c.layers * VECTORS];
}

static size_t longest(const Config& c) {
    const int inner = c.d_model > c.d_ff ? c.d_model : c.d_ff, q = c.heads * c.head_dim;
    return (size_t(inner > q ? inner : q) + GROUP - 1) / GROUP * GROUP;
}

static Acts acts(Pieces& pieces, size_t tokens, size_t length) {
    const size_t n = tokens * length;
    return {pieces.take<float>(n), pieces.take<int32_t>(n / 2), pieces.take<int32_t>(n / 4),
            pieces.take<float>(n / GROUP), pieces.take<int32_t>(n / GROUP)};
}

// Finds the place of a call's tokens, so close together that few tokens touch few pages. Returns where they end.
static size_t lay_out_tokens(Engine& e, size_t tokens) {
    const Config& c = e.config;
    Pieces pieces{e.memory, e.scratch};
    const size_t q = size_t(padded(c.heads * c.head_dim)), kv = size_t(padded(c.kv_heads * c.head_dim));
    e.x = pieces.take<float>(tokens * size_t(padded(c.d_model)));
    e.hidden = pieces.take<float>(tokens * size_t(padded(c.d_ff)));
    e.q = pieces.take<float>(tokens * q), e.attended = pieces.take<float>(tokens * q);
    e.k = pieces.take<float>(tokens * kv), e.v = pieces.take<float>(tokens * kv);
    e.angles = pieces.take<float>(tokens * size_t(c.rope_dims));
    e.acts = acts(pieces, size_t(padded(int(tokens))), longest(c));  // whole blocks
    return pieces.used;
}

// Finds the place of everything in the engine's memory; without memory it only counts.
static void lay_out(Engine& e, const int32_t* types) {
    const Config& c = e.config;
    Pieces pieces{e.memory};
    e.matrices = pieces.take<Matrix>(size_t(count_matrices(c)));
    e.vectors = pieces.take<float*>(size_t(count_vectors(c)));
    for (int i = 0; i < count_matrices(c); i++) {
        Matrix m = matrix_of(c, i, types[i]);
        m.data = pieces.take<uint8_t>(size_t(m.panels()) * m.stride());
        if (e.memory) e.matrices[i] = m;
    }
    e.packed_bytes = pieces.used;
    for (int i = 0; i < count_vectors(c); i++) {
        float* vector = pieces.take<float>((vector_length(c, i) + LANES - 1) / LANES * LANES);
        if (e.memory) e.vectors[i] = vector;
    }
    const size_t most = longest(c), head = size_t(padded(c.head_dim));
    for (int i = 0; i < e.team.size; i++)
        e.own[i] = {acts(pieces, 1, most), acts(pieces, WIDEST, head), pieces.take<float>(most),
                    pieces.take<float>(size_t(WIDEST) * SLOTS), pieces.take<float>(WIDEST * head),
                    pieces.take<uint8_t>(most * LANES)};
    e.scratch = pieces.used;
    e.bytes = lay_out_tokens(e, CHUNK);
}

static void destroy(Engine* e) {
    stop_threads(e->team);
    if (e->memory) munmap(e->memory, e->bytes);
    e->~Engine();
    munmap(e, sizeof(Engine));
}

static bool is_matrix(const Engine& e, int slot) { return slot >= 0 && slot < count_matrices(e.config); }

static bool sound(const Engine& e, const Packing& p) {
    if (!is_matrix(e, p.slot) || p.kind < FROM_F32 || p.kind > FROM_Q4_1) return false;
    const Matrix& m = e.matrices[p.slot];
    const int32_t blocks_of[] = {m.type, m.type, m.type, Q8, Q4, Q4M};
    if (blocks_of[p.kind] != m.type || (p.kind >= FROM_Q8_0 && m.cols % GROUP)) return false;
    return p.first >= 0 && p.first % LANES == 0 && p.rows > 0 && p.rows <= m.rows - p.first;
}

}  // namespace loadstone

using namespace loadstone;

#define API extern "C" __attribute__((visibility("default")))

API const char* ls_hash() { return SOURCE_HASH; }
// Its name, empty if the library has none of it; null beyond the last.
API const char* ls_level(int level) {
    return level < 0 || level >= N_LEVELS ? nullptr : LEVELS[level] ? LEVELS[level]->name : "";
}
API int ls_runs(int level) { return runs(level); }
API int ls_cores() { return usable_cores(); }

// An engine without weights. `types`: of each matrix, in slots. Null if there is no memory, or an argument is unsound.
API Engine* ls_open(const Config* config, const int32_t* types, int threads, int level) {
    if (!sound(*config) || !runs(level) || threads < 1) return nullptr;
    for (int i = 0; i < count_matrices(*config); i++)
        if (types[i] < 0 || types[i] >= TYPES) return nullptr;
    uint8_t* place = reserve(sizeof(Engine), false);
    if (!place) return nullptr;
    Engine* e = new (place) Engine{};
    e->config = *config, e->level = LEVELS[level];
    e->team.size = threads < THREADS ? threads : THREADS;
    lay_out(*e, types);
    if (!(e->memory = reserve(e->bytes, true))) return destroy(e), nullptr;
    lay_out(*e, types);
    start_threads(*e);
    return e;
}

API void ls_close(Engine* e) { destroy(e); }
API int64_t ls_bytes(const Engine* e) { return int64_t(e->packed_bytes); }
API int ls_threads(const Engine* e) { return e->team.size; }

// All in one call, so that no thread waits for another matrix. Returns EINVAL, and does nothing, if one is unsound.
API int ls_pack(Engine* e, const Packing* works, int count) {
    for (int i = 0; i < count; i++)
        if (!sound(*e, works[i])) return EINVAL;
    Packings list{works, count};
    run(*e, e->level->pack, &list);
    return 0;
}

API int ls_vector(Engine* e, int slot, const float* source, int64_t n) {
    const Config& c = e->config;
    if (slot < 0 || slot >= count_vectors(c) || size_t(n) != vector_length(c, slot)) return EINVAL;
    memcpy(e->vectors[slot], source, size_t(n) * sizeof(float));
    return 0;
}

// One row of a matrix, as the products see it.
API int ls_row(const Engine* e, int slot, int row, float* out) {
    if (!is_matrix(*e, slot) || row < 0 || row >= e->matrices[slot].rows) return EINVAL;
    e->level->unpack(e->matrices[slot], row, out);
    return 0;
}

API Cache* ls_cache_open(const Engine* e, int rows, int slots) {
    const Config& c = e->config;
    if (rows < 1 || slots < 1 || slots > c.context) return nullptr;
    Cache cache{rows, (slots + GROUP - 1) / GROUP * GROUP, c.narrow_cache ? BF16 : F32, 0, 0, nullptr};
    cache.head_bytes = size_t(cache.slots) * size_t(padded(c.head_dim)) * (c.narrow_cache ? 2 : 4);
    cache.bytes = PAGE + size_t(rows) * size_t(c.layers) * size_t(c.kv_heads) * 2 * cache.head_bytes;
    uint8_t* place = reserve(cache.bytes, false);
    cache.data = place + PAGE;
    return place ? new (place) Cache(cache) : nullptr;
}

API void ls_cache_close(Cache* cache) { munmap(cache, cache->bytes); }
API int64_t ls_cache_bytes(const Cache* cache) { return int64_t(cache->bytes); }

// The first tokens of one row over those of another: of each head, whole panels of keys and the beginnings of values'.
API int ls_cache_copy(const Engine* e, Cache* cache, int source, int target, int tokens) {
    const auto is_row = [&](int row) { return row >= 0 && row < cache->rows; };
    if (!is_row(source) || !is_row(target) || source == target || tokens < 0 || tokens > cache->slots) return EINVAL;
    const size_t head = 2 * cache->head_bytes, row = size_t(e->config.layers) * size_t(e->config.kv_heads) * head;
    uint8_t *from = cache->data + size_t(source) * row, *to = cache->data + size_t(target) * row;
    for (uint8_t* end = from + row; from < end; from += head, to += head) {
        memcpy(to, from, size_t(padded(tokens) / LANES) * panel_bytes(cache->type, size_t(e->config.head_dim)));
        for (size_t at = head / 2; at < head; at += panel_bytes(cache->type, size_t(cache->slots)))
            memcpy(to + at, from + at, panel_bytes(cache->type, size_t(tokens)));
    }
    return 0;
}

// Reads tokens into rows of the cache: `counts[i]` of them into row `rows[i]`, from position `starts[i]` on. Logits of
// each row's last token, or of every token, go to `logits`. Returns EINVAL, and does nothing, for an unsound argument.
API int ls_run(Engine* e, Cache* cache, const int32_t* tokens, int n, const int32_t* rows, const int32_t* counts,
               const int32_t* starts, int every, float* logits) {
    const Config& c = e->config;
    int64_t total = 0;
    for (int i = 0; i < n; i++) {
        if (rows[i] < 0 || rows[i] >= cache->rows || counts[i] < 1 || starts[i] < 0) return EINVAL;
        if (int64_t(starts[i]) + counts[i] > (cache->slots < c.context ? cache->slots : c.context)) return EINVAL;
        for (int j = 0; j < i; j++)
            if (rows[j] == rows[i]) return EINVAL;
        total += counts[i];
    }
    for (int64_t i = 0; i < total; i++)
        if (tokens[i] < 0 || tokens[i] >= c.vocab) return EINVAL;
    Span spans[CHUNK];
    int32_t wanted[CHUNK];
    Call call{tokens, spans, cache, wanted, logits, 0, 0, 0};
    for (int i = 0, done = 0; i < n;) {
        const int room = CHUNK - call.n_tokens, left = counts[i] - done, count = left < room ? left : room;
        spans[call.n_spans++] = {rows[i], call.n_tokens, count, starts[i] + done};
        for (int t = 0; t < count; t++)
            if (every || done + t == counts[i] - 1) wanted[call.n_wanted++] = call.n_tokens + t;
        call.n_tokens += count, done += count;
        if (done == counts[i]) i++, done = 0;
        if (call.n_tokens < CHUNK && i < n) continue;
        lay_out_tokens(*e, size_t(call.n_tokens));
        run(*e, e->level->forward, &call);
        call.tokens += call.n_tokens, call.logits += size_t(call.n_wanted) * size_t(c.vocab);
        call.n_tokens = call.n_spans = call.n_wanted = 0;
    }
    return 0;
}
