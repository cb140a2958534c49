// Calls in their order, to be made later or again: what a layer of a prefill and the replay of a decode pass consist of.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace firstlight {

struct Tape {
    std::vector<std::function<void()>> calls;
    bool is_whole = true;  // running it does all that was done in the recording
    bool holds = false;    // what it hears isn't done before it is run

    void run(size_t begin, size_t end) const {
        for (size_t i = begin; i < end && i < calls.size(); ++i) calls[i]();
    }

    // The same up to each of these ends: the seconds that each stretch took.
    std::vector<double> timed(size_t begin, const std::vector<size_t>& ends) const {
        std::vector<double> seconds;
        for (const size_t end : ends) {
            const auto before = std::chrono::steady_clock::now();
            run(begin, end);
            seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count());
            begin = end;
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
