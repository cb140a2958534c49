// A row turned and rounded to 8 bits: the input of an int8 linear.
//
// Each block of a row (the largest power of two that divides its width, at most 512) is multiplied by a Hadamard matrix,
// so that a few large channels become many middling ones (QuaRot, arXiv 2404.00456). The weights' blocks are turned the
// same way, and the product stays what it was. The row's largest value then becomes 127.
#pragma once

#include <vector>

#include "vec.h"

namespace firstlight::FIRSTLIGHT_VARIANT {

constexpr int64_t LARGEST_BLOCK = 512;

inline int64_t hadamard_block(int64_t width) {
    const int64_t block = width & -width;
    return block < LARGEST_BLOCK ? block : LARGEST_BLOCK;
}

// One stage inside a vector: sum and difference of lanes H apart.
template <int H>
inline vf lanes(vf v) {
    vi other;
    vf sign;
    for (int l = 0; l < W; ++l) other[l] = l ^ H, sign[l] = l & H ? -1.0f : 1.0f;
    v = fma(v, sign, __builtin_shuffle(v, other));
    if constexpr (2 * H < W) v = lanes<2 * H>(v);
    return v;
}

// log2(N) stages between N vectors; LANES: first those inside each.
template <int N, bool LANES>
inline void turn(vf (&v)[N]) {
    if constexpr (LANES)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) v[i] = lanes<1>(v[i]);
#pragma GCC unroll 3
    for (int h = 1; h < N; h *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
            if (!(i & h)) {
                const vf a = v[i], b = v[i + h];
                v[i] = a + b, v[i + h] = a - b;
            }
}

// The same of N vectors that lie `step` scalars apart.
template <int N, bool LANES>
inline void across(float* x, int64_t step) {
    vf v[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = load(x + i * step);
    turn<N, LANES>(v);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(x + i * step, v[i]);
}

template <int N>
inline void all_across(float* x, int64_t width, int64_t step) {
    if (step == W)
        for (int64_t b = 0; b < width; b += W * N) across<N, true>(x + b, W);
    else
        for (int64_t b = 0; b < width; b += step * N)
            for (int64_t j = 0; j < step; j += W) across<N, false>(x + b + j, step);
}

// Blocks of a row times a Hadamard matrix of entries +-1: log2(block) stages of sums and differences.
inline void hadamard_of_any(float* x, int64_t width) {
    const int64_t block = hadamard_block(width);
    if (block < W) {
        for (int64_t h = 1; h < block; h *= 2)
            for (int64_t i = 0; i < width; ++i)
                if (!(i & h)) {
                    const float a = x[i], b = x[i + h];
                    x[i] = a + b, x[i + h] = a - b;
                }
        return;
    }
    if (block == W)
        for (int64_t j = 0; j < width; j += W) store(x + j, lanes<1>(load(x + j)));
    for (int64_t step = W; step < block;) {
        const int64_t left = block / step;
        if (left >= 8) all_across<8>(x, width, step), step *= 8;
        else if (left == 4) all_across<4>(x, width, step), step *= 4;
        else all_across<2>(x, width, step), step *= 2;
    }
}

constexpr int64_t HELD = 4 * W;  // a row of so many stays in registers: a head of 64 where vectors have 16 lanes

inline void hadamard(float* x, int64_t width) {
    if (width == HELD) across<4, true>(x, W);
    else hadamard_of_any(x, width);
}

// What bytes of a row are worth: a step of them, and their sum, each counted from where zero is.
struct Rounded {
    float step, total;
};

// How numbers become bytes around ZERO, the largest of them 127 away from it.
template <int ZERO>
class Rounding {
  public:
    explicit Rounding(float most) : most_(most), steps_(all(most > TINY ? 127 / most : 0)) {}
    vb operator()(vf x) {
        const vf rounded = fma(x, steps_, all(MAGIC + ZERO));  // integers end in the low bits
        total_ += rounded - all(MAGIC + ZERO);
        return low_bytes((vu)rounded);
    }
    Rounded of(int64_t width) const { return {most_ / (127 * __builtin_sqrtf((float)hadamard_block(width))), sum(total_)}; }

  private:
    static constexpr float TINY = 1e-30f, MAGIC = 12582912.0f;  // below TINY a row counts as zeros: its reciprocal would overflow
    const float most_;
    const vf steps_;
    vf total_ = {};
};

// The row `x` as bytes around ZERO. `x` is zero from `width` to the end of its last vector.
template <int ZERO>
inline Rounded quantise(float* x, int64_t width, uint8_t* out) {
    const auto size = [](vf v) { return max(v, -v); };
    if (width == HELD) {
        vf v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) v[i] = load(x + i * W);
        turn<4, true>(v);
        Rounding<ZERO> round(highest_fast(max(max(size(v[0]), size(v[1])), max(size(v[2]), size(v[3])))));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const vb bytes = round(v[i]);
            std::memcpy(out + i * W, &bytes, W);
        }
        return round.of(width);
    }
    hadamard_of_any(x, width);
    vf tops[4] = {};  // side by side: each waits for its own last one
    int64_t j = 0;
    const auto see = [&](vf& top, vf v) { top = max(top, size(v)); };
    for (; j + 4 * W <= width; j += 4 * W)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) see(tops[k], load(x + j + k * W));
    for (; j < width; j += W) see(tops[0], load(x + j));
    Rounding<ZERO> round(highest_fast(max(max(tops[0], tops[1]), max(tops[2], tops[3]))));
    for (j = 0; j + W <= width; j += W) {
        const vb whole = round(load(x + j));
        std::memcpy(out + j, &whole, W);
    }
    if (j < width) {
        const vb part = round(load(x + j));
        std::memcpy(out + j, &part, width - j);
    }
    return round.of(width);
}

// A thread's row of float32, with zeros behind it up to a whole vector.
inline float* row_buffer(int64_t width) {
    static thread_local std::vector<float> row;
    const size_t padded = (size_t)((width + W - 1) / W * W);
    if (row.size() < padded) row.resize(padded);
    for (size_t j = (size_t)width; j < padded; ++j) row[j] = 0;
    return row.data();
}

}  // namespace firstlight::FIRSTLIGHT_VARIANT
