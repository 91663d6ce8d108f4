// Scores and weighted sums of a tile of columns in dot products of stored codes (dot.h).
//
//   score        4 columns x 4 query rows (or 8 x 2, 8 x 1)    up to eight vectors, with four sums
//                                                              of each of two columns
//                  along head_dim        interleave 32 bytes of two columns, expand, multiply with
//                                        each row's weights: the query (channel grid: times the
//                                        scales)
//                totals                  eight vectors -> 16 scores; with 4 rows, twice, for 8
//                                        columns of each row
//     fp8        2 columns x 4 query rows (or 4 x 2, 8 x 1)    eight sums, one vector each
//                  along head_dim        convert 16 channels of each column from FP16
//                totals                  eight vectors -> eight scores; with 4 rows, four times
//   accumulate   16 channels x 4 query rows                    eight sums, one vector each
//                  along the columns     interleave bytes of two columns, widen (fp8: convert those
//                                        of one), multiply with each row's weights: probabilities
//                                        (token grid: times the scales of values)
//     int4, token grid                   interleave words of two columns instead (sum_words)
//
// A tile of fp8 is converted to FP16 first (tile_of). Weights are in the order of channels, but for
// those of integer keys (KeyWeightMaker), and so are sums, but for those of sum_words.
#pragma once

#include "cpu/dot_methods.h"
