// One row of fold_columns: out[j] = row[keep[j]] * scale[j], rounded once from float32 (float64
// for f64).
//
// Rounding is to nearest even, denormals included. A factor of exactly 1 copies the value bit for
// bit; every other NaN of the result is the canonical quiet one. Two steps on a chunk that stays in
// the first-level cache: gather the kept columns (vpcompress where they ascend), then scale them.
#include "fold.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef MP_X86
#if !defined(__clang__)
// GCC 12 warns of the undefined vectors in its own AVX-512 header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define MP_VBMI2 __attribute__((target(MP_AVX512_SET ",avx512vbmi2")))
#endif

namespace maskprune {
namespace {

constexpr int64_t chunk = 2048;
// Entries that compress may write beyond those it keeps.
constexpr int64_t slack = 64;

// Not every processor with AVX-512 packs 16-bit lanes.
bool compresses(Isa isa) {
#ifdef MP_X86
  return isa == Isa::avx512 && __builtin_cpu_supports("avx512vbmi2");
#else
  return isa != isa;
#endif
}

#ifdef MP_X86
// Columns [from, to) of `row` whose bit is set, packed into `out`, which has slack entries to
// spare; returns how many. vpcompress into a register: into memory it is slow on some cores.
template <class T>
MP_VBMI2 int64_t compress(const T* row, T* out, const uint32_t* bits, int64_t from, int64_t to) {
  constexpr int64_t lanes = 64 / sizeof(T);
  int64_t n = 0;
  for (int64_t i = from; i < to; i += lanes) {
    uint32_t m = bits[i / 32] >> (i % 32);
    if (lanes < 32) m &= (1u << (lanes & 31)) - 1;
    if (m == 0) continue;
    if constexpr (sizeof(T) == 2) {
      const __m512i v = _mm512_maskz_loadu_epi16(m, row + i);
      _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi16(m, v));
    } else if constexpr (sizeof(T) == 4) {
      const __m512i v = _mm512_maskz_loadu_epi32(__mmask16(m), row + i);
      _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi32(__mmask16(m), v));
    } else {
      const __m512i v = _mm512_maskz_loadu_epi64(__mmask8(m), row + i);
      _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi64(__mmask8(m), v));
    }
    n += __builtin_popcount(m);
  }
  return n;
}
#endif

template <class T>
void gather(const T* row, T* out, const int64_t* keep, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = row[keep[j]];
}

// Rounded products; returns whether one may be NaN, so that mend_nans must run.
template <class T>
MP_INLINE bool scale(const T* in, T* out, const float* factors, int64_t n) {
  // 0, or NaN where a product is NaN or infinite. A flag would keep float64 from vectorising.
  typename T::Wide sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const auto product = load(in[j]) * typename T::Wide(factors[j]);
    out[j] = round_to(T{}, product);
    sum += product * 0;
  }
  return sum != sum;
}

#ifdef MP_X86
// The same with the processor's half-float conversions, which no compiler finds in a plain loop.
MP_AVX2 bool scale_halves(const Float16* in, Float16* out, const float* factors, int64_t n) {
  __m256 nan = _mm256_setzero_ps();
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m256 w = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j)));
    const __m256 product = _mm256_mul_ps(w, _mm256_loadu_ps(factors + j));
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(product, product, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j),
                     _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
  }
  const bool tail = scale(in + j, out + j, factors + j, n - j);
  return tail || _mm256_movemask_ps(nan) != 0;
}
#endif

template <class T>
void mend_nans(const T* in, T* out, const float* factors, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const auto product = load(in[j]) * typename T::Wide(factors[j]);
    if (product != product) out[j].bits = factors[j] == 1.0f ? in[j].bits : T::quiet_nan;
  }
}

template <class T>
void fold_row_as(const T* row, T* out, const Columns& c, Isa isa, const float* row_scale) {
  T packed[chunk + slack];
  float factors[chunk];
  if (row_scale) std::fill(factors, factors + std::min(chunk, c.kept), *row_scale);
  auto* scale_chunk = copy_for<scale<T>>(isa);
#ifdef MP_X86
  if constexpr (std::is_same_v<T, Float16>)
    if (isa != Isa::portable) scale_chunk = scale_halves;
#endif
  int64_t done = 0;
  const auto finish = [&](const T* in, int64_t n) {
    const float* by = row_scale ? factors : c.scale ? c.scale + done : nullptr;
    if (!by) std::memcpy(out + done, in, n * sizeof(T));
    else if (scale_chunk(in, out + done, by, n)) mend_nans(in, out + done, by, n);
    done += n;
  };
  if (!c.keep) {
    while (done < c.kept) finish(row + done, std::min(chunk, c.kept - done));
    return;
  }
#ifdef MP_X86
  if (!c.bits.empty()) {
    for (int64_t from = 0; from < c.width; from += chunk) {
      const int64_t to = std::min(from + chunk, c.width);
      finish(packed, compress(row, packed, c.bits.data(), from, to));
    }
    return;
  }
#endif
  while (done < c.kept) {
    const int64_t n = std::min(chunk, c.kept - done);
    gather(row, packed, c.keep + done, n);
    finish(packed, n);
  }
}

}  // namespace

Columns make_columns(int64_t width, const int64_t* keep, int64_t kept, const float* scale,
                     Isa isa) {
  Columns c{width, kept, keep, scale};
  if (!keep) return c;
  bool ascends = true;
  for (int64_t j = 0; j < kept; ++j) {
    if (keep[j] < 0 || keep[j] >= width)
      throw std::invalid_argument("keep[" + std::to_string(j) + "] is " + std::to_string(keep[j]) +
                                  "; expected 0 to " + std::to_string(width - 1));
    ascends &= j == 0 || keep[j] > keep[j - 1];
  }
  if (!ascends || !compresses(isa)) return c;
  c.bits.assign(width / 32 + 1, 0);
  for (int64_t j = 0; j < kept; ++j) c.bits[keep[j] / 32] |= 1u << (keep[j] % 32);
  return c;
}

void fold_row(const void* row, void* out, const Columns& c, Dtype dtype, Isa isa,
              const float* row_scale) {
  with_storage<Float32, BFloat16, Float16, Float64>("fold_row", dtype, [&](auto value) {
    using T = decltype(value);
    fold_row_as(static_cast<const T*>(row), static_cast<T*>(out), c, isa, row_scale);
  });
}

ExactFloats::ExactFloats() {
#ifdef MP_X86
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80);
#endif
}

ExactFloats::~ExactFloats() {
#ifdef MP_X86
  _mm_setcsr(saved_);
#endif
}

}  // namespace maskprune
