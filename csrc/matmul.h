// What a linear is given. Weights lie in panels of 64 outputs, [O / 64, I / G, 64, G]: G inner scalars side by side are
// what one dot-product step takes (1 of float32, 2 of bf16, 4 of int8). Places past the last output or input are zero.
#pragma once

#include <cstdint>

namespace firstlight {

constexpr int PANEL = 64;  // outputs of a panel (kernels/cpu/linears.py)

// Weights in 4 to 8 bits, each worth d q + m. q: its low 4 bits, or all 8, lie in words of one output, [O / 64, I / 8 or
// I / 4, 64], the lowest first; what 5 or 6 bits have above those in a byte or two for 8 scalars. d and m are float16
// for `super` scalars, times an integer each for `sub` of them if there are such; without m it is -zero d.
struct Blocks {
    const uint32_t* low;
    const void* high;
    const uint16_t *d, *m;         // [O / 64, I / super, 64]
    const int8_t *sub_d, *sub_m;   // [O / 64, I / sub, 64]
    int64_t bits, zero, super, sub;
};

enum class Weights : int { f32, bf16, int8 };

struct MatmulArgs {
    const void* x;  // [rows, width]: float32, bf16, or bytes around 128
    int64_t x_row;
    const void* w;
    void* out;  // [rows, outputs]
    int64_t out_row;
    int64_t rows, width, outputs;  // width: a multiple of G
    int threads;
    bool wide;             // out is float32; otherwise of x's type, and bf16 where that is bytes
    const float* scale;    // [whole panels], int8: what a unit of each output's sum is worth
    const int32_t* start;  // [whole panels], int8: -128 times the sum of its weights
    const Blocks* blocks;  // in place of `w`: made float32 or bf16 panels on the way
};

using Matmul = void (*)(const MatmulArgs&, Weights);

}  // namespace firstlight
