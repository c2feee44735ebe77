// Least-s proximal step on rows of float32; the definition is maskprune/ops/least_s_prox.py.
#include "least_s_prox.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace maskprune {
namespace {

using bits_view = int32_t __attribute__((may_alias));

constexpr int32_t INFINITY_KEY = 0x7f800000;
constexpr int64_t SUM_LANES = 32;
constexpr int64_t SUM_RUN = 32 * SUM_LANES;
constexpr int64_t SAMPLE = 512;
constexpr int64_t SAMPLE_RUN = 16;
// Rows up to this length are searched whole: they stay in the first-level cache.
constexpr int64_t SMALL = 2048;
// Below about this many entries a second thread costs more than it saves.
constexpr int64_t ENTRIES_PER_THREAD = 16384;

RowSums not_a_number() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return {nan, nan};
}

float value_of_key(int32_t key) {
  float x;
  std::memcpy(&x, &key, sizeof x);
  return x;
}

float square_of_key(int32_t key) { return value_of_key(key) * value_of_key(key); }

namespace portable {
#define TARGET
#define VECTOR_BYTES 16
using keys4 = int32_t __attribute__((vector_size(16)));
inline int64_t compress_into(keys4 keys, keys4 chosen, int32_t* out) {
  int64_t kept = 0;
  for (int j = 0; j < 4; ++j) {
    out[kept] = keys[j];
    kept -= chosen[j];
  }
  return kept;
}
#include "least_s_row.hpp"
#undef TARGET
#undef VECTOR_BYTES
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,popcnt")))
#define VECTOR_BYTES 32
// Row b lists the set bits of b, lowest first: the permutation that packs the chosen lanes.
struct PackTable {
  alignas(32) int32_t lanes[256][8];
  constexpr PackTable() : lanes{} {
    for (int b = 0; b < 256; ++b) {
      int packed = 0;
      for (int j = 0; j < 8; ++j)
        if (b >> j & 1) lanes[b][packed++] = j;
    }
  }
};
constexpr PackTable PACK;

TARGET inline int64_t compress_into(int32_t __attribute__((vector_size(32))) keys,
                                    int32_t __attribute__((vector_size(32))) chosen,
                                    int32_t* out) {
  const int set = _mm256_movemask_ps(_mm256_castsi256_ps(reinterpret_cast<__m256i>(chosen)));
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(PACK.lanes[set]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(keys), order));
  return _mm_popcnt_u32(unsigned(set));
}
#include "least_s_row.hpp"
#undef TARGET
#undef VECTOR_BYTES
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")))
#define VECTOR_BYTES 64
TARGET inline int64_t compress_into(int32_t __attribute__((vector_size(64))) keys,
                                    int32_t __attribute__((vector_size(64))) chosen,
                                    int32_t* out) {
  const __mmask16 set = _mm512_movepi32_mask(reinterpret_cast<__m512i>(chosen));
  // Packing in a register and storing it whole: a compress straight to memory is microcoded on
  // some processors.
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(set, reinterpret_cast<__m512i>(keys)));
  return _mm_popcnt_u32(set);
}
#include "least_s_row.hpp"
#undef TARGET
#undef VECTOR_BYTES
}  // namespace avx512
#endif

}  // namespace

RowFunctions row_functions(const std::string& name) {
  const bool any = name == "auto";
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || name == "avx512"))
    return {avx512::prox_row, avx512::has_nan, avx512::clamp};
  if (__builtin_cpu_supports("avx2") && (any || name == "avx2"))
    return {avx2::prox_row, avx2::has_nan, avx2::clamp};
#endif
  if (any || name == "portable") return {portable::prox_row, portable::has_nan, portable::clamp};
  throw std::invalid_argument("least_s_prox: isa '" + name +
                              "' does not run on this machine; use auto or portable");
}

int64_t entries_to_shrink(float s, int64_t n) {
  if (std::isnan(s)) return -1;
  // In double, which holds every n exactly where float32 would round it up.
  return int64_t(std::min(std::max(double(std::ceil(s)), 0.0), double(n)));
}

int team_for(int64_t rows, int64_t entries, int threads) {
  const int64_t useful = std::min(rows, entries / ENTRIES_PER_THREAD + 1);
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
}

}  // namespace maskprune

// rows: addresses of the first entries; lengths, s: one per row, or one for all with stride 0.
void foreach_least_s_prox(const std::vector<std::uintptr_t>& rows,
                          const std::vector<int64_t>& lengths, std::uintptr_t s_address,
                          int64_t s_stride, std::uintptr_t shrink_address,
                          std::uintptr_t sum_sq_address, std::uintptr_t next_sq_address,
                          int threads, const std::string& isa) {
  using namespace maskprune;
  const RowFunctions row = row_functions(isa);
  const int64_t count = int64_t(rows.size());
  if (lengths.size() != rows.size())
    throw std::invalid_argument("least_s_prox: " + std::to_string(lengths.size()) +
                                " lengths for " + std::to_string(count) + " rows");
  const float* s = reinterpret_cast<const float*>(s_address);
  const float shrink = *reinterpret_cast<const float*>(shrink_address);
  float* sum_sq = reinterpret_cast<float*>(sum_sq_address);
  float* next_sq = reinterpret_cast<float*>(next_sq_address);
  int64_t longest = 0, entries = 0;
  for (int64_t n : lengths) {
    longest = std::max(longest, n);
    entries += n;
  }
#pragma omp parallel num_threads(team_for(count, entries, threads))
  {
    const std::unique_ptr<int32_t[]> scratch(new int32_t[2 * longest]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = lengths[i];
      const int64_t k = entries_to_shrink(s[i * s_stride], n);
      RowSums sums = not_a_number();
      if (k >= 0 && !std::isnan(shrink))
        sums = n == 0 ? RowSums{0.0f, 0.0f}
                      : row.prox(reinterpret_cast<float*>(rows[i]), n, k, shrink, scratch.get());
      sum_sq[i] = sums.sum_sq;
      next_sq[i] = sums.next_sq;
    }
  }
}

// mask: `rows` rows of `length` floats, row_stride floats apart.
void least_s_prox(std::uintptr_t mask, int64_t rows, int64_t length, int64_t row_stride,
                  std::uintptr_t s, int64_t s_stride, std::uintptr_t shrink,
                  std::uintptr_t sum_sq, std::uintptr_t next_sq, int threads,
                  const std::string& isa) {
  std::vector<std::uintptr_t> starts(rows);
  for (int64_t i = 0; i < rows; ++i) starts[i] = mask + i * row_stride * sizeof(float);
  foreach_least_s_prox(starts, std::vector<int64_t>(rows, length), s, s_stride, shrink, sum_sq,
                       next_sq, threads, isa);
}
