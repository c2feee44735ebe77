// fold_columns and gather_rows: whole matrices in memory, rows shared out among threads.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fold.hpp"
#include "threads.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace maskprune {
namespace {

// Fresh memory can cost more in page faults than the fold itself: asks for huge pages.
void expect_huge_pages(uintptr_t out, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t from = (out + page - 1) / page * page;
  const uintptr_t to = (out + uintptr_t(bytes)) / page * page;
  // A refusal changes the speed only.
  if (to > from) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

// f(row) for every row; returns the threads used.
template <class F>
int for_rows(int64_t rows, int64_t bytes, int threads, F f) {
  constexpr int64_t grain = 1 << 18;  // bytes for which one more thread pays
  const int team = team_size(rows, bytes, grain, threads);
  // Small shares: the other threads take over what a delayed one leaves.
  const int64_t share = std::max<int64_t>(1, rows / (16 * team));
  int used = 1;
#pragma omp parallel num_threads(team)
  {
    const ExactFloats exact;
#ifdef _OPENMP
#pragma omp single nowait
    used = omp_get_num_threads();
#endif
#pragma omp for schedule(dynamic, share)
    for (int64_t r = 0; r < rows; ++r) f(r);
  }
  return used;
}

}  // namespace

// weight (rows, width), keep (kept,), scale (kept,) -> out (rows, kept); returns the threads used.
int fold_columns(uintptr_t weight, int64_t rows, int64_t width, int dtype, uintptr_t keep,
                 int64_t kept, uintptr_t scale, uintptr_t out, int threads,
                 const std::string& isa_name) {
  if (rows < 0 || width < 0 || kept < 0 || dtype < 0 || dtype > 3)
    throw std::invalid_argument("fold_columns: a size is negative, or the dtype code unknown");
  const Dtype type = Dtype(dtype);
  const Isa isa = choose_isa("fold_columns", isa_name);
  const Columns columns = make_columns(width, at<int64_t>(keep), kept, at<float>(scale), isa);
  const int64_t in_bytes = width * item_size(type), out_bytes = kept * item_size(type);
  expect_huge_pages(out, rows * out_bytes);
  return for_rows(rows, rows * in_bytes, threads, [&](int64_t r) {
    fold_row(at<char>(weight, r * in_bytes), at<char>(out, r * out_bytes), columns, type, isa);
  });
}

// weight (rows, row_bytes), keep (kept,) -> out (kept, row_bytes); returns the threads used.
int gather_rows(uintptr_t weight, int64_t rows, int64_t row_bytes, uintptr_t keep, int64_t kept,
                uintptr_t out, int threads) {
  if (rows < 0 || row_bytes < 0 || kept < 0)
    throw std::invalid_argument("gather_rows: a size is negative");
  const auto* index = at<int64_t>(keep);
  for (int64_t j = 0; j < kept; ++j)
    if (index[j] < 0 || index[j] >= rows)
      throw std::invalid_argument("gather_rows: keep[" + std::to_string(j) + "] is " +
                                  std::to_string(index[j]) + "; expected 0 to " +
                                  std::to_string(rows - 1));
  expect_huge_pages(out, kept * row_bytes);
  return for_rows(kept, kept * row_bytes, threads, [&](int64_t j) {
    std::memcpy(at<char>(out, j * row_bytes), at<char>(weight, index[j] * row_bytes), row_bytes);
  });
}

}  // namespace maskprune
