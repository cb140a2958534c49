// Row-local operators: norm, rotation, gate, KV write. One pass over memory each, rows shared out among threads.
//
// A row is always computed the same way, so its bits don't depend on its neighbours or on the threads.
#include "rows.h"

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "quantise.h"
#include "vec.h"

namespace firstlight::FIRSTLIGHT_VARIANT {
namespace {

constexpr float LEAST_SCALE = 0x1p-60f;  // of an entry of V, whose logarithm is kept
constexpr int64_t WORTH = 1 << 14;  // scalars below which a second thread costs more than it brings

template <class Body>
void each_row(int64_t rows, int64_t scalars, int threads, Body body) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && scalars > WORTH)
    for (int64_t i = 0; i < rows; ++i) body(i);
}

// body(vector at j) for all of [0, width): the last, short one goes through a padded copy.
template <class T, class Body>
inline void each_vector(typename T::scalar* out, int64_t width, Body body) {
    int64_t j = 0;
    for (; j + W <= width; j += W) T::narrow(out + j, body(j, W));
    if (j < width) {
        typename T::scalar rest[W];
        T::narrow(rest, body(j, (int)(width - j)));
        std::memcpy(out + j, rest, (width - j) * sizeof rest[0]);
    }
}

template <class T>
inline vf some(const typename T::scalar* p, int n) {
    if (n == W) return T::widen(p);
    typename T::scalar padded[W] = {};
    std::memcpy(padded, p, n * sizeof padded[0]);
    return T::widen(padded);
}

inline vf squares(const vf v, vf sum) { return fma(v, v, sum); }

// 1 / root mean square of a row whose squares were summed lane by lane
inline float scale_of(vf squares, int64_t width, float eps) { return 1 / __builtin_sqrtf(sum(squares) / (float)width + eps); }

inline int reach(int64_t j, int64_t width) { return (int)(width - j < W ? width - j : W); }

inline float in_scale(const RowArgs& a, int64_t i) { return a.in_scale ? a.in_scale[i] : 1.0f; }

// Row i of the output from value(j, n), the n scalars from j on: in T, or as bytes with a scale that gets times `factor`.
template <class T, class Value>
inline void write_row(const RowArgs& a, int64_t i, float factor, Value value) {
    if (!a.out_scale) {
        each_vector<T>((typename T::scalar*)a.out + i * a.out_row, a.width, [&](int64_t j, int n) { return value(j, n) * all(factor); });
        return;
    }
    float* row = row_buffer(a.width);
    const float* const smooth = a.smooth;  // here, since a store might change what lies behind `a`
    each_vector<F32>(row, a.width, [=](int64_t j, int n) { return value(j, n) * some<F32>(smooth + j, n); });
    a.out_scale[i] = factor * quantise<128>(row, a.width, (uint8_t*)a.out + i * a.out_row).step;
}

template <class T>
void norm_as(const RowArgs& a, const float* gain, float eps) {
    using S = typename T::scalar;
    each_row(a.rows, a.rows * a.width, a.threads, [&](int64_t i) {
        const S* x = (const S*)a.in + i * a.in_row;
        vf sums = {};
        for (int64_t j = 0; j < a.width; j += W) sums = squares(some<T>(x + j, reach(j, a.width)), sums);
        const float factor = scale_of(sums, a.width, eps);
        write_row<T>(a, i, factor, [&](int64_t j, int n) { return some<T>(x + j, n) * some<F32>(gain + j, n); });
    });
}

// x += row i of the input, if there is one; the sum of squares of what x then is, lane by lane.
template <class T>
inline vf add_row(const RowArgs& a, int64_t i, float* x) {
    const typename T::scalar* add = (const typename T::scalar*)a.in + i * a.in_row;
    const vf scale = all(in_scale(a, i));
    vf sums = {};
    for (int64_t j = 0; j < a.width; j += W) {
        const int n = reach(j, a.width);
        vf v = some<F32>(x + j, n);
        if (a.in) {
            v = fma(some<T>(add + j, n), scale, v);
            each_vector<F32>(x + j, n, [&](int64_t, int) { return v; });
        }
        sums = squares(v, sums);
    }
    return sums;
}

template <class T>
void add_norm_as(const RowArgs& a, float* residual, int64_t x_row, const float* gain, float eps) {
    each_row(a.rows, a.rows * a.width, a.threads, [&](int64_t i) {
        float* x = residual + i * x_row;
        const float factor = scale_of(add_row<T>(a, i, x), a.width, eps);
        write_row<T>(a, i, factor, [&](int64_t j, int n) { return some<F32>(x + j, n) * some<F32>(gain + j, n); });
    });
}

template <class T>
void add_rows_as(const RowArgs& a, float* x, int64_t x_row) {
    each_row(a.rows, a.rows * a.width, a.threads, [&](int64_t i) { add_row<T>(a, i, x + i * x_row); });
}

