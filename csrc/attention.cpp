// Attention over the block pool: every plan, every view, any slice of rows.
//
// Rows of a request that share a list are packed into tiles, tokens by query heads of a KV head. A tile reduces the
// view in splits of 512 entries, a strip of its rows after the other: scores of all blocks that any of them sees, one
// softmax over them, their product with V. Splits join in ascending order. What a row does not see enters as p = 0 or is
// left out, and neither changes a bit, so a row's result is its own: neither tile mates, nor slices, nor threads matter,
// and decode rows equal prompt rows. Where a plan has rows skip blocks, splits come one after the other in the order of
// its scan, since what is skipped depends on it.
#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "attend_tile.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

constexpr int ROWS = BY_TILES<BF16> ? 96 : 66;  // rows of a tile, at most, if a token's heads allow: whole strips

// Heads [head, end) of rows [lo, hi), which share a list, as tiles of about equal size.
void cut(std::vector<Tile>& made, int b, int kv, int head, int end, int lo, int hi, int64_t list) {
    const int group = end - head, most = std::max(1, ROWS / group), parts = (hi - lo + most - 1) / most;
    for (int i = 0, at = lo; i < parts; ++i) {
        const int next = lo + (int)((int64_t)(hi - lo) * (i + 1) / parts);
        made.push_back({b, kv, head, group, at, next, list});
        at = next;
    }
}

// Tiles of rows [r0, r1): they end where a request, a plan's tile or the row count of a tile does.
std::vector<Tile> tiles(const AttnArgs& call) {
    std::vector<Tile> made;
    const int group = (int)(call.num_heads / call.num_kv_heads);
    for (int b = 0; b < call.num_requests; ++b) {
        const int end = (int)std::min(call.row_ptr[b + 1], call.r1);
        for (int lo = (int)std::max(call.row_ptr[b], call.r0), hi; lo < end; lo = hi) {
            if (!call.plan) {
                hi = std::min(end, lo + std::max(1, ROWS / group));
                for (int kv = 0; kv < call.num_kv_heads; ++kv) made.push_back({b, kv, kv * group, group, lo, hi, 0});
                continue;
            }
            const PlanLists& plan = *call.plan;
            const int64_t tile = call.tok[lo] / plan.q_tile;
            hi = (int)(std::lower_bound(call.tok + lo, call.tok + end, (tile + 1) * plan.q_tile) - call.tok);
            const int64_t slot = plan.tile_map[plan.tile_base[b] + tile - plan.tile_first[b]];
            for (int head = 0, next; head < call.num_heads; head = next) {
                const int kv = head / group;
                for (next = head + 1; next < (kv + 1) * group && plan.head_map[next] == plan.head_map[head];) ++next;
                cut(made, b, kv, head, next, lo, hi, slot * plan.num_lists + plan.head_map[head]);
            }
        }
    }
    if (call.plan && call.plan->col_ptr)  // lists that gather columns one after the other, since they may be alike
        std::stable_sort(made.begin(), made.end(), [](const Tile& x, const Tile& y) { return x.b != y.b ? x.b < y.b : x.kv < y.kv; });
    return made;
}

// Where runs of tiles begin that read the same, and at last the end: one thread takes a run that has columns to gather.
std::vector<int> runs(const AttnArgs& call, const std::vector<Tile>& work) {
    std::vector<int> made;
    for (int i = 0; i < (int)work.size(); ++i) {
        const Tile &now = work[i], &last = work[i > 0 ? i - 1 : 0];
        const bool same = call.plan && call.plan->col_ptr && i > 0 && now.b == last.b && now.head == last.head && now.list == last.list &&
                          call.tok[now.lo] / call.plan->q_tile == call.tok[last.lo] / call.plan->q_tile;
        if (!same) made.push_back(i);
    }
    made.push_back((int)work.size());
    return made;
}

template <class E>
Scratch<E>& scratch() {
    static thread_local Scratch<E> mine;
    return mine;
}

