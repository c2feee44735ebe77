// One row of the least-s prox, for the files that loop over rows.
#pragma once

#include <cstdint>
#include <string>

namespace maskprune {

struct RowSums {
  float sum_sq, next_sq;
};

// How one instruction set treats a row of n floats.
struct RowFunctions {
  // (row, n, entries to shrink, factor, scratch of 2 * n) -> sums after the shrink; both are NaN,
  // and the row is as it was, where the row holds a NaN.
  RowSums (*prox)(float*, std::int64_t, std::int64_t, float, std::int32_t*);
  bool (*has_nan)(const float*, std::int64_t);
  // Into [0, 1]; the row holds no NaN.
  void (*clamp)(float*, std::int64_t);
};

// name: "auto" (the widest of this machine), "avx512", "avx2", "portable".
// Throws std::invalid_argument for a name this machine or build cannot run.
RowFunctions row_functions(const std::string& name);

// ceil(s) in float32, clamped to [0, n]; -1 where s is NaN.
std::int64_t entries_to_shrink(float s, std::int64_t n);

// Threads worth waking for so many rows and entries.
int team_for(std::int64_t rows, std::int64_t entries, int threads);

}  // namespace maskprune
