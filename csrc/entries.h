// How K and V lie in blocks, and in what numbers a tile of attention multiplies by them.
//
// `Plain`: as the model computes. `Eighths`: bytes. Each entry is turned by a Hadamard matrix and rounded by itself with
// a scale of its own (quantise.h), so its bytes hang on nothing else. Scores are exact sums of bytes of K, which have no
// sign (128 is zero), and of a row of q that was turned and rounded the same way. V's scales go into the weights: with
// them the largest weight that a row has in a block is about 250, and the weights too are bytes.
#pragma once

#include <cmath>
#include <vector>

#include "attention.h"
#include "quantise.h"
#include "vec.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

constexpr int SPLIT = SPLIT_BLOCKS * BLOCK;
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
constexpr int TOPS = SPLIT_BLOCKS < W ? W : SPLIT_BLOCKS;  // of a row's blocks in a split, in whole vectors

// Where a product's sums go, those of a tile that begins at (row, column), and what they start from.
struct Stored {
    float* to;
    ptrdiff_t stride;
    template <class Sums>
    void begin(Sums& sums, int) const {
        sums.clear();
    }
    template <class Sums>
    void put(Sums& sums, int row, int column) const {
        sums.save(to + row * stride + column, stride);
    }
};

// A block's sums, each row's times `worth`, onto those of the blocks before it.
template <bool FIRST>
struct Added {
    float* to;
    ptrdiff_t stride;
    const float* worth;
    template <class Sums>
    void begin(Sums& sums, int) const {
        sums.clear();
    }
    template <class Sums>
    void put(Sums& sums, int row, int column) const {
        float* const first = to + row * stride + column;
        const float* const share = worth + row * TOPS;
        sums.each([=, step = stride](int i, int j, vi sum) {  // copies: a store might change what lies behind `this`
            float* at = first + i * step + j * W;
            store(at, fma(__builtin_convertvector(sum, vf), all(share[i * TOPS]), FIRST ? vf{} : load(at)));
        });
    }
};

template <class T>
struct Plain {
    using Model = T;
    using Query = T;   // rows of q times K
    using Weight = T;  // weights times V
    static constexpr bool BY_BLOCK = false;
    static constexpr ptrdiff_t words(ptrdiff_t dim) { return BLOCK * dim / T::PAIR; }  // of 32 bits, K or V of a block

    // What it takes to read K of one block, V of a split.
    struct Scores {
        template <class Sums>
        void begin(Sums& sums, int) const {
            sums.clear();
        }
        vf of(vf sum, int, int) const { return sum; }
    };
    struct Rows {
        void reserve(size_t, size_t) {}
    };
    struct Shares {
        void set(int, const uint32_t*, ptrdiff_t) {}
    };
    static void take(const typename T::scalar* q, int dim, float, typename T::row* to, Rows&, int) {
        for (int d = 0; d < dim; d += W) to_row<T>(to + d, q + d);
    }
    static Scores scores(const uint32_t*, ptrdiff_t, int, const Rows&, int, const Shares&, int) { return {}; }

    // What a strip keeps of a score is its level: here the score itself, of which one is worth `unit`.
    static float unit(float scale) { return scale; }
    static vf score(vf level, const Shares&, int) { return level; }
    static vf level(vf score, const Shares&, int) { return score; }
    // N vectors of a row's levels to weights, against `top`: what its highest level makes it, in powers of two.
    static float top(float highest, float scale) { return highest * scale; }
    template <int N>
    static void weights(const float* levels, typename T::row* to, vf scale, vf shift, const Shares&, int, vf& mass) {
        for (int i = 0; i < N; ++i) {
            const vf p = exp2<T::TERMS>(fma(load(levels + i * W), scale, shift));
            mass += p;
            to_row<T>(to + i * W, p);
        }
    }
    static float finish(float*, int) { return 1; }
};

template <class T>
struct Eighths {
    using Model = T;
    using Query = SignedBytes;
    using Weight = Bytes;
    static constexpr bool BY_BLOCK = true;  // weights have a top in each block of its own
    static constexpr ptrdiff_t words(ptrdiff_t dim) { return BLOCK * dim / 4 + BLOCK; }  // bytes, then scales
    static const float* scales(const uint32_t* block, ptrdiff_t dim) { return (const float*)(block + BLOCK * dim / 4); }

    struct Rows {
        std::vector<int32_t> start;  // takes the 128 out of K's bytes
        std::vector<float> step;     // what one of q's steps is worth, in powers of two
        std::vector<float> turned;   // room for one
        void reserve(size_t n, size_t dim) {
            if (start.size() < n) start.resize(n), step.resize(n);
            if (turned.size() < dim) turned.resize(dim);
        }
    };
    struct Scores {
        const float *scale, *log;
        const int32_t* start;
        const float* step;
        template <class Sums>
        void begin(Sums& sums, int row) const {
            sums.begin([&](int i, int) { return start[row + i] - vi{}; });
        }
        vf of(vi sum, int row, int column) const { return fma(__builtin_convertvector(sum, vf) * load(scale + column), all(step[row]), load(log + column)); }
    };
    // Of each entry of a split the logarithm of V's scale, to base 2, and the scale's reciprocal.
    struct Shares {
        float log[SPLIT], one_in[SPLIT];
        void set(int at, const uint32_t* v, ptrdiff_t dim) {
            const float* from = scales(v, dim);
            for (int e = 0; e < BLOCK; e += W) {
                store(log + at + e, load(from + e));
                store(one_in + at + e, exp2<5>(-load(from + e)));
            }
        }
    };
    static void take(const typename T::scalar* q, int dim, float scale, int8_t* to, Rows& rows, int row) {
        float* x = rows.turned.data();
        for (int d = 0; d < dim; d += W) store(x + d, T::widen(q + d));
        const auto [step, total] = quantise<0>(x, dim, (uint8_t*)to);
        rows.step[row] = step * scale;
        rows.start[row] = std::fabs(total) < 1e6f ? -128 * (int32_t)total : 0;  // q may hold no numbers
    }
    static Scores scores(const uint32_t* k, ptrdiff_t dim, int first, const Rows& rows, int row, const Shares& shares, int at) {
        return {scales(k, dim) + first, shares.log + at, &rows.start[row], &rows.step[row]};
    }

    // A level is a score in powers of two, with V's scale in it.
    static float unit(float) { return LN2; }
    static vf score(vf level, const Shares& shares, int at) { return level - load(shares.log + at); }
    static vf level(vf score, const Shares& shares, int at) { return score + load(shares.log + at); }
    static float top(float highest, float) { return highest - LOG2_MOST; }
    static vf shift(vf tops) { return all(LOG2_MOST) - tops + all(GRID); }
    // What a block's weights are worth beside `top`, its highest being theirs.
    static vf worth(vf shift, float top) { return exp2<5>(all(GRID) - shift - all(top)); }
    template <int N>
    static void weights(const float* levels, uint8_t* to, vf, vf shift, const Shares& shares, int at, vf& mass) {
        vf p[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            p[i] = exp2_steps(load(levels + i * W) + shift);
            mass = fma(p[i], load(shares.one_in + at + i * W), mass);
        }
        store_bytes<N>(to, p);
    }
    static float finish(float* out, int dim) {  // turned back
        hadamard(out, dim);
        return 1 / __builtin_sqrtf((float)hadamard_block(dim));
    }

  private:
    static constexpr float LOG2_MOST = 7.9375f;  // of 245: two steps more are 256
};

}  // namespace
}  // namespace firstlight::FIRSTLIGHT_VARIANT
