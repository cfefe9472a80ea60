// The team: threads that wait for a job, run it together and meet at barriers.
#include <sched.h>
#include <unistd.h>

#include "engine.h"

namespace loadstone {

// How often a thread looks before others may have its core: at a barrier, and for the next job (some 0.3 ms).
constexpr int PATIENCE = 4000, LINGER = 20000;

int usable_cores() {
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

static uint32_t next_ticket(Team& team, uint32_t seen) {
    uint32_t ticket;
    for (int looks = team.patience ? LINGER : 0; looks >= 0; looks--) {
        if ((ticket = team.ticket.load(std::memory_order_acquire)) != seen) return ticket;
        rest();
    }
    pthread_mutex_lock(&team.mutex);
    team.sleepers.fetch_add(1);
    while ((ticket = team.ticket.load()) == seen) pthread_cond_wait(&team.wake, &team.mutex);
    team.sleepers.fetch_sub(1);
    pthread_mutex_unlock(&team.mutex);
    return ticket;
}

static void* work(void* argument) {
    const Member member = *static_cast<Member*>(argument);
    Team& team = member.engine->team;
    for (uint32_t seen = member.seen;;) {
        seen = next_ticket(team, seen);
        if (team.stop) return nullptr;
        team.job(*member.engine, team.argument, member.number);
        team.barrier();
    }
}

static void announce(Team& team) {
    team.ticket.fetch_add(1);
    if (!team.sleepers.load()) return;
    pthread_mutex_lock(&team.mutex);
    pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.mutex);
}

void start_threads(Engine& e) {
    Team& team = e.team;
    team.patience = team.size <= usable_cores() ? PATIENCE : 0;
    int started = 1;
    for (; started < team.size; started++) {
        team.members[started] = {&e, started, team.ticket.load()};
        if (pthread_create(&team.threads[started], nullptr, work, &team.members[started])) break;
    }
    team.size = started;  // fewer, where the system allows no more
    team.process = int(getpid());
}

void stop_threads(Team& team) {
    if (team.process != int(getpid())) return;
    team.stop = true;
    announce(team);
    for (int i = 1; i < team.size; i++) pthread_join(team.threads[i], nullptr);
}

void run(Engine& e, Job job, void* argument) {
    Team& team = e.team;
    if (team.process != int(getpid())) {  // after a fork, only the calling thread is there
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

}  // namespace loadstone
