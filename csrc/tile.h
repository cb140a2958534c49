// The heart of every product: a tile of rows by vectors whose sums stay in registers while it runs along the inner
// dimension. What a sum adds up, and in which order, doesn't depend on the tile's shape.
#pragma once

#include <utility>

#include "vec.h"

namespace firstlight::FIRSTLIGHT_VARIANT {

// Rows and vectors of a whole tile: 24 sums where there are 32 registers, 12 where there are 16.
constexpr int MR = 6, NV = W == 16 ? 4 : 2;

template <class T, int R, int N>
struct Sums {
    using S = typename T::sum;
    static constexpr int MOST = R;  // rows
    static constexpr bool HAS_GAPS = true;  // between its products, for other work
    S at[R][N];

    // f(row, vector, sum) for all of them.
    template <class F>
    inline void each(F f) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) f(i, j, at[i][j]);
    }
    inline void clear() {
        each([](int, int, S& sum) { sum = S{}; });
    }
    // Each starts from first(row, vector).
    template <class F>
    inline void begin(F first) {
        each([=](int i, int j, S& sum) { sum = first(i, j); });
    }
    // From and to where they wait, R N vectors.
    inline void recall(const S* from) {
        each([=](int i, int j, S& sum) { sum = from[i * N + j]; });
    }
    inline void keep(S* to) {
        each([=](int i, int j, S sum) { to[i * N + j] = sum; });
    }
    inline void save(float* to, ptrdiff_t stride) {
        each([=](int i, int j, S sum) { store(to + i * stride + j * W, sum); });
    }

    // += a[R, groups] b[groups, N vectors]: rows of a lie `lda` scalars apart, groups of b `ldb`. beside(group) is called for
    // each group: what it does runs in the gaps that the products leave.
    template <class Beside>
    inline __attribute__((always_inline)) void add(const typename T::row* a, ptrdiff_t lda, const typename T::weight* b, ptrdiff_t ldb, int64_t groups, Beside beside) {
#pragma GCC unroll 2
        for (int64_t g = 0; g < groups; ++g, a += T::PAIR, b += ldb) {
            beside(g);
            add_steps<0>(a, lda, b);
        }
    }
    inline __attribute__((always_inline)) void add(const typename T::row* a, ptrdiff_t lda, const typename T::weight* b, ptrdiff_t ldb, int64_t groups) {
        add(a, lda, b, ldb, groups, [](int64_t) {});
    }

  private:
    // A group in its steps; no loop over them, with which the compiler spills the sums where much runs beside.
    template <int STEP>
    inline __attribute__((always_inline)) void add_steps(const typename T::row* a, ptrdiff_t lda, const typename T::weight* b) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const auto x = T::row_at(a + i * lda, STEP);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) at[i][j] = T::dot(at[i][j], x, T::vector_at(b + j * W * T::PAIR, STEP));
        }
        if constexpr (STEP + 1 < T::STEPS) add_steps<STEP + 1>(a, lda, b);
    }
};

// body(std::integral_constant of `rows`), which is 1 to R.
template <int R = MR, class Body>
inline void with_rows(int64_t rows, Body body) {
    if (rows == R) body(std::integral_constant<int, R>{});
    else if constexpr (R > 1) with_rows<R - 1>(rows, body);
}

}  // namespace firstlight::FIRSTLIGHT_VARIANT
