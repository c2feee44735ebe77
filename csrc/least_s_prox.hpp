// One row of the least-s prox, for the files that loop over rows.
#pragma once

#include <cstdint>
#include <string>

#include "isa.hpp"

namespace maskprune {

struct RowSums {
  float sum_sq, next_sq;
};

// How one instruction set treats a row of n floats.
struct RowFunctions {
  // (row, n, entries to shrink, factor, scratch of 2 * n) -> sums after the shrink; both are NaN,
  // and the row is as it was, where the row holds a NaN.
  RowSums (*prox)(float*, int64_t, int64_t, float, int32_t*);
  bool (*has_nan)(const float*, int64_t);
  // Into [0, 1]; the row holds no NaN.
  void (*clamp)(float*, int64_t);
};

RowFunctions row_functions(Isa isa);

// ceil(s) in float32, clamped to [0, n]; -1 where s is NaN.
int64_t entries_to_shrink(float s, int64_t n);

// Mask entries for which one more thread pays.
constexpr int64_t entries_grain = 16384;

}  // namespace maskprune
