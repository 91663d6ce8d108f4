// The operators' arguments as plain C structs, which a host language fills.
//
// Every field is 8 bytes wide, so that the host need not know about padding. Strides are in bytes;
// the last axis of every tensor is contiguous, and so are the rows (tokens) of stored codes, scales
// and exact copies.
//
// The kernels say "column" for a position of the cache, which is a column of the matrix of scores,
// and "row" for a query in it, or for the elements of one token of one head in memory.
#pragma once

#ifndef __CUDACC_RTC__
#include <stdint.h>
#else
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif

enum KvquantDtype { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum KvquantFormat { kInt8 = 0, kFp8 = 1, kInt4 = 2, kDense = 3, kInt3 = 4, kInt2 = 5 };
enum KvquantGrid { kTokenGrid = 0, kChannelGrid = 1 };
// How `mask` hides columns. kPaddingMask: `[batch, kv_len]`, integers of `mask_width` bytes, 0
// hides; causal order applies too. The masks after it: `[batch, num_heads, q_len, kv_len]`, instead
// of causal order; stride 0 repeats an axis.
enum KvquantMask {
  kNoMask = 0,
  kPaddingMask = 1,
  kBoolMask = 2,
  kAddFloat32 = 3,
  kAddFloat16 = 4,
  kAddBFloat16 = 5
};

// Keys or values of one layer, as stored: `[batch, num_kv_heads, rows, ..]` each.
typedef struct KvquantSide {
  uint8_t* data;         // codes; where the format is dense, elements of the query's dtype
  uint16_t* scale;       // FP16: one row per token (token grid) or per block (channel grid)
  uint16_t* zero_point;  // like scale, or null
  uint8_t* recent;       // a ring of exact copies, column t in slot t % ring_length; or null
  uint8_t* sink;         // exact copies of the columns in sink_positions; or null
  int64_t data_stride[2], scale_stride[2], recent_stride[2], sink_stride[2];  // of batch and head
  int64_t capacity;  // columns that `data` has room for
  int64_t ring_length;
  int64_t format, grid;
  int64_t group_length;  // token grid: channels per scale; channel grid: tokens per scale
  int64_t rotate;
  int64_t head_dim;
} KvquantSide;

// Storage in pages, each of which holds page_length columns of one batch row. The tensors of a
// KvquantSide then have an axis of pages in place of the batch: column t of batch row b is row
// t % page_length of page table[b][t / page_length]. The exact copies of b (ring and sinks) are
// those of page exact[b]. A page is whole tiles of 64 columns and whole blocks of the channel grid.
// A table that is null: contiguous storage.
typedef struct KvquantPages {
  const int64_t* table;    // `[batch, table_stride]`, or null
  const int64_t* exact;    // `[batch]`, or null: there are no exact copies
  const int64_t* lengths;  // `[batch]`: columns that a row holds, in place of kv_len or start
  int64_t table_stride, page_length;
} KvquantPages;

// A second part of every key of latent attention, whose product with a second part of the query is
// added to that of the keys. Its columns have exact copies where those of the keys have. Only the
// CUDA kernels take it; elsewhere its scores are a mask.
typedef struct KvquantRotary {
  const uint8_t* query;     // `[batch, num_heads, q_len, side.head_dim]`, or null: there is none
  int64_t query_stride[3];  // of batch, head and query
  KvquantSide side;
} KvquantRotary;

typedef struct KvquantAttention {
  const uint8_t* query;  // `[batch, num_heads, q_len, head_dim]`
  uint8_t* output;   // `[batch, num_heads, q_len, values.head_dim]`, contiguous, the query's dtype
  float* logsumexp;  // `[batch, num_heads, q_len]`, contiguous
  const uint8_t* mask;
  const float* s_aux;             // `[num_heads]`, or null
  const int32_t* sink_positions;  // `[batch, num_sinks]`, -1: none; or null
  const int64_t* length;          // if not null, it replaces kv_len, which is then the mask's width
  int64_t query_stride[3];        // of batch, head and query
  int64_t mask_stride[4];         // of batch, head, query and column
  int64_t sink_positions_stride;  // of batch
  int64_t num_sinks;
  int64_t mask_kind, mask_width;
  int64_t dtype;
  int64_t batch, num_heads, num_kv_heads, q_len, kv_len, recent_length;
  int64_t isa, threads;
  double scaling, softcap;
  KvquantSide keys, values;
  KvquantPages pages;  // with a table, kv_len is that of the longest row, and q_len is 1
  KvquantRotary rotary;
} KvquantAttention;

// New tokens of keys or values: x `[batch, num_kv_heads, n, head_dim]`, for the columns start to
// start + n.
typedef struct KvquantNewTokens {
  const uint8_t* x;
  const float* factors;  // `[num_kv_heads, head_dim, head_dim]`, or null: no error feedback
  int64_t x_stride[3];   // of batch, head and token
  int64_t n;
  KvquantSide side;
} KvquantNewTokens;

// If there is no room for all new tokens, none is stored. Sinks are the first num_sinks tokens of a
// batch row that are not padding. Its slots are filled in order; a slot is free while it holds -1
// or a column from start on.
typedef struct KvquantAppend {
  // [0] += rows that hold a NaN or infinity; [1] += tokens for which there was no room
  int64_t* faults;
  const uint8_t* padding;   // bool `[batch, padding_length]`, or null
  int32_t* sink_positions;  // `[batch, num_sinks]`, -1: none; or null
  int64_t* length;          // if not null, it replaces start
  int64_t padding_stride, padding_length;
  int64_t sink_positions_stride;  // of batch
  int64_t num_sinks;
  int64_t dtype;
  int64_t batch, num_kv_heads, start;
  int64_t isa, threads;
  KvquantNewTokens keys, values;
  KvquantPages pages;  // with a table, sink i is column i, and there is no padding
} KvquantAppend;

// Exact attention of a prompt's last n tokens to all kv_len, causal, in BF16: query
// `[num_heads, n, head_dim]`, key and value `[num_kv_heads, kv_len, head_dim]`, output
// `[n, num_heads, head_dim]`, contiguous.
typedef struct KvquantPrompt {
  const uint8_t *query, *key, *value;
  uint8_t* output;
  int64_t query_stride[2], key_stride[2], value_stride[2];  // of head and token
  int64_t num_heads, num_kv_heads, n, kv_len, head_dim;
  int64_t window;  // columns that a query sees, itself among them; 0: all before it
  int64_t isa, threads;
  double scaling;
} KvquantPrompt;

// The stored columns of one batch row of pages, de-quantized: output `[num_kv_heads, length,
// head_dim]` of the dtype. Exact copies are left out.
typedef struct KvquantRead {
  uint8_t* output;
  int64_t output_stride;  // of head
  int64_t dtype, num_kv_heads, length;
  int64_t isa, threads;
  KvquantSide side;
  KvquantPages pages;
} KvquantRead;
