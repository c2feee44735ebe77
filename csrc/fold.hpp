// Keep some columns of a row and multiply them: fold_row.cpp, for fold.cpp and stream.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.hpp"
#include "isa.hpp"

namespace maskprune {

// What happens to the columns of every row.
struct Columns {
  int64_t width = 0;                // columns of the input
  int64_t kept = 0;                 // columns of the output
  const int64_t* keep = nullptr;    // (kept,), or null: all columns
  const float* scale = nullptr;     // (kept,), one factor for each kept column, or null
  std::vector<uint32_t> bits = {};  // one bit for each column, where the row is compressed by them
};

Columns make_columns(int64_t width, const int64_t* keep, int64_t kept, const float* scale,
                     Isa isa);

// row (width,) -> out (kept,), columns gathered and scaled; `out` must not overlap `row`.
// With `row_scale` every kept column is multiplied by that one factor and `columns.scale` is
// unused. Throws std::invalid_argument for Dtype::bytes.
void fold_row(const void* row, void* out, const Columns& columns, Dtype dtype, Isa isa,
              const float* row_scale = nullptr);

// While it lives, denormals are computed with, whatever flush mode the process has set.
class ExactFloats {
 public:
  ExactFloats();
  ~ExactFloats();
  ExactFloats(const ExactFloats&) = delete;
  ExactFloats& operator=(const ExactFloats&) = delete;

 private:
  unsigned saved_ = 0;
};

}  // namespace maskprune
