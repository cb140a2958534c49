// What the rows of a tile see of a view: a plan's lists and band, causality, windows and hidden entries as masks, a block
// at a time.
#pragma once

#include <algorithm>
#include <iterator>
#include <vector>

#include "attention.h"
#include "vec.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

inline uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

// Query heads [head, head + group) of KV head `kv` for rows [lo, hi) of request b: they share one list.
struct Tile {
    int b, kv, head, group, lo, hi;
    int64_t list;  // CSR row of the plan
    int rows() const { return (hi - lo) * group; }
};

inline const View& view_of(const AttnArgs& call, const Tile& tile) {
    return *(const View*)(call.views + tile.b * (VIEW_FIELDS + call.num_kv_heads));
}
inline int64_t length_of(const AttnArgs& call, const Tile& tile) {
    const View& view = view_of(call, tile);
    return std::min((&call.views[tile.b * (VIEW_FIELDS + call.num_kv_heads) + VIEW_FIELDS])[tile.kv], view.num_blocks * BLOCK);
}

// A stretch of a CSR row.
struct Span {
    const int32_t *begin = nullptr, *end = nullptr;
    Span() = default;
    Span(const std::vector<int32_t>& v) : begin(v.data()), end(v.data() + v.size()) {}
    Span(const int32_t* ptr, const int32_t* idx, int64_t row) {
        if (ptr) begin = idx + ptr[row], end = idx + ptr[row + 1];
    }
    bool empty() const { return begin == end; }
};

// What a plan's tile reads and in which order: blocks of the view that its list, sink or window touch, then the columns
// of blocks that hold few of them, gathered. It follows from the list and the tile's ordinals, never from the rows that
// happen to be in the call, but for where its columns end, so the parts that a row's sums are made of are its own.
class Walk {
  public:
    bool every = true;             // every block of the view; `blocks` isn't filled
    std::vector<int32_t> blocks;   // ascending
    std::vector<int32_t> columns;  // ascending
    Span places;                   // columns that are read where they lie

    // For rows up to `last`. `by_number`: every block by its number and all columns where they lie, which is what probe sums
    // are added up by.
    void begin(const AttnArgs& call, const Tile& tile, int last, bool by_number = false) {
        blocks.clear(), columns.clear(), kept_.clear();
        every = true, places = {};
        if (!call.plan || call.plan->band[2 * tile.list + 1] == -1) return;
        const PlanLists& plan = *call.plan;
        const View& view = view_of(call, tile);
        const int64_t length = length_of(call, tile);
        const Span listed(plan.blk_ptr, plan.blk_idx, tile.list);
        places = Span(plan.col_ptr, plan.col_idx, tile.list);
        const int64_t start = call.tok[tile.lo] / plan.q_tile * plan.q_tile, sink = plan.band[2 * tile.list], window = plan.band[2 * tile.list + 1];
        if (by_number) return;
        if (!call.model_window && !plan.skip_log && !places.empty()) {
            const int64_t* tok = view.tok ? view.tok + tile.kv * view.tok_stride : nullptr;
            const int64_t reached = tok ? std::upper_bound(tok, tok + length, call.tok[last]) - tok : std::min(length, call.tok[last] + 1);
            part(listed, plan.blk, sink, reached, view.visible ? view.visible + tile.kv * view.visible_stride : nullptr);
            places = kept_;
        }
        every = window > 0 && view.tok;  // positions that follow no order: look at every block
        if (every) return;
        const int64_t count = (length + BLOCK - 1) / BLOCK;
        const auto add = [&](int64_t first, int64_t end) {
            for (int64_t b = std::max(first, blocks.empty() ? 0 : (int64_t)blocks.back() + 1); b < std::min(end, count); ++b) blocks.push_back((int32_t)b);
        };
        add(0, (sink + BLOCK - 1) / BLOCK);
        const int64_t near = window > 0 ? std::max<int64_t>(0, start - window + 1) / BLOCK : count;
        const int32_t *i = listed.begin, *j = places.begin;
        for (;;) {  // lists are ascending: take whichever comes first, up to where the window begins
            const int64_t block = i == listed.end ? count : *i * plan.blk / BLOCK, column = j == places.end ? count : *j / BLOCK;
            if (std::min(block, column) >= near) break;
            if (block <= column) add(block, std::min(near, (*i++ * plan.blk + plan.blk + BLOCK - 1) / BLOCK));
            else add(column, column + 1), ++j;
        }
        if (window > 0) add(near, (start + plan.q_tile + BLOCK - 1) / BLOCK);
    }

