// What masked_swiglu and scale_heads share: the work in tiles, and the mask's gradient, a sum over
// rows, in an order that only the sizes decide, so that the number of threads never changes a bit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.hpp"

namespace maskprune {

// Size of one work item, whose rows share one row of partial sums.
constexpr int64_t tile_rows = 128;
constexpr int64_t tile_columns = 1024;
// Terms that are summed in float before they join the double sum.
constexpr int64_t float_rows = 16;
// Values for which one more thread pays.
constexpr int64_t tile_grain = 32768;

inline int64_t tiles_down(int64_t rows) { return (rows + tile_rows - 1) / tile_rows; }

// tile(p, first row, rows, first column, columns) for every tile of `width` columns or fewer;
// `values`: how many there are in all.
template <class Problem>
void run_tiles(const Problem& p, void (*tile)(const Problem&, int64_t, int64_t, int64_t, int64_t),
               int64_t rows, int64_t columns, int64_t width, int64_t values, int threads) {
  const int64_t across = (columns + width - 1) / width, tiles = tiles_down(rows) * across;
  const int team = team_size(tiles, values, tile_grain, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t item = 0; item < tiles; ++item) {
    const int64_t row = item / across * tile_rows, column = item % across * width;
    tile(p, row, std::min(tile_rows, rows - row), column, std::min(width, columns - column));
  }
}

// partial (rows, columns) -> out (columns,)
inline void add_rows(const double* partial, int64_t rows, int64_t columns, float* out) {
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0.0;
    for (int64_t i = 0; i < rows; ++i) sum += partial[i * columns + j];
    out[j] = float(sum);
  }
}

}  // namespace maskprune
