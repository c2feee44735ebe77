// out[t, h, i] = x[t, h, i] * mask[h], and its gradients; x is rows of H * D values.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "dtypes.hpp"
#include "isa.hpp"
#include "tiles.hpp"

namespace maskprune {
namespace {

struct Problem {
  uintptr_t grad, x, mask, dx, out;
  int64_t grad_stride, x_stride, rows, heads, head_size;
  double* partial;  // (tiles down, heads), zeros
};

template <class T>
MP_INLINE void forward_tile(const Problem& p, int64_t row, int64_t rows, int64_t head,
                            int64_t heads) {
  for (int64_t t = row; t < row + rows; ++t) {
    for (int64_t h = head; h < head + heads; ++h) {
      const float m = at<float>(p.mask)[h];
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
  std::vector<float> sums(heads * size);
  for (int64_t first = row; first < row + rows; first += float_rows) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t t = first; t < std::min(first + float_rows, row + rows); ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const float m = at<float>(p.mask)[head + h];
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

// A tile has as many whole heads as make about tile_columns.
void run(const Problem& p, Dtype dtype, int threads, const std::string& isa) {
  const Isa chosen = choose_isa("scale_heads", isa);
  const int64_t width = std::max<int64_t>(1, tile_columns / std::max<int64_t>(1, p.head_size));
  with_storage<Float32, BFloat16, Float16>("scale_heads", dtype, [&](auto value) {
    using T = decltype(value);
    const auto tile =
        p.partial ? copy_for<backward_tile<T>>(chosen) : copy_for<forward_tile<T>>(chosen);
    run_tiles(p, tile, p.rows, p.heads, width, p.rows * p.heads * p.head_size, threads);
  });
}

}  // namespace

void scale_heads_forward(uintptr_t x, int64_t x_stride, uintptr_t mask, uintptr_t out, int64_t rows,
                         int64_t heads, int64_t head_size, int dtype, int threads,
                         const std::string& isa) {
  Problem p{};
  p.x = x, p.x_stride = x_stride, p.mask = mask, p.out = out;
  p.rows = rows, p.heads = heads, p.head_size = head_size;
  run(p, Dtype(dtype), threads, isa);
}

void scale_heads_backward(uintptr_t grad, int64_t grad_stride, uintptr_t x, int64_t x_stride,
                          uintptr_t mask, uintptr_t dx, uintptr_t dmask, int64_t rows,
                          int64_t heads, int64_t head_size, int dtype, int threads,
                          const std::string& isa) {
  std::vector<double> partial(tiles_down(rows) * heads + 1);
  Problem p{};
  p.grad = grad, p.grad_stride = grad_stride, p.x = x, p.x_stride = x_stride, p.mask = mask;
  p.dx = dx, p.rows = rows, p.heads = heads, p.head_size = head_size, p.partial = partial.data();
  run(p, Dtype(dtype), threads, isa);
  add_rows(partial.data(), tiles_down(rows), heads, at<float>(dmask));
}

}  // namespace maskprune
