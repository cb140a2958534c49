// A strip of a tile: as many rows as a tile of sums has, against the blocks of one split. Scores, their softmax, its
// product with V. Scores of a strip stay in the first-level cache.
//
// The softmax has two passes, so nothing is rescaled. The highest scores are found as products end; a block's exponentials
// run beside the product of the block before it with V, in the gaps that dot products leave.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "product.h"
#include "scratch.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

constexpr float LOWEST = -1e30f;  // stands for -inf where a difference is taken

// Blocks of a split that any row of a tile sees. `every`: all rows see all of it, and it has no masks.
struct Found {
    int count = 0, number[SPLIT_BLOCKS];
    const uint32_t *keys[SPLIT_BLOCKS], *values[SPLIT_BLOCKS];
    bool every[SPLIT_BLOCKS];
};

// Where levels of a block go: `to`, and the highest of each row by lanes, `high`.
template <class E>
struct Scored {
    typename E::Scores scores;
    float *to, *high;
    template <class Sums>
    void begin(Sums& sums, int row) const {
        scores.begin(sums, row);
    }
    template <class Sums>
    void put(Sums& sums, int row, int column) const {
        const Scored own = *this;  // a store might change what lies behind `this`
        vf top[Sums::MOST];
        for (int i = 0; i < Sums::MOST; ++i) top[i] = column ? load(own.high + i * W) : all(LOWEST);
        sums.each([&, row, column](int i, int j, auto sum) {
            const vf level = own.scores.of(sum, row + i, column + j * W);
            top[i] = max(top[i], level);
            store(own.to + (row + i) * SPLIT + column + j * W, level);
        });
        for (int i = 0; i < Sums::MOST; ++i) store(own.high + i * W, top[i]);
    }
};

template <class E>
class Strip {
  public:
    using Query = typename E::Query;
    using Weight = typename E::Weight;
    static constexpr int ROWS = STRIP<E>;
    static_assert(ROWS == HEIGHT<Weight, WIDTH<Weight>>);

    // Rows [first, first + ROWS) of the tile, or up to its end.
    Strip(const AttnArgs& call, const Tile& tile, const Found& found, Scratch<E>& s, int first)
        : call_(call), tile_(tile), found_(found), s_(s), first_(first), rows_(std::min(ROWS, tile.rows() - first)), dim_((int)call.head_dim),
          scale_(call.scale * LOG2E) {
        for (int j = 0; j < found.count; ++j) score(j);
    }

    int count() const { return count_; }
    int rows() const { return rows_; }
    int64_t visible() const { return visible_; }
    // A row's scores for the n-th block that the strip sees, [BLOCK], instead of its levels; the block's number.
    const float* scores(int row, int n) {
        const auto [found, place, first, width] = parts_[n];
        float* to = at(row, n);
        for (int e = width - W; e >= 0; e -= W) store(to + first + e, E::score(load(to + e), s_.shares, found * BLOCK + first + e));
        std::fill(to, to + first, -INFINITY), std::fill(to + first + width, to + BLOCK, -INFINITY);
        return to;
    }
    int number(int n) const { return found_.number[parts_[n].found]; }

    // Which rows keep a block and which skip it, its scores lying far below what they have seen: block by block, in the
    // order in which they look. What a row skips has the weight 0 and changes no bit, so what all of them skip is left out.
    void skip(bool descending) {
        for (int n = 0; n < count_; ++n) vote(descending ? count_ - 1 - n : n);
        int kept = 0;
        for (int n = 0; n < count_; ++n)
            if (std::memchr(&s_.kept[n * ROWS], 1, rows_)) parts_[kept++] = parts_[n];
        count_ = kept;
    }

