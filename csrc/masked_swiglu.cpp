// out = act(gate) * up * mask, and its gradients; gate and up are rows of F values, mask is (F,).
// Both activations are g * sigmoid(z(g)): silu has z = g, gelu_tanh has z = 2k (g + a g^3).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.hpp"
#include "exp_log.hpp"
#include "isa.hpp"
#include "tiles.hpp"

namespace maskprune {
namespace {

struct Value {
  float f, df;
};

template <bool GELU>
MP_INLINE Value activate(float g) {
  const float k = 0.7978845608028654f, a = 0.044715f;
  const float z = GELU ? 2.0f * k * (g + a * g * g * g) : g;
  const float dz = GELU ? 2.0f * k * (1.0f + 3.0f * a * g * g) : 1.0f;
  // sigmoid and 1 - sigmoid from exp(-|z|): neither overflows nor cancels.
  const float e = exp_nonpositive(-std::fabs(z));
  const float large = 1.0f / (1.0f + e), small = e * large;
  const float sigmoid = z >= 0.0f ? large : small, rest = z >= 0.0f ? small : large;
  const float f = g * sigmoid;
  // Where sigmoid is flat its slope is 0, also when dz has overflowed; NaN comes in through f.
  const float slope = small > 0.0f ? rest * dz : 0.0f;
  return {f, sigmoid + f * slope};
}

struct Problem {
  uintptr_t grad, gate, up, mask, dgate, dup, out;
  int64_t grad_stride, gate_stride, up_stride, rows, columns;
  double* partial;  // (tiles down, columns), zeros
};

template <class T, bool GELU>
MP_INLINE void forward_tile(const Problem& p, int64_t row, int64_t rows, int64_t column,
                            int64_t columns) {
  const float* __restrict m = at<float>(p.mask, column);
  for (int64_t t = row; t < row + rows; ++t) {
    const T* __restrict g = at<T>(p.gate, t * p.gate_stride + column);
    const T* __restrict u = at<T>(p.up, t * p.up_stride + column);
    T* __restrict out = at<T>(p.out, t * p.columns + column);
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j)
      store(out[j], activate<GELU>(load(g[j])).f * load(u[j]) * m[j]);
  }
}

template <class T, bool GELU>
MP_INLINE void backward_tile(const Problem& p, int64_t row, int64_t rows, int64_t column,
                             int64_t columns) {
  const float* __restrict m = at<float>(p.mask, column);
  double* __restrict total = p.partial + row / tile_rows * p.columns + column;
  float sum[tile_columns];
  for (int64_t first = row; first < row + rows; first += float_rows) {
    std::fill(sum, sum + columns, 0.0f);
    for (int64_t t = first; t < std::min(first + float_rows, row + rows); ++t) {
      const T* __restrict d = at<T>(p.grad, t * p.grad_stride + column);
      const T* __restrict g = at<T>(p.gate, t * p.gate_stride + column);
      const T* __restrict u = at<T>(p.up, t * p.up_stride + column);
      T* __restrict dg = at<T>(p.dgate, t * p.columns + column);
      T* __restrict du = at<T>(p.dup, t * p.columns + column);
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) {
        const Value v = activate<GELU>(load(g[j]));
        const float dout = load(d[j]), up = load(u[j]), masked = dout * m[j];
        sum[j] += dout * (v.f * up);
        store(du[j], masked * v.f);
        store(dg[j], masked * up * v.df);
      }
    }
    for (int64_t j = 0; j < columns; ++j) total[j] += sum[j];
  }
}

template <class T, bool GELU>
void run_as(const Problem& p, int threads, Isa isa) {
  const auto tile = p.partial ? copy_for<backward_tile<T, GELU>>(isa)
                              : copy_for<forward_tile<T, GELU>>(isa);
  run_tiles(p, tile, p.rows, p.columns, tile_columns, p.rows * p.columns, threads);
}

void run(const Problem& p, Dtype dtype, const std::string& activation, int threads,
         const std::string& isa) {
  const std::string op = "masked_swiglu";
  if (activation != "silu" && activation != "gelu_tanh")
    throw std::invalid_argument(op + ": activation is \"" + activation +
                                "\"; expected silu or gelu_tanh");
  const Isa chosen = choose_isa(op, isa);
  with_storage<Float32, BFloat16, Float16>(op, dtype, [&](auto value) {
    using T = decltype(value);
    if (activation == "silu") run_as<T, false>(p, threads, chosen);
    else run_as<T, true>(p, threads, chosen);
  });
}

}  // namespace

void masked_swiglu_forward(uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride,
                           uintptr_t mask, uintptr_t out, int64_t rows, int64_t columns, int dtype,
                           const std::string& activation, int threads, const std::string& isa) {
  Problem p{};
  p.gate = gate, p.gate_stride = gate_stride, p.up = up, p.up_stride = up_stride;
  p.mask = mask, p.out = out, p.rows = rows, p.columns = columns;
  run(p, Dtype(dtype), activation, threads, isa);
}

void masked_swiglu_backward(uintptr_t grad, int64_t grad_stride, uintptr_t gate,
                            int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t mask,
                            uintptr_t dgate, uintptr_t dup, uintptr_t dmask, int64_t rows,
                            int64_t columns, int dtype, const std::string& activation, int threads,
                            const std::string& isa) {
  std::vector<double> partial(tiles_down(rows) * columns + 1);
  Problem p{};
  p.grad = grad, p.grad_stride = grad_stride, p.gate = gate, p.gate_stride = gate_stride;
  p.up = up, p.up_stride = up_stride, p.mask = mask, p.dgate = dgate, p.dup = dup;
  p.rows = rows, p.columns = columns, p.partial = partial.data();
  run(p, Dtype(dtype), activation, threads, isa);
  add_rows(partial.data(), tiles_down(rows), columns, at<float>(dmask));
}

}  // namespace maskprune
