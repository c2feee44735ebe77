// One row of the least-s prox, for the files that loop over rows.
#pragma once

#include <cstdint>
#include <string>

namespace maskprune {

struct RowSums {
  float sum_sq, next_sq;
};

// (row, length, entries to shrink, factor, scratch of 2 * length) -> sums after the shrink; both
// are NaN, and the row is as it was, where the row holds a NaN.
using ProxRow = RowSums (*)(float*, std::int64_t, std::int64_t, float, std::int32_t*);

// name: "auto" (the widest of this machine), "avx512", "avx2", "portable".
// Throws std::invalid_argument for a name this machine or build cannot run.
ProxRow prox_row_for(const std::string& name);

// ceil(s) in float32, clamped to [0, n]; -1 where s is NaN.
std::int64_t entries_to_shrink(float s, std::int64_t n);

}  // namespace maskprune
