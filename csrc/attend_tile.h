// One tile of attention: its rows against a split of the view, and the splits joined.
#pragma once

#include <cmath>
#include <vector>

#include "strip.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

// Asks for a tile's rows of q, or for those of `out` to be written, before they are wanted: they lie apart, and nothing
// in the processor foresees them. Inlined by force: GCC leaves out calls of a function that does nothing else.
template <bool WRITES, class T>
inline __attribute__((always_inline)) void ask_for(const Tile& tile, const T* first, int64_t row_step, int64_t head_step, int64_t dim) {
    for (int row = tile.lo; row < tile.hi; ++row)
        for (int head = tile.head; head < tile.head + tile.group; ++head) {
            const T* from = first + row * row_step + head * head_step;
            for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(from + d, WRITES, 2);
        }
}

constexpr int64_t KEPT = 256 << 10;  // bytes of output up to which it stays in the caches for whoever reads it

template <class E>
class TileWork {
  public:
    using T = typename E::Model;
    using scalar = typename T::scalar;
    using Query = typename E::Query;
    using Weight = typename E::Weight;
    // `s.walk` is that of the tile's list.
    TileWork(const AttnArgs& call, const Tile& tile, Scratch<E>& s)
        : call_(call), tile_(tile), seen_(call, tile, s.walk), s_(s), dim_((int)call.head_dim), rows_(tile.rows()),
          in_place_(seen_.num_blocks()), past_caches_(goes_past(call)), words_(E::words(dim_)),
          log2_unit_(E::unit(call.scale) * LOG2E) {
        s.reserve(rows_, dim_);
        each_row([&](int i, int row, int head) {
            E::take((const scalar*)call.q + row * call.q_row + head * call.q_head, dim_, call.scale * LOG2E, &s.q[(size_t)i * dim_], s.q_rows, i);
        });
    }
    // Blocks that lie in the view come in splits of their own, before those that were gathered.
    int num_splits() const { return splits_in_place() + splits_of((int)(s_.walk.columns.size() + BLOCK - 1) / BLOCK); }

    // Softmax of split n and its product with V: part [rows, D], top and total [rows]; false if nobody sees anything.
    bool reduce(int n, float* part, float* top, float* total) {
        const Found found = find(n);
        for (int r = 0; r < rows_; r += STRIP<E>) {
            Strip<E> strip(call_, tile_, found, s_, r);
            strip.template reduce<false>(part + (size_t)r * dim_, top + r, total + r);
            visible_ += strip.visible();
        }
        return found.count > 0;
    }

    // The same of the blocks at [begin, end) of the walk where rows skip some.
    bool reduce_kept(int begin, int end, bool descending, float* part, float* top, float* total) {
        const Found found = find(begin, end, true);
        for (int r = 0; r < rows_; r += STRIP<E>) {
            Strip<E> strip(call_, tile_, found, s_, r);
            strip.skip(descending);
            strip.template reduce<true>(part + (size_t)r * dim_, top + r, total + r);
            visible_ += strip.visible();
        }
        return found.count > 0;
    }

    // Join a split onto what the splits before it gave.
    void join(const float* part, const float* top, const float* total) {
        if (is_empty_) {
            std::copy_n(part, (size_t)rows_ * dim_, s_.out.begin());
            std::copy_n(top, rows_, s_.top.begin()), std::copy_n(total, rows_, s_.total.begin());
            is_empty_ = false;
            return;
        }
        for (int i = 0; i < rows_; ++i) {
            const float high = std::max(s_.top[i], top[i]);
            const float a = exp2_one(s_.top[i] - high), b = exp2_one(top[i] - high);
            s_.top[i] = high;
            s_.total[i] = s_.total[i] * a + total[i] * b;
            float* out = &s_.out[(size_t)i * dim_];
            const float* add = part + (size_t)i * dim_;
            for (int d = 0; d < dim_; d += W) store(out + d, fma(load(out + d), all(a), load(add + d) * b));
        }
    }

    void begin() { is_empty_ = true; }

    // Divide, and write out and log-sum-exp; `lse2` [N, Hq] gets it in base 2 for probe sums, if given.
    void finish(float* lse2) {
        if (is_empty_) {
            std::fill_n(s_.total.begin(), rows_, 0.0f);
            std::fill_n(s_.out.begin(), (size_t)rows_ * dim_, 0.0f);
        }
        each_row([&](int i, int row, int head) {
            const bool empty = s_.total[i] == 0;
            float* row_out = &s_.out[(size_t)i * dim_];
            const vf share = all(empty ? 0.0f : E::finish(row_out, dim_) / s_.total[i]);
            scalar* out = (scalar*)call_.out + row * call_.out_row + head * call_.out_head;
            if (past_caches_)
                for (int d = 0; d < dim_; d += 2 * W) T::narrow_past(out + d, load(row_out + d) * share, load(row_out + d + W) * share);
            else
                for (int d = 0; d < dim_; d += W) T::narrow(out + d, load(row_out + d) * share);
            if (!call_.lse && !lse2) return;
            const float lse = empty ? -INFINITY : s_.top[i] + std::log2(s_.total[i]);
            if (call_.lse) call_.lse[row * call_.num_heads + head] = lse * LN2;
            if (lse2) lse2[row * call_.num_heads + head] = lse;
        });
    }

    void whole(float* lse2) {
        begin();
        if (!past_caches_) ask_for<true>(tile_, (const scalar*)call_.out, call_.out_row, call_.out_head, dim_);
        if (call_.plan && call_.plan->skip_log) {
            in_scan_order([&](int begin, int end, bool descending) {
                add([&](float* part, float* top, float* total) { return reduce_kept(begin, end, descending, part, top, total); });
            });
        } else {
            for (int n = 0; n < num_splits(); ++n)
                add([&](float* part, float* top, float* total) { return reduce(n, part, top, total); });
        }
        finish(lse2);
    }

