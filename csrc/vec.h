// Vectors of float as wide as the instruction set of this translation unit, and the few operations kernels need.
//
// Every kernel file is compiled once for each variant in CMakeLists.txt; FIRSTLIGHT_VARIANT names its namespace. Code
// above this header is the same for all of them. A lane never looks at its neighbours, so a row's bits don't depend on
// the rows that are computed beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace firstlight::FIRSTLIGHT_VARIANT {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

template <class V, class T>
inline V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vf load(const float* p) { return load_as<vf>(p); }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf all(float x) { return x - vf{}; }
inline vf bits(vu u) { return (vf)u; }

inline vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted to one rounding where the set has it

inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// x in lanes whose bit is set, `otherwise` in the others.
inline vf where(uint64_t bits, vf x, float otherwise) {
#if defined(__AVX512F__)
    return (vf)_mm512_mask_mov_ps((__m512)all(otherwise), (__mmask16)bits, (__m512)x);
#else
    vu lane;
    for (int i = 0; i < W; ++i) lane[i] = 1u << i;
    return (((uint32_t)bits - vu{}) & lane) != 0 ? x : all(otherwise);
#endif
}

inline float highest(vf v) {
    float top = v[0];
    for (int i = 1; i < W; ++i) top = v[i] > top ? v[i] : top;
    return top;
}
inline float sum(vf v) {  // in pairs, always the same ones
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[W];
    store(part, v);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) part[i] += part[i + n];
    return part[0];
#endif
}
#if defined(__AVX512F__)
inline float highest_fast(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float highest_fast(vf v) { return highest(v); }
#endif

// The highest of neighbours: those of a, then those of b.
inline vf highest_pairs(vf a, vf b) {
    vi even, odd;
    for (int l = 0; l < W; ++l) even[l] = 2 * l, odd[l] = 2 * l + 1;
    return max(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd));
}
template <int N>
inline vf highest_parts(const vf* v) {
    if constexpr (N == 1) return *v;
    else return highest_pairs(highest_parts<N / 2>(v), highest_parts<N / 2>(v + N / 2));
}
// Lane l is the highest of vector l % N. N is a power of two, up to W.
template <int N>
inline vf highest_each(const vf* v) {
    vf tops = highest_parts<N>(v);
    for (int n = N; n < W; n *= 2) tops = highest_pairs(tops, tops);
    return tops;
}

// 1 / x for x in [1, 2^126]: to a unit in the last place (TERMS 5), or to 1e-4 (TERMS 3).
template <int TERMS>
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
    const vf near = (vf)_mm512_rcp14_ps((__m512)x);
    if constexpr (TERMS == 3) return near;
    else return fma(near, fma(-x, near, all(1.0f)), near);  // a step of Newton's doubles its bits, and takes less than a division
#else
    return all(1.0f) / x;
#endif
}

// 2^x for x < 127; exactly 1 at 0 and exactly 0 from -127 down, -inf included. Relative error 1e-7 (TERMS 5) or 1e-4 (TERMS
// 3, for numbers that are rounded to 8 bits): minimax polynomials on [-1/2, 1/2] through 1 at 0.
template <int TERMS>
inline vf exp2(vf x) {
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    x = max(x, all(-127.0f));  // where the exponent below becomes 0, and with it the number
    const vf t = x + magic;
    const vf f = x - (t - magic);
    vf p;
    if constexpr (TERMS == 5) {
        p = all(1.3264727e-3f);
        p = fma(p, f, all(9.6715130e-3f));
        p = fma(p, f, all(5.5507336e-2f));
        p = fma(p, f, all(2.4022242e-1f));
        p = fma(p, f, all(6.9314700e-1f));
    } else {
        p = all(5.5008930e-2f);
        p = fma(p, f, all(2.4221096e-1f));
        p = fma(p, f, all(6.9328293e-1f));
    }
    p = fma(p, f, all(1.0f));
    const vi scaled = (vi)p + ((vi)t << 23);
    return (vf)scaled;
}
// The same from a sum that was rounded to steps of 1/32 by a term of GRID: the next power, from a table. To 1.1 %, either way,
// for numbers of which only 8 bits are kept, in half of the operations.
constexpr float GRID = 393216.0f;  // 1.5 * 2^18
#if defined(__AVX512F__)
static constexpr uint32_t POWERS[32] = {0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};  // bits of 2^(i / 32), less i << 18
#endif
inline vf exp2_steps(vf t) {
#if defined(__AVX512F__)
    const vi n = (vi)_mm512_max_epi32((__m512i)t, _mm512_set1_epi32(0x48c00000 - 127 * 32));  // from -127 down exactly 0
    const __m512i power = _mm512_permutex2var_epi32(_mm512_loadu_si512(POWERS), (__m512i)n, _mm512_loadu_si512(POWERS + 16));
    return (vf)((vi)power + (n << 18));
#else
    return exp2<3>(t - all(GRID));
#endif
}
// The lowest byte of each lane.
typedef uint8_t vb __attribute__((vector_size(W)));
inline vb low_bytes(vu u) {
#if defined(__AVX512F__)
    return (vb)_mm512_cvtepi32_epi8((__m512i)u);
#else
    return __builtin_convertvector(u, vb);
#endif
}

