// What a linear is given. Weights lie in panels of 64 outputs, [O / 64, I / G, 64, G]: G inner scalars side by side are
// what one dot-product step takes (1 of float32, 2 of bf16, 4 of int8). Places past the last output or input are zero.
#pragma once

#include <cstdint>

namespace firstlight {

constexpr int PANEL = 64;  // outputs of a panel (kernels/cpu/panels.py)

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
};

using Matmul = void (*)(const MatmulArgs&, Weights);

}  // namespace firstlight