    // Softmax and its product with V: part [rows, D], top and total [rows].
    template <bool SKIPS>
    void reduce(float* part, float* top, float* total) {
        if (!count_) {
            std::fill_n(part, rows_ * dim_, 0.0f), std::fill_n(top, rows_, LOWEST), std::fill_n(total, rows_, 0.0f);
            return;
        }
        for (int i = 0; i < rows_; ++i) top[i] = level<SKIPS>(i);
        Weights<SKIPS> weights(*this);
        weights.begin(0);
        weights.from(0);
        // Inlined by force, here and below: a call would put the sums into memory.
        const auto add = [&](auto& sums, int n, int row, int column) __attribute__((always_inline)) {
            const auto* weight = (const typename Weight::row*)&s_.score[row * SPLIT] + n * BLOCK;
            const auto* v = (const typename Weight::weight*)found_.values[parts_[n].found] + parts_[n].first * dim_ + column * Weight::PAIR;
            const ptrdiff_t stride = SPLIT * (sizeof(float) / sizeof *weight), step = dim_ * Weight::PAIR;
            const int groups = parts_[n].width / Weight::PAIR;
            const bool next = !column && n + 1 < count_, beside = std::remove_reference_t<decltype(sums)>::HAS_GAPS && rows_ == ROWS;
            if (next) weights.begin(n + 1);
            if (next && beside) sums.add(weight, stride, v, step, groups, [&](int64_t group) { weights.beside(group); });
            else sums.add(weight, stride, v, step, groups);
            if (next) weights.from(beside ? weights.num_beside(groups) : 0);
        };
        if constexpr (E::BY_BLOCK) {
            for (int n = 0; n < count_; ++n) {
                const auto one = [&](auto& sums, int row, int column) __attribute__((always_inline)) { add(sums, n, row, column); };
                if (n == 0) product<Weight>(rows_, dim_, Added<true>{part, dim_, s_.worth}, one);
                else product<Weight>(rows_, dim_, Added<false>{part, dim_, &s_.worth[n]}, one);
            }
        } else {
            product<Weight>(rows_, dim_, Stored{part, dim_}, [&](auto& sums, int row, int column) __attribute__((always_inline)) {
                for (int n = 0; n < count_; ++n) add(sums, n, row, column);
            });
        }
        for (int i = 0; i < rows_; ++i) total[i] = sum(load(&s_.mass[i * W]));
    }

  private:
    // Entries [first, first + width) of a block, all that rows of the strip see: which of those found, where scores are.
    struct Part {
        int found, place, first, width;
        int share() const { return found * BLOCK + first; }
    };

    float* at(int row, int n) { return &s_.score[row * SPLIT + parts_[n].place * BLOCK]; }
    float* high(int row, int place) { return &s_.high[(place * ROWS + row) * W]; }
    uint64_t mask(int row, int found) const {
        return found_.every[found] ? ~0ull : s_.mask[(size_t)found * (tile_.hi - tile_.lo) + (first_ + row) / tile_.group];
    }

    void score(int found) {
        uint64_t any = 0, every = ~0ull;
        for (int i = 0; i < rows_; ++i) {
            const uint64_t m = mask(i, found);
            any |= m, every &= m, visible_ += __builtin_popcountll(m);
        }
        if (!any) return;
        const int first = __builtin_ctzll(any) / W * W, width = (BLOCK - __builtin_clzll(any) + W - 1) / W * W - first, n = count_++;
        parts_[n] = {found, n, first, width};
        const auto* k = (const typename Query::weight*)found_.keys[found] + first * Query::PAIR;
        const auto scores = E::scores(found_.keys[found], dim_, first, s_.q_rows, first_, s_.shares, found * BLOCK + first);
        product<Query>(rows_, width, Scored<E>{scores, at(0, n), high(0, n)},
                       [&](auto& sums, int row, int column) __attribute__((always_inline)) {
                           sums.add(&s_.q[(size_t)(first_ + row) * dim_], dim_, k + column * Query::PAIR, BLOCK * Query::PAIR, dim_ / Query::PAIR);
                       });
        if (every != ~0ull || call_.cap > 0) revise(n);
    }

    // Soft cap on a block's scores, -inf where a row doesn't see.
    void revise(int n) {
        for (int i = 0; i < rows_; ++i) {
            const uint64_t m = mask(i, parts_[n].found) >> parts_[n].first;
            vf top = all(LOWEST);
            for (int e = 0; e < parts_[n].width; e += W) {
                const int share = parts_[n].share() + e;
                const vf x = load(at(i, n) + e), now = call_.cap > 0 ? E::level(capped(E::score(x, s_.shares, share)), s_.shares, share) : x;
                const vf level = where(m >> e, now, -INFINITY);
                top = max(top, level);
                store(at(i, n) + e, level);
            }
            store(high(i, n), top);
        }
    }
    vf capped(vf x) const {
        const float unit = E::unit(call_.scale);
        const vf size = max(x, -x), one = all(1.0f), limit = all(call_.cap / unit);
        const vf small = exp2<5>(-(size * all(2 * LOG2E * unit / call_.cap))), tanh = (one - small) / (one + small) * limit;
        return x < vf{} ? -tanh : tanh;
    }

