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

// W bytes -> integers. Said in words of the instruction set where compilers would go byte by byte.
template <bool SIGNED>
inline vi bytes(const void* p) {
#if defined(__AVX512F__)
    const __m128i b = _mm_loadu_si128((const __m128i*)p);
    return (vi)(SIGNED ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
#elif defined(__AVX2__)
    const __m128i b = _mm_loadl_epi64((const __m128i*)p);
    return (vi)(SIGNED ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
#else
    vi v;
    for (int i = 0; i < W; ++i) v[i] = SIGNED ? ((const int8_t*)p)[i] : ((const uint8_t*)p)[i];
    return v;
#endif
}

// Inner scalars [k0, k1) of `N` vectors of outputs from `column` of a panel on -> T's panel, [(k1 - k0) / G, N W, G].
template <class T, int N, int BITS>
class Expansion {
  public:
    Expansion(const Blocks& from, int64_t width, int64_t panel, int64_t column)
        : from_(from), eights_(panel * (width / 8)), supers_(panel * (width / from.super)), subs_(panel * (width / from.sub)), column_(column) {}

    void run(typename T::weight* to, int64_t k0, int64_t k1) const {
        for (int64_t k = k0; k < k1; k += from_.sub) {
            const int64_t super = (supers_ + k / from_.super) * PANEL + column_, sub = (subs_ + k / from_.sub) * PANEL + column_;
            vf d[N], m[N];
            for (int j = 0; j < N; ++j) {
                d[j] = half(from_.d + super + j * W);
                if (from_.sub_d) d[j] *= number(from_.sub_d + sub + j * W);
                m[j] = from_.m ? half(from_.m + super + j * W) : d[j] * all(-(float)from_.zero);
                if (from_.sub_m) m[j] *= number(from_.sub_m + sub + j * W);
            }
            for (int64_t i = 0; i < from_.sub; i += 8)  // in the order in which words lie
#pragma GCC unroll 4
                for (int j = 0; j < N; ++j)
                    eight(to + (k - k0 + i) * (N * W) + j * W * T::PAIR, (eights_ + (k + i) / 8) * PANEL + column_ + j * W, d[j], m[j]);
        }
    }

  private:
    static constexpr int LOW = BITS == 8 ? 8 : 4;  // bits of a scalar in the words

    static vf number(const int8_t* p) { return __builtin_convertvector(bytes<true>(p), vf); }
    static vu moved(vu x, int up) { return up < 0 ? x >> -up : x << up; }

    // Eight scalars of each of W outputs, whose bits lie at `at`.
    void eight(typename T::weight* to, int64_t at, vf d, vf m) const {
        vu low[2], high{};
        if constexpr (BITS == 8) {  // two words of four
            const uint32_t* words = from_.low + at + (at & -(int64_t)PANEL);
            low[0] = load_as<vu>(words), low[1] = load_as<vu>(words + PANEL);
        } else low[0] = load_as<vu>(from_.low + at);
        if constexpr (BITS == 5) high = (vu)bytes<false>((const uint8_t*)from_.high + at);
        if constexpr (BITS == 6) high = __builtin_convertvector(load_as<vh>((const uint16_t*)from_.high + at), vu);
        vf v[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const int up = i % 2 * LOW;  // every other one is left where it is in the word, and d lowered for it: exact
            vu q = low[i * LOW / 32] >> (i - i % 2) * LOW % 32 & (uint32_t)((1 << LOW) - 1) << up;
            if constexpr (BITS == 5) q |= moved(high, up + 4 - i) & 16u << up;
            if constexpr (BITS == 6) q |= moved(high, up + 4 - 2 * i) & 48u << up;
            v[i] = fma(__builtin_convertvector((vi)q, vf), up ? d * all(1.0f / (1 << LOW)) : d, m);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i += T::PAIR) T::pack(to + i * (N * W), v + i);
    }

    const Blocks& from_;
    const int64_t eights_, supers_, subs_, column_;
};

template <class T, int N>
inline void expand(typename T::weight* to, const Blocks& from, int64_t width, int64_t panel, int64_t column, int64_t k0, int64_t k1) {
    if (from.bits == 4) Expansion<T, N, 4>(from, width, panel, column).run(to, k0, k1);
    else if (from.bits == 5) Expansion<T, N, 5>(from, width, panel, column).run(to, k0, k1);
    else if (from.bits == 6) Expansion<T, N, 6>(from, width, panel, column).run(to, k0, k1);
    else Expansion<T, N, 8>(from, width, panel, column).run(to, k0, k1);
}

}  // namespace firstlight::FIRSTLIGHT_VARIANT
