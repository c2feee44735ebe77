// One step of Algorithm 1 after the gradient step; the definition is
// maskprune/ops/minimax_step.py, whose letters these are.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.hpp"
#include "isa.hpp"
#include "least_s_prox.hpp"
#include "threads.hpp"

namespace maskprune {
namespace {

// The state vector, in the order of FIELDS.
struct State {
  float step, y, z, R, locked, failed, r[2], s[2], S, next[2], interval, shrink, locked_at;
};
constexpr std::size_t field_count = 16;
static_assert(sizeof(State) == field_count * sizeof(float), "State is the vector of FIELDS");

// In the order of rate_vector; kind 0 is head, 1 is ffn.
struct Rates {
  float a[2], R_star, total_steps, eta1, log_eta1_ratio, eta2, eta3, eta4, reach, interval,
      lock_gap, to[2], scheduled;
};
constexpr std::size_t rate_count = 15;
static_assert(sizeof(Rates) == rate_count * sizeof(float), "Rates is the result of rate_vector");

struct Masks {
  float* m;
  int64_t rows, units;
  bool any() const { return rows > 0 && units > 0; }
};

bool any_nan(const Masks (&kinds)[2], const RowFunctions& row, int team) {
  int found = 0;
  for (const Masks& q : kinds) {
#pragma omp parallel for num_threads(team) schedule(static) reduction(| : found)
    for (int64_t i = 0; i < q.rows; ++i) found |= row.has_nan(q.m + i * q.units, q.units);
  }
  return found;
}

// Clamps and shrinks all rows of one kind; the means over rows of their sums.
RowSums step_rows(const Masks& q, float s, float shrink, const RowFunctions& row, int team) {
  const int64_t k = entries_to_shrink(s, q.units);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<RowSums> each(q.rows, RowSums{nan, nan});
#pragma omp parallel num_threads(team)
  {
    const std::unique_ptr<int32_t[]> scratch(new int32_t[2 * q.units]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < q.rows; ++i) {
      float* m = q.m + i * q.units;
      row.clamp(m, q.units);
      if (k >= 0 && !std::isnan(shrink)) each[i] = row.prox(m, q.units, k, shrink, scratch.get());
    }
  }
  double sum_sq = 0.0, next_sq = 0.0;
  for (const RowSums& sums : each) {
    sum_sq += sums.sum_sq;
    next_sq += sums.next_sq;
  }
  return {float(sum_sq / double(q.rows)), float(next_sq / double(q.rows))};
}

// Index of the legal split nearest to r, weighed by the shares; the first of equals.
int64_t nearest_split(const float* table, int64_t splits, const float (&r)[2],
                      const float (&D)[2], const Rates& c) {
  int64_t best = 0;
  float least = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < splits; ++i) {
    const float away = c.a[0] * std::fabs(table[2 * i] / D[0] - r[0]) +
                       c.a[1] * std::fabs(table[2 * i + 1] / D[1] - r[1]);
    if (away < least) {
      least = away;
      best = i;
    }
  }
  return best;
}

// The scalars after the prox; v.next and v.S are of this step, v.r and v.s of the last.
void step_scalars(State& v, const Masks (&kinds)[2], const float* table, int64_t splits,
                  const Rates& c) {
  const float saved = 1.0f - c.R_star, ramp = c.reach * c.total_steps;
  if (v.step == 0.0f) {
    float cheapest = std::numeric_limits<float>::infinity();
    for (int q = 0; q < 2; ++q)
      if (kinds[q].any()) cheapest = std::min(cheapest, v.next[q]);
    v.z = v.y * cheapest;
  }

  float r[2] = {0.0f, 0.0f};
  if (c.scheduled != 0.0f) {
    const float share = (v.step + 1.0f) / ramp;
    for (int q = 0; q < 2; ++q) r[q] = share * c.to[q];
  } else {
    for (int q = 0; q < 2; ++q)
      if (kinds[q].any()) r[q] = c.eta2 * (v.z - v.y * v.next[q]);
    const float freed = c.a[0] * r[0] + c.a[1] * r[1], part = 1.25f * saved / ramp;
    const float slow = freed > part ? part / freed : 1.0f;
    for (int q = 0; q < 2; ++q) r[q] = v.r[q] + slow * r[q];
  }
  for (int q = 0; q < 2; ++q)
    r[q] = kinds[q].any() ? std::min(std::max(r[q], 0.0f), 1.0f - 1.0f / float(kinds[q].units))
                          : 0.0f;

  const float freed = c.a[0] * r[0] + c.a[1] * r[1];
  if (freed > saved)
    for (float& value : r) value *= saved / freed;
  const float R = 1.0f - c.a[0] * r[0] - c.a[1] * r[1];

  if (v.locked == 0.0f) {
    const float D[2] = {float(std::max<int64_t>(1, kinds[0].units)), float(kinds[1].units)};
    const bool locking = R - c.R_star <= c.lock_gap * saved;
    const int64_t nearest = locking ? nearest_split(table, splits, r, D, c) : 0;
    for (int q = 0; q < 2; ++q) {
      v.s[q] = locking ? table[2 * nearest + q] : r[q] * D[q];
      v.r[q] = locking ? v.s[q] / D[q] : r[q];
    }
    if (locking) {
      v.locked = 1.0f;
      v.locked_at = v.step;
    }
  }
  v.R = 1.0f - c.a[0] * v.r[0] - c.a[1] * v.r[1];

  v.y += c.eta3 * v.S;
  const float excess = (v.R - c.R_star) / saved;
  v.z += c.eta4 * v.y * (v.locked != 0.0f ? excess : std::max(excess, 0.5f));
  v.z = std::max(v.z, 0.0f);
  v.step += 1.0f;
}

}  // namespace

