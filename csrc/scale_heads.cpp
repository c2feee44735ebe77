// out[t, h, i] = x[t, h, i] * mask[h], and its gradients; x is rows of H * D values.
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
#include <vector>

#include "elements.hpp"

namespace maskprune {
namespace {

using namespace elementwise;

// One work item: so many rows, and as many whole heads as make about so many columns.
constexpr int64_t tile_rows = 128;
constexpr int64_t tile_columns = 1024;
// So many terms are summed in float before they join the double sum.
constexpr int64_t float_rows = 16;

struct Problem {
  std::uintptr_t grad, x, mask, dx, out;
  int64_t grad_stride, x_stride, rows, heads, head_size;
  double* partial;  // (row tiles, heads)
};

template <class T>
MP_INLINE T* at(std::uintptr_t base, int64_t offset) {
  return reinterpret_cast<T*>(base) + offset;
}

template <class T>
MP_INLINE void forward_tile(const Problem& p, int64_t row, int64_t rows, int64_t head,
                            int64_t heads) {
  for (int64_t t = row; t < row + rows; ++t) {
    for (int64_t h = head; h < head + heads; ++h) {
      const float m = at<float>(p.mask, 0)[h];
      const T* __restrict x = at<T>(p.x, t * p.x_stride + h * p.head_size);
      T* __restrict out = at<T>(p.out, (t * p.heads + h) * p.head_size);
#pragma omp simd
      for (int64_t i = 0; i < p.head_size; ++i) store(out[i], load(x[i]) * m);
    }
  }
}

template <class T>
MP_INLINE void backward_tile(const Problem& p, int64_t row, int64_t rows, int64_t head,
                             int64_t heads) {
  const int64_t size = p.head_size;
  double* total = p.partial + row / tile_rows * p.heads + head;
  std::fill(total, total + heads, 0.0);
  std::vector<float> sums(static_cast<size_t>(heads * size));
  for (int64_t first = row; first < row + rows; first += float_rows) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t t = first; t < std::min(first + float_rows, row + rows); ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const float m = at<float>(p.mask, 0)[head + h];
        const T* __restrict d = at<T>(p.grad, t * p.grad_stride + (head + h) * size);
        const T* __restrict x = at<T>(p.x, t * p.x_stride + (head + h) * size);
        T* __restrict dx = at<T>(p.dx, (t * p.heads + head + h) * size);
        float* __restrict sum = sums.data() + h * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const float dout = load(d[i]);
          sum[i] += dout * load(x[i]);
          store(dx[i], dout * m);
        }
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < size; ++i) total[h] += sums[h * size + i];
  }
}

using Tile = void (*)(const Problem&, int64_t, int64_t, int64_t, int64_t);

// One copy of each loop per instruction set; the compiler vectorises each for its own.
#define MP_TILE(NAME, BODY, TARGET)                                                           \
  template <class T>                                                                          \
  TARGET void NAME(const Problem& p, int64_t row, int64_t rows, int64_t head, int64_t heads) { \
    BODY<T>(p, row, rows, head, heads);                                                       \
  }
MP_TILE(forward_portable, forward_tile, )
MP_TILE(forward_avx2, forward_tile, MP_AVX2)
MP_TILE(forward_avx512, forward_tile, MP_AVX512)
MP_TILE(backward_portable, backward_tile, )
MP_TILE(backward_avx2, backward_tile, MP_AVX2)
MP_TILE(backward_avx512, backward_tile, MP_AVX512)
#undef MP_TILE

template <class T>
Tile tile_for(bool backward, Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return backward ? backward_avx512<T> : forward_avx512<T>;
    case Isa::avx2:
      return backward ? backward_avx2<T> : forward_avx2<T>;
    default:
      return backward ? backward_portable<T> : forward_portable<T>;
  }
}

Tile tile_for(bool backward, const std::string& dtype, Isa isa) {
  if (dtype == "float32") return tile_for<Float32>(backward, isa);
  if (dtype == "bfloat16") return tile_for<BFloat16>(backward, isa);
  if (dtype == "float16") return tile_for<Float16>(backward, isa);
  throw std::invalid_argument("scale_heads: dtype is " + dtype +
                              "; expected float32, bfloat16 or float16");
}

void run(const Problem& p, Tile tile, int threads) {
  const int64_t group = std::max<int64_t>(1, tile_columns / std::max<int64_t>(1, p.head_size));
  const int64_t down = (p.rows + tile_rows - 1) / tile_rows;
  const int64_t across = (p.heads + group - 1) / group;
  threads = threads_for(p.rows * p.heads * p.head_size, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < down * across; ++item) {
    const int64_t row = item / across * tile_rows, head = item % across * group;
    tile(p, row, std::min(tile_rows, p.rows - row), head, std::min(group, p.heads - head));
  }
}

}  // namespace

void scale_heads_forward(std::uintptr_t x, int64_t x_stride, std::uintptr_t mask,
                         std::uintptr_t out, int64_t rows, int64_t heads, int64_t head_size,
                         const std::string& dtype, const std::string& isa, int threads) {
  Problem p{};
  p.x = x, p.x_stride = x_stride, p.mask = mask, p.out = out;
  p.rows = rows, p.heads = heads, p.head_size = head_size;
  run(p, tile_for(false, dtype, choose_isa("scale_heads", isa)), threads);
}

void scale_heads_backward(std::uintptr_t grad, int64_t grad_stride, std::uintptr_t x,
                          int64_t x_stride, std::uintptr_t mask, std::uintptr_t dx,
                          std::uintptr_t dmask, int64_t rows, int64_t heads, int64_t head_size,
                          const std::string& dtype, const std::string& isa, int threads) {
  const int64_t down = (rows + tile_rows - 1) / tile_rows;
  const std::unique_ptr<double[]> partial(new double[down * heads]);
  Problem p{};
  p.grad = grad, p.grad_stride = grad_stride, p.x = x, p.x_stride = x_stride, p.mask = mask;
  p.dx = dx, p.rows = rows, p.heads = heads, p.head_size = head_size, p.partial = partial.get();
  run(p, tile_for(true, dtype, choose_isa("scale_heads", isa)), threads);
  float* dm = at<float>(dmask, 0);
  for (int64_t h = 0; h < heads; ++h) {
    double sum = 0.0;
    for (int64_t i = 0; i < down; ++i) sum += partial[i * heads + h];
    dm[h] = static_cast<float>(sum);
  }
}

}  // namespace maskprune
