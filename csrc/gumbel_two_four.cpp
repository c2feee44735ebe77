// W * m with m a Gumbel-softmax sample of the 2:4 mask, its norm, and the gradient of the logits.
// Four weights and one logit of each of six planes are a group; groups are numbered in memory
// order, and their numbers are the counters of the noise. Work is cut and summed in one order that
// only the size decides, so the number of threads never changes a bit.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "dtypes.hpp"
#include "exp_log.hpp"
#include "isa.hpp"
#include "threads.hpp"

namespace maskprune {
namespace {

// Groups passed from loop to loop at once, in buffers that stay in the L1 cache.
constexpr int64_t block_groups = 256;
// Groups of one work item, whose squares share one partial sum.
constexpr int64_t item_groups = 64 * block_groups;
// Groups for which one more thread pays.
constexpr int64_t groups_grain = 8192;
// Lanes in which a block's squares are summed, 16 terms each, before they join the double sum.
constexpr int64_t lanes = 64;

struct Problem {
  uintptr_t dmasked, weight, logits, masked, dlogits;
  int64_t groups;
  uint64_t seed;
  float dnorm_sq, kappa, tau;
  double* partial;  // (items,)
};

// What the loops of a block pass to each other.
struct Block {
  int32_t n[6][block_groups];
  float p[6][block_groups];
  float peak[block_groups], total[block_groups];
  float mask[4 * block_groups], product[4 * block_groups];
};

// The six 21-bit integers of groups first, first + 1, ...; planes lie `plane` apart.
MP_INLINE void draw(uint64_t seed, uint64_t first, int64_t groups, int32_t* __restrict out,
                    int64_t plane) {
  const uint32_t low = uint32_t(first), high = uint32_t(first >> 32);
#pragma omp simd
  for (int64_t j = 0; j < groups; ++j) {
    uint32_t a = low + uint32_t(j), b = high + (a < low ? 1u : 0u), c = 0, d = 0;
    uint32_t key_a = uint32_t(seed), key_b = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t x = uint64_t{0xD2511F53u} * a, y = uint64_t{0xCD9E8D57u} * c;
      a = uint32_t(y >> 32) ^ b ^ key_a;
      c = uint32_t(x >> 32) ^ d ^ key_b;
      b = uint32_t(y);
      d = uint32_t(x);
      key_a += 0x9E3779B9u;
      key_b += 0xBB67AE85u;
    }
    out[j] = int32_t(a >> 11);
    out[plane + j] = int32_t(b >> 11);
    out[2 * plane + j] = int32_t(c >> 11);
    out[3 * plane + j] = int32_t(d >> 11);
    out[4 * plane + j] = int32_t((a & 0x7FFu) << 10 | (b & 0x3FFu));
    out[5 * plane + j] = int32_t((c & 0x7FFu) << 10 | (d & 0x3FFu));
  }
}

// p and the mask of a block of groups.
MP_INLINE void sample(const Problem& p, int64_t group, int64_t groups, Block& block) {
  draw(p.seed, uint64_t(group), groups, block.n[0], block_groups);
  const float kappa = p.kappa, inverse = 1.0f / p.tau;
  float* __restrict peak = block.peak;
  float* __restrict total = block.total;
  for (int k = 0; k < 6; ++k) {
    const float* __restrict pi = at<float>(p.logits, k * p.groups + group);
    const int32_t* __restrict n = block.n[k];
    float* __restrict x = block.p[k];
#pragma omp simd
    for (int64_t j = 0; j < groups; ++j)
      x[j] = -log_positive((float(n[j]) + 0.5f) * 0x1p-21f);
    // A loop of its own: two logarithms in a row are a longer chain than processors look ahead.
#pragma omp simd
    for (int64_t j = 0; j < groups; ++j) {
      x[j] = kappa * pi[j] - log_positive(x[j]);
      peak[j] = k == 0 || x[j] > peak[j] ? x[j] : peak[j];
    }
  }
  for (int k = 0; k < 6; ++k) {
    float* __restrict x = block.p[k];
#pragma omp simd
    for (int64_t j = 0; j < groups; ++j) {
      const float z = (x[j] - peak[j]) * inverse;
      // The bit arithmetic of exp would turn some NaN into a number.
      x[j] = z == z ? exp_nonpositive(z) : z;
      total[j] = k == 0 ? x[j] : total[j] + x[j];
    }
  }
  float* __restrict mask = block.mask;
#pragma omp simd
  for (int64_t j = 0; j < groups; ++j) {
    const float share = 1.0f / total[j];
    const float a = block.p[0][j] * share, b = block.p[1][j] * share, c = block.p[2][j] * share;
    const float d = block.p[3][j] * share, e = block.p[4][j] * share, f = block.p[5][j] * share;
    block.p[0][j] = a, block.p[1][j] = b, block.p[2][j] = c;
    block.p[3][j] = d, block.p[4][j] = e, block.p[5][j] = f;
    mask[4 * j] = a + b + c;
    mask[4 * j + 1] = a + d + e;
    mask[4 * j + 2] = b + d + f;
    mask[4 * j + 3] = c + e + f;
  }
}

template <class T>
MP_INLINE double forward_block(const Problem& p, int64_t group, int64_t groups, Block& block) {
  sample(p, group, groups, block);
  const T* __restrict W = at<T>(p.weight, 4 * group);
  T* __restrict masked = at<T>(p.masked, 4 * group);
  float* __restrict product = block.product;
  const float* __restrict mask = block.mask;
#pragma omp simd
  for (int64_t i = 0; i < 4 * groups; ++i) {
    product[i] = load(W[i]) * mask[i];
    store(masked[i], product[i]);
  }
  std::fill(product + 4 * groups, product + 4 * block_groups, 0.0f);
  float sum[lanes] = {};
  for (int64_t i = 0; i < 4 * block_groups; i += lanes)
    for (int64_t l = 0; l < lanes; ++l) sum[l] += product[i + l] * product[i + l];
  double total = 0.0;
  for (int64_t l = 0; l < lanes; ++l) total += sum[l];
  return total;
}

template <class T>
MP_INLINE double backward_block(const Problem& p, int64_t group, int64_t groups, Block& block) {
  sample(p, group, groups, block);
  const T* __restrict W = at<T>(p.weight, 4 * group);
  const T* __restrict dmasked = at<T>(p.dmasked, 4 * group);
  float* __restrict dm = block.product;
  const float* __restrict mask = block.mask;
  const float twice = 2.0f * p.dnorm_sq, scale = p.kappa / p.tau;
#pragma omp simd
  for (int64_t i = 0; i < 4 * groups; ++i) {
    const float w = load(W[i]);
    dm[i] = (load(dmasked[i]) + twice * (w * mask[i])) * w;
  }
  float* __restrict dpi = at<float>(p.dlogits, group);
  const int64_t plane = p.groups;
#pragma omp simd
  for (int64_t j = 0; j < groups; ++j) {
    const float a = dm[4 * j], b = dm[4 * j + 1], c = dm[4 * j + 2], d = dm[4 * j + 3];
    const float mean =
        mask[4 * j] * a + mask[4 * j + 1] * b + (mask[4 * j + 2] * c + mask[4 * j + 3] * d);
    dpi[j] = scale * block.p[0][j] * (a + b - mean);
    dpi[plane + j] = scale * block.p[1][j] * (a + c - mean);
    dpi[2 * plane + j] = scale * block.p[2][j] * (a + d - mean);
    dpi[3 * plane + j] = scale * block.p[3][j] * (b + c - mean);
    dpi[4 * plane + j] = scale * block.p[4][j] * (b + d - mean);
    dpi[5 * plane + j] = scale * block.p[5][j] * (c + d - mean);
  }
  return 0.0;
}

void run(const Problem& p, Dtype dtype, int threads, const std::string& isa) {
  const Isa chosen = choose_isa("gumbel_two_four", isa);
  with_storage<Float32, BFloat16, Float16>("gumbel_two_four", dtype, [&](auto value) {
    using T = decltype(value);
    const auto step =
        p.masked ? copy_for<forward_block<T>>(chosen) : copy_for<backward_block<T>>(chosen);
    const int64_t items = (p.groups + item_groups - 1) / item_groups;
    const int team = team_size(items, p.groups, groups_grain, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t item = 0; item < items; ++item) {
      Block block;
      const int64_t end = std::min(p.groups, (item + 1) * item_groups);
      double total = 0.0;
      for (int64_t group = item * item_groups; group < end; group += block_groups)
        total += step(p, group, std::min(block_groups, end - group), block);
      p.partial[item] = total;
    }
  });
}

}  // namespace

