// Scores and weighted sums of a tile of columns in dot products of stored codes (dot.h).
//
//   score        2 columns x 4 query rows (or 4 x 2, 8 x 1)    eight sums, one vector each
//                  along head_dim        expand 32 channels (fp8: 16) of each column, multiply with
//                                        each row's weights: the query (channel grid: times the
//                                        scales)
//                totals                  eight vectors -> eight scores; with 4 rows, four times,
//                                        for 8 columns of each row
//   accumulate   16 channels x 4 query rows                    eight sums, one vector each
//                  along the columns     interleave bytes of two columns, widen (fp8: expand those
//                                        of one), multiply with each row's weights: probabilities
//                                        (token grid: times the scales of values)
//
// Channels stay in their order, so neither weights nor sums have to be rearranged.
#pragma once

#include "cpu/dot_methods.h"
