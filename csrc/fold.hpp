// Keep some columns of a row and multiply them: fold_row.cpp, for fold.cpp and stream.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace maskprune {

// The codes that maskprune/ops/fold.py passes.
enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

enum class Isa { portable, avx2, avx512 };

// The best of "portable", "avx2", "avx512" that this machine runs for "auto", else the one named.
Isa choose_isa(const std::string& name);

std::int64_t item_size(Dtype dtype);

// What happens to the columns of every row.
struct Columns {
  std::int64_t width = 0;                // columns of the input
  std::int64_t kept = 0;                 // columns of the output
  const std::int64_t* keep = nullptr;    // (kept,), or null: all columns
  const float* scale = nullptr;          // (kept,), one factor for each kept column, or null
  std::vector<std::uint32_t> bits = {};  // one bit for each column where `keep` strictly ascends
};

Columns make_columns(std::int64_t width, const std::int64_t* keep, std::int64_t kept,
                     const float* scale);

// row (width,) -> out (kept,), columns gathered and scaled; `out` must not overlap `row`.
// With `row_scale` every kept column is multiplied by that one factor and `columns.scale` is unused.
void fold_row(const void* row, void* out, const Columns& columns, Dtype dtype, Isa isa,
              const float* row_scale = nullptr);

// Denormals count: whatever flush mode the process has set is off while this lives.
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
