// Storage types of the elementwise operations: float inside, one rounding to nearest even at the
// store. Everything is branch-free, so that a plain loop over it vectorises for every target.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__GNUC__) || defined(__clang__)
#define MP_INLINE inline __attribute__((always_inline))
#else
#define MP_INLINE inline
#endif

#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
#define MP_X86 1
#define MP_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define MP_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
// GCC halves the vectors on its own unless it is told that 512 bits are wanted.
#define MP_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#else
#define MP_AVX2
#define MP_AVX512
#endif

namespace maskprune::elementwise {

enum class Isa { portable, avx2, avx512 };

// "auto" is the best that this machine has; a name that it does not have is refused.
inline Isa choose_isa(const char* op, const std::string& name) {
  bool avx2 = false, avx512 = false;
#ifdef MP_X86
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  if (name == "auto") return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
  if (name == "portable") return Isa::portable;
  if (name == "avx2" && avx2) return Isa::avx2;
  if (name == "avx512" && avx512) return Isa::avx512;
  throw std::invalid_argument(std::string(op) + ": instruction set \"" + name +
                              "\" is unknown or not on this machine; expected auto, portable" +
                              (avx2 ? ", avx2" : "") + (avx512 ? ", avx512" : ""));
}

template <class To, class From>
MP_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

struct Float32 {
  float bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MP_INLINE float load(Float32 x) { return x.bits; }
MP_INLINE float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
MP_INLINE float load(Float16 x) {
  const uint32_t w = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t sign = w & 0x80000000u, twice = w + w;
  const float normal = bit_cast<float>((twice >> 4) + 0x70000000u) * 0x1p-112f;
  const float denormal = bit_cast<float>((twice >> 17) | 0x3F000000u) - 0.5f;
  const uint32_t magnitude =
      twice < 0x08000000u ? bit_cast<uint32_t>(denormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>(sign | magnitude);
}

MP_INLINE void store(Float32& x, float value) { x.bits = value; }
MP_INLINE void store(BFloat16& x, float value) {
  const uint32_t w = bit_cast<uint32_t>(value);
  const uint32_t rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
  const uint32_t nan = (w >> 16) | 0x40u;
  x.bits = static_cast<uint16_t>((w & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}
MP_INLINE void store(Float16& x, float value) {
  const uint32_t w = bit_cast<uint32_t>(value), twice = w + w;
  const float magnitude = bit_cast<float>(w & 0x7FFFFFFFu);
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  // The first product overflows what half cannot hold; the sum then rounds at half's last bit.
  const float scaled = (magnitude * 0x1p112f) * 0x1p-110f;
  const uint32_t bits = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  const uint32_t sign = (w >> 16) & 0x8000u;
  x.bits = static_cast<uint16_t>(sign | (twice > 0xFF000000u ? 0x7E00u : finite));
}

// Below this many elements the work is done before a second thread has started.
constexpr int64_t parallel_grain = 32768;

MP_INLINE int threads_for(int64_t elements, int threads) {
  return elements < parallel_grain || threads < 1 ? 1 : threads;
}

}  // namespace maskprune::elementwise
