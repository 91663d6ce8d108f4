// Where the columns of a batch row are stored: one after the other, or in the pages of a table
// (KvquantPages). One macro decides it at compile time:
//
//   KVQUANT_PAGE_LENGTH   columns of a page; 0 or not defined: no pages
//
// A page is whole tiles and whole blocks of the channel grid, and splits begin at multiples of
// KVQUANT_UNIT. So all columns of a tile, and of a block, are in the page of their first one.
#pragma once

#include "cuda/primitives.h"
#include "kvquant/params.h"

#ifndef KVQUANT_PAGE_LENGTH
#define KVQUANT_PAGE_LENGTH 0
#endif

namespace kvquant {

constexpr bool kPaged = KVQUANT_PAGE_LENGTH > 0;
constexpr int kPageLength = kPaged ? KVQUANT_PAGE_LENGTH : 1;
static_assert(!kPaged || kPageLength % 64 == 0, "KVQUANT_PAGE_LENGTH: whole tiles of 64 columns");
// Whether blocks of so many columns lie in one page each.
constexpr bool page_holds(int block) { return !kPaged || kPageLength % block == 0; }

// The index along the first axis of a KvquantSide's tensors where a column of a batch row is.
KVQUANT_DEVICE int64_t storage_of(const KvquantPages& pages, int batch, int column) {
  if constexpr (kPaged) {
    return global_load(pages.table + (batch * pages.table_stride + column / kPageLength));
  }
  return batch;
}
// Which column it is there.
KVQUANT_DEVICE int in_storage(int column) { return kPaged ? column % kPageLength : column; }
// The index along the first axis where the exact copies of a batch row are.
KVQUANT_DEVICE int64_t exact_of(const KvquantPages& pages, int batch) {
  if constexpr (kPaged) return global_load(pages.exact + batch);
  return batch;
}

}  // namespace kvquant
