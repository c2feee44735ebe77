// One row of fold_columns: out[j] = row[keep[j]] * scale[j], rounded once from float32 (float64
// for f64).
//
// Rounding is to nearest even, denormals included, so VCVTNEPS2BF16, which flushes them, is not
// used. A factor of exactly 1 copies the value bit for bit; every other NaN of the result is the
// canonical quiet one. Two steps on a chunk that stays in L1: gather the kept columns (vpcompress
// where they ascend), then scale what is left.
#include "fold.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the undefined vectors in its own AVX-512 header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define MASKPRUNE_X86 1
#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2")))
#endif

namespace maskprune {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

constexpr int64_t kChunk = 2048;
constexpr int64_t kSlack = 64;
constexpr uint32_t kNan32 = 0x7fc00000u;
constexpr uint16_t kNanBf16 = 0x7fc0;
constexpr uint16_t kNanF16 = 0x7e00;

template <class To, class From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

float widen_bf16(uint16_t h) { return bits_of<float>(static_cast<uint32_t>(h) << 16); }

uint16_t narrow_bf16(float f) {
  const uint32_t u = bits_of<uint32_t>(f);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

float widen_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
  if (exponent == 0x1f) return bits_of<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_of<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t narrow_f16(float f) {
  const uint32_t u = bits_of<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t magnitude = u & 0x7fffffffu;
  // 65520 is half-way from the largest finite half to the next power of two.
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded to nearest even.
    const float shifted = bits_of<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_of<uint32_t>(shifted) - bits_of<uint32_t>(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

template <class T>
void gather(const T* row, T* out, const int64_t* keep, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = row[keep[j]];
}

void scale_portable(const float* in, float* out, const float* scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float product = in[j] * scale[j];
    // memcpy below keeps signalling NaNs as they are, where a float copy on x87 would not.
    if (!std::isnan(product)) out[j] = product;
    else if (scale[j] == 1.0f) std::memcpy(out + j, in + j, sizeof(float));
    else out[j] = bits_of<float>(kNan32);
  }
}

void scale_portable(const double* in, double* out, const float* scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const double product = in[j] * static_cast<double>(scale[j]);
    if (!std::isnan(product)) out[j] = product;
    else if (scale[j] == 1.0f) std::memcpy(out + j, in + j, sizeof(double));
    else out[j] = bits_of<double>(uint64_t{0x7ff8000000000000});
  }
}

template <bool BF16>
void scale_portable(const uint16_t* in, uint16_t* out, const float* scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float product = (BF16 ? widen_bf16(in[j]) : widen_f16(in[j])) * scale[j];
    if (!std::isnan(product)) out[j] = BF16 ? narrow_bf16(product) : narrow_f16(product);
    else if (scale[j] == 1.0f) out[j] = in[j];
    else out[j] = BF16 ? kNanBf16 : kNanF16;
  }
}

#ifdef MASKPRUNE_X86

template <bool BF16>
AVX2 void scale_avx2(const uint16_t* in, uint16_t* out, const float* scale, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j));
    const __m256 w =
        BF16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))
             : _mm256_cvtph_ps(h);
    const __m256 product = _mm256_mul_ps(w, _mm256_loadu_ps(scale + j));
    if (_mm256_movemask_ps(_mm256_cmp_ps(product, product, _CMP_UNORD_Q))) {
      scale_portable<BF16>(in + j, out + j, scale + j, 8);
      continue;
    }
    __m128i r;
    if (BF16) {
      const __m256i u = _mm256_castps_si256(product);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
      const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i high = _mm256_srli_epi32(sum, 16);
      r = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    } else {
      r = _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), r);
  }
  scale_portable<BF16>(in + j, out + j, scale + j, n - j);
}

AVX2 void scale_avx2(const float* in, float* out, const float* scale, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(in + j), _mm256_loadu_ps(scale + j));
    if (_mm256_movemask_ps(_mm256_cmp_ps(product, product, _CMP_UNORD_Q)))
      scale_portable(in + j, out + j, scale + j, 8);
    else
      _mm256_storeu_ps(out + j, product);
  }
  scale_portable(in + j, out + j, scale + j, n - j);
}

template <bool BF16>
AVX512 void scale_avx512(const uint16_t* in, uint16_t* out, const float* scale, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 live = n - j < 16 ? static_cast<__mmask16>((1u << (n - j)) - 1) : 0xffff;
    const __m256i h = _mm256_maskz_loadu_epi16(live, in + j);
    const __m512 w =
        BF16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
             : _mm512_cvtph_ps(h);
    const __m512 s = _mm512_maskz_loadu_ps(live, scale + j);
    const __m512 product = _mm512_mul_ps(w, s);
    __m256i r;
    if (BF16) {
      const __m512i u = _mm512_castps_si512(product);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
      const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      r = _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
    } else {
      r = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT);
    }
    const __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
    if (__builtin_expect(nan != 0, 0)) {
      const __mmask16 one = _mm512_cmp_ps_mask(s, _mm512_set1_ps(1.0f), _CMP_EQ_OQ);
      r = _mm256_mask_mov_epi16(r, nan, _mm256_set1_epi16(BF16 ? kNanBf16 : kNanF16));
      r = _mm256_mask_mov_epi16(r, nan & one, h);
    }
    _mm256_mask_storeu_epi16(out + j, live, r);
  }
}

