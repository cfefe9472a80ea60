// Memory, threads and the C interface of the engine. Whatever arrives from outside is checked here; the arithmetic
// (model.cpp) trusts it. No exceptions and no allocation but mmap and calloc, so nothing but libc is needed.
#include "engine.h"

#include <errno.h>
#include <new>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

namespace loadstone {

extern const Level portable_level;
#if defined(__x86_64__)
extern const Level avx2_level, avx512_level, avx512vnni_level, avx512bf16_level;
#endif

// From the plainest to the best.
static const Level* const LEVELS[] = {
    &portable_level,
#if defined(__x86_64__)
    &avx2_level, &avx512_level, &avx512vnni_level, &avx512bf16_level,
#endif
};
constexpr int N_LEVELS = sizeof LEVELS / sizeof *LEVELS;

static bool runs(int level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool can[] = {true, avx2, avx512, vnni, vnni && __builtin_cpu_supports("avx512bf16")};
    return level >= 0 && level < N_LEVELS && can[level];
#else
    return level == 0;
#endif
}

// ---- memory ----

constexpr size_t HUGE_PAGE = size_t(1) << 21;

// Zeroed and untouched; weights are asked for in pages of 2 MB, which spares the translation of addresses.
static uint8_t* reserve(size_t bytes, bool huge) {
    const size_t extra = huge ? HUGE_PAGE : 0;
    void* at = mmap(nullptr, bytes + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    uint8_t* begin = static_cast<uint8_t*>(at);
    if (!huge) return begin;
    uint8_t* aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(begin) + extra - 1) / extra * extra);
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), end = (bytes + page - 1) / page * page;
    if (aligned > begin) munmap(begin, size_t(aligned - begin));
    if (begin + end + extra > aligned + end) munmap(aligned + end, size_t(begin + extra - aligned));
#if defined(MADV_HUGEPAGE)
    madvise(aligned, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // not the last part: it would be rounded up
#endif
    return aligned;
}

static void release(uint8_t* at, size_t bytes) {
    if (at) munmap(at, bytes);
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

static void lay_out(Engine& e, uint8_t* base) {
    const Config& c = e.config;
    const size_t q = size_t(padded(c.heads * c.head_dim)), kv = size_t(padded(c.kv_heads * c.head_dim));
    const size_t model = size_t(padded(c.d_model)), inner = size_t(padded(c.d_ff));
    size_t longest = model > inner ? model : inner;
    longest = ((longest > q ? longest : q) + GROUP - 1) / GROUP * GROUP;
    Pieces pieces{base};
    const auto acts = [&](Acts& a, size_t tokens) {
        a.f32 = pieces.take<float>(tokens * longest);
        a.bf16 = pieces.take<uint32_t>(tokens * longest / 2);
        a.i8 = pieces.take<int32_t>(tokens * longest / 4);
        a.scale = pieces.take<float>(tokens * longest / GROUP);
        a.sum = pieces.take<int32_t>(tokens * longest / GROUP);
    };
    e.x = pieces.take<float>(CHUNK * model);
    e.q = pieces.take<float>(CHUNK * q);
    e.k = pieces.take<float>(CHUNK * kv);
    e.v = pieces.take<float>(CHUNK * kv);
    e.attended = pieces.take<float>(CHUNK * q);
    e.hidden = pieces.take<float>(CHUNK * inner);
    e.angles = pieces.take<float>(CHUNK * size_t(c.rope_dims));
    acts(e.acts, CHUNK);
    for (int i = 0; i < e.team.size; i++) {
        Own& own = e.own[i];
        acts(own.acts, 1);
        own.row = pieces.take<float>(longest);
        own.queries = pieces.take<float>(size_t(WIDEST) * c.head_dim);
        own.scores = pieces.take<float>(size_t(WIDEST) * SLOTS);
        own.out = pieces.take<float>(size_t(WIDEST) * padded(c.head_dim));
        own.panel = pieces.take<float>(longest * LANES);
    }
    e.workspace_bytes = pieces.used;
}

// ---- threads ----

static int usable_cores() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

static inline void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void Team::barrier() {
    const uint32_t before = generation.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived.store(0, std::memory_order_relaxed);
        next.store(0, std::memory_order_relaxed);
        generation.store(before + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; generation.load(std::memory_order_acquire) == before; spins++)
        if (spins < patience) rest();
        else sched_yield();  // somebody else needs the core, perhaps the thread that is waited for
}

static double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

constexpr double LINGER = 3e-4;  // seconds that a thread spins for the next job before it sleeps

static uint32_t next_ticket(Team& team, uint32_t seen) {
    const double end = seconds() + (team.patience ? LINGER : 0);
    do {
        for (int i = 0; i < 64; i++) {
            if (const uint32_t ticket = team.ticket.load(std::memory_order_acquire); ticket != seen) return ticket;
            rest();
        }
    } while (seconds() < end);
    pthread_mutex_lock(&team.mutex);
    team.sleepers.fetch_add(1);
    uint32_t ticket;
    while ((ticket = team.ticket.load()) == seen) pthread_cond_wait(&team.wake, &team.mutex);
    team.sleepers.fetch_sub(1);
    pthread_mutex_unlock(&team.mutex);
    return ticket;
}

struct Start {
    Engine* engine;
    int thread;
    uint32_t ticket;
};

static void* work(void* argument) {
    const Start start = *static_cast<Start*>(argument);
    free(argument);
    Team& team = start.engine->team;
    for (uint32_t seen = start.ticket;;) {
        seen = next_ticket(team, seen);
        if (team.stop) return nullptr;
        team.job(*start.engine, team.argument, start.thread);
        team.barrier();
    }
}

static void announce(Team& team) {
    team.ticket.fetch_add(1);
    if (team.sleepers.load()) {
        pthread_mutex_lock(&team.mutex);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.mutex);
    }
}