  private:
    static constexpr int MANY = BLOCK * 3 / 4;  // columns of a block from which on it is read as a whole

    // Columns that nothing else covers are gathered, as far as they are reached and seen, unless a list has many of a block:
    // the list alone decides, since a row's sums must not hang on who is in the call.
    void part(Span listed, int64_t blk, int64_t sink, int64_t reached, const uint8_t* visible) {
        if (listed.empty() && !visible && !has_many(reached)) {  // no need to look at each
            columns.assign(std::lower_bound(places.begin, places.end, sink), std::lower_bound(places.begin, places.end, std::max(sink, reached)));
            return;
        }
        const int32_t *i = listed.begin, *c = places.begin;
        while (c != places.end && *c / BLOCK * BLOCK < reached) {
            const int64_t block = *c / BLOCK;
            const size_t kept = kept_.size();
            for (; c != places.end && *c / BLOCK == block; ++c) {
                while (i != listed.end && (*i + 1) * blk <= *c) ++i;
                const bool covered = *c < sink || (i != listed.end && *i * blk <= *c);
                if (!covered) kept_.push_back(*c);
            }
            if (kept_.size() - kept >= (size_t)MANY) continue;
            const auto first = kept_.begin() + kept, last = std::lower_bound(first, kept_.end(), reached);
            std::copy_if(first, last, std::back_inserter(columns), [=](int32_t entry) { return !visible || visible[entry]; });
            kept_.resize(kept);
        }
    }

    // Whether a block that begins before `reached` has many.
    bool has_many(int64_t reached) const {
        const int32_t* end = std::lower_bound(places.begin, places.end, (reached + BLOCK - 1) / BLOCK * BLOCK);
        int found = 0;
        for (const int32_t* c = places.begin; c + MANY <= end; ++c) found |= (c[0] ^ c[MANY - 1]) < BLOCK;
        return found;
    }

    std::vector<int32_t> kept_;
};

class Seen {
  public:
    Seen(const AttnArgs& call, const Tile& tile, const Walk& walk)
        : call_(call), tile_(tile), walk_(walk), view_(view_of(call, tile)), length_(length_of(call, tile)) {
        if (view_.tok) tok_ = view_.tok + tile.kv * view_.tok_stride, pos_ = view_.pos + tile.kv * view_.tok_stride;
        if (view_.visible) visible_ = view_.visible + tile.kv * view_.visible_stride;
        first_ = call.tok[tile.lo], last_ = call.tok[tile.hi - 1];
        far_ = *std::max_element(call.pos + tile.lo, call.pos + tile.hi);
        if (const PlanLists* plan = call.plan) {
            sink_ = plan->band[2 * tile.list], window_ = plan->band[2 * tile.list + 1];
            planned_ = window_ != -1;
            if (planned_) blk_ = Span(plan->blk_ptr, plan->blk_idx, tile.list);
        }
    }

    // Blocks that the tile's rows can reach.
    int num_blocks() const {
        const int64_t n = tok_ ? std::upper_bound(tok_, tok_ + length_, last_) - tok_ : std::min(length_, last_ + 1);
        const int count = (int)((n + BLOCK - 1) / BLOCK);
        return walk_.every ? count : (int)(std::lower_bound(walk_.blocks.begin(), walk_.blocks.end(), count) - walk_.blocks.begin());
    }
    // Which block of the view comes n-th, and where it lies.
    int nth(int n) const { return walk_.every ? n : walk_.blocks[n]; }
    int32_t block(int b) const { return view_.table[tile_.kv * view_.table_stride + b]; }