template <class T>
void copy_as(const RowArgs& a) {
    each_row(a.rows, a.rows * a.width, a.threads, [&](int64_t i) {
        const typename T::scalar* x = (const typename T::scalar*)a.in + i * a.in_row;
        write_row<T>(a, i, in_scale(a, i), [&](int64_t j, int n) { return some<T>(x + j, n); });
    });
}

template <class T>
void shift_as(const RowArgs& a, const float* by) {
    each_row(a.rows, a.rows * a.width, a.threads, [&](int64_t i) {
        const typename T::scalar* x = (const typename T::scalar*)a.in + i * a.in_row;
        write_row<T>(a, i, 1.0f, [&](int64_t j, int n) { return some<T>(x + j, n) + some<F32>(by + j, n); });
    });
}

template <class T>
void rotate_as(const RowArgs& a, int64_t heads, const float* cos, const float* sin, const float* gain, float eps) {
    using S = typename T::scalar;
    const int64_t half = a.width / 2;
    each_row(a.rows, a.rows * heads * a.width, a.threads, [&](int64_t i) {
        const float *c = cos + i * a.width, *s = sin + i * a.width;
        const vf scale = all(in_scale(a, i));
        for (int64_t h = 0; h < heads; ++h) {
            const S* x = (const S*)a.in + i * a.in_row + h * a.width;
            S* out = (S*)a.out + i * a.out_row + h * a.width;
            vf by = scale;
            if (gain) {
                vf sums = {};
                for (int64_t j = 0; j < a.width; j += W) sums = squares(some<T>(x + j, reach(j, a.width)) * scale, sums);
                by = scale * all(scale_of(sums, a.width, eps));
            }
            const auto read = [&](int64_t j, int n) {
                const vf v = some<T>(x + j, n) * by;
                return gain ? v * some<F32>(gain + h * a.width + j, n) : v;
            };
            for (int64_t j = 0; j < half; j += W) {  // both halves are read before either is written: `out` may be `in`
                const int n = reach(j, half);
                const vf lo = read(j, n), hi = read(half + j, n);
                const vf new_lo = fma(hi, some<F32>(s + j, n), lo * some<F32>(c + j, n));
                const vf new_hi = fma(lo, some<F32>(s + half + j, n), hi * some<F32>(c + half + j, n));
                each_vector<T>(out + j, n, [&](int64_t, int) { return new_lo; });
                each_vector<T>(out + half + j, n, [&](int64_t, int) { return new_hi; });
            }
        }
    });
}

// 1 / (1 + e^-x), as precisely as T's numbers are kept; `by` times x is its exponent to base 2.
template <class T>
inline vf sigmoid(vf x, vf by) { return reciprocal<T::TERMS>(all(1.0f) + exp2<T::TERMS>(-max(x * by, all(-126.0f)))); }

template <class T>
void gate_as(const RowArgs& a, Gate gate) {
    using S = typename T::scalar;
    constexpr float LOG2E = 1.44269504f;
    each_row(a.rows, a.rows * a.width, a.threads, [&](int64_t i) {
        const S *x = (const S*)a.in + i * a.in_row, *up = x + a.width;
        const float scale = in_scale(a, i);
        const vf one = all(scale), both = all(scale * scale), by = all(scale * LOG2E);
        if (gate == Gate::silu) {
            write_row<T>(a, i, 1.0f, [=](int64_t j, int n) {
                const vf g = some<T>(x + j, n);
                return g * some<T>(up + j, n) * (sigmoid<T>(g, by) * both);
            });
            return;
        }
        write_row<T>(a, i, 1.0f, [=](int64_t j, int n) {
            const vf g = some<T>(x + j, n) * one;
            // tanh form of GELU: (1 + tanh(u)) / 2 = sigmoid(2u)
            const vf inner = fma(all(0.044715f) * g * g, g, g);
            return g * (some<T>(up + j, n) * one) * sigmoid<T>(inner, all(1.5957691f * LOG2E));
        });
    });
}

template <class T>
void write_as(const KVArgs& a) {
    using S = typename T::scalar;
    constexpr int P = T::PAIR;
    const int64_t block = BLOCK * a.dim;
    each_row(a.rows, a.rows * a.heads * a.dim, a.threads, [&](int64_t i) {
        for (int64_t h = 0; h < a.heads; ++h) {
            const int64_t slot = a.slots[i * a.heads + h], place = slot % BLOCK;
            const S *k = (const S*)a.k + i * a.k_row + h * a.dim, *v = (const S*)a.v + i * a.v_row + h * a.dim;
            S* to = (S*)a.k_blocks + slot / BLOCK * block + place * P;  // [D / P, 64, P]
            for (int64_t d = 0; d < a.dim; d += P, to += BLOCK * P) std::memcpy(to, k + d, P * sizeof(S));
            to = (S*)a.v_blocks + slot / BLOCK * block + place / P * P * a.dim + place % P;  // [64 / P, D, P]
            for (int64_t d = 0; d < a.dim; ++d) to[d * P] = v[d];
        }
    });
}