    // take(begin, end, whether backwards) for the splits of the walk in the order in which rows skip.
    template <class Take>
    void in_scan_order(Take take) {
        std::fill_n(s_.best.begin(), rows_, -INFINITY);
        for (int i = 0; i < rows_; ++i)
            s_.below[i] = call_.plan->skip_log[tile_.b * call_.num_heads + tile_.head + i % tile_.group] / E::unit(call_.scale);
        const int splits = splits_in_place(), scan = (int)call_.plan->scan;
        const int alone = scan == 2 && in_place_ > 0 && seen_.nth(0) == 0;  // the sink's block, before all others
        if (alone) take(0, 1, false);
        for (int i = 0; i < splits; ++i) {
            const int n = scan ? splits - 1 - i : i, begin = n ? n * SPLIT_BLOCKS : alone;
            if (begin < in_place_) take(begin, std::min((n + 1) * SPLIT_BLOCKS, in_place_), scan != 0);
        }
    }

    // Add the softmax mass of rows from ordinal `first` on onto sums[entry], row by row, for split n.
    void probe(int n, int64_t first, const float* lse2, float* sums, int64_t length) {
        const Found found = find(n);
        for (int r = 0; r < rows_; r += STRIP<E>) {
            Strip<E> strip(call_, tile_, found, s_, r);
            for (int i = 0; i < strip.rows(); ++i) {
                const int row = tile_.lo + (r + i) / tile_.group, head = tile_.head + (r + i) % tile_.group;
                const float lse = lse2[row * call_.num_heads + head];
                if (call_.tok[row] < first || lse == -INFINITY) continue;
                for (int j = 0; j < strip.count(); ++j) add(strip.scores(i, j), lse, sums, strip.number(j), length);
            }
        }
    }

    int64_t visible() const { return visible_; }

  private:
    // take(i, row of the call, query head) for all rows i of the tile.
    template <class Take>
    void each_row(Take take) const {
        for (int row = tile_.lo, i = 0; row < tile_.hi; ++row)
            for (int head = tile_.head; head < tile_.head + tile_.group; ++head) take(i++, row, head);
    }

    // The split that `reduce` makes, if it makes one, onto those before it: the first is made where the sums are.
    template <class Reduce>
    void add(Reduce reduce) {
        if (is_empty_) is_empty_ = !reduce(s_.out.data(), s_.top.data(), s_.total.data());
        else if (reduce(s_.part.data(), s_.part_top.data(), s_.part_total.data())) join(s_.part.data(), s_.part_top.data(), s_.part_total.data());
    }

    // Which blocks of split n are seen at all.
    Found find(int n) {
        const int first = splits_in_place(), columns = (int)s_.walk.columns.size();
        const int begin = (n < first ? n : n - first) * SPLIT_BLOCKS;
        return find(begin, std::min(begin + SPLIT_BLOCKS, n < first ? in_place_ : (columns + BLOCK - 1) / BLOCK), n < first);
    }
    Found find(int begin, int end, bool in_place) {
        const int tokens = tile_.hi - tile_.lo, columns = (int)s_.walk.columns.size();
        Found found;
        for (int i = begin; i < end; ++i) {
            const int j = found.count, b = in_place ? seen_.nth(i) : i;
            uint64_t* mask = &s_.mask[(size_t)j * tokens];
            const Seen::Sum sum = in_place ? seen_.rows(b, mask) : seen_.columns(&s_.walk.columns[(size_t)i * BLOCK], std::min(BLOCK, columns - i * BLOCK), mask);
            if (!sum.any) continue;
            found.number[j] = b;
            found.every[j] = sum.every == ~0ull;
            if (in_place) {
                const ptrdiff_t at = seen_.block(b) * words_;
                found.keys[j] = (const uint32_t*)call_.k + at, found.values[j] = (const uint32_t*)call_.v + at;
            } else {
                found.keys[j] = s_.gathered.block(call_, tile_, s_.walk, i), found.values[j] = found.keys[j] + words_;
            }
            s_.shares.set(j * BLOCK, found.values[j], dim_);
            ++found.count;
        }
        return found;
    }

    static int splits_of(int blocks) { return (blocks + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS; }
    int splits_in_place() const { return splits_of(in_place_); }
    // Whether rows are written past the caches, which have better things to hold: there are many, in whole lines.
    static bool goes_past(const AttnArgs& call) {
        const int64_t row = call.num_heads * call.head_dim * sizeof(scalar), lines = call.out_row | call.out_head | call.head_dim;
        return sizeof(scalar) == 2 && call.row_ptr[call.num_requests] * row > KEPT && (lines * sizeof(scalar) | (uintptr_t)call.out) % 64 == 0;
    }
    void add(const float* score, float lse, float* sums, int block, int64_t length) {
        float mass[BLOCK];
        for (int e = 0; e < BLOCK; e += W) store(mass + e, exp2<5>(fma(load(score + e), all(log2_unit_), all(-lse))));
        const int64_t base = (int64_t)block * BLOCK, n = std::min<int64_t>(BLOCK, length - base);
        for (int64_t e = 0; e < n; ++e) sums[base + e] += mass[e];
    }

    const AttnArgs& call_;
    const Tile& tile_;
    Seen seen_;
    Scratch<E>& s_;
    const int dim_, rows_, in_place_;
    const bool past_caches_;
    const ptrdiff_t words_;
    const float log2_unit_;  // of a score
    bool is_empty_ = true;  // no split was joined yet
    int64_t visible_ = 0;
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