// head, ffn: contiguous float32 rows; table: splits x 2; rates: see Rates.
void minimax_step(uintptr_t head, int64_t head_rows, int64_t head_units, uintptr_t ffn,
                  int64_t ffn_rows, int64_t ffn_units, uintptr_t state, uintptr_t table,
                  int64_t splits, const std::vector<float>& rates, int threads,
                  const std::string& isa) {
  if (rates.size() != rate_count)
    throw std::invalid_argument("minimax_step: " + std::to_string(rates.size()) +
                                " rates; expected " + std::to_string(rate_count));
  const RowFunctions row = row_functions(choose_isa("minimax_step_", isa));
  const Masks kinds[2] = {{at<float>(head), head_rows, head_units},
                          {at<float>(ffn), ffn_rows, ffn_units}};
  Rates c;
  std::copy(rates.begin(), rates.end(), reinterpret_cast<float*>(&c));
  State& v = *at<State>(state);
  const int64_t entries = head_rows * head_units + ffn_rows * ffn_units;
  const int team = team_size(std::max(head_rows, ffn_rows), entries, entries_grain, threads);
  if (v.failed > 0.0f || any_nan(kinds, row, team)) {
    v.failed = 1.0f;
    return;
  }

  const float progress = v.step / c.total_steps;
  v.shrink = 1.0f / (1.0f + 2.0f * (c.eta1 * std::exp(c.log_eta1_ratio * progress)) * v.y);
  v.interval = std::max(1.0f, std::nearbyint(c.interval + (1.0f - c.interval) * progress));
  const bool ffn_due = std::fmod(v.step, v.interval) == 0.0f;
  v.S = 0.0f;
  for (int q = 0; q < 2; ++q) {
    if (!kinds[q].any()) continue;
    const float shrink = q == 0 || ffn_due ? v.shrink : 1.0f;
    const RowSums mean = step_rows(kinds[q], std::floor(v.s[q]), shrink, row, team);
    v.S += c.a[q] * mean.sum_sq / float(kinds[q].units);
    v.next[q] = mean.next_sq;
  }
  step_scalars(v, kinds, at<float>(table), splits, c);
}

}  // namespace maskprune
