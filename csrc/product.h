// A product in tiles of sums: those of AMX for bf16 and bytes where the variant has them, the vectors of tile.h elsewhere.
// One type goes one way whatever the number of rows, so that a row's bits are its own.
#pragma once

#include <algorithm>

#include "amx_tile.h"
#include "tile.h"

namespace firstlight::FIRSTLIGHT_VARIANT {

// Vectors of a whole tile where there are many rows, and rows of a tile that is N vectors wide.
template <class T>
constexpr int WIDTH = BY_TILES<T> ? 2 : NV;
template <class T, int N>
constexpr int HEIGHT = !BY_TILES<T> ? MR : N > 2 ? tmm::TILE_ROWS : 2 * tmm::TILE_ROWS;

// A tile of bytes, whose products are short, as a function with all that it calls inside. What the compiler leaves outside
// has it put sums into memory and take them out again.
template <class T, int R, int N, class Body>
[[gnu::noinline, gnu::flatten]] void one_tile(const Body& body) {
    Sums<T, R, N> sums;
    body(sums);
}

// body(sums of `rows` rows, up to HEIGHT, by N vectors)
template <class T, int N, class Body>
inline void with_sums(int rows, Body body) {
    if constexpr (!BY_TILES<T>) {
        with_rows(rows, [&](auto R) {
            if constexpr (T::PAIR == 4) one_tile<T, R, N>(body);
            else {
                Sums<T, R, N> sums;
                body(sums);
            }
        });
    } else if (HEIGHT<T, N> == tmm::TILE_ROWS || rows <= tmm::TILE_ROWS) {
        TileSums<T, 1, N> sums(rows);
        body(sums);
    } else if constexpr (HEIGHT<T, N> > tmm::TILE_ROWS) {
        TileSums<T, 2, N> sums(rows);
        body(sums);
    }
}

// out[rows, columns] in tiles of sums: add(sums, row, column) for each tile, which begins there.
template <class P, class Out, class Add>
void product(int rows, int columns, const Out& out, Add add) {
    const auto vectors = [&](auto n_vectors, int n) {
        constexpr int N = n_vectors, MOST = HEIGHT<P, N>;
        for (int r = 0; r < rows; r += MOST)
            with_sums<P, N>(std::min(MOST, rows - r), [&](auto& sums) {
                out.begin(sums, r);
                add(sums, r, n);
                out.put(sums, r, n);
            });
    };
    constexpr int N = WIDTH<P>;
    int n = 0;
    for (; n + N * W <= columns; n += N * W) vectors(std::integral_constant<int, N>{}, n);
    if (N > 2 && n + 2 * W <= columns) vectors(std::integral_constant<int, 2>{}, n), n += 2 * W;
    for (; n < columns; n += W) vectors(std::integral_constant<int, 1>{}, n);
}

}  // namespace firstlight::FIRSTLIGHT_VARIANT
