// The table of variants, and what the processor says about itself.
#include "dispatch.h"

namespace firstlight {

#define FIRSTLIGHT_DECLARE(name)                                                   \
    namespace name {                                                               \
    int64_t attend(const AttnArgs&, bool, bool);                                   \
    void rms_norm(const RowArgs&, const float*, float);                            \
    void add_norm(const RowArgs&, float*, int64_t, const float*, float);           \
    void add_rows(const RowArgs&, float*, int64_t);                                \
    void copy_rows(const RowArgs&);                                                \
    void rotate(const RowArgs&, int64_t, const float*, const float*);              \
    void gate_mul(const RowArgs&, Gate);                                           \
    void write_kv(const KVArgs&);                                                  \
    void matmul(const MatmulArgs&, Weights);                                       \
    static const Kernels kernels{#name, attend, rms_norm, add_norm, add_rows, copy_rows, \
                                 rotate, gate_mul, write_kv, matmul};              \
    }
FIRSTLIGHT_DECLARE(portable)
FIRSTLIGHT_DECLARE(avx2)
FIRSTLIGHT_DECLARE(avx512)
FIRSTLIGHT_DECLARE(avx512_bf16)
#undef FIRSTLIGHT_DECLARE

std::vector<const Kernels*> usable() {
    __builtin_cpu_init();
    std::vector<const Kernels*> found;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        found.push_back(&avx512_bf16::kernels);
    if (wide) found.push_back(&avx512::kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
    found.push_back(&portable::kernels);
    return found;
}

}  // namespace firstlight
