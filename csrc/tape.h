// Calls in their order, to be made again: what the replay of a decode pass consists of.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace firstlight {

struct Tape {
    std::vector<std::function<void()>> calls;
    bool is_whole = true;  // running it does all that was done in the recording

    void run() const {
        for (const auto& call : calls) call();
    }
};

inline thread_local Tape* recorder = nullptr;  // the tape that hears this thread's calls

// Makes a call, and notes it where somebody listens; what it points to must outlive the tape.
template <class Call>
auto perform(Call call) {
    if (recorder) recorder->calls.emplace_back(call);
    return call();
}

}  // namespace firstlight
