// Linears: y = x W^T over one packed copy of the weights, for any number of rows.
//
// A panel of 64 outputs stays in the second-level cache while rows stream by, a tile of them at a time (product.h), with
// sums in registers. Sums run along the inner dimension from its start to its end whatever the row count; where a panel is too
// long for the cache they wait in memory between its parts. So a row's bits depend on nothing but the row. Weights in few
// bits become such a part just before rows stream by: bits are those of a panel that lay there all along.
#include "matmul.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "product.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

constexpr int64_t ROWS = 96;          // rows that share a panel while it is in the cache, at least
constexpr int64_t ROW_BYTES = BY_TILES<BF16> ? 1 << 20 : 0;  // of more rows, which tiles need: they pass by fast
constexpr int64_t PART = 192 << 10;   // bytes of a panel that stay there
constexpr int64_t BLOCK_ROWS = 384;    // the same of weights in few bits, so that making it takes little of the time
constexpr int64_t BLOCK_PART = 16 << 10;  // bytes of what is made of those: in the first-level cache
constexpr int64_t FEW = 36;           // rows up to which reading the weights is what takes the time
constexpr int64_t WORTH = 1 << 15;    // bytes of weights below which a second thread costs more than it brings
constexpr int VECTORS = PANEL / W;    // of a panel's group

// Columns [first, first + count) of a panel's vectors, rows [r0, r1).
struct Piece {
    int64_t r0, r1, panel;
    int first, count;
    bool fetch;
};

template <class T>
class Linear {
  public:
    using S = typename T::sum;
    explicit Linear(const MatmulArgs& call) : call_(call), groups_(call.width / T::PAIR) {}

    void run() {
        const int64_t panels = (call_.outputs + PANEL - 1) / PANEL;
        const bool alone = call_.threads == 1 || panels * PANEL * groups_ * (int64_t)sizeof(typename T::weight) * T::PAIR < WORTH;
        const int threads = alone ? 1 : call_.threads;
        if (call_.rows <= FEW) few(panels, threads);
        else many(panels, threads);
    }

  private:
    // Each thread reads one stretch of the weights.
    void few(int64_t panels, int threads) {
        const int64_t units = panels * (VECTORS / NV), all = call_.rows;
        constexpr int UNITS = VECTORS / NV;
        const bool fetch = all > MR && !call_.blocks;
        if (threads == 1) {
            [[maybe_unused]] const tmm::Registers held{};
            Rows rows(call_);
            for (int64_t u = 0; u < units; ++u) piece({0, all, u / UNITS, (int)(u % UNITS) * NV, NV, fetch}, rows);
            return;
        }
#pragma omp parallel num_threads(threads)
        {
            [[maybe_unused]] const tmm::Registers held{};
            Rows rows(call_);
            // in half tiles, so that 9 panels are 4.5 for each of two
            const int64_t halves = 2 * units, t = omp_get_thread_num(), n = omp_get_num_threads();
            int64_t h = halves * t / n;
            const int64_t end = halves * (t + 1) / n;
            while (h < end) {
                const int64_t unit = h / 2;
                const bool whole = h % 2 == 0 && h + 2 <= end;
                piece({0, all, unit / UNITS, (int)(unit % UNITS) * NV + (int)(h % 2) * NV / 2, whole ? NV : NV / 2, fetch}, rows);
                h += whole ? 2 : 1;
            }
        }
    }

