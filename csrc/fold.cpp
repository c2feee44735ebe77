// fold_columns and gather_rows: whole matrices in memory, rows shared out among threads.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "fold.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Below this many bytes a second thread costs more than it brings.
constexpr std::int64_t kGrain = 1 << 18;

// Fresh memory of this size costs more in page faults than the fold itself: ask for huge pages.
void expect_huge_pages(void* out, std::int64_t bytes) {
#ifdef __linux__
  constexpr std::uintptr_t page = 1 << 21;
  const auto begin = reinterpret_cast<std::uintptr_t>(out);
  const auto from = (begin + page - 1) / page * page;
  const auto to = (begin + static_cast<std::uintptr_t>(bytes)) / page * page;
  // A refusal changes the speed only.
  if (to > from) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

int team_size(std::int64_t bytes, std::int64_t rows, int threads) {
  const std::int64_t useful = std::min(bytes / kGrain + 1, std::max<std::int64_t>(rows, 1));
  return static_cast<int>(std::clamp<std::int64_t>(threads, 1, useful));
}

// Rows handed out at a time: small enough that a thread which the machine holds up is waited for
// by nobody.
std::int64_t share_of(std::int64_t rows, int team) {
  return std::max<std::int64_t>(1, rows / (16 * team));
}

}  // namespace

// weight (rows, width), keep (kept,), scale (kept,) -> out (rows, kept); returns the threads used.
int fold_columns(std::uintptr_t weight, std::int64_t rows, std::int64_t width, int dtype,
                 std::uintptr_t keep, std::int64_t kept, std::uintptr_t scale, std::uintptr_t out,
                 int threads, const std::string& isa_name) {
  using namespace maskprune;
  if (rows < 0 || width < 0 || kept < 0 || dtype < 0 || dtype > 3)
    throw std::invalid_argument("fold_columns: negative size or unknown dtype code");
  const Isa isa = choose_isa(isa_name);
  const auto type = static_cast<Dtype>(dtype);
  const Columns columns = make_columns(width, reinterpret_cast<const std::int64_t*>(keep), kept,
                                       reinterpret_cast<const float*>(scale));
  const auto* in = reinterpret_cast<const char*>(weight);
  auto* to = reinterpret_cast<char*>(out);
  const std::int64_t in_bytes = width * item_size(type), out_bytes = kept * item_size(type);
  expect_huge_pages(to, rows * out_bytes);
  const int team = team_size(rows * in_bytes, rows, threads);
  const std::int64_t grain = share_of(rows, team);
  int used = 1;
#pragma omp parallel num_threads(team)
  {
    const ExactFloats exact;
#ifdef _OPENMP
#pragma omp single nowait
    used = omp_get_num_threads();
#endif
#pragma omp for schedule(dynamic, grain)
    for (std::int64_t r = 0; r < rows; ++r)
      fold_row(in + r * in_bytes, to + r * out_bytes, columns, type, isa);
  }
  return used;
}

// weight (rows, row_bytes), keep (kept,) -> out (kept, row_bytes); returns the threads used.
int gather_rows(std::uintptr_t weight, std::int64_t rows, std::int64_t row_bytes,
                std::uintptr_t keep, std::int64_t kept, std::uintptr_t out, int threads) {
  if (rows < 0 || row_bytes < 0 || kept < 0)
    throw std::invalid_argument("gather_rows: negative size");
  const auto* index = reinterpret_cast<const std::int64_t*>(keep);
  for (std::int64_t j = 0; j < kept; ++j)
    if (index[j] < 0 || index[j] >= rows)
      throw std::invalid_argument("gather_rows: keep[" + std::to_string(j) + "] is " +
                                  std::to_string(index[j]) + "; expected 0 to " +
                                  std::to_string(rows - 1));
  const auto* in = reinterpret_cast<const char*>(weight);
  auto* to = reinterpret_cast<char*>(out);
  expect_huge_pages(to, kept * row_bytes);
  const int team = team_size(kept * row_bytes, kept, threads);
  const std::int64_t grain = share_of(kept, team);
  int used = 1;
#pragma omp parallel num_threads(team)
  {
#ifdef _OPENMP
#pragma omp single nowait
    used = omp_get_num_threads();
#endif
#pragma omp for schedule(dynamic, grain)
    for (std::int64_t j = 0; j < kept; ++j)
      std::memcpy(to + j * row_bytes, in + index[j] * row_bytes,
                  static_cast<std::size_t>(row_bytes));
  }
  return used;
}
