// Weights in few bits become a stretch of a panel, in the cache, just before the product reads it there.
#pragma once

#include "matmul.h"
#include "vec.h"

namespace firstlight::FIRSTLIGHT_VARIANT {

// float16 -> float32, exact; finite values only. As a float's bits it is 2^112 too small, subnormals included.
inline vf half(const uint16_t* p) {
    const vu u = __builtin_convertvector(load_as<vh>(p), vu);
    return bits((u & 0x8000u) << 16 | (vu)(bits((u & 0x7fffu) << 13) * 0x1p112f));
}

template <class S>
inline vi integers(const void* p) {
    typedef S narrow __attribute__((vector_size(W * sizeof(S))));
    return __builtin_convertvector(load_as<narrow>((const S*)p), vi);
}

// Inner scalars [k0, k1) of `N` vectors of outputs from `column` of a panel on -> T's panel, [(k1 - k0) / G, N W, G].
template <class T, int N, int BITS>
class Expansion {
  public:
    Expansion(const Blocks& from, int64_t width, int64_t panel, int64_t column)
        : from_(from), width_(width), panel_(panel), column_(column) {}

    void run(typename T::weight* to, int64_t k0, int64_t k1) const {
        for (int64_t k = k0; k < k1; k += from_.sub)
            for (int j = 0; j < N; ++j) {
                vf d = half(from_.d + place(from_.super, k, j));
                if (from_.sub_d) d *= number(from_.sub_d, k, j);
                vf m = from_.m ? half(from_.m + place(from_.super, k, j)) : d * all(-(float)from_.zero);
                if (from_.sub_m) m *= number(from_.sub_m, k, j);
                for (int64_t i = 0; i < from_.sub; i += 8) eight(to + (k - k0 + i) * (N * W) + j * W * T::PAIR, k + i, j, d, m);
            }
    }

  private:
    int64_t place(int64_t per, int64_t k, int j) const {
        return (panel_ * (width_ / per) + k / per) * PANEL + column_ + j * W;
    }
    vf number(const int8_t* p, int64_t k, int j) const {
        return __builtin_convertvector(integers<int8_t>(p + place(from_.sub, k, j)), vf);
    }
    void eight(typename T::weight* to, int64_t k, int j, vf d, vf m) const {
        vu low[2], high{};
        low[0] = load_as<vu>(from_.low + place(BITS == 8 ? 4 : 8, k, j));
        if constexpr (BITS == 8) low[1] = load_as<vu>(from_.low + place(4, k + 4, j));
        if constexpr (BITS == 5) high = (vu)integers<uint8_t>((const uint8_t*)from_.high + place(8, k, j));
        if constexpr (BITS == 6) high = (vu)integers<uint16_t>((const uint16_t*)from_.high + place(8, k, j));
        vf v[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            vu q;
            if constexpr (BITS == 8) q = low[i / 4] >> 8 * (i % 4) & 255u;
            else q = low[0] >> 4 * i & 15u;
            if constexpr (BITS == 5) q |= (high >> i & 1u) << 4;
            if constexpr (BITS == 6) q |= (high >> 2 * i & 3u) << 4;
            v[i] = fma(__builtin_convertvector((vi)q, vf), d, m);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i += T::PAIR) T::pack(to + i * (N * W), v + i);
    }

    const Blocks& from_;
    const int64_t width_, panel_, column_;
};

template <class T, int N>
inline void expand(typename T::weight* to, const Blocks& from, int64_t width, int64_t panel, int64_t column, int64_t k0, int64_t k1) {
    if (from.bits == 4) Expansion<T, N, 4>(from, width, panel, column).run(to, k0, k1);
    else if (from.bits == 5) Expansion<T, N, 5>(from, width, panel, column).run(to, k0, k1);
    else if (from.bits == 6) Expansion<T, N, 6>(from, width, panel, column).run(to, k0, k1);
    else Expansion<T, N, 8>(from, width, panel, column).run(to, k0, k1);
}

}  // namespace firstlight::FIRSTLIGHT_VARIANT
