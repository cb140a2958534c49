// Attention over the block pool: every plan, every view, any slice of rows.
//
// Rows of a request that share a list are packed into tiles, tokens by query heads of a KV head. A tile reduces the
// view in splits of 512 entries: scores of all blocks that any of its rows sees, one softmax over them, their product
// with V. Splits join in ascending order. What a row does not see enters as p = 0, which changes no bit, so a row's
// result is its own: neither tile mates, nor slices, nor threads matter, and decode rows equal prompt rows.
#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "tile.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

constexpr int ROWS = 48;          // rows of a tile, at most, if a token's heads allow
constexpr int SPLIT = SPLIT_BLOCKS * BLOCK;
constexpr float LOWEST = -1e30f;  // stands for -inf where a difference is taken
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

// --- products -------------------------------------------------------------------------------------------------------

// c[R rows, N vectors] = sum over `count` parts of a[R, groups] b[groups, ..]: parts lie `a_part` scalars apart in a.
template <class T, int R, int N>
inline void micro(const typename T::scalar* a, ptrdiff_t lda, ptrdiff_t a_part, const typename T::scalar* const* b,
                  ptrdiff_t ldb, ptrdiff_t b_offset, int count, int groups, float* c, ptrdiff_t ldc) {
    Sums<T, R, N> sums{};
    for (int part = 0; part < count; ++part) sums.add(a + part * a_part, lda, b[part] + b_offset, ldb, groups);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) store(c + i * ldc + j * W, sums.at[i][j]);
}

// c[rows, columns] = sum over parts of a b. `b` points to `count` matrices [groups, columns] of PAIR scalars each.
template <class T>
void product(int rows, int columns, const typename T::scalar* a, ptrdiff_t lda, ptrdiff_t a_part,
             const typename T::scalar* const* b, int count, int groups, float* c, ptrdiff_t ldc) {
    const ptrdiff_t ldb = (ptrdiff_t)columns * T::PAIR;
    const auto vectors = [&](auto n_vectors, int n) {
        constexpr int N = n_vectors;
        for (int r = 0; r < rows; r += MR)
            with_rows(std::min(MR, rows - r), [&](auto R) {
                micro<T, R, N>(a + r * lda, lda, a_part, b, ldb, n * T::PAIR, count, groups, c + r * ldc + n, ldc);
            });
    };
    int n = 0;
    for (; n + NV * W <= columns; n += NV * W) vectors(std::integral_constant<int, NV>{}, n);
    for (; n < columns; n += W) vectors(std::integral_constant<int, 1>{}, n);
}

// --- what a row sees ------------------------------------------------------------------------------------------------

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

// --- one tile -------------------------------------------------------------------------------------------------------

// A thread's memory: the tile's rows, and one split's scores. Kept from call to call.
template <class T>
struct Scratch {
    using scalar = typename T::scalar;
    std::vector<scalar> q;
    std::vector<float> score, part, out, top, total;
    std::vector<uint64_t> mask;
    void reserve(int rows, int dim) {
        const size_t n = (size_t)rows;
        if (q.size() < n * dim) q.resize(n * dim), part.resize(n * dim), out.resize(n * dim);
        if (top.size() < n) score.resize(n * SPLIT), top.resize(n), total.resize(n), mask.resize(n * SPLIT_BLOCKS);
    }
};

