// The instruction sets that every operation is compiled for, and the choice between them.
#pragma once

#include <stdexcept>
#include <string>

#if defined(__GNUC__) || defined(__clang__)
#define MP_INLINE inline __attribute__((always_inline))
#else
#define MP_INLINE inline
#endif

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define MP_X86 1
#define MP_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define MP_AVX512_SET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,popcnt"
#if defined(__clang__)
#define MP_AVX512 __attribute__((target(MP_AVX512_SET)))
#else
// GCC halves the vectors on its own unless it is told that 512 bits are wanted.
#define MP_AVX512 __attribute__((target(MP_AVX512_SET ",prefer-vector-width=512")))
#endif
#else
#define MP_AVX2
#define MP_AVX512
#endif

namespace maskprune {

enum class Isa { portable, avx2, avx512 };

// "auto" is the best that this machine has. Throws std::invalid_argument for a name that is
// unknown or that this machine or build cannot run.
inline Isa choose_isa(const std::string& op, const std::string& name) {
  bool avx2 = false, avx512 = false;
#ifdef MP_X86
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  if (name == "auto") return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
  if (name == "portable") return Isa::portable;
  if (name == "avx2" && avx2) return Isa::avx2;
  if (name == "avx512" && avx512) return Isa::avx512;
  throw std::invalid_argument(op + ": instruction set \"" + name +
                              "\" is unknown or not on this machine; expected auto, portable" +
                              (avx2 ? ", avx2" : "") + (avx512 ? ", avx512" : ""));
}

// One copy of `Body` for each instruction set. Body is MP_INLINE and made of plain loops, which the
// compiler vectorises anew in each copy.
template <auto Body>
struct Copies;
template <class Result, class... Args, Result (*Body)(Args...)>
struct Copies<Body> {
  static Result portable(Args... args) { return Body(args...); }
  MP_AVX2 static Result avx2(Args... args) { return Body(args...); }
  MP_AVX512 static Result avx512(Args... args) { return Body(args...); }
};

template <auto Body>
auto copy_for(Isa isa) {
  return isa == Isa::avx512 ? &Copies<Body>::avx512
         : isa == Isa::avx2 ? &Copies<Body>::avx2
                            : &Copies<Body>::portable;
}

}  // namespace maskprune
