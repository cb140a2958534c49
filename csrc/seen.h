// What the rows of a tile see of a view: a plan's lists and band, causality, windows and hidden entries as masks, a block
// at a time.
#pragma once

#include <algorithm>

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

class Seen {
  public:
    Seen(const AttnArgs& call, const Tile& tile)
        : call_(call), tile_(tile), view_(*(const View*)(call.views + tile.b * stride(call))) {
        const int64_t* lengths = call.views + tile.b * stride(call) + VIEW_FIELDS;
        length_ = std::min(lengths[tile.kv], view_.num_blocks * BLOCK);
        if (view_.tok) tok_ = view_.tok + tile.kv * view_.tok_stride, pos_ = view_.pos + tile.kv * view_.tok_stride;
        if (view_.visible) visible_ = view_.visible + tile.kv * view_.visible_stride;
        const int64_t* rows = call.tok + tile.lo;
        first_ = rows[0], last_ = rows[tile.hi - tile.lo - 1];
        if (const PlanLists* plan = call.plan) {
            sink_ = plan->band[2 * tile.list], window_ = plan->band[2 * tile.list + 1];
            planned_ = window_ != -1;
            if (plan->blk_ptr) blk_ = plan->blk_idx + plan->blk_ptr[tile.list], blk_end_ = plan->blk_idx + plan->blk_ptr[tile.list + 1];
            if (plan->col_ptr) col_ = plan->col_idx + plan->col_ptr[tile.list], col_end_ = plan->col_idx + plan->col_ptr[tile.list + 1];
        }
        plain_ = !planned_ && !view_.tok && !view_.visible && !call.model_window;
    }

    static int64_t stride(const AttnArgs& call) { return VIEW_FIELDS + call.num_kv_heads; }

    int num_blocks() const {
        const int64_t n = view_.tok ? length_ : std::min(length_, last_ + 1);
        return (int)((n + BLOCK - 1) / BLOCK);
    }
    int32_t block(int n) const { return view_.table[tile_.kv * view_.table_stride + n]; }

    // Which entries of block n each row (token) of the tile sees; bit = entry. Returns the rows' union and intersection.
    struct Sum {
        uint64_t any, every;
    };
    Sum rows(int n, uint64_t* mask) {
        const int64_t base = (int64_t)n * BLOCK;
        const int count = tile_.hi - tile_.lo;
        if (plain_ && base + BLOCK - 1 <= first_) return {~0ull, ~0ull};
        uint64_t exists = below(length_ - base);
        if (visible_) exists &= bytes(base);
        const uint64_t listed = planned_ ? lists(base) : 0;
        Sum sum{0, ~0ull};
        for (int i = 0; i < count; ++i) {
            const int64_t tok = call_.tok[tile_.lo + i], pos = call_.pos[tile_.lo + i];
            uint64_t m = exists & causal(base, tok);
            if (call_.model_window) m &= within(base, pos, call_.model_window);
            if (planned_) m &= listed | below(sink_ - base) | (window_ > 0 ? within(base, pos, window_) : 0);
            mask[i] = m, sum.any |= m, sum.every &= m;
        }
        return sum;
    }

  private:
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
        if (blk_) {
            const int64_t size = call_.plan->blk;
            for (const int32_t* i = std::lower_bound(blk_, blk_end_, (int32_t)(base / size)); i != blk_end_ && *i * size < base + BLOCK; ++i)
                m |= below((*i + 1) * size - base) & ~below(*i * size - base);
        }
        if (col_)
            for (const int32_t* i = std::lower_bound(col_, col_end_, (int32_t)base); i != col_end_ && *i < base + BLOCK; ++i)
                m |= 1ull << (*i - base);
        return m;
    }

    const AttnArgs& call_;
    const Tile& tile_;
    const View& view_;
    int64_t length_ = 0, first_ = 0, last_ = 0, sink_ = 0, window_ = 0;
    const int64_t *tok_ = nullptr, *pos_ = nullptr;
    const uint8_t* visible_ = nullptr;
    const int32_t *blk_ = nullptr, *blk_end_ = nullptr, *col_ = nullptr, *col_end_ = nullptr;
    bool planned_ = false, plain_ = false;
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
