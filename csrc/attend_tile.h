// One tile of attention: its rows against a split of the view, and the splits joined.
#pragma once

#include <cmath>
#include <vector>

#include "product.h"
#include "scratch.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

constexpr float LOWEST = -1e30f;  // stands for -inf where a difference is taken
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

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
          in_place_(seen_.num_blocks()), words_(E::words(dim_)),
          log2_scale_(call.scale * LOG2E) {
        s.reserve(rows_, dim_);
        for (int i = 0; i < rows_; ++i) {
            const int row = tile.lo + i / tile.group, head = tile.head + i % tile.group;
            E::take((const scalar*)call.q + row * call.q_row + head * call.q_head, dim_, &s.q[(size_t)i * dim_], s.q_rows, i);
        }
    }
    // Blocks that lie in the view come in splits of their own, before those that were gathered.
    int num_splits() const { return splits_in_place() + splits_of((int)(s_.walk.columns.size() + BLOCK - 1) / BLOCK); }

    // Which blocks of split n are seen at all: K, V, masks; how many.
    int find(int n) {
        const int first = splits_in_place(), columns = (int)s_.walk.columns.size();
        const int begin = (n < first ? n : n - first) * SPLIT_BLOCKS;
        return find(begin, std::min(begin + SPLIT_BLOCKS, n < first ? in_place_ : (columns + BLOCK - 1) / BLOCK), n < first);
    }
    int find(int begin, int end, bool in_place) {
        const int tokens = tile_.hi - tile_.lo, columns = (int)s_.walk.columns.size();
        int active = 0;
        for (int i = begin; i < end; ++i) {
            uint64_t* mask = &s_.mask[(size_t)active * tokens];
            const int b = in_place ? seen_.nth(i) : i;
            const Seen::Sum sum = in_place ? seen_.rows(b, mask) : seen_.columns(&s_.walk.columns[(size_t)i * BLOCK], std::min(BLOCK, columns - i * BLOCK), mask);
            if (!sum.any) continue;
            number_[active] = b;
            full_[active] = sum.every == ~0ull;
            if (in_place) {
                const ptrdiff_t at = seen_.block(b) * words_;
                keys_[active] = (const uint32_t*)call_.k + at, values_[active] = (const uint32_t*)call_.v + at;
            } else {
                keys_[active] = s_.gathered.block(call_, tile_, s_.walk, i), values_[active] = keys_[active] + words_;
            }
            s_.shares.set(active * BLOCK, values_[active], dim_);
            ++active;
        }
        return active;
    }

    // Scores of split n for the blocks that are seen at all, -inf where a row does not see; how many blocks.
    int scores(int n) { return score(find(n)); }
    int score(int active) {
        const int tokens = tile_.hi - tile_.lo;
        for (int j = 0; j < active; ++j) {
            const auto* k = (const typename Query::weight*)keys_[j];
            product<Query>(rows_, BLOCK, s_.q.data(), dim_, 0, &k, 1, dim_ / Query::PAIR, E::scores(&s_.score[j * BLOCK], keys_[j], dim_, s_.q_rows));
            if (call_.cap > 0) cap(j * BLOCK);
            if (full_[j]) {
                visible_ += (int64_t)rows_ * BLOCK;
                continue;
            }
            for (int i = 0; i < rows_; ++i) {
                const uint64_t m = s_.mask[(size_t)j * tokens + i / tile_.group];
                visible_ += __builtin_popcountll(m);
                float* score = &s_.score[(size_t)i * SPLIT + j * BLOCK];
                for (int e = 0; e < BLOCK; ++e) score[e] = m >> e & 1 ? score[e] : -INFINITY;
            }
        }
        return active;
    }

    // Soft cap on a block's scores, which `scale` has not multiplied yet.
    void cap(int at) {
        const vf zero = {}, one = all(1.0f), limit = all(call_.cap / call_.scale);
        const vf steep = all(2 * LOG2E * call_.scale / call_.cap);
        for (int i = 0; i < rows_; ++i) {
            float* score = &s_.score[(size_t)i * SPLIT + at];
            for (int e = 0; e < BLOCK; e += W) {
                const vf x = load(score + e), size = max(x, -x);
                const vf small = exp2<5>(-(size * steep)), tanh = (one - small) / (one + small) * limit;
                store(score + e, x < zero ? -tanh : tanh);
            }
        }
    }

    // Softmax of split n and its product with V: part [rows, D], top and total [rows]; false if nobody sees anything.
    bool reduce(int n, float* part, float* top, float* total) {
        const int active = scores(n);
        if (!active) return false;
        for (int i = 0; i < rows_; ++i) total[i] = weigh<false>(i, active, top[i]);
        multiply(active, part);
        return true;
    }

    // The split's weights over `count` blocks, in the scores' place, times V.
    void multiply(int count, float* part) {
        constexpr ptrdiff_t each = sizeof(typename Weight::scalar), stride = SPLIT * (ptrdiff_t)sizeof(float) / each;
        const typename Weight::weight* v[SPLIT_BLOCKS];
        for (int n = 0; n < count; ++n) v[n] = (const typename Weight::weight*)values_[n];
        const auto times = [&](int first, int blocks, const auto& out) {
            product<Weight>(rows_, dim_, (const typename Weight::scalar*)s_.score.data() + first * BLOCK, stride, BLOCK, v + first, blocks, BLOCK / Weight::PAIR, out);
        };
        if constexpr (E::BY_BLOCK) {
            times(0, 1, Added<true>{part, dim_, s_.worth.data()});
            for (int n = 1; n < count; ++n) times(n, 1, Added<false>{part, dim_, &s_.worth[n]});
        } else {
            times(0, count, Stored{part, dim_});
        }
    }

    // The same where rows skip blocks whose scores lie far below what they have seen: the blocks at [begin, end) of the
    // walk. What a row skips has the weight 0 and changes no bit, so what all of them skip is left out.
    bool reduce_kept(int begin, int end, bool descending, float* part, float* top, float* total) {
        const int active = score(find(begin, end, true));
        for (int n = 0; n < active; ++n) vote(descending ? active - 1 - n : n);
        int count = 0;
        for (int j = 0; j < active; ++j) {
            const uint8_t* kept = &s_.kept[(size_t)j * rows_];
            if (!std::memchr(kept, 1, rows_)) continue;
            values_[count] = values_[j];
            place_[count++] = j;
        }
        if (!count) return false;
        for (int i = 0; i < rows_; ++i) total[i] = weigh<true>(i, count, top[i]);
        multiply(count, part);
        return true;
    }

    // Which rows keep block j.
    void vote(int j) {
        const int tokens = tile_.hi - tile_.lo;
        for (int i = 0; i < rows_; ++i) {
            const float* score = &s_.score[(size_t)i * SPLIT + j * BLOCK];
            vf most = load(score);
            for (int e = W; e < BLOCK; e += W) most = max(most, load(score + e));
            const float high = highest_fast(most);
            const bool keep = high > -INFINITY && !(high - s_.best[i] < s_.below[i]);  // never -inf minus -inf
            s_.kept[(size_t)j * rows_ + i] = keep;
            s_.best[i] = std::max(s_.best[i], high);
            if (!keep) visible_ -= full_[j] ? BLOCK : __builtin_popcountll(s_.mask[(size_t)j * tokens + i / tile_.group]);
        }
    }

    // Weights of row i over `count` blocks, side by side, in powers of two from `top` on; their sum. If SKIPS, over those
    // that the row keeps. Where each block's have a top of their own, `worth` says what that is beside the row's.
    template <bool SKIPS>
    float weigh(int i, int count, float& top) {
        float* score = &s_.score[(size_t)i * SPLIT];
        float* worth = &s_.worth[(size_t)i * TOPS];
        const vf scale = all(log2_scale_), none = {};
        const auto place = [&](int n) { return SKIPS ? place_[n] * BLOCK : n * BLOCK; };
        const auto keeps = [&](int n) { return !SKIPS || s_.kept[(size_t)place_[n] * rows_ + i]; };
        float tops[TOPS];
        vf high = all(LOWEST);
        for (int n = 0; n < count; ++n) {
            for (int at = place(n), e = at; keeps(n) && e < at + BLOCK; e += W) high = max(high, E::level(load(score + e), scale, s_.shares, e));
            if constexpr (E::BY_BLOCK) tops[n] = highest_fast(high), high = all(LOWEST);
        }
        if constexpr (E::BY_BLOCK) {
            std::fill(tops + count, tops + TOPS, LOWEST);
            for (int n = 0; n < TOPS; n += W) high = max(high, load(tops + n));
            for (int n = 0; n < TOPS; n += W) store(worth + n, exp2<5>(load(tops + n) - all(highest_fast(high))));
        }
        top = E::top(highest_fast(high), log2_scale_);
        auto* weight = (typename Weight::scalar*)score;  // in place: never ahead of what is read
        vf mass = {};
        for (int n = 0; n < count; ++n) {
            const vf shift = all(-(E::BY_BLOCK ? E::top(tops[n], log2_scale_) : top));
            vf part = {};
            for (int at = place(n), e = 0; e < BLOCK; e += W)
                E::narrow(weight + n * BLOCK + e, keeps(n) ? E::weight(load(score + at + e), scale, shift, s_.shares, at + e, E::BY_BLOCK ? part : mass) : none);
            if constexpr (E::BY_BLOCK) mass = fma(part, all(worth[n]), mass);
        }
        return sum(mass);
    }

    // Join a split onto what the splits before it gave.
    void join(const float* part, const float* top, const float* total) {
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

    void begin() {
        std::fill_n(s_.top.begin(), rows_, LOWEST);
        std::fill_n(s_.total.begin(), rows_, 0.0f);
        std::fill_n(s_.out.begin(), (size_t)rows_ * dim_, 0.0f);
    }

    // Divide, and write out and log-sum-exp; `lse2` [N, Hq] gets it in base 2 for probe sums, if given.
    void finish(float* lse2) {
        for (int i = 0; i < rows_; ++i) {
            const int row = tile_.lo + i / tile_.group, head = tile_.head + i % tile_.group;
            const bool empty = s_.total[i] == 0;
            float* row_out = &s_.out[(size_t)i * dim_];
            const vf share = all(empty ? 0.0f : E::finish(row_out, dim_) / s_.total[i]);
            scalar* out = (scalar*)call_.out + row * call_.out_row + head * call_.out_head;
            for (int d = 0; d < dim_; d += W) T::narrow(out + d, load(row_out + d) * share);
            const float lse = empty ? -INFINITY : s_.top[i] + std::log2(s_.total[i]);
            if (call_.lse) call_.lse[row * call_.num_heads + head] = lse * LN2;
            if (lse2) lse2[row * call_.num_heads + head] = lse;
        }
    }

    void whole(float* lse2) {
        begin();
        std::vector<float>& top = tops_;
        top.resize(2 * (size_t)rows_);
        if (call_.plan && call_.plan->skip_log) {
            in_scan_order([&](int begin, int end, bool descending) {
                if (reduce_kept(begin, end, descending, s_.part.data(), top.data(), top.data() + rows_)) join(s_.part.data(), top.data(), top.data() + rows_);
            });
        } else {
            for (int n = 0; n < num_splits(); ++n)
                if (reduce(n, s_.part.data(), top.data(), top.data() + rows_)) join(s_.part.data(), top.data(), top.data() + rows_);
        }
        finish(lse2);
    }

    // take(begin, end, whether backwards) for the splits of the walk in the order in which rows skip.
    template <class Take>
    void in_scan_order(Take take) {
        std::fill_n(s_.best.begin(), rows_, -INFINITY);
        for (int i = 0; i < rows_; ++i)
            s_.below[i] = call_.plan->skip_log[tile_.b * call_.num_heads + tile_.head + i % tile_.group] / call_.scale;
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
        const int active = scores(n);
        for (int i = 0; i < rows_; ++i) {
            const int row = tile_.lo + i / tile_.group, head = tile_.head + i % tile_.group;
            const float lse = lse2[row * call_.num_heads + head];
            if (call_.tok[row] < first || lse == -INFINITY) continue;
            for (int j = 0; j < active; ++j) add(&s_.score[(size_t)i * SPLIT + j * BLOCK], lse, sums, number_[j], length);
        }
    }

    int64_t visible() const { return visible_; }

  private:
    static int splits_of(int blocks) { return (blocks + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS; }
    int splits_in_place() const { return splits_of(in_place_); }
    void add(const float* score, float lse, float* sums, int block, int64_t length) {
        float mass[BLOCK];
        for (int e = 0; e < BLOCK; e += W) store(mass + e, exp2<5>(fma(load(score + e), all(log2_scale_), all(-lse))));
        const int64_t base = (int64_t)block * BLOCK, n = std::min<int64_t>(BLOCK, length - base);
        for (int64_t e = 0; e < n; ++e) sums[base + e] += mass[e];
    }

    const AttnArgs& call_;
    const Tile& tile_;
    Seen seen_;
    Scratch<E>& s_;
    const int dim_, rows_, in_place_;
    const ptrdiff_t words_;
    const float log2_scale_;
    const uint32_t *keys_[SPLIT_BLOCKS], *values_[SPLIT_BLOCKS];
    int number_[SPLIT_BLOCKS], place_[SPLIT_BLOCKS];
    bool full_[SPLIT_BLOCKS];
    std::vector<float> tops_;
    int64_t visible_ = 0;
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