// The same as bytes (entries.h): K [D / 4, 64, 4], 128 is zero, then the 64 scales; V [16, D, 4], then their logarithms.
template <class T>
void write_bytes_as(const KVArgs& a) {
    using S = typename T::scalar;
    const int64_t words = BLOCK * a.dim / 4;
    each_row(a.rows, a.rows * a.heads * a.dim, a.threads, [&](int64_t i) {
        float* row = row_buffer(a.dim);
        static thread_local std::vector<uint8_t> room;
        room.resize(a.dim);
        uint8_t* const bytes = room.data();  // found once: looking a thread's own memory up is a call
        const int64_t dim = a.dim;           // here, since bytes may be stored anywhere
        const auto widened = [=](const S* x) {
            for (int64_t d = 0; d < dim; d += W) each_vector<F32>(row + d, reach(d, dim), [&](int64_t, int n) { return some<T>(x + d, n); });
            return row;
        };
        for (int64_t h = 0; h < a.heads; ++h) {
            const int64_t slot = a.slots[i * a.heads + h], place = slot % BLOCK, at = slot / BLOCK * (words + BLOCK);
            uint32_t *k = (uint32_t*)a.k_blocks + at, *v = (uint32_t*)a.v_blocks + at;
            const float k_scale = quantise<128>(widened((const S*)a.k + i * a.k_row + h * dim), dim, bytes).step;
            for (int64_t d = 0; d < dim / 4; ++d) std::memcpy(k + d * BLOCK + place, bytes + 4 * d, 4);
            std::memcpy(k + words + place, &k_scale, 4);
            const float v_scale = std::log2(std::max(quantise<0>(widened((const S*)a.v + i * a.v_row + h * dim), dim, bytes).step, LEAST_SCALE));
            uint8_t* to = (uint8_t*)(v + place / 4 * dim) + place % 4;
            for (int64_t d = 0; d < dim; ++d) to[4 * d] = bytes[d];
            std::memcpy(v + words + place, &v_scale, 4);
        }
    });
}

template <class T>
void read_keys_as(const KeysArgs& a) {
    const int64_t words = BLOCK * a.dim / 4;
    const float unit = __builtin_sqrtf((float)hadamard_block(a.dim));
    each_row(a.blocks * BLOCK, a.blocks * BLOCK * a.dim, a.threads, [&](int64_t i) {
        float* row = row_buffer(a.dim);
        const int64_t place = i % BLOCK, dim = a.dim;
        const uint32_t* k = (const uint32_t*)a.k_blocks + a.table[i / BLOCK] * (words + BLOCK) + place;
        float scale;
        std::memcpy(&scale, k + words, sizeof scale);
        for (int64_t d = 0; d < dim; d += 4)
            for (int b = 0; b < 4; ++b) row[d + b] = (float)((int)(k[d / 4 * BLOCK] >> 8 * b & 255) - 128) * scale;
        hadamard(row, dim);
        each_vector<T>((typename T::scalar*)a.out + i * dim, dim, [&](int64_t d, int n) { return some<F32>(row + d, n) / all(unit); });
    });
}

}  // namespace

void rms_norm(const RowArgs& a, const float* gain, float eps) { (a.bf16 ? norm_as<BF16> : norm_as<F32>)(a, gain, eps); }
void add_norm(const RowArgs& a, float* x, int64_t x_row, const float* gain, float eps) {
    (a.bf16 ? add_norm_as<BF16> : add_norm_as<F32>)(a, x, x_row, gain, eps);
}
void add_rows(const RowArgs& a, float* x, int64_t x_row) { (a.bf16 ? add_rows_as<BF16> : add_rows_as<F32>)(a, x, x_row); }
void copy_rows(const RowArgs& a) { (a.bf16 ? copy_as<BF16> : copy_as<F32>)(a); }
void shift_rows(const RowArgs& a, const float* by) { (a.bf16 ? shift_as<BF16> : shift_as<F32>)(a, by); }
void rotate(const RowArgs& a, int64_t heads, const float* cos, const float* sin, const float* gain, float eps) {
    (a.bf16 ? rotate_as<BF16> : rotate_as<F32>)(a, heads, cos, sin, gain, eps);
}
void gate_mul(const RowArgs& a, Gate gate) { (a.bf16 ? gate_as<BF16> : gate_as<F32>)(a, gate); }
void write_kv(const KVArgs& a) {
    if (a.bytes) (a.bf16 ? write_bytes_as<BF16> : write_bytes_as<F32>)(a);
    else (a.bf16 ? write_as<BF16> : write_as<F32>)(a);
}
void read_keys(const KeysArgs& a) { (a.bf16 ? read_keys_as<BF16> : read_keys_as<F32>)(a); }

}  // namespace firstlight::FIRSTLIGHT_VARIANT
