// What a thread keeps while it works on tiles: copies of the columns that a list gathers, rows, scores, sums.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "entries.h"
#include "product.h"
#include "seen.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

// Memory from the start of a cache line on: 64 bytes of a row are one line, not parts of two.
template <class V>
struct OnLines {
    using value_type = V;
    OnLines() = default;
    template <class U>
    OnLines(const OnLines<U>&) {}
    V* allocate(size_t n) { return (V*)::operator new(n * sizeof(V), std::align_val_t(64)); }
    void deallocate(V* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const OnLines&) const { return true; }
    bool operator!=(const OnLines&) const { return false; }
};
template <class V>
using Lines = std::vector<V, OnLines<V>>;

// Columns of a walk as blocks of their own, copied when they are first asked for. They stay for other walks of the same
// call: tiles of a head often have a list in common, but for where it ends.
template <class E>
class Gathered {
  public:
    // A call begins: what lies in K and V may have changed.
    void begin() {
        for (Copies& head : heads_) head.held.clear();
    }

    // Block n of the columns: K, then V.
    const uint32_t* block(const AttnArgs& call, const Tile& tile, const Walk& walk, int n) {
        const size_t each = 2 * E::words(call.head_dim), all = (walk.columns.size() + BLOCK - 1) / BLOCK;
        const size_t group = call.num_heads / call.num_kv_heads;
        if (heads_.size() < group) heads_.resize(group);
        Copies& own = heads_[tile.head % group];
        if (own.held.size() < all) own.held.resize(all), own.columns.resize(all * BLOCK);  // for all at once: a tile keeps addresses
        if (own.store.size() < all * each) own.store.resize(all * each);
        const Held wanted{&view_of(call, tile), tile.kv, std::min(BLOCK, (int)walk.columns.size() - n * BLOCK)};
        const int32_t* columns = &walk.columns[(size_t)n * BLOCK];
        uint32_t* to = &own.store[n * each];
        if (!own.held[n].has(wanted) || !std::equal(columns, columns + wanted.count, &own.columns[(size_t)n * BLOCK])) {
            copy(call, tile, columns, wanted.count, to);
            std::copy_n(columns, wanted.count, &own.columns[(size_t)n * BLOCK]);
            own.held[n] = wanted;
        }
        return to;
    }

  private:
    // A word is what a dot-product step takes: PAIR scalars, of one entry in K, of as many entries in V. Behind them
    // there may be rows of words for the entries themselves.
    static void copy(const AttnArgs& call, const Tile& tile, const int32_t* columns, int count, uint32_t* to) {
        constexpr int P = E::Weight::PAIR, BITS = 32 / P;
        const ptrdiff_t groups = call.head_dim / P, words = E::words(call.head_dim);
        const View& view = view_of(call, tile);
        const uint32_t *k[BLOCK], *v[BLOCK], *behind[BLOCK];
        int shift[BLOCK];
        for (int j = 0; j < BLOCK; ++j) {
            const int32_t c = columns[j < count ? j : 0];
            const int place = c % BLOCK;
            const ptrdiff_t at = view.table[tile.kv * view.table_stride + c / BLOCK] * words;
            k[j] = (const uint32_t*)call.k + at + place, v[j] = (const uint32_t*)call.v + at + place / P * call.head_dim;
            behind[j] = (const uint32_t*)call.v + at + place;
            shift[j] = place % P * BITS;
        }
        const auto rows = [](const uint32_t* const* from, ptrdiff_t first, ptrdiff_t end, uint32_t* out) {
            for (ptrdiff_t g = first; g < end; ++g)
                for (int j = 0; j < BLOCK; ++j) out[g * BLOCK + j] = from[j][g * BLOCK];
        };
        rows(k, 0, words / BLOCK, to);
        rows(behind, groups, words / BLOCK, to + words);
        constexpr uint32_t ONE = (uint32_t)((1ull << BITS) - 1);
        for (int j = 0; j < BLOCK; j += P) {
            uint32_t* out = to + words + j / P * call.head_dim;
            for (ptrdiff_t d = 0; d < call.head_dim; ++d) {
                uint32_t word = 0;
                for (int p = 0; p < P; ++p) word |= (v[j + p][d] >> shift[j + p] & ONE) << p * BITS;
                out[d] = word;
            }
        }
    }

    struct Held {
        const View* view = nullptr;
        int kv = 0, count = 0;
        bool has(const Held& other) const { return view == other.view && kv == other.kv && count >= other.count; }
    };

    struct Copies {
        std::vector<uint32_t> store;
        std::vector<Held> held;  // of each block in it
        std::vector<int32_t> columns;
    };
    std::vector<Copies> heads_;  // of one KV head, which take turns
};

// Rows of a strip: those of a whole tile of sums.
template <class E>
constexpr int STRIP = HEIGHT<typename E::Query, WIDTH<typename E::Query>>;

// A thread's memory: what its list reads, the tile's rows, and a strip's scores. Kept from call to call.
template <class E>
struct Scratch {
    Walk walk;
    Gathered<E> gathered;
    Lines<typename E::Query::row> q;
    typename E::Rows q_rows;
    typename E::Shares shares;
    Lines<float> part, out;
    std::vector<float> part_top, part_total, top, total, best, below;
    std::vector<uint64_t> mask;
    // of a strip: scores, then weights; the highest scores of each block and the sums of weights, by lanes; each block's worth
    alignas(64) float score[STRIP<E> * SPLIT], high[SPLIT_BLOCKS * STRIP<E> * W], mass[STRIP<E> * W], worth[STRIP<E> * TOPS];
    uint8_t kept[SPLIT_BLOCKS * STRIP<E>];
    void reserve(int rows, int dim) {
        const size_t n = (size_t)rows;
        q_rows.reserve(n, dim);
        if (q.size() < n * dim) q.resize(n * dim), part.resize(n * dim), out.resize(n * dim);
        if (top.size() < n) {
            mask.resize(n * SPLIT_BLOCKS);
            for (auto* each : {&part_top, &part_total, &top, &total, &best, &below}) each->resize(n);
        }
    }
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
