// The only file that knows pybind11. Each operation lives in its own .cpp and is declared here.
// Pointers arrive as integers; the Python file of the operation has checked dtype, device, shape
// and contiguity. Every function releases the GIL and takes its thread count from the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

int fold_columns(std::uintptr_t weight, std::int64_t rows, std::int64_t width, int dtype,
                 std::uintptr_t keep, std::int64_t kept, std::uintptr_t scale, std::uintptr_t out,
                 int threads, const std::string& isa);
int gather_rows(std::uintptr_t weight, std::int64_t rows, std::int64_t row_bytes,
                std::uintptr_t keep, std::int64_t kept, std::uintptr_t out, int threads);

void least_s_prox(const std::vector<std::uintptr_t>& rows,
                  const std::vector<std::int64_t>& lengths, std::uintptr_t s,
                  std::int64_t s_stride, float shrink, std::uintptr_t sum_sq,
                  std::uintptr_t next_sq, int threads, const std::string& isa);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of maskprune; call them through maskprune.ops";
  m.def("fold_columns", &fold_columns, py::call_guard<py::gil_scoped_release>());
  m.def("gather_rows", &gather_rows, py::call_guard<py::gil_scoped_release>());
  m.def("least_s_prox", &least_s_prox, py::call_guard<py::gil_scoped_release>());
}
