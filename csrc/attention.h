// What the attention kernel is given: `AttnCall` of kernels/contract.py as plain numbers and pointers.
#pragma once

#include <cstdint>

namespace firstlight {

constexpr int BLOCK = 64;        // entries of a KV block (kernels/kv_layout.py)
constexpr int SPLIT_BLOCKS = 8;  // blocks that are reduced together (SPLIT of kernels/contract.py)

// One request's K/V in one layer (`KVView`), 64 bits a field; lengths of the heads follow it in memory.
struct View {
    const int32_t* table;  // [Hkv, table_stride] block numbers, 0 = nothing there
    int64_t table_stride;
    int64_t num_blocks;
    const int64_t* tok;  // [Hkv, tok_stride] ordinals, null = identity
    const int64_t* pos;
    int64_t tok_stride;
    const uint8_t* visible;  // [Hkv, visible_stride], null = all
    int64_t visible_stride;
};
constexpr int VIEW_FIELDS = 8;

// `AttnPlan`; blk_ptr and col_ptr are null where it has no such lists.
struct PlanLists {
    int64_t q_tile, blk, num_lists;
    const int16_t* head_map;
    const int32_t *tile_base, *tile_first, *tile_map, *band, *blk_ptr, *blk_idx, *col_ptr, *col_idx;
    const float* skip_log;  // [B, Hq], null = no row skips a block
    int64_t scan;           // order of blocks where rows skip: ascending, descending, the first and then descending
};

struct AttnArgs {
    const void* q;  // [N, Hq, D], strides in elements
    int64_t q_row, q_head;
    void* out;  // [N, Hq, D]
    int64_t out_row, out_head;
    float* lse;  // [N, Hq] or null
    const void* k;  // blocks as KVLayout lays them
    const void* v;
    int64_t num_heads, num_kv_heads, head_dim;
    float scale;
    float cap;  // of scores: s becomes cap * tanh(s / cap); 0 = none
    int64_t num_requests;
    const int64_t* row_ptr;  // [B + 1]
    const int64_t* tok;      // [N]
    const int64_t* pos;
    const int64_t* views;  // [B, VIEW_FIELDS + Hkv]
    int64_t model_window;  // 0 = none
    const PlanLists* plan;  // null = dense
    const int64_t* probe_first;  // [B] or null
    float* const* probe_sums;    // [B] -> [Hkv, probe_len[b]] or null
    const int64_t* probe_len;
    int64_t r0, r1;
    int threads;
};

// Attention of rows [r0, r1). Returns the (row, entry, query head) triples that were visible.
using Attend = int64_t (*)(const AttnArgs&, bool bf16, bool bytes);

}  // namespace firstlight
