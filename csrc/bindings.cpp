// The only file that knows pybind11. Each operation lives in its own .cpp and is declared here.
// Pointers arrive as integers, dtypes as the codes of dtypes.hpp; the Python file of the operation
// has checked dtype, device, shape and contiguity. Every function releases the GIL and ends with
// the number of threads and the instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <string>
#include <system_error>
#include <vector>

namespace maskprune {

int fold_columns(uintptr_t weight, int64_t rows, int64_t width, int dtype, uintptr_t keep,
                 int64_t kept, uintptr_t scale, uintptr_t out, int threads, const std::string& isa);
int gather_rows(uintptr_t weight, int64_t rows, int64_t row_bytes, uintptr_t keep, int64_t kept,
                uintptr_t out, int threads);

void stream_rows(int in_file, int64_t in_at, int out_file, int64_t out_at, int64_t rows,
                 int64_t width, int dtype, uintptr_t keep_rows, int64_t kept_rows,
                 uintptr_t row_scale, uintptr_t keep_columns, int64_t kept_columns,
                 uintptr_t column_scale, uintptr_t scratch, int64_t block_rows, int threads,
                 const std::string& isa);

void least_s_prox(uintptr_t mask, int64_t rows, int64_t length, int64_t row_stride, uintptr_t s,
                  int64_t s_stride, uintptr_t shrink, uintptr_t sum_sq, uintptr_t next_sq,
                  int threads, const std::string& isa);

void minimax_step(uintptr_t head, int64_t head_rows, int64_t head_units, uintptr_t ffn,
                  int64_t ffn_rows, int64_t ffn_units, uintptr_t state, uintptr_t table,
                  int64_t splits, const std::vector<float>& rates, int threads,
                  const std::string& isa);

void masked_swiglu_forward(uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride,
                           uintptr_t mask, uintptr_t out, int64_t rows, int64_t columns, int dtype,
                           const std::string& activation, int threads, const std::string& isa);
void masked_swiglu_backward(uintptr_t grad, int64_t grad_stride, uintptr_t gate,
                            int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t mask,
                            uintptr_t dgate, uintptr_t dup, uintptr_t dmask, int64_t rows,
                            int64_t columns, int dtype, const std::string& activation, int threads,
                            const std::string& isa);

void scale_heads_forward(uintptr_t x, int64_t x_stride, uintptr_t mask, uintptr_t out, int64_t rows,
                         int64_t heads, int64_t head_size, int dtype, int threads,
                         const std::string& isa);
void scale_heads_backward(uintptr_t grad, int64_t grad_stride, uintptr_t x, int64_t x_stride,
                          uintptr_t mask, uintptr_t dx, uintptr_t dmask, int64_t rows,
                          int64_t heads, int64_t head_size, int dtype, int threads,
                          const std::string& isa);

void gumbel_two_four_forward(uintptr_t weight, uintptr_t logits, uintptr_t masked,
                             uintptr_t norm_sq, int64_t groups, int64_t seed, float kappa,
                             float tau, int dtype, int threads, const std::string& isa);
void gumbel_two_four_backward(uintptr_t dmasked, float dnorm_sq, uintptr_t weight, uintptr_t logits,
                              uintptr_t dlogits, int64_t groups, int64_t seed, float kappa,
                              float tau, int dtype, int threads, const std::string& isa);
void gumbel_two_four_noise(int64_t seed, int64_t first, int64_t groups, uintptr_t out,
                           const std::string& isa);

}  // namespace maskprune

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of maskprune; call them through maskprune.ops";
  pybind11::register_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError,
                      pybind11::make_tuple(error.code().value(), error.what()).ptr());
    }
  });
  const auto add = [&m](const char* name, auto* function) {
    m.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>());
  };
  add("fold_columns", &maskprune::fold_columns);
  add("gather_rows", &maskprune::gather_rows);
  add("stream_rows", &maskprune::stream_rows);
  add("least_s_prox", &maskprune::least_s_prox);
  add("minimax_step", &maskprune::minimax_step);
  add("masked_swiglu_forward", &maskprune::masked_swiglu_forward);
  add("masked_swiglu_backward", &maskprune::masked_swiglu_backward);
  add("scale_heads_forward", &maskprune::scale_heads_forward);
  add("scale_heads_backward", &maskprune::scale_heads_backward);
  add("gumbel_two_four_forward", &maskprune::gumbel_two_four_forward);
  add("gumbel_two_four_backward", &maskprune::gumbel_two_four_backward);
  add("gumbel_two_four_noise", &maskprune::gumbel_two_four_noise);
}