    // Which entries of block n each row (token) of the tile sees; bit = entry. Returns the rows' union and intersection.
    struct Sum {
        uint64_t any, every;
    };
    Sum rows(int n, uint64_t* mask) {
        const int64_t base = (int64_t)n * BLOCK;
        const int count = tile_.hi - tile_.lo;
        uint64_t exists = below(length_ - base);
        if (visible_) exists &= bytes(base);
        const uint64_t listed = planned_ ? lists(base) | below(sink_ - base) : ~0ull;
        if (exists == ~0ull && reached(base)) {  // all of it, by everybody?
            const bool in_model = !call_.model_window || behind(base, call_.model_window);
            if (in_model && (listed == ~0ull || (window_ > 0 && behind(base, window_)))) return {~0ull, ~0ull};
        }
        Sum sum{0, ~0ull};
        for (int i = 0; i < count; ++i) {
            const int64_t tok = call_.tok[tile_.lo + i], pos = call_.pos[tile_.lo + i];
            uint64_t m = exists & causal(base, tok);
            if (call_.model_window) m &= within(base, pos, call_.model_window);
            if (planned_) m &= listed | (window_ > 0 ? within(base, pos, window_) : 0);
            mask[i] = m, sum.any |= m, sum.every &= m;
        }
        return sum;
    }

    // The same for `count` gathered columns: what a window covers is seen where it lies.
    Sum columns(const int32_t* at, int count, uint64_t* mask) {
        const auto tok_of = [this](int32_t entry) { return tok_ ? tok_[entry] : entry; };
        Sum sum{0, ~0ull};
        for (int i = 0, reached = tok_of(at[count - 1]) <= first_ ? count : 0; i < tile_.hi - tile_.lo; ++i) {
            const int64_t tok = call_.tok[tile_.lo + i], pos = call_.pos[tile_.lo + i];
            while (reached < count && tok_of(at[reached]) <= tok) ++reached;
            uint64_t m = below(reached);
            for (int j = 0; window_ > 0 && j < count; ++j)
                if (pos - (pos_ ? pos_[at[j]] : at[j]) < window_) m &= ~(1ull << j);
            mask[i] = m, sum.any |= m, sum.every &= m;
        }
        return sum;
    }

  private:
    // Whether every row comes after a whole block, and has all of it inside a window.
    bool reached(int64_t base) const { return (tok_ ? tok_[base + BLOCK - 1] : base + BLOCK - 1) <= first_; }
    bool behind(int64_t base, int64_t window) const {
        int64_t nearest = base;
        if (pos_) nearest = *std::min_element(pos_ + base, pos_ + base + BLOCK);
        return nearest > far_ - window;
    }

    uint64_t causal(int64_t base, int64_t tok) const {
        if (!tok_) return below(tok + 1 - base);
        const int64_t *begin = tok_ + base, *end = tok_ + std::min(base + BLOCK, length_);
        return below(std::upper_bound(begin, end, tok) - begin);
    }
    // entries at a distance less than `window` behind the row's position, or ahead of it
    uint64_t within(int64_t base, int64_t pos, int64_t window) const {
        if (!tok_) return ~below(pos - window + 1 - base);
        uint64_t m = 0;
        for (int64_t e = base; e < std::min(base + BLOCK, length_); ++e) m |= (uint64_t)(pos - pos_[e] < window) << (e - base);
        return m;
    }
    uint64_t bytes(int64_t base) const {
        uint64_t m = 0;
        for (int64_t e = base; e < std::min(base + BLOCK, length_); ++e) m |= (uint64_t)(visible_[e] != 0) << (e - base);
        return m;
    }
    uint64_t lists(int64_t base) {
        uint64_t m = 0;
        if (!blk_.empty()) {
            const int64_t size = call_.plan->blk;
            for (const int32_t* i = std::lower_bound(blk_.begin, blk_.end, (int32_t)(base / size)); i != blk_.end && *i * size < base + BLOCK; ++i)
                m |= below((*i + 1) * size - base) & ~below(*i * size - base);
        }
        const Span columns = walk_.places;
        if (!columns.empty())
            for (const int32_t* i = std::lower_bound(columns.begin, columns.end, (int32_t)base); i != columns.end && *i < base + BLOCK; ++i)
                m |= 1ull << (*i - base);
        return m;
    }

    const AttnArgs& call_;
    const Tile& tile_;
    const Walk& walk_;
    const View& view_;
    const int64_t length_;
    int64_t first_ = 0, last_ = 0, far_ = 0, sink_ = 0, window_ = 0;
    const int64_t *tok_ = nullptr, *pos_ = nullptr;
    const uint8_t* visible_ = nullptr;
    Span blk_;
    bool planned_ = false;
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
