// out = act(gate) * up * mask, and its gradients; gate and up are rows of F values, mask is (F,).
// Both activations are g * sigmoid(z(g)): silu has z = g, gelu_tanh has z = 2k (g + a g^3).
// The sums over rows run in one order that only the sizes decide, so the number of threads never
// changes a bit.
#if defined(__GNUC__) && !defined(__clang__)
// Nobody reads the floating-point exception flags; minding them keeps selects from vectorising.
#pragma GCC optimize("no-trapping-math")
#endif

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "elements.hpp"
#include "exp_log.hpp"

namespace maskprune {
namespace {

using namespace elementwise;

// One work item. Its rows share one row of partial sums.
constexpr int64_t tile_rows = 128;
constexpr int64_t tile_columns = 1024;
// So many terms are summed in float before they join the double sum.
constexpr int64_t float_rows = 16;

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
  std::uintptr_t grad, gate, up, mask, dgate, dup, out;
  int64_t grad_stride, gate_stride, up_stride, rows, columns;
  double* partial;  // (row tiles, columns)
};

template <class T>
MP_INLINE T* at(std::uintptr_t base, int64_t offset) {
  return reinterpret_cast<T*>(base) + offset;
}

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
  std::fill(total, total + columns, 0.0);
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

using Tile = void (*)(const Problem&, int64_t, int64_t, int64_t, int64_t);

// One copy of each loop per instruction set; the compiler vectorises each for its own.
#define MP_TILE(NAME, BODY, TARGET)                                                       \
  template <class T, bool GELU>                                                           \
  TARGET void NAME(const Problem& p, int64_t row, int64_t rows, int64_t column,           \
                   int64_t columns) {                                                     \
    BODY<T, GELU>(p, row, rows, column, columns);                                         \
  }
MP_TILE(forward_portable, forward_tile, )
MP_TILE(forward_avx2, forward_tile, MP_AVX2)
MP_TILE(forward_avx512, forward_tile, MP_AVX512)
MP_TILE(backward_portable, backward_tile, )
MP_TILE(backward_avx2, backward_tile, MP_AVX2)
MP_TILE(backward_avx512, backward_tile, MP_AVX512)
#undef MP_TILE

template <class T, bool GELU>
Tile tile_for(bool backward, Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return backward ? backward_avx512<T, GELU> : forward_avx512<T, GELU>;
    case Isa::avx2:
      return backward ? backward_avx2<T, GELU> : forward_avx2<T, GELU>;
    default:
      return backward ? backward_portable<T, GELU> : forward_portable<T, GELU>;
  }
}

template <class T>
Tile tile_for(bool backward, const std::string& activation, Isa isa) {
  if (activation == "silu") return tile_for<T, false>(backward, isa);
  if (activation == "gelu_tanh") return tile_for<T, true>(backward, isa);
  throw std::invalid_argument("masked_swiglu: activation is " + activation +
                              "; expected silu or gelu_tanh");
}

Tile tile_for(bool backward, const std::string& dtype, const std::string& activation, Isa isa) {
  if (dtype == "float32") return tile_for<Float32>(backward, activation, isa);
  if (dtype == "bfloat16") return tile_for<BFloat16>(backward, activation, isa);
  if (dtype == "float16") return tile_for<Float16>(backward, activation, isa);
  throw std::invalid_argument("masked_swiglu: dtype is " + dtype +
                              "; expected float32, bfloat16 or float16");
}

void run(const Problem& p, Tile tile, int threads) {
  const int64_t down = (p.rows + tile_rows - 1) / tile_rows;
  const int64_t across = (p.columns + tile_columns - 1) / tile_columns;
  threads = threads_for(p.rows * p.columns, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < down * across; ++item) {
    const int64_t row = item / across * tile_rows, column = item % across * tile_columns;
    tile(p, row, std::min(tile_rows, p.rows - row), column,
         std::min(tile_columns, p.columns - column));
  }
}

}  // namespace

void masked_swiglu_forward(std::uintptr_t gate, int64_t gate_stride, std::uintptr_t up,
                           int64_t up_stride, std::uintptr_t mask, std::uintptr_t out,
                           int64_t rows, int64_t columns, const std::string& dtype,
                           const std::string& activation, const std::string& isa, int threads) {
  Problem p{};
  p.gate = gate, p.gate_stride = gate_stride, p.up = up, p.up_stride = up_stride;
  p.mask = mask, p.out = out, p.rows = rows, p.columns = columns;
  run(p, tile_for(false, dtype, activation, choose_isa("masked_swiglu", isa)), threads);
}

void masked_swiglu_backward(std::uintptr_t grad, int64_t grad_stride, std::uintptr_t gate,
                            int64_t gate_stride, std::uintptr_t up, int64_t up_stride,
                            std::uintptr_t mask, std::uintptr_t dgate, std::uintptr_t dup,
                            std::uintptr_t dmask, int64_t rows, int64_t columns,
                            const std::string& dtype, const std::string& activation,
                            const std::string& isa, int threads) {
  const int64_t down = (rows + tile_rows - 1) / tile_rows;
  const std::unique_ptr<double[]> partial(new double[down * columns]);
  Problem p{};
  p.grad = grad, p.grad_stride = grad_stride, p.gate = gate, p.gate_stride = gate_stride;
  p.up = up, p.up_stride = up_stride, p.mask = mask, p.dgate = dgate, p.dup = dup;
  p.rows = rows, p.columns = columns, p.partial = partial.get();
  run(p, tile_for(true, dtype, activation, choose_isa("masked_swiglu", isa)), threads);
  float* dm = at<float>(dmask, 0);
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0.0;
    for (int64_t i = 0; i < down; ++i) sum += partial[i * columns + j];
    dm[j] = static_cast<float>(sum);
  }
}

}  // namespace maskprune