// N vectors of numbers in [0, 255], rounded to bytes: to nearest, ties to even.
template <int N>
inline void store_bytes(uint8_t* p, const vf (&v)[N]) {
#if defined(__AVX512F__)
    if constexpr (N == 4) {
        const auto rounded = [&](int i) { return _mm512_cvtps_epi32((__m512)v[i]); };
        const __m512i low = _mm512_packus_epi32(rounded(0), rounded(1)), high = _mm512_packus_epi32(rounded(2), rounded(3));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packs go lane by lane
        return _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
    }
#endif
    for (int i = 0; i < N; ++i) {
        const vb bytes = low_bytes((vu)(v[i] + all(12582912.0f)));  // integers end in the low bits
        std::memcpy(p + i * W, &bytes, W);
    }
}

inline float exp2_one(float x) { return exp2<5>(all(x))[0]; }

// Other threads see what was written past the caches once they have met this one behind it.
inline void end_of_stores() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// --- storage types: a scalar of the model, and the group of PAIR scalars that one step of an inner product takes ------
//
// A product is one of rows by vectors: `row_at` is a group of a row's in all lanes, `vector_at` one of each lane's own, `dot`
// adds their products. Where the set has none of whole groups they take STEPS, for each of which numbers are made ready. Rows
// are of type `row`, into which a model's scalars are turned before.

struct F32 {
    using scalar = float;
    using weight = float;
    using row = float;
    using sum = vf;
    static constexpr int PAIR = 1, STEPS = 1;
    static constexpr int TERMS = 5;
    static vf row_at(const float* a, int) { return all(*a); }
    static vf vector_at(const float* b, int) { return load(b); }
    static vf dot(vf acc, vf a, vf b) { return fma(a, b, acc); }
    static vf widen(const float* p) { return load(p); }
    static void narrow(float* p, vf v) { store(p, v); }
    static void narrow_past(float* p, vf a, vf b) { store(p, a), store(p + W, b); }
    static void pack(float* p, const vf* v) { store(p, *v); }  // PAIR numbers of each lane side by side
};

struct BF16 {
    using scalar = uint16_t;
    using weight = uint16_t;
    using sum = vf;
    static constexpr int PAIR = 2;
    static constexpr int TERMS = 3;
#if defined(__AVX512BF16__)
    using row = uint16_t;
    static constexpr int STEPS = 1;
    static vu row_at(const uint16_t* a, int) { return group_at(a); }
    static vu vector_at(const uint16_t* b, int) { return load_as<vu>(b); }
    static vf dot(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b); }
#else  // in float32, where products of bf16 are exact, too
    using row = float;
    static constexpr int STEPS = 2;
    static vf row_at(const float* a, int step) { return all(a[step]); }
    static vf vector_at(const uint16_t* b, int step) {
        const vu pair = load_as<vu>(b);
        return bits(step ? pair & all_bits(0xffff0000u) : pair << 16);
    }
    static vf dot(vf acc, vf a, vf b) { return fma(a, b, acc); }
#endif
    static vu group_at(const uint16_t* a) {
        uint32_t pair;
        std::memcpy(&pair, a, sizeof pair);
        return pair - vu{};
    }
    static vu all_bits(uint32_t x) { return x - vu{}; }
    static vf widen(const uint16_t* p) { return bits(__builtin_convertvector(load_as<vh>(p), vu) << 16); }
    static void narrow(uint16_t* p, vf v) {  // to nearest, ties to even; finite values only
#if defined(__AVX512BF16__)
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(p, &rounded, sizeof rounded);
#else
        const vu u = (vu)v;
        const vh rounded = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, vh);
        std::memcpy(p, &rounded, sizeof rounded);