// Few tiles, long views: splits of all tiles side by side, then joined. The same operations, so the same bits.
template <class E>
int64_t by_splits(const AttnArgs& call, const std::vector<Tile>& work, float* lse2) {
    const int dim = (int)call.head_dim;
    std::vector<int> first(work.size() + 1), owner;
    std::vector<size_t> rows(1);
    for (size_t t = 0; t < work.size(); ++t) {
        scratch<E>().walk.begin(call, work[t], work[t].hi - 1);
        const int splits = TileWork<E>(call, work[t], scratch<E>()).num_splits();
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
        [[maybe_unused]] const tmm::Registers held{};
        scratch<E>().gathered.begin();
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < owner.size(); ++i) {
            scratch<E>().walk.begin(call, work[owner[i]], work[owner[i]].hi - 1);
            TileWork<E> tile(call, work[owner[i]], scratch<E>());
            any[i] = tile.reduce((int)i - first[owner[i]], part + rows[i] * dim, top + rows[i], total + rows[i]);
            visible += tile.visible();
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (size_t t = 0; t < work.size(); ++t) {
            TileWork<E> tile(call, work[t], scratch<E>());
            tile.begin();
            for (int i = first[t]; i < first[t + 1]; ++i)
                if (any[i]) tile.join(part + rows[i] * dim, top + rows[i], total + rows[i]);
            tile.finish(lse2);
        }
        end_of_stores();
    }
    return visible;
}

template <class E>
int64_t by_tiles(const AttnArgs& call, const std::vector<Tile>& work, float* lse2) {
    int64_t visible = 0;
    const std::vector<int> first = runs(call, work);
#pragma omp parallel num_threads(call.threads) reduction(+ : visible)
    {
        [[maybe_unused]] const tmm::Registers held{};
        scratch<E>().gathered.begin();
#pragma omp for schedule(dynamic, 1) nowait
        for (size_t i = first.size() - 1; i > 0; --i) {  // the last rows see most: heavy tiles first
            scratch<E>().walk.begin(call, work[first[i - 1]], work[first[i] - 1].hi - 1);
            const int other = (int)i - 1 - call.threads;  // what this thread will take then, more or less
            for (int t = first[i - 1]; t < first[i]; ++t) {
                TileWork<E> tile(call, work[t], scratch<E>());
                const int next = t + 1 < first[i] ? t + 1 : other >= 0 ? first[other] : t;
                ask_for<false>(work[next], (const typename E::Model::scalar*)call.q, call.q_row, call.q_head, call.head_dim);
                tile.whole(lse2);
                visible += tile.visible();
            }
        }
        end_of_stores();
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
template <class E>
void probe(const AttnArgs& call, const std::vector<Tile>& work, const float* lse2) {
    struct Job {
        int b, kv, split;
    };
    std::vector<Job> jobs;
    for (int b = 0; b < call.num_requests; ++b)
        if (call.probe_sums[b])
            for (int kv = 0; kv < call.num_kv_heads; ++kv)
                for (int n = 0; n * SPLIT < call.probe_len[b]; ++n) jobs.push_back({b, kv, n});
#pragma omp parallel num_threads(call.threads)
    {
        [[maybe_unused]] const tmm::Registers held{};
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < jobs.size(); ++i) {
            const Job& job = jobs[i];
            float* sums = call.probe_sums[job.b] + job.kv * call.probe_len[job.b];
            for (const Tile& t : in_order(call, work, job.b, job.kv)) {
                scratch<E>().walk.begin(call, t, t.hi - 1, true);
                TileWork<E> tile(call, t, scratch<E>());
                if (job.split < tile.num_splits()) tile.probe(job.split, call.probe_first[t.b], lse2, sums, call.probe_len[t.b]);
            }
        }
    }
}

template <class E>
int64_t attend_as(const AttnArgs& call) {
    const std::vector<Tile> work = tiles(call);
    std::vector<float> lse2(call.probe_sums ? (size_t)call.row_ptr[call.num_requests] * call.num_heads : 0);
    float* keep = call.probe_sums ? lse2.data() : nullptr;
    const bool few = (int)work.size() < 8 * call.threads && !(call.plan && call.plan->skip_log);
    const int64_t visible = few ? by_splits<E>(call, work, keep) : by_tiles<E>(call, work, keep);
    if (keep) probe<E>(call, work, keep);
    return visible;
}

}  // namespace

template <template <class> class E>
int64_t attend_in(const AttnArgs& call, bool bf16) {
    return bf16 ? attend_as<E<BF16>>(call) : attend_as<E<F32>>(call);
}

int64_t attend(const AttnArgs& call, bool bf16, bool bytes) { return bytes ? attend_in<Eighths>(call, bf16) : attend_in<Plain>(call, bf16); }

}  // namespace firstlight::FIRSTLIGHT_VARIANT