    void many(int64_t panels, int threads) {
        constexpr int N = WIDTH<T>;
        const int64_t room = ROW_BYTES / (groups_ * 4 + 1) / HEIGHT<T, N> * HEIGHT<T, N>;
        const int64_t each = call_.blocks ? BLOCK_ROWS : std::clamp(room, ROWS, BLOCK_ROWS);
        const int64_t blocks = (call_.rows + each - 1) / each;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            [[maybe_unused]] const tmm::Registers held{};
            Rows rows(call_);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < blocks * panels; ++i) {
                const int64_t r0 = i / panels * each;
                for (int v = 0; v < VECTORS; v += N) piece({r0, std::min(r0 + each, call_.rows), i % panels, v, N, false}, rows);
            }
        }
    }

    // Rows as products read them: where they lie, or turned, a piece's at a time; a thread goes through its pieces in order.
    class Rows {
        using Row = typename T::row;
        static constexpr bool IN_PLACE = std::is_same_v<Row, typename T::scalar>;

      public:
        explicit Rows(const MatmulArgs& call) : call_(call), step(IN_PLACE ? call.x_row : (call.width + W - 1) / W * W) {}

        // Row r0, and others behind it up to r1.
        const Row* from(int64_t r0, int64_t r1) {
            if constexpr (IN_PLACE) return (const Row*)call_.x + r0 * step;
            static thread_local std::vector<Row> room;
            if (r0 != first_ || r1 != end_) turn(room, r0, r1);
            return room.data();
        }

      private:
        void turn(std::vector<Row>& room, int64_t r0, int64_t r1) {
            if (room.size() < (size_t)((r1 - r0) * step)) room.resize((r1 - r0) * step);
            for (int64_t r = r0; r < r1; ++r) {
                const auto* x = (const typename T::scalar*)call_.x + r * call_.x_row;
                Row* to = &room[(r - r0) * step];
                int64_t k = 0;
                for (; k + W <= call_.width; k += W) to_row<T>(to + k, x + k);
                typename T::scalar last[W] = {};
                std::copy(x + k, x + call_.width, last);
                if (k < call_.width) to_row<T>(to + k, last);
            }
            first_ = r0, end_ = r1;
        }

        const MatmulArgs& call_;
        int64_t first_ = 0, end_ = 0;

      public:
        const ptrdiff_t step;  // from one row to the next
    };

    void piece(const Piece& p, Rows& rows) {
        constexpr bool FETCH = !BY_TILES<T>;
        if (p.count == NV) p.fetch ? as<NV, FETCH>(p, rows) : as<NV, false>(p, rows);
        else p.fetch ? as<NV / 2, FETCH>(p, rows) : as<NV / 2, false>(p, rows);
    }

    template <int N, bool FETCH>
    void as(const Piece& p, Rows& rows) {
        constexpr int64_t LDB = (int64_t)PANEL * T::PAIR, MOST = HEIGHT<T, N>;
        const int64_t part = std::max<int64_t>((call_.blocks ? BLOCK_PART : PART) / (LDB * sizeof(typename T::weight)), 1);
        const int64_t ldb = call_.blocks ? (int64_t)N * W * T::PAIR : LDB;
        const auto* w = (const typename T::weight*)call_.w + p.panel * groups_ * LDB + p.first * W * T::PAIR;
        const ptrdiff_t step = rows.step, fetched = LDB * sizeof(typename T::weight) / ((p.r1 - p.r0 + MOST - 1) / MOST);
        const auto* const first = rows.from(p.r0, p.r1);
        S* waiting = groups_ > part ? waiting_room<S>() : nullptr;
        for (int64_t g = 0; g < groups_ || g == 0; g += part) {
            const int64_t n = std::min(part, groups_ - g);
            const bool last = g + n >= groups_;
            const auto* b = call_.blocks ? made<N>(p, g, n) : w + g * LDB;
            for (int64_t r = p.r0; r < p.r1; r += MOST)
                with_sums<T, N>((int)std::min<int64_t>(MOST, p.r1 - r), [&](auto& s) {
                    S* kept = waiting + (r - p.r0) * N;
                    if (g) s.recall(kept);
                    else begin(s, p);
                    const auto* x = first + (r - p.r0) * step + g * T::PAIR;
                    const char* ahead = (const char*)(w + (g + n) * LDB) + (r - p.r0) / MOST * n * fetched;
                    const auto fetch = [=](int64_t group) {  // what the next rows read, into the cache
#pragma GCC unroll 4
                        for (int l = 0; l < 4; ++l) __builtin_prefetch(ahead + group * fetched + l * 64, 0, 2);
                    };
                    if constexpr (FETCH) s.add(x, step, b, ldb, n, fetch);
                    else s.add(x, step, b, ldb, n);
                    if (last) finish(s, p, r);
                    else s.keep(kept);
                });
        }
    }

    // Groups [g, g + n) of a piece's weights.
    template <int N>
    const typename T::weight* made(const Piece& p, int64_t g, int64_t n) const {
        alignas(64) static thread_local typename T::weight room[BLOCK_PART / sizeof(typename T::weight)];
        if constexpr (T::PAIR < 4) expand<T, N>(room, *call_.blocks, call_.width, p.panel, p.first * W, g * T::PAIR, (g + n) * T::PAIR);
        return room;
    }

    template <class V>
    static V* waiting_room() {
        static thread_local std::vector<V> room((size_t)BLOCK_ROWS * NV);
        return room.data();
    }
    template <class Tile>
    void begin(Tile& sums, const Piece& p) const {
        const int64_t column = p.panel * PANEL + p.first * W;
        if constexpr (T::PAIR == 4) sums.begin([=](int, int j) { return load_as<vi>(call_.start + column + j * W); });
        else sums.clear();
    }
    template <class Tile>
    void finish(Tile& sums, const Piece& p, int64_t r) const {
        if (call_.wide || T::PAIR == 1) put<F32>(sums, r, p.panel * PANEL + p.first * W);
        else put<BF16>(sums, r, p.panel * PANEL + p.first * W);
    }
    // What is read here lies in registers then: a store might change what lies behind `this`.
    template <class O, class Tile>
    void put(Tile& sums, int64_t row, int64_t column) const {
        auto* const to = (typename O::scalar*)call_.out + row * call_.out_row + column;
        const int64_t step = call_.out_row, left = call_.outputs - column;
        const float* const scale = call_.scale + column;
        if (left >= NV * W) sums.each([=](int i, int j, S sum) { O::narrow(to + i * step + j * W, value(sum, scale + j * W)); });
        else
            sums.each([=](int i, int j, S sum) {
                const int64_t count = std::min<int64_t>(left - j * W, W);
                typename O::scalar some[W];
                O::narrow(some, value(sum, scale + j * W));
                if (count > 0) std::memcpy(to + i * step + j * W, some, count * sizeof some[0]);
            });
    }
    static vf value(S sum, [[maybe_unused]] const float* scale) {
        if constexpr (T::PAIR == 4) return __builtin_convertvector(sum, vf) * load(scale);
        else return sum;
    }

    const MatmulArgs& call_;
    const int64_t groups_;
};

}  // namespace

void matmul(const MatmulArgs& call, Weights weights) {
    if (weights == Weights::f32) Linear<F32>(call).run();
    else if (weights == Weights::bf16) Linear<BF16>(call).run();
    else Linear<Bytes>(call).run();
}

}  // namespace firstlight::FIRSTLIGHT_VARIANT
