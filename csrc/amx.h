// Tile registers of AMX: eight of 16 rows by 64 bytes, and products of two of them added onto a third.
//
// Variants with tiles multiply bf16 and bytes by them. `amx` has the instructions. `amx_model` plays them in plain C++ as
// Intel documents them, so that all that is built on them is tested where the processor has none. Elsewhere there is
// none of it.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "vec.h"

namespace firstlight::FIRSTLIGHT_VARIANT {

#if defined(FIRSTLIGHT_AMX_MODEL) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__))
#define FIRSTLIGHT_TILES 1
#else
#define FIRSTLIGHT_TILES 0
#endif
template <class T>
constexpr bool BY_TILES = FIRSTLIGHT_TILES && T::PAIR > 1;  // all products of this type, whatever their size

namespace tmm {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;

#if defined(FIRSTLIGHT_AMX_MODEL)

static_assert(W * 4 == TILE_BYTES);
struct Tile {
    alignas(64) uint8_t row[TILE_ROWS][TILE_BYTES];
};
inline thread_local Tile tile[8];
inline thread_local bool configured = false;

// A thread's tiles, from here to the end of the scope.
struct Registers {
    Registers() { configured = true; }
    ~Registers() { configured = false; }
};
template <int C>
inline void zero() {
    if (!configured) std::abort();  // the processor, too, would stop here
    tile[C] = {};
}
template <int C>
inline void load(const void* from, ptrdiff_t stride) {
    if (!configured) std::abort();
    for (int i = 0; i < TILE_ROWS; ++i) std::memcpy(tile[C].row[i], (const char*)from + i * stride, TILE_BYTES);
}
template <int C>
inline void save(void* to, ptrdiff_t stride) {
    for (int i = 0; i < TILE_ROWS; ++i) std::memcpy((char*)to + i * stride, tile[C].row[i], TILE_BYTES);
}

// Numbers whose exponent is zero become zero, with their sign.
inline vf flushed(vf x) { return (vf)((vi)x & (((vi)x & 0x7f800000) != 0 | INT32_MIN)); }

// c += a b for a row of each: pairs' first halves and second halves are summed apart from zero on, then joined, then added.
inline vf dot(BF16, vf c, const uint8_t* a, const uint8_t (*b)[TILE_BYTES]) {
    const vu high = BF16::all_bits(0xffff0000u);
    vf sum[2] = {};
    for (int k = 0; k < TILE_BYTES / 4; ++k) {
        const vu x = BF16::group_at((const uint16_t*)a + 2 * k), y = load_as<vu>((const uint16_t*)b[k]);
        sum[0] = flushed(fma(flushed(bits(x << 16)), flushed(bits(y << 16)), sum[0]));
        sum[1] = flushed(fma(flushed(bits(x & high)), flushed(bits(y & high)), sum[1]));
    }
    return flushed(flushed(c) + flushed(sum[0] + sum[1]));
}
// Bytes add up exactly, in whatever order.
template <class T>
inline vi dot(T, vi c, const uint8_t* a, const uint8_t (*b)[TILE_BYTES]) {
    for (int k = 0; k < TILE_BYTES / 4; ++k)
        c = T::dot(c, T::row_at((const typename T::row*)a + 4 * k, 0), T::vector_at((const typename T::weight*)b[k], 0));
    return c;
}
// Tile C += tile A times tile B.
template <class T, int C, int A, int B>
inline void multiply() {
    for (int i = 0; i < TILE_ROWS; ++i) {
        const auto sum = dot(T{}, load_as<typename T::sum>(tile[C].row[i]), tile[A].row[i], tile[B].row);
        std::memcpy(tile[C].row[i], &sum, TILE_BYTES);
    }
}

#elif FIRSTLIGHT_TILES

// Whole tiles, always: what is smaller is filled up.
struct Config {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Config) == 64);

// A thread's tiles, from here to the end of the scope. Once released they needn't be kept when threads change.
struct Registers {
    Registers() {
        const Config config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Registers() { asm volatile("tilerelease"); }
};

// Compilers' own intrinsics take literals, and some don't say that they read memory.
template <int C>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(C));
}
template <int C>
inline void load(const void* from, ptrdiff_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(C), "r"(from), "r"(stride) : "memory");
}
template <int C>
inline void save(void* to, ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(C), "r"(to), "r"(stride) : "memory");
}
// Tile C += tile A times tile B.
template <class T, int C, int A, int B>
inline void multiply() {
    if constexpr (T::PAIR == 2) asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    else if constexpr (std::is_same_v<T, Bytes>) asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    else asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Registers {};

#endif

}  // namespace tmm
}  // namespace firstlight::FIRSTLIGHT_VARIANT
