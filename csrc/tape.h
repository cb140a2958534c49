// Calls in their order, to be made later or again: what a layer of a prefill and the replay of a decode pass consist of.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace firstlight {

using Clock = std::chrono::steady_clock;

// Calls whoever drives a tape away from it: by itself at some time, or when any thread rings it before.
struct Bell {
    std::atomic<Clock::duration> until{};

    void after(double seconds) {
        const std::chrono::duration<double> wait(std::min(seconds, 1e9));  // what is forever in seconds is no number of ticks
        until = Clock::now().time_since_epoch() + std::chrono::duration_cast<Clock::duration>(wait);
    }
    void ring() { until = Clock::duration{}; }
};

// Addresses among a call's operands are of this type, and no other number is. What its function holds never moves.
using Address = uintptr_t;

// What lies elsewhere when a call is made again, and where.
struct Moves {
    std::unordered_map<Address, Address> to;

    Address operator()(Address a) const {
        const auto found = to.find(a);
        return found == to.end() ? a : found->second;
    }
    template <class T>
    const T& operator()(const T& operand) const {
        return operand;
    }
};

struct Call {
    virtual ~Call() = default;
    virtual void make() const = 0;
    virtual std::shared_ptr<const Call> moved(const Moves& moves) const = 0;  // the same with other addresses
};

template <class Function, class... Operands>
struct CallOf final : Call {
    Function function;
    std::tuple<Operands...> operands;

    CallOf(Function f, std::tuple<Operands...> o) : function(std::move(f)), operands(std::move(o)) {}
    void make() const override { std::apply(function, operands); }
    std::shared_ptr<const Call> moved(const Moves& moves) const override {
        const auto move = [&](const Operands&... each) { return std::tuple<Operands...>(moves(each)...); };
        return std::make_shared<CallOf>(function, std::apply(move, operands));
    }
};

constexpr std::chrono::milliseconds between_looks{50};

struct Tape {
    std::vector<std::shared_ptr<const Call>> calls;
    bool is_whole = true;  // running it does all that was done in the recording
    bool holds = false;    // what it hears isn't done before it is run

    void run(size_t begin, size_t end) const {
        for (size_t i = begin; i < end && i < calls.size(); ++i) calls[i]->make();
    }

    template <class Function, class... Operands>
    void note(Function function, Operands... operands) {
        calls.push_back(std::make_shared<CallOf<Function, Operands...>>(std::move(function), std::tuple(operands...)));
    }

    // Calls [begin, end) of a tape, afterwards, with new addresses for old ones: once for each set of new ones.
    void repeat(const Tape& tape, size_t begin, size_t end, const std::vector<Address>& old, const std::vector<std::vector<Address>>& sets) {
        for (const std::vector<Address>& fresh : sets) {
            Moves moves;
            for (size_t i = 0; i < old.size(); ++i) moves.to[old[i]] = fresh[i];
            for (size_t i = begin; i < end; ++i) calls.push_back(tape.calls[i]->moved(moves));
        }
    }

    // Calls from `begin` up to each of these ends, till the bell rings: the seconds that each stretch took. One at least.
    // `look` is called now and then between two of them, and may throw.
    template <class Look>
    std::vector<double> timed(size_t begin, const std::vector<size_t>& ends, const Bell& bell, Look look) const {
        std::vector<double> seconds;
        auto before = Clock::now(), looked = before;
        for (const size_t end : ends) {
            run(begin, end);
            const auto now = Clock::now();
            seconds.push_back(std::chrono::duration<double>(now - before).count());
            if (now.time_since_epoch() >= bell.until.load()) break;
            if (now - looked >= between_looks) look(), looked = now;
            begin = end, before = now;
        }
        return seconds;
    }
};

inline thread_local Tape* recorder = nullptr;  // the tape that hears this thread's calls

// Makes a call, and notes it where somebody listens; what it points to must outlive the tape. 0 where it is only noted.
template <class Function, class... Operands>
auto perform(Function function, Operands... operands) {
    using Made = decltype(function(operands...));
    if (recorder) recorder->note(function, operands...);
    return recorder && recorder->holds ? Made() : function(operands...);
}

}  // namespace firstlight
