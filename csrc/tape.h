// Calls in their order, to be made later or again: what a layer of a prefill and the replay of a decode pass consist of.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace firstlight {

using Clock = std::chrono::steady_clock;

// Calls whoever drives a tape away from it: by itself at some time, or when any thread rings it before.
struct Bell {
    std::atomic<Clock::duration> until{};

    void after(double seconds) {
        until = Clock::now().time_since_epoch() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    }
    void ring() { until = Clock::duration{}; }
};

struct Tape {
    std::vector<std::function<void()>> calls;
    bool is_whole = true;  // running it does all that was done in the recording
    bool holds = false;    // what it hears isn't done before it is run

    void run(size_t begin, size_t end) const {
        for (size_t i = begin; i < end && i < calls.size(); ++i) calls[i]();
    }

    // The same up to each of these ends, till the bell rings: the seconds that each stretch took. One at least.
    std::vector<double> timed(size_t begin, const std::vector<size_t>& ends, const Bell& bell) const {
        std::vector<double> seconds;
        auto before = Clock::now();
        for (const size_t end : ends) {
            run(begin, end);
            const auto now = Clock::now();
            seconds.push_back(std::chrono::duration<double>(now - before).count());
            if (now.time_since_epoch() >= bell.until.load()) break;
            begin = end, before = now;
        }
        return seconds;
    }
};

inline thread_local Tape* recorder = nullptr;  // the tape that hears this thread's calls

// Makes a call, and notes it where somebody listens; what it points to must outlive the tape. 0 where it is only noted.
template <class Call>
auto perform(Call call) {
    if (recorder) recorder->calls.emplace_back(call);
    return recorder && recorder->holds ? decltype(call())() : call();
}

}  // namespace firstlight