static void start_threads(Engine& e) {
    Team& team = e.team;
    team.patience = team.size <= usable_cores() ? 4000 : 0;
    for (team.started = 1; team.started < team.size; team.started++) {
        Start* start = static_cast<Start*>(malloc(sizeof(Start)));
        if (!start) break;
        *start = {&e, team.started, team.ticket.load()};
        if (pthread_create(&team.threads[team.started], nullptr, work, start)) {
            free(start);
            break;
        }
    }
    team.size = team.started;  // fewer, where the system allows no more
    e.process = int(getpid());
}

static void run(Engine& e, Job job, void* argument) {
    Team& team = e.team;
    if (e.process != int(getpid())) {  // after a fork, only the calling thread is there
        pthread_mutex_init(&team.mutex, nullptr);
        pthread_cond_init(&team.wake, nullptr);
        team.arrived.store(0), team.sleepers.store(0);
        start_threads(e);
    }
    team.job = job, team.argument = argument;
    team.next.store(0, std::memory_order_relaxed);
    if (team.size > 1) announce(team);
    job(e, argument, 0);
    team.barrier();
}

static bool sound(const Config& c) {
    const int32_t sizes[] = {c.vocab, c.context, c.d_model, c.layers, c.heads, c.kv_heads, c.head_dim, c.d_ff};
    for (const int32_t size : sizes)
        if (size < 1 || size > 1 << 28) return false;
    return c.heads % c.kv_heads == 0 && c.rope_dims >= 0 && c.rope_dims <= c.head_dim && c.rope_dims % 2 == 0 &&
           int64_t(c.heads) * c.head_dim < 1 << 28 && c.layers < 1 << 16;
}

static void shape(Engine& e, int slot, Matrix& m) {
    const Config& c = e.config;
    const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim, model = c.d_model, inner = c.d_ff;
    const int32_t shapes[MATRICES][2] = {
        {q, model}, {kv, model}, {kv, model}, {model, q}, {c.gated ? inner : 0, model}, {inner, model}, {model, inner}};
    const bool inside = slot < c.layers * MATRICES, last = slot > c.layers * MATRICES;
    m.rows = inside ? shapes[slot % MATRICES][0] : last && c.tied ? 0 : c.vocab;
    m.cols = inside ? shapes[slot % MATRICES][1] : model;
}

static size_t vector_length(const Engine& e, int slot) {
    const Config& c = e.config;
    const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim, model = c.d_model, inner = c.d_ff;
    const int lengths[VECTORS] = {model, model, q, kv, kv, model, model, model, inner, inner, model};
    if (slot < c.layers * VECTORS) return size_t(lengths[slot % VECTORS]);
    switch (slot - c.layers * VECTORS) {
        case POSITIONS: return c.learned ? size_t(c.context) * size_t(model) : 0;
        case FREQUENCIES: return size_t(c.rope_dims / 2);
        default: return size_t(model);
    }
}

static void destroy(Engine* e) {
    Team& team = e->team;
    if (e->process == int(getpid()) && team.started > 1) {
        team.stop = true;
        announce(team);
        for (int i = 1; i < team.started; i++) pthread_join(team.threads[i], nullptr);
    }
    release(e->arena, e->arena_bytes);
    release(e->workspace, e->workspace_bytes);
    if (e->vectors)
        for (int i = 0; i < e->config.layers * VECTORS + OTHERS; i++) free(e->vectors[i]);
    free(e->vectors);
    free(e->matrices);
    e->~Engine();
    free(e);
}

}  // namespace loadstone

using namespace loadstone;

#define API extern "C" __attribute__((visibility("default")))

API const char* ls_hash() { return SOURCE_HASH; }
API const char* ls_level(int level) { return level >= 0 && level < N_LEVELS ? LEVELS[level]->name : nullptr; }
API int ls_runs(int level) { return runs(level); }
API int ls_cores() { return usable_cores(); }