template <class T>
class TileWork {
  public:
    using scalar = typename T::scalar;
    TileWork(const AttnArgs& call, const Tile& tile, Scratch<T>& s)
        : call_(call), tile_(tile), seen_(call, tile), s_(s), dim_((int)call.head_dim), rows_(tile.rows()),
          groups_(dim_ / T::PAIR), block_size_((ptrdiff_t)BLOCK * dim_), log2_scale_(call.scale * LOG2E) {
        s.reserve(rows_, dim_);
        for (int i = 0; i < rows_; ++i) {
            const int row = tile.lo + i / tile.group, head = tile.head + i % tile.group;
            std::memcpy(&s.q[(size_t)i * dim_], (const scalar*)call.q + row * call.q_row + head * call.q_head, dim_ * sizeof(scalar));
        }
    }
    int num_splits() const { return (seen_.num_blocks() + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS; }

    // Scores of split n for the blocks that are seen at all, -inf where a row does not see; how many blocks.
    int scores(int n) {
        const int end = std::min((n + 1) * SPLIT_BLOCKS, seen_.num_blocks());
        const int tokens = tile_.hi - tile_.lo;
        int active = 0;
        for (int b = n * SPLIT_BLOCKS; b < end; ++b) {
            uint64_t* mask = &s_.mask[(size_t)active * tokens];
            const Seen::Sum sum = seen_.rows(b, mask);
            if (!sum.any) continue;
            number_[active] = b;
            full_[active] = sum.every == ~0ull;
            const ptrdiff_t at = seen_.block(b) * block_size_;
            keys_[active] = (const scalar*)call_.k + at, values_[active] = (const scalar*)call_.v + at;
            ++active;
        }
        for (int j = 0; j < active; ++j) {
            product<T>(rows_, BLOCK, s_.q.data(), dim_, 0, &keys_[j], 1, groups_, &s_.score[j * BLOCK], SPLIT);
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
        const int vectors = active * BLOCK / W;
        for (int i = 0; i < rows_; ++i) {
            float* score = &s_.score[(size_t)i * SPLIT];
            vf highest = load(score);
            for (int j = 1; j < vectors; ++j) highest = max(highest, load(score + j * W));
            top[i] = std::max(highest_fast(highest), LOWEST);
            top[i] *= log2_scale_;
            const vf shift = all(-top[i]), scale = all(log2_scale_);
            vf mass = {};
            scalar* weight = (scalar*)score;  // in place: never ahead of what is read
            for (int j = 0; j < vectors; ++j) {
                const vf p = exp2<T::TERMS>(fma(load(score + j * W), scale, shift));
                mass += p;
                T::narrow(weight + j * W, p);
            }
            total[i] = sum(mass);
        }
        const ptrdiff_t stride = SPLIT * (ptrdiff_t)(sizeof(float) / sizeof(scalar));
        product<T>(rows_, dim_, (const scalar*)s_.score.data(), stride, BLOCK, values_, active, BLOCK / T::PAIR, part, dim_);
        return true;
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
            const vf share = all(empty ? 0.0f : 1 / s_.total[i]);
            scalar* out = (scalar*)call_.out + row * call_.out_row + head * call_.out_head;
            for (int d = 0; d < dim_; d += W) T::narrow(out + d, load(&s_.out[(size_t)i * dim_ + d]) * share);
            const float lse = empty ? -INFINITY : s_.top[i] + std::log2(s_.total[i]);
            if (call_.lse) call_.lse[row * call_.num_heads + head] = lse * LN2;
            if (lse2) lse2[row * call_.num_heads + head] = lse;
        }
    }

    void whole(float* lse2) {
        begin();
        std::vector<float>& top = tops_;
        top.resize(2 * (size_t)rows_);
        for (int n = 0; n < num_splits(); ++n)
            if (reduce(n, s_.part.data(), top.data(), top.data() + rows_)) join(s_.part.data(), top.data(), top.data() + rows_);
        finish(lse2);
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
    void add(const float* score, float lse, float* sums, int block, int64_t length) {
        float mass[BLOCK];
        for (int e = 0; e < BLOCK; e += W) store(mass + e, exp2<5>(fma(load(score + e), all(log2_scale_), all(-lse))));
        const int64_t base = (int64_t)block * BLOCK, n = std::min<int64_t>(BLOCK, length - base);
        for (int64_t e = 0; e < n; ++e) sums[base + e] += mass[e];
    }

    const AttnArgs& call_;
    const Tile& tile_;
    Seen seen_;
    Scratch<T>& s_;
    const int dim_, rows_, groups_;
    const ptrdiff_t block_size_;
    const float log2_scale_;
    const scalar *keys_[SPLIT_BLOCKS], *values_[SPLIT_BLOCKS];
    int number_[SPLIT_BLOCKS];
    bool full_[SPLIT_BLOCKS];
    std::vector<float> tops_;
    int64_t visible_ = 0;
};

// --- a call ---------------------------------------------------------------------------------------------------------

// Tiles of rows [r0, r1): they end where a request, a plan's tile or the row count of a tile does.
std::vector<Tile> tiles(const AttnArgs& call) {
    std::vector<Tile> made;
    const int group = (int)(call.num_heads / call.num_kv_heads);
    for (int b = 0; b < call.num_requests; ++b) {
        const int end = (int)std::min(call.row_ptr[b + 1], call.r1);
        for (int lo = (int)std::max(call.row_ptr[b], call.r0), hi; lo < end; lo = hi) {
            hi = std::min(end, lo + std::max(1, ROWS / group));
            if (call.plan) {
                const int64_t next = (call.tok[lo] / call.plan->q_tile + 1) * call.plan->q_tile;
                hi = (int)(std::lower_bound(call.tok + lo, call.tok + hi, next) - call.tok);
            }
            for (int kv = 0; kv < call.num_kv_heads; ++kv) {
                if (!call.plan) {
                    made.push_back({b, kv, kv * group, group, lo, hi, 0});
                    continue;
                }
                const PlanLists& plan = *call.plan;
                const int64_t tile = call.tok[lo] / plan.q_tile - plan.tile_first[b];
                const int64_t slot = plan.tile_map[plan.tile_base[b] + tile];
                for (int head = kv * group, next; head < (kv + 1) * group; head = next) {
                    for (next = head + 1; next < (kv + 1) * group && plan.head_map[next] == plan.head_map[head];) ++next;
                    made.push_back({b, kv, head, next - head, lo, hi, slot * plan.num_lists + plan.head_map[head]});
                }
            }
        }
    }
    return made;
}

template <class T>
Scratch<T>& scratch() {
    static thread_local Scratch<T> mine;
    return mine;
}

// Few tiles, long views: splits of all tiles side by side, then joined. The same operations, so the same bits.
template <class T>
int64_t by_splits(const AttnArgs& call, const std::vector<Tile>& work, float* lse2) {
    const int dim = (int)call.head_dim;
    std::vector<int> first(work.size() + 1), owner;
    std::vector<size_t> rows(1);
    for (size_t t = 0; t < work.size(); ++t) {
        const int splits = TileWork<T>(call, work[t], scratch<T>()).num_splits();
        first[t + 1] = first[t] + splits;
        owner.insert(owner.end(), splits, (int)t);
        for (int n = 0; n < splits; ++n) rows.push_back(rows.back() + work[t].rows());
    }
    static thread_local std::vector<float> storage;
    storage.resize(rows.back() * (dim + 2));
    float *part = storage.data(), *top = part + rows.back() * dim, *total = top + rows.back();
    std::unique_ptr<bool[]> any(new bool[owner.size()]);
    int64_t visible = 0;
#pragma omp parallel num_threads(call.threads) reduction(+ : visible)
    {
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < owner.size(); ++i) {
            TileWork<T> tile(call, work[owner[i]], scratch<T>());
            any[i] = tile.reduce((int)i - first[owner[i]], part + rows[i] * dim, top + rows[i], total + rows[i]);
            visible += tile.visible();
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < work.size(); ++t) {
            TileWork<T> tile(call, work[t], scratch<T>());
            tile.begin();
            for (int i = first[t]; i < first[t + 1]; ++i)
                if (any[i]) tile.join(part + rows[i] * dim, top + rows[i], total + rows[i]);
            tile.finish(lse2);
        }
    }
    return visible;
}

template <class T>
int64_t by_tiles(const AttnArgs& call, const std::vector<Tile>& work, float* lse2) {
    int64_t visible = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads) reduction(+ : visible)
    for (size_t i = work.size(); i > 0; --i) {  // the last rows see most: heavy tiles first
        TileWork<T> tile(call, work[i - 1], scratch<T>());
        tile.whole(lse2);
        visible += tile.visible();
    }
    return visible;
}

