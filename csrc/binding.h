// Threads stay on cores of their own while a pass runs. The scheduler has nothing to move then, and beside another busy
// process it doesn't put two of them on one core (decision 0006).
#pragma once

#include <omp.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <vector>

namespace firstlight {

#if defined(__linux__)
// Where the calling thread runs when it isn't bound.
inline thread_local cpu_set_t anywhere;

// The calling thread and those that compute for it, one on each of `cores`, which are given as their CPUs. False, and
// nothing done, if the caller may not run on all of them.
inline bool bind(const std::vector<std::vector<int>>& cores) {
    cpu_set_t now;  // one core if the caller is bound already, as under a callback: then nothing is done, and kept
    std::vector<cpu_set_t> places(cores.size());
    if (sched_getaffinity(0, sizeof now, &now)) return false;
    for (size_t t = 0; t < cores.size(); ++t) {
        CPU_ZERO(&places[t]);
        for (int cpu : cores[t]) CPU_SET(cpu, &places[t]);
        CPU_AND(&places[t], &places[t], &now);
        if (!CPU_COUNT(&places[t])) return false;
    }
    anywhere = now;
#pragma omp parallel num_threads((int)cores.size())
    {
        static thread_local int at = 0;  // the others stay where they are from their first time on
        const int t = omp_get_thread_num();
        if (t == 0 || at != t) sched_setaffinity(0, sizeof places[t], &places[t]);
        at = t;
    }
    return true;
}

// The calling thread may run anywhere again.
inline void unbind() { sched_setaffinity(0, sizeof anywhere, &anywhere); }
#else
inline bool bind(const std::vector<std::vector<int>>&) { return false; }
inline void unbind() {}
#endif

}  // namespace firstlight