// An engine without weights. `types`: of each matrix, in slots. Null if there is no memory, or an argument is unsound.
API Engine* ls_open(const Config* config, const int32_t* types, int threads, int level) {
    if (!sound(*config) || !runs(level) || threads < 1) return nullptr;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(Engine))) return nullptr;
    memset(memory, 0, sizeof(Engine));
    Engine* e = new (memory) Engine;
    e->config = *config, e->level = LEVELS[level];
    e->arena = e->workspace = nullptr, e->process = 0;
    e->team.size = threads < 64 ? threads : 64, e->team.started = 1;
    const int slots = config->layers * MATRICES + 2;
    e->matrices = static_cast<Matrix*>(calloc(size_t(slots), sizeof(Matrix)));
    e->vectors = static_cast<float**>(calloc(size_t(config->layers * VECTORS + OTHERS), sizeof(float*)));
    if (!e->matrices || !e->vectors) return destroy(e), nullptr;
    for (int pass = 0; pass < 2; pass++) {
        Pieces pieces{e->arena};
        for (int i = 0; i < slots; i++) {
            Matrix& m = e->matrices[i];
            shape(*e, i, m), m.type = types[i];
            if (m.type < 0 || m.type >= TYPES) return destroy(e), nullptr;
            m.data = pieces.take<uint8_t>(size_t(m.panels()) * m.stride());
        }
        e->arena_bytes = pieces.used;
        if (!pass && !(e->arena = reserve(pieces.used, true))) return destroy(e), nullptr;
    }
    lay_out(*e, nullptr);
    if (!(e->workspace = reserve(e->workspace_bytes, true))) return destroy(e), nullptr;
    lay_out(*e, e->workspace);
    start_threads(*e);
    return e;
}

API void ls_close(Engine* e) { destroy(e); }
API int64_t ls_bytes(const Engine* e) { return int64_t(e->arena_bytes); }
API int ls_threads(const Engine* e) { return e->team.size; }

// Rows of a matrix, from `first` (a multiple of 16) on, out of an array or ggml's blocks. Strides in bytes.
API int ls_pack(Engine* e, int slot, const void* source, int kind, int64_t row_stride, int64_t col_stride, int first,
                int rows) {
    if (slot < 0 || slot >= e->config.layers * MATRICES + 2) return EINVAL;
    Matrix& m = e->matrices[slot];
    const int32_t wanted[] = {-1, -1, -1, Q8, Q4, Q4M};
    if (kind < FROM_F32 || kind > FROM_Q4_1 || (kind >= FROM_Q8_0 && (wanted[kind] != m.type || m.cols % GROUP)))
        return EINVAL;
    if (first < 0 || first % LANES || rows < 1 || rows > m.rows - first) return EINVAL;
    Packing packing{&m, static_cast<const uint8_t*>(source), row_stride, col_stride, kind, first / LANES, rows};
    run(*e, e->level->pack, &packing);
    return 0;
}

API int ls_vector(Engine* e, int slot, const float* source, int64_t n) {
    if (slot < 0 || slot >= e->config.layers * VECTORS + OTHERS || size_t(n) != vector_length(*e, slot)) return EINVAL;
    const size_t whole = (size_t(n) + LANES - 1) / LANES * LANES;
    free(e->vectors[slot]);
    e->vectors[slot] = static_cast<float*>(calloc(whole ? whole : 1, sizeof(float)));
    if (!e->vectors[slot]) return ENOMEM;
    memcpy(e->vectors[slot], source, size_t(n) * sizeof(float));
    return 0;
}

// One row of a matrix, as the products see it.
API int ls_row(const Engine* e, int slot, int row, float* out) {
    if (slot < 0 || slot >= e->config.layers * MATRICES + 2) return EINVAL;
    const Matrix& m = e->matrices[slot];
    if (row < 0 || row >= m.rows) return EINVAL;
    e->level->unpack(m, row, out);
    return 0;
}

API Cache* ls_cache_open(const Engine* e, int rows, int slots) {
    const Config& c = e->config;
    if (rows < 1 || slots < 1 || slots > c.context) return nullptr;
    Cache* cache = static_cast<Cache*>(calloc(1, sizeof(Cache)));
    if (!cache) return nullptr;
    cache->rows = rows, cache->slots = padded(slots), cache->narrow = c.narrow_cache;
    cache->head_bytes = size_t(cache->slots) * size_t(padded(c.head_dim)) * (c.narrow_cache ? 2 : 4);
    cache->bytes = size_t(rows) * size_t(c.layers) * size_t(c.kv_heads) * 2 * cache->head_bytes;
    cache->data = reserve(cache->bytes, false);
    if (cache->data) return cache;
    free(cache);
    return nullptr;
}

API void ls_cache_close(Cache* cache) {
    release(cache->data, cache->bytes);
    free(cache);
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
        run(*e, e->level->forward, &call);
        call.tokens += call.n_tokens, call.logits += size_t(call.n_wanted) * size_t(c.vocab);
        call.n_tokens = call.n_spans = call.n_wanted = 0;
    }
    return 0;
}
