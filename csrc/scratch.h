// What a thread keeps while it works on tiles: copies of the columns that a list gathers, rows, scores, sums.
#pragma once

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

// Columns of one walk as blocks of their own, copied when they are first asked for.
template <class E>
class Gathered {
  public:
    void begin(const Walk& walk) { done_.assign((walk.columns.size() + BLOCK - 1) / BLOCK, false); }

    // Block n of the columns: K, then V.
    const uint32_t* block(const AttnArgs& call, const Tile& tile, const Walk& walk, int n) {
        const size_t each = 2 * E::words(call.head_dim);
        if (store_.size() < done_.size() * each) store_.resize(done_.size() * each);
        uint32_t* to = &store_[n * each];
        if (!done_[n]) copy(call, tile, &walk.columns[(size_t)n * BLOCK], std::min(BLOCK, (int)walk.columns.size() - n * BLOCK), to);
        done_[n] = true;
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

    std::vector<uint32_t> store_;
    std::vector<bool> done_;
};

// Rows of a strip: those of a whole tile of sums.
template <class E>
constexpr int STRIP = HEIGHT<typename E::Query, WIDTH<typename E::Query>>;

// A thread's memory: what its list reads, the tile's rows, and a strip's scores. Kept from call to call.
template <class E>
struct Scratch {
    Walk walk;
    Gathered<E> gathered;
    Lines<typename E::Query::scalar> q;
    typename E::Rows q_rows;
    typename E::Shares shares;
    Lines<float> part, out;
    std::vector<float> top, total, best, below;
    std::vector<uint64_t> mask;
    // of a strip: scores, then weights; the highest scores of each block and the sums of weights, by lanes; each block's worth
    alignas(64) float score[STRIP<E> * SPLIT], high[SPLIT_BLOCKS * STRIP<E> * W], mass[STRIP<E> * W], worth[STRIP<E> * TOPS];
    uint8_t kept[SPLIT_BLOCKS * STRIP<E>];
    void begin(const AttnArgs& call, const Tile& tile, bool by_number = false) {
        walk.begin(call, tile, by_number);
        gathered.begin(walk);
    }
    void reserve(int rows, int dim) {
        const size_t n = (size_t)rows;
        if (q.size() < n * dim) q.resize(n * dim), part.resize(n * dim), out.resize(n * dim);
        if (top.size() < n) q_rows.resize(n), top.resize(n), total.resize(n), mask.resize(n * SPLIT_BLOCKS), best.resize(n), below.resize(n);
    }
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