#endif
    }
    // The same of 2 W numbers, a whole line at once, past the caches.
    static void narrow_past(uint16_t* p, vf a, vf b) {
#if defined(__AVX512F__)
        alignas(64) uint16_t line[2 * W];
        narrow(line, a), narrow(line + W, b);
        _mm512_stream_si512((__m512i*)p, _mm512_load_si512(line));
#else
        narrow(p, a), narrow(p + W, b);
#endif
    }
    static void pack(uint16_t* p, const vf* v) {
#if defined(__AVX512BF16__)
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_loadu_si512(interleaved), both));
#else
        const auto rounded = [](vf x) { return (vu)x + 0x7fffu + ((vu)x >> 16 & 1u); };
        const vu both = rounded(v[0]) >> 16 | (rounded(v[1]) & 0xffff0000u);
        std::memcpy(p, &both, sizeof both);
#endif
    }
#if defined(__AVX512BF16__)
    static constexpr uint16_t interleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif
};

// W numbers, or scalars of a model, as a product's rows take them.
template <class T>
inline void to_row(typename T::row* to, vf v) {
    if constexpr (std::is_same_v<typename T::row, typename T::scalar>) T::narrow(to, v);
    else store(to, v);
}
template <class T>
inline void to_row(typename T::row* to, const typename T::scalar* from) {
    if constexpr (std::is_same_v<typename T::row, typename T::scalar>) std::memcpy(to, from, W * sizeof *to);
    else store(to, T::widen(from));
}

// Bytes: products of those without a sign by those with one, summed exactly in 32 bits. Without dot products of four they
// become 16 bits, the even ones and then the odd ones, without those of two 32 bits.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int BYTE_STEPS = 1;
inline vi unsigned_bytes(vi x, int) { return x; }
inline vi signed_bytes(vi x, int) { return x; }
#if defined(__AVX512VNNI__)
inline vi add_bytes(vi acc, vi a, vi b) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
#else
inline vi add_bytes(vi acc, vi a, vi b) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b); }
#endif
#elif defined(__AVX512BW__)
constexpr int BYTE_STEPS = 2;
inline vi unsigned_bytes(vi x, int step) { return step ? (vi)_mm512_srli_epi16((__m512i)x, 8) : x & 0x00ff00ff; }
inline vi signed_bytes(vi x, int step) { return (vi)_mm512_srai_epi16(step ? (__m512i)x : _mm512_slli_epi16((__m512i)x, 8), 8); }
inline vi add_bytes(vi acc, vi a, vi b) { return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
constexpr int BYTE_STEPS = 2;
inline vi unsigned_bytes(vi x, int step) { return step ? (vi)_mm256_srli_epi16((__m256i)x, 8) : x & 0x00ff00ff; }
inline vi signed_bytes(vi x, int step) { return (vi)_mm256_srai_epi16(step ? (__m256i)x : _mm256_slli_epi16((__m256i)x, 8), 8); }
inline vi add_bytes(vi acc, vi a, vi b) { return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
constexpr int BYTE_STEPS = 4;
inline vi unsigned_bytes(vi x, int step) { return x >> 8 * step & 255; }
inline vi signed_bytes(vi x, int step) { return x << (24 - 8 * step) >> 24; }
inline vi add_bytes(vi acc, vi a, vi b) { return acc + a * b; }
#endif
inline vi four_bytes(const void* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return four - vi{};
}

// Rows without a sign by vectors with one.
struct Bytes {
    using scalar = uint8_t;
    using weight = int8_t;
    using row = uint8_t;
    using sum = vi;
    static constexpr int PAIR = 4, STEPS = BYTE_STEPS;
    static vi row_at(const uint8_t* a, int step) { return unsigned_bytes(four_bytes(a), step); }
    static vi vector_at(const int8_t* b, int step) { return signed_bytes(load_as<vi>(b), step); }
    static vi dot(vi acc, vi a, vi b) { return add_bytes(acc, a, b); }
};

// The other way round.
struct SignedBytes {
    using scalar = int8_t;
    using weight = uint8_t;
    using row = int8_t;
    using sum = vi;
    static constexpr int PAIR = 4, STEPS = BYTE_STEPS;
    static vi row_at(const int8_t* a, int step) { return signed_bytes(four_bytes(a), step); }
    static vi vector_at(const uint8_t* b, int step) { return unsigned_bytes(load_as<vi>(b), step); }
    static vi dot(vi acc, vi a, vi b) { return add_bytes(acc, b, a); }
};

}  // namespace firstlight::FIRSTLIGHT_VARIANT