void gumbel_two_four_forward(uintptr_t weight, uintptr_t logits, uintptr_t masked,
                             uintptr_t norm_sq, int64_t groups, int64_t seed, float kappa,
                             float tau, int dtype, int threads, const std::string& isa) {
  std::vector<double> partial(groups / item_groups + 1);
  Problem p{};
  p.weight = weight, p.logits = logits, p.masked = masked, p.groups = groups;
  p.seed = uint64_t(seed), p.kappa = kappa, p.tau = tau, p.partial = partial.data();
  run(p, Dtype(dtype), threads, isa);
  double total = 0.0;
  for (const double sum : partial) total += sum;
  *at<float>(norm_sq) = float(total);
}

void gumbel_two_four_backward(uintptr_t dmasked, float dnorm_sq, uintptr_t weight, uintptr_t logits,
                              uintptr_t dlogits, int64_t groups, int64_t seed, float kappa,
                              float tau, int dtype, int threads, const std::string& isa) {
  std::vector<double> partial(groups / item_groups + 1);
  Problem p{};
  p.dmasked = dmasked, p.dnorm_sq = dnorm_sq, p.weight = weight, p.logits = logits;
  p.dlogits = dlogits, p.groups = groups, p.seed = uint64_t(seed), p.kappa = kappa;
  p.tau = tau, p.partial = partial.data();
  run(p, Dtype(dtype), threads, isa);
}

// The integers alone, planes one after another, for the tests that compare them.
void gumbel_two_four_noise(int64_t seed, int64_t first, int64_t groups, uintptr_t out,
                           const std::string& isa) {
  copy_for<draw>(choose_isa("gumbel_two_four", isa))(
      uint64_t(seed), uint64_t(first), groups, at<int32_t>(out), groups);
}

}  // namespace maskprune