    void vote(int n) {
        for (int i = 0; i < rows_; ++i) {
            vf most = all(-INFINITY);
            for (int e = 0; e < parts_[n].width; e += W) most = max(E::score(load(at(i, n) + e), s_.shares, parts_[n].share() + e), most);  // `most` if one is no number
            const float top = highest_fast(most);
            float& best = s_.best[first_ + i];
            const bool keep = top > -INFINITY && !(top - best < s_.below[first_ + i]);  // never -inf minus -inf
            s_.kept[n * ROWS + i] = keep;
            best = std::max(best, top);
            if (!keep) visible_ -= __builtin_popcountll(mask(i, parts_[n].found));
        }
    }

    bool keeps(int row, int n) const { return s_.kept[parts_[n].place * ROWS + row]; }

    // What row i's weights count from in powers of two: `shift` takes it off. Where each block's have a top of their own,
    // `worth` says what that is beside the row's.
    template <bool SKIPS>
    float level(int i) {
        vf tops[SPLIT_BLOCKS], most = all(LOWEST);
        for (int n = 0; n < SPLIT_BLOCKS; ++n) {
            tops[n] = n < count_ && (!SKIPS || keeps(i, n)) ? load(high(i, parts_[n].place)) : all(LOWEST);
            most = max(most, tops[n]);
        }
        const float highest = highest_fast(most), top = E::top(highest, scale_);
        if constexpr (E::BY_BLOCK) {
            constexpr int N = SPLIT_BLOCKS < W ? SPLIT_BLOCKS : W;
            for (int n = 0; n < SPLIT_BLOCKS; n += N) {
                const vf each = highest_each<N>(tops + n);
                const vf shift = E::shift(each);
                store(&shift_[i * TOPS + n], shift);
                store(&s_.worth[i * TOPS + n], E::worth(shift, top));
            }
        } else {
            shift_[i * TOPS] = -top;
        }
        store(&s_.mass[i * W], vf{});
        return top;
    }

    // A block's weights, side by side, in the place of scores: never ahead of those that are still to be read.
    template <bool SKIPS>
    class Weights {
      public:
        explicit Weights(Strip& strip) : strip_(strip) {}
        void begin(int n) {
            n_ = n, width_ = strip_.parts_[n].width, share_ = strip_.parts_[n].share();
            from_ = strip_.at(0, n), shift_ = &strip_.shift_[E::BY_BLOCK ? n : 0];
            to_ = (typename Weight::row*)&strip_.s_.score[0] + n * BLOCK;
        }
        // Called for each group of a product: a row every now and then, so that the last is done about when the product is.
        inline __attribute__((always_inline)) void beside(int64_t group) const {
            if (group % EVERY == EVERY - 1 && group < EVERY * ROWS) row((int)group / EVERY);
        }
        // Rows done beside so many groups.
        int num_beside(int groups) const { return std::min(groups / EVERY, ROWS); }
        void from(int row_number) const {
            for (int i = row_number; i < strip_.rows_; ++i) row(i);
        }

      private:
        static constexpr int EVERY = std::max(1, BLOCK / Weight::PAIR / ROWS);

        inline __attribute__((always_inline)) void row(int i) const {
            Scratch<E>& s = strip_.s_;
            const vf scale = all(strip_.scale_), shift = all(shift_[i * TOPS]);
            const int width = width_, share = share_;  // here, since bytes may be stored anywhere
            const float* from = from_ + i * SPLIT;
            auto* to = to_ + i * SPLIT * (sizeof(float) / sizeof *to_);
            float* mass = &s.mass[i * W];
            vf sum = E::BY_BLOCK ? vf{} : load(mass);
            if (SKIPS && !strip_.keeps(i, n_)) std::memset(to, 0, width * sizeof *to);
            else if (width == BLOCK) E::template weights<BLOCK / W>(from, to, scale, shift, s.shares, share, sum);
            else
                for (int e = 0; e < width; e += W) E::template weights<1>(from + e, to + e, scale, shift, s.shares, share + e, sum);
            store(mass, E::BY_BLOCK ? fma(sum, all(s.worth[i * TOPS + n_]), load(mass)) : sum);
        }

        Strip& strip_;
        int n_, width_, share_;
        const float *from_, *shift_;
        typename Weight::row* to_;
    };

    const AttnArgs& call_;
    const Tile& tile_;
    const Found& found_;
    Scratch<E>& s_;
    const int first_, rows_, dim_;
    const float scale_;  // of scores, in powers of two
    int count_ = 0;
    Part parts_[SPLIT_BLOCKS];
    float shift_[ROWS * TOPS];  // of each row, or of each of its blocks
    int64_t visible_ = 0;
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
