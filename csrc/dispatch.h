// Which variant of the kernels this process runs.
#pragma once

#include <string>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "rows.h"

namespace firstlight {

struct Kernels {
    const char* name;
    Attend attend;
    RmsNorm rms_norm;
    AddNorm add_norm;
    AddRows add_rows;
    CopyRows copy_rows;
    ShiftRows shift_rows;
    Rotate rotate;
    GateMul gate_mul;
    WriteKV write_kv;
    ReadKeys read_keys;
    Matmul matmul;
};

// Variants that this processor can run, the fastest first.
std::vector<const Kernels*> usable();

}  // namespace firstlight
