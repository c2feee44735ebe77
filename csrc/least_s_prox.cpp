// Least-s proximal step on rows of float32; the definition is maskprune/ops/least_s_prox.py.
#include "least_s_prox.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "dtypes.hpp"
#include "threads.hpp"

#ifdef MP_X86
#include <immintrin.h>
#endif

namespace maskprune {
namespace {

using bits_view = int32_t __attribute__((may_alias));

constexpr int32_t infinity_key = 0x7f800000;
constexpr int64_t square_lanes = 32;
constexpr int64_t square_run = 32 * square_lanes;
constexpr int64_t sample_size = 512;
constexpr int64_t sample_run = 16;
// Rows up to this length are searched whole: they stay in the first-level cache.
constexpr int64_t short_row = 2048;

RowSums not_a_number() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return {nan, nan};
}

float value_of_key(int32_t key) { return bit_cast<float>(key); }

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

#ifdef MP_X86
namespace avx2 {
#define TARGET MP_AVX2
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
constexpr PackTable pack_table;

TARGET inline int64_t compress_into(int32_t __attribute__((vector_size(32))) keys,
                                    int32_t __attribute__((vector_size(32))) chosen,
                                    int32_t* out) {
  const int set = _mm256_movemask_ps(_mm256_castsi256_ps(reinterpret_cast<__m256i>(chosen)));
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(pack_table.lanes[set]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(keys), order));
  return _mm_popcnt_u32(unsigned(set));
}
#include "least_s_row.hpp"
#undef TARGET
#undef VECTOR_BYTES
}  // namespace avx2

namespace avx512 {
#define TARGET MP_AVX512
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

RowFunctions row_functions(Isa isa) {
#ifdef MP_X86
  if (isa == Isa::avx512) return {avx512::prox_row, avx512::has_nan, avx512::clamp};
  if (isa == Isa::avx2) return {avx2::prox_row, avx2::has_nan, avx2::clamp};
#endif
  (void)isa;
  return {portable::prox_row, portable::has_nan, portable::clamp};
}

int64_t entries_to_shrink(float s, int64_t n) {
  if (std::isnan(s)) return -1;
  // In double, which holds every n exactly where float32 would round it up.
  return int64_t(std::min(std::max(double(std::ceil(s)), 0.0), double(n)));
}

// mask: `rows` rows of `length` floats, row_stride floats apart; s: one per row, or one for all
// with s_stride 0.
void least_s_prox(uintptr_t mask, int64_t rows, int64_t length, int64_t row_stride, uintptr_t s,
                  int64_t s_stride, uintptr_t shrink, uintptr_t sum_sq, uintptr_t next_sq,
                  int threads, const std::string& isa) {
  const RowFunctions row = row_functions(choose_isa("least_s_prox_", isa));
  const float factor = *at<float>(shrink);
  const int team = team_size(rows, rows * length, entries_grain, threads);
#pragma omp parallel num_threads(team)
  {
    const std::unique_ptr<int32_t[]> scratch(new int32_t[2 * length]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t k = entries_to_shrink(*at<float>(s, i * s_stride), length);
      RowSums sums = not_a_number();
      if (k >= 0 && !std::isnan(factor))
        sums = length == 0 ? RowSums{0.0f, 0.0f}
                           : row.prox(at<float>(mask, i * row_stride), length, k, factor,
                                      scratch.get());
      *at<float>(sum_sq, i) = sums.sum_sq;
      *at<float>(next_sq, i) = sums.next_sq;
    }
  }
}

}  // namespace maskprune
