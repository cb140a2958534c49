// Row-local operators between two attentions, and the write into KV blocks. Strides are in elements.
//
// Around int8 linears rows have scales. What such a linear gives is to be multiplied by its row's scale, which the
// operator that reads it does (`in_scale`); what it takes are bytes around 128 (quantise.h), which the operator before
// it writes, channel by channel times `smooth`, with their rows' scales (`out_scale`).
#pragma once

#include <cstdint>

namespace firstlight {

struct RowArgs {
    const void* in;
    void* out;
    int64_t in_row, out_row;
    int64_t rows, width;
    int threads;
    bool bf16;               // of `in`, and of `out` where it isn't bytes
    const float* in_scale;   // [rows], or none: `in` is what it says
    float* out_scale;        // [rows], or none: `out` is of in's type
    const float* smooth;     // [width], where there are bytes
};

enum class Gate : int { silu, gelu };

struct KVArgs {
    const void *k, *v;  // [n, Hkv, D]
    int64_t k_row, v_row;  // heads lie D apart
    void *k_blocks, *v_blocks;
    const int64_t* slots;  // [n, Hkv]
    int64_t rows, heads, dim;
    int threads;
    bool bf16;   // of k and v
    bool bytes;  // into blocks of bytes
};

struct KeysArgs {
    const void* k_blocks;  // of bytes
    const int32_t* table;  // [blocks]
    void* out;             // [64 blocks, D]
    int64_t blocks, dim;
    int threads;
    bool bf16;  // of `out`
};

// Norm of rows of the model's type into rows of it.
using RmsNorm = void (*)(const RowArgs&, const float* gain, float eps);
// Residual rows `x` of float32 (those of `out` count) += `in` of the model's type, if there is any; then their norm.
using AddNorm = void (*)(const RowArgs&, float* x, int64_t x_row, const float* gain, float eps);
// Residual rows `x` of float32 += `in`.
using AddRows = void (*)(const RowArgs&, float* x, int64_t x_row);
// `in` as it is: times its scale, or as bytes.
using CopyRows = void (*)(const RowArgs&);
// `in` plus the same row of float32 for all.
using ShiftRows = void (*)(const RowArgs&, const float* by);
// Heads of `width`, each normed by itself first where there is a gain [heads, width].
using Rotate = void (*)(const RowArgs&, int64_t heads, const float* cos, const float* sin, const float* gain, float eps);
using GateMul = void (*)(const RowArgs&, Gate);
using WriteKV = void (*)(const KVArgs&);
// Keys out of blocks of bytes, turned back.
using ReadKeys = void (*)(const KeysArgs&);

}  // namespace firstlight