// Tiles of one request and KV head whose rows, one tile after the other, come in ordinal and then in head order.
std::vector<Tile> in_order(const AttnArgs& call, const std::vector<Tile>& work, int b, int kv) {
    std::vector<Tile> made;
    for (const Tile& t : work) {
        if (t.b != b || t.kv != kv || call.tok[t.hi - 1] < call.probe_first[b]) continue;
        if (t.group == call.num_heads / call.num_kv_heads) {
            made.push_back(t);
            continue;
        }
        for (int row = t.lo; row < t.hi; ++row) {  // its heads have tiles of their own: take turns
            made.push_back(t);
            made.back().lo = row, made.back().hi = row + 1;
        }
    }
    std::stable_sort(made.begin(), made.end(), [](const Tile& x, const Tile& y) { return x.lo < y.lo; });
    return made;
}

// Probe sums: (request, KV head, split) side by side, rows in order.
template <class T>
void probe(const AttnArgs& call, const std::vector<Tile>& work, const float* lse2) {
    struct Job {
        int b, kv, split;
    };
    std::vector<Job> jobs;
    for (int b = 0; b < call.num_requests; ++b)
        if (call.probe_sums[b])
            for (int kv = 0; kv < call.num_kv_heads; ++kv)
                for (int n = 0; n * SPLIT < call.probe_len[b]; ++n) jobs.push_back({b, kv, n});
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads)
    for (size_t i = 0; i < jobs.size(); ++i) {
        const Job& job = jobs[i];
        float* sums = call.probe_sums[job.b] + job.kv * call.probe_len[job.b];
        for (const Tile& t : in_order(call, work, job.b, job.kv)) {
            TileWork<T> tile(call, t, scratch<T>());
            if (job.split < tile.num_splits()) tile.probe(job.split, call.probe_first[t.b], lse2, sums, call.probe_len[t.b]);
        }
    }
}

template <class T>
int64_t attend_as(const AttnArgs& call) {
    const std::vector<Tile> work = tiles(call);
    std::vector<float> lse2(call.probe_sums ? (size_t)call.row_ptr[call.num_requests] * call.num_heads : 0);
    float* keep = call.probe_sums ? lse2.data() : nullptr;
    const bool few = (int)work.size() < 8 * call.threads;
    const int64_t visible = few ? by_splits<T>(call, work, keep) : by_tiles<T>(call, work, keep);
    if (keep) probe<T>(call, work, keep);
    return visible;
}

}  // namespace

int64_t attend(const AttnArgs& call, bool bf16) { return bf16 ? attend_as<BF16>(call) : attend_as<F32>(call); }

}  // namespace firstlight::FIRSTLIGHT_VARIANT
