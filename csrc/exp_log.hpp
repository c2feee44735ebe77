// exp and log of float as branch-free polynomials (Cephes expf and logf), so that a plain loop over
// them vectorises for every target, with the same bits.
#pragma once

#include <cstdint>

#include "dtypes.hpp"

namespace maskprune {

// exp(x) for x <= 0 within 1 ulp; 0 where float has no normal number.
MP_INLINE float exp_nonpositive(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t bits = bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23);
  return x < -87.0f ? 0.0f : bit_cast<float>(bits);
}

// log(x) for normal x > 0 within 1 ulp, next to 1 too: there x - 1 is exact and dominates.
MP_INLINE float log_positive(float x) {
  const uint32_t half_root = 0x3F3504F3u;  // sqrt(1/2): the mantissa is kept within its octave
  const uint32_t above = bit_cast<uint32_t>(x) - half_root;
  const float n = float(int32_t(above) >> 23);
  const float r = bit_cast<float>((above & 0x007FFFFFu) + half_root) - 1.0f, rr = r * r;
  // In three parts: one chain of nine steps would keep the processor waiting.
  const float high = (7.0376836292e-2f * r - 1.1514610310e-1f) * r + 1.1676998740e-1f;
  const float middle = (-1.2420140846e-1f * r + 1.4249322787e-1f) * r - 1.6668057665e-1f;
  const float low = (2.0000714765e-1f * r - 2.4999993993e-1f) * r + 3.3333331174e-1f;
  const float rrr = rr * r;
  const float p = ((high * rrr + middle) * rrr + low) * rrr + n * -2.12194440e-4f;
  return r + (p - 0.5f * rr) + n * 0.693359375f;
}

}  // namespace maskprune
