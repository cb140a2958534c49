// The tile of sums of tile.h in AMX's registers. A and B come straight from where they lie: rows of a hold 64 bytes of
// inner scalars side by side, and 16 groups of b are what the other factor's tile consists of.
#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.h"

namespace firstlight::FIRSTLIGHT_VARIANT {

template <class T, int M, int N>
class TileSums;

#if FIRSTLIGHT_TILES

// body(std::integral_constant of I) for I = 0 to COUNT - 1
template <int COUNT, int I = 0, class Body>
inline void each_of(Body body) {
    body(std::integral_constant<int, I>{});
    if constexpr (I + 1 < COUNT) each_of<COUNT, I + 1>(body);
}

// A tile of fewer rows than 16 or of shorter ones; zeros where it has none.
template <int C>
inline void load_part(const char* from, ptrdiff_t stride, int rows, int bytes) {
    vu whole[tmm::TILE_ROWS];
    const __mmask64 there = ~0ull >> (tmm::TILE_BYTES - bytes);
    for (int i = 0; i < tmm::TILE_ROWS; ++i) whole[i] = i < rows ? (vu)_mm512_maskz_loadu_epi8(there, from + i * stride) : vu{};
    tmm::load<C>(whole, tmm::TILE_BYTES);
}

// Up to 16 M rows by N vectors: M N registers of sums, M of a, the rest for b. A thread has one of these at a time.
template <class T, int M, int N>
class TileSums {
    using S = typename T::sum;
    static constexpr int ROWS = tmm::TILE_ROWS, STEP = tmm::TILE_BYTES / 4, FIRST_A = M * N, FIRST_B = FIRST_A + M;
    static_assert(W == STEP && FIRST_B < 8);

  public:
    static constexpr int MOST = M * ROWS;
    explicit TileSums(int rows) : rows_(rows) {}

    void clear() {
        each_of<M * N>([](auto t) { tmm::zero<t>(); });
    }
    template <class F>
    void begin(F first) {
        S sums[M * N * ROWS] = {};
        for (int i = 0; i < rows_; ++i)
            for (int j = 0; j < N; ++j) sums[(i / ROWS * N + j) * ROWS + i % ROWS] = first(i, j);
        recall(sums);
    }
    void recall(const S* from) {
        each_of<M * N>([&](auto t) { tmm::load<t>(from + t * ROWS, sizeof(S)); });
    }
    void keep(S* to) {
        each_of<M * N>([&](auto t) { tmm::save<t>(to + t * ROWS, sizeof(S)); });
    }
    void save(float* to, ptrdiff_t stride) {
        if (rows_ == M * ROWS)
            each_of<M * N>([&](auto t) { tmm::save<t>(to + t / N * ROWS * stride + t % N * W, stride * sizeof(float)); });
        else each([=](int i, int j, S sum) { store(to + i * stride + j * W, sum); });
    }
    template <class F>
    void each(F f) {
        S sums[M * N * ROWS];
        keep(sums);
        for (int i = 0; i < rows_; ++i)
            for (int j = 0; j < N; ++j) f(i, j, sums[(i / ROWS * N + j) * ROWS + i % ROWS]);
    }

    static constexpr bool HAS_GAPS = false;

    // As Sums does it; nothing happens beside it.
    template <class Beside>
    void add(const typename T::scalar* a, ptrdiff_t lda, const typename T::weight* b, ptrdiff_t ldb, int64_t groups, Beside) {
        add(a, lda, b, ldb, groups);
    }
    void add(const typename T::scalar* a, ptrdiff_t lda, const typename T::weight* b, ptrdiff_t ldb, int64_t groups) {
        lda *= sizeof *a, ldb *= sizeof *b;
        const char *x = (const char*)a, *y = (const char*)b;
        if (rows_ == M * ROWS)
            for (; groups >= STEP; groups -= STEP, x += tmm::TILE_BYTES, y += STEP * ldb) step<true>(x, lda, y, ldb, STEP);
        for (; groups > 0; groups -= STEP, x += tmm::TILE_BYTES, y += STEP * ldb)
            step<false>(x, lda, y, ldb, (int)std::min<int64_t>(STEP, groups));
    }

  private:
    // `groups` of them, up to STEP, and as many rows as there are; if WHOLE, all.
    template <bool WHOLE>
    void step(const char* a, ptrdiff_t lda, const char* b, ptrdiff_t ldb, int groups) {
        each_of<M>([&](auto i) {
            const char* from = a + i * ROWS * lda;
            if (WHOLE) tmm::load<FIRST_A + i>(from, lda);
            else load_part<FIRST_A + i>(from, lda, rows_ - i * ROWS, groups * 4);
        });
        each_of<N>([&](auto j) {
            constexpr int J = j, B = FIRST_B + J % (8 - FIRST_B);
            if (WHOLE || groups == STEP) tmm::load<B>(b + J * W * 4, ldb);
            else load_part<B>(b + J * W * 4, ldb, groups, tmm::TILE_BYTES);
            each_of<M>([](auto i) { tmm::multiply<T, i * N + J, FIRST_A + i, B>(); });
        });
    }

    const int rows_;
};

#endif

}  // namespace firstlight::FIRSTLIGHT_VARIANT
