// How numbers are stored, by the codes of maskprune/ops/backend.py: loaded to the type that the
// arithmetic is done in, and rounded once, to nearest even, at the store. Everything is
// branch-free, so that a plain loop over it vectorises for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "isa.hpp"

namespace maskprune {

enum class Dtype : int { bytes = -1, f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

inline int64_t item_size(Dtype dtype) {
  return dtype == Dtype::bytes ? 1 : dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// `quiet_nan`: the bits of the canonical NaN.
struct Float32 {
  using Wide = float;
  static constexpr Dtype dtype = Dtype::f32;
  static constexpr uint32_t quiet_nan = 0x7FC00000u;
  uint32_t bits;
};
struct Float16 {
  using Wide = float;
  static constexpr Dtype dtype = Dtype::f16;
  static constexpr uint16_t quiet_nan = 0x7E00u;
  uint16_t bits;
};
struct BFloat16 {
  using Wide = float;
  static constexpr Dtype dtype = Dtype::bf16;
  static constexpr uint16_t quiet_nan = 0x7FC0u;
  uint16_t bits;
};
struct Float64 {
  using Wide = double;
  static constexpr Dtype dtype = Dtype::f64;
  static constexpr uint64_t quiet_nan = 0x7FF8000000000000u;
  uint64_t bits;
};

// Calls `f` with an empty value of the storage type among `Types` that has this dtype.
template <class First, class... Rest, class F>
auto with_storage(const std::string& op, Dtype dtype, F f) {
  if (dtype == First::dtype) return f(First{});
  if constexpr (sizeof...(Rest) > 0) return with_storage<Rest...>(op, dtype, f);
  throw std::invalid_argument(op + ": dtype code " + std::to_string(int(dtype)) +
                              " is unknown or not taken here");
}

template <class To, class From>
MP_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

MP_INLINE float load(Float32 x) { return bit_cast<float>(x.bits); }
MP_INLINE double load(Float64 x) { return bit_cast<double>(x.bits); }
MP_INLINE float load(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
MP_INLINE float load(Float16 x) {
  const uint32_t w = uint32_t{x.bits} << 16;
  const uint32_t sign = w & 0x80000000u, twice = w + w;
  const float normal = bit_cast<float>((twice >> 4) + 0x70000000u) * 0x1p-112f;
  const float denormal = bit_cast<float>((twice >> 17) | 0x3F000000u) - 0.5f;
  const uint32_t magnitude =
      twice < 0x08000000u ? bit_cast<uint32_t>(denormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>(sign | magnitude);
}

// `value` rounded to the storage type of the first argument; NaN to bfloat16 is left to `store`.
MP_INLINE Float32 round_to(Float32, float value) { return {bit_cast<uint32_t>(value)}; }
MP_INLINE Float64 round_to(Float64, double value) { return {bit_cast<uint64_t>(value)}; }
MP_INLINE BFloat16 round_to(BFloat16, float value) {
  const uint32_t w = bit_cast<uint32_t>(value);
  return {uint16_t((w + 0x7FFFu + ((w >> 16) & 1u)) >> 16)};
}
MP_INLINE Float16 round_to(Float16, float value) {
  const uint32_t w = bit_cast<uint32_t>(value), twice = w + w;
  const float magnitude = bit_cast<float>(w & 0x7FFFFFFFu);
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  // The first product overflows what half cannot hold; the sum then rounds at half's last bit.
  const float scaled = (magnitude * 0x1p112f) * 0x1p-110f;
  const uint32_t bits = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  const uint32_t sign = (w >> 16) & 0x8000u;
  return {uint16_t(sign | (twice > 0xFF000000u ? Float16::quiet_nan : finite))};
}

// Rounds once; a NaN stays a NaN, with any sign and payload.
template <class T>
MP_INLINE void store(T& x, typename T::Wide value) {
  x = round_to(x, value);
  if constexpr (std::is_same_v<T, BFloat16>)
    x.bits |= (bit_cast<uint32_t>(value) & 0x7FFFFFFFu) > 0x7F800000u ? T::quiet_nan : 0;
}

// Addresses come from Python as integers.
template <class T>
MP_INLINE T* at(uintptr_t address, int64_t offset = 0) {
  return reinterpret_cast<T*>(address) + offset;
}

}  // namespace maskprune
