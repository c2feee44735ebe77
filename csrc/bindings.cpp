// The only file that knows pybind11. Each operation lives in its own .cpp and is declared here.
// Pointers arrive as integers; the Python file of the operation has checked dtype, device, shape
// and contiguity. Every function releases the GIL and takes its thread count from the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <string>
#include <system_error>
#include <vector>

namespace py = pybind11;

int fold_columns(std::uintptr_t weight, std::int64_t rows, std::int64_t width, int dtype,
                 std::uintptr_t keep, std::int64_t kept, std::uintptr_t scale, std::uintptr_t out,
                 int threads, const std::string& isa);
int gather_rows(std::uintptr_t weight, std::int64_t rows, std::int64_t row_bytes,
                std::uintptr_t keep, std::int64_t kept, std::uintptr_t out, int threads);
void stream_rows(int in_file, std::int64_t in_at, int out_file, std::int64_t out_at,
                 std::int64_t rows, std::int64_t width, int dtype, std::uintptr_t keep_rows,
                 std::int64_t kept_rows, std::uintptr_t row_scale, std::uintptr_t keep_columns,
                 std::int64_t kept_columns, std::uintptr_t column_scale, std::uintptr_t scratch,
                 std::int64_t block_rows, int threads, const std::string& isa);

void minimax_step(std::uintptr_t head, std::int64_t head_rows, std::int64_t head_units,
                  std::uintptr_t ffn, std::int64_t ffn_rows, std::int64_t ffn_units,
                  std::uintptr_t state, std::uintptr_t table, std::int64_t splits,
                  const std::vector<float>& rates, int threads, const std::string& isa);
void least_s_prox(std::uintptr_t mask, std::int64_t rows, std::int64_t length,
                  std::int64_t row_stride, std::uintptr_t s, std::int64_t s_stride,
                  std::uintptr_t shrink, std::uintptr_t sum_sq, std::uintptr_t next_sq,
                  int threads, const std::string& isa);
void foreach_least_s_prox(const std::vector<std::uintptr_t>& rows,
                          const std::vector<std::int64_t>& lengths, std::uintptr_t s,
                          std::int64_t s_stride, std::uintptr_t shrink, std::uintptr_t sum_sq,
                          std::uintptr_t next_sq, int threads, const std::string& isa);

namespace maskprune {
void masked_swiglu_forward(std::uintptr_t gate, std::int64_t gate_stride, std::uintptr_t up,
                           std::int64_t up_stride, std::uintptr_t mask, std::uintptr_t out,
                           std::int64_t rows, std::int64_t columns, const std::string& dtype,
                           const std::string& activation, const std::string& isa, int threads);
void masked_swiglu_backward(std::uintptr_t grad, std::int64_t grad_stride, std::uintptr_t gate,
                            std::int64_t gate_stride, std::uintptr_t up, std::int64_t up_stride,
                            std::uintptr_t mask, std::uintptr_t dgate, std::uintptr_t dup,
                            std::uintptr_t dmask, std::int64_t rows, std::int64_t columns,
                            const std::string& dtype, const std::string& activation,
                            const std::string& isa, int threads);
void scale_heads_forward(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t mask,
                         std::uintptr_t out, std::int64_t rows, std::int64_t heads,
                         std::int64_t head_size, const std::string& dtype, const std::string& isa,
                         int threads);
void scale_heads_backward(std::uintptr_t grad, std::int64_t grad_stride, std::uintptr_t x,
                          std::int64_t x_stride, std::uintptr_t mask, std::uintptr_t dx,
                          std::uintptr_t dmask, std::int64_t rows, std::int64_t heads,
                          std::int64_t head_size, const std::string& dtype,
                          const std::string& isa, int threads);
void gumbel_two_four_forward(std::uintptr_t weight, std::uintptr_t logits, std::uintptr_t masked,
                             std::uintptr_t norm_sq, std::int64_t groups, std::int64_t seed,
                             float kappa, float tau, const std::string& dtype,
                             const std::string& isa, int threads);
void gumbel_two_four_backward(std::uintptr_t dmasked, float dnorm_sq, std::uintptr_t weight,
                              std::uintptr_t logits, std::uintptr_t dlogits, std::int64_t groups,
                              std::int64_t seed, float kappa, float tau, const std::string& dtype,
                              const std::string& isa, int threads);
void gumbel_two_four_noise(std::int64_t seed, std::int64_t first, std::int64_t groups,
                           std::uintptr_t out, const std::string& isa);
}  // namespace maskprune

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of maskprune; call them through maskprune.ops";
  m.def("fold_columns", &fold_columns, py::call_guard<py::gil_scoped_release>());
  m.def("gather_rows", &gather_rows, py::call_guard<py::gil_scoped_release>());
  m.def("stream_rows", &stream_rows, py::call_guard<py::gil_scoped_release>());
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });
  m.def("minimax_step", &minimax_step, py::call_guard<py::gil_scoped_release>());
  m.def("least_s_prox", &least_s_prox, py::call_guard<py::gil_scoped_release>());
  m.def("foreach_least_s_prox", &foreach_least_s_prox, py::call_guard<py::gil_scoped_release>());
  m.def("masked_swiglu_forward", &maskprune::masked_swiglu_forward,
        py::call_guard<py::gil_scoped_release>());
  m.def("masked_swiglu_backward", &maskprune::masked_swiglu_backward,
        py::call_guard<py::gil_scoped_release>());
  m.def("scale_heads_forward", &maskprune::scale_heads_forward,
        py::call_guard<py::gil_scoped_release>());
  m.def("scale_heads_backward", &maskprune::scale_heads_backward,
        py::call_guard<py::gil_scoped_release>());
  m.def("gumbel_two_four_forward", &maskprune::gumbel_two_four_forward,
        py::call_guard<py::gil_scoped_release>());
  m.def("gumbel_two_four_backward", &maskprune::gumbel_two_four_backward,
        py::call_guard<py::gil_scoped_release>());
  m.def("gumbel_two_four_noise", &maskprune::gumbel_two_four_noise,
        py::call_guard<py::gil_scoped_release>());
}
