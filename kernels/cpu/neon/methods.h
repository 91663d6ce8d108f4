// Scores and weighted sums of a tile of columns in dot products of stored codes (dot.h).
//
//   score        4 columns x 2 query rows x 2 bytes of weights       16 vectors of sums
//                  along head_dim        load 16 channels of each column, multiply with each row's
//                                        weights: the query (channel grid: times the scales)
//                totals                  4 vectors of sums -> 4 scores
//   accumulate   8 channels x 4 query rows x 2 bytes of weights      16 vectors of sums
//                  along the columns     interleave 8 bytes of four columns, multiply with each
//                                        row's four weights: probabilities (token grid: times the
//                                        scales of values)
//
// With products of matrices (matrix.h) a vector has the sums of two columns, or channels, and both
// bytes:
//
//   score        8 columns x 4 query rows                            16 vectors of sums
//   accumulate   8 channels x 4 query rows, from eight columns       16 vectors of sums
//
// fp8 is expanded to floats: 8 channels of 2 columns x 4 query rows, and 16 channels x 4 query rows,
// have a vector of sums each. Channels stay in their order.
#pragma once

#include "cpu/dot_methods.h"
