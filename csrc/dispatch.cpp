// The table of variants, and what the processor says about itself.
#include "dispatch.h"

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace firstlight {

#define FIRSTLIGHT_DECLARE(name)                                                   \
    namespace name {                                                               \
    int64_t attend(const AttnArgs&, bool, bool);                                   \
    void rms_norm(const RowArgs&, const float*, float);                            \
    void add_norm(const RowArgs&, float*, int64_t, const float*, float);           \
    void add_rows(const RowArgs&, float*, int64_t);                                \
    void copy_rows(const RowArgs&);                                                \
    void shift_rows(const RowArgs&, const float*);                                 \
    void rotate(const RowArgs&, int64_t, const float*, const float*, const float*, float); \
    void gate_mul(const RowArgs&, Gate);                                           \
    void write_kv(const KVArgs&);                                                  \
    void read_keys(const KeysArgs&);                                               \
    void matmul(const MatmulArgs&, Weights);                                       \
    static const Kernels kernels{#name, attend, rms_norm, add_norm, add_rows, copy_rows, \
                                 shift_rows, rotate, gate_mul, write_kv, read_keys, matmul}; \
    }
FIRSTLIGHT_DECLARE(portable)
FIRSTLIGHT_DECLARE(avx2)
FIRSTLIGHT_DECLARE(avx2_vnni)
FIRSTLIGHT_DECLARE(avx512)
FIRSTLIGHT_DECLARE(avx512_vnni)
FIRSTLIGHT_DECLARE(avx512_bf16)
FIRSTLIGHT_DECLARE(amx)
FIRSTLIGHT_DECLARE(amx_model)
#undef FIRSTLIGHT_DECLARE

// Whether the processor has tiles and products of bf16 and of bytes, and the system lets this process use them: what a
// thread's registers hold grows by 8 KB, so Linux wants to be asked.
static bool has_tiles() {
    constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // of leaf 7's edx: AMX-BF16, AMX-TILE, AMX-INT8
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl; the component of a thread's state
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

std::vector<const Kernels*> usable() {
    __builtin_cpu_init();
    std::vector<const Kernels*> found;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bytes = wide && __builtin_cpu_supports("avx512vnni"), dots = bytes && __builtin_cpu_supports("avx512bf16");
    const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (dots && has_tiles()) found.push_back(&amx::kernels);
    if (dots) found.push_back(&avx512_bf16::kernels);
    if (bytes) found.push_back(&avx512_vnni::kernels);
    if (wide) found.push_back(&avx512::kernels);
    if (narrow && __builtin_cpu_supports("avxvnni")) found.push_back(&avx2_vnni::kernels);
    if (narrow) found.push_back(&avx2::kernels);
    found.push_back(&portable::kernels);
    if (dots) found.push_back(&amx_model::kernels);  // for tests: the last, and only taken by name
    return found;
}

}  // namespace firstlight