AVX512 void scale_avx512(const float* in, float* out, const float* scale, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 live = n - j < 16 ? static_cast<__mmask16>((1u << (n - j)) - 1) : 0xffff;
    const __m512 w = _mm512_maskz_loadu_ps(live, in + j);
    const __m512 s = _mm512_maskz_loadu_ps(live, scale + j);
    __m512 product = _mm512_mul_ps(w, s);
    const __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
    if (__builtin_expect(nan != 0, 0)) {
      const __mmask16 one = _mm512_cmp_ps_mask(s, _mm512_set1_ps(1.0f), _CMP_EQ_OQ);
      const __m512 canonical = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(kNan32)));
      product = _mm512_mask_mov_ps(product, nan, canonical);
      product = _mm512_mask_mov_ps(product, nan & one, w);
    }
    _mm512_mask_storeu_ps(out + j, live, product);
  }
}

// Columns [from, to) of `row` whose bit is set, packed into `out`, which has kSlack entries to
// spare; returns how many. vpcompress into a register: into memory it is slow on some cores.
template <class T>
AVX512 int64_t compress(const T* row, T* out, const uint32_t* bits, int64_t from, int64_t to) {
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
      const __m512i v = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(m), row + i);
      _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi32(static_cast<__mmask16>(m), v));
    } else {
      const __m512i v = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(m), row + i);
      _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi64(static_cast<__mmask8>(m), v));
    }
    n += __builtin_popcount(m);
  }
  return n;
}

#endif  // MASKPRUNE_X86

template <Dtype D, class T>
void scale_chunk(const T* in, T* out, const float* scale, int64_t n, Isa isa) {
  constexpr bool bf16 = D == Dtype::bf16;
#ifdef MASKPRUNE_X86
  if constexpr (sizeof(T) == 2) {
    if (isa == Isa::avx512) return scale_avx512<bf16>(in, out, scale, n);
    if (isa == Isa::avx2) return scale_avx2<bf16>(in, out, scale, n);
  } else if constexpr (sizeof(T) == 4) {
    if (isa == Isa::avx512) return scale_avx512(in, out, scale, n);
    if (isa == Isa::avx2) return scale_avx2(in, out, scale, n);
  }
#endif
  (void)isa;
  if constexpr (sizeof(T) == 2) scale_portable<bf16>(in, out, scale, n);
  else scale_portable(in, out, scale, n);
}

template <Dtype D, class T>
void fold_row_as(const T* row, T* out, const Columns& c, Isa isa, const float* row_scale) {
  T packed[kChunk + kSlack];
  float factors[kChunk];
  if (row_scale) std::fill(factors, factors + std::min(kChunk, c.kept), *row_scale);
  int64_t done = 0;
  const auto finish = [&](const T* in, int64_t n) {
    const float* scale = row_scale ? factors : c.scale ? c.scale + done : nullptr;
    if (scale) scale_chunk<D>(in, out + done, scale, n, isa);
    else std::memcpy(out + done, in, static_cast<std::size_t>(n) * sizeof(T));
    done += n;
  };
  if (!c.keep) {
    while (done < c.kept) finish(row + done, std::min(kChunk, c.kept - done));
    return;
  }
#ifdef MASKPRUNE_X86
  if (isa == Isa::avx512 && !c.bits.empty()) {
    for (int64_t from = 0; from < c.width; from += kChunk) {
      const int64_t to = std::min(from + kChunk, c.width);
      finish(packed, compress(row, packed, c.bits.data(), from, to));
    }
    return;
  }
#endif
  while (done < c.kept) {
    const int64_t n = std::min(kChunk, c.kept - done);
    gather(row, packed, c.keep + done, n);
    finish(packed, n);
  }
}

}  // namespace

int64_t item_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

Isa choose_isa(const std::string& name) {
  bool avx2 = false, avx512 = false;
#ifdef MASKPRUNE_X86
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2");
#endif
  if (name == "auto") return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
  if (name == "portable") return Isa::portable;
  if (name == "avx2" && avx2) return Isa::avx2;
  if (name == "avx512" && avx512) return Isa::avx512;
  throw std::invalid_argument("isa is '" + name +
                              "'; expected auto, portable, avx2 or avx512 with a CPU that has it");
}

Columns make_columns(int64_t width, const int64_t* keep, int64_t kept, const float* scale) {
  Columns c{width, kept, keep, scale};
  if (!keep) return c;
  for (int64_t j = 0; j < kept; ++j)
    if (keep[j] < 0 || keep[j] >= width)
      throw std::invalid_argument("keep[" + std::to_string(j) + "] is " + std::to_string(keep[j]) +
                                  "; expected 0 to " + std::to_string(width - 1));
  for (int64_t j = 1; j < kept; ++j)
    if (keep[j] <= keep[j - 1]) return c;
  c.bits.assign(static_cast<std::size_t>(width / 32 + 1), 0);
  for (int64_t j = 0; j < kept; ++j) c.bits[keep[j] / 32] |= 1u << (keep[j] % 32);
  return c;
}

void fold_row(const void* row, void* out, const Columns& c, Dtype dtype, Isa isa,
              const float* row_scale) {
  const auto run = [&](auto tag, auto type) {
    using T = decltype(type);
    fold_row_as<decltype(tag)::value>(static_cast<const T*>(row), static_cast<T*>(out), c, isa,
                                      row_scale);
  };
  switch (dtype) {
    case Dtype::f32: return run(std::integral_constant<Dtype, Dtype::f32>{}, float{});
    case Dtype::f16: return run(std::integral_constant<Dtype, Dtype::f16>{}, uint16_t{});
    case Dtype::bf16: return run(std::integral_constant<Dtype, Dtype::bf16>{}, uint16_t{});
    case Dtype::f64: return run(std::integral_constant<Dtype, Dtype::f64>{}, double{});
  }
}

ExactFloats::ExactFloats() {
#ifdef MASKPRUNE_X86
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80);
#endif
}

ExactFloats::~ExactFloats() {
#ifdef MASKPRUNE_X86
  _mm_setcsr(saved_);
#endif
}

}  // namespace maskprune
